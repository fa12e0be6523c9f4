"""The dtype of computation, the two-dimensional view of the norms over rows, and vectors of the norms over channels."""

from __future__ import annotations

import math

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an input of ``dtype`` is computed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the dtype of computation."""
    return tensor.to(accumulate_dtype(tensor.dtype))


def as_rows(tensor: torch.Tensor, normalized_ndim: int) -> torch.Tensor:
    """``tensor`` as (rows, hidden size) in the dtype of computation."""
    hidden = math.prod(tensor.shape[tensor.dim() - normalized_ndim :])
    rows = math.prod(tensor.shape[: tensor.dim() - normalized_ndim])
    return tensor.reshape(rows, hidden).to(accumulate_dtype(tensor.dtype))


def as_row(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight or bias as one row, in the dtype of computation."""
    return parameter.reshape(-1).to(dtype)


def along(vector: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A vector of one element a channel, shaped to meet ``tensor``."""
    return vector.reshape(1, -1, *(1,) * (tensor.dim() - 2))


def laid_out_like(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``result`` with the strides of a dense tensor of its shape."""
    if result.stride() == like.stride():
        return result
    return result.new_empty_strided(result.shape, like.stride()).copy_(result)
