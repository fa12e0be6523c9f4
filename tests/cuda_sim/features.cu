// What CUDA kernels of ours use and may use, each in a small kernel whose result is known: a test of the simulator
// where the simulator runs it, and of the simulator's idea of CUDA where a GPU does.
//
//   nvcc -std=c++20 -arch=sm_90 -I csrc/cuda tests/cuda_sim/features.cu -o features && ./features
//
// A line for each feature; exits with 1 if one is wrong. In the simulator: features [order] [seed] [blocks at once].

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "launch.cuh"
#include "reduce.cuh"
#include "vec.cuh"

#if !defined(FASTREG_CUDA_SIMULATOR)
#include <cooperative_groups.h>
#endif

namespace {

using namespace fastreg::cuda;

constexpr int threads = 128;

// --- kernels: each thread writes what it found -----------------------------------------------------------------------

struct Arguments {
  const int* input;
  int* output;
  int* scratch;
  int count;
};

__device__ int thread_of_grid() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

struct Exchanged {
  int values[threads];
};

__global__ void block_barrier_kernel(const Arguments arguments) {
  FASTREG_SHARED(Exchanged, shared);
  const int thread = static_cast<int>(threadIdx.x);
  shared.values[thread] = arguments.input[thread];
  __syncthreads();
  const int other = shared.values[threads - 1 - thread];
  const int positive = __syncthreads_count(other > 0);
  const int all = __syncthreads_and(other >= 0) != 0;
  const int any = __syncthreads_or(other == 77) != 0;
  arguments.output[thread] = other + 1000 * positive + 1000000 * all + 2000000 * any;
}

__global__ void shuffle_kernel(const Arguments arguments) {
  const int value = arguments.input[threadIdx.x];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int rotated = __shfl_sync(all_lanes, value, lane + 5);
  const int in_group = __shfl_sync(all_lanes, value, 3, 8);
  const int crossed = __shfl_xor_sync(all_lanes, value, 16);
  const int below = __shfl_up_sync(all_lanes, value, 1);
  const int above = __shfl_down_sync(all_lanes, value, 2);
  arguments.output[threadIdx.x] = rotated + 3 * in_group + 5 * crossed + 7 * below + 11 * above;
}

__global__ void vote_kernel(const Arguments arguments) {
  const int value = arguments.input[threadIdx.x];
  const unsigned odd = __ballot_sync(all_lanes, value % 2);
  const int all = __all_sync(all_lanes, value >= 0) != 0;
  const int any = __any_sync(all_lanes, value == 9999) != 0;
  const unsigned equal = __match_any_sync(all_lanes, value % 4);
  arguments.output[threadIdx.x] = static_cast<int>(odd ^ equal) + all + 2 * any;
}

__global__ void warp_reduction_kernel(const Arguments arguments) {
#if defined(FASTREG_CUDA_SIMULATOR) || __CUDA_ARCH__ >= 800
  const int value = arguments.input[threadIdx.x];
  const unsigned bits = static_cast<unsigned>(value);
  const unsigned logic =
      __reduce_and_sync(all_lanes, bits | 1u) + __reduce_or_sync(all_lanes, bits) + __reduce_xor_sync(all_lanes, bits);
  arguments.output[threadIdx.x] = __reduce_add_sync(all_lanes, value) + 3 * __reduce_min_sync(all_lanes, value) +
                                  5 * __reduce_max_sync(all_lanes, value) + static_cast<int>(logic);
#endif
}

// The two halves of a warp go different ways and meet again.
__global__ void part_of_a_warp_kernel(const Arguments arguments) {
  FASTREG_SHARED(Exchanged, shared);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread % 32 < 16) {
    shared.values[thread] = 2 * arguments.input[thread];
    __syncwarp(0x0000ffffu);
    arguments.output[thread] = shared.values[thread ^ 1] + __shfl_xor_sync(0x0000ffffu, thread, 2);
  } else {
    shared.values[thread] = 3 * arguments.input[thread];
    __syncwarp(0xffff0000u);
    arguments.output[thread] = shared.values[thread ^ 1];
  }
  __syncwarp();
}

