// How the threads that share a row find each other, and how they add up what each of them knows of it.
//
// A row belongs to a team: part of a warp, whole warps of one block, or blocks of a cluster. Values go up through lanes
// (shuffles), warps (shared memory, one barrier) and blocks (sent into each other's shared memory). Each step adds in
// an order that does not depend on timing, and leaves the same bits in every thread.

#pragma once

#include <cstring>

#include "../math.h"
#include "device.cuh"

namespace fastreg::cuda {

inline constexpr int warp_lanes = 32;
inline constexpr unsigned all_lanes = 0xffffffffu;
inline constexpr int maximum_warps = 32;
inline constexpr int maximum_cluster = 8;  // what every GPU with clusters can run

// --- who shares a row ------------------------------------------------------------------------------------------------

// The threads of a block that share a row: a power of two of them up to 32, or whole warps.
struct Team {
  int threads;
  int count;  // teams in the block
  int index;  // of this thread's team
  int lane;   // of this thread in its team

  __device__ __forceinline__ explicit Team(int threads_per_row)
      : threads(threads_per_row),
        count(static_cast<int>(blockDim.x) / threads_per_row),
        index(static_cast<int>(threadIdx.x) / threads_per_row),
        lane(static_cast<int>(threadIdx.x) - index * threads_per_row) {}

  // One-element packs have many places: without this the compiler keeps an address for each of them all the time.
  template <int width>
  __device__ __forceinline__ void forget_places() {
    if constexpr (width == 1) {
      uint32_t hidden = static_cast<uint32_t>(lane);
      forget(hidden);
      lane = static_cast<int>(hidden);
    }
  }

  __device__ __forceinline__ int lanes() const { return threads < warp_lanes ? threads : warp_lanes; }
  __device__ __forceinline__ int warps() const { return threads / warp_lanes; }
  __device__ __forceinline__ int first_warp() const { return index * warps(); }
};

// The packs of a row that belong to this block: all of them, or an equal share in a cluster.
struct Slice {
  int first;
  int count;

  __device__ __forceinline__ Slice(int packs, int cluster) : first(0), count(packs) {
    if (cluster > 1) {
      const int share = (packs + cluster - 1) / cluster;
      first = static_cast<int>(cluster_rank()) * share;
      count = packs - first < share ? packs - first : share;
      count = count > 0 ? count : 0;
    }
  }

  // How many packs the warp of this thread holds when thread t of a team has packs t, t + threads, t + 2 * threads, ...
  __device__ __forceinline__ int of_warp(const Team& team) const {
    const int rounds = count / team.threads;
    int rest = count - rounds * team.threads - team.lane / warp_lanes * warp_lanes;
    rest = rest < 0 ? 0 : rest > warp_lanes ? warp_lanes : rest;
    return rounds * warp_lanes + rest;
  }
};

// --- over lanes ------------------------------------------------------------------------------------------------------

// Over groups of `lanes` neighbours, a power of two. Addition commutes, so every lane of a group gets the same bits.
__device__ __forceinline__ float over_lanes(float value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(all_lanes, value, distance);
  }
  return value;
}

// Divides to 2 ulp. IEEE division is a subroutine, for which the compiler saves registers to memory.
__device__ __forceinline__ float mean_of(float sum, float count) {
  return count > 0.0f ? __fdividef(sum, count) : 0.0f;
}

// The mean first, then the squared deviations from that mean: no subtraction of large squares.
__device__ __forceinline__ Moments<float> over_lanes(Moments<float> part, int lanes) {
  const float count = over_lanes(part.count, lanes);
  const float sum = over_lanes(part.count * part.mean, lanes);
  const float mean = mean_of(sum, count);
  const float difference = part.mean - mean;
  return {count, mean, over_lanes(part.squares + part.count * difference * difference, lanes)};
}

// The moments of two parts, by the update of Chan, Golub and LeVeque; `right` is not empty.
__device__ __forceinline__ Moments<float> together(const Moments<float>& left, const Moments<float>& right) {
  const float count = left.count + right.count;
  const float difference = right.mean - left.mean;
  const float share = mean_of(right.count, count);
  return {count, left.mean + difference * share,
          left.squares + right.squares + difference * difference * left.count * share};
}

// Two sums at once: what layer norm's backward needs of a row.
struct Sums {
  float projection;
  float plain;
};

__device__ __forceinline__ Sums over_lanes(Sums part, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    part.projection += __shfl_xor_sync(all_lanes, part.projection, distance);
    part.plain += __shfl_xor_sync(all_lanes, part.plain, distance);
  }
  return part;
}

// --- over warps and blocks -------------------------------------------------------------------------------------------

// Shared memory through which warps and blocks exchange values. There are two of each, used in turn: a thread can write
// for the next row but one only after everyone has read this row's value and sent or written the next row's.
template <class Value, int rows = 1>
struct Exchange {
  Value warps[2][maximum_warps][rows];
  Value blocks[2][maximum_cluster][rows];
  Mailbox mailboxes[2];

  // At the start of a kernel whose blocks form clusters; finish_start() follows before the first exchange.
  __device__ __forceinline__ void start(int cluster) {
    if (cluster > 1) {
      if (threadIdx.x == 0) {
        mailbox_open(&mailboxes[0]);
        mailbox_open(&mailboxes[1]);
        mailboxes_publish();
      }
      cluster_arrive();
    }
  }

  __device__ __forceinline__ void finish_start(int cluster) {
    if (cluster > 1) {
      cluster_wait();
    }
  }
};

// Each of `values` is the same in all lanes of a warp, and this warp's part of a row; they become the whole rows'.
// Every thread of the block must call it, with `round` counting up from 0.
template <class Value, int rows>
__device__ __forceinline__ void over_warps_and_blocks(Value (&values)[rows], const Team& team, int cluster,
                                                      Exchange<Value, rows>& exchange, unsigned round) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % warp_lanes;
  const unsigned turn = round % 2;
  if (team.threads > warp_lanes) {
    if (lane == 0) {
#pragma unroll
      for (int row = 0; row < rows; ++row) exchange.warps[turn][thread / warp_lanes][row] = values[row];
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      const Value part = lane < team.warps() ? exchange.warps[turn][team.first_warp() + lane][row] : Value{};
      values[row] = over_lanes(part, warp_lanes);
    }
  }
  if (cluster > 1) {
    Mailbox* mailbox = &exchange.mailboxes[turn];
    if (thread == 0) {
      mailbox_expect(mailbox, static_cast<unsigned>(cluster * sizeof(values)));
    }
    if (thread < cluster) {
      constexpr int words = rows * static_cast<int>(sizeof(Value) / sizeof(float));
      float parts[words];
      memcpy(parts, values, sizeof(values));
      float* slot = reinterpret_cast<float*>(exchange.blocks[turn][cluster_rank()]);
#pragma unroll
      for (int word = 0; word < words; ++word) {
        mailbox_send(slot + word, mailbox, static_cast<unsigned>(thread), parts[word]);
      }
    }
    mailbox_wait(mailbox, round / 2 % 2);
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      const Value part = lane < cluster ? exchange.blocks[turn][lane][row] : Value{};
      values[row] = over_lanes(part, warp_lanes);
    }
  }
}

}  // namespace fastreg::cuda
