// Backward kernels of layer norm, and without centring of RMS norm. With normalized = (input - mean) * rstd and
// scaled = grad_output * weight:
//
//   grad_input  = rstd * (scaled - mean(scaled) - normalized * mean(scaled * normalized))      over the row
//   grad_weight = sum of grad_output * normalized, grad_bias = sum of grad_output              over the rows
//
// A persistent grid goes over the rows. A team holds its row in registers while the next rows are on their way into
// shared memory; each thread owns some columns, keeps their weights, and adds their parameter gradients up in fp32 from
// row to row. At the end a block writes one row of partial sums; reduce_partials_kernel adds those in a fixed order.
// Nothing is added atomically, and rows are dealt out by index: equal bits in every run.
//
// Traffic: two reads and one write of the activations, and 16 bytes a column and block for the partial sums. Rows
// longer than the chip has room for take two more kernels and are read up to three times
// (layer_norm_backward_looped.cuh).
//
// What output_mask does not ask for has a null pointer: not loaded for, not computed, not stored.
//
// Where grad_output comes from and where the gradient goes is a template parameter, `Target`: here two tensors of the
// input's dtype, for dropout + residual + norm what dropout_add_layer_norm_backward.cuh says.

#pragma once

#include "layer_norm_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastreg::cuda {

struct BackwardArguments {
  const void* grad_output;
  const void* input;
  const float* mean;  // layer norm only
  const float* rstd;
  Parameter weight;
  void* grad_input;
  float* weight_partials;  // (partials, columns)
  float* bias_partials;
  int64_t rows;
  int64_t grad_output_stride;  // in elements
  int64_t input_stride;
  int columns;
  int threads_per_row;  // in each block
  int cluster;          // blocks a row
};

// --- one pack --------------------------------------------------------------------------------------------------------

// What a row's elements add up to: sums of scaled * normalized and of scaled, the latter only if centred.
template <bool centred>
using RowSums = std::conditional_t<centred, Sums, float>;

template <bool centred, class Data>
__device__ __forceinline__ float normalized_at(const Data& input, int index, float mean, float rstd) {
  return (centred ? input[index] - mean : input[index]) * rstd;
}

template <bool centred, int width, class Data>
__device__ __forceinline__ void add_to_row(RowSums<centred>& sums, const Data& grad_output, const Data& input,
                                           float mean, float rstd, const float (&weight)[width]) {
#pragma unroll
  for (int index = 0; index < width; ++index) {
    const float normalized = normalized_at<centred>(input, index, mean, rstd);
    const float scaled = grad_output[index] * weight[index];
    if constexpr (centred) {
      sums.projection += scaled * normalized;
      sums.plain += scaled;
    } else {
      sums += scaled * normalized;
    }
  }
}

// `means`: the row's sums over its number of elements.
template <bool centred, int width, class Data>
__device__ __forceinline__ void input_gradient(const RowSums<centred>& means, const Data& grad_output,
                                               const Data& input, float mean, float rstd, const float (&weight)[width],
                                               float (&values)[width]) {
#pragma unroll
  for (int index = 0; index < width; ++index) {
    const float normalized = normalized_at<centred>(input, index, mean, rstd);
    const float scaled = grad_output[index] * weight[index];
    if constexpr (centred) {
      values[index] = (scaled - means.plain - normalized * means.projection) * rstd;
    } else {
      values[index] = (scaled - normalized * means) * rstd;
    }
  }
}

template <bool centred>
__device__ __forceinline__ RowSums<centred> over_columns(const RowSums<centred>& sums, int columns) {
  const float share = 1.0f / static_cast<float>(columns);
  if constexpr (centred) {
    return {sums.projection * share, sums.plain * share};
  } else {
    return sums * share;
  }
}

// --- rows on their way -----------------------------------------------------------------------------------------------

// Shared memory that the next rows' packs arrive in. A thread reads only what it copied itself, so no barrier is
// needed.
template <class Data, int packs, int stages>
struct Ring {
  unsigned char* base;

  __device__ __forceinline__ Data* place(int stage, int tensor, int pack) const {
    const int slot = (stage * 2 + tensor) * packs + pack;
    return reinterpret_cast<Data*>(base) + slot * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
};

// --- running sums ----------------------------------------------------------------------------------------------------

// Where a thread adds up a parameter's gradient for its columns: in registers, or in shared memory of its own.
template <int packs, int width, bool in_shared>
struct ColumnSums;

template <int packs, int width>
struct ColumnSums<packs, width, false> {
  float values[packs][width];