__global__ void atomic_kernel(const Arguments arguments) {
  const int value = arguments.input[thread_of_grid()];
  int* const place = arguments.scratch;
  atomicAdd(place, value);
  atomicSub(place + 1, value);
  atomicMin(place + 2, value);
  atomicMax(place + 3, value);
  atomicAnd(place + 4, ~(1 << (value % 8)));
  atomicOr(place + 5, 1 << (value % 8));
  atomicXor(place + 6, value);
  atomicInc(reinterpret_cast<unsigned*>(place + 7), 999u);
  atomicAdd(reinterpret_cast<float*>(place + 8), 0.5f);
  int before = 0;
  int seen = atomicCAS(place + 9, before, before + value);
  while (seen != before) {
    before = seen;
    seen = atomicCAS(place + 9, before, before + value);
  }
  if (thread_of_grid() == 0) atomicExch(place + 10, 31);
}

__global__ void dynamic_shared_kernel(const Arguments arguments) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  const int last = arguments.count - 1;  // beyond 48 KB
  shared[last - thread] = arguments.input[thread];
  __syncthreads();
  arguments.output[thread] = shared[last - (thread + 1) % threads];
}

__global__ void vector_kernel(const Arguments arguments) {
  const int thread = static_cast<int>(threadIdx.x);
  const uint4 four = load_streamed(arguments.input + 4 * thread);
  const int4 again = __ldg(reinterpret_cast<const int4*>(arguments.input) + thread);
  const int2 two = __ldcs(reinterpret_cast<const int2*>(arguments.input) + 2 * thread);
  const int one = __ldcg(arguments.input + 4 * thread + 3);
  const int sum = static_cast<int>(four.x) + again.y + two.x + one;
  const uint4 result{static_cast<unsigned>(sum), four.y, static_cast<unsigned>(two.y), static_cast<unsigned>(again.w)};
  if (thread % 2 == 0) {
    store_wide(arguments.output + 4 * thread, result);
  } else {
    __stcs(reinterpret_cast<uint4*>(arguments.output) + thread, result);
  }
}

__global__ void half_kernel(const Arguments arguments) {
  const float value = static_cast<float>(arguments.input[threadIdx.x]) * 0.37f + 1.0f;
  const __nv_bfloat162 pair = __floats2bfloat162_rn(value, -value);
  const __half2 halves = __floats2half2_rn(value, 2.0f * value);
  const float sum = to_float(pair.x) + to_float(from_float<bfloat16>(3.0f * value)) + to_float(halves.y) +
                    to_float(from_float<float16>(value));
  arguments.output[threadIdx.x] = static_cast<int>(__float_as_uint(sum));
}

__global__ void three_dimensions_kernel(const Arguments arguments) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned place = block * blockDim.x * blockDim.y * blockDim.z + thread;
  arguments.output[place] = arguments.input[place] + static_cast<int>(blockIdx.z * 100 + threadIdx.y * 10);
}

__global__ void async_copy_kernel(const Arguments arguments) {
  int4* const shared = reinterpret_cast<int4*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  for (int stage = 0; stage < 3; ++stage) {
    int4* const target = shared + stage * threads + thread;
    const int* const source = arguments.input + 4 * (stage * threads + thread);
    if (stage < 2) {
      copy_async(target, source);
    } else {
      copy_async<8>(target, source);
      copy_async<8>(&target->z, source + 2);
    }
    copy_async_commit();
  }
  copy_async_wait<1>();
  int sum = shared[thread].x + shared[threads + thread].w;  // its own, no barrier
  copy_async_wait<0>();
  __syncthreads();
  sum += shared[2 * threads + (thread + 1) % threads].y;  // a neighbour's
  arguments.output[thread] = sum;
}

// Each block writes into the next one's shared memory and reads from the one after.
__global__ void cluster_kernel(const Arguments arguments) {
#if defined(FASTREG_CUDA_SIMULATOR) || __CUDA_ARCH__ >= 900
  FASTREG_SHARED(Exchanged, own);
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank());
  const int blocks = static_cast<int>(cluster.num_blocks());
  const int thread = static_cast<int>(threadIdx.x);
  cluster.sync();  // all blocks have started
  cluster.map_shared_rank(own.values, (rank + 1) % blocks)[thread] = arguments.input[thread] + 1000 * rank;
  cluster.barrier_arrive();
  cluster.barrier_wait();
  arguments.output[thread_of_grid()] =
      cluster.map_shared_rank(own.values, (rank + 2) % blocks)[thread] + 100000 * static_cast<int>(cluster_rank());
  cluster.sync();  // nobody ends while others read
