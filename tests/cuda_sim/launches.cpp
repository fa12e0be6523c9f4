// How the simulated device takes launches: what it refuses, what it records; and the CUDA runtime that is asked for it.

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <stdexcept>

#include "state.h"
#include "tracer.h"

namespace simulator {

namespace {

constexpr unsigned maximum_threads = 1024;
constexpr unsigned maximum_threads_z = 64;
constexpr unsigned maximum_grid_x = 2147483647;
constexpr unsigned maximum_grid_y_and_z = 65535;
constexpr int shared_bytes_of_the_system = 1024;  // a block

std::map<const void*, int> allowed_shared_bytes;  // by kernel
std::map<std::string, int> launch_counts;         // by what launches() says of them
std::string refusal;                              // why the latest launch was refused

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

const cudaLaunchAttributeValue* attribute(const cudaLaunchConfig_t& config, cudaLaunchAttributeID id) {
  for (unsigned index = 0; index < config.numAttrs; ++index) {
    if (config.attrs[index].id == id) return &config.attrs[index].val;
  }
  return nullptr;
}

dim3 cluster_of(const cudaLaunchConfig_t& config) {
  const auto* value = attribute(config, cudaLaunchAttributeClusterDimension);
  return value == nullptr ? dim3(1, 1, 1) : dim3(value->clusterDim.x, value->clusterDim.y, value->clusterDim.z);
}

bool is_cooperative(const cudaLaunchConfig_t& config) {
  const auto* value = attribute(config, cudaLaunchAttributeCooperative);
  return value != nullptr && value->cooperative != 0;
}

unsigned product(const dim3& extents) { return extents.x * extents.y * extents.z; }

// What the device would refuse, as CUDA's error code, with the limit in words in `refusal`.
cudaError_t check_limits(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3& grid = config.gridDim;
  const dim3& block = config.blockDim;
  const dim3 cluster = cluster_of(config);
  cudaError_t error = cudaSuccess;
  const auto require = [&](bool holds, const char* limit, cudaError_t code = cudaErrorInvalidConfiguration) {
    if (!holds && error == cudaSuccess) {
      refusal = limit;
      error = code;
    }
  };
  require(grid.x >= 1 && grid.y >= 1 && grid.z >= 1, "the grid is empty");
  require(grid.x <= maximum_grid_x, "grid.x is more than 2^31 - 1");
  require(grid.y <= maximum_grid_y_and_z && grid.z <= maximum_grid_y_and_z, "grid.y or grid.z is more than 65535");
  require(block.x >= 1 && block.y >= 1 && block.z >= 1, "the block is empty");
  require(block.x <= maximum_threads && block.y <= maximum_threads && block.z <= maximum_threads_z,
          "the block is longer than 1024 in x or y, or than 64 in z");
  require(uint64_t{block.x} * block.y * block.z <= maximum_threads, "more than 1024 threads a block");
  const auto allowed = allowed_shared_bytes.find(kernel);
  const int most = allowed == allowed_shared_bytes.end() ? shared_bytes_without_asking
                                                         : std::max(allowed->second, shared_bytes_without_asking);
  require(config.dynamicSmemBytes <= static_cast<size_t>(most),
          "more dynamic shared memory than the kernel was allowed", cudaErrorInvalidValue);
  require(product(cluster) == 1 || the_device.architecture >= 90, "clusters need sm_90");
  require(product(cluster) <= static_cast<unsigned>(the_device.largest_cluster), "the cluster is too large",
          cudaErrorInvalidClusterSize);
  require(cluster.y == 1 && cluster.z == 1, "the simulator has clusters in x only");
  require(grid.x % cluster.x == 0, "the grid is not a multiple of the cluster");
  if (error == cudaSuccess && is_cooperative(config)) {
    const int resident = resident_blocks_per_multiprocessor(static_cast<int>(product(block)), config.dynamicSmemBytes);
    require(uint64_t{grid.x} * grid.y * grid.z <= static_cast<uint64_t>(resident) * the_device.multiprocessors,
            "more blocks in a cooperative launch than run at once", cudaErrorCooperativeLaunchTooLarge);
  }
  return error;
}

}  // namespace

// --- the device ------------------------------------------------------------------------------------------------------

Device device_of(int architecture, int multiprocessors) {
  const int kilobytes = architecture >= 120 ? 100 : architecture >= 90 ? 228 : 164;
  return {architecture, multiprocessors, (kilobytes - 1) * 1024, kilobytes * 1024, architecture >= 90 ? 8 : 1};
}

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

int resident_blocks_per_multiprocessor(int threads, size_t dynamic_shared_bytes) {
  const int most_threads = the_device.architecture >= 120 ? 1536 : 2048;
  const int by_shared = the_device.shared_bytes_per_multiprocessor /
                        (static_cast<int>(dynamic_shared_bytes) + shared_bytes_of_the_system);
  return std::min({by_shared, most_threads / ((threads + 31) / 32 * 32), 32});
}

// As if multiprocessors came in groups of 16 and a cluster lay within one group, as on an H100. Kernels of ours that
// ask are compiled for 128 registers a thread, which leaves room for 512 threads.
cudaError_t resident_clusters(int* clusters, const cudaLaunchConfig_t& config) {
  const int size = static_cast<int>(product(cluster_of(config)));
  const int threads = static_cast<int>(product(config.blockDim));
  const int by_shared = resident_blocks_per_multiprocessor(threads, config.dynamicSmemBytes);
  const int blocks = std::max(1, std::min(by_shared, 1024 / threads));
  const int group = std::min(16, the_device.multiprocessors);
  *clusters = the_device.multiprocessors / group * (group * blocks / size);
  return cudaSuccess;
}

// --- launches --------------------------------------------------------------------------------------------------------

cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  if (bytes > the_device.shared_bytes_per_block) {
    refusal = "more shared memory than a block may have";
    return cudaErrorInvalidValue;
  }
  allowed_shared_bytes[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body) {
  const std::lock_guard lock(one_launch);
  const cudaError_t error = check_limits(config, kernel);
  if (error != cudaSuccess) {
    return error;
  }
  const std::string name = name_of(kernel);
  launch.blocks = product(config.gridDim);
  launch.threads = product(config.blockDim);
  launch.cluster_size = product(cluster_of(config));
  launch.cooperative = is_cooperative(config);
  std::ostringstream recorded;
  recorded << launch.blocks << " " << launch.threads << " " << launch.cluster_size << " " << config.dynamicSmemBytes
           << " " << launch.cooperative << " " << name;
  ++launch_counts[recorded.str()];
  if (!the_schedule.execute) return cudaSuccess;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  launch.body = std::move(body);
  launch.dynamic_bytes = config.dynamicSmemBytes;
  launch.asked_for_shared_bytes = allowed_shared_bytes.contains(kernel);
  launch.variables.clear();
  launch.variables_bytes = 0;
  launch.at_grid_barrier.clear();
  launch.at_counter.clear();
  launch.exited = 0;
  launch.error.clear();
  launch.random.seed(the_schedule.seed);
  tracer::launch_starts();
  run_clusters();
  if (!launch.error.empty()) {
    throw std::runtime_error("cuda_sim: " + launch.error + " (in " + name + ")");
  }
  return cudaSuccess;
}

}  // namespace simulator

// --- the part of the CUDA runtime that the host asks -----------------------------------------------------------------

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

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMalloc(void** address, size_t bytes) {
  *address = simulator::tracer::allocate(bytes, 1);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  simulator::tracer::release(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
  if (kind == cudaMemcpyHostToDevice) simulator::tracer::initialised(target, bytes);
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    default:
      return "an error that the simulator does not give";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : simulator::refusal.c_str();
}
}
