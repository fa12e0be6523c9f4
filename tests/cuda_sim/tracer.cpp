#include "tracer.h"

#include <sys/mman.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <new>

#if !defined(FASTREG_TRACE)

namespace simulator::tracer {

void* allocate(size_t bytes, size_t) { return std::malloc(bytes); }

void release(void* address) { std::free(address); }

}  // namespace simulator::tracer

#else

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>

#include "clock.h"
#include "state.h"

namespace simulator::tracer {

namespace {

// --- what comes before what ------------------------------------------------------------------------------------------

// What a thread knows of the others. `reads`: whose reads (and arrived mail) come before its own next access; `writes`:
// whose writes it can see, which is less.
struct Knowledge {
  uint32_t time = 1;  // of the thread itself; grows when others learn of it
  Clock writes;
  Clock reads;
  Clock fenced;        // what its next atomic operations pass on
  Clock from_atomics;  // what its atomic operations have been passed, for the next fence
  bool has_fenced = false;
};

// --- who accessed what -----------------------------------------------------------------------------------------------

// Thread `index` of a block; beyond the threads come the block's mailboxes, whose times are their rounds.
struct Access {
  uint32_t block = 0;
  uint32_t index = 0;
  uint32_t time = 0;  // 0: none
  const void* place = nullptr;
};

constexpr uint32_t on_its_way = ~uint32_t{0};  // the time of a write that an asynchronous copy has still to make

struct Cell {
  Access write;
  std::vector<Access> reads;  // since the write
  unsigned launch = 0;
  bool initialised = false;
  bool atomic = false;  // the write
};

// More readers of one element than that (a weight's, a statistic's) are not kept.
constexpr size_t kept_readers = 1024;

class Shadow {
 public:
  Shadow(const void* base, size_t bytes, size_t granule)
      : base_(reinterpret_cast<uintptr_t>(base)),
        bytes_(bytes),
        granule_(granule),
        pages_(bytes / granule / page + 1) {}

  uintptr_t base() const { return base_; }
  bool contains(uintptr_t address) const { return address - base_ < bytes_; }
  bool contains(uintptr_t address, size_t bytes) const {
    return contains(address) && bytes_ - (address - base_) >= bytes;
  }

  template <class Visit>
  void visit(uintptr_t address, size_t bytes, const Visit& visit) {
    for (size_t cell = (address - base_) / granule_; cell * granule_ < address - base_ + bytes; ++cell) {
      auto& cells = pages_[cell / page];
      if (cells == nullptr) cells = std::make_unique<std::array<Cell, page> >();
      visit((*cells)[cell % page]);
    }
  }

