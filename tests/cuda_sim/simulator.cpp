#include "simulator.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <new>
#include <random>
#include <sstream>
#include <stdexcept>

dim3 gridDim;
dim3 blockDim;

namespace simulator {

#if defined(__SANITIZE_ADDRESS__)
void entered(Context& self, Context& previous);
#endif

Thread* running = nullptr;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t stack_bytes = 256 * 1024;
#else
constexpr size_t stack_bytes = 64 * 1024;
#endif
constexpr size_t static_shared_bytes = 16 * 1024;  // room for static variables, more than any kernel has
constexpr size_t red_zone_bytes = 64;
constexpr unsigned char poison = 0xFF;  // four of them are a NaN, two of them as well
constexpr unsigned char red_zone = 0xA5;

Device the_device{90, 132, 227 * 1024, 228 * 1024, 8};
Schedule the_schedule;

// Names and shared-memory limits of kernels, by address.
std::map<const void*, int> allowed_shared_bytes;
std::map<std::string, int> launch_counts;  // by what launches() says of them

// What is under way; one launch at a time.
struct Launch {
  std::function<void()> body;
  size_t dynamic_bytes = 0;
  unsigned cluster_size = 1;
  std::vector<std::pair<const void*, size_t>> variables;  // key, offset
  size_t variables_bytes = 0;
  std::vector<std::unique_ptr<Cluster>> clusters;  // under way
  std::deque<Thread*> ready;
  std::string error;
  std::mt19937_64 random;
};
Launch launch;
Context scheduler;
std::mutex one_launch;
std::vector<std::unique_ptr<Thread>> idle_threads;

struct LaunchFailed {};

std::string name_of(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) {
    return "unknown kernel";
  }
  int status = 0;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string name = status == 0 ? readable : info.dli_sname;
  std::free(readable);
  return name;
}

std::string describe(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

std::string describe(const Thread& thread) {
  return "thread " + std::to_string(thread.linear) + " of block " + std::to_string(thread.block->index.x);
}

void make_ready(const std::vector<Thread*>& threads) {
  launch.ready.insert(launch.ready.end(), threads.begin(), threads.end());
}

void wait_for_others() { running->context.switch_to(scheduler); }

// --- the life of a thread --------------------------------------------------------------------------------------------

void thread_exits() {
  Thread* thread = running;
  Block& block = *thread->block;
  ++block.exited;
  ++block.cluster->exited;
  Warp& warp = block.warps[thread->linear / 32];
  warp.exited |= 1u << thread->lane();
  if (!block.at_barrier.empty()) {
    fail("divergent barrier: " + describe(*thread) + " has ended while others wait at " + describe(block.barrier_site));
  }
  for (const Meeting& meeting : warp.meetings) {
    if ((meeting.mask >> thread->lane() & 1u) != 0) {
      fail("divergent warp: " + describe(*thread) + " has ended while its lane is awaited at " +
           describe(meeting.site));
    }
  }
}

void thread_entry() {
#if defined(__SANITIZE_ADDRESS__)
  entered(running->context, scheduler);
#endif
  try {
    launch.body();
    thread_exits();
  } catch (const LaunchFailed&) {
  } catch (const std::exception& exception) {
    launch.error = exception.what();
  }
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

std::unique_ptr<Block> start_block(unsigned block_index, unsigned rank, Cluster* cluster) {
  auto block = std::make_unique<Block>();
  block->index = {block_index, 0, 0};
  block->rank = rank;
  block->cluster = cluster;
  const size_t bytes = static_shared_bytes + launch.dynamic_bytes;
  block->memory.reset(new unsigned char[bytes + red_zone_bytes + 16]);
  block->shared =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block->memory.get()) + 15) & ~uintptr_t{15});
  std::memset(block->shared, poison, bytes);
  std::memset(block->shared + bytes, red_zone, red_zone_bytes);
  block->warps.resize((blockDim.x + 31) / 32);
  for (unsigned linear = 0; linear < blockDim.x; ++linear) {
    Thread* thread = take_thread().release();
    thread->block = block.get();
    thread->index = {linear, 0, 0};
    thread->linear = linear;
    thread->arrived_at_phase = ~uint64_t{0};
    thread->copy_groups.clear();
    thread->open_group.clear();
    thread->context.prepare(thread->stack, stack_bytes, thread_entry);
    block->threads.push_back(thread);
  }
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
    for (Thread* thread : block->threads) idle_threads.emplace_back(thread);
    const unsigned char* zone = block->shared + static_shared_bytes + launch.dynamic_bytes;
    if (launch.error.empty() &&
        std::any_of(zone, zone + red_zone_bytes, [](unsigned char byte) { return byte != red_zone; })) {
      launch.error = "block " + std::to_string(block->index.x) + " wrote beyond its shared memory";
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
  for (const auto& cluster : launch.clusters) {
    if (!cluster->waiting.empty()) {
      text << " " << cluster->waiting.size() << " threads wait at a cluster barrier where " << cluster->arrived
           << " arrived;";
    }
    for (const auto& block : cluster->blocks) {
      if (!block->at_barrier.empty()) {
        text << " divergent barrier: " << block->at_barrier.size() << " of " << block->threads.size()
             << " threads of block " << block->index.x << " wait at " << describe(block->barrier_site) << ";";
      }
      if (!block->at_mailbox.empty()) {
        text << " " << block->at_mailbox.size() << " threads of block " << block->index.x << " wait at a mailbox;";
      }
      for (const Warp& warp : block->warps) {
        for (const Meeting& meeting : warp.meetings) {
          text << " divergent warp: lanes " << std::hex << meeting.arrived << " of " << meeting.mask << std::dec
               << " of block " << block->index.x << " wait at " << describe(meeting.site) << ";";
        }
      }
    }
  }
  return text.str();
}

