// Dropout's kernel table for one instruction set.

#include <cstddef>

#include "dropout_apply.simd.h"
#include "dropout_layer_scale.simd.h"

namespace fastreg::FASTREG_SIMD {
namespace {

// Backward is forward without a residual; gradients come in the input's type, or in fp32 where a residual of fp32 had
// made the output's.
template <class Element>
constexpr DropoutKernels kernels() {
  return {apply_dropout<Element, Element>, layer_scale_gradient<Element, Element>};
}

template <class Half>
constexpr DropoutKernels widening_kernels() {
  return {apply_dropout<Half, float>, nullptr};
}

template <class Half>
constexpr DropoutKernels narrowing_kernels() {
  return {apply_dropout<float, Half>, layer_scale_gradient<float, Half>};
}

void fill_patterns(uint64_t seed, uint32_t threshold, int64_t channels, int64_t pattern, uint16_t* patterns,
                   int64_t begin, int64_t end) {
  const PhiloxStream stream(seed);
  alignas(64) KeepLane keep[keep_tile + lanes_per_step];
  for (int64_t sample = begin; sample < end; ++sample) {
    uint16_t* const target = patterns + sample * pattern;
    for (int64_t channel = 0; channel < channels;) {
      const int64_t unit = sample * channels + channel;
      const int64_t before = unit % philox_lanes;
      const int64_t room = keep_tile - before;
      const int64_t count = channels - channel < room ? channels - channel : room;
      keep_lanes(stream, static_cast<uint64_t>(unit / philox_lanes), before + count, threshold, keep);
      __builtin_memcpy(target + channel, keep + before, static_cast<size_t>(count) * sizeof(KeepLane));
      channel += count;
    }
    for (int64_t place = channels; place < pattern; place += channels) {
      __builtin_memcpy(target + place, target, static_cast<size_t>(channels) * sizeof(KeepLane));
    }
  }
}

}  // namespace

const DropoutKernels dropout_kernels[4][4] = {
    {kernels<float>(), narrowing_kernels<BFloat16>(), narrowing_kernels<Float16>(), {}},
    {widening_kernels<BFloat16>(), kernels<BFloat16>(), {}, {}},
    {widening_kernels<Float16>(), {}, kernels<Float16>(), {}},
    {{}, {}, {}, kernels<double>()}};

UnitPatterns* const unit_patterns = fill_patterns;

}  // namespace fastreg::FASTREG_SIMD
