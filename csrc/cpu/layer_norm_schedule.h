// How the CPU norms over rows share their work among threads: by rows and chunks of rows, or, where there are too few
// of them, by blocks of their columns.
//
// Templates on the table of kernels and on their arguments, since a norm alone and one with dropout and a residual have
// tables of their own. How work is cut depends on the shape alone; which of the two ways is taken depends on the
// threads too, and makes no difference to the bits.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "../checks.h"
#include "door.h"
#include "layer_norm.h"

namespace fastreg {

// The rows of a tensor of statistics, (2, rows) for layer norm and (rows,) for rms norm.
struct StatisticsRows {
  void* mean;  // null for rms norm
  void* rstd;
};

inline StatisticsRows statistics_rows(bool centred, const void* data, int64_t rows, DType dtype) {
  char* bytes = static_cast<char*>(const_cast<void*>(data));
  return centred ? StatisticsRows{bytes, bytes + rows * element_size(dtype)} : StatisticsRows{nullptr, bytes};
}

// --- forward -----------------------------------------------------------------------------------------------

// Fewer than four rows a thread, and long ones: the rows themselves are cut.
inline bool forward_cuts_rows(int64_t rows, int64_t hidden, int64_t columns_per_block) {
  const int64_t threads = thread_count(rows * hidden);
  return threads > 1 && rows < 4 * threads && hidden > columns_per_block;
}

template <class Kernels, class Norm>
void run_forward_tiles(const Kernels& kernels, const Norm& norm) {
  const int64_t threads = thread_count(norm.rows * norm.hidden);
  const int64_t tiles = norm.rows * parts_of(norm.hidden, kernels.columns_per_block);
  std::vector<Moments<double>> moments(static_cast<size_t>(tiles));
  split(tiles, threads,
        [&](int64_t begin, int64_t end) { kernels.forward_moments(norm, moments.data(), begin, end); });
  kernels.forward_statistics(norm, moments.data());
  split(tiles, threads, [&](int64_t begin, int64_t end) { kernels.forward_normalize(norm, begin, end); });
}

// Calls body(begin, end) for ranges of rows.
template <class Kernels, class Body>
void split_forward_rows(const Kernels& kernels, int64_t rows, int64_t hidden, const Body& body) {
  // Short rows are worked on in fours, and which four must not depend on the threads.
  const int64_t unit = hidden <= kernels.columns_per_grouped_row ? rows_per_group : 1;
  split(parts_of(rows, unit), thread_count(rows * hidden),
        [&](int64_t begin, int64_t end) { body(begin * unit, std::min(end * unit, rows)); });
}

// --- backward ----------------------------------------------------------------------------------------------

// Chunks of rows: enough of them to share among threads, long enough that their partial sums are small beside
// the rows. Few chunks are a power of two, so that they share out evenly.
inline int64_t rows_per_chunk_of(int64_t rows) {
  int64_t chunks = parts_of(rows, std::clamp<int64_t>(rows / 64, 16, 128));
  if (chunks <= 16) {
    chunks = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(chunks)));
  }
  return std::max<int64_t>(parts_of(rows, chunks), 1);
}

// `wants_rows`: whether more than the gradients of weight and bias is wanted. `applied` lines are cut into tiles for
// backward_apply: rows or chunks.
template <class Kernels, class Norm>
void run_backward(const Kernels& kernels, const Norm& norm, int64_t chunks, bool wants_rows, int64_t applied) {
  const int64_t threads = thread_count(norm.rows * norm.hidden);
  const int64_t blocks = parts_of(norm.hidden, kernels.columns_per_block);
  if (threads > 1 && chunks < threads && blocks > 1) {
    std::vector<RowSums> sums(static_cast<size_t>(wants_rows ? norm.rows * blocks : 0));
    RowSums* const tiles = wants_rows ? sums.data() : nullptr;
    split(chunks * blocks, threads,
          [&](int64_t begin, int64_t end) { kernels.backward_sums(norm, tiles, begin, end); });
    if (wants_rows) {
      split(applied * blocks, threads,
            [&](int64_t begin, int64_t end) { kernels.backward_apply(norm, tiles, begin, end); });
    }
    return;
  }
  split(chunks, threads, [&](int64_t begin, int64_t end) { kernels.backward_chunks(norm, begin, end); });
}

}  // namespace fastreg