#endif
}

// What csrc/cuda/reduce.cuh does with clusters, over several rounds.
__global__ void mailbox_kernel(const Arguments arguments) {
#if defined(FASTREG_CUDA_SIMULATOR) || __CUDA_ARCH__ >= 900
  using FloatExchange = Exchange<float>;
  FASTREG_SHARED(FloatExchange, exchange);
  exchange.start(arguments.count);
  const Team team(static_cast<int>(blockDim.x));
  exchange.finish_start(arguments.count);
  float total = 0.0f;
  for (unsigned round = 0; round < 7; ++round) {
    float values[1] = {
        over_lanes(static_cast<float>(arguments.input[thread_of_grid()] % 64 + static_cast<int>(round)), warp_lanes)};
    over_warps_and_blocks(values, team, arguments.count, exchange, round);
    total += values[0];
  }
  arguments.output[thread_of_grid()] = static_cast<int>(total);
#endif
}

__global__ void grid_barrier_kernel(const Arguments arguments) {
  const auto grid = cooperative_groups::this_grid();
  arguments.scratch[thread_of_grid()] = arguments.input[thread_of_grid()];
  grid.sync();
  const int size = static_cast<int>(gridDim.x * blockDim.x);
  const int other = arguments.scratch[size - 1 - thread_of_grid()];
  grid.sync();
  arguments.scratch[thread_of_grid()] = 2 * other;
  grid.sync();
  arguments.output[thread_of_grid()] = arguments.scratch[(thread_of_grid() + threads) % size];
}

// Pairs of blocks meet at a counter each, several times; what one writes before, the other reads after.
__global__ void counter_kernel(const Arguments arguments) {
  unsigned* const counter = reinterpret_cast<unsigned*>(arguments.scratch) + blockIdx.x / 2;
  int* const values = arguments.scratch + gridDim.x / 2;
  const int size = static_cast<int>(gridDim.x * blockDim.x);
  if (threadIdx.x == 0 && blockIdx.x % 2 == 0) *counter = 0;
  grid_barrier();
  int sum = 0;
  for (unsigned round = 0; round < 3; ++round) {
    int* const of_round = values + static_cast<int>(round % 2) * size;
    of_round[thread_of_grid()] = arguments.input[thread_of_grid()] + static_cast<int>(round);
    __syncthreads();
    if (threadIdx.x == 0) {
      counter_arrive(counter);
      counter_wait(counter, 2 * (round + 1));
    }
    __syncthreads();
    sum += __ldcg(of_round + (thread_of_grid() ^ threads));
  }
  arguments.output[thread_of_grid()] = sum;
}

// The block that is done last adds up what all have written.
__global__ void last_block_kernel(const Arguments arguments) {
  FASTREG_SHARED(Exchanged, shared);
  const int thread = static_cast<int>(threadIdx.x);
  arguments.scratch[1 + thread_of_grid()] = 3 * arguments.input[thread_of_grid()];
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    shared.values[0] = atomicAdd(arguments.scratch, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (shared.values[0] != 0) {
    int sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block)
      sum += __ldcg(arguments.scratch + 1 + block * blockDim.x + threadIdx.x);
    arguments.output[thread] = sum;
  }
}

// --- what the host expects -------------------------------------------------------------------------------------------

void require(cudaError_t error, const char* action) {
  if (error != cudaSuccess) {
    std::printf("could not %s: %s\n", action, cudaGetErrorString(error));
    std::exit(1);
  }
}

class DeviceInts {
 public:
  explicit DeviceInts(const std::vector<int>& values) : size_(values.size()) {
    require(cudaMalloc(&data_, size_ * sizeof(int)), "allocate");
    require(cudaMemcpy(data_, values.data(), size_ * sizeof(int), cudaMemcpyHostToDevice), "copy to the device");
  }
  ~DeviceInts() { cudaFree(data_); }
  DeviceInts(const DeviceInts&) = delete;
  DeviceInts& operator=(const DeviceInts&) = delete;

  int* data() const { return data_; }
  std::vector<int> values() const {
    std::vector<int> host(size_);
    require(cudaMemcpy(host.data(), data_, size_ * sizeof(int), cudaMemcpyDeviceToHost), "copy from the device");
    return host;
  }

 private:
  size_t size_;
  int* data_ = nullptr;
};

