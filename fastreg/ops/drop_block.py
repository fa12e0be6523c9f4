"""DropBlock: the public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastreg.ops._drop_block import mask_alone, run


def drop_block2d(
    input: torch.Tensor,
    p: float | torch.Tensor,
    block_size: int | Sequence[int],
    inplace: bool = False,
    training: bool = True,
    *,
    gamma: str = "paper",
    seeds: str = "valid",
    shared: bool = False,
    rescale: str | None = "batch",
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    if has_torch_function_variadic(input):
        return handle_torch_function(
            drop_block2d,
            (input,),
            input,
            p,
            block_size,
            inplace=inplace,
            training=training,
            gamma=gamma,
            seeds=seeds,
            shared=shared,
            rescale=rescale,
            seed=seed,
            generator=generator,
        )
    return run(
        *("drop_block2d", input, p, block_size, inplace, training),
        *(gamma, seeds, shared, rescale, seed, generator),
        dimensions=4,
    )


def drop_block3d(
    input: torch.Tensor,
    p: float | torch.Tensor,
    block_size: int | Sequence[int],
    inplace: bool = False,
    training: bool = True,
    *,
    gamma: str = "paper",
    seeds: str = "valid",
    shared: bool = False,
    rescale: str | None = "batch",
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    if has_torch_function_variadic(input):
        return handle_torch_function(
            drop_block3d,
            (input,),
            input,
            p,
            block_size,
            inplace=inplace,
            training=training,
            gamma=gamma,
            seeds=seeds,
            shared=shared,
            rescale=rescale,
            seed=seed,
            generator=generator,
        )
    return run(
        *("drop_block3d", input, p, block_size, inplace, training),
        *(gamma, seeds, shared, rescale, seed, generator),
        dimensions=5,
    )


def drop_block_mask2d(
    shape: Sequence[int],
    p: float | torch.Tensor,
    block_size: int | Sequence[int],
    *,
    gamma: str = "paper",
    seeds: str = "valid",
    shared: bool = False,
    dtype: torch.dtype = torch.bool,
    packed: bool = False,
    device: torch.device | str | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    return mask_alone(
        *(
            "drop_block_mask2d",
            shape,
            p,
            block_size,
            gamma,
            seeds,
            shared,
            dtype,
            packed,
            device,
            seed,
            generator,
        ),
        dimensions=4,
    )


def drop_block_mask3d(
    shape: Sequence[int],
    p: float | torch.Tensor,
    block_size: int | Sequence[int],
    *,
    gamma: str = "paper",
    seeds: str = "valid",
    shared: bool = False,
    dtype: torch.dtype = torch.bool,
    packed: bool = False,
    device: torch.device | str | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    return mask_alone(
        *(
            "drop_block_mask3d",
            shape,
            p,
            block_size,
            gamma,
            seeds,
            shared,
            dtype,
            packed,
            device,
            seed,
            generator,
        ),
        dimensions=5,
    )


_APPLIED = r"""Drop contiguous blocks of every feature map, and scale what is kept.

Equivalent to ``torchvision.ops.{name}(input, p, block_size, inplace, training=training)``, with masks of another random
stream.

Formula::

    output = keep * input * scale

where
    - every place of a map where a block fits is a seed with probability gamma, drawn for each channel of each sample,
      and ``keep`` is 0 in the block of every seed, else 1; dropped elements are 0 even where the input is infinite or
      NaN;
    - ``gamma`` is that of the paper, ``p * {area} / (block volume * number of places)``, which ignores that blocks
      overlap and drops less than ``p``; or the exact one, for which the expected share of dropped positions is ``p``
      for any map and block;
    - ``scale`` is the number of positions over the number of those kept, counted in the batch.

