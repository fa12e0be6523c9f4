// Runs CUDA kernels on a CPU, one simulated thread after another, each until it has to wait for others.
//
// What a real GPU leaves to chance is an error here: a barrier that some threads of a block do not reach or reach at
// another line, a warp operation whose mask names lanes that do not come, a write into a block that has not started or
// has ended. What it leaves open is chosen by a schedule: the order in which threads continue, and how many blocks are
// under way. An error ends the launch with an exception; a launch that a device would refuse returns CUDA's error code.
//
// Compiled with FASTREG_TRACE, every access to memory is checked as well (tracer.h).

#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "context.h"

// Of the launch under way.
extern dim3 gridDim;
extern dim3 blockDim;

namespace simulator {

#if defined(FASTREG_TRACE)
inline constexpr bool tracing = true;
#else
inline constexpr bool tracing = false;
#endif

// --- the device ------------------------------------------------------------------------------------------------------

struct Device {
  int architecture;  // 90 for compute capability 9.0
  int multiprocessors;
  int shared_bytes_per_block;
  int shared_bytes_per_multiprocessor;
  int largest_cluster;
};

// In which order threads that can continue do so.
enum class Order { first_in_first_out, last_in_first_out, random };

struct Schedule {
  Order order = Order::first_in_first_out;
  uint64_t seed = 0;
  int clusters_at_once = 1;  // all of them where the launch is cooperative
  bool execute = true;       // else launches are checked and recorded only
};

// With so many KB of shared memory a multiprocessor, one of which each block loses.
Device device_of(int architecture, int multiprocessors);
void configure(const Device& device, const Schedule& schedule);
const Device& device();

// The launches since the last call, a line for each kernel and configuration: how often, blocks, threads, blocks a
// cluster, bytes of dynamic shared memory, whether cooperative, name.
std::string launches();

// --- threads and blocks ----------------------------------------------------------------------------------------------

// Where in the source an operation stands that several threads must reach together.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};

// What each lane of a warp brought to an operation, and which lanes those are.
struct Lanes {
  uint32_t mask;
  std::array<uint64_t, 32> values;
};

// A warp operation that some lanes have reached and others not yet.
struct Meeting {
  Site site;
  bool orders_memory;
  uint32_t arrived;
  std::shared_ptr<Lanes> lanes;
};

// An mbarrier with one arrival a round, as csrc/cuda uses it; it lies in the memory of its block.
struct Mailbox {
  uint64_t opened;  // mark_of_an_open_mailbox, or poison
  int64_t missing_bytes;
  uint32_t round;
  uint32_t expected;            // whether this round's arrival has happened
  uint64_t published_at_phase;  // of the cluster barrier, when its opening was fenced
  uint32_t index;               // among the block's
};

struct Thread;
struct Cluster;

struct Warp {
  std::vector<Meeting> meetings;
  uint32_t exited = 0;
};

struct Block {
  unsigned linear;
  uint3 index;
  unsigned rank;  // in its cluster
  Cluster* cluster;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared;  // static variables, then the dynamic part; 16 bytes aligned
  bool started = false;
  unsigned exited = 0;
  std::vector<Thread*> at_barrier;
  Site barrier_site{};
  int barrier_votes = 0;
  std::vector<Mailbox*> mailboxes;  // open
  std::vector<std::pair<Mailbox*, Thread*>> at_mailbox;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  uint64_t phase = 0;  // of the cluster barrier
  unsigned arrived = 0;
  unsigned exited = 0;
  std::vector<Thread*> waiting;
};

struct PendingCopy {
  void* target;
  const void* source;
  size_t bytes;
  const void* place;  // in the kernel
  bool moved;
};

struct Thread {
  Context context;
  unsigned char* stack = nullptr;
  Block* block = nullptr;
  uint3 index{};
  unsigned linear = 0;  // in the block
  std::shared_ptr<Lanes> received;
  int received_votes = 0;
  uint64_t arrived_at_phase = ~uint64_t{0};
  uint64_t phases_passed = 0;                         // of the cluster barrier
  std::vector<std::vector<PendingCopy>> copy_groups;  // committed and not yet waited for
  std::vector<PendingCopy> open_group;

  unsigned lane() const { return linear % 32; }
};

inline constexpr size_t stack_bytes = 256 * 1024;

extern Thread* running;

// --- what a kernel may do --------------------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& message);

// Returns how many threads gave a predicate that holds.
int block_barrier(int predicate, Site site);
// What all lanes of the mask brought. Only some operations make earlier writes visible to the other lanes.
Lanes meet(uint32_t mask, uint64_t value, bool orders_memory, Site site);
// All threads of a cooperative launch.
void grid_barrier(Site site);
// A counter in global memory, at which blocks of a cooperative launch wait for each other. Arriving is a fence and an
// atomic addition, waiting an atomic read and a fence.
void counter_arrive(unsigned* counter);
void counter_wait(unsigned* counter, unsigned target);

// `releases`: whether earlier writes become visible to those who wait.
void cluster_arrive(bool releases);
void cluster_wait();
unsigned cluster_blocks();
// Where `own`, in the running block's shared memory, is in the block of that rank.
void* in_block_of_rank(const void* own, unsigned rank);

void mailbox_open(Mailbox* mailbox);
// Makes the running block's mailboxes that are open by now known to the cluster, with its next barrier.
void mailboxes_publish();
void mailbox_expect(Mailbox* mailbox, unsigned bytes);
// Writes to where `slot` and `mailbox`, which lie in the running block's shared memory, are in the block of that rank.
void mailbox_send(float* slot, Mailbox* mailbox, unsigned rank, float value);
void mailbox_wait(Mailbox* mailbox, unsigned parity);

// Before an atomic operation, and a fence over the whole device.
void atomic_access(const void* address, size_t bytes);
void fence();

// The variable of the running block that belongs to `key`, poisoned when the block starts.
void* shared_variable(const void* key, size_t bytes, size_t alignment);
unsigned char* dynamic_shared();

void copy_async(void* target, const void* source, size_t bytes);
void copy_async_commit();
void copy_async_wait(size_t pending);

inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("misaligned access of " + std::to_string(bytes) + " bytes");
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

cudaError_t allow_shared_bytes(const void* kernel, int bytes);
cudaError_t resident_clusters(int* clusters, const cudaLaunchConfig_t& config);
int resident_blocks_per_multiprocessor(int threads, size_t dynamic_shared_bytes);
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body);

}  // namespace simulator
