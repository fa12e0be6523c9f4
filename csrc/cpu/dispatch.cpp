// Choice of the instruction set, and the two ops that show and set it.

#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace fastreg {
namespace {

constexpr const char* simd_names[] = {"baseline", "avx2", "avx512"};

bool supported(Simd simd) {
#if defined(__x86_64__)
  switch (simd) {
    case Simd::avx512:
      return supported(Simd::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Simd::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    default:
      return true;
  }
#else
  return simd == Simd::baseline;
#endif
}

Simd widest() {
  for (const Simd simd : {Simd::avx512, Simd::avx2}) {
    if (supported(simd)) {
      return simd;
    }
  }
  return Simd::baseline;
}

std::atomic<Simd> active{widest()};

std::string simd() { return simd_names[static_cast<int>(active_simd())]; }

void set_simd(std::string name) {
  for (const Simd simd : {Simd::baseline, Simd::avx2, Simd::avx512}) {
    if (name == simd_names[static_cast<int>(simd)]) {
      if (!supported(simd)) {
        throw std::runtime_error("fastreg_native::set_simd: this processor does not have " + name + ".");
      }
      active.store(simd, std::memory_order_relaxed);
      return;
    }
  }
  throw std::runtime_error("fastreg_native::set_simd: expected baseline, avx2 or avx512, but got " + name +
                           ".");
}

}  // namespace

Simd active_simd() { return active.load(std::memory_order_relaxed); }

}  // namespace fastreg

// No argument is a tensor, so no device decides.
STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CompositeExplicitAutograd, m) {
  m.impl("simd", TORCH_BOX(&fastreg::simd));
  m.impl("set_simd", TORCH_BOX(&fastreg::set_simd));
}
