// What simulated threads do together: barriers, warp operations, clusters, mailboxes, asynchronous copies.

#include <algorithm>
#include <cstring>

#include "state.h"
#include "tracer.h"

namespace simulator {

// --- barriers and warps ----------------------------------------------------------------------------------------------

int block_barrier(int predicate, Site site) {
  Thread& thread = *running;
  Block& block = *thread.block;
  if (block.exited > 0) {
    fail("divergent barrier: " + describe(thread) + " reached " + describe(site) +
         ", but threads of its block have ended");
  }
  if (block.at_barrier.empty()) {
    block.barrier_site = site;
    block.barrier_votes = 0;
  } else if (!(block.barrier_site == site)) {
    fail("divergent barrier: " + describe(thread) + " reached " + describe(site) + " while others wait at " +
         describe(block.barrier_site));
  }
  block.barrier_votes += predicate != 0;
  block.at_barrier.push_back(&thread);
  if (block.at_barrier.size() == block.threads.size()) {
    std::vector<Thread*> released;
    released.swap(block.at_barrier);
    for (Thread* other : released) other->received_votes = block.barrier_votes;
    tracer::writes_become_visible(released);
    make_ready(released);
  }
  wait_for_others();
  return thread.received_votes;
}

Lanes meet(uint32_t mask, uint64_t value, bool orders_memory, Site site) {
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
  // Lanes may wait with another mask elsewhere; with the same one they must come here.
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(),
                              [&](const Meeting& candidate) { return candidate.lanes->mask == mask; });
  if (meeting == warp.meetings.end()) {
    warp.meetings.push_back(Meeting{site, orders_memory, 0, std::make_shared<Lanes>(Lanes{mask, {}})});
    meeting = warp.meetings.end() - 1;
  }
  if (meeting->orders_memory != orders_memory || !(meeting->site == site)) {
    fail("divergent warp: " + describe(thread) + " reached " + describe(site) + " while lanes of its warp wait at " +
         describe(meeting->site));
  }
  meeting->arrived |= 1u << thread.lane();
  meeting->lanes->values[thread.lane()] = value;
  if (meeting->arrived == mask) {
    std::vector<Thread*> released;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if ((mask >> lane & 1u) == 0) continue;
      Thread* other = block.threads[first + lane];
      other->received = meeting->lanes;
      released.push_back(other);
    }
    warp.meetings.erase(meeting);
    orders_memory ? tracer::writes_become_visible(released) : tracer::reads_are_complete(released);
    make_ready(released);
  }
  wait_for_others();
  return *std::exchange(thread.received, nullptr);
}

void grid_barrier(Site site) {
  if (!launch.cooperative) {
    fail("grid barrier: " + describe(*running) + " reached " + describe(site) + " in a launch that is not cooperative");
  }
  if (launch.exited > 0) {
    fail("divergent barrier: " + describe(*running) + " reached " + describe(site) +
         ", but threads of the grid have ended");
  }
  if (launch.at_grid_barrier.empty()) {
    launch.grid_barrier_site = site;
  } else if (!(launch.grid_barrier_site == site)) {
    fail("divergent barrier: " + describe(*running) + " reached " + describe(site) + " while others wait at " +
         describe(launch.grid_barrier_site));
  }
  launch.at_grid_barrier.push_back(running);
  if (launch.at_grid_barrier.size() == static_cast<size_t>(launch.blocks) * launch.threads) {
    std::vector<Thread*> released;
    released.swap(launch.at_grid_barrier);
    tracer::writes_become_visible(released);
    make_ready(released);
  }
  wait_for_others();
}

void counter_arrive(unsigned* counter) {
  tracer::fence(*running);
  tracer::atomic_access(counter, sizeof(*counter), __builtin_return_address(0));
  ++*counter;
  std::vector<Thread*> released;
  for (const auto& [waited_for, thread] : launch.at_counter) {
    if (waited_for == counter) released.push_back(thread);
  }
  std::erase_if(launch.at_counter, [&](const auto& waiting) { return waiting.first == counter; });
  make_ready(released);
}

void counter_wait(unsigned* counter, unsigned target) {
  if (!launch.cooperative) {
    fail("a counter is waited for by " + describe(*running) + " in a launch that is not cooperative");
  }
  while (static_cast<int>(*counter - target) < 0) {
    launch.at_counter.emplace_back(counter, running);
    wait_for_others();
  }
  tracer::atomic_access(counter, sizeof(*counter), __builtin_return_address(0));
  tracer::fence(*running);
}

// --- clusters --------------------------------------------------------------------------------------------------------

void cluster_arrive(bool releases) {
  Cluster& cluster = *running->block->cluster;
  if (running->arrived_at_phase == cluster.phase) {
    fail("cluster barrier: " + describe(*running) + " arrived twice without waiting");
  }
  if (cluster.exited > 0) {
    fail("divergent barrier: " + describe(*running) +
         " reached a cluster barrier, but threads of its cluster have ended");
  }
  running->arrived_at_phase = cluster.phase;
  tracer::arrives_at_cluster(*running, releases);
  if (++cluster.arrived == cluster.blocks.size() * launch.threads) {
    cluster.arrived = 0;
    ++cluster.phase;
    tracer::cluster_is_complete(cluster);
    std::vector<Thread*> released;
    released.swap(cluster.waiting);
    make_ready(released);
  }
}

