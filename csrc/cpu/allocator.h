// Memory for large CPU outputs, recycled.
//
// The C library maps a large array afresh and gives it back as soon as it is freed, so that each call of an
// op pays for the kernel to find and zero every page again: for a norm of 32 MiB five times the cost of the
// norm itself. Blocks for outputs from `large_output` on are therefore kept for the next output of their
// size, up to a fixed total, and the least recently used go first. Smaller outputs come from torch: they live
// in the caches, where memory that another op has just freed is worth more than memory of our own. Tensors
// made of blocks own them through a deleter: they stay valid after empty_cache(), in other threads and after
// a fork. They differ from torch's own in one point: like those of torch.from_numpy, their storage cannot be
// resized.

#pragma once

#include <cstdint>

#include "../checks.h"

namespace fastreg {

// From this size on an output does not stay in the caches: it is written past them, into a recycled block.
constexpr int64_t large_output = int64_t{12} << 20;

// A fresh dense CPU tensor with these strides, uninitialised.
Tensor new_output(const int64_t* sizes, const int64_t* strides, int64_t dimensions, DType dtype, Device device,
                  const char* op);

// A contiguous one.
inline Tensor new_output(const int64_t* sizes, int64_t dimensions, DType dtype, Device device, const char* op) {
  int64_t strides[maximum_dimensions];
  contiguous_strides(sizes, dimensions, strides);
  return new_output(sizes, strides, dimensions, dtype, device, op);
}

// A contiguous one of uint8.
Tensor new_bytes(const int64_t* sizes, int64_t dimensions, Device device, const char* op);

// `count` bytes as a vector of uint8.
inline Tensor new_bytes(int64_t count, Device device, const char* op) { return new_bytes(&count, 1, device, op); }

// Working memory of one call, aligned to a cache line.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // At most once per object.
  void* reserve(int64_t bytes);

 private:
  void* data_ = nullptr;
  int64_t pooled_bytes_ = 0;
};

}  // namespace fastreg
