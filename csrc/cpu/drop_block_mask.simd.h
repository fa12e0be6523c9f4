// DropBlock's mask: seeds drawn by Philox, blocks grown from them, one bit a position.
//
// The lanes of a group of planes become a string of bits, one a place of a seed; that is most of the work, and the same
// whatever the rate. At usual rates a plane has few seeds: the block of each is drawn into lines of bits, and only rows
// that one touches are written out. Where there are many, a row of seeds is a slice of the string, widened by shifts
// that double (a block of 7: by 1, 2 and 3), then rows are or-ed below one another and, in three dimensions, planes
// behind one another in the same way.
//
// Memory sees the bits written once. Counts are integers: exact in any order.

#pragma once

#include <cstddef>

#include "drop_block.h"
#include "philox.simd.h"

namespace fastreg::FASTREG_SIMD {

constexpr int word_bits = 64;

// --- bits --------------------------------------------------------------------------------------------------

// `count` bits, a word at most, from bit `begin` on; nine bytes from there can be read. (Little-endian.)
FASTREG_INLINE uint64_t bits_at(const unsigned char* bits, int64_t begin, int64_t count) {
  uint64_t word;
  __builtin_memcpy(&word, bits + begin / 8, sizeof(word));
  const int shift = static_cast<int>(begin % 8);
  word = word >> shift | (uint64_t{bits[begin / 8 + 8]} << 1) << (word_bits - 1 - shift);
  return count < word_bits ? word & ((uint64_t{1} << count) - 1) : word;
}

// Calls step(distance) so that, after each bit has been copied that far, a run of `length` has grown from every one.
template <class Step>
FASTREG_INLINE void grow(int64_t length, const Step& step) {
  for (int64_t grown = 1; grown < length;) {
    const int64_t distance = grown < length - grown ? grown : length - grown;
    step(distance);
    grown += distance;
  }
}

// Bits of a line of words, moved towards the higher ones and or-ed to what is there.
FASTREG_INLINE void or_shifted(uint64_t* line, int64_t words, int64_t distance) {
  const int64_t whole = distance / word_bits;
  const int rest = static_cast<int>(distance % word_bits);
  for (int64_t word = words - 1; word >= whole; --word) {
    uint64_t moved = line[word - whole] << rest;
    if (rest != 0 && word > whole) {
      moved |= line[word - whole - 1] >> (word_bits - rest);
    }
    line[word] |= moved;
  }
}

FASTREG_INLINE void shift_down(uint64_t* line, int64_t words, int64_t distance) {
  const int64_t whole = distance / word_bits;
  const int rest = static_cast<int>(distance % word_bits);
  for (int64_t word = 0; word < words; ++word) {
    const uint64_t low = word + whole < words ? line[word + whole] : 0;
    const uint64_t high = word + whole + 1 < words ? line[word + whole + 1] : 0;
    line[word] = rest == 0 ? low : low >> rest | high << (word_bits - rest);
  }
}

// --- a plane -----------------------------------------------------------------------------------------------

// The lines that a plane is worked out in: blocks may begin before the first row and column, and are moved there last.
struct PlaneLines {
  int64_t words;
  int64_t height;
  int64_t depth;

  FASTREG_INLINE explicit PlaneLines(const DropBlockMask& mask)
      : words((mask.size[2] + mask.before[2] + word_bits - 1) / word_bits),
        height(mask.size[1] + mask.before[1]),
        depth(mask.size[0] + mask.before[0]) {}

