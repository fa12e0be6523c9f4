"""Group normalisation with an activation: schemas, fakes, autograd and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastreg import _activations, _channels, _library
from fastreg.backends.reference import group_norm as formula
from fastreg.ops import _channel_checks, _norm
from fastreg.ops._layout import contiguous, in_some_family

# --- operators -------------------------------------------------------------------------------------------


def _fake_fwd(
    input: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return fake_output(input), fake_statistics(input, groups)


def _fake_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    groups: int,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: int,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        fake_output(input) if output_mask[0] else input.new_empty(0),
        _norm.fake_gradient(weight, input, output_mask[1]),
        _norm.fake_gradient(bias, input, output_mask[2]),
    )


def fake_output(input: torch.Tensor) -> torch.Tensor:
    """The fake of a dense tensor like the input, in its family."""
    view = _channels.channel_view(input)
    if view is None:
        raise RuntimeError(
            f"group_norm's operators take planes or rows of channels, not strides {input.stride()} of shape "
            f"{tuple(input.shape)}; call .contiguous() on the input first"
        )
    return _channels.empty_dense(input, view.rows)


def fake_statistics(input: torch.Tensor, groups: int) -> torch.Tensor:
    """The fake of two numbers a group and sample."""
    return input.new_empty((2, input.shape[0], groups), dtype=_norm.accumulate_dtype(input))


group_norm_fwd = _library.define(
    "group_norm",
    "group_norm_fwd",
    "(Tensor input, int groups, Tensor? weight, Tensor? bias, float eps, int activation, float "
    "negative_slope) -> (Tensor, Tensor)",
    _fake_fwd,
)
group_norm_bwd = _library.define(
    "group_norm",
    "group_norm_bwd",
    "(Tensor grad_output, Tensor input, int groups, Tensor statistics, Tensor? weight, Tensor? "
    "bias, int activation, float negative_slope, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)


# --- autograd --------------------------------------------------------------------------------------------


class GroupNormFunction(torch.autograd.Function):
    """Autograd of group_norm; saves the input, the parameters and two fp32 numbers a group and sample."""

    # The context is set up inside forward, as in LayerNormFunction, and for the same reason.

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        groups: int,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        activation: int,
        negative_slope: float,
    ) -> Any:
        output, statistics = group_norm_fwd(input, groups, weight, bias, eps, activation, negative_slope)
        save_context(ctx, input, groups, weight, bias, statistics, eps, activation, negative_slope)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        wanted = ctx.needs_input_grad
        found = differentiate(ctx, grads[0], (wanted[0], wanted[2], wanted[3]))
        return found[0], None, found[1], found[2], None, None, None


def save_context(
    ctx: Any,
    input: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    eps: float,
    activation: int,
    negative_slope: float,
) -> None:
    """Keep what a backward needs; never what the activation is applied to."""
    ctx.save_for_backward(input, weight, bias, statistics)
    ctx.groups, ctx.eps, ctx.activation, ctx.negative_slope = groups, eps, activation, negative_slope
    ctx.rows, ctx.run_backward = _channels.family(input), group_norm_bwd.route(input)


def differentiate(ctx: Any, grad_output: torch.Tensor, mask: tuple[bool, bool, bool]) -> list[Any]:
    """The gradients of input, weight and bias, each None where it is not asked for."""
    input, weight, bias, statistics = ctx.saved_tensors
    run = ctx.run_backward
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Double backward: the same formula, in torch operations that reach back to the input.
        run = formula.group_norm_bwd
        statistics = formula.group_norm_statistics(input, ctx.groups, ctx.eps)
    else:
        grad_output = _channels.in_family(grad_output, ctx.rows)
    found = run(
        *(grad_output, input, ctx.groups, statistics, weight, bias),
        *(ctx.activation, ctx.negative_slope, mask),
    )
    return [gradient if asked else None for gradient, asked in zip(found, mask, strict=True)]


_apply = _norm.direct_apply(GroupNormFunction)


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""Normalise every group of channels of every sample, scale and shift its channels, and apply an activation.

    Equivalent to ``activation(torch.nn.functional.group_norm(input, num_groups, weight, bias, eps))``.

    Formula::

        output = activation((input - mean) / sqrt(variance + eps) * weight + bias)

    where
        - ``mean`` and ``variance`` (biased, from centred data) are taken over the ``C / num_groups`` channels of a
          group and all spatial positions, separately for every sample;
        - ``weight`` and ``bias`` have an element a channel; left out, they are 1 and 0.

    Args:
        input: the tensor to normalise, float32, bfloat16, float16 or float64.
            Shape: ``(N, C, *)`` with any number of spatial dimensions. Contiguous and channels_last tensors, and
            slices of their channels, are read in place; other layouts are copied once with ``.contiguous()``.
        num_groups: the number of groups, a divisor of ``C``.
        weight: the scale, in any of float32, bfloat16 and float16 whatever the input's (float64 for float64 input).
            Shape: ``(C,)``.
        bias: the shift, likewise.
            Shape: ``(C,)``.
        eps: added to the variance, in the input's units squared.
        activation: None, ``"identity"``, ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or
            ``"hardswish"``.
        negative_slope: of ``"leaky_relu"``.

    Returns:
        A dense tensor of the input's shape and dtype, in channels_last if the input is, else contiguous. Under CUDA
        autocast, fp32, as torch.

    Raises:
        ValueError: one value a group in all, an unknown activation.
        RuntimeError: shapes that do not fit, or no positive number of groups (torch's texts); a dtype or device that
            does not go with the input's; a backend asked for by name that cannot serve the call
            (``BackendUnavailable``).
        NotImplementedError: an input that is not floating point.
        TypeError: an argument of the wrong type.

    Accumulation is in fp32 (fp64 for fp64 input) and each output is rounded once. Deterministic: two runs give equal
    bits, forward and backward. Gradients are computed only for what requires them. Kept for backward: the input and two
    fp32 numbers a group and sample; never what the activation is applied to. Differentiable twice; second derivatives,
    forward-mode differentiation and the transforms of ``torch.func`` run the plain PyTorch formula.

    Reference: Wu and He, "Group Normalization", 2018, arXiv:1803.08494.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            group_norm,
            (input, weight, bias),
            *(input, num_groups),
            weight=weight,
            bias=bias,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
        )
    number = _activations.number("group_norm", activation)
    _channel_checks.group_norm(input, num_groups, weight, bias, eps)
    if input.is_cuda:
        input, weight, bias = _norm.autocast_to_float32("group_norm", input, weight, bias)
    return normalize_groups(input, num_groups, weight, bias, eps, number, negative_slope)


def normalize_groups(
    input: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> torch.Tensor:
    """A call whose arguments have been checked."""
    arguments = (
        *(in_some_family(input), groups, contiguous(weight), contiguous(bias)),
        *(eps, activation, negative_slope),
    )
    if _norm.transformed() or input.numel() == 0:
        return formula.group_norm_formula(*arguments)
    if not _norm.recorded(input, weight, bias):
        return group_norm_fwd(*arguments)[0]  # type: ignore[no-any-return]
    if torch.compiler.is_compiling():
        return GroupNormFunction.apply(*arguments)  # type: ignore[no-any-return]
    return _apply(*arguments)  # type: ignore[no-any-return]