 private:
  static constexpr size_t page = 64;
  uintptr_t base_;
  size_t bytes_;
  size_t granule_;
  std::vector<std::unique_ptr<std::array<Cell, page> > > pages_;
};

struct BlockState {
  const Block* block;
  Shadow shared;
  std::vector<Knowledge> threads;
};

struct ClusterState {
  Clock arriving_writes, arriving_reads;
  Clock writes, reads;  // of the latest phase that is complete
};

unsigned launch_number = 0;
std::unordered_map<unsigned, BlockState> block_states;
std::map<uintptr_t, BlockState*> by_shared_memory;
std::unordered_map<const Cluster*, ClusterState> cluster_states;
std::unordered_map<uintptr_t, Clock> passed_on;  // by atomic operations, by address
std::map<uintptr_t, Shadow> tensors;

// Addresses of tensors, a gigabyte apart, and never used twice.
constexpr size_t arena_bytes = size_t{1} << 44;
constexpr size_t distance = size_t{1} << 30;
uintptr_t arena = 0;
uintptr_t arena_used = 0;

Knowledge& knowledge_of(const Thread& thread) { return block_states.at(thread.block->linear).threads[thread.linear]; }

// --- reports ---------------------------------------------------------------------------------------------------------

// "file:line" of the kernel's source.
std::string source_of(const void* place) {
  Dl_info info{};
  if (place == nullptr || dladdr(place, &info) == 0) return "an unknown place";
  char command[512];
  std::snprintf(command, sizeof(command), "addr2line -e '%s' -s -i 0x%zx 2>/dev/null", info.dli_fname,
                reinterpret_cast<uintptr_t>(place) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1);
  std::string found = "an unknown place";
  if (FILE* output = popen(command, "r")) {
    char line[512];
    while (std::fgets(line, sizeof(line), output) != nullptr) {
      found.assign(line, std::strcspn(line, "\n"));
      if (found.find("device_simulator") == std::string::npos) break;
    }
    pclose(output);
  }
  return found.substr(0, found.find(" (discriminator"));
}

std::string describe(const Access& access) {
  const bool mail = access.index >= launch.threads;
  return (mail ? "mail to block " + std::to_string(access.block)
               : "thread " + std::to_string(access.index) + " of block " + std::to_string(access.block)) +
         " at " + source_of(access.place);
}

[[noreturn]] void report_race(const char* now, const Access& access, const char* before, const Access& other) {
  fail(std::string("race: ") + now + " by " + describe(access) + " and " + before + " by " + describe(other) +
       ", with nothing that orders them");
}

// --- the check -------------------------------------------------------------------------------------------------------

bool same_thread(const Access& left, const Access& right) {
  return left.block == right.block && left.index == right.index;
}

void refresh(Cell& cell) {
  if (cell.launch == launch_number) return;
  cell.launch = launch_number;
  cell.write = {};
  cell.reads.clear();
  cell.atomic = false;
}

// `by`: whose knowledge decides, which for mail is the sender's.
void check_write(Cell& cell, const Access& access, const Knowledge& by, const Access& self, bool atomic) {
  refresh(cell);
  const Access& previous = cell.write;
  if (previous.time == on_its_way) report_race("a write", access, "an asynchronous copy, not waited for,", previous);
  if (previous.time != 0 && !same_thread(previous, self) && !(atomic && cell.atomic)) {
    const Clock& known = previous.index >= launch.threads ? by.reads : by.writes;
    if (!known.knows(previous.block, previous.index, previous.time))
      report_race("a write", access, "a write", previous);
  }
  for (const Access& read : cell.reads) {
    if (!same_thread(read, self) && !by.reads.knows(read.block, read.index, read.time)) {
      report_race("a write", access, "a read", read);
    }
  }
  cell.write = access;
  cell.atomic = atomic;
  cell.initialised = true;
  cell.reads.clear();
}

void check_read(Cell& cell, const Access& access, const Knowledge& by) {
  refresh(cell);
  const Access& write = cell.write;
  if (write.time == on_its_way) report_race("a read", access, "an asynchronous copy, not waited for,", write);
  if (!cell.initialised) {
    fail("a read of memory that nobody has written, by " + describe(access));
  }
  if (write.time != 0 && !same_thread(write, access) && !by.writes.knows(write.block, write.index, write.time)) {
    report_race("a read", access, "a write", write);
  }
  for (Access& read : cell.reads) {
    if (same_thread(read, access)) {
      read = access;
      return;
    }
  }
  if (cell.reads.size() < kept_readers) cell.reads.push_back(access);
}

// The shadow of an address that a kernel uses; none for memory that is not the simulated device's.
Shadow* shadow_of(uintptr_t address, size_t bytes, const Access& access) {
  const auto outside = [&](const std::string& what) {
    fail("an access outside " + what + ", " + std::to_string(bytes) + " bytes by " + describe(access));
  };
  const auto of_block = [&](BlockState& state) {
    const size_t offset = address - state.shared.base();
    const bool in_static = offset + bytes <= launch.variables_bytes;
    if (!in_static && (offset < static_shared_bytes || !state.shared.contains(address, bytes))) {
      outside("the block's shared memory");
    }
    return &state.shared;
  };
  BlockState& own = block_states.at(running->block->linear);
  // The bytes up to the next allocation also belong to it, so that an access beyond the end is seen.
  constexpr size_t beyond = 64;
  const auto near = [&](const BlockState& state) {
    return address - state.shared.base() < static_shared_bytes + launch.dynamic_bytes + beyond;
  };
  if (near(own)) return of_block(own);
  if (address - arena < arena_bytes) {
    auto found = tensors.upper_bound(address);
    if (found == tensors.begin() || !(--found)->second.contains(address, bytes)) outside("every tensor");
    return &found->second;
  }
  auto found = by_shared_memory.upper_bound(address);
  if (found == by_shared_memory.begin() || !near(*(--found)->second)) return nullptr;
  BlockState& other = *found->second;
  if (other.block->cluster != running->block->cluster) {
    outside("the shared memory of the block's cluster");
  }
  return of_block(other);
}

void access(const void* pointer, size_t bytes, bool write, const void* place) {
  if (running == nullptr) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - reinterpret_cast<uintptr_t>(running->stack) < stack_bytes) return;
  const Access self{running->block->linear, running->linear, 0, place};
  Shadow* shadow = shadow_of(address, bytes, self);
  if (shadow == nullptr) return;
  const Knowledge& knowledge = knowledge_of(*running);
  const Access timed{self.block, self.index, knowledge.time, place};
  shadow->visit(address, bytes, [&](Cell& cell) {
    write ? check_write(cell, timed, knowledge, timed, false) : check_read(cell, timed, knowledge);
  });
}

}  // namespace

