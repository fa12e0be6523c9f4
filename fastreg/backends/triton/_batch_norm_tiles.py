"""What the batch norm kernels share: where a tile lies, the parameters of its channels, and the bits of signs.

Tiles are two-dimensional: lines (planes, or rows) times adjacent elements. Of planes all elements of a line belong to
one channel, of rows (CHANNELS_LAST) each belongs to its own; parameters have the shape that meets the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes known only at run time. Triton would compile a kernel anew for a size that is 1 or a multiple of 16; sizes come
# in units of VECTOR instead, which tells the compiler what it needs to know (_launch.vector).
SIZES = [
    *("lines", "line_vectors", "channels", "blocks", "part", "parts", "samples", "width"),
    *("input_stride", "residual_stride", "grad_output_stride", "sample_stride"),
]


@triton.jit
def load_tile(addresses: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Elements that are read once, in the dtype of memory; 0 outside the tensor."""
    return tl.load(addresses, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_channels(parameter: tl.tensor, channel: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Parameters or statistics in fp32, which many programs read."""
    return tl.load(parameter + channel, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def reciprocal_deviation(variance: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """1 / sqrt(variance + eps), rounded as IEEE has it: all backends are to agree on the sign of every element."""
    return tl.math.div_rn(1.0 + tl.zeros_like(variance), tl.math.sqrt_rn(variance + eps))


@triton.jit
def scale_and_shift(
    rstd: tl.tensor, weight: tl.tensor, bias: tl.tensor, channel: tl.tensor, mask: tl.tensor
) -> tl.tensor:
    """rstd * weight and bias of the channels."""
    scale = rstd
    if weight is not None:
        scale = rstd * load_channels(weight, channel, mask)
    # Also with 0 it is a fused multiply-add: a product would be fused with the addition of a residual.
    shift = tl.zeros(rstd.shape, tl.float32)
    if bias is not None:
        shift = load_channels(bias, channel, mask)
    return scale, shift


@triton.jit
def sum_tile(values: tl.tensor, CHANNELS_LAST: tl.constexpr) -> tl.tensor:
    """The sums of a tile's channels: [1, columns] of rows, else [1, 1]."""
    if not CHANNELS_LAST:
        values = tl.sum(values, axis=1, keep_dims=True)
    return tl.sum(values, axis=0, keep_dims=True)


@triton.jit
def plane_of(first: tl.tensor, row: tl.tensor, channels: tl.tensor) -> tl.tensor:
    """Sample and channel of the planes ``first + row``, dividing in 64 bits only once a program."""
    sample = first // channels
    channel = (first - sample * channels).to(tl.int32) + row
    carry = channel // channels
    return sample + carry, channel - carry * channels


@triton.jit
def _elements_before(
    unit: tl.tensor,
    lines: tl.tensor,
    line_elements: tl.tensor,
    blocks: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """How many elements of a channel lie in the units before ``unit``."""
    group = unit // blocks
    complete = tl.minimum(group.to(tl.int64) * ROWS, lines)
    if CHANNELS_LAST:
        elements = complete
    else:
        within = tl.minimum((unit - group * blocks) * BLOCK, line_elements)
        rows = tl.minimum(lines - complete, ROWS)
        elements = complete * line_elements + within * rows
    return elements


@triton.jit
def part_elements(
    number: tl.tensor,
    part: tl.tensor,
    units: tl.tensor,
    lines: tl.tensor,
    line_elements: tl.tensor,
    blocks: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """How many elements of a channel its part ``number`` has, in fp32."""
    first = tl.minimum(number * part, units)
    last = tl.minimum(first + part, units)
    elements = _elements_before(last, lines, line_elements, blocks, ROWS, BLOCK, CHANNELS_LAST)
    elements -= _elements_before(first, lines, line_elements, blocks, ROWS, BLOCK, CHANNELS_LAST)
    return elements.to(tl.float32)


@triton.jit
def pack_signs(positive: tl.tensor, ROWS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """[ROWS, BLOCK / 8] bytes, the first element the lowest bit."""
    bits = tl.reshape(positive.to(tl.int32), [ROWS, BLOCK // 8, 8])
    place = tl.arange(0, 8)[None, None, :]
    return tl.sum(bits << place, axis=2).to(tl.uint8)


@triton.jit
def load_signs(
    signs: tl.tensor,
    line: tl.tensor,
    block: tl.tensor,
    line_elements: tl.tensor,
    line_mask: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The signs of the tile of ``BLOCK`` elements a line that is number ``block``, as booleans."""
    line_bytes = (line_elements + 7) // 8
    byte = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    mask = line_mask & (byte < line_bytes)
    packed = tl.load(signs + line * line_bytes + byte, mask=mask, other=0, eviction_policy="evict_first")
    place = tl.arange(0, 8)[None, None, :]
    bits = (tl.expand_dims(packed.to(tl.int32), 2) >> place) & 1
    return tl.reshape(bits, [ROWS, BLOCK]) != 0
