// The life of simulated threads, blocks and clusters, and the scheduler that lets them continue.

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>
#include <stdexcept>

#include "state.h"
#include "tracer.h"

dim3 gridDim;
dim3 blockDim;

namespace simulator {

#if defined(__SANITIZE_ADDRESS__)
void entered(Context& self, Context& previous);
#endif

Thread* running = nullptr;
Launch launch;
Device the_device = device_of(90, 132);
Schedule the_schedule;
std::mutex one_launch;

namespace {

constexpr size_t red_zone_bytes = 64;
constexpr unsigned char poison = 0xFF;  // four of them are a NaN, two of them as well
constexpr unsigned char red_zone = 0xA5;

Context scheduler;
std::vector<std::unique_ptr<Thread>> idle_threads;

uint3 place_in(const dim3& extents, unsigned linear) {
  return {linear % extents.x, linear / extents.x % extents.y, linear / extents.x / extents.y};
}

// --- the life of a thread --------------------------------------------------------------------------------------------

__attribute__((noinline)) void thread_exits() {
  Thread* thread = running;
  Block& block = *thread->block;
  ++block.exited;
  ++block.cluster->exited;
  ++launch.exited;
  Warp& warp = block.warps[thread->linear / 32];
  warp.exited |= 1u << thread->lane();
  const auto nobody_waits = [&](const std::vector<Thread*>& waiting, Site site) {
    if (!waiting.empty()) {
      fail("divergent barrier: " + describe(*thread) + " has ended while others wait at " + describe(site));
    }
  };
  nobody_waits(block.at_barrier, block.barrier_site);
  nobody_waits(launch.at_grid_barrier, launch.grid_barrier_site);
  for (const Meeting& meeting : warp.meetings) {
    if ((meeting.lanes->mask >> thread->lane() & 1u) != 0) {
      fail("divergent warp: " + describe(*thread) + " has ended while its lane is awaited at " +
           describe(meeting.site));
    }
  }
}

__attribute__((noinline)) void run_thread() {
  try {
    launch.body();
    thread_exits();
  } catch (const std::exception& exception) {
    launch.error = exception.what();
  }
}

// Never returns, so nothing may be left of it on a stack that the address sanitizer watches.
__attribute__((no_sanitize("address"))) void thread_entry() {
#if defined(__SANITIZE_ADDRESS__)
  entered(running->context, scheduler);
#endif
  run_thread();
  running->context.switch_to(scheduler);
  std::abort();  // an ended thread is never continued
}

std::unique_ptr<Thread> take_thread() {
  if (!idle_threads.empty()) {
    std::unique_ptr<Thread> thread = std::move(idle_threads.back());
    idle_threads.pop_back();
    return thread;
  }
  auto thread = std::make_unique<Thread>();
  void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) {
    throw std::bad_alloc();
  }
  thread->stack = static_cast<unsigned char*>(stack);
  return thread;
}

// --- the life of a cluster -------------------------------------------------------------------------------------------

std::unique_ptr<Block> start_block(unsigned linear_block, unsigned rank, Cluster* cluster) {
  auto block = std::make_unique<Block>();
  block->linear = linear_block;
  block->index = place_in(gridDim, linear_block);
  block->rank = rank;
  block->cluster = cluster;
  const size_t bytes = static_shared_bytes + launch.dynamic_bytes;
  block->memory.reset(new unsigned char[bytes + red_zone_bytes + 16]);
  block->shared =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block->memory.get()) + 15) & ~uintptr_t{15});
  std::memset(block->shared, poison, bytes);
  std::memset(block->shared + bytes, red_zone, red_zone_bytes);
  block->warps.resize((launch.threads + 31) / 32);
  for (unsigned linear = 0; linear < launch.threads; ++linear) {
    Thread* thread = take_thread().release();
    thread->block = block.get();
    thread->index = place_in(blockDim, linear);
    thread->linear = linear;
    thread->arrived_at_phase = ~uint64_t{0};
    thread->phases_passed = 0;
    thread->copy_groups.clear();
    thread->open_group.clear();
    thread->context.prepare(thread->stack, stack_bytes, thread_entry);
    block->threads.push_back(thread);
  }
  tracer::block_starts(*block, static_shared_bytes + launch.dynamic_bytes);
  make_ready(block->threads);
  return block;
}

void start_cluster(unsigned cluster_index) {
  auto cluster = std::make_unique<Cluster>();
  for (unsigned rank = 0; rank < launch.cluster_size; ++rank) {
    cluster->blocks.push_back(start_block(cluster_index * launch.cluster_size + rank, rank, cluster.get()));
  }
  launch.clusters.push_back(std::move(cluster));
}

