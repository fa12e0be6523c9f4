// What the doors of group norm and instance norm have in common: the forward pass, with its checks and allocations.
// group_norm.cu has it.

#pragma once

#include "channels_door.h"

namespace fastreg::cuda {

struct GroupForwardOptions {
  int64_t groups;
  double eps;
  int64_t activation;
  double negative_slope;
};

struct GroupForwardResult {
  Tensor output;
  Tensor statistics;  // (2, samples, groups)
};

// `squares`: where M2 of each sample and group goes, or null.
GroupForwardResult group_forward(const ChannelTensors& tensors, const GroupForwardOptions& options, float* squares,
                                 const char* op);

}  // namespace fastreg::cuda
