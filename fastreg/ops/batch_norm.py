"""Batch normalisation with a residual and an activation: schemas, fakes, autograd and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastreg import _activations, _channels, _library
from fastreg.backends.reference import batch_norm as formula
from fastreg.ops import _channel_checks, _norm
from fastreg.ops._layout import contiguous, in_some_family

# --- operators -------------------------------------------------------------------------------------------


def _fake_pairs(input: torch.Tensor) -> torch.Tensor:
    return input.new_empty((2, input.shape[1]), dtype=_norm.accumulate_dtype(input))


def _fake_fwd(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
    skip_nonfinite: bool,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    output, signs = _fake_apply(input, residual, weight, bias, input, activation, negative_slope, keep_signs)
    return output, _fake_pairs(input), signs


def _fake_eval(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    activation: int,
    negative_slope: float,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    output, signs = _fake_apply(input, residual, weight, bias, input, activation, negative_slope, keep_signs)
    return output, _fake_pairs(input), signs


def _fake_apply(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    activation: int,
    negative_slope: float,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    view = _view(input)
    size = 0
    if keep_signs and residual is not None and _activations.needs_sign_only(activation):
        size = _channels.sign_bytes(view)
    return _channels.empty_dense(input, view.rows), input.new_empty(size, dtype=torch.uint8)


def _fake_bwd(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    signs: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    activation: int,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        *_fake_activations(input, output_mask),
        _norm.fake_gradient(weight, input, output_mask[2]),
        _norm.fake_gradient(bias, input, output_mask[3]),
    )


def _fake_moments(input: torch.Tensor) -> torch.Tensor:
    return _fake_pairs(input)


def _fake_sums(grad_output: torch.Tensor, input: torch.Tensor, *_: Any) -> torch.Tensor:
    return _fake_pairs(input)


def _fake_bwd_apply(
    grad_output: torch.Tensor, input: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_activations(input, arguments[-1])


def _fake_activations(input: torch.Tensor, output_mask: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """The fakes of grad_input and grad_residual."""
    rows = _view(input).rows
    wanted = (
        _channels.empty_dense(input, rows) if asked else input.new_empty(0) for asked in output_mask[:2]
    )
    return next(wanted), next(wanted)


def _view(input: torch.Tensor) -> _channels.ChannelView:
    view = _channels.channel_view(input)
    if view is None:
        raise RuntimeError(
            f"batch_norm's operators take planes or rows of channels, not strides {input.stride()} of shape "
            f"{tuple(input.shape)}; call .contiguous() on the input first"
        )
    return view


batch_norm_fwd = _library.define(
    "batch_norm",
    "batch_norm_fwd",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, int activation, float negative_slope, bool "
    "skip_nonfinite, bool keep_signs) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
)
batch_norm_eval = _library.define(
    "batch_norm",
    "batch_norm_eval",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, float eps, int activation, float negative_slope, bool keep_signs) -> (Tensor, "
    "Tensor, Tensor)",
    _fake_eval,
)
batch_norm_bwd = _library.define(
    "batch_norm",
    "batch_norm_bwd",
    "(Tensor grad_output, Tensor input, Tensor? residual, Tensor? signs, Tensor statistics, "
    "Tensor? weight, Tensor? bias, bool training, int activation, float negative_slope, bool[4] "
    "output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)
# The halves of both directions, between which SyncBatchNorm asks the other processes.
batch_norm_moments = _library.define(
    "batch_norm", "batch_norm_moments", "(Tensor input) -> Tensor", _fake_moments
)
batch_norm_apply = _library.define(
    "batch_norm",
    "batch_norm_apply",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor statistics, int "
    "activation, float negative_slope, bool keep_signs) -> (Tensor, Tensor)",
    _fake_apply,
)
batch_norm_sums = _library.define(
    "batch_norm",
    "batch_norm_sums",
    "(Tensor grad_output, Tensor input, Tensor? residual, Tensor? signs, Tensor statistics, "
    "Tensor? weight, Tensor? bias, int activation, float negative_slope) -> Tensor",
    _fake_sums,
)
batch_norm_bwd_apply = _library.define(
    "batch_norm",
    "batch_norm_bwd_apply",
    "(Tensor grad_output, Tensor input, Tensor? residual, Tensor? signs, Tensor "
    "statistics, Tensor? weight, Tensor? bias, Tensor? means, int activation, float negative_slope, bool[2] "
    "output_mask) -> (Tensor, Tensor)",
    _fake_bwd_apply,
)


# --- autograd --------------------------------------------------------------------------------------------


class BatchNormFunction(torch.autograd.Function):
    """Autograd of batch_norm; saves the input, the parameters, two fp32 numbers a channel, and of the residual a bit
    an element where the activation's derivative needs no more."""

    # The context is set up inside forward, as in LayerNormFunction, and for the same reason.

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: int,
        negative_slope: float,
        skip_nonfinite: bool,
    ) -> Any:
        output, statistics, signs = run_forward(
            *(input, residual, weight, bias, running_mean, running_var, training, momentum, eps),
            *(activation, negative_slope, skip_nonfinite),
            keep_signs=True,
        )
        save_context(ctx, input, residual, weight, bias, statistics, signs, activation, negative_slope)
        ctx.training, ctx.eps, ctx.run_backward = training, eps, batch_norm_bwd.route(input)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, residual, weight, bias, statistics, signs = ctx.saved_tensors
        wanted, grad_output = ctx.needs_input_grad[:4], grads[0]
        identity = ctx.activation == _activations.IDENTITY
        mask = (wanted[0], wanted[1] and not identity, wanted[2], wanted[3])
        run = ctx.run_backward
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Double backward: the same formula, in torch operations that reach back to the input.
            run = formula.batch_norm_bwd
            if ctx.training:
                statistics = formula.batch_norm_statistics(input, ctx.eps)
        else:
            grad_output = _channels.in_family(grad_output, ctx.rows)
        found = run(
            *(grad_output, input, residual, signs, statistics, weight, bias),
            *(ctx.training, ctx.activation, ctx.negative_slope, mask),
        )
        gradients = [gradient if asked else None for gradient, asked in zip(found, mask, strict=True)]
        if wanted[1] and identity:
            gradients[1] = grad_output
        return (*gradients, *(None,) * 8)


