"""How a tensor is seen as planes or rows of channels: pure functions of sizes and strides, against every element."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from cases import CHANNEL_LAYOUTS
from fastreg import _channels

pytestmark = pytest.mark.backend_independent

SHAPES = (
    (4, 6),
    (1, 6),
    (6, 1),
    (2, 3, 4),
    (2, 3, 1),
    (1, 1, 5),
    (2, 3, 4, 5),
    (3, 2, 1, 4),
    (2, 3, 1, 2, 4),
)


def seen(tensor: torch.Tensor, view: _channels.ChannelView) -> torch.Tensor:
    """The elements that a kernel would read, as (samples, channels, spatial)."""
    storage = tensor.as_strided((), ())
    if view.rows:
        rows = storage.as_strided((view.lines, view.channels), (view.outer_stride, 1))
        return rows.reshape(view.samples, view.spatial, view.channels).transpose(1, 2)
    return storage.as_strided(
        (view.samples, view.channels, view.spatial), (view.outer_stride, view.spatial, 1)
    )


def check_view(tensor: torch.Tensor, rows: bool | None) -> bool:
    """Whether there is a view; if so it must show what the tensor holds."""
    view = _channels.channel_view(tensor, rows)
    if view is None:
        return False
    assert rows is None or view.rows == rows
    shape = (tensor.shape[0], tensor.shape[1], math.prod(tensor.shape[2:]))
    assert (view.samples, view.channels, view.spatial) == shape
    extent = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    assert (view.samples - 1) * (0 if view.rows else view.outer_stride) < extent
    assert torch.equal(seen(tensor, view), tensor.reshape(shape))
    return True


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", list(CHANNEL_LAYOUTS))
def test_a_view_shows_the_tensor(layout: str, shape: tuple[int, ...]) -> None:
    # Tells every element from every other, whatever is around it.
    values = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    tensor = CHANNEL_LAYOUTS[layout](values)
    found = {rows: check_view(tensor, rows) for rows in (None, True, False)}
    assert found[None] <= (found[True] or found[False])
    if layout in ("contiguous", "unaligned", "channels", "expanded") and math.prod(shape[2:]) > 1:
        assert found[False]
    if layout.startswith("channels_last"):
        assert found[True]
    if layout == "transposed" and len(shape) == 4 and min(shape) > 1:
        assert not any(found.values())


def test_views_of_random_strides() -> None:
    draw = random.Random(0)
    views = 0
    for _ in range(3000):
        shape = draw.choice(SHAPES)
        strides = [draw.choice((0, 1, 2, 3, 4, 5, 6, 12, 20, 24, 60)) for _ in shape]
        extent = 1 + sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))
        tensor = torch.arange(extent, dtype=torch.float64).as_strided(shape, strides)
        views += sum(check_view(tensor, rows) for rows in (None, True, False))
    assert views > 300


@pytest.mark.parametrize("rows", [False, True])
def test_dense_tensors(rows: bool) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for shape in SHAPES:
        dense = _channels.empty_dense(torch.empty(shape), rows)
        assert dense.shape == shape
        if not rows:
            assert dense.stride() == torch.empty(shape).stride()
        elif len(shape) in formats:
            assert dense.stride() == torch.empty(shape, memory_format=formats[len(shape)]).stride()
        view = _channels.channel_view(dense, rows)
        assert view is not None
        assert view.outer_stride == (shape[1] if rows else math.prod(shape[1:]))
        assert _channels.dense(dense, rows) is dense


@pytest.mark.parametrize("layout", list(CHANNEL_LAYOUTS))
def test_put_into_a_family(layout: str) -> None:
    for shape, rows in itertools.product(SHAPES, (False, True)):
        values = CHANNEL_LAYOUTS[layout](torch.randn(shape))
        there = _channels.in_family(values, rows)
        assert torch.equal(there, values)
        assert _channels.channel_view(there, rows) is not None
        copied = there.data_ptr() != values.data_ptr()
        assert copied == (_channels.channel_view(values, rows) is None)


def test_bytes_of_signs() -> None:
    planes, rows = torch.empty(2, 3, 9), torch.empty(2, 17, 9).movedim(1, 2)
    for tensor, lines, each in (
        (planes, 6, 2),
        (rows, 34, 2),
        (torch.empty(5, 3), 5, 1),
        (torch.empty(0, 3), 0, 1),
    ):
        view = _channels.channel_view(tensor)
        assert view is not None
        assert _channels.sign_bytes(view) == lines * each
