"""Layouts that the kernels take as they are, and the one explicit copy for those that they do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastreg import _channels, _units


def row_regular(tensor: torch.Tensor, normalized_ndim: int) -> torch.Tensor:
    """``tensor`` itself if it can be seen as (rows, hidden size) with strides (any, 1), else a contiguous copy.

    The kernels take any distance between rows (a slice of a wider tensor, or 0 where the rows are expanded) and need
    the elements of a row next to each other.
    """
    if tensor.is_contiguous() or tensor.numel() == 0 or _is_row_regular(tensor, normalized_ndim):
        return tensor
    return tensor.contiguous()


def _is_row_regular(tensor: torch.Tensor, normalized_ndim: int) -> bool:
    shape, strides = tensor.shape, tensor.stride()
    split = tensor.dim() - normalized_ndim
    expected = 1
    for size, stride in zip(reversed(shape[split:]), reversed(strides[split:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    row_stride = None
    for size, stride in zip(reversed(shape[:split]), reversed(strides[:split]), strict=True):
        if size == 1:
            continue
        if row_stride is not None and stride != row_stride:
            return False
        row_stride = stride * size
    return True


def in_some_family(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if it is planes or rows of channels (fastreg/_channels.py), else a contiguous copy."""
    if tensor.is_contiguous() or _channels.channel_view(tensor) is not None:
        return tensor
    return tensor.contiguous()


def contiguous(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter, copied where its elements are not adjacent."""
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if its elements fill a stretch of memory, in whatever order, else a contiguous copy."""
    return tensor if _units.is_dense(tensor) else tensor.contiguous()


def laid_out_as(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """``tensor`` itself if it has these strides, those of a dense tensor of its shape, else a copy that has."""
    if tensor.stride() == tuple(strides):
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def dense_channels(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if it is contiguous or channels_last, else a contiguous copy."""
    if tensor.is_contiguous():
        return tensor
    order = (0, *range(2, tensor.dim()), 1)
    expected = 1
    for dimension in reversed(order):
        if tensor.shape[dimension] != 1 and tensor.stride(dimension) != expected:
            return tensor.contiguous()
        expected *= tensor.shape[dimension]
    return tensor