// --- memory ----------------------------------------------------------------------------------------------------------

void* allocate(size_t bytes, size_t element_bytes) {
  if (arena == 0) {
    void* memory =
        mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    arena = arena_used = reinterpret_cast<uintptr_t>(memory);
  }
  arena_used += distance;
  if (arena_used + bytes > arena + arena_bytes) throw std::bad_alloc();
  void* address = reinterpret_cast<void*>(arena_used);
  tensors.emplace(arena_used, Shadow(address, bytes, element_bytes));
  arena_used += bytes / distance * distance;
  return address;
}

void release(void* address) {
  const auto found = tensors.find(reinterpret_cast<uintptr_t>(address));
  if (found == tensors.end()) return;
  tensors.erase(found);
  madvise(address, distance, MADV_DONTNEED);
}

void initialised(const void* address, size_t bytes) {
  auto found = tensors.upper_bound(reinterpret_cast<uintptr_t>(address));
  if (found == tensors.begin()) return;
  (--found)->second.visit(reinterpret_cast<uintptr_t>(address), bytes, [](Cell& cell) { cell.initialised = true; });
}

// --- what happens ----------------------------------------------------------------------------------------------------

void launch_starts() {
  ++launch_number;
  block_states.clear();
  by_shared_memory.clear();
  cluster_states.clear();
  passed_on.clear();
}

void block_starts(Block& block, size_t shared_bytes) {
  BlockState state{&block, Shadow(block.shared, shared_bytes, 1), std::vector<Knowledge>(block.threads.size())};
  auto [entry, inserted] = block_states.emplace(block.linear, std::move(state));
  by_shared_memory.emplace(reinterpret_cast<uintptr_t>(block.shared), &entry->second);
}

void block_ends(const Block& block) {
  const Shadow& shared = block_states.at(block.linear).shared;
  std::erase_if(passed_on, [&](const auto& entry) { return shared.contains(entry.first); });
  by_shared_memory.erase(reinterpret_cast<uintptr_t>(block.shared));
  block_states.erase(block.linear);
}

void writes_become_visible(const std::vector<Thread*>& together) {
  Clock writes;
  Clock reads;
  for (const Thread* thread : together) {
    const Knowledge& knowledge = knowledge_of(*thread);
    writes.join(knowledge.writes);
    reads.join(knowledge.reads);
  }
  for (const Thread* thread : together) writes.set(thread->block->linear, thread->linear, knowledge_of(*thread).time);
  reads.join(writes);
  for (const Thread* thread : together) {
    Knowledge& knowledge = knowledge_of(*thread);
    knowledge.writes = writes;
    knowledge.reads = reads;
    ++knowledge.time;
  }
}

void reads_are_complete(const std::vector<Thread*>& together) {
  Clock reads;
  for (const Thread* thread : together) reads.join(knowledge_of(*thread).reads);
  for (const Thread* thread : together) reads.set(thread->block->linear, thread->linear, knowledge_of(*thread).time);
  for (const Thread* thread : together) {
    Knowledge& knowledge = knowledge_of(*thread);
    knowledge.reads = reads;
    ++knowledge.time;
  }
}

void arrives_at_cluster(Thread& thread, bool releases) {
  Knowledge& knowledge = knowledge_of(thread);
  ClusterState& state = cluster_states[thread.block->cluster];
  const auto arrive = [&](Clock& clock, const Clock& known) {
    clock.join(known);
    clock.set(thread.block->linear, thread.linear, knowledge.time);
  };
  arrive(state.arriving_reads, knowledge.reads);
  if (releases) arrive(state.arriving_writes, knowledge.writes);
  ++knowledge.time;
}

void cluster_is_complete(Cluster& cluster) {
  ClusterState& state = cluster_states[&cluster];
  state.writes = std::exchange(state.arriving_writes, {});
  state.reads = std::exchange(state.arriving_reads, {});
}

void passes_cluster_barrier(Thread& thread) {
  Knowledge& knowledge = knowledge_of(thread);
  const ClusterState& state = cluster_states[thread.block->cluster];
  knowledge.writes.join(state.writes);
  knowledge.reads.join(state.reads);
}

