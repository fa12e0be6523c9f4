// What the door of every CUDA op does on torch's side: device guard, current stream, and errors as exceptions.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../checks.h"
#include "launch.cuh"
#include "vec.cuh"

// Weak, so that the library also loads beside a torch without CUDA, which has no such function (and no CUDA tensor).
extern "C" AOTITorchError __attribute__((weak)) aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// The simulator's operators live in a namespace of their own and take CPU tensors.
#if defined(FASTREG_CUDA_SIMULATOR)
#define FASTREG_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastreg_cuda_sim, CPU, m)
#else
#define FASTREG_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CUDA, m)
#endif

namespace fastreg::cuda {

inline void check_cuda(cudaError_t error, const char* op, const char* action) {
  if (error != cudaSuccess) [[unlikely]] {
    fail(op, "could not ", action, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ").");
  }
}

// For its lifetime, the device of the tensors is the current one, both for torch and for our own (static) CUDA runtime.
class OnDevice {
 public:
  OnDevice(Device device, const char* op) {
    if constexpr (!simulated) {
      guard_.emplace(device.index);
      if (&aoti_torch_get_current_cuda_stream == nullptr) {
        fail(op,
             "this torch gives no CUDA stream (aoti_torch_get_current_cuda_stream is missing), though input is a CUDA "
             "tensor; reinstall torch with CUDA, or use another backend.");
      }
      void* stream = nullptr;
      check_call(aoti_torch_get_current_cuda_stream(device.index, &stream), op, "give the current CUDA stream");
      stream_ = static_cast<cudaStream_t>(stream);
      check_cuda(cudaSetDevice(device.index), op, "select the device");
    }
    check_cuda(device_traits(simulated ? 0 : device.index, traits_), op, "ask the device");
  }

  cudaStream_t stream() const { return stream_; }
  const DeviceTraits& traits() const { return traits_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
  DeviceTraits traits_{};
};

inline Parameter parameter_of(const VectorView& view) { return {view.given ? view.data : nullptr, view.dtype}; }

// Calls visit.operator()<Element>() with the activations' element type.
template <class Visit>
auto with_element(DType dtype, const char* op, const Visit& visit) {
  switch (dtype) {
    case DType::Float32:
      return visit.template operator()<float>();
    case DType::BFloat16:
      return visit.template operator()<bfloat16>();
    case DType::Float16:
      return visit.template operator()<float16>();
    default:
      fail(op, "the CUDA kernels take float32, bfloat16 and float16, not ", name_of(dtype), ".");
  }
}

}  // namespace fastreg::cuda
