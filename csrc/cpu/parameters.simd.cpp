// Kernels that read parameters and write their gradients, for one instruction set.
//
// The reduction reads each partial sum once, row after row, into a strip of double accumulators that stays in
// the L1 cache; chunks are added in their order whatever the thread, so that two runs give equal bits.

#include "parameters.h"

#include "simd.h"

namespace fastreg::FASTREG_SIMD {
namespace {

constexpr int64_t strip_columns = 512;

template <class Element>
void widen_elements(const Element* source, float* target, int64_t begin, int64_t end) {
  for_columns<float, 1>(end - begin, [&](auto lanes, int64_t column, int) {
    lanes.store(target + begin + column, lanes.load(source + begin + column));
  });
}

void widen_parameter(DType dtype, const void* source, float* target, int64_t begin, int64_t end) {
  if (dtype == DType::BFloat16) {
    widen_elements(static_cast<const BFloat16*>(source), target, begin, end);
  } else {
    widen_elements(static_cast<const Float16*>(source), target, begin, end);
  }
}

template <class Element>
void reduce_columns(const Accumulator<Element>* partials, int64_t chunks, int64_t columns, Element* target,
                    int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; strip += strip_columns) {
    const int64_t width = end - strip < strip_columns ? end - strip : strip_columns;
    double sums[strip_columns] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Accumulator<Element>* partial = partials + chunk * columns + strip;
      for (int64_t column = 0; column < width; ++column) {
        sums[column] += double(partial[column]);
      }
    }
    Accumulator<Element> totals[strip_columns];
    for (int64_t column = 0; column < width; ++column) {
      totals[column] = static_cast<Accumulator<Element>>(sums[column]);
    }
    for_columns<Accumulator<Element>, 1>(width, [&](auto lanes, int64_t column, int) {
      lanes.store(target + strip + column, lanes.load(totals + column));
    });
  }
}

void reduce_partials(const void* partials, int64_t chunks, int64_t columns, DType dtype, void* target,
                     int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::Float32:
      return reduce_columns(static_cast<const float*>(partials), chunks, columns, static_cast<float*>(target),
                            begin, end);
    case DType::BFloat16:
      return reduce_columns(static_cast<const float*>(partials), chunks, columns,
                            static_cast<BFloat16*>(target), begin, end);
    case DType::Float16:
      return reduce_columns(static_cast<const float*>(partials), chunks, columns,
                            static_cast<Float16*>(target), begin, end);
    case DType::Float64:
      return reduce_columns(static_cast<const double*>(partials), chunks, columns,
                            static_cast<double*>(target), begin, end);
  }
}

}  // namespace

const ParameterKernels parameter_kernels = {widen_parameter, reduce_partials};

}  // namespace fastreg::FASTREG_SIMD