int input_at(int index) { return (index * 37 + 11) % 101; }

struct Feature {
  const char* name;
  cudaError_t (*run)(const Launch&, const Arguments&);
  Launch shape;
  int inputs;
  int outputs;
  int scratch;
  int count;
  std::function<int(int)> expected;          // of output by index
  std::function<int(int)> expected_scratch;  // or null
  int architecture = 80;
};

Launch shape_of(int64_t blocks, int cluster = 1, int shared_bytes = 0, bool cooperative = false) {
  return {blocks, threads, cluster, shared_bytes, cooperative, nullptr};
}

cudaError_t run_three_dimensions(const Launch&, const Arguments& arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2, 3, 2);
  config.blockDim = dim3(4, 4, 2);
  return cudaLaunchKernelEx(&config, three_dimensions_kernel, arguments);
}

template <class Combine>
int over_warp(int index, int start, const Combine& combine) {
  for (int lane = 0; lane < 32; ++lane) start = combine(start, input_at(index / 32 * 32 + lane));
  return start;
}

std::vector<Feature> features() {
  const auto sum_of = [](int count) {
    int sum = 0;
    for (int index = 0; index < count; ++index) sum += input_at(index);
    return sum;
  };
  std::vector<Feature> all;
  all.push_back({"block barriers, with counts and votes", launch<block_barrier_kernel, Arguments>, shape_of(1), threads,
                 threads, 1, 0,
                 [](int index) {
                   int positive = 0, any = 0;
                   for (int other = 0; other < threads; ++other) {
                     positive += input_at(other) > 0;
                     any |= input_at(other) == 77;
                   }
                   return input_at(threads - 1 - index) + 1000 * positive + 1000000 + 2000000 * any;
                 },
                 nullptr});
  all.push_back({"shuffles", launch<shuffle_kernel, Arguments>, shape_of(1), threads, threads, 1, 0,
                 [](int index) {
                   const int warp = index / 32 * 32, lane = index % 32;
                   return input_at(warp + (lane + 5) % 32) + 3 * input_at(index / 8 * 8 + 3) +
                          5 * input_at(index ^ 16) + 7 * input_at(lane > 0 ? index - 1 : index) +
                          11 * input_at(lane < 30 ? index + 2 : index);
                 },
                 nullptr});
  all.push_back({"votes and matches", launch<vote_kernel, Arguments>, shape_of(1), threads, threads, 1, 0,
                 [](int index) {
                   unsigned odd = 0, equal = 0;
                   for (int lane = 0; lane < 32; ++lane) {
                     const int other = input_at(index / 32 * 32 + lane);
                     odd |= other % 2 != 0 ? 1u << lane : 0u;
                     equal |= other % 4 == input_at(index) % 4 ? 1u << lane : 0u;
                   }
                   return static_cast<int>(odd ^ equal) + 1;
                 },
                 nullptr});
  all.push_back(
      {"reductions over a warp", launch<warp_reduction_kernel, Arguments>, shape_of(1), threads, threads, 1, 0,
       [](int index) {
         return over_warp(index, 0, [](int left, int right) { return left + right; }) +
                3 * over_warp(index, 1 << 30, [](int left, int right) { return left < right ? left : right; }) +
                5 * over_warp(index, 0, [](int left, int right) { return left < right ? right : left; }) +
                over_warp(index, -1, [](int left, int right) { return left & (right | 1); }) +
                over_warp(index, 0, [](int left, int right) { return left | right; }) +
                over_warp(index, 0, [](int left, int right) { return left ^ right; });
       },
       nullptr});
  all.push_back(
      {"parts of a warp", launch<part_of_a_warp_kernel, Arguments>, shape_of(1), threads, threads, 1, 0,
       [](int index) { return index % 32 < 16 ? 2 * input_at(index ^ 1) + (index ^ 2) : 3 * input_at(index ^ 1); },
       nullptr});
  all.push_back(
      {"atomic operations", launch<atomic_kernel, Arguments>, shape_of(5), 5 * threads, 1, 11, 0, [](int) { return 0; },
       [sum_of](int index) {
         int smallest = 0, largest = 0, bits = 0, crossed = 0;
         for (int place = 0; place < 5 * threads; ++place) {
           const int value = input_at(place);
           smallest = value < smallest ? value : smallest;
           largest = value > largest ? value : largest;
           bits |= 1 << value % 8;
           crossed ^= value;
         }
         const float halves = 0.5f * 5 * threads;
         int as_int;
         std::memcpy(&as_int, &halves, sizeof(as_int));
         const int sum = sum_of(5 * threads);
         const int expected[] = {sum, -sum, smallest, largest, 0, bits, crossed, 5 * threads, as_int, sum, 31};
         return expected[index];
       }});
  all.push_back({"64 KB of dynamic shared memory", launch<dynamic_shared_kernel, Arguments>, shape_of(2, 1, 65536),
                 threads, threads, 1, 65536 / 4, [](int index) { return input_at((index + 1) % threads); }, nullptr});
  all.back().shape.blocks = 1;
  all.push_back({"wide loads and stores, cache hints", launch<vector_kernel, Arguments>, shape_of(1), 4 * threads,
                 4 * threads, 1, 0,
                 [](int index) {
                   const int first = index / 4 * 4;
                   if (index % 4 != 0) return input_at(first + (index % 4 == 3 ? 3 : 1));
                   return 2 * input_at(first) + input_at(first + 1) + input_at(first + 3);
                 },
                 nullptr});
  all.push_back({"bfloat16 and float16", launch<half_kernel, Arguments>, shape_of(1), threads, threads, 1, 0,
                 [](int index) {
                   const float value = static_cast<float>(input_at(index)) * 0.37f + 1.0f;
                   const float sum = __bfloat162float(__float2bfloat16_rn(value)) +
                                     __bfloat162float(__float2bfloat16_rn(3.0f * value)) +
                                     __half2float(__float2half_rn(2.0f * value)) + __half2float(__float2half_rn(value));
                   int bits;
                   std::memcpy(&bits, &sum, sizeof(bits));
                   return bits;
                 },
                 nullptr});
  all.push_back({"grids and blocks in three dimensions", run_three_dimensions, shape_of(1), 384, 384, 1, 0,
                 [](int index) { return input_at(index) + index / 192 * 100 + index % 16 / 4 * 10; }, nullptr});
  all.push_back({"asynchronous copies", launch<async_copy_kernel, Arguments>, shape_of(1, 1, 3 * threads * 16),
                 12 * threads, threads, 1, 0,
                 [](int index) {
                   return input_at(4 * index) + input_at(4 * (threads + index) + 3) +
                          input_at(4 * (2 * threads + (index + 1) % threads) + 1);
                 },
                 nullptr});
  all.push_back({"clusters and distributed shared memory", launch<cluster_kernel, Arguments>, shape_of(8, 4), threads,
                 8 * threads, 1, 0,
                 [](int index) {
                   const int rank = index / threads % 4;
                   return input_at(index % threads) + 1000 * ((rank + 1) % 4) + 100000 * rank;
                 },
                 nullptr, 90});
  all.push_back({"mailboxes of a cluster", launch<mailbox_kernel, Arguments>, shape_of(16, 8), 16 * threads,
                 16 * threads, 1, 8,
                 [](int index) {
                   const int first = index / (8 * threads) * 8 * threads;
                   int sum = 0;
                   for (int place = 0; place < 8 * threads; ++place) sum += 7 * (input_at(first + place) % 64) + 21;
                   return sum;
                 },
                 nullptr, 90});
  all.push_back({"barriers of the whole grid", launch<grid_barrier_kernel, Arguments>, shape_of(6, 1, 0, true),
                 6 * threads, 6 * threads, 6 * threads, 0,
                 [](int index) { return 2 * input_at(6 * threads - 1 - (index + threads) % (6 * threads)); }, nullptr});
  all.push_back({"counters at which some blocks meet", launch<counter_kernel, Arguments>, shape_of(4, 1, 0, true),
                 4 * threads, 4 * threads, 2 + 8 * threads, 0,
                 [](int index) { return 3 * input_at(index ^ threads) + 3; }, nullptr});
  all.push_back({"the last block, by fences and an atomic counter", launch<last_block_kernel, Arguments>, shape_of(7),
                 7 * threads, threads, 1 + 7 * threads, 0,
                 [](int index) {
                   int sum = 0;
                   for (int block = 0; block < 7; ++block) sum += 3 * input_at(block * threads + index);
                   return sum;
                 },
                 nullptr});
  return all;
}