  __device__ __forceinline__ explicit ColumnSums(float*) {
#pragma unroll
    for (int place = 0; place < packs; ++place) {
#pragma unroll
      for (int index = 0; index < width; ++index) values[place][index] = 0.0f;
    }
  }

  __device__ __forceinline__ void add(int place, const float (&terms)[width]) {
#pragma unroll
    for (int index = 0; index < width; ++index) values[place][index] += terms[index];
  }

  __device__ __forceinline__ float get(int place, int index) const { return values[place][index]; }
};

template <int packs, int width>
struct ColumnSums<packs, width, true> {
  static constexpr int quads = width / 4;
  float4* base;  // four floats at a time, neighbouring threads side by side

  __device__ __forceinline__ explicit ColumnSums(float* memory) : base(reinterpret_cast<float4*>(memory)) {
#pragma unroll
    for (int place = 0; place < packs; ++place) {
#pragma unroll
      for (int quad = 0; quad < quads; ++quad) *at(place, quad) = float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
  }

  __device__ __forceinline__ float4* at(int place, int quad) const {
    return base + (place * quads + quad) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }

  __device__ __forceinline__ void add(int place, const float (&terms)[width]) {
#pragma unroll
    for (int quad = 0; quad < quads; ++quad) {
      float4 sum = *at(place, quad);
      sum.x += terms[4 * quad];
      sum.y += terms[4 * quad + 1];
      sum.z += terms[4 * quad + 2];
      sum.w += terms[4 * quad + 3];
      *at(place, quad) = sum;
    }
  }

  __device__ __forceinline__ float get(int place, int index) const {
    const float4 sum = *at(place, index / 4);
    return index % 4 == 0 ? sum.x : index % 4 == 1 ? sum.y : index % 4 == 2 ? sum.z : sum.w;
  }
};

// Writes the block's row of partial sums. Where several teams share the block, theirs are added first: within a warp by
// shuffles, then through `scratch`, which all threads must be done with.
template <int packs, int width, bool in_shared>
__device__ __forceinline__ void write_partials(ColumnSums<packs, width, in_shared>& sums, float* partials,
                                               const Team& team, const Slice& slice, float* scratch) {
  if constexpr (!in_shared) {
    const int warps_or_teams = team.threads < warp_lanes ? static_cast<int>(blockDim.x) / warp_lanes : team.count;
    if (team.threads < warp_lanes) {
#pragma unroll
      for (int place = 0; place < packs; ++place) {
#pragma unroll
        for (int index = 0; index < width; ++index) {
          float& value = sums.values[place][index];
          for (int distance = team.threads; distance < warp_lanes; distance *= 2) {
            value += __shfl_xor_sync(all_lanes, value, distance);
          }
        }
      }
    }
    if (warps_or_teams > 1) {
      const int columns = slice.count * width;
      const int copy = team.threads < warp_lanes ? static_cast<int>(threadIdx.x) / warp_lanes : team.index;
      const bool writes = team.threads >= warp_lanes || static_cast<int>(threadIdx.x) % warp_lanes < team.threads;
#pragma unroll
      for (int place = 0; place < packs; ++place) {
        const int offset = place * team.threads + team.lane;
        if (writes && offset < slice.count) {
#pragma unroll
          for (int index = 0; index < width; ++index) {
            scratch[copy * columns + offset * width + index] = sums.get(place, index);
          }
        }
      }
      __syncthreads();
      for (int column = static_cast<int>(threadIdx.x); column < columns; column += static_cast<int>(blockDim.x)) {
        float total = 0.0f;
#pragma unroll 4
        for (int other = 0; other < warps_or_teams; ++other) total += scratch[other * columns + column];
        partials[column] = total;
      }
      __syncthreads();
      return;
    }
  }
#pragma unroll
  for (int place = 0; place < packs; ++place) {
    const int offset = place * team.threads + team.lane;
    if (team.index == 0 && offset < slice.count) {
#pragma unroll
      for (int index = 0; index < width; ++index) {
        partials[(slice.first + offset) * width + index] = sums.get(place, index);
      }
    }
  }
}

// --- the gradient of the input ---------------------------------------------------------------------------------------

// Gradients in the input's dtype, one from memory and one to it: what the norms alone have.
template <class Element, int pack_width>
struct GradientOfInput {
  static constexpr bool fused = false;
  static constexpr int width = pack_width;
  using Data = Pack<Element, width>;

  const BackwardArguments& arguments;

  __device__ __forceinline__ bool wanted() const { return arguments.grad_input != nullptr; }

