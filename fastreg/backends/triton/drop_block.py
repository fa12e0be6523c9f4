"""DropBlock in Triton: a mask of one bit a position, and its application.

The kernels are in _drop_block_mask.py and _drop_block_apply.py, their configurations are chosen by
_drop_block_launch.py. The mask is a function of the seed alone, so every backend draws the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastreg.backends.triton import _device, _launch
from fastreg.backends.triton import _drop_block_launch as _launches
from fastreg.backends.triton._drop_block_apply import apply_pixels, apply_planes
from fastreg.backends.triton._drop_block_mask import draw_blocks, draw_rows, spread_rows


def drop_block_mask(
    seed: torch.Tensor,
    shape: Sequence[int],
    block_size: Sequence[int],
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    anywhere: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of the positions that no block covers, and how many of them each sample has."""
    samples, volumes = shape[0], shape[0] * shape[1]
    row_bytes = _launch.ceil_div(shape[-1], 8)
    bits = torch.empty((*shape[:-1], row_bytes), dtype=torch.uint8, device=seed.device)
    if math.prod(shape) == 0:
        return bits.zero_(), torch.zeros(samples, dtype=torch.int64, device=seed.device)
    spatial = _launches.axes(shape, block_size, anywhere)
    launch = _launches.mask(volumes, spatial, _device.multiprocessors(seed))
    rows = 1 if launch.on_chip else spatial[0].size * spatial[1].size
    kept = torch.empty((samples, shape[1] * rows * launch.words), dtype=torch.int32, device=seed.device)
    with _device.current(seed):
        if launch.on_chip:
            draw_blocks[(launch.programs,)](
                *(seed, dynamic_threshold, threshold, bits, kept, volumes, launch.words, row_bytes),
                *(each for axis in spatial for each in (axis.size, axis.places, axis.block, axis.before)),
                VOLUMES=launch.volumes,
                DEPTH=launch.depth,
                HEIGHT=launch.height,
                BYTES=launch.word_bytes,
                num_warps=launch.warps,
            )
        else:
            _draw_in_memory(seed, threshold, dynamic_threshold, volumes, spatial, launch, bits, kept)
    return bits, kept.sum(dim=1)


def _draw_in_memory(
    seed: torch.Tensor,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    volumes: int,
    spatial: Sequence[_launches.Axis],
    launch: _launches.Mask,
    bits: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """Draw the mask row by row, and spread the rows along the other dimensions."""
    depth, height, width = spatial
    lines = volumes * depth.places * height.places
    words = torch.empty((lines, launch.words), dtype=torch.int64, device=seed.device)
    draw_rows[(launch.programs,)](
        *(seed, dynamic_threshold, threshold, words, lines, launch.words),
        *(width.places, width.block, width.before),
        LINES=_launches.SPREAD_LINES,
        num_warps=_launches.SPREAD_WARPS,
    )
    # In two dimensions one step is enough: the depth is one place.
    steps = [(height, volumes * depth.places, 1)]
    if depth.size > 1:
        steps.append((depth, volumes, height.size))
    for number, (axis, outer, inner) in enumerate(steps):
        last = number == len(steps) - 1
        lines = outer * axis.size * inner
        grown = None if last else torch.empty((lines, launch.words), dtype=torch.int64, device=seed.device)
        spread_rows[(_launches.spread_programs(lines, launch.words),)](
            *(words, grown, bits if last else None, kept if last else None, lines, inner, launch.words),
            *(bits.shape[-1], width.size, axis.size, axis.places, axis.block, axis.before),
            LINES=_launches.SPREAD_LINES,
            BYTES=launch.word_bytes,
            num_warps=_launches.SPREAD_WARPS,
        )
        words = words if grown is None else grown


def drop_block_apply(input: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The input where its bit is set, times the scale of the batch or of its sample; 0 elsewhere."""
    output = torch.empty_strided(input.shape, input.stride(), dtype=input.dtype, device=input.device)
    _apply(input, bits, scale, output)
    return output


def drop_block_inplace(input: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> None:
    """``drop_block_apply`` into the input."""
    _apply(input, bits, scale, input)


def _apply(input: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor, output: torch.Tensor) -> None:
    if input.numel() == 0:
        return
    samples, channels, width = input.shape[0], input.shape[1], input.shape[-1]
    plane_rows = math.prod(input.shape[2:-1])
    one_plane = bits.shape[1] == 1
    scale_stride = 0 if scale.numel() == 1 else 1
    with _device.current(input):
        if input.is_contiguous() or channels == 1:
            sample = channels * plane_rows * width
            launch = _launches.planes(sample, width, input.element_size())
            vector = _launch.vector(sample)
            apply_planes[(samples * launch.blocks,)](
                *(input, bits, scale, output, sample, sample // vector, launch.blocks, width, bits.shape[-1]),
                *(bits.shape[1] * plane_rows, plane_rows, scale_stride),
                VECTOR=vector,
                RUN=launch.run,
                RUNS=launch.runs,
                PARTS=launch.parts,
                SINGLE=launch.single,
                ONE_PLANE=one_plane and channels > 1,
                num_warps=launch.warps,
            )
            return
        lines = samples * plane_rows
        pixels = _launches.pixels(lines, width, channels)
        vector = _launch.vector(channels)
        apply_pixels[(pixels.programs,)](
            *(input, bits, scale, output, lines, width, bits.shape[-1], plane_rows, channels // vector),
            *(bits.shape[1], pixels.line_blocks, pixels.octet_blocks, scale_stride),
            VECTOR=vector,
            LINES=pixels.lines,
            OCTETS=pixels.octets,
            BLOCK=pixels.block,
            ONE_PLANE=one_plane,
            num_warps=pixels.warps,
        )