bool holds(const std::vector<int>& found, const std::function<int(int)>& expected, const char* name) {
  for (int index = 0; index < static_cast<int>(found.size()); ++index) {
    const int value = found[static_cast<size_t>(index)];
    if (value != expected(index)) {
      std::printf("%s: WRONG: %d at %d, expected %d\n", name, value, index, expected(index));
      return false;
    }
  }
  return true;
}

bool passes(const Feature& feature) {
  std::vector<int> inputs;
  for (int index = 0; index < feature.inputs; ++index) inputs.push_back(input_at(index));
  std::vector<int> scratch(static_cast<size_t>(feature.scratch), 0);
  if (scratch.size() == 11) scratch[4] = 255;  // the bits that the atomic operations clear
  const DeviceInts input(inputs), output(std::vector<int>(static_cast<size_t>(feature.outputs), 0)), places(scratch);
  const cudaError_t error = feature.run(feature.shape, {input.data(), output.data(), places.data(), feature.count});
  if (error != cudaSuccess) {
    std::printf("%s: REFUSED: %s\n", feature.name, cudaGetErrorString(error));
    return false;
  }
  require(cudaDeviceSynchronize(), feature.name);
  const bool right = holds(output.values(), feature.expected, feature.name) &&
                     (!feature.expected_scratch || holds(places.values(), feature.expected_scratch, feature.name));
  if (right) std::printf("%s: ok\n", feature.name);
  return right;
}