def save_context(
    ctx: Any,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    signs: torch.Tensor,
    activation: int,
    negative_slope: float,
) -> None:
    """Keep what a backward needs, and no more: of the residual its signs, itself, or nothing."""
    ctx.rows = _channels.family(input)
    kept_signs = None
    if residual is None or activation == _activations.IDENTITY:
        residual = None
    elif _activations.needs_sign_only(activation):
        residual, kept_signs = None, signs
    ctx.save_for_backward(input, residual, weight, bias, statistics, kept_signs)
    ctx.activation, ctx.negative_slope = activation, negative_slope


def run_forward(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
    skip_nonfinite: bool,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator of training or evaluation: output, statistics and signs."""
    if not training:
        return batch_norm_eval(  # type: ignore[no-any-return]
            *(input, residual, weight, bias, running_mean, running_var, eps),
            *(activation, negative_slope, keep_signs),
        )
    results = batch_norm_fwd(
        *(input, residual, weight, bias, running_mean, running_var, momentum, eps),
        *(activation, negative_slope, skip_nonfinite, keep_signs),
    )
    if running_mean is not None and running_var is not None and not torch.compiler.is_compiling():
        # An operator's mutation does not count as one for autograd by itself.
        torch.autograd.graph.increment_version((running_mean, running_var))
    return results  # type: ignore[no-any-return]


_apply = _norm.direct_apply(BatchNormFunction)


def recomputing() -> bool:
    """Whether this call runs inside a backward: then it is activation checkpointing that runs a forward again.

    Never so while tracing: in a compiled graph the update belongs to the forward, and is not computed again.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    skip_recompute: bool = False,
    skip_nonfinite: bool = False,
) -> torch.Tensor:
    r"""Normalise every channel over the batch, scale and shift it, add a residual and apply an activation.

    Equivalent to ``activation(torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training,
    momentum, eps) + residual)``.

    Formula::

        output = activation((input - mean) / sqrt(variance + eps) * weight + bias + residual)

    where
        - ``mean`` and ``variance`` (biased, from centred data) are taken over all dimensions but the second in
          training, and are ``running_mean`` and ``running_var`` in evaluation;
        - in training, running = (1 - momentum) * running + momentum * batch, in place, the batch's variance being the
          unbiased one there;
        - what is left out does nothing: a weight of 1, a bias and a residual of 0, the identity.

    Args:
        input: the tensor to normalise, float32, bfloat16, float16 or float64.
            Shape: ``(N, C, *)`` with any number of spatial dimensions. Contiguous and channels_last tensors, and
            slices of their channels, are read in place; other layouts are copied once with ``.contiguous()``.
        running_mean: the running mean, in any of float32, bfloat16 and float16 (float64 for float64 input); None: there
            is none (training only).
            Shape: ``(C,)``.
        running_var: the running variance, likewise.
            Shape: ``(C,)``.
        weight: the scale, in any of the three dtypes, whatever the input's.
            Shape: ``(C,)``.
        bias: the shift, likewise.
            Shape: ``(C,)``.
        training: whether the batch's own statistics are used, and the running ones updated.
        momentum: the share of the batch in the running statistics.
        eps: added to the variance, in the input's units squared.
        residual: added before the activation. In the input's dtype it is read in the same pass; where the dtypes differ
            both are widened first, which costs a pass of its own.
            Shape: the input's.
        activation: None, ``"identity"``, ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or
            ``"hardswish"``.
        negative_slope: of ``"leaky_relu"``.
        skip_recompute: leave the running statistics alone where this call runs inside a backward, as the second
            forward of activation checkpointing does; torch counts the batch twice there.
        skip_nonfinite: a channel whose batch mean or variance is not finite keeps its running statistics.

    Returns:
        A dense tensor of the input's shape and dtype, in channels_last if the input is, else contiguous.

    Raises:
        ValueError: one value a channel in training, an eps out of range, only one of the running statistics, an unknown
            activation (torch's texts where torch has the check).
        RuntimeError: shapes that do not fit (torch's texts); no running statistics in evaluation; a dtype or device
            that does not go with the input's; a backend asked for by name that cannot serve the call
            (``BackendUnavailable``).
        NotImplementedError: an input that is not floating point.
        TypeError: an argument of the wrong type.

    Accumulation is in fp32 (fp64 for fp64 input) and each output is rounded once. Deterministic: two runs give equal
    bits, forward and backward. Gradients are computed only for what requires them. Kept for backward: the input, two
    fp32 numbers a channel, and of the residual one bit an element for ``relu`` and ``leaky_relu``, the residual itself
    for the other activations, nothing for the identity; never what the activation is applied to. Differentiable twice;
    second derivatives, forward-mode differentiation and the transforms of ``torch.func`` run the plain PyTorch formula.

    Reference: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", 2015, arXiv:1502.03167.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            batch_norm,
            tensors,
            *(input, running_mean, running_var),
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
            skip_recompute=skip_recompute,
            skip_nonfinite=skip_nonfinite,
        )
    number = _activations.number("batch_norm", activation)
    _channel_checks.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual
    )
    if residual is not None and residual.dtype != input.dtype:
        wide = torch.promote_types(input.dtype, residual.dtype)
        output = batch_norm(
            *(input.to(wide), running_mean, running_var, weight, bias, training, momentum, eps),
            residual=residual.to(wide),
            activation=activation,
            negative_slope=negative_slope,
            skip_recompute=skip_recompute,
            skip_nonfinite=skip_nonfinite,
        )
        return output.to(input.dtype)
    if running_mean is not None and running_var is not None:
        given = running_mean, running_var
        if not (given[0].is_contiguous() and given[1].is_contiguous()):
            copies = given[0].contiguous(), given[1].contiguous()
            output = batch_norm(
                *(input, *copies, weight, bias, training, momentum, eps),
                residual=residual,
                activation=activation,
                negative_slope=negative_slope,
                skip_recompute=skip_recompute,
                skip_nonfinite=skip_nonfinite,
            )
            for running, copy in zip(given, copies, strict=True):
                if training and copy is not running:
                    running.copy_(copy)
            return output
    input, residual = laid_out(input, residual)
    weight, bias = contiguous(weight), contiguous(bias)
    if training and skip_recompute and recomputing():
        running_mean = running_var = None
    arguments = (
        *(input, residual, weight, bias, running_mean, running_var, training, momentum, eps),
        *(number, negative_slope, skip_nonfinite),
    )
    if _norm.transformed() or input.numel() == 0:
        return _by_formula(*arguments)
    if not _norm.recorded(input, residual, weight, bias):
        return run_forward(*arguments, keep_signs=False)[0]
    if torch.compiler.is_compiling():
        if residual is input:
            # Dynamo takes no tensor twice.
            arguments = (input, input.view_as(input), *arguments[2:])
        return BatchNormFunction.apply(*arguments)  # type: ignore[no-any-return]
    return _apply(*arguments)  # type: ignore[no-any-return]


def laid_out(input: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both as the operators take them: in one of the two families, the same one, copied once where they are not."""
    input = in_some_family(input)
    if residual is not None:
        residual = _channels.in_family(residual, _channels.family(input))
    return input, residual


def _by_formula(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
    skip_nonfinite: bool,
) -> torch.Tensor:
    """The call in plain, differentiable torch operations: for the transforms of torch.func, and for nothing at all."""
    statistics = None
    if not training:
        assert running_mean is not None
        assert running_var is not None
        statistics = formula.running_statistics(input, running_mean, running_var, eps)
    elif running_mean is not None and running_var is not None and input.numel() > 0:
        moments = formula.batch_norm_moments(input.detach())
        count = input.numel() // input.shape[1]
        formula.update_running_statistics(moments, count, running_mean, running_var, momentum, skip_nonfinite)
    return formula.batch_norm_formula(
        input, residual, weight, bias, statistics, eps, activation, negative_slope
    )
