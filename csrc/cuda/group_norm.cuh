// Group norm on a GPU: what its kernels are told. For a sample's group of `channels` channels, n = channels * spatial:
//
//   output = activation(fma(input - mean, rstd * weight[c], bias[c]))
//   mean, M2 over the n elements of the group, rstd = 1 / sqrt(M2 / n + eps)
//
// Backward, with z the activation's argument, dz = grad_output * activation'(z), xhat = (input - mean) * rstd:
//
//   grad_bias = sum of dz, grad_weight = sum of dz * xhat      over samples and space
//   grad_input = rstd * (weight * dz - mean of weight * dz - xhat * (mean of weight * dz * xhat))      over the group
//
// A tensor is (samples, channels, spatial) and lies in memory as planes or as rows, as in batch_norm.cuh, whose packs,
// affine maps and activations are used here too. Instance norm is group norm with a group a channel.
//
// group_norm_planes*.cuh and group_norm_rows*.cuh keep what belongs together on chip, group_norm_stream.cuh streams
// with the kernels of batch norm; the choice between them is in group_norm_plan.h. group_norm_finish.cuh has the small
// kernels that merge partial results. z is computed by the same roundings in all of them, so that backward finds the
// sign that forward took.

#pragma once

#include "batch_norm_resident_layout.cuh"
#include "batch_norm_walk.cuh"
#include "group_norm_pieces.h"

namespace fastreg::cuda {

struct GroupNormForwardArguments {
  const void* input;
  void* output;
  Parameter weight;
  Parameter bias;
  float* mean;  // (samples, groups) each, saved for backward
  float* rstd;
  float* squares;  // M2, or null
  ChannelShape shape;
  GroupShape group;
  int64_t input_stride;
  ActivationArguments activation;
  float eps;

  // By one thread a group; returns rstd.
  __device__ __forceinline__ float finish(int64_t index, const Moments<float>& moments) const {
    const float reciprocal = reciprocal_deviation_of(moments.squares / moments.count, eps);
    mean[index] = moments.mean;
    rstd[index] = reciprocal;
    if (squares != nullptr) squares[index] = moments.squares;
    return reciprocal;
  }
};

// Null means: not given, or not asked for.
struct GroupNormBackwardArguments {
  const void* grad_output;
  const void* input;
  const float* mean;  // (samples, groups) each
  const float* rstd;
  Parameter weight;
  Parameter bias;
  void* grad_input;
  ChannelShape shape;
  GroupShape group;
  int64_t grad_output_stride;
  int64_t input_stride;
  ActivationArguments activation;

  __host__ __device__ int64_t statistics() const { return shape.samples * group.groups; }
  __host__ __device__ int64_t per_group() const { return group.channels * shape.spatial; }
};

// The sums of dz and dz * xhat over pieces of a sample's channel: (2, samples * groups, slots), or null.
struct GroupSums {
  float* data;
  int64_t statistics;
  GroupPieces pieces;

  __device__ __forceinline__ void store(int64_t index, int64_t slot, float plain, float projection) const {
    float* const place = data + index * pieces.slots + slot;
    place[0] = plain;
    place[statistics * pieces.slots] = projection;
  }
};

// Of a GroupPlan.
struct GroupLayout {
  ResidentLayout blocks;
  int slab_threads;
  int lanes;
  int run;
  bool whole;
  bool twice;
  float* merged;  // rows: what all blocks know together, two sets of three floats a group
};

struct GroupForwardArguments {
  GroupNormForwardArguments norm;
  GroupLayout layout;
};

struct GroupBackwardArguments {
  GroupNormBackwardArguments norm;
  GroupLayout layout;
  GroupSums sums;
};

}  // namespace fastreg::cuda