// --- what a device refuses -------------------------------------------------------------------------------------------

__global__ void idle_kernel(const Arguments) {}

struct Refused {
  const char* name;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  int cluster;
  bool cooperative;
};

bool refuses(const Refused& refused) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  config.gridDim = refused.grid;
  config.blockDim = refused.block;
  config.dynamicSmemBytes = refused.shared_bytes;
  config.attrs = &attribute;
  if (refused.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(refused.cluster), 1, 1};
    config.numAttrs = 1;
  }
  if (refused.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, idle_kernel, Arguments{});
#if !defined(FASTREG_CUDA_SIMULATOR)
  cudaGetLastError();
#endif
  std::printf("refused, %s: %s\n", refused.name, error == cudaSuccess ? "WRONG, it was launched" : "ok");
  return error != cudaSuccess;
}

}  // namespace

int main(int count, char** values) {
  DeviceTraits device{};
#if defined(FASTREG_CUDA_SIMULATOR)
  const auto argument = [&](int index) { return index < count ? std::atoi(values[index]) : index == 3 ? 1 : 0; };
  simulator::configure(simulator::device_of(90, 2), {static_cast<simulator::Order>(argument(1)),
                                                     static_cast<uint64_t>(argument(2)), argument(3), true});
#else
  (void)count;
  (void)values;
#endif
  require(device_traits(0, device), "ask the device");
  bool right = true;
  for (const Feature& feature : features()) {
    if (device.architecture < feature.architecture) {
      std::printf("%s: not on sm_%d\n", feature.name, device.architecture);
      continue;
    }
    try {
      right = passes(feature) && right;
    } catch (const std::exception& exception) {
      std::printf("%s: WRONG: %s\n", feature.name, exception.what());
      right = false;
    }
  }
  int resident = 0;
  require(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, idle_kernel, 1024, 0), "ask what runs at once");
  const unsigned beyond_resident = static_cast<unsigned>(device.multiprocessors * resident + 1);
  const Refused all_refused[] = {
      {"1025 threads", {1, 1, 1}, {1025, 1, 1}, 0, 1, false},
      {"65 threads in z", {1, 1, 1}, {1, 1, 65}, 0, 1, false},
      {"grid.y of 65536", {1, 65536, 1}, {32, 1, 1}, 0, 1, false},
      {"grid.z of 65536", {1, 1, 65536}, {32, 1, 1}, 0, 1, false},
      {"an empty grid", {0, 1, 1}, {32, 1, 1}, 0, 1, false},
      {"shared memory that was not asked for", {1, 1, 1}, {32, 1, 1}, 50 * 1024, 1, false},
      {"a grid that is no multiple of its clusters", {3, 1, 1}, {32, 1, 1}, 0, 2, false},
      {"a cooperative grid that does not fit", {beyond_resident, 1, 1}, {1024, 1, 1}, 0, 1, true},
  };
  for (const Refused& refused : all_refused) right = refuses(refused) && right;
  return right ? 0 : 1;
}
