// What the parts of the simulator share: the launch under way and its scheduler.

#pragma once

#include <deque>
#include <mutex>
#include <random>

#include "simulator.h"

namespace simulator {

inline constexpr int shared_bytes_without_asking = 48 * 1024;  // of a block, static and dynamic
inline constexpr size_t static_shared_bytes = 16 * 1024;  // room for static variables, more than any kernel has

// What is under way; one launch at a time.
struct Launch {
  std::function<void()> body;
  size_t dynamic_bytes = 0;
  bool asked_for_shared_bytes = false;  // cudaFuncAttributeMaxDynamicSharedMemorySize, for this kernel
  unsigned threads = 0;  // a block
  unsigned cluster_size = 1;
  unsigned blocks = 0;
  bool cooperative = false;
  std::vector<std::pair<const void*, size_t>> variables;  // static shared memory: key, offset
  size_t variables_bytes = 0;
  std::vector<std::unique_ptr<Cluster>> clusters;  // under way
  std::deque<Thread*> ready;
  std::vector<Thread*> at_grid_barrier;
  Site grid_barrier_site{};
  std::vector<std::pair<const unsigned*, Thread*>> at_counter;
  unsigned exited = 0;
  std::string error;
  std::mt19937_64 random;
};

extern Launch launch;
extern Device the_device;
extern Schedule the_schedule;
extern std::mutex one_launch;

std::string describe(Site site);
std::string describe(const Thread& thread);

void make_ready(const std::vector<Thread*>& threads);
void wait_for_others();

// Runs all clusters of the launch, or those before the first error, which is in launch.error then.
void run_clusters();

}  // namespace simulator
