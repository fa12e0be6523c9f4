"""The kernels that apply a DropBlock mask: what its bit keeps is multiplied by the scale of its sample, the rest is 0.

Input and output are read and written once, 16 bytes at a time. Of planes a thread has the bits of its adjacent elements
in one byte, or puts them together from two of a row and one of the next. Of channels_last tensors a byte of the mask is
that of eight pixels of a channel, and is read once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.backends.triton._dropout_tiles import load_once
from fastreg.backends.triton._tiles import round_to

SIZES = [
    *("size", "sample_vectors", "blocks", "width", "row_bytes", "mask_rows", "plane_rows", "scale_stride"),
    *("lines", "channel_vectors", "line_blocks", "octet_blocks", "mask_channels"),
]


@triton.jit
def _load_bits(bits: tl.tensor, byte: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Bytes of the mask, which neighbours read too."""
    if mask is None:
        values = tl.load(bits + byte)
    else:
        values = tl.load(bits + byte, mask=mask, other=0)
    return values.to(tl.int32)


@triton.jit
def _apply_tile(
    input: tl.tensor,
    bits: tl.tensor,
    output: tl.tensor,
    scale: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    row_bytes: tl.tensor,
    plane_rows: tl.tensor,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    SINGLE: tl.constexpr,
    ONE_PLANE: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """``apply_planes`` of RUNS runs from ``first`` on."""
    runs = tl.arange(0, RUNS)
    elements = tl.arange(0, RUN)[None, :]
    within = runs[:, None] * RUN + elements
    start = first * RUN
    mask = None
    inside = None
    element = ((first + runs) * RUN).to(size.dtype)
    if MASKED:
        mask = within < size - start
        inside = runs * RUN < size - start
    row = element // width
    column = element - row * width
    mask_row = row
    if ONE_PLANE:
        mask_row = row % plane_rows
    byte = mask_row.to(tl.int64) * row_bytes + column // 8
    shift = (column % 8).to(tl.int32)
    kept = _load_bits(bits, byte, inside)
    if not SINGLE:
        left = width - column
        beyond = shift + tl.minimum(left, RUN) > 8
        over = element + left < tl.minimum(element + RUN, size)
        if MASKED:
            beyond &= inside
            over &= inside
        next_row = row + 1
        if ONE_PLANE:
            next_row %= plane_rows
        kept |= _load_bits(bits, byte + 1, beyond) << 8
        kept = kept >> shift
        after = _load_bits(bits, next_row.to(tl.int64) * row_bytes, over)
        kept |= after << tl.minimum(left, RUN).to(tl.int32)
    else:
        kept = kept >> shift
    values = load_once(input + start + within, mask) * scale
    values = tl.where((kept[:, None] >> elements) & 1 != 0, values, 0.0)
    tl.store(output + start + within, round_to(values, output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def apply_planes(
    input: tl.tensor,
    bits: tl.tensor,
    scale: tl.tensor,
    output: tl.tensor,
    size: tl.tensor,
    sample_vectors: tl.tensor,
    blocks: tl.tensor,
    width: tl.tensor,
    row_bytes: tl.tensor,
    mask_rows: tl.tensor,
    plane_rows: tl.tensor,
    scale_stride: tl.tensor,
    VECTOR: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    PARTS: tl.constexpr,
    SINGLE: tl.constexpr,
    ONE_PLANE: tl.constexpr,
) -> None:
    """A stretch of a sample of ``size`` elements; ONE_PLANE, of ``plane_rows`` rows, is the mask of all channels."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * RUNS
    factor = tl.load(scale + sample * scale_stride).to(tl.float32)
    offset = sample * sample_vectors * VECTOR
    rows = bits + sample * mask_rows * row_bytes
    if (first + RUNS) * RUN <= size:
        _apply_tile(
            *(input + offset, rows, output + offset, factor, first, size, width, row_bytes, plane_rows),
            *(RUN, RUNS, SINGLE, ONE_PLANE, False),
        )
    else:
        # In parts, since masked loads of single elements take many registers.
        for part in range(PARTS):
            _apply_tile(
                *(input + offset, rows, output + offset, factor, first + part * (RUNS // PARTS), size),
                *(width, row_bytes, plane_rows, RUN, RUNS // PARTS, SINGLE, ONE_PLANE, True),
            )


@triton.jit(do_not_specialize=SIZES)
def apply_pixels(
    input: tl.tensor,
    bits: tl.tensor,
    scale: tl.tensor,
    output: tl.tensor,
    lines: tl.tensor,
    width: tl.tensor,
    row_bytes: tl.tensor,
    plane_rows: tl.tensor,
    channel_vectors: tl.tensor,
    mask_channels: tl.tensor,
    line_blocks: tl.tensor,
    octet_blocks: tl.tensor,
    scale_stride: tl.tensor,
    VECTOR: tl.constexpr,
    LINES: tl.constexpr,
    OCTETS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_PLANE: tl.constexpr,
) -> None:
    """A strip of channels of 8 * OCTETS pixels of LINES rows of pixels; ONE_PLANE is the mask of all channels."""
    channels = channel_vectors * VECTOR
    strip = tl.program_id(0) // line_blocks // octet_blocks
    octet_block = tl.program_id(0) // line_blocks % octet_blocks
    line_block = tl.program_id(0) % line_blocks
    channel = strip * BLOCK + tl.arange(0, BLOCK)[None, :]

    # One byte for eight pixels of a channel.
    group = tl.arange(0, LINES * OCTETS)[:, None]
    line = line_block.to(tl.int64) * LINES + group // OCTETS
    octet = octet_block * OCTETS + group % OCTETS
    sample = line // plane_rows
    row = line - sample * plane_rows
    inside = (line < lines) & (octet < row_bytes)
    plane = sample * mask_channels
    if not ONE_PLANE:
        plane = plane + channel
        inside = inside & (channel < channels)
    byte = (plane * plane_rows + row) * row_bytes + octet
    octets = tl.load(bits + byte, mask=inside, other=0).to(tl.int32)
    place = tl.arange(0, 8)[None, :, None]
    kept = (tl.expand_dims(octets, 1) >> place) & 1
    kept = tl.reshape(kept, [LINES * OCTETS * 8, kept.shape[2]])

    pixel = tl.arange(0, LINES * OCTETS * 8)[:, None]
    line = line_block.to(tl.int64) * LINES + pixel // (OCTETS * 8)
    column = octet_block * (OCTETS * 8) + pixel % (OCTETS * 8)
    exists = (line < lines) & (column < width)
    factor = tl.load(scale + line // plane_rows * scale_stride, mask=exists, other=0.0).to(tl.float32)
    mask = exists & (channel < channels)
    offset = (line * width + column) * channels + channel
    values = tl.where(kept != 0, load_once(input + offset, mask) * factor, 0.0)
    tl.store(output + offset, round_to(values, output.dtype.element_ty), mask=mask)
