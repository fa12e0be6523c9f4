"""The dropout family: operators, autograd, and what the public functions share.

Every function is one kernel: units (elements, channels, samples, or the whole batch) are dropped or kept, what is kept
is multiplied, and a residual may be added. Backward recomputes the mask from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastreg import _library, _units
from fastreg._units import BATCH, CHANNEL, SAMPLE
from fastreg.backends.reference import dropout as formula
from fastreg.ops import _mask, _norm
from fastreg.ops._layout import contiguous, dense, dense_channels, laid_out_as

# --- operators -------------------------------------------------------------------------------------------


def _fake_fwd(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
    rescale: bool,
) -> torch.Tensor:
    dtype = input.dtype if residual is None else residual.dtype
    return input.new_empty_strided(input.shape, input.stride(), dtype=dtype)


def _fake_inplace(
    input: torch.Tensor,
    seed: torch.Tensor,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
    rescale: bool,
) -> None:
    return None


def _fake_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
    rescale: bool,
    input_dtype: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = formula.DTYPES[input_dtype]
    grad_input = (
        grad_output.new_empty_strided(grad_output.shape, grad_output.stride(), dtype=dtype)
        if output_mask[0]
        else grad_output.new_empty(0, dtype=dtype)
    )
    return grad_input, _norm.fake_gradient(layer_scale, grad_output, output_mask[1])


dropout_fwd = _library.define(
    "dropout",
    "dropout_fwd",
    "(Tensor input, Tensor? residual, Tensor? row_scale, Tensor? layer_scale, Tensor? seed, int "
    "threshold, Tensor? dynamic_threshold, int unit, bool rescale) -> Tensor",
    _fake_fwd,
)
dropout_inplace = _library.define(
    "dropout",
    "dropout_inplace",
    "(Tensor(a!) input, Tensor seed, int threshold, Tensor? dynamic_threshold, int unit, bool rescale) -> ()",
    _fake_inplace,
)
dropout_bwd = _library.define(
    "dropout",
    "dropout_bwd",
    "(Tensor grad_output, Tensor? input, Tensor? row_scale, Tensor? layer_scale, Tensor? seed, int "
    "threshold, Tensor? dynamic_threshold, int unit, bool rescale, int input_dtype, bool[2] output_mask) -> "
    "(Tensor, Tensor)",
    _fake_bwd,
)


# --- autograd --------------------------------------------------------------------------------------------


class DropoutFunction(torch.autograd.Function):
    """Autograd of every function here; saves the seed, the scales, and the input only if layer_scale learns."""

    # The context is set up inside forward, as in LayerNormFunction, and for the same reason.

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        residual: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        layer_scale: torch.Tensor | None,
        seed: torch.Tensor | None,
        threshold: int,
        dynamic_threshold: torch.Tensor | None,
        unit: int,
        rescale: bool,
    ) -> Any:
        kept = input if layer_scale is not None and layer_scale.requires_grad else None
        ctx.save_for_backward(kept, row_scale, layer_scale, seed, dynamic_threshold)
        ctx.threshold, ctx.unit, ctx.rescale = threshold, unit, rescale
        ctx.dtype, ctx.strides, ctx.run_backward = input.dtype, input.stride(), dropout_bwd.route(input)
        return dropout_fwd(
            input, residual, row_scale, layer_scale, seed, threshold, dynamic_threshold, unit, rescale
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_output = grads[0]
        wants_input, wants_residual, _, wants_layer_scale = ctx.needs_input_grad[:4]
        grad_input, grad_layer_scale = differentiate(ctx, grad_output, wants_input, wants_layer_scale)
        grad_residual = grad_output if wants_residual else None
        return grad_input, grad_residual, None, grad_layer_scale, None, None, None, None, None


class InplaceDropoutFunction(torch.autograd.Function):
    """Autograd of dropout into its input."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        seed: torch.Tensor,
        threshold: int,
        dynamic_threshold: torch.Tensor | None,
        unit: int,
        rescale: bool,
    ) -> Any:
        ctx.save_for_backward(None, None, None, seed, dynamic_threshold)
        ctx.threshold, ctx.unit, ctx.rescale = threshold, unit, rescale
        ctx.dtype, ctx.strides, ctx.run_backward = input.dtype, input.stride(), dropout_bwd.route(input)
        ctx.mark_dirty(input)
        dropout_inplace(input, seed, threshold, dynamic_threshold, unit, rescale)
        return input

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return differentiate(ctx, grads[0], True, False)[0], None, None, None, None, None