void run_clusters(unsigned clusters) {
  std::vector<unsigned> order(clusters);
  for (unsigned index = 0; index < clusters; ++index) order[index] = index;
  if (the_schedule.order == Order::last_in_first_out) std::reverse(order.begin(), order.end());
  if (the_schedule.order == Order::random) std::shuffle(order.begin(), order.end(), launch.random);

  size_t started = 0;
  while (launch.error.empty() && (started < order.size() || !launch.clusters.empty())) {
    while (started < order.size() && launch.clusters.size() < static_cast<size_t>(the_schedule.clusters_at_once)) {
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
    if (cluster->exited == launch.cluster_size * blockDim.x) {
      end_cluster(*cluster);
      std::erase_if(launch.clusters, [&](const auto& candidate) { return candidate.get() == cluster; });
    }
  }
  for (const auto& cluster : launch.clusters) end_cluster(*cluster);
  launch.clusters.clear();
  launch.ready.clear();
  running = nullptr;
}

}  // namespace

// --- errors, barriers, warps -----------------------------------------------------------------------------------------

void fail(const std::string& message) {
  if (running == nullptr) {
    throw std::runtime_error(message);
  }
  launch.error = message;
  throw LaunchFailed{};
}

void block_barrier(Site site) {
  Block& block = *running->block;
  if (block.exited > 0) {
    fail("divergent barrier: " + describe(*running) + " reached " + describe(site) +
         ", but threads of its block have ended");
  }
  if (block.at_barrier.empty()) {
    block.barrier_site = site;
  } else if (!(block.barrier_site == site)) {
    fail("divergent barrier: " + describe(*running) + " reached " + describe(site) + " while others wait at " +
         describe(block.barrier_site));
  }
  block.at_barrier.push_back(running);
  if (block.at_barrier.size() == block.threads.size()) {
    std::vector<Thread*> released;
    released.swap(block.at_barrier);
    make_ready(released);
  }
  wait_for_others();
}

