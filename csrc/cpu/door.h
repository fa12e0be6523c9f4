// What the doors of the CPU norms share: the split among threads, parameters as the kernels want them, and whether
// an output goes past the caches.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../checks.h"
#include "allocator.h"
#include "parameters.h"

namespace fastreg {

constexpr int64_t cache_line = 64;

// --- threads -----------------------------------------------------------------------------------------------

// Below this many elements one thread is done before a second one has woken up.
constexpr int64_t serial_elements = 32768;

inline int64_t thread_count(int64_t elements) {
  return elements <= serial_elements ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
}

inline int64_t parts_of(int64_t count, int64_t part) { return (count + part - 1) / part; }

// Calls body(begin, end) over [0, count), split among the threads unless there is just one.
template <class Body>
void split(int64_t count, int64_t threads, const Body& body) {
  if (threads == 1) {
    body(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, 1, body);
  }
}

// --- parameters --------------------------------------------------------------------------------------------

// Columns of a parameter that one thread takes at a time.
constexpr int64_t strip_columns = 512;

// A parameter as the kernels want it: an fp32 row (fp64 for fp64), widened here where it is a 16-bit one.
class ParameterRow {
 public:
  ParameterRow(const VectorView& parameter, int64_t count) : data_(parameter.data) {
    if (parameter.given && element_size(parameter.dtype) == 2) {
      float* widened = static_cast<float*>(scratch_.reserve(count * static_cast<int64_t>(sizeof(float))));
      const ParameterKernels& kernels = FASTREG_SIMD_VARIANT(parameter_kernels);
      split(parts_of(count, strip_columns), thread_count(count), [&](int64_t begin, int64_t end) {
        kernels.widen(parameter.dtype, parameter.data, widened, begin * strip_columns,
                      std::min(end * strip_columns, count));
      });
      data_ = widened;
    }
  }

  const void* data() const { return data_; }

 private:
  Scratch scratch_;
  const void* data_;
};

// The sums over the chunks of partials, (chunks, columns) in the dtype of accumulation, rounded to `dtype`.
inline void reduce_partials(const void* partials, int64_t chunks, int64_t columns, DType dtype, void* target) {
  const ParameterKernels& kernels = FASTREG_SIMD_VARIANT(parameter_kernels);
  split(parts_of(columns, strip_columns), thread_count(chunks * columns), [&](int64_t begin, int64_t end) {
    kernels.reduce(partials, chunks, columns, dtype, target, begin * strip_columns,
                   std::min(end * strip_columns, columns));
  });
}

// --- statistics and outputs --------------------------------------------------------------------------------

inline void fill(void* values, int64_t count, DType dtype, double value) {
  if (dtype == DType::Float64) {
    std::fill_n(static_cast<double*>(values), count, value);
  } else {
    std::fill_n(static_cast<float*>(values), count, static_cast<float>(value));
  }
}

// The statistics of rows or channels without elements: a mean of nothing.
inline void fill_nan(void* statistics, int64_t count, DType dtype) {
  fill(statistics, count, dtype, std::numeric_limits<double>::quiet_NaN());
}

// Whether an output may go past the caches: from this size on its reader, whoever that is, does not find it there
// anyway. (A norm and its reader together: with 32 MB of last cache slower at 8 MB, equal at 16 MB, a tenth faster at
// 64 MB; with 105 MB a quarter faster at 12.8 MB.)
inline bool may_stream(const void* output, int64_t bytes) {
  return bytes >= large_output && reinterpret_cast<uintptr_t>(output) % cache_line == 0;
}

// Whether one of `lines` adjacent lines does.
inline bool streams(const void* output, int64_t lines, int64_t line_bytes) {
  return may_stream(output, lines * line_bytes) && line_bytes % cache_line == 0;
}

}  // namespace fastreg
