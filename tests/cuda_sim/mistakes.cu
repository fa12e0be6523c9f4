// Small kernels with one mistake each, for the simulator alone: on a GPU most of them would run and give anything.
//
//   mistakes          the names, with what the simulator has to say, a line each
//   mistakes <name>   makes that mistake; prints the error that it ends with

#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "launch.cuh"
#include "reduce.cuh"
#include "tracer.h"

namespace {

using namespace fastreg::cuda;
namespace groups = cooperative_groups;

constexpr int threads = 64;

struct Arguments {
  int* tensor;  // 256 elements, the second half of which nobody has written
};

struct Values {
  int at[threads];
};

int thread_index() { return static_cast<int>(threadIdx.x); }

// --- barriers --------------------------------------------------------------------------------------------------------

void missing_barrier(const Arguments) {
  FASTREG_SHARED(Values, shared);
  shared.at[thread_index()] = thread_index();
  const int neighbour = shared.at[thread_index() ^ 32];
  (void)*const_cast<const volatile int*>(&neighbour);
}

// Right in every order in which threads could run here: only what is known of the accesses tells.
void missing_barrier_before_reuse(const Arguments arguments) {
  FASTREG_SHARED(Values, shared);
  shared.at[thread_index()] = thread_index();
  __syncthreads();
  arguments.tensor[thread_index()] = shared.at[threads - 1 - thread_index()];
  shared.at[thread_index()] = 0;
}

// A shuffle makes nobody's writes visible.
void shuffle_for_a_barrier(const Arguments arguments) {
  FASTREG_SHARED(Values, shared);
  shared.at[thread_index()] = thread_index();
  const int value = __shfl_xor_sync(all_lanes, 1, 1);
  arguments.tensor[thread_index()] = shared.at[thread_index() ^ 1] + value;
}

void divergent_barrier(const Arguments) {
  if (thread_index() < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void barrier_after_some_have_ended(const Arguments) {
  if (thread_index() < 8) return;
  __syncthreads();
}

// --- warps -----------------------------------------------------------------------------------------------------------

void mask_without_the_caller(const Arguments) { __shfl_xor_sync(0x0000ffffu, thread_index(), 1); }

void mask_of_lanes_that_do_not_come(const Arguments) {
  if (thread_index() % 32 < 16) __shfl_xor_sync(all_lanes, thread_index(), 1);
}

void shuffle_from_outside_the_mask(const Arguments) {
  if (thread_index() % 32 < 16) __shfl_xor_sync(0x0000ffffu, thread_index(), 16);
}

void missing_warp_barrier(const Arguments arguments) {
  FASTREG_SHARED(Values, shared);
  shared.at[thread_index()] = 1;
  arguments.tensor[thread_index()] = shared.at[thread_index() ^ 1];
}

// --- memory ----------------------------------------------------------------------------------------------------------

void uninitialised_shared_memory(const Arguments arguments) {
  FASTREG_SHARED(Values, shared);
  if (thread_index() > 0) shared.at[thread_index()] = 1;
  __syncthreads();
  arguments.tensor[thread_index()] = shared.at[thread_index()];
}

void uninitialised_tensor(const Arguments arguments) {
  arguments.tensor[thread_index()] = arguments.tensor[128 + thread_index()];
}

void beyond_a_tensor(const Arguments arguments) { arguments.tensor[193 + thread_index()] = 1; }

void before_a_tensor(const Arguments arguments) {
  arguments.tensor[thread_index()] = arguments.tensor[thread_index() - 1];
}

void beyond_dynamic_shared_memory(const Arguments) { dynamic_shared()[threads * 4 - 63 + thread_index()] = 1; }

void beyond_static_shared_memory(const Arguments) {
  FASTREG_SHARED(Values, shared);
  (&shared.at[0])[thread_index() + 1] = 1;
}

void shared_memory_beside_all_that_is_allowed(const Arguments) {
  FASTREG_SHARED(Values, shared);
  shared.at[thread_index()] = 1;
}

void misaligned_vector(const Arguments arguments) { load_streamed(arguments.tensor + 1); }

void misaligned_store(const Arguments arguments) { store_wide(arguments.tensor + 2, uint4{}); }

void copy_read_too_early(const Arguments arguments) {
  copy_async(dynamic_shared() + 16 * (thread_index() % 8), arguments.tensor);
  copy_async_commit();
  arguments.tensor[128 + thread_index()] = dynamic_shared()[16 * (thread_index() % 8)];
}

// --- blocks ----------------------------------------------------------------------------------------------------------

void blocks_write_one_place(const Arguments arguments) {
  arguments.tensor[thread_index()] = static_cast<int>(blockIdx.x);
}

void block_reads_what_another_writes(const Arguments arguments) {
  const int place = static_cast<int>(blockIdx.x) * threads + thread_index();
  arguments.tensor[place] = arguments.tensor[(place + threads) % 128];
}

// The counter tells who is last; without a fence it tells nothing of what the others wrote.
void missing_fence(const Arguments arguments) {
  FASTREG_SHARED(Values, shared);
  arguments.tensor[1 + static_cast<int>(blockIdx.x)] = 3;
  if (thread_index() == 0) {
    shared.at[0] = atomicAdd(arguments.tensor, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
    if (shared.at[0] != 0) arguments.tensor[0] = arguments.tensor[1];
  }
}

void atomic_and_plain(const Arguments arguments) {
  if (blockIdx.x == 0) {
    atomicAdd(arguments.tensor, 1);
  } else {
    arguments.tensor[0] = 1;
  }
}

void grid_barrier_in_a_plain_launch(const Arguments) { groups::this_grid().sync(); }

void grid_barrier_that_some_blocks_skip(const Arguments) {
  if (blockIdx.x > 0) groups::this_grid().sync();
}

void missing_grid_barrier(const Arguments arguments) {
  arguments.tensor[static_cast<int>(blockIdx.x) * threads + thread_index()] = 1;
  groups::this_thread_block().sync();
  arguments.tensor[128 + thread_index()] =
      arguments.tensor[(static_cast<int>(blockIdx.x) * threads + thread_index() + threads) % 128];
}

// --- clusters --------------------------------------------------------------------------------------------------------

void write_to_a_block_that_has_not_started(const Arguments) {
  FASTREG_SHARED(Values, shared);
  const int other = 1 - static_cast<int>(cluster_rank());
  groups::this_cluster().map_shared_rank(shared.at, other)[thread_index()] = 1;
}

void write_to_a_block_that_has_ended(const Arguments) {
  FASTREG_SHARED(Values, shared);
  groups::this_cluster().sync();
  if (cluster_rank() == 0) return;
  __syncthreads();
  __syncthreads();
  groups::this_cluster().map_shared_rank(shared.at, 0)[thread_index()] = 1;
}

void missing_cluster_barrier(const Arguments arguments) {
  FASTREG_SHARED(Values, shared);
  const auto cluster = groups::this_cluster();
  cluster.sync();
  cluster.map_shared_rank(shared.at, 1 - static_cast<int>(cluster.block_rank()))[thread_index()] = 1;
  __syncthreads();
  arguments.tensor[static_cast<int>(blockIdx.x) * threads + thread_index()] = shared.at[thread_index()];
  cluster.sync();
}

// The barrier of csrc/cuda, which does not release: blocks have started, their writes need not have arrived.
void relaxed_cluster_barrier(const Arguments arguments) {
  FASTREG_SHARED(Values, shared);
  const auto cluster = groups::this_cluster();
  shared.at[thread_index()] = 1;
  cluster_arrive();
  cluster_wait();
  arguments.tensor[static_cast<int>(blockIdx.x) * threads + thread_index()] =
      cluster.map_shared_rank(shared.at, 1 - static_cast<int>(cluster.block_rank()))[thread_index()];
  cluster.sync();
}

void mailbox_not_published(const Arguments) {
  using FloatExchange = Exchange<float>;
  FASTREG_SHARED(FloatExchange, exchange);
  if (thread_index() == 0) mailbox_open(&exchange.mailboxes[0]);
  cluster_arrive();
  cluster_wait();
  if (thread_index() == 0) mailbox_send(&exchange.blocks[0][0][0], &exchange.mailboxes[0], 1 - cluster_rank(), 1.0f);
}

void counter_in_a_plain_launch(const Arguments arguments) {
  unsigned* const counter = reinterpret_cast<unsigned*>(arguments.tensor);
  if (thread_index() == 0) {
    counter_arrive(counter);
    counter_wait(counter, 2);
  }
}

void counter_at_which_too_few_arrive(const Arguments arguments) {
  unsigned* const counter = reinterpret_cast<unsigned*>(arguments.tensor);
  if (thread_index() == 0) {
    counter_arrive(counter);
    counter_wait(counter, 3);
  }
}

void counter_without_a_barrier(const Arguments arguments) {
  int* const values = arguments.tensor + threads;
  values[static_cast<int>(blockIdx.x) * threads + thread_index()] = thread_index();
  if (thread_index() == 0) {
    counter_arrive(reinterpret_cast<unsigned*>(arguments.tensor));
    counter_wait(reinterpret_cast<unsigned*>(arguments.tensor), 2);
  }
  __syncthreads();
  arguments.tensor[1 + thread_index() % 8] = values[(1 - static_cast<int>(blockIdx.x)) * threads + thread_index()];
}

// --- all of them -----------------------------------------------------------------------------------------------------

struct Mistake {
  const char* name;
  const char* found_by;
  void (*kernel)(Arguments);
  Launch shape;
};

#define MISTAKE_WITH(name, found_by, blocks, cluster, shared_bytes, cooperative)             \
  {                                                                                          \
    #name, found_by, &name, { blocks, threads, cluster, shared_bytes, cooperative, nullptr } \
  }
#define MISTAKE(name, found_by, blocks, cluster, cooperative) \
  MISTAKE_WITH(name, found_by, blocks, cluster, threads * 4, cooperative)

const Mistake mistakes[] = {
    MISTAKE(missing_barrier, "nobody has written", 1, 1, false),
    MISTAKE(missing_barrier_before_reuse, "race: a read", 1, 1, false),
    MISTAKE(shuffle_for_a_barrier, "race: a read", 1, 1, false),
    MISTAKE(divergent_barrier, "divergent barrier", 1, 1, false),
    MISTAKE(barrier_after_some_have_ended, "divergent barrier", 1, 1, false),
    MISTAKE(mask_without_the_caller, "does not name the lane that uses it", 1, 1, false),
    MISTAKE(mask_of_lanes_that_do_not_come, "divergent warp", 1, 1, false),
    MISTAKE(shuffle_from_outside_the_mask, "which its mask does not name", 1, 1, false),
    MISTAKE(missing_warp_barrier, "nobody has written", 1, 1, false),
    MISTAKE(uninitialised_shared_memory, "nobody has written", 1, 1, false),
    MISTAKE(uninitialised_tensor, "nobody has written", 1, 1, false),
    MISTAKE(beyond_a_tensor, "outside every tensor", 1, 1, false),
    MISTAKE(before_a_tensor, "outside every tensor", 1, 1, false),
    MISTAKE(beyond_dynamic_shared_memory, "outside the block's shared memory", 1, 1, false),
    MISTAKE(beyond_static_shared_memory, "outside the block's shared memory", 1, 1, false),
    MISTAKE_WITH(shared_memory_beside_all_that_is_allowed, "the kernel was not allowed that", 1, 1, 48 * 1024, false),
    MISTAKE(misaligned_vector, "misaligned access", 1, 1, false),
    MISTAKE(misaligned_store, "misaligned access", 1, 1, false),
    MISTAKE(copy_read_too_early, "not waited for", 1, 1, false),
    MISTAKE(blocks_write_one_place, "race: a write", 2, 1, false),
    MISTAKE(block_reads_what_another_writes, "race: a read", 2, 1, false),
    MISTAKE(missing_fence, "race: a", 2, 1, false),
    MISTAKE(atomic_and_plain, "race: a write", 2, 1, false),
    MISTAKE(grid_barrier_in_a_plain_launch, "not cooperative", 2, 1, false),
    MISTAKE(grid_barrier_that_some_blocks_skip, "divergent barrier", 2, 1, true),
    MISTAKE(missing_grid_barrier, "race: a", 2, 1, true),
    MISTAKE(counter_in_a_plain_launch, "not cooperative", 2, 1, false),
    MISTAKE(counter_at_which_too_few_arrive, "threads wait at a counter", 2, 1, true),
    MISTAKE(counter_without_a_barrier, "race: a read", 2, 1, true),
    MISTAKE(write_to_a_block_that_has_not_started, "has not started", 2, 2, false),
    MISTAKE(write_to_a_block_that_has_ended, "has ended", 2, 2, false),
    MISTAKE(missing_cluster_barrier, "race: a", 2, 2, false),
    MISTAKE(relaxed_cluster_barrier, "race: a read", 2, 2, false),
    MISTAKE(mailbox_not_published, "before the cluster knows", 2, 2, false),
};

void make(const Mistake& mistake) {
  int* tensor = static_cast<int*>(simulator::tracer::allocate(256 * sizeof(int), sizeof(int)));
  for (int index = 0; index < 128; ++index) tensor[index] = 0;
  simulator::tracer::initialised(tensor, 128 * sizeof(int));
  const LaunchConfiguration configuration(mistake.shape);
  const cudaError_t error = cudaLaunchKernelEx(&configuration.config, mistake.kernel, Arguments{tensor});
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace

int main(int count, char** values) {
  simulator::configure(simulator::device_of(90, 2), {simulator::Order::first_in_first_out, 0, 2, true});
  for (const Mistake& mistake : mistakes) {
    if (count == 1) {
      std::printf("%s: %s\n", mistake.name, mistake.found_by);
    } else if (std::strcmp(values[1], mistake.name) == 0) {
      try {
        make(mistake);
      } catch (const std::exception& exception) {
        std::printf("%s\n", exception.what());
      }
    }
  }
  return 0;
}