uint64_t warp_operation(WarpOperation operation, uint32_t mask, uint64_t value, int source, Site site) {
  Thread& thread = *running;
  Block& block = *thread.block;
  const unsigned first = thread.linear - thread.lane();
  Warp& warp = block.warps[first / 32];
  const unsigned lanes = std::min<unsigned>(32, static_cast<unsigned>(block.threads.size()) - first);
  if (lanes < 32 && mask >> lanes != 0) {
    fail("the mask at " + describe(site) + " names lanes that the last warp of the block does not have");
  }
  if ((mask >> thread.lane() & 1u) == 0) {
    fail("the mask at " + describe(site) + " does not name the lane that uses it: " + describe(thread));
  }
  if ((mask & warp.exited) != 0) {
    fail("divergent warp: the mask at " + describe(site) + " names a lane that has ended, in the warp of " +
         describe(thread));
  }
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(),
                              [&](const Meeting& candidate) { return (candidate.mask & mask) != 0; });
  if (meeting == warp.meetings.end()) {
    warp.meetings.push_back(Meeting{operation, site, mask, 0, {}, {}});
    meeting = warp.meetings.end() - 1;
  }
  if (meeting->mask != mask || meeting->operation != operation || !(meeting->site == site)) {
    fail("divergent warp: " + describe(thread) + " reached " + describe(site) + " while lanes of its warp wait at " +
         describe(meeting->site));
  }
  meeting->arrived |= 1u << thread.lane();
  meeting->values[thread.lane()] = value;
  meeting->sources[thread.lane()] = source;
  if (meeting->arrived == mask) {
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if ((mask >> lane & 1u) != 0 && meeting->values[lane] != 0) votes |= uint64_t{1} << lane;
    }
    std::vector<Thread*> released;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if ((mask >> lane & 1u) == 0) continue;
      Thread* other = block.threads[first + lane];
      if (operation == WarpOperation::shuffle) {
        const int from = meeting->sources[lane];
        if ((mask >> from & 1u) == 0) {
          fail("a shuffle at " + describe(site) + " reads lane " + std::to_string(from) +
               ", which its mask does not name");
        }
        other->received = meeting->values[from];
      } else {
        other->received = votes;
      }
      released.push_back(other);
    }
    warp.meetings.erase(meeting);
    make_ready(released);
  }
  wait_for_others();
  return thread.received;
}

// --- clusters --------------------------------------------------------------------------------------------------------

void cluster_arrive() {
  Cluster& cluster = *running->block->cluster;
  if (running->arrived_at_phase == cluster.phase) {
    fail("cluster barrier: " + describe(*running) + " arrived twice without waiting");
  }
  running->arrived_at_phase = cluster.phase;
  if (++cluster.arrived == cluster.blocks.size() * blockDim.x) {
    cluster.arrived = 0;
    ++cluster.phase;
    std::vector<Thread*> released;
    released.swap(cluster.waiting);
    make_ready(released);
  }
}

void cluster_wait() {
  Cluster& cluster = *running->block->cluster;
  if (running->arrived_at_phase == ~uint64_t{0}) {
    fail("cluster barrier: " + describe(*running) + " waits without having arrived");
  }
  const bool complete = cluster.phase > running->arrived_at_phase;
  running->arrived_at_phase = ~uint64_t{0};
  if (!complete) {
    cluster.waiting.push_back(running);
    wait_for_others();
  }
}

namespace {

constexpr uint64_t mark_of_an_open_mailbox = 0x6f70656e6d61696c;

void require_open(const Mailbox* mailbox) {
  if (mailbox->opened != mark_of_an_open_mailbox) {
    fail("a mailbox is used that has not been opened");
  }
}

void end_round_if_complete(Block& block, Mailbox* mailbox) {
  if (mailbox->expected == 0 || mailbox->missing_bytes != 0) {
    return;
  }
  mailbox->expected = 0;
  ++mailbox->round;
  std::vector<Thread*> released;
  for (const auto& [waited_for, thread] : block.at_mailbox) {
    if (waited_for == mailbox) released.push_back(thread);
  }
  std::erase_if(block.at_mailbox, [&](const auto& waiting) { return waiting.first == mailbox; });
  make_ready(released);
}

}  // namespace

