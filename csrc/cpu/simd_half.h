// 16-bit elements in vectors: to fp32 exactly, from fp32 rounded to nearest even, with NaN, infinities and
// subnormals, in every instruction set.

#pragma once

#include "simd_types.h"

namespace fastreg::FASTREG_SIMD {

// widen: words with the given low halves and zero above. upper_halves: the inverse of widen(...) << 16.
//
// Intrinsics, because GCC 12 makes three times the instructions of __builtin_convertvector, and with full
// masks, because it warns of its own header in the forms without one.
#if defined(__AVX512F__)
FASTREG_INLINE Words widen(HalfWords halves) {
  return bit_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(halves)));
}
// A permutation, since the narrowing store (vpmovdw to memory), which GCC would make of a conversion, is slow
// on AMD.
FASTREG_INLINE HalfWords upper_halves(Words words) {
  const Vector<uint16_t> odd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i packed =
      _mm512_maskz_permutexvar_epi16(~0u, bit_cast<__m512i>(odd), bit_cast<__m512i>(words));
  HalfWords lower;
  __builtin_memcpy(&lower, &packed, sizeof(lower));
  return lower;
}
#elif defined(__AVX2__)
FASTREG_INLINE Words widen(HalfWords halves) {
  return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(halves)));
}
FASTREG_INLINE HalfWords upper_halves(Words words) {
  const __m256i bits = _mm256_srli_epi32(bit_cast<__m256i>(words), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0b1000);
  return bit_cast<HalfWords>(_mm256_castsi256_si128(packed));
}
#elif defined(__SSE2__)
FASTREG_INLINE Words widen(HalfWords halves) {
  const __m128i low = _mm_cvtsi64_si128(bit_cast<long long>(halves));
  return bit_cast<Words>(_mm_unpacklo_epi16(low, _mm_setzero_si128()));
}
// Sign-extended words pass SSE2's saturation, which is signed, unchanged.
FASTREG_INLINE HalfWords upper_halves(Words words) {
  const __m128i bits = _mm_srai_epi32(bit_cast<__m128i>(words), 16);
  return bit_cast<HalfWords>(_mm_cvtsi128_si64(_mm_packs_epi32(bits, bits)));
}
#else
FASTREG_INLINE Words widen(HalfWords halves) { return __builtin_convertvector(halves, Words); }
FASTREG_INLINE HalfWords upper_halves(Words words) { return __builtin_convertvector(words >> 16, HalfWords); }
#endif

FASTREG_INLINE Floats decode(HalfWords halves, BFloat16) { return bit_cast<Floats>(widen(halves) << 16); }

FASTREG_INLINE HalfWords encode(Floats values, BFloat16) {
  const Words bits = bit_cast<Words>(values);
  // Rounding could carry a NaN's payload into an infinity: NaN is made quiet instead.
#if defined(__AVX512F__)
  const __m512i words = bit_cast<__m512i>(bits);
  const __mmask16 odd = _mm512_test_epi32_mask(words, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i half = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  const __m512i rounded =
      _mm512_mask_or_epi32(bit_cast<__m512i>(bits + bit_cast<Words>(half)), nan, words, _mm512_set1_epi32(0x400000));
  return upper_halves(bit_cast<Words>(rounded));
#else
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Words quiet_nan = bits | 0x400000;
  return upper_halves(values == values ? rounded : quiet_nan);
#endif
}

FASTREG_INLINE Floats decode(HalfWords halves, Float16) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(halves));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(halves));
#else
  // Shifted into a float's fields the number is 2^-112 of itself, subnormals included; infinity and NaN need
  // their exponent filled.
  const Words bits = widen(halves);
  const Words magnitude = bits & 0x7fff;
  const Words scaled = bit_cast<Words>(bit_cast<Floats>(magnitude << 13) * 0x1p112f);
  const Words special = scaled | 0x7f800000;
  return bit_cast<Floats>((magnitude >= 0x7c00 ? special : scaled) | ((bits & 0x8000) << 16));
#endif
}

FASTREG_INLINE HalfWords encode(Floats values, Float16) {
#if defined(__AVX512F__)
  return bit_cast<HalfWords>(
      _mm512_maskz_cvtps_ph(0xffff, values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bit_cast<HalfWords>(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Words bits = bit_cast<Words>(values);
  const Words magnitude = bits & 0x7fffffff;
  // Normal: move the exponent's bias from 127 to 15 and round the 13 bits that fall off; the carry of 65520
  // makes infinity.
  const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal: 0.5 has the spacing of fp16's subnormals, so the addition itself rounds.
  const Words subnormal = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000;
  Words result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x47800000 ? Words{} + 0x7c00 : result;
  result = magnitude > 0x7f800000 ? Words{} + 0x7e00 : result;
  return upper_halves((result << 16) | (bits & 0x80000000));
#endif
}

}  // namespace fastreg::FASTREG_SIMD
