"""Instance normalisation with an activation: the schema of its own operator, autograd and the public function.

It is group normalisation of every channel by itself, and shares its operators; what is its own are running statistics.
With these instead of the input's it is batch normalisation in evaluation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastreg import _activations, _library
from fastreg.backends.reference import group_norm as formula
from fastreg.backends.reference.instance_norm import update_running_statistics
from fastreg.ops import _channel_checks, _norm
from fastreg.ops import group_norm as of_groups
from fastreg.ops._layout import contiguous, in_some_family
from fastreg.ops.batch_norm import batch_norm


def _fake_fwd(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return of_groups.fake_output(input), of_groups.fake_statistics(input, input.shape[1])


instance_norm_fwd = _library.define(
    "instance_norm",
    "instance_norm_fwd",
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? "
    "running_var, float momentum, float eps, int activation, float negative_slope) -> (Tensor, Tensor)",
    _fake_fwd,
)


class InstanceNormFunction(torch.autograd.Function):
    """Autograd of instance_norm where it moves running statistics; saves what group_norm saves."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        momentum: float,
        eps: float,
        activation: int,
        negative_slope: float,
    ) -> Any:
        output, statistics = run_forward(
            input, weight, bias, running_mean, running_var, momentum, eps, activation, negative_slope
        )
        of_groups.save_context(
            ctx, input, input.shape[1], weight, bias, statistics, eps, activation, negative_slope
        )
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = of_groups.differentiate(ctx, grads[0], ctx.needs_input_grad[:3])
        return (*found, *(None,) * 6)


def run_forward(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator, whose mutation autograd is told of."""
    results = instance_norm_fwd(
        input, weight, bias, running_mean, running_var, momentum, eps, activation, negative_slope
    )
    if not torch.compiler.is_compiling():
        # An operator's mutation does not count as one for autograd by itself.
        torch.autograd.graph.increment_version((running_mean, running_var))
    return results  # type: ignore[no-any-return]


_apply = _norm.direct_apply(InstanceNormFunction)


def instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""Normalise every channel of every sample, scale and shift it, and apply an activation.

    Equivalent to ``activation(torch.nn.functional.instance_norm(input, running_mean, running_var, weight, bias,
    use_input_stats, momentum, eps))``, except that channels_last stays channels_last.

    Formula::

        output = activation((input - mean) / sqrt(variance + eps) * weight + bias)

    where
        - ``mean`` and ``variance`` (biased, from centred data) are taken over all spatial positions, separately for
          every channel of every sample, and are ``running_mean`` and ``running_var`` without ``use_input_stats``;
        - with ``use_input_stats``, running = (1 - momentum) * running + momentum * (mean over the samples), in place,
          the variances being the unbiased ones there;
        - ``weight`` and ``bias`` have an element a channel; left out, they are 1 and 0.

    Args:
        input: the tensor to normalise, float32, bfloat16, float16 or float64.
            Shape: ``(N, C, *)`` with any number of spatial dimensions. Contiguous and channels_last tensors, and
            slices of their channels, are read in place; other layouts are copied once with ``.contiguous()``.
        running_mean: the running mean, in any of float32, bfloat16 and float16 (float64 for float64 input); None: there
            is none (with ``use_input_stats`` only).
            Shape: ``(C,)``.
        running_var: the running variance, likewise.
            Shape: ``(C,)``.
        weight: the scale, in any of the three dtypes, whatever the input's.
            Shape: ``(C,)``.
        bias: the shift, likewise.
            Shape: ``(C,)``.
        use_input_stats: whether the input's own statistics are used, and the running ones updated.
        momentum: the share of the input in the running statistics.
        eps: added to the variance, in the input's units squared.
        activation: None, ``"identity"``, ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or
            ``"hardswish"``.
        negative_slope: of ``"leaky_relu"``.

    Returns:
        A dense tensor of the input's shape and dtype, in channels_last if the input is, else contiguous.

    Raises:
        ValueError: one spatial element with ``use_input_stats``, only one of the running statistics, an unknown
            activation (torch's texts where torch has the check); a negative eps without ``use_input_stats``.
        RuntimeError: shapes that do not fit (torch's texts); no running statistics without ``use_input_stats``; a dtype
            or device that does not go with the input's; a backend asked for by name that cannot serve the call
            (``BackendUnavailable``).
        NotImplementedError: an input that is not floating point.
        TypeError: an argument of the wrong type.

    Accumulation is in fp32 (fp64 for fp64 input) and each output is rounded once. Deterministic: two runs give equal
    bits, forward and backward. Gradients are computed only for what requires them. Kept for backward: the input and two
    fp32 numbers a channel and sample; never what the activation is applied to. An empty input leaves the running
    statistics alone. Differentiable twice; second derivatives, forward-mode differentiation and the transforms of
    ``torch.func`` run the plain PyTorch formula.

    Reference: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization",
    2016, arXiv:1607.08022.
    """
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            instance_norm,
            tensors,
            input,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            use_input_stats=use_input_stats,
            momentum=momentum,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
        )
    number = _activations.number("instance_norm", activation)
    _channel_checks.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )
    if not use_input_stats:
        return batch_norm(
            *(input, running_mean, running_var, weight, bias, False, momentum, eps),
            activation=activation,
            negative_slope=negative_slope,
        )
    if running_mean is None or running_var is None:
        return of_groups.normalize_groups(input, input.shape[1], weight, bias, eps, number, negative_slope)
    return _tracking(input, running_mean, running_var, weight, bias, momentum, eps, number, negative_slope)


def _tracking(
    input: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
) -> torch.Tensor:
    """A call with running statistics to move."""
    given = running_mean, running_var
    if not (given[0].is_contiguous() and given[1].is_contiguous()):
        copies = given[0].contiguous(), given[1].contiguous()
        output = _tracking(input, *copies, weight, bias, momentum, eps, activation, negative_slope)
        for running, copy in zip(given, copies, strict=True):
            if copy is not running:
                running.copy_(copy)
        return output
    input, weight, bias = in_some_family(input), contiguous(weight), contiguous(bias)
    if _norm.transformed() or input.numel() == 0:
        if input.numel() > 0:
            moments = formula.group_norm_moments(input.detach(), input.shape[1])
            update_running_statistics(moments, math.prod(input.shape[2:]), *given, momentum)
        return formula.group_norm_formula(
            input, input.shape[1], weight, bias, eps, activation, negative_slope
        )
    arguments = (input, weight, bias, *given, momentum, eps, activation, negative_slope)
    if not _norm.recorded(input, weight, bias):
        return run_forward(*arguments)[0]
    if torch.compiler.is_compiling():
        return InstanceNormFunction.apply(*arguments)  # type: ignore[no-any-return]
    return _apply(*arguments)  # type: ignore[no-any-return]
