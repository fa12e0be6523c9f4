// Dropout + residual + RMS norm is dropout + residual + layer norm without centring. Its kernels are those of
// dropout_add_layer_norm_*.cuh with centred = false, which has no mean to keep, no bias and one sum a row less.

#pragma once

#include "dropout_add_layer_norm.cuh"