  FASTREG_INLINE int64_t count() const { return words * height * depth; }
};

// Each of `count` items of `length` words or-ed to those that lie 1, ..., block - 1 behind it.
FASTREG_INLINE void grow_items(uint64_t* items, int64_t count, int64_t length, int64_t block) {
  grow(block, [&](int64_t distance) {
    const int64_t words = distance * length;
    for (int64_t word = count * length - 1; word >= words; --word) {
      items[word] |= items[word - words];
    }
  });
}

// Rows of a plane, numbered through its depth.
struct RowRange {
  int64_t begin;
  int64_t end;
};

FASTREG_INLINE RowRange all_rows(const DropBlockMask& mask) { return {0, mask.size[0] * mask.size[1]}; }

// What the seeds of a plane drop, as lines of bits: many seeds.
FASTREG_INLINE void cover_many(const DropBlockMask& mask, const PlaneLines& shape, const unsigned char* seeds,
                               int64_t begin, uint64_t* lines) {
  __builtin_memset(lines, 0, static_cast<size_t>(shape.count()) * sizeof(uint64_t));
  const int64_t width = mask.places[2];
  for (int64_t d = 0; d < mask.places[0]; ++d) {
    for (int64_t h = 0; h < mask.places[1]; ++h, begin += width) {
      uint64_t* const line = lines + (d * shape.height + h) * shape.words;
      for (int64_t column = 0; column < width; column += word_bits) {
        line[column / word_bits] = bits_at(seeds, begin + column, width - column);
      }
      grow(mask.block[2], [&](int64_t distance) { or_shifted(line, shape.words, distance); });
      shift_down(line, shape.words, mask.before[2]);
    }
    grow_items(lines + d * shape.height * shape.words, shape.height, shape.words, mask.block[1]);
  }
  grow_items(lines, shape.depth, shape.height * shape.words, mask.block[0]);
}

// The block of one seed, in lines that are zero but for those of other seeds. `rows` grows to hold it.
FASTREG_INLINE void draw_block(const DropBlockMask& mask, const PlaneLines& shape, int64_t place, uint64_t* lines,
                               RowRange& rows) {
  const int64_t width = mask.places[2];
  const int64_t height = mask.places[1];
  const int64_t row = place / width;
  const int64_t w = place % width - mask.before[2];
  const int64_t first[2] = {row / height, row % height};
  const int64_t begin_column = w > 0 ? w : 0;
  const int64_t end_column = least(w + mask.block[2], mask.size[2]);
  // In lines, which begin `before` earlier.
  const int64_t end_plane = least(first[0] + mask.block[0], shape.depth);
  const int64_t end_line = least(first[1] + mask.block[1], shape.height);
  for (int64_t d = first[0]; d < end_plane; ++d) {
    for (int64_t h = first[1]; h < end_line; ++h) {
      uint64_t* const line = lines + (d * shape.height + h) * shape.words;
      for (int64_t column = begin_column; column < end_column;) {
        const int64_t next = least((column / word_bits + 1) * word_bits, end_column);
        line[column / word_bits] |= ~uint64_t{0} >> (word_bits - (next - column)) << column % word_bits;
        column = next;
      }
    }
  }
  const auto position = [&](int64_t line, int dimension) {
    return line > mask.before[dimension] ? line - mask.before[dimension] : 0;
  };
  const int64_t begin = position(first[0], 0) * mask.size[1] + position(first[1], 1);
  const int64_t end = (end_plane - 1 - mask.before[0]) * mask.size[1] + end_line - mask.before[1];
  rows.begin = rows.begin < begin ? rows.begin : begin;
  rows.end = rows.end > end ? rows.end : end;
}

// The bits of what is kept, into these rows of a plane; returns how many positions are not.
FASTREG_INLINE int64_t put_rows(const DropBlockMask& mask, const PlaneLines& shape, const RowRange& rows,
                                const uint64_t* lines, unsigned char* plane) {
  unsigned char* target = plane + rows.begin * mask.row_bytes;
  const unsigned char* const end = plane + rows.end * mask.row_bytes;
  const int64_t last = (mask.size[2] - 1) / word_bits;
  const uint64_t last_there = ~uint64_t{0} >> (word_bits * (last + 1) - mask.size[2]);
  int64_t dropped = 0;
  int64_t d = rows.begin / mask.size[1];
  int64_t h = rows.begin % mask.size[1];
  for (int64_t row = rows.begin; row < rows.end; ++row, target += mask.row_bytes) {
    const uint64_t* const line =
        lines + ((d + mask.before[0]) * shape.height + h + mask.before[1]) * shape.words;
    const auto put = [&](int64_t index, uint64_t there) {
      const uint64_t word = line[index] & there;
      const uint64_t kept = word ^ there;
      dropped += __builtin_popcountll(word);
      unsigned char* const bytes = target + index * int64_t{sizeof(kept)};
      if (end - bytes >= int64_t{sizeof(kept)}) {
        __builtin_memcpy(bytes, &kept, sizeof(kept));  // the rows behind are yet to come
      } else {
        for (int64_t byte = 0; byte < mask.row_bytes - index * int64_t{sizeof(kept)}; ++byte) {
          bytes[byte] = static_cast<unsigned char>(kept >> (8 * byte));
        }
      }
    };
    for (int64_t index = 0; index < last; ++index) {
      put(index, ~uint64_t{0});
    }
    put(last, last_there);
    if (++h == mask.size[1]) {
      h = 0;
      ++d;
    }
  }
  return dropped;
}

// Seeds that a plane's row has at most, on average, to be drawn one by one.
constexpr int64_t few_seeds_per_row = 1;

// The mask of a plane that has a seed; its bits are all kept as yet, and the lines are zero, and are left so. Returns
// how many positions are dropped.
FASTREG_INLINE int64_t mask_plane(const DropBlockMask& mask, const PlaneLines& shape, const unsigned char* seeds,
                                  int64_t begin, uint64_t* lines, unsigned char* plane) {
  const int64_t places = mask.plane_places();
  int64_t left = few_seeds_per_row * mask.places[0] * mask.places[1];
  RowRange rows{all_rows(mask).end, 0};
  for (int64_t first = 0; first < places && left >= 0; first += word_bits) {
    for (uint64_t word = bits_at(seeds, begin + first, places - first); word != 0 && left >= 0; word &= word - 1) {
      draw_block(mask, shape, first + __builtin_ctzll(word), lines, rows);
      --left;
    }
  }
  if (left < 0) {
    rows = all_rows(mask);
    cover_many(mask, shape, seeds, begin, lines);
  }
  const int64_t dropped = put_rows(mask, shape, rows, lines, plane);
  __builtin_memset(lines, 0, static_cast<size_t>(shape.count()) * sizeof(uint64_t));
  return dropped;
}

// --- groups of planes --------------------------------------------------------------------------------------

FASTREG_INLINE int64_t seed_bytes(const DropBlockMask& mask) {
  // With those of the step that holds the first, and what bits_at reads beyond.
  const int64_t bits = drop_block_planes(mask) * mask.plane_places() + 2 * lanes_per_step;
  return (bits / 8 + 2 * word_bits) / word_bits * word_bits;
}

inline int64_t mask_scratch(const DropBlockMask& mask) {
  return seed_bytes(mask) + PlaneLines(mask).count() * int64_t{sizeof(uint64_t)};
}

// The first seed from `begin` on; `end` or more where there is none.
FASTREG_INLINE int64_t next_seed(const unsigned char* seeds, int64_t begin, int64_t end) {
  for (; begin < end; begin += word_bits) {
    const uint64_t word = bits_at(seeds, begin, end - begin);
    if (word != 0) {
      return begin + __builtin_ctzll(word);
    }
  }
  return end;
}

FASTREG_INLINE void keep_all(const DropBlockMask& mask, unsigned char* bits, int64_t planes) {
  const int64_t bytes = planes * mask.plane_bytes();
  const unsigned char last = static_cast<unsigned char>(0xff >> (8 * mask.row_bytes - mask.size[2]));
  __builtin_memset(bits, mask.row_bytes == 1 ? last : 0xff, static_cast<size_t>(bytes));
  if (mask.row_bytes > 1 && last != 0xff) {
    for (int64_t byte = mask.row_bytes - 1; byte < bytes; byte += mask.row_bytes) {
      bits[byte] = last;
    }
  }
}

inline void mask_groups(const DropBlockMask& mask, void* scratch, int64_t begin_group, int64_t end_group) {
  unsigned char* const seeds = static_cast<unsigned char*>(scratch);
  uint64_t* const lines = reinterpret_cast<uint64_t*>(seeds + seed_bytes(mask));
  const PlaneLines shape(mask);
  __builtin_memset(lines, 0, static_cast<size_t>(shape.count()) * sizeof(uint64_t));
  const PhiloxStream stream(mask.seed);
  const int64_t places = mask.plane_places();
  const int64_t group_planes = drop_block_planes(mask);
  const int64_t planes = mask.samples * mask.channels;
  for (int64_t group = begin_group; group < end_group; ++group) {
    const int64_t first = group * group_planes;
    const int64_t count = first + group_planes < planes ? group_planes : planes - first;
    unsigned char* const bits = mask.bits + first * mask.plane_bytes();
    keep_all(mask, bits, count);
    if (!mask.draws) {
      continue;
    }
    const int64_t before = first * places % philox_lanes;
    const uint64_t block = static_cast<uint64_t>(first * places / philox_lanes);
    for (int64_t place = 0; place < before + count * places; place += lanes_per_step) {
      const PhiloxStep step = stream.step(block + static_cast<uint64_t>(place / philox_lanes));
      put_bits_up_to(step, mask.last, seeds + place / 8);
    }
    const int64_t end = before + count * places;
    for (int64_t begin = before; (begin = next_seed(seeds, begin, end)) < end;) {
      const int64_t plane = (begin - before) / places;
      begin = before + plane * places;
      const int64_t dropped = mask_plane(mask, shape, seeds, begin, lines, bits + plane * mask.plane_bytes());
      __atomic_fetch_sub(&mask.counts[(first + plane) / mask.channels], dropped, __ATOMIC_RELAXED);
      begin += places;
    }
  }
}

}  // namespace fastreg::FASTREG_SIMD
