// The one way a kernel is launched, and what is asked of the device before.
//
// Every kernel takes one struct by value. Only grid.x is used, so no extent of a tensor meets the limits of grid.y and
// z.

#pragma once

#include "device.cuh"
#include "layer_norm_plan.h"

namespace fastreg::cuda {

struct Launch {
  int64_t blocks;
  int threads;
  int cluster;       // blocks a cluster; 1: none
  int shared_bytes;  // dynamic
  bool cooperative;  // all blocks run at once, so that they may wait for each other
  cudaStream_t stream;
};

inline constexpr int64_t maximum_blocks = 2147483647;

struct LaunchConfiguration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};

  explicit LaunchConfiguration(const Launch& launch) {
    config.gridDim = dim3(static_cast<unsigned>(launch.blocks), 1, 1);
    config.blockDim = dim3(static_cast<unsigned>(launch.threads), 1, 1);
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = launch.stream;
    config.attrs = attributes;
    if (launch.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
    if (launch.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }

  LaunchConfiguration(const LaunchConfiguration&) = delete;
  LaunchConfiguration& operator=(const LaunchConfiguration&) = delete;
};

// Beyond 48 KB, its static variables counted, a kernel has to be told that it may use so much shared memory.
template <auto kernel>
cudaError_t allow_shared_bytes(int bytes) {
  constexpr int allowed_to_all = 48 * 1024;
  constexpr int most_static = 16 * 1024;  // no kernel has more (tests/test_static_evidence.py)
  if (bytes <= allowed_to_all - most_static) {
    return cudaSuccess;
  }
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <auto kernel, class Arguments>
cudaError_t launch(const Launch& launch, const Arguments& arguments) {
  if (launch.blocks == 0) {
    return cudaSuccess;
  }
  if (launch.blocks > maximum_blocks) {
    return cudaErrorInvalidConfiguration;
  }
  const cudaError_t error = allow_shared_bytes<kernel>(launch.shared_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  const LaunchConfiguration configuration(launch);
  return cudaLaunchKernelEx(&configuration.config, kernel, arguments);
}

// How many clusters of this launch run at once: a persistent grid must not be larger, and how clusters pack into the
// groups of multiprocessors that can hold one is known to the driver only.
template <auto kernel>
cudaError_t resident_clusters(const Launch& launch, int64_t& clusters) {
  cudaError_t error = allow_shared_bytes<kernel>(launch.shared_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  const LaunchConfiguration configuration(launch);
  int found = 0;
  error = cudaOccupancyMaxActiveClusters(&found, kernel, &configuration.config);
  clusters = found;
  return error;
}

inline cudaError_t device_traits(int device, DeviceTraits& traits) {
  int major = 0;
  int minor = 0;
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, device);
  };
  cudaError_t error = ask(major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = ask(minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = ask(traits.multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = ask(traits.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) {
    error = ask(traits.shared_bytes_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  }
  traits.architecture = major * 10 + minor;
  return error;
}

}  // namespace fastreg::cuda
