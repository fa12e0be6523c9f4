"""The two families of layouts that a norm over channels works in, and how a tensor is seen in them.

A tensor (N, C, spatial...) is seen as *planes*, (N, C, S) with the S elements of a plane adjacent, one plane after the
other, samples at any distance; or as *rows*, (N * S, C) with the C channels adjacent, rows at any one distance
(channels_last, and two-dimensional input). csrc/channels.h sees the same. Pure functions of sizes and strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChannelView:
    """A tensor seen as planes or as rows.

    Attributes:
        rows: the family.
        samples, channels, spatial: the sizes N, C and S.
        outer_stride: elements from sample to sample (planes) or from row to row; 0 for an expanded tensor.
    """

    rows: bool
    samples: int
    channels: int
    spatial: int
    outer_stride: int

    @property
    def per_channel(self) -> int:
        """Elements of a channel."""
        return self.samples * self.spatial

    @property
    def lines(self) -> int:
        """Planes, or rows."""
        return self.samples * (self.spatial if self.rows else self.channels)

    @property
    def line_elements(self) -> int:
        """Adjacent elements of a plane or row; the bits of its signs begin with a new byte."""
        return self.channels if self.rows else self.spatial


def channel_view(tensor: torch.Tensor, rows: bool | None = None) -> ChannelView | None:
    """``tensor`` in the family ``rows`` says, or in its own if None; None where it cannot be seen so without a copy."""
    shape, strides = tensor.shape, tensor.stride()
    samples, channels, spatial = shape[0], shape[1], math.prod(shape[2:])
    if tensor.numel() == 0:
        family = bool(rows)
        return ChannelView(family, samples, channels, spatial, channels if family else channels * spatial)
    as_planes = _planes_stride(shape, strides)
    if rows is None:
        rows = channels != 1 and (spatial == 1 or as_planes is None)
    outer_stride = _rows_stride(shape, strides) if rows else as_planes
    return None if outer_stride is None else ChannelView(rows, samples, channels, spatial, outer_stride)


def family(tensor: torch.Tensor) -> bool:
    """Whether ``tensor``, which must be of one of the two families, is of rows."""
    if tensor.is_contiguous():
        # The usual case, and a quarter of the time.
        shape = tensor.shape
        return shape[1] > 1 and shape[0] > 0 and math.prod(shape[2:]) == 1
    view = channel_view(tensor)
    return view is not None and view.rows


def _continued(shape: Sequence[int], strides: Sequence[int], stride: int) -> int | None:
    """The stride that the dimension before these would have, if each continues where the next inner one ends."""
    for size, found in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if found != stride:
                return None
            stride *= size
    return stride


def _planes_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    stride = _continued(shape[1:], strides[1:], 1)
    return stride if stride is None or shape[0] == 1 else strides[0]


def _rows_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    if shape[1] != 1 and strides[1] != 1:
        return None
    sizes, distances = (shape[0], *shape[2:]), (strides[0], *strides[2:])
    found = [distance for size, distance in zip(sizes, distances, strict=True) if size != 1]
    outer_stride = found[-1] if found else shape[1]
    return None if _continued(sizes, distances, outer_stride) is None else outer_stride


def dense_strides(shape: Sequence[int], rows: bool) -> tuple[int, ...]:
    """The strides of a dense tensor of the family."""
    order = (*range(len(shape))[:1], *range(2, len(shape)), 1) if rows else range(len(shape))
    strides = [0] * len(shape)
    stride = 1
    for dimension in reversed(order):
        strides[dimension] = stride
        stride *= max(shape[dimension], 1)
    return tuple(strides)


def empty_dense(like: torch.Tensor, rows: bool) -> torch.Tensor:
    """An uninitialised dense tensor of the family, of another one's shape, dtype and device."""
    return like.new_empty_strided(like.shape, dense_strides(like.shape, rows))


def in_family(tensor: torch.Tensor, rows: bool) -> torch.Tensor:
    """``tensor`` itself if it can be seen in that family, else a dense copy."""
    if tensor.is_contiguous() and (not rows or family(tensor)):
        return tensor
    return tensor if channel_view(tensor, rows) is not None else dense(tensor, rows)


def dense(tensor: torch.Tensor, rows: bool) -> torch.Tensor:
    """``tensor`` itself if it is dense in that family, strides of dimensions of size 1 included, else a copy."""
    if tensor.stride() == dense_strides(tensor.shape, rows):
        return tensor
    return empty_dense(tensor, rows).copy_(tensor)


def sign_bytes(view: ChannelView) -> int:
    """The bytes of one bit an element."""
    return view.lines * -(-view.line_elements // 8)
