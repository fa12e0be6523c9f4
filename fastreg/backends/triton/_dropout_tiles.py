"""What the dropout kernels share: the random stream, and which elements of a tile are kept.

A tile is RUNS runs of RUN adjacent elements, a run to a thread, so that a thread has all lanes of a Philox block that
it computes and nothing is exchanged; ``run`` is the index of a run in memory. UNITS says how the units lie in it, by
the names of _dropout_launch.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg._units import HALF_LANES, LANES
from fastreg.backends.triton import _dropout_launch as names

ELEMENTS = tl.constexpr(names.ELEMENTS)
SHARED = tl.constexpr(names.SHARED)
ADJACENT = tl.constexpr(names.ADJACENT)
BORDER = tl.constexpr(names.BORDER)

_HALF_LANES = tl.constexpr(HALF_LANES)
_LANES = tl.constexpr(LANES)

# Sizes known only at run time, and what changes with the rate: nothing is compiled anew for one.
SIZES = [
    *("size", "rows", "unit_length", "unit_columns", "row_runs", "column_runs", "row_programs"),
    *("threshold", "scale"),
]


@triton.jit
def philox(seed: tl.tensor, block: tl.tensor) -> tl.tensor:
    """The four words of every block."""
    zero = tl.zeros(block.shape, tl.int32)
    high = zero
    if block.dtype == tl.int64:
        high = (block >> 32).to(tl.int32)
    return tl.philox(seed, block.to(tl.int32), high, zero, zero)


@triton.jit
def _beside(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """[N, 2 * RUN] from two of [N, RUN], the second after the first."""
    return tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [low.shape[0], low.shape[1] * 2])


@triton.jit
def _words(seed: tl.tensor, place: tl.tensor, WORDS: tl.constexpr) -> tl.tensor:
    """[N, WORDS]: the words WORDS * place and after of the stream; WORDS is 1, 2, 4 or 8."""
    if WORDS == 8:
        words = _beside(_words(seed, place * 2, 4), _words(seed, place * 2 + 1, 4))
    elif WORDS == 4:
        w0, w1, w2, w3 = philox(seed, place)
        words = _beside(tl.join(w0, w1), tl.join(w2, w3))
    elif WORDS == 2:
        w0, w1, w2, w3 = philox(seed, place >> 1)
        second = (place & 1) != 0
        words = tl.join(tl.where(second, w2, w0), tl.where(second, w3, w1))
    else:
        w0, w1, w2, w3 = philox(seed, place >> 2)
        odd = (place & 1) != 0
        words = tl.where((place & 2) != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))[:, None]
    return words


@triton.jit
def _half_lanes(seed: tl.tensor, run: tl.tensor, RUN: tl.constexpr) -> tl.tensor:
    """[N, RUN]: the 16-bit lanes of the elements of the runs."""
    if RUN == 1:
        words = _words(seed, run >> 1, 1)
        lanes = tl.where((run & 1)[:, None] != 0, words >> 16, words & 0xFFFF)
    else:
        words = _words(seed, run, RUN // 2)
        lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [run.shape[0], RUN])
    return lanes.to(tl.int32)


@triton.jit
def load_limit(threshold: tl.tensor, dynamic_threshold: tl.tensor) -> tl.tensor:
    """How many lanes are dropped, in int64."""
    limit = threshold.to(tl.int64)
    if dynamic_threshold is not None:
        limit = tl.load(dynamic_threshold)
    return limit


@triton.jit
def load_scale(
    scale: tl.tensor, limit: tl.tensor, dynamic: tl.tensor, UNITS: tl.constexpr, RESCALE: tl.constexpr
) -> tl.tensor:
    """What is kept is multiplied by this: ``scale``, unless the rate is known to the device alone."""
    if dynamic is not None and RESCALE:
        if UNITS == ELEMENTS:
            # Exact integers: the fp32 quotient is what a quotient in fp64 would be rounded to.
            kept = tl.maximum(-(limit - _HALF_LANES), 1).to(tl.float32)
            scale = tl.math.div_rn(tl.zeros_like(kept) + _HALF_LANES, kept)
        else:
            kept = tl.maximum(-(limit - _LANES), 1).to(tl.float64)
            scale = ((tl.zeros_like(kept) + _LANES) / kept).to(tl.float32)
    return scale


@triton.jit
def _are_kept(lanes: tl.tensor, limit: tl.tensor) -> tl.tensor:
    return (lanes >= limit.to(tl.uint32)) & (limit < _LANES)


@triton.jit
def keep(
    seed: tl.tensor,
    limit: tl.tensor,
    run: tl.tensor,
    unit_length: tl.tensor,
    unit_columns: tl.tensor,
    UNITS: tl.constexpr,
    RUN: tl.constexpr,
) -> tl.tensor:
    """Which elements of the runs are kept, [N, RUN] or [N, 1], and which runs have any of them, [N, 1].

    ``unit_length`` is ``Geometry.elements``, in runs unless BORDER; ``unit_columns`` is ``Geometry.columns``, in runs.
    """
    if UNITS == ELEMENTS:
        kept = _half_lanes(seed, run, RUN) >= limit.to(tl.int32)
        some = tl.full([run.shape[0], 1], True, tl.int1)
    elif UNITS == SHARED:
        kept = _are_kept(_words(seed, run // unit_length, 1), limit)
        some = kept
    elif UNITS == ADJACENT:
        place = run // unit_length * unit_columns + run % unit_columns
        kept = _are_kept(_words(seed, place, RUN), limit)
        some = tl.full([run.shape[0], 1], True, tl.int1)
    else:
        first = run * RUN
        unit = first // unit_length
        left = (unit_length - (first - unit * unit_length))[:, None]
        before = _are_kept(_words(seed, unit, 1), limit)
        after = _are_kept(_words(seed, unit + 1, 1), limit)
        kept = tl.where(tl.arange(0, RUN)[None, :] < left, before, after)
        some = before | after
    return kept, some


@triton.jit
def load_once(addresses: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Elements that are read once, in fp32; ``mask`` is None where all are to be read."""
    if mask is None:
        values = tl.load(addresses, eviction_policy="evict_first")
    else:
        values = tl.load(addresses, mask=mask, other=0.0, eviction_policy="evict_first")
    return values.to(tl.float32)


@triton.jit
def load_row_scale(row_scale: tl.tensor, run: tl.tensor, row_runs: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """[N, 1]: the scale of the row that each run is in, in fp32; ``mask`` is None where all of them are."""
    addresses = row_scale + (run // row_runs)[:, None]
    if mask is None:
        values = tl.load(addresses, eviction_policy="evict_last")
    else:
        values = tl.load(addresses, mask=mask, other=0.0, eviction_policy="evict_last")
    return values.to(tl.float32)


@triton.jit
def load_layer_scale(
    layer_scale: tl.tensor, run: tl.tensor, column_runs: tl.tensor, mask: tl.tensor, RUN: tl.constexpr
) -> tl.tensor:
    """[N, RUN]: the scales of the columns of each run, in fp32; ``mask`` is None where all of them are."""
    column = (run % column_runs * RUN)[:, None] + tl.arange(0, RUN)[None, :]
    if mask is None:
        values = tl.load(layer_scale + column, eviction_policy="evict_last")
    else:
        values = tl.load(layer_scale + column, mask=mask, other=0.0, eviction_policy="evict_last")
    return values.to(tl.float32)