void mailbox_open(Mailbox* mailbox) { *mailbox = {mark_of_an_open_mailbox, 0, 0, 0}; }

void mailbox_expect(Mailbox* mailbox, unsigned bytes) {
  require_open(mailbox);
  if (mailbox->expected != 0) {
    fail("a mailbox is told twice in one round how much to expect");
  }
  mailbox->expected = 1;
  mailbox->missing_bytes += bytes;
  end_round_if_complete(*running->block, mailbox);
}

void mailbox_send(float* slot, Mailbox* mailbox, unsigned rank, float value) {
  Block& block = *running->block;
  if (rank >= block.cluster->blocks.size()) {
    fail("rank " + std::to_string(rank) + " is outside the cluster");
  }
  Block& target = *block.cluster->blocks[rank];
  if (!target.started) {
    fail("access to the shared memory of block " + std::to_string(target.index.x) + ", which has not started");
  }
  if (target.exited == target.threads.size()) {
    fail("access to the shared memory of block " + std::to_string(target.index.x) + ", which has ended");
  }
  const auto there = [&](void* own) { return target.shared + (static_cast<unsigned char*>(own) - block.shared); };
  Mailbox* remote = reinterpret_cast<Mailbox*>(there(mailbox));
  require_open(remote);
  std::memcpy(there(slot), &value, sizeof(value));
  remote->missing_bytes -= static_cast<int64_t>(sizeof(value));
  end_round_if_complete(target, remote);
}

void mailbox_wait(Mailbox* mailbox, unsigned parity) {
  require_open(mailbox);
  while (mailbox->round % 2 == parity) {
    running->block->at_mailbox.emplace_back(mailbox, running);
    wait_for_others();
  }
}

// --- shared memory and asynchronous copies ---------------------------------------------------------------------------

void* shared_variable(const void* key, size_t bytes, size_t alignment) {
  for (const auto& [known, offset] : launch.variables) {
    if (known == key) return running->block->shared + offset;
  }
  const size_t offset = (launch.variables_bytes + alignment - 1) / alignment * alignment;
  if (offset + bytes > static_shared_bytes) {
    fail("more static shared memory than the simulator has room for");
  }
  launch.variables.emplace_back(key, offset);
  launch.variables_bytes = offset + bytes;
  if (launch.variables_bytes + launch.dynamic_bytes > static_cast<size_t>(the_device.shared_bytes_per_block)) {
    fail("more shared memory than a block may have");
  }
  return running->block->shared + offset;
}

unsigned char* dynamic_shared() { return running->block->shared + static_shared_bytes; }

// The bytes move at once or when they are waited for: code that reads too early, or has not read what they replace,
// gets other bytes in one of the schedules.
void copy_async(void* target, const void* source) {
  check_aligned(target, 16);
  check_aligned(source, 16);
  const bool at_once = the_schedule.order == Order::last_in_first_out ||
                       (the_schedule.order == Order::random && launch.random() % 2 == 0);
  if (at_once) {
    std::memcpy(target, source, 16);
  } else {
    running->open_group.push_back({target, source});
  }
}

void copy_async_commit() {
  running->copy_groups.push_back(std::move(running->open_group));
  running->open_group.clear();
}