def differentiate(
    ctx: Any, grad_output: torch.Tensor, wants_input: bool, wants_layer_scale: bool
) -> tuple[Any, Any]:
    """The gradients of the input and of layer_scale, each None where it is not asked for."""
    if not (wants_input or wants_layer_scale):
        return None, None
    input, row_scale, layer_scale, seed, dynamic_threshold = ctx.saved_tensors
    run = ctx.run_backward
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Double backward: the same formula, in torch operations that reach back to the gradient.
        run = formula.dropout_bwd
    grad_output = laid_out_as(grad_output, ctx.strides)
    grad_input, grad_layer_scale = run(
        *(grad_output, input, row_scale, layer_scale, seed),
        *(ctx.threshold, dynamic_threshold, ctx.unit, ctx.rescale),
        *(formula.DTYPES.index(ctx.dtype), (wants_input, wants_layer_scale)),
    )
    return grad_input if wants_input else None, grad_layer_scale if wants_layer_scale else None


_apply = _norm.direct_apply(DropoutFunction)
_apply_inplace = _norm.direct_apply(InplaceDropoutFunction)


# --- what the public functions share ---------------------------------------------------------------------


def check_input(op: str, input: object) -> None:
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"{op}(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")


def check_dtype(op: str, input: torch.Tensor) -> None:
    """Check that an input that is computed with has a dtype that the kernels know."""
    if input.dtype not in formula.DTYPES:
        raise NotImplementedError(
            f'"{op}" not implemented for {input.dtype}: expected float32, bfloat16, float16 or float64'
        )


def _laid_out(input: torch.Tensor, unit: int, by_rows: bool) -> torch.Tensor:
    """The input as the kernels take it for these units: itself where they can, else a copy."""
    if input.is_contiguous():
        return input
    if by_rows or unit in (SAMPLE, BATCH):
        # A sample is a stretch of memory where the batch is the outermost dimension.
        order = None if by_rows else _units.dense_order(input.shape, input.stride())
        outermost = order is not None and (not order or order[0] == 0 or unit == BATCH)
        return input if outermost else input.contiguous()
    return dense_channels(input) if unit == CHANNEL else dense(input)


