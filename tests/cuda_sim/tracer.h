// Checks every access to memory that a kernel makes, whatever the schedule.
//
// With FASTREG_TRACE the compiler puts a call before each load and store of the kernels (-fsanitize=thread; the
// functions it calls are ours, in tracer.cpp). Each byte of shared memory and each element of a tensor remembers who
// wrote it last and who has read it since, and each thread knows which accesses of others come before its own: those
// that a barrier, a fence with an atomic operation, or a mailbox has put there. An error is
//
//   - two accesses, one of them a write, that nothing orders, in one block or between blocks;
//   - a read of memory that nobody has written, or that an asynchronous copy has not reached yet;
//   - an access outside every tensor and outside the shared memory of the block and its cluster.
//
// Warp shuffles and votes, relaxed cluster barriers and mailboxes make no write visible, as in the memory model of PTX;
// they do prove that the reads before them are done, so that others may write there.
//
// Without FASTREG_TRACE all of this is empty.

#pragma once

#include <cstddef>
#include <vector>

namespace simulator {

struct Thread;
struct Block;
struct Cluster;
struct Mailbox;

namespace tracer {

#if defined(FASTREG_TRACE)

// --- memory ----------------------------------------------------------------------------------------------------------

// Device memory, far from everything else, so that an access beyond its end is seen. An element is what two threads may
// write side by side.
void* allocate(size_t bytes, size_t element_bytes);
void release(void* address);
// By the host.
void initialised(const void* address, size_t bytes);

// --- what happens ----------------------------------------------------------------------------------------------------

void launch_starts();
void block_starts(Block& block, size_t shared_bytes);
void block_ends(const Block& block);

void writes_become_visible(const std::vector<Thread*>& together);
void reads_are_complete(const std::vector<Thread*>& together);

void arrives_at_cluster(Thread& thread, bool releases);
void cluster_is_complete(Cluster& cluster);
void passes_cluster_barrier(Thread& thread);

void mail_is_sent(Thread& sender, const Block& target, const Mailbox& mailbox, void* slot, size_t bytes,
                  const void* place);
void mail_is_received(Thread& thread, const Mailbox& mailbox);

void copy_starts(void* target, const void* source, size_t bytes, const void* place);
void copy_arrives(void* target, size_t bytes, const void* place);

void fence(Thread& thread);
void atomic_access(const void* address, size_t bytes, const void* place);

#else

void* allocate(size_t bytes, size_t element_bytes);
void release(void* address);
inline void initialised(const void*, size_t) {}
inline void launch_starts() {}
inline void block_starts(Block&, size_t) {}
inline void block_ends(const Block&) {}
inline void writes_become_visible(const std::vector<Thread*>&) {}
inline void reads_are_complete(const std::vector<Thread*>&) {}
inline void arrives_at_cluster(Thread&, bool) {}
inline void cluster_is_complete(Cluster&) {}
inline void passes_cluster_barrier(Thread&) {}
inline void mail_is_sent(Thread&, const Block&, const Mailbox&, void*, size_t, const void*) {}
inline void mail_is_received(Thread&, const Mailbox&) {}
inline void copy_starts(void*, const void*, size_t, const void*) {}
inline void copy_arrives(void*, size_t, const void*) {}
inline void fence(Thread&) {}
inline void atomic_access(const void*, size_t, const void*) {}

#endif

}  // namespace tracer
}  // namespace simulator
