// What the programs that run kernels without torch have in common: tensors that end where their memory ends, the
// criterion, and the loop over cases.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "tracer.h"
#include "vec.cuh"

namespace {

using namespace fastreg::cuda;
using fastreg::DType;

// --- tensors ---------------------------------------------------------------------------------------------------------

template <class Element>
constexpr DType dtype_of() {
  return sizeof(Element) == 4 ? DType::Float32 : std::is_same_v<Element, bfloat16> ? DType::BFloat16 : DType::Float16;
}

// The tracer looks after its own memory; malloc's is the sanitizers'.
void* allocate(size_t bytes, size_t element_bytes) {
  if constexpr (simulator::tracing) return simulator::tracer::allocate(bytes, element_bytes);
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes) != 0) throw std::bad_alloc();
  return memory;
}

void release(void* memory) {
  if constexpr (simulator::tracing) {
    simulator::tracer::release(memory);
  } else {
    std::free(memory);
  }
}

// (rows, columns) at a row stride, `shift` elements after a multiple of 16 bytes; filled with NaN.
template <class Element>
struct Matrix {
  int64_t rows;
  int64_t columns;
  int64_t stride;
  std::unique_ptr<void, decltype(&release)> memory;
  Element* data;

  Matrix(int64_t rows, int64_t columns, int64_t gap = 0, int64_t shift = 0)
      : rows(rows), columns(columns), stride(columns + gap), memory(nullptr, &release), data(nullptr) {
    const size_t bytes = static_cast<size_t>(shift + (rows - 1) * stride + columns) * sizeof(Element);
    memory.reset(allocate(bytes, sizeof(Element)));
    data = static_cast<Element*>(memory.get()) + shift;
    for (int64_t index = 0; index < (rows - 1) * stride + columns; ++index) data[index] = from_float<Element>(NAN);
  }

  Element& at(int64_t row, int64_t column) { return data[row * stride + column]; }
  double value(int64_t row, int64_t column) { return to_float(at(row, column)); }

  template <class Random>
  void fill(Random& random, double mean, double deviation) {
    std::normal_distribution<double> normal(mean, deviation);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) at(row, column) = from_float<Element>(normal(random));
    }
    simulator::tracer::initialised(data, static_cast<size_t>((rows - 1) * stride + columns) * sizeof(Element));
  }
};

// Bytes that a kernel writes.
struct Bytes {
  std::unique_ptr<void, decltype(&release)> memory;

  explicit Bytes(int64_t count) : memory(nullptr, &release) {
    memory.reset(allocate(static_cast<size_t>(std::max<int64_t>(count, 1)), 1));
  }

  unsigned char* data() { return static_cast<unsigned char*>(memory.get()); }
};

// --- the criterion ---------------------------------------------------------------------------------------------------

// Half a unit of the output's dtype and sixteen fp32 roundings of the terms that were added up.
template <class Element>
void require_close(const char* name, double actual, double exact, double terms) {
  const bool is_bfloat16 = std::is_same_v<Element, bfloat16>;
  const double epsilon = sizeof(Element) == 4 ? 0.0 : is_bfloat16 ? 1.0 / 128 : 1.0 / 1024;
  // Below the smallest normal number the spacing shrinks no further.
  const double size = std::max(std::abs(exact), std::ldexp(1.0, is_bfloat16 ? -126 : -14));
  const double allowed = 0.51 * epsilon * size + 16 * std::ldexp(1.0, -24) * terms;
  if (!(std::abs(actual - exact) <= allowed)) {
    throw std::runtime_error(std::string(name) + " is " + std::to_string(actual) + ", exact " + std::to_string(exact));
  }
}

void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("a launch was refused");
}

// --- the program -----------------------------------------------------------------------------------------------------

// Runs every case in the schedule that the arguments give; a case has describe(), architecture and multiprocessors.
template <class Case, size_t number, class Run>
int run_cases(const Case (&cases)[number], int count, char** values, const Run& run) {
  const auto argument = [&](int index) { return index < count ? std::atoi(values[index]) : index == 3 ? 1 : 0; };
  const simulator::Schedule schedule{static_cast<simulator::Order>(argument(1)), static_cast<uint64_t>(argument(2)),
                                     argument(3)};
  for (const Case& current : cases) {
    try {
      simulator::configure(simulator::device_of(current.architecture, current.multiprocessors), schedule);
      DeviceTraits device{};
      require(device_traits(0, device));
      run(current, device);
    } catch (const std::exception& exception) {
      std::printf("%s: %s\n", describe(current).c_str(), exception.what());
      return 1;
    }
  }
  if (count > 4) std::printf("%s", simulator::launches().c_str());
  return 0;
}

}  // namespace
