// Applies DropBlock's bits to planes: output = bit ? input * scale : 0, by selection.
//
// The bits of a tile of adjacent elements, whose rows begin at whole bytes, are first pushed together into one string,
// several short rows at a time; a straight loop over memory reads a mask from it for each vector. Rows of whole bytes
// are such a string already.
//
// Memory sees one read and one write of the activations, and the bits, which are a 32nd of fp32.

#pragma once

#include <cstddef>

#include "drop_block.h"
#include "simd_bits.h"

namespace fastreg::FASTREG_SIMD {

template <class Element, class Lanes>
FASTREG_INLINE void put_element(bool streams, Lanes lanes, Element* target, Vector<Accumulator<Element>> values) {
  if (streams) {
    lanes.stream(target, values);
  } else {
    lanes.store(target, values);
  }
}

// --- bits pushed together ----------------------------------------------------------------------------------

// Bits are appended to a string; whole words are written out.
class BitString {
 public:
  FASTREG_INLINE explicit BitString(unsigned char* target) : target_(target) {}

  // The low `count` bits, of 1 to 64; those above them are zero.
  FASTREG_INLINE void append(uint64_t bits, int count) {
    word_ |= bits << filled_;
    const int filled = filled_ + count;
    if (filled >= 64) {
      flush();
      word_ = filled_ == 0 ? 0 : bits >> (64 - filled_);
      target_ += sizeof(word_);
      filled_ = filled - 64;
    } else {
      filled_ = filled;
    }
  }

  // What is not written yet, in a whole word.
  FASTREG_INLINE void flush() const { __builtin_memcpy(target_, &word_, sizeof(word_)); }

 private:
  unsigned char* target_;
  uint64_t word_ = 0;
  int filled_ = 0;
};

// Rows of bits of one width: reads as many as a word has.
class BitRows {
 public:
  FASTREG_INLINE explicit BitRows(const DropBlockApply& apply) : apply_(apply), end_(apply.bits + apply.bits_bytes) {
    const bool whole = apply.row_bytes == 1 || apply.row_bytes == 2 || apply.row_bytes == 4;
    rows_per_word_ = whole ? 8 / apply.row_bytes : 1;
    gap_ = static_cast<int>(8 * apply.row_bytes - apply.width);
  }

  // The bits of `count` adjacent elements from `position` on.
  FASTREG_INLINE void gather(int64_t position, int64_t count, unsigned char* target) const {
    BitString string(target);
    int64_t row = position / apply_.width;
    int64_t column = position % apply_.width;
    // Rows that follow each other in memory, of one plane where planes share their bits.
    const int64_t stretch = apply_.shared ? apply_.rows : row + count;
    const int64_t word_elements = rows_per_word_ * apply_.width;
    while (count > 0) {
      int64_t in_stretch = row;
      const unsigned char* source = apply_.bits;
      if (apply_.shared) {
        in_stretch = row % apply_.rows;
        source += row / (apply_.rows * apply_.channels) * apply_.plane_bytes();
      }
      source += in_stretch * apply_.row_bytes;
      int64_t rows = stretch - in_stretch;
      while (rows > 0 && count > 0) {
        if (rows_per_word_ > 1 && column == 0 && count >= apply_.width) {
          while (rows >= rows_per_word_ && count >= word_elements && has_word(source)) {
            string.append(compressed(source), static_cast<int>(word_elements));
            source += sizeof(uint64_t);
            rows -= rows_per_word_;
            row += rows_per_word_;
            count -= word_elements;
          }
          const int64_t taken = least(rows, count / apply_.width);
          if (taken > 0 && taken < rows_per_word_ && has_word(source)) {
            const int64_t elements = taken * apply_.width;
            string.append(compressed(source) & ((uint64_t{1} << elements) - 1), static_cast<int>(elements));
            source += taken * apply_.row_bytes;
            rows -= taken;
            row += taken;
            count -= elements;
          }
          if (rows == 0 || count == 0) {
            break;
          }
        }
        const int64_t last = least(apply_.width, column + count);
        count -= last - column;
        append_row(string, source, column, last);
        column = 0;
        --rows;
        ++row;
        source += apply_.row_bytes;
      }
    }
    string.flush();
  }

