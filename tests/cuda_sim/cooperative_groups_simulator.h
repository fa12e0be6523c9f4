// What kernels use of CUDA's cooperative_groups: the grid, the cluster and the block as groups.

#pragma once

namespace cooperative_groups {

struct grid_group {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    simulator::grid_barrier({file, line});
  }
  unsigned long long num_blocks() const { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
  unsigned long long block_rank() const { return simulator::running->block->linear; }
};

struct cluster_group {
  void sync() const {
    barrier_arrive();
    barrier_wait();
  }
  void barrier_arrive() const { simulator::cluster_arrive(true); }
  void barrier_wait() const { simulator::cluster_wait(); }
  unsigned block_rank() const { return simulator::running->block->rank; }
  unsigned num_blocks() const { return simulator::cluster_blocks(); }
  template <class Value>
  Value* map_shared_rank(Value* address, int rank) const {
    return static_cast<Value*>(simulator::in_block_of_rank(address, static_cast<unsigned>(rank)));
  }
};

struct thread_block {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    simulator::block_barrier(0, {file, line});
  }
  unsigned thread_rank() const { return simulator::running->linear; }
  unsigned size() const { return blockDim.x * blockDim.y * blockDim.z; }
};

inline grid_group this_grid() { return {}; }
inline cluster_group this_cluster() { return {}; }
inline thread_block this_thread_block() { return {}; }

}  // namespace cooperative_groups