void end_cluster(Cluster& cluster) {
  for (const auto& block : cluster.blocks) {
    tracer::block_ends(*block);
    for (Thread* thread : block->threads) idle_threads.emplace_back(thread);
    const unsigned char* zone = block->shared + static_shared_bytes + launch.dynamic_bytes;
    if (launch.error.empty() &&
        std::any_of(zone, zone + red_zone_bytes, [](unsigned char byte) { return byte != red_zone; })) {
      launch.error = "block " + std::to_string(block->linear) + " wrote beyond its shared memory";
    }
  }
}

// --- the scheduler ---------------------------------------------------------------------------------------------------

Thread* next_thread() {
  Thread* thread;
  switch (the_schedule.order) {
    case Order::first_in_first_out:
      thread = launch.ready.front();
      launch.ready.pop_front();
      return thread;
    case Order::last_in_first_out:
      thread = launch.ready.back();
      launch.ready.pop_back();
      return thread;
    default:
      std::swap(launch.ready[launch.random() % launch.ready.size()], launch.ready.back());
      thread = launch.ready.back();
      launch.ready.pop_back();
      return thread;
  }
}

// Nobody can continue and somebody has not ended: says who waits where.
std::string describe_deadlock() {
  std::ostringstream text;
  text << "deadlock:";
  if (!launch.at_grid_barrier.empty()) {
    text << " divergent barrier: " << launch.at_grid_barrier.size() << " of " << launch.blocks * launch.threads
         << " threads wait for the grid at " << describe(launch.grid_barrier_site) << ";";
  }
  if (!launch.at_counter.empty()) text << " " << launch.at_counter.size() << " threads wait at a counter;";
  for (const auto& cluster : launch.clusters) {
    if (!cluster->waiting.empty()) {
      text << " " << cluster->waiting.size() << " threads wait at a cluster barrier where " << cluster->arrived
           << " arrived;";
    }
    for (const auto& block : cluster->blocks) {
      if (!block->at_barrier.empty()) {
        text << " divergent barrier: " << block->at_barrier.size() << " of " << block->threads.size()
             << " threads of block " << block->linear << " wait at " << describe(block->barrier_site) << ";";
      }
      if (!block->at_mailbox.empty()) {
        text << " " << block->at_mailbox.size() << " threads of block " << block->linear << " wait at a mailbox;";
      }
      for (const Warp& warp : block->warps) {
        for (const Meeting& meeting : warp.meetings) {
          text << " divergent warp: lanes " << std::hex << meeting.arrived << " of " << meeting.lanes->mask << std::dec
               << " of block " << block->linear << " wait at " << describe(meeting.site) << ";";
        }
      }
    }
  }
  return text.str();
}

}  // namespace

std::string describe(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

std::string describe(const Thread& thread) {
  return "thread " + std::to_string(thread.linear) + " of block " + std::to_string(thread.block->linear);
}

void make_ready(const std::vector<Thread*>& threads) {
  launch.ready.insert(launch.ready.end(), threads.begin(), threads.end());
}

void wait_for_others() { running->context.switch_to(scheduler); }

void fail(const std::string& message) {
  if (running == nullptr) {
    throw std::runtime_error(message);
  }
  launch.error = message;
  // Not thrown: the compiler takes it for granted that the calls that it puts before accesses do not throw.
  wait_for_others();
  std::abort();  // the launch is over
}

void run_clusters() {
  const unsigned clusters = launch.blocks / launch.cluster_size;
  const size_t at_once = launch.cooperative ? clusters : static_cast<size_t>(the_schedule.clusters_at_once);
  std::vector<unsigned> order(clusters);
  for (unsigned index = 0; index < clusters; ++index) order[index] = index;
  if (the_schedule.order == Order::last_in_first_out) std::reverse(order.begin(), order.end());
  if (the_schedule.order == Order::random) std::shuffle(order.begin(), order.end(), launch.random);

  size_t started = 0;
  while (launch.error.empty() && (started < order.size() || !launch.clusters.empty())) {
    while (started < order.size() && launch.clusters.size() < at_once) {
      start_cluster(order[started++]);
    }
    if (launch.ready.empty()) {
      launch.error = describe_deadlock();
      break;
    }
    running = next_thread();
    Block& block = *running->block;
    block.started = true;
    scheduler.switch_to(running->context);
    Cluster* cluster = block.cluster;
    if (cluster->exited == launch.cluster_size * launch.threads) {
      end_cluster(*cluster);
      std::erase_if(launch.clusters, [&](const auto& candidate) { return candidate.get() == cluster; });
    }
  }
  for (const auto& cluster : launch.clusters) end_cluster(*cluster);
  launch.clusters.clear();
  launch.ready.clear();
  running = nullptr;
}

}  // namespace simulator