  __device__ __forceinline__ const Element* input(int64_t row, int64_t column) const {
    return static_cast<const Element*>(arguments.input) + row * arguments.input_stride + column;
  }

  __device__ __forceinline__ const Element* grad_output(int64_t row, int64_t column) const {
    return static_cast<const Element*>(arguments.grad_output) + row * arguments.grad_output_stride + column;
  }

  // Where a row begins: found once, not again for each of its packs.
  __device__ __forceinline__ const Element* grad_output_row(int64_t row) const { return grad_output(row, 0); }

  __device__ __forceinline__ Data load_grad_output(int64_t row, int64_t column) const {
    return Data::load(grad_output(row, column));
  }

  // The same through shared memory: a copy into a pack's place there, which is read when it has come.
  __device__ __forceinline__ void copy_grad_output(Data* place, const Element* row, int64_t column) const {
    copy_async(place, row + column);
  }

  __device__ __forceinline__ Data copied_grad_output(const Data* place) const { return *place; }

  // What a pack's gradient needs beside these is asked for before the row's sums are known: here nothing.
  struct Fetched {};
  struct Row {};

  static FASTREG_INLINE constexpr int at_once() { return 1; }

  __device__ __forceinline__ Fetched fetch(int64_t, int64_t) const { return {}; }

  template <int packs>
  __device__ __forceinline__ void finish(const Fetched&, const Row&, uint32_t, int, int64_t row, int64_t column,
                                         const float (&gradient)[width]) const {
    Element* address = static_cast<Element*>(arguments.grad_input) + row * arguments.columns + column;
    pack<Element, width>(gradient).store(address);
  }

  // For kernels that stay on one row: from a column of it on.
  struct Along {
    const Element* grad_output;
    const Element* input;
    Element* grad_input;

    // `again`: the same thread will read it a second time.
    template <bool again>
    __device__ __forceinline__ Data load_grad_output(int64_t column) const {
      return again ? Data::load_kept(grad_output + column) : Data::load(grad_output + column);
    }

    __device__ __forceinline__ void finish(int64_t column, const float (&gradient)[width]) const {
      pack<Element, width>(gradient).store(grad_input + column);
    }
  };

  __device__ __forceinline__ Along along(int64_t row, int64_t first) const {
    return {grad_output(row, first), input(row, first),
            static_cast<Element*>(arguments.grad_input) + row * arguments.columns + first};
  }

  // A third sum of each column, beside weight's and bias': here none.
  static FASTREG_INLINE constexpr bool wants_sums() { return false; }

  template <int packs>
  static FASTREG_INLINE constexpr int start_sums() {
    return 0;
  }
};

// --- rows that stay on chip ------------------------------------------------------------------------------------------

template <bool centred, bool sums_in_shared, class Target>
__device__ __forceinline__ void differentiate_rows(const BackwardArguments& arguments, const Target& target) {
  constexpr int width = Target::width;
  using Data = typename Target::Data;
  using Element = std::remove_cvref_t<decltype(Data{}.elements[0])>;
  constexpr int packs = backward_packs(width, sums_in_shared, Target::fused);
  constexpr int stages = backward_stages(sizeof(Element), width, sums_in_shared);
  FASTREG_SHARED(Exchange<RowSums<centred>>, exchange);
  exchange.start(arguments.cluster);
  Team team(arguments.threads_per_row);
  const Slice slice(arguments.columns / width, arguments.cluster);
  const bool wants_input = target.wanted();
  const bool wants_weight = arguments.weight_partials != nullptr;
  const bool wants_bias = centred && arguments.bias_partials != nullptr;
  const bool reads_input = wants_input || wants_weight;

  unsigned char* const memory = dynamic_shared() + target.template start_sums<packs>();
  const Ring<Data, packs, stages> ring{memory};
  float* const sums_memory = reinterpret_cast<float*>(
      memory + backward_ring_bytes(sizeof(Element), width, sums_in_shared, static_cast<int>(blockDim.x)));
  ColumnSums<packs, width, sums_in_shared> weight_sums(sums_memory);
  ColumnSums<packs, width, sums_in_shared> bias_sums(sums_memory +
                                                     (centred ? packs * width * static_cast<int>(blockDim.x) : 0));

  const auto column_of = [&](int offset) { return static_cast<int64_t>(slice.first + offset) * width; };
  const auto fetch = [&](int stage, int64_t row) {
    if constexpr (stages > 0) {
      const auto grad_row = target.grad_output_row(row);
      const Element* const input_row = target.input(row, 0);
#pragma unroll
      for (int place = 0; place < packs; ++place) {
        const int offset = place * team.threads + team.lane;
        if (row < arguments.rows && offset < slice.count) {
          target.copy_grad_output(ring.place(stage, 0, place), grad_row, column_of(offset));
          if (reads_input) copy_async(ring.place(stage, 1, place), input_row + column_of(offset));
        }
      }
      copy_async_commit();
    }
  };

  const int64_t step = static_cast<int64_t>(gridDim.x / arguments.cluster) * team.count;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x / arguments.cluster) * team.count;
  int64_t row = block_row + team.index;
#pragma unroll
  for (int stage = 0; stage < stages; ++stage) fetch(stage, row + stage * step);