void copy_async_wait(size_t pending) {
  auto& groups = running->copy_groups;
  while (groups.size() > pending) {
    for (const PendingCopy& copy : groups.front()) std::memcpy(copy.target, copy.source, 16);
    groups.erase(groups.begin());
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

void configure(const Device& device, const Schedule& schedule) {
  const std::lock_guard lock(one_launch);
  the_device = device;
  the_schedule = schedule;
}

const Device& device() { return the_device; }

std::string launches() {
  const std::lock_guard lock(one_launch);
  std::ostringstream text;
  for (const auto& [launched, count] : launch_counts) text << count << " " << launched << "\n";
  launch_counts.clear();
  return text.str();
}

cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  if (bytes > the_device.shared_bytes_per_block) {
    return cudaErrorInvalidValue;
  }
  allowed_shared_bytes[kernel] = bytes;
  return cudaSuccess;
}

namespace {

unsigned cluster_size_of(const cudaLaunchConfig_t& config) {
  for (unsigned index = 0; index < config.numAttrs; ++index) {
    if (config.attrs[index].id == cudaLaunchAttributeClusterDimension) return config.attrs[index].val.clusterDim.x;
  }
  return 1;
}

bool is_cooperative(const cudaLaunchConfig_t& config) {
  for (unsigned index = 0; index < config.numAttrs; ++index) {
    if (config.attrs[index].id == cudaLaunchAttributeCooperative) return config.attrs[index].val.cooperative != 0;
  }
  return false;
}

void check_limits(const cudaLaunchConfig_t& config, const void* kernel, unsigned cluster_size) {
  const auto require = [&](bool holds, const char* limit) {
    if (!holds) throw std::runtime_error(std::string("invalid launch of ") + name_of(kernel) + ": " + limit);
  };
  require(config.blockDim.x >= 1 && config.blockDim.y == 1 && config.blockDim.z == 1,
          "blocks are one-dimensional here");
  require(config.blockDim.x <= maximum_threads, "more than 1024 threads a block");
  require(config.gridDim.x >= 1 && config.gridDim.x <= 2147483647u, "grid.x is 0 or more than 2^31 - 1");
  require(config.gridDim.y == 1 && config.gridDim.z == 1, "only grid.x may carry sizes");
  const auto allowed = allowed_shared_bytes.find(kernel);
  const int most = allowed == allowed_shared_bytes.end() ? shared_bytes_without_asking
                                                         : std::max(allowed->second, shared_bytes_without_asking);
  require(config.dynamicSmemBytes <= static_cast<size_t>(most),
          "more dynamic shared memory than the kernel was allowed");
  require(cluster_size == 1 || the_device.architecture >= 90, "clusters need sm_90");
  require(cluster_size <= static_cast<unsigned>(the_device.largest_cluster), "the cluster is too large");
  require(config.gridDim.x % cluster_size == 0, "the grid is not a multiple of the cluster");
}

}  // namespace

// As if multiprocessors came in groups of 16 and a cluster lay within one group, as on an H100.
cudaError_t resident_clusters(int* clusters, const cudaLaunchConfig_t& config) {
  const int size = static_cast<int>(cluster_size_of(config));
  const int by_shared = the_device.shared_bytes_per_multiprocessor / (static_cast<int>(config.dynamicSmemBytes) + 1024);
  const int blocks = std::max(1, std::min(by_shared, 1024 / static_cast<int>(config.blockDim.x)));
  const int group = std::min(16, the_device.multiprocessors);
  *clusters = the_device.multiprocessors / group * (group * blocks / size);
  return cudaSuccess;
}

void run(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body) {
  const std::lock_guard lock(one_launch);
  const unsigned cluster_size = cluster_size_of(config);
  check_limits(config, kernel, cluster_size);
  const std::string name = name_of(kernel);
  std::ostringstream recorded;
  recorded << config.gridDim.x << " " << config.blockDim.x << " " << cluster_size << " " << config.dynamicSmemBytes << " "
           << is_cooperative(config) << " " << name;
  ++launch_counts[recorded.str()];
  if (!the_schedule.execute) return;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  launch.body = std::move(body);
  launch.dynamic_bytes = config.dynamicSmemBytes;
  launch.cluster_size = cluster_size;
  launch.variables.clear();
  launch.variables_bytes = 0;
  launch.error.clear();
  launch.random.seed(the_schedule.seed);
  run_clusters(config.gridDim.x / cluster_size);
  if (!launch.error.empty()) {
    throw std::runtime_error("cuda_sim: " + launch.error + " (in " + name + ")");
  }
}

}  // namespace simulator

// --- the part of the CUDA runtime that is asked about the device -----------------------------------------------------

extern "C" {

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const simulator::Device& device = simulator::device();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.architecture / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.architecture % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_bytes_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_bytes_per_multiprocessor;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : "refused by the simulator";
}
}