void mail_is_sent(Thread& sender, const Block& target, const Mailbox& mailbox, void* slot, size_t bytes,
                  const void* place) {
  Knowledge& knowledge = knowledge_of(sender);
  const Access self{sender.block->linear, sender.linear, knowledge.time, place};
  const Access mail{target.linear, launch.threads + mailbox.index, mailbox.round + 1, place};
  block_states.at(target.linear).shared.visit(reinterpret_cast<uintptr_t>(slot), bytes, [&](Cell& cell) {
    check_write(cell, mail, knowledge, self, false);
  });
  // The round that the mail belongs to tells who receives it that the sender's earlier reads are done.
  Clock& carried = passed_on[reinterpret_cast<uintptr_t>(&mailbox)];
  carried.join(knowledge.reads);
  carried.set(self.block, self.index, knowledge.time);
  ++knowledge.time;
}

void mail_is_received(Thread& thread, const Mailbox& mailbox) {
  Knowledge& knowledge = knowledge_of(thread);
  knowledge.reads.join(passed_on[reinterpret_cast<uintptr_t>(&mailbox)]);
  for (Clock* clock : {&knowledge.writes, &knowledge.reads}) {
    clock->set(thread.block->linear, launch.threads + mailbox.index, mailbox.round);
  }
}

void copy_starts(void* target, const void* source, size_t bytes, const void* place) {
  access(source, bytes, false, place);
  const Knowledge& knowledge = knowledge_of(*running);
  const Access self{running->block->linear, running->linear, knowledge.time, place};
  Shadow* shadow = shadow_of(reinterpret_cast<uintptr_t>(target), bytes, self);
  if (shadow == nullptr) fail("an asynchronous copy to memory that is not shared, by " + describe(self));
  shadow->visit(reinterpret_cast<uintptr_t>(target), bytes, [&](Cell& cell) {
    check_write(cell, self, knowledge, self, false);
    cell.write.time = on_its_way;
  });
}

void copy_arrives(void* target, size_t bytes, const void* place) {
  const Knowledge& knowledge = knowledge_of(*running);
  const Access self{running->block->linear, running->linear, knowledge.time, place};
  Shadow* shadow = shadow_of(reinterpret_cast<uintptr_t>(target), bytes, self);
  shadow->visit(reinterpret_cast<uintptr_t>(target), bytes, [&](Cell& cell) { cell.write = self; });
}

void fence(Thread& thread) {
  Knowledge& knowledge = knowledge_of(thread);
  knowledge.writes.join(knowledge.from_atomics);
  knowledge.reads.join(knowledge.from_atomics);
  knowledge.fenced = knowledge.writes;
  knowledge.fenced.set(thread.block->linear, thread.linear, knowledge.time);
  knowledge.has_fenced = true;
  ++knowledge.time;
}

void atomic_access(const void* address, size_t bytes, const void* place) {
  Knowledge& knowledge = knowledge_of(*running);
  const Access self{running->block->linear, running->linear, knowledge.time, place};
  Shadow* shadow = shadow_of(reinterpret_cast<uintptr_t>(address), bytes, self);
  if (shadow == nullptr) return;
  shadow->visit(reinterpret_cast<uintptr_t>(address), bytes, [&](Cell& cell) {
    if (!cell.initialised) fail("an atomic operation on memory that nobody has written, by " + describe(self));
    check_write(cell, self, knowledge, self, true);
  });
  Clock& carried = passed_on[reinterpret_cast<uintptr_t>(address)];
  if (knowledge.has_fenced) carried.join(knowledge.fenced);
  knowledge.from_atomics.join(carried);
}

}  // namespace simulator::tracer

// --- what the compiler calls -----------------------------------------------------------------------------------------

#define FASTREG_ACCESS(name, bytes, write) \
  void name(void* address) { simulator::tracer::access(address, bytes, write, __builtin_return_address(0)); }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

FASTREG_ACCESS(__tsan_read1, 1, false)
FASTREG_ACCESS(__tsan_read2, 2, false)
FASTREG_ACCESS(__tsan_read4, 4, false)
FASTREG_ACCESS(__tsan_read8, 8, false)
FASTREG_ACCESS(__tsan_read16, 16, false)
FASTREG_ACCESS(__tsan_write1, 1, true)
FASTREG_ACCESS(__tsan_write2, 2, true)
FASTREG_ACCESS(__tsan_write4, 4, true)
FASTREG_ACCESS(__tsan_write8, 8, true)
FASTREG_ACCESS(__tsan_write16, 16, true)

void __tsan_read_range(void* address, size_t bytes) {
  simulator::tracer::access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  simulator::tracer::access(address, bytes, true, __builtin_return_address(0));
}
}

#endif