  // Weights stay in registers from row to row where the row leaves room for them.
  constexpr bool keeps_weights = width > 1 && packs * sizeof(Data) <= 64;
  const auto load_weight = [&](int place, float (&weight)[width]) {
    const int offset = place * team.threads + team.lane;
    if (wants_input && offset < slice.count) {
      load_parameter<width>(arguments.weight, (slice.first + offset) * width, 1.0f, weight);
    }
  };
  float weights[keeps_weights ? packs : 1][width];
  if constexpr (keeps_weights) {
#pragma unroll
    for (int place = 0; place < packs; ++place) load_weight(place, weights[place]);
  }

  // Statistics are asked for a row ahead: each is a load that a whole team would wait for.
  float next_mean = 0.0f;
  float next_rstd = 0.0f;
  const auto fetch_statistics = [&](int64_t of_row) {
    if (reads_input && of_row < arguments.rows) {
      if constexpr (centred) next_mean = __ldg(arguments.mean + of_row);
      next_rstd = __ldg(arguments.rstd + of_row);
    }
  };
  fetch_statistics(row);
  exchange.finish_start(arguments.cluster);

  int stage = 0;
  unsigned round = 0;
  // Every thread of a block goes round equally often, also where its team has no row left: all meet at the barriers.
  for (int64_t first_row = block_row; first_row < arguments.rows; first_row += step, row += step) {
    team.template forget_places<width>();
    const bool active = row < arguments.rows;
    const float mean = next_mean;
    const float rstd = next_rstd;
    fetch_statistics(row + step);

    Data grad_output[packs];
    Data input[packs];
    if constexpr (stages > 0) copy_async_wait<stages - 1>();
#pragma unroll
    for (int place = 0; place < packs; ++place) {
      const int offset = place * team.threads + team.lane;
      if (active && offset < slice.count) {
        if constexpr (stages > 0) {
          grad_output[place] = target.copied_grad_output(ring.place(stage, 0, place));
          if (reads_input) input[place] = *ring.place(stage, 1, place);
        } else {
          grad_output[place] = target.load_grad_output(row, column_of(offset));
          if (reads_input) input[place] = Data::load(target.input(row, column_of(offset)));
        }
      }
    }
    if constexpr (stages > 0) {
      fetch(stage, row + stages * step);
      stage = stage + 1 == stages ? 0 : stage + 1;
    }

    team.template forget_places<width>();
    RowSums<centred> sums[1] = {};
#pragma unroll
    for (int place = 0; place < packs; ++place) {
      if (active && place * team.threads + team.lane < slice.count) {
        if (wants_input) {
          if constexpr (!keeps_weights) load_weight(place, weights[0]);
          add_to_row<centred, width>(sums[0], grad_output[place], input[place], mean, rstd,
                                     weights[keeps_weights ? place : 0]);
        }
        float terms[width];
        if (wants_weight) {
#pragma unroll
          for (int index = 0; index < width; ++index) {
            terms[index] = grad_output[place][index] * normalized_at<centred>(input[place], index, mean, rstd);
          }
          weight_sums.add(place, terms);
        }
        if (wants_bias) {
#pragma unroll
          for (int index = 0; index < width; ++index) terms[index] = grad_output[place][index];
          bias_sums.add(place, terms);
        }
      }
    }

    keep_packed(grad_output);
    keep_packed(input);
    team.template forget_places<width>();

    constexpr int at_once = Target::at_once();
    typename Target::Fetched fetched[at_once];
    typename Target::Row opened;
    uint32_t bits = 0;
    const auto fetch_more = [&](int begin) {
#pragma unroll
      for (int index = 0; index < at_once; ++index) {
        const int offset = (begin + index) * team.threads + team.lane;
        if (active && offset < slice.count) fetched[index] = target.fetch(row, column_of(offset));
      }
    };
    if constexpr (Target::fused) {
      if (wants_input) {
        if (active) opened = target.open(row);
        fetch_more(0);
        bits = target.template draw<packs>(
            [&](int place) { return target.element(row, column_of(place * team.threads + team.lane)); });
      }
      team.template forget_places<width>();
    }
    if (wants_input) {
      sums[0] = over_lanes(sums[0], team.lanes());
      over_warps_and_blocks(sums, team, arguments.cluster, exchange, round);
      ++round;
      const RowSums<centred> means = over_columns<centred>(sums[0], arguments.columns);
#pragma unroll
      for (int place = 0; place < packs; ++place) {
        const int offset = place * team.threads + team.lane;
        if constexpr (Target::fused) {
          if (place > 0 && place % at_once == 0) fetch_more(place);
        }
        if (active && offset < slice.count) {
          if constexpr (!keeps_weights) load_weight(place, weights[0]);
          if constexpr (Target::fused) {
            grad_output[place].keep_packed();
            input[place].keep_packed();
          }
          float gradient[width];
          input_gradient<centred>(means, grad_output[place], input[place], mean, rstd,
                                  weights[keeps_weights ? place : 0], gradient);
          target.template finish<packs>(fetched[place % at_once], opened, bits >> place * width, place, row,
                                        column_of(offset), gradient);
        }
      }
    }
  }

