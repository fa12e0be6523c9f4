"""The dropout family: the public functions.

Every one of them is one kernel, described in _dropout.py.
"""

from __future__ import annotations

import warnings

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastreg._units import BATCH, CHANNEL, ELEMENT, SAMPLE
from fastreg.ops import _mask
from fastreg.ops._dropout import check_input, run


def dropout(
    input: torch.Tensor,
    p: float | torch.Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""Set elements to zero with probability ``p`` and scale the others up, so that the mean stays as it is.

    Equivalent to ``torch.nn.functional.dropout(input, p, training, inplace)``, with masks of another random stream.

    Formula::

        output = keep * input / (1 - p)

    where
        - ``keep`` is 1 with probability ``1 - p``, else 0, drawn for each element on its own; dropped elements are 0
          even where the input is infinite or NaN;
        - ``p`` is rounded to a multiple of 1/65536, and the scale is exact for what it was rounded to.

    Args:
        input: the tensor to drop from, float32, bfloat16, float16 or float64.
            Shape: any. Dense tensors of any memory format are read in place, and the output is laid out as the input;
            others are copied once with ``.contiguous()``.
        p: the probability of an element to be dropped, 0 to 1: a number, or a floating-point tensor of one element on
            the input's device, whose value may change without a new compilation or graph capture; it is read by the
            device alone, cut off beyond 0 to 1, and takes no gradient.
            Shape: ``()`` or ``(1,)``.
        training: if false, the input is returned.
        inplace: write the output into the input and return that.
        seed: draw the mask from this seed instead of torch's generator: an int, or an int64 tensor of one element on
            the input's device. Equal seeds give equal masks on every backend and device.
            Shape: ``()`` or ``(1,)``.
        generator: draw the seed from this generator instead of the device's default one.

    Returns:
        A tensor of the input's shape, dtype and layout; the input itself, with nothing drawn, where it is not training
        or ``p`` is the number 0.

    Raises:
        ValueError: a number ``p`` outside 0 to 1 (torch's text), a tensor ``p`` or seed that is not as above, or both a
            seed and a generator.
        NotImplementedError: an input that is not floating point.
        RuntimeError: a backend asked for by name that cannot serve the call (``BackendUnavailable``).
        TypeError: an argument of the wrong type.

    Accumulation is in fp32 (fp64 for fp64 input) and each output is rounded once. Deterministic given the seed: a mask
    is a function of the seed and the element's position in memory, of Philox4x32-10; it is not stored, backward
    computes it again. One seed is drawn from torch's generator a call, so ``torch.manual_seed``, checkpointing and CUDA
    graphs do what they do for torch's dropout.

    Reference: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014; Hinton et
    al., arXiv:1207.0580.
    """
    if has_torch_function_variadic(input):
        return handle_torch_function(
            dropout,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            seed=seed,
            generator=generator,
        )
    return run("dropout", input, p, training, ELEMENT, seed, generator, inplace=inplace)


def dropout1d(
    input: torch.Tensor,
    p: float | torch.Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    if has_torch_function_variadic(input):
        return handle_torch_function(
            dropout1d,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            seed=seed,
            generator=generator,
        )
    check_input("dropout1d", input)
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. Note that dropout1d exists to "
            "provide channel-wise dropout on inputs with 1 spatial dimension, a channel dimension, and an optional "
            "batch dimension (i.e. 2D or 3D inputs)."
        )
    # Without a batch, the channels are where samples would be.
    unit = CHANNEL if input.dim() == 3 else SAMPLE
    return run("dropout1d", input, p, training, unit, seed, generator, inplace=inplace)


def dropout2d(
    input: torch.Tensor,
    p: float | torch.Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    if has_torch_function_variadic(input):
        return handle_torch_function(
            dropout2d,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            seed=seed,
            generator=generator,
        )
    check_input("dropout2d", input)
    _mask.check_rate("dropout2d", p, input.device)
    _warn_of_dimensions("dropout2d", input.dim(), spatial=2)
    if input.dim() == 3:
        warnings.warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior is desired "
            "- input is interpreted as shape (N, C, L), where C is the channel dim. This behavior will change in a "
            "future release to interpret the input as one without a batch dimension, i.e. shape (C, H, W). To maintain "
            "the 1D channel-wise dropout behavior, please switch to using dropout1d instead.",
            stacklevel=2,
        )
    if input.dim() < 2:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return run("dropout2d", input, p, training, CHANNEL, seed, generator, inplace=inplace)


def dropout3d(
    input: torch.Tensor,
    p: float | torch.Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    if has_torch_function_variadic(input):
        return handle_torch_function(
            dropout3d,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            seed=seed,
            generator=generator,
        )
    check_input("dropout3d", input)
    _mask.check_rate("dropout3d", p, input.device)
    _warn_of_dimensions("dropout3d", input.dim(), spatial=3)
    # As torch, which takes everything without five dimensions for a sample.
    if input.dim() < 1:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    unit = CHANNEL if input.dim() == 5 else SAMPLE
    return run("dropout3d", input, p, training, unit, seed, generator, inplace=inplace)


def _warn_of_dimensions(op: str, dimensions: int, spatial: int) -> None:
    """Warn as torch does, in its words, of an input with too many or too few dimensions."""
    if dimensions not in (spatial + 1, spatial + 2):
        warnings.warn(
            f"{op}: Received a {dimensions}-D input to {op}, which is deprecated and will result in an error in a "
            "future release. To retain the behavior and silence this warning, please use dropout instead. Note that "
            f"{op} exists to provide channel-wise dropout on inputs with {spatial} spatial dimensions, a channel "
            f"dimension, and an optional batch dimension (i.e. {spatial + 1}D or {spatial + 2}D inputs).",
            stacklevel=3,
        )


_OF_CHANNELS = """Set whole channels to zero with probability ``p`` and scale the others up, so that means stay.

Equivalent to ``torch.nn.functional.{name}(input, p, training, inplace)``, with masks of another random stream.

Formula::

    output = keep * input / (1 - p)

where
    - ``keep`` is 1 with probability ``1 - p``, else 0, drawn once for each channel of each sample; dropped elements are
      0 even where the input is infinite or NaN;
    - ``p`` is rounded to a multiple of 2**-32, and the scale is exact for what it was rounded to.

Args:
    input: the feature maps to drop from, float32, bfloat16, float16 or float64.
        Shape: {shape}. Contiguous and channels_last tensors are read in place, and the output is laid out as the input;
        others are copied once with ``.contiguous()``.
    p: the probability of a channel to be dropped: a number, or a tensor as in ``dropout``.
        Shape: ``()`` or ``(1,)``.
    training: if false, the input is returned.
    inplace: write the output into the input and return that.
    seed: draw the mask from this seed, as in ``dropout``.
        Shape: ``()`` or ``(1,)``.
    generator: draw the seed from this generator instead of the device's default one.

Returns:
    A tensor of the input's shape, dtype and layout; the input itself, with nothing drawn, where it is not training or
    ``p`` is the number 0.

Raises:
    RuntimeError: {error} (torch's text); a backend asked for by name that cannot serve the call
        (``BackendUnavailable``).
    ValueError, NotImplementedError, TypeError: as ``dropout``.

Accumulation is in fp32 (fp64 for fp64 input) and each output is rounded once. Deterministic given the seed, and the
same on every backend and device, as ``dropout``; the index of a channel is its row-major one, whatever the layout.

Reference: Tompson et al., "Efficient object localization using convolutional networks", 2015, arXiv:1411.4280.
"""

# One text for three functions that differ in what they take for a channel.
dropout1d.__doc__ = _OF_CHANNELS.format(
    name="dropout1d", shape="``(N, C, L)`` or ``(C, L)``", error="an input that has not 2 or 3 dimensions"
)
dropout2d.__doc__ = _OF_CHANNELS.format(
    name="dropout2d",
    shape="``(N, C, H, W)``, or ``(N, C, L)`` with torch's warning",
    error="an input of fewer than 2 dimensions",
)
dropout3d.__doc__ = _OF_CHANNELS.format(
    name="dropout3d", shape="``(N, C, D, H, W)`` or ``(C, D, H, W)``", error="an input without dimensions"
)


def drop_path(
    input: torch.Tensor,
    p: float | torch.Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    mode: str = "row",
    scale_by_keep: bool = True,
    residual: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""Drop whole samples of a residual branch (stochastic depth), and add the residual in the same kernel.

    Equivalent to ``residual + torchvision.ops.stochastic_depth(layer_scale * input, p, mode, training)``, with masks of
    another random stream; to timm's ``drop_path`` with ``mode="row"``.

    Formula::

        output = residual + layer_scale * keep * input / (1 - p)

    where
        - ``keep`` is 1 with probability ``1 - p``, else 0, drawn once for each sample (``mode="row"``) or once for the
          whole batch (``mode="batch"``); the branch of a dropped sample is 0 even where it is infinite or NaN;
        - ``p`` is rounded to a multiple of 2**-32, and the scale is exact for what it was rounded to;
        - ``residual`` and ``layer_scale`` are left out if None.

    Args:
        input: the residual branch, float32, bfloat16, float16 or float64.
            Shape: ``(N, *)``. Dense tensors whose batch is outermost in memory are read in place; others are copied
            once with ``.contiguous()``.
        p: the probability of a sample to be dropped: a number, or a tensor as in ``dropout``.
            Shape: ``()`` or ``(1,)``.
        training: if false, nothing is dropped and nothing is scaled by ``1 / (1 - p)``.
        inplace: write the output into the input and return that; without residual and layer_scale only.
        mode: ``"row"`` or ``"batch"``.
        scale_by_keep: whether what is kept is divided by ``1 - p``.
        residual: added to the branch. With a dtype wider than the input's, the output has that.
            Shape: the input's.
        layer_scale: multiplies the last dimension, and gets a gradient.
            Shape: ``(input.shape[-1],)``.
        seed: draw the mask from this seed, as in ``dropout``.
            Shape: ``()`` or ``(1,)``.
        generator: draw the seed from this generator instead of the device's default one.

    Returns:
        A tensor of the input's shape; the input itself where there is nothing to do.

    Raises:
        ValueError: an unknown mode; ``inplace`` together with a residual or layer_scale; else as ``dropout``.
        RuntimeError: an input without dimensions; a residual or layer_scale whose shape, dtype or device does not go
            with the input's; a backend asked for by name that cannot serve the call (``BackendUnavailable``).
        NotImplementedError, TypeError: as ``dropout``.

    Accumulation is in fp32 (fp64 for fp64 input) and each output is rounded once. Deterministic given the seed, as
    ``dropout``. The input of a dropped sample is not even read.

    Reference: Huang et al., "Deep networks with stochastic depth", 2016, arXiv:1603.09382.
    """
    if has_torch_function_variadic(input, residual, layer_scale):
        return handle_torch_function(
            drop_path,
            (input, residual, layer_scale),
            input,
            p=p,
            training=training,
            inplace=inplace,
            mode=mode,
            scale_by_keep=scale_by_keep,
            residual=residual,
            layer_scale=layer_scale,
            seed=seed,
            generator=generator,
        )
    if mode not in ("row", "batch"):
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode}")
    if inplace and not (residual is None and layer_scale is None):
        raise ValueError("drop_path: inplace goes without residual and layer_scale; leave one of them out")
    if isinstance(input, torch.Tensor) and input.dim() == 0:
        raise RuntimeError(
            "drop_path: expected an input with a dimension of samples, but got one without dimensions"
        )
    return run(
        *("drop_path", input, p, training, SAMPLE if mode == "row" else BATCH, seed, generator),
        rescale=scale_by_keep,
        inplace=inplace,
        residual=residual,
        layer_scale=layer_scale,
    )


def dropout_add(
    input: torch.Tensor,
    residual: torch.Tensor,
    p: float | torch.Tensor = 0.5,
    training: bool = True,
    *,
    row_scale: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""Drop elements of a residual branch and add the residual, in one kernel.

    Equivalent to ``residual + layer_scale * row_scale[..., None] * torch.nn.functional.dropout(input, p, training)``,
    with masks of another random stream.

    Formula::

        output = residual + layer_scale * row_scale * keep * input / (1 - p)

    where
        - ``keep`` and ``p`` are as in ``dropout``; with the same seed the mask is the same;
        - ``row_scale`` and ``layer_scale`` are left out if None.

    Args:
        input: the residual branch, float32, bfloat16, float16 or float64.
            Shape: any. Laid out as in ``dropout``; with a scale, other layouts than contiguous are copied.
        residual: added to the branch. With a dtype wider than the input's, the output has that.
            Shape: the input's.
        p: the probability of an element to be dropped: a number, or a tensor as in ``dropout``.
            Shape: ``()`` or ``(1,)``.
        training: if false, nothing is dropped.
        row_scale: multiplies rows, or larger parts of the branch: stochastic depth, for instance.
            Shape: the first dimensions of the input's, one or more of them.
        layer_scale: multiplies the last dimension, and gets a gradient.
            Shape: ``(input.shape[-1],)``.
        seed: draw the mask from this seed, as in ``dropout``.
            Shape: ``()`` or ``(1,)``.
        generator: draw the seed from this generator instead of the device's default one.

    Returns:
        A tensor of the input's shape and layout, in the wider of both dtypes.

    Raises:
        RuntimeError: a residual or scale whose shape, dtype or device does not go with the input's; a backend asked for
            by name that cannot serve the call (``BackendUnavailable``).
        ValueError, NotImplementedError, TypeError: as ``dropout``.

    Accumulation is in fp32 (fp64 for fp64 input) and each output is rounded once. Deterministic given the seed, as
    ``dropout``; the gradient of layer_scale is summed in a fixed order. A row_scale that requires a gradient gets one
    from torch's own operations.

    Reference: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014; Touvron et
    al., "Going deeper with image transformers", 2021, arXiv:2103.17239.
    """
    if has_torch_function_variadic(input, residual, row_scale, layer_scale):
        return handle_torch_function(
            dropout_add,
            (input, residual, row_scale, layer_scale),
            input,
            residual,
            p=p,
            training=training,
            row_scale=row_scale,
            layer_scale=layer_scale,
            seed=seed,
            generator=generator,
        )
    if residual is None:
        raise TypeError("dropout_add(): argument 'residual' must be Tensor, not NoneType")
    return run(
        *("dropout_add", input, p, training, ELEMENT, seed, generator),
        residual=residual,
        row_scale=row_scale,
        layer_scale=layer_scale,
    )