Args:
    input: the feature maps, float32, bfloat16, float16 or float64.
        Shape: ``{shape}``. Contiguous and channels_last tensors are read in place, and the output is laid out as the
        input; others are copied once with ``.contiguous()``.
    p: the rate, 0 to 1: a number, or a floating-point tensor of one element on the input's device, whose value may
        change without a new compilation or graph capture; it is read by the device alone, and cut off beyond 0 to 1.
        Shape: ``()`` or ``(1,)``.
    block_size: the extent of a block in elements: a number for a square one, or one for each of {dimensions}. Cut off
        at the map; even, odd and as large as the map.
    inplace: write the output into the input and return that.
    training: if false, the input is returned.
    gamma: ``"paper"`` or ``"exact"``.
    seeds: ``"valid"``, where the whole block fits; or ``"anywhere"``, where blocks are cut off at the border, as timm
        places them.
    shared: whether the channels of a sample share one mask.
    rescale: ``"batch"``; ``"sample"``, by each sample's own count; ``"expected"``, by the expected share of kept
        positions, which needs no count; or None, by nothing.
    seed: draw the mask from this seed instead of torch's generator: an int, or an int64 tensor of one element on the
        input's device. Equal seeds give equal masks on every backend and device.
        Shape: ``()`` or ``(1,)``.
    generator: draw the seed from this generator instead of the device's default one.

Returns:
    A tensor of the input's shape, dtype and layout; the input itself, with nothing drawn, where it is not training, is
    empty, or ``p`` is the number 0.

Raises:
    ValueError: an input of other than {count} dimensions; a number ``p`` outside 0 to 1; a block below 1; an unknown
        option; both a seed and a generator.
    NotImplementedError: an input that is not floating point.
    RuntimeError: a backend asked for by name that cannot serve the call (``BackendUnavailable``).
    TypeError: an argument of the wrong type.

Accumulation is in fp32 (fp64 for fp64 input), counts are integers, and each output is rounded once. Deterministic given
the seed: the mask is a function of the seed and the row-major index of a place. It is not stored: backward grows it
again from the seed.

Reference: Ghiasi, Lin and Le, "DropBlock: a regularization method for convolutional networks", 2018, arXiv:1810.12890.
"""

_ALONE = r"""The mask of ``{applied}``: which positions no block covers.

Equivalent to ``{applied}(torch.ones(shape), p, block_size, rescale=None, seed=seed) != 0``.

Formula::

    keep = 1 - max over the window of a block of (uniform < gamma)

where
    - ``gamma`` and the windows are as in ``{applied}``; with the same seed the mask is the same.

Args:
    shape: the sizes of the feature maps, ``{shape}``.
    p: the rate: a number, or a tensor of one element on the device, as in ``{applied}``.
        Shape: ``()`` or ``(1,)``.
    block_size: the extent of a block in elements: a number, or one for each of {dimensions}.
    gamma: ``"paper"`` or ``"exact"``.
    seeds: ``"valid"`` or ``"anywhere"``.
    shared: whether the channels of a sample share one mask; the mask then has one channel.
    dtype: of the mask: any, 1 where a position is kept.
    packed: return the bits as the kernels use them: uint8, bit ``w % 8`` of byte ``w // 8`` of each row.
    device: where the mask is made; that of a tensor ``p`` or ``seed``, or torch's default, if None.
    seed: draw the mask from this seed, as in ``{applied}``.
        Shape: ``()`` or ``(1,)``.
    generator: draw the seed from this generator instead of the device's default one.

Returns:
    A contiguous tensor of that shape; of one channel if ``shared``; with a last size of ``ceil(W / 8)`` if ``packed``.

Raises:
    ValueError: a shape of other than {count} sizes; else as ``{applied}``.
    RuntimeError: a backend asked for by name that cannot serve the call (``BackendUnavailable``).
    TypeError: an argument of the wrong type.

Accumulation is in fp32 where a mask is applied; here all is integers. Deterministic given the seed, and the same on
every backend and device.

Reference: Ghiasi, Lin and Le, "DropBlock: a regularization method for convolutional networks", 2018, arXiv:1810.12890.
"""

# One text for maps of two and of three dimensions.
for _applied, _alone, _words in (
    (
        *(drop_block2d, drop_block_mask2d),
        {"area": "(H * W)", "shape": "(N, C, H, W)", "dimensions": "``(H, W)``", "count": "4"},
    ),
    (
        *(drop_block3d, drop_block_mask3d),
        {"area": "(D * H * W)", "shape": "(N, C, D, H, W)", "dimensions": "``(D, H, W)``", "count": "5"},
    ),
):
    _applied.__doc__ = _APPLIED.format(name=_applied.__name__, **_words)
    _alone.__doc__ = _ALONE.format(applied=_applied.__name__, **_words)