  if (wants_weight || wants_bias || target.wants_sums()) {
    __syncthreads();  // the ring's place is reused
    const int64_t partial = static_cast<int64_t>(blockIdx.x / arguments.cluster) * arguments.columns;
    float* scratch = reinterpret_cast<float*>(memory);
    if (wants_weight) write_partials(weight_sums, arguments.weight_partials + partial, team, slice, scratch);
    if (wants_bias) write_partials(bias_sums, arguments.bias_partials + partial, team, slice, scratch);
    if constexpr (Target::fused) target.template write_sums<packs>(partial, team, slice, scratch);
  }
}

template <class Element, bool centred, int width, bool sums_in_shared>
__global__ void __launch_bounds__(sums_in_shared ? backward_shared_threads : backward_threads)
    backward_kernel(const BackwardArguments arguments) {
  differentiate_rows<centred, sums_in_shared>(arguments, GradientOfInput<Element, width>{arguments});
}

// --- the sum of the partial sums -------------------------------------------------------------------------------------

struct ReduceArguments {
  // One gradient or two.
  struct Gradient {
    const float* partials;  // (count, columns)
    void* data;
    DType dtype;
  };
  Gradient first;
  Gradient second;
  int64_t count;
  int columns;
};

inline constexpr int reduce_columns = 32;
inline constexpr int reduce_slices = 16;

struct ReduceSums {
  float values[reduce_slices][reduce_columns];
};

// A block adds up 32 columns of one gradient: 16 warps each every sixteenth row, then one warp their sums, in order.
__device__ __forceinline__ void reduce_partials(const ReduceArguments& arguments, ReduceSums& sums) {
  const int lane = static_cast<int>(threadIdx.x) % reduce_columns;
  const int slice = static_cast<int>(threadIdx.x) / reduce_columns;
  const int blocks = (arguments.columns + reduce_columns - 1) / reduce_columns;
  const bool second = static_cast<int>(blockIdx.x) >= blocks;
  const int column = (static_cast<int>(blockIdx.x) - (second ? blocks : 0)) * reduce_columns + lane;

  float sum = 0.0f;
  if (column < arguments.columns) {
    const float* partials = (second ? arguments.second.partials : arguments.first.partials) + column;
#pragma unroll 4
    for (int64_t row = slice; row < arguments.count; row += reduce_slices) sum += partials[row * arguments.columns];
  }
  sums.values[slice][lane] = sum;
  __syncthreads();
  if (slice == 0 && column < arguments.columns) {
    float total = 0.0f;
#pragma unroll
    for (int other = 0; other < reduce_slices; ++other) total += sums.values[other][lane];
    store_parameter(second ? arguments.second.data : arguments.first.data,
                    second ? arguments.second.dtype : arguments.first.dtype, column, total);
  }
}

// A template only so that each op's translation unit has a kernel of its own.
template <bool centred>
__global__ void __launch_bounds__(reduce_columns* reduce_slices)
    reduce_partials_kernel(const ReduceArguments arguments) {
  FASTREG_SHARED(ReduceSums, sums);
  reduce_partials(arguments, sums);
}

}  // namespace fastreg::cuda