void cluster_wait() {
  Thread& thread = *running;
  Cluster& cluster = *thread.block->cluster;
  if (thread.arrived_at_phase == ~uint64_t{0}) {
    fail("cluster barrier: " + describe(thread) + " waits without having arrived");
  }
  const bool complete = cluster.phase > thread.arrived_at_phase;
  thread.phases_passed = thread.arrived_at_phase + 1;
  thread.arrived_at_phase = ~uint64_t{0};
  if (!complete) {
    cluster.waiting.push_back(&thread);
    wait_for_others();
  }
  tracer::passes_cluster_barrier(thread);
}

unsigned cluster_blocks() { return static_cast<unsigned>(running->block->cluster->blocks.size()); }

namespace {

Block& block_of_rank(unsigned rank) {
  Block& block = *running->block;
  if (rank >= block.cluster->blocks.size()) {
    fail("rank " + std::to_string(rank) + " is outside the cluster");
  }
  Block& target = *block.cluster->blocks[rank];
  if (!target.started) {
    fail("access to the shared memory of block " + std::to_string(target.linear) + ", which has not started");
  }
  if (target.exited == target.threads.size()) {
    fail("access to the shared memory of block " + std::to_string(target.linear) + ", which has ended");
  }
  return target;
}

void* in_block(const Block& target, const void* own) {
  return target.shared + (static_cast<const unsigned char*>(own) - running->block->shared);
}

}  // namespace

void* in_block_of_rank(const void* own, unsigned rank) { return in_block(block_of_rank(rank), own); }

// --- mailboxes -------------------------------------------------------------------------------------------------------

namespace {

constexpr uint64_t mark_of_an_open_mailbox = 0x6f70656e6d61696c;
constexpr uint64_t never = ~uint64_t{0};

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

void mailbox_open(Mailbox* mailbox) {
  auto& mailboxes = running->block->mailboxes;
  *mailbox = {mark_of_an_open_mailbox, 0, 0, 0, never, static_cast<uint32_t>(mailboxes.size())};
  mailboxes.push_back(mailbox);
}

void mailboxes_publish() {
  const Block& block = *running->block;
  for (Mailbox* mailbox : block.mailboxes) mailbox->published_at_phase = block.cluster->phase;
}

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
  Block& target = block_of_rank(rank);
  Mailbox* remote = static_cast<Mailbox*>(in_block(target, mailbox));
  require_open(remote);
  if (remote->published_at_phase >= running->phases_passed) {
    fail("a mailbox of block " + std::to_string(target.linear) + " is used from " + describe(*running) +
         " before the cluster knows that it is open: a fence or a cluster barrier is missing");
  }
  void* remote_slot = in_block(target, slot);
  tracer::mail_is_sent(*running, target, *remote, remote_slot, sizeof(value), __builtin_return_address(0));
  std::memcpy(remote_slot, &value, sizeof(value));
  remote->missing_bytes -= static_cast<int64_t>(sizeof(value));
  end_round_if_complete(target, remote);
}

void mailbox_wait(Mailbox* mailbox, unsigned parity) {
  require_open(mailbox);
  Thread& thread = *running;
  while (mailbox->round % 2 == parity) {
    thread.block->at_mailbox.emplace_back(mailbox, &thread);
    wait_for_others();
  }
  tracer::mail_is_received(thread, *mailbox);
}

void atomic_access(const void* address, size_t bytes) {
  check_aligned(address, bytes);
  tracer::atomic_access(address, bytes, __builtin_return_address(0));
}

void fence() { tracer::fence(*running); }

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
  if (!launch.asked_for_shared_bytes && launch.variables_bytes + launch.dynamic_bytes > shared_bytes_without_asking) {
    fail("static and dynamic shared memory are more than 48 KB, and the kernel was not allowed that");
  }
  return running->block->shared + offset;
}

unsigned char* dynamic_shared() { return running->block->shared + static_shared_bytes; }

// The bytes move at once or when they are waited for: code that reads too early, or has not read what they replace,
// gets other bytes in one of the schedules.
void copy_async(void* target, const void* source, size_t bytes) {
  check_aligned(target, bytes);
  check_aligned(source, bytes);
  const bool at_once = the_schedule.order == Order::last_in_first_out ||
                       (the_schedule.order == Order::random && launch.random() % 2 == 0);
  const void* place = __builtin_return_address(0);
  tracer::copy_starts(target, source, bytes, place);
  if (at_once) std::memcpy(target, source, bytes);
  running->open_group.push_back({target, source, bytes, place, at_once});
}

void copy_async_commit() {
  running->copy_groups.push_back(std::move(running->open_group));
  running->open_group.clear();
}

void copy_async_wait(size_t pending) {
  auto& groups = running->copy_groups;
  while (groups.size() > pending) {
    for (const PendingCopy& copy : groups.front()) {
      if (!copy.moved) std::memcpy(copy.target, copy.source, copy.bytes);
      tracer::copy_arrives(copy.target, copy.bytes, copy.place);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace simulator
