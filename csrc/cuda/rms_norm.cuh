// RMS norm is layer norm without centring: output = input * rstd * weight, rstd = 1 / sqrt(mean(input^2) + eps). Its
// kernels are those of layer_norm_*.cuh with centred = false, which has no mean to keep, no bias and one sum a row
// less.

#pragma once

#include "layer_norm.cuh"