 private:
  FASTREG_INLINE bool has_word(const unsigned char* source) const {
    return end_ - source >= int64_t{sizeof(uint64_t)};
  }

  // Part of a row: from the byte of `begin` on, six bytes at a time.
  FASTREG_INLINE void append_row(BitString& string, const unsigned char* row, int64_t begin, int64_t end) const {
    constexpr int64_t most = 48;
    while (begin < end) {
      const int64_t next = least(end, begin / 8 * 8 + most);
      const unsigned char* const source = row + begin / 8;
      uint64_t word = 0;
      if (has_word(source)) {
        __builtin_memcpy(&word, source, sizeof(word));
      } else {
        for (int64_t byte = 0; byte < (next + 7) / 8 - begin / 8; ++byte) {
          word |= uint64_t{source[byte]} << (8 * byte);
        }
      }
      const int count = static_cast<int>(next - begin);
      string.append(word >> (begin % 8) & ((uint64_t{1} << count) - 1), count);
      begin = next;
    }
  }

  // A word of rows of one, two or four bytes without the gaps between them: neighbours are joined, then pairs, then
  // fours.
  FASTREG_INLINE uint64_t compressed(const unsigned char* source) const {
    uint64_t word;
    __builtin_memcpy(&word, source, sizeof(word));
    int gap = gap_;
    if (apply_.row_bytes == 1) {
      word = (word & 0x00ff00ff00ff00ff) | (word & 0xff00ff00ff00ff00) >> gap;
      gap *= 2;
    }
    if (apply_.row_bytes <= 2) {
      word = (word & 0x0000ffff0000ffff) | (word & 0xffff0000ffff0000) >> gap;
      gap *= 2;
    }
    return (word & 0x00000000ffffffff) | (word & 0xffffffff00000000) >> gap;
  }

  const DropBlockApply& apply_;
  const unsigned char* end_;
  int64_t rows_per_word_;
  int gap_;
};

// --- tiles -------------------------------------------------------------------------------------------------

template <class Element>
void apply_planes(const DropBlockApply& apply, int64_t begin_tile, int64_t end_tile) {
  using Scalar = Accumulator<Element>;
  using V = Vector<Scalar>;
  const int64_t spans = apply.scale_per_sample ? apply.samples : 1;
  const int64_t span = apply.samples / spans * apply.sample_elements();
  const int64_t tiles = (span + drop_block_tile - 1) / drop_block_tile;
  const bool whole_bytes = apply.width % 8 == 0 && !apply.shared && (spans == 1 || span % 8 == 0);
  const BitRows rows(apply);
  // A word beyond the last bit, and what a vector reads.
  alignas(64) unsigned char string[drop_block_tile / 8 + 2 * sizeof(uint64_t)];
  for (int64_t index = begin_tile; index < end_tile; ++index) {
    const int64_t within = index % tiles * drop_block_tile;
    const int64_t position = index / tiles * span + within;
    const int64_t count = least(drop_block_tile, span - within);
    const unsigned char* bits = string;
    if (whole_bytes) {
      bits = apply.bits + position / 8;
    } else {
      rows.gather(position, count, string);
    }
    const Element* const input = static_cast<const Element*>(apply.input) + position;
    Element* const output = static_cast<Element*>(apply.output) + position;
    const V scale = broadcast(static_cast<Scalar>(apply.scales[index / tiles]));
    const bool streams = apply.streams && position % lanes_of<Scalar> == 0;
    for_columns<Scalar, 4>(count, [&](auto lanes, int64_t column, int) {
      const LaneMask<V> kept = mask_of_bits<V>(load_bits<Scalar>(lanes, bits, column));
      put_element(streams, lanes, output + column, select(kept, lanes.load(input + column) * scale, V{}));
    });
  }
  if (apply.streams) {
    finish_streams();
  }
}

}  // namespace fastreg::FASTREG_SIMD
