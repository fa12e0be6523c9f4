// Which instruction set the CPU kernels use: the widest one of this machine, decided when the library is
// loaded; a test may ask for a narrower one.

#pragma once

#if defined(__x86_64__)
#define FASTREG_FOR_EACH_SIMD(macro) macro(baseline) macro(avx2) macro(avx512)
#else
#define FASTREG_FOR_EACH_SIMD(macro) macro(baseline)
#endif

namespace fastreg {

enum class Simd : int { baseline = 0, avx2 = 1, avx512 = 2 };

Simd active_simd();

// The object `name` of the variant in use: each namespace defines one, compiled for its instruction set.
#if defined(__x86_64__)
#define FASTREG_SIMD_VARIANT(name)                                    \
  (::fastreg::active_simd() == ::fastreg::Simd::avx512 ? avx512::name \
   : ::fastreg::active_simd() == ::fastreg::Simd::avx2 ? avx2::name   \
                                                       : baseline::name)
#else
#define FASTREG_SIMD_VARIANT(name) baseline::name
#endif

}  // namespace fastreg