def run(
    op: str,
    input: torch.Tensor,
    p: float | torch.Tensor,
    training: bool,
    unit: int,
    seed: int | torch.Tensor | None,
    generator: torch.Generator | None,
    *,
    rescale: bool = True,
    inplace: bool = False,
    residual: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Check the arguments, draw the seed and call the kernel: what every function of the family does.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as the public functions say.
    """
    check_input(op, input)
    _mask.check_rate(op, p, input.device)
    drops = training and (isinstance(p, torch.Tensor) or p > 0.0)
    if not drops and residual is None and row_scale is None and layer_scale is None:
        # Whatever its dtype, as torch.
        return input
    check_dtype(op, input)
    residual = checked_residual(op, input, residual)
    _check_scales(op, input, row_scale, layer_scale)
    threshold, dynamic_threshold, seed_tensor = 0, None, None
    if drops:
        threshold, dynamic_threshold = _mask.thresholds(p, unit)
        seed_tensor = _mask.seed_on(op, input.device, seed, generator)
    mask = (seed_tensor, threshold, dynamic_threshold, unit, rescale)
    if inplace:
        return _run_inplace(input, *mask)  # type: ignore[arg-type]
    if row_scale is not None and row_scale.requires_grad and torch.is_grad_enabled():
        # No kernel differentiates it; torch does.
        output = run_one(input, None, None, layer_scale, *mask) * formula.along_rows(row_scale, input)
        output = output.to(input.dtype)
        return output if residual is None else (output + residual).to(residual.dtype)
    return run_one(input, residual, row_scale, layer_scale, *mask)


def run_one(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
    rescale: bool,
) -> torch.Tensor:
    """One kernel, with its autograd."""
    input = _laid_out(input, unit, by_rows=row_scale is not None or layer_scale is not None)
    if residual is not None:
        residual = laid_out_as(residual, input.stride())
    arguments = (
        *(input, residual, contiguous(row_scale), contiguous(layer_scale)),
        *(seed, threshold, dynamic_threshold, unit, rescale),
    )
    if _norm.transformed():
        return formula.dropout_fwd(*arguments)
    if not _norm.recorded(input, residual, layer_scale):
        return dropout_fwd(*arguments)  # type: ignore[no-any-return]
    if torch.compiler.is_compiling():
        return DropoutFunction.apply(*arguments)  # type: ignore[no-any-return]
    return _apply(*arguments)  # type: ignore[no-any-return]


def _run_inplace(
    input: torch.Tensor,
    seed: torch.Tensor,
    threshold: int,
    dynamic_threshold: torch.Tensor | None,
    unit: int,
    rescale: bool,
) -> torch.Tensor:
    mask = (seed, threshold, dynamic_threshold, unit, rescale)
    if input.requires_grad and input.is_leaf and torch.is_grad_enabled():
        # An autograd.Function raises this too, but only after it has written into the leaf.
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    if _norm.transformed() or _laid_out(input, unit, by_rows=False) is not input:
        return input.copy_(run_one(input, None, None, None, *mask))
    if not _norm.recorded(input):
        dropout_inplace(input, *mask)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(input)
        return input
    if torch.compiler.is_compiling():
        return InplaceDropoutFunction.apply(input, *mask)  # type: ignore[no-any-return]
    return _apply_inplace(input, *mask)  # type: ignore[no-any-return]


def checked_residual(op: str, input: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor | None:
    """The residual in the dtype of the sum."""
    if residual is None:
        return None
    if not isinstance(residual, torch.Tensor):
        raise TypeError(f"{op}(): argument 'residual' must be Tensor, not {type(residual).__name__}")
    if residual.shape != input.shape:
        raise RuntimeError(
            f"{op}: expected residual of the input's shape {list(input.shape)}, but got {list(residual.shape)}"
        )
    _check_companion(op, "residual", residual, input)
    return residual.to(torch.promote_types(input.dtype, residual.dtype))


def _check_scales(op: str, input: torch.Tensor, row_scale: object, layer_scale: object) -> None:
    shape = list(input.shape)
    for name, scale, expected in (
        ("row_scale", row_scale, "the first dimensions of the input's shape"),
        ("layer_scale", layer_scale, "the input's last dimension"),
    ):
        if isinstance(scale, torch.Tensor):
            given = list(scale.shape)
            if name == "row_scale":
                fits = 0 < len(given) < len(shape) and shape[: len(given)] == given
            else:
                fits = len(shape) > 0 and shape[-1:] == given
            if not fits:
                raise RuntimeError(f"{op}: expected {name} to have {expected} {shape}, but got {given}")
        if scale is not None:
            check_scale(op, name, scale, input)


def check_scale(op: str, name: str, scale: object, input: torch.Tensor) -> None:
    """Check type, dtype and device of a scale that goes with the input."""
    if not isinstance(scale, torch.Tensor):
        raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(scale).__name__}")
    _check_companion(op, name, scale, input)


def _check_companion(op: str, name: str, tensor: torch.Tensor, input: torch.Tensor) -> None:
    if tensor.device != input.device:
        raise RuntimeError(
            f"{op}: expected all tensors to be on the same device, but {name} is on {tensor.device} and the "
            f"input is on {input.device}; move one of them with .to(device)"
        )
    mixes = (tensor.dtype == torch.float64) == (input.dtype == torch.float64)
    if tensor.dtype not in formula.DTYPES or not mixes:
        expected = "float64" if input.dtype == torch.float64 else "float32, bfloat16 or float16"
        raise RuntimeError(
            f"{op}: mixed dtype: {name} is {tensor.dtype} where the input is {input.dtype}; expected {expected}: "
            f"convert the {name} or the input with .to(dtype)"
        )
