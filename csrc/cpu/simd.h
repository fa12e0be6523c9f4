// Loads, stores and loops over the columns of a row, for any element type and alignment: all that a kernel
// needs of SIMD.
//
// Elements are read as fp32 (fp64 stays fp64) and rounded once, to nearest even, when they are stored.

#pragma once

#include "simd_half.h"
#include "simd_types.h"

namespace fastreg::FASTREG_SIMD {

// Past the caches, for outputs too large to be found there again: saves the read of each line before it is
// overwritten. `target` must be aligned to the vector; finish_streams() makes the stores visible to other
// threads.
template <class V>
FASTREG_INLINE void stream_bytes(void* target, const V& vector) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(target), bit_cast<__m512i>(vector));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(target), bit_cast<__m256i>(vector));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(target), bit_cast<__m128i>(vector));
  }
#endif
  __builtin_memcpy(target, &vector, sizeof(vector));
}

FASTREG_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// A vector's worth of adjacent elements, of any alignment.
struct AllLanes {
  template <class Element>
  FASTREG_INLINE Vector<Accumulator<Element>> load(const Element* source) const {
    if constexpr (sizeof(Element) == 2) {
      HalfWords halves;
      __builtin_memcpy(&halves, source, sizeof(halves));
      return decode(halves, Element{});
    } else {
      Vector<Element> vector;
      __builtin_memcpy(&vector, source, sizeof(vector));
      return vector;
    }
  }

  template <class Element>
  FASTREG_INLINE void store(Element* target, Vector<Accumulator<Element>> vector) const {
    if constexpr (sizeof(Element) == 2) {
      const HalfWords halves = encode(vector, Element{});
      __builtin_memcpy(target, &halves, sizeof(halves));
    } else {
      __builtin_memcpy(target, &vector, sizeof(vector));
    }
  }

  template <class Element>
  FASTREG_INLINE void stream(Element* target, Vector<Accumulator<Element>> vector) const {
    if constexpr (sizeof(Element) == 2) {
      stream_bytes(target, encode(vector, Element{}));
    } else {
      stream_bytes(target, vector);
    }
  }

  template <class V>
  FASTREG_INLINE V keep(V vector) const {
    return vector;
  }
};

// The first `count` lanes: the end of a row. Missing lanes load as zero and are never touched in memory.
struct SomeLanes {
  int count;

  template <class Element>
  FASTREG_INLINE Vector<Accumulator<Element>> load(const Element* source) const {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(Element) == 2) {
      return decode(bit_cast<HalfWords>(_mm256_maskz_loadu_epi16(mask(), source)), Element{});
    } else if constexpr (sizeof(Element) == 4) {
      return _mm512_maskz_loadu_ps(mask(), source);
    } else {
      return _mm512_maskz_loadu_pd(mask(), source);
    }
#else
    Element elements[lanes_of<Accumulator<Element>>] = {};
    copy(elements, source);
    return AllLanes{}.load(elements);
#endif
  }

  template <class Element>
  FASTREG_INLINE void store(Element* target, Vector<Accumulator<Element>> vector) const {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(Element) == 2) {
      _mm256_mask_storeu_epi16(target, mask(), bit_cast<__m256i>(encode(vector, Element{})));
    } else if constexpr (sizeof(Element) == 4) {
      _mm512_mask_storeu_ps(target, mask(), vector);
    } else {
      _mm512_mask_storeu_pd(target, mask(), vector);
    }
#else
    Element elements[lanes_of<Accumulator<Element>>];
    AllLanes{}.store(elements, vector);
    copy(target, elements);
#endif
  }

  template <class Element>
  FASTREG_INLINE void stream(Element* target, Vector<Accumulator<Element>> vector) const {
    store(target, vector);
  }

  // Zeroes the missing lanes.
  template <class V>
  FASTREG_INLINE V keep(V vector) const {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(vector[0]) == 4) {
      return _mm512_maskz_mov_ps(mask(), vector);
    } else {
      return _mm512_maskz_mov_pd(mask(), vector);
    }
#else
    using Scalar = decltype(vector[0] + vector[0]);
    Scalar elements[lanes_of<Scalar>] = {};
    Scalar all[lanes_of<Scalar>];
    AllLanes{}.store(all, vector);
    copy(elements, all);
    return AllLanes{}.load(elements);
#endif
  }

 private:
  FASTREG_INLINE uint16_t mask() const { return static_cast<uint16_t>((1u << count) - 1); }

  // Without unrolling: this is inlined wherever a row ends.
  template <class Element>
  FASTREG_INLINE void copy(Element* target, const Element* source) const {
#pragma GCC unroll 1
    for (int lane = 0; lane < count; ++lane) {
      target[lane] = source[lane];
    }
  }
};

// A whole vector that ends with the first `count` lanes, where what is before them is known to be there: full loads and
// stores take a fraction of what those of some lanes do. For bodies only that give a column the same value again.
struct LastLanes {
  int count;

  template <class Element>
  FASTREG_INLINE Vector<Accumulator<Element>> load(const Element* source) const {
    return AllLanes{}.load(source - overlap<Element>());
  }

  template <class Element>
  FASTREG_INLINE void store(Element* target, Vector<Accumulator<Element>> vector) const {
    AllLanes{}.store(target - overlap<Element>(), vector);
  }

  template <class Element>
  FASTREG_INLINE void stream(Element* target, Vector<Accumulator<Element>> vector) const {
    store(target, vector);
  }

 private:
  template <class Element>
  FASTREG_INLINE int overlap() const {
    return lanes_of<Accumulator<Element>> - count;
  }
};

// Calls body(lanes, column, k) for every vector of `columns` columns; k counts 0 .. unroll - 1 and chooses
// one of as many independent accumulators, so that additions overlap.
template <class Scalar, int unroll, bool may_repeat = false, class Body>
FASTREG_INLINE void for_columns(int64_t columns, const Body& body) {
  constexpr int lanes = lanes_of<Scalar>;
  int64_t column = 0;
  for (; column + unroll * lanes <= columns; column += unroll * lanes) {
#pragma GCC unroll 8
    for (int k = 0; k < unroll; ++k) {
      body(AllLanes{}, column + k * lanes, k);
    }
  }
  for (; column + lanes <= columns; column += lanes) {
    body(AllLanes{}, column, 0);
  }
  if (column < columns) {
    const int rest = static_cast<int>(columns - column);
    if constexpr (may_repeat) {
      if (column > 0) {
        return body(LastLanes{rest}, column, 0);
      }
    }
    body(SomeLanes{rest}, column, 0);
  }
}

// As for_columns, for a body that may be called for a column twice.
template <class Scalar, int unroll, class Body>
FASTREG_INLINE void map_columns(int64_t columns, const Body& body) {
  for_columns<Scalar, unroll, true>(columns, body);
}

}  // namespace fastreg::FASTREG_SIMD
