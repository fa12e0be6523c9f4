"""Batch normalisation over the batches of all processes of a group: the collectives, autograd, the public function.

The kernels are the halves of batch_norm (moments, apply; sums, bwd_apply); what stands between them is here, in torch
operations on a few numbers a channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastreg import _activations, _channels
from fastreg.backends.reference import batch_norm as formula
from fastreg.ops import _channel_checks, _norm
from fastreg.ops._layout import contiguous
from fastreg.ops.batch_norm import (
    batch_norm,
    batch_norm_apply,
    batch_norm_bwd_apply,
    batch_norm_moments,
    batch_norm_sums,
    laid_out,
    recomputing,
    save_context,
)

# --- what the processes tell each other ------------------------------------------------------------------

# Every integer up to this one is an fp32 number; a count beyond it travels as two.
_COUNT_BASE = 2**24


def gather_moments(moments: torch.Tensor, count: int, group: Any) -> torch.Tensor:
    """Every process' moments and count, (processes, 2 C + 2), in the order of the ranks: one collective.

    It gathers and does not reduce, because the merge of moments is no sum: the deviations have to be taken from a mean
    that nobody knows yet. (Sums of x and of x^2 could be added, and would cancel.) What arrives has the same bits
    everywhere, and so has everything that is computed from it.
    """
    low, high = (moments.new_full((1,), part) for part in (count % _COUNT_BASE, count // _COUNT_BASE))
    own = torch.cat((moments.reshape(-1), low, high))
    world = distributed.get_world_size(group)
    # One dimension, not (processes, ...): gloo takes no other.
    gathered = own.new_empty(world * own.numel())
    # The name since torch 2.13, where the older one warns.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(gathered, own, group)
    return gathered.view(world, -1)


def merge_moments(gathered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sum of squared deviations over all processes, (2, C), and the total count, all in fp64.

    Chan's formula for several parts at once: M2 = sum of M2_r + n_r (mean_r - mean)^2. A process without values has the
    weight 0. fp64 is as quick as fp32 at this size, and holds the counts. What it cannot undo is the rounding of each
    mean_r to fp32: M2_r is about the rounded one, so the rounding enters times 2 n_r (mean_r - mean).
    """
    values = gathered.double()
    counts = values[:, -2:-1] + values[:, -1:] * _COUNT_BASE
    total = counts.sum()
    means, squares = values[:, :-2].unflatten(1, (2, -1)).unbind(1)
    mean = (means * (counts / total.clamp_min(1))).sum(0)
    squares = squares + (means - mean).square() * counts
    return torch.stack((mean, squares.sum(0))), total


def sum_over_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the processes, in place: one collective."""
    distributed.all_reduce(tensor, distributed.ReduceOp.SUM, group)
    return tensor


class SumOverGroupFunction(torch.autograd.Function):
    """``sum_over_group`` of a copy, differentiable any number of times: every process' part enters all the sums."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> Any:
        ctx.group = group
        return sum_over_group(tensor.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return SumOverGroupFunction.apply(grads[0], ctx.group), None


# --- autograd --------------------------------------------------------------------------------------------


class SyncBatchNormFunction(torch.autograd.Function):
    """Autograd of sync_batch_norm; saves what BatchNormFunction saves, and the total count."""

    @staticmethod
    def forward(
        ctx: Any,
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
        group: Any,
    ) -> Any:
        output, statistics, signs, total = run_forward(
            *(input, residual, weight, bias, running_mean, running_var, momentum, eps),
            *(activation, negative_slope, skip_nonfinite, group),
            keep_signs=True,
        )
        save_context(ctx, input, residual, weight, bias, statistics, signs, activation, negative_slope)
        ctx.total, ctx.eps, ctx.group = total.clamp_min(1), eps, group
        ctx.run_sums, ctx.run_apply = batch_norm_sums.route(input), batch_norm_bwd_apply.route(input)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, residual, weight, bias, statistics, signs = ctx.saved_tensors
        wanted, grad_output = ctx.needs_input_grad[:4], grads[0]
        identity = ctx.activation == _activations.IDENTITY
        run_sums, run_apply = ctx.run_sums, ctx.run_apply
        recorded = torch.is_grad_enabled()
        if recorded:
            # Double backward: the same formula, in torch operations that reach back to all processes' inputs.
            run_sums, run_apply = formula.batch_norm_sums, formula.batch_norm_bwd_apply
            if wanted[0]:
                statistics = _recorded_statistics(input, ctx.total, ctx.eps, ctx.group)
        else:
            grad_output = _channels.in_family(grad_output, ctx.rows)
        saved = (grad_output, input, residual, signs, statistics, weight, bias)
        chosen = (ctx.activation, ctx.negative_slope)
        gradients: list[torch.Tensor | None] = [None] * 4
        means = None
        if wanted[0] or wanted[2] or wanted[3]:
            sums = run_sums(*saved, *chosen)
            # Copies, since the sums are about to become everybody's; those of the parameters stay this process' own.
            for place, parameter, own in ((2, weight, sums[1]), (3, bias, sums[0])):
                if wanted[place]:
                    gradients[place] = own.to(parameter.dtype, copy=True)
            if wanted[0]:
                reduce = SumOverGroupFunction.apply if recorded else sum_over_group
                means = reduce(sums, ctx.group) / ctx.total
        mask = (wanted[0], wanted[1] and not identity)
        if any(mask):
            found = run_apply(*saved, means, *chosen, mask)
            gradients[:2] = [gradient if asked else None for gradient, asked in zip(found, mask, strict=True)]
        if wanted[1] and identity:
            gradients[1] = grad_output
        return (*gradients, *(None,) * 8)


def _recorded_statistics(input: torch.Tensor, total: torch.Tensor, eps: float, group: Any) -> torch.Tensor:
    """Mean and rstd over all processes once more, as a differentiable function of their inputs."""
    count = input.shape[0] * input.shape[2:].numel()
    own_mean, own_squares = formula.batch_norm_moments(input)
    mean = SumOverGroupFunction.apply(own_mean * count, group) / total
    squares = SumOverGroupFunction.apply(own_squares + (own_mean - mean).square() * count, group)
    return torch.stack((mean, torch.rsqrt(squares / total + eps)))


def run_forward(
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
    group: Any,
    keep_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, statistics, signs and the total count, a tensor: nothing here waits for a GPU."""
    count = input.shape[0] * input.shape[2:].numel()
    gathered = gather_moments(batch_norm_moments(input), count, group)
    moments, total = merge_moments(gathered)
    if running_mean is not None and running_var is not None:
        # An empty process cannot know whether the others are empty too, in which case nothing may change.
        before = None if count > 0 else (running_mean.clone(), running_var.clone())
        formula.update_running_statistics(moments, total, running_mean, running_var, momentum, skip_nonfinite)
        if before is not None:
            for running, old in zip((running_mean, running_var), before, strict=True):
                running.copy_(torch.where(total > 0, running, old))
    rstd = torch.rsqrt(moments[1] / total + eps)
    statistics = torch.stack((moments[0], rstd)).to(gathered.dtype)
    output, signs = batch_norm_apply(
        input, residual, weight, bias, statistics, activation, negative_slope, keep_signs
    )
    return output, statistics, signs, total


_apply = _norm.direct_apply(SyncBatchNormFunction)


def _run(*arguments: Any) -> torch.Tensor:
    if _norm.recorded(*arguments[:4]):
        return _apply(*arguments)  # type: ignore[no-any-return]
    without_signs = (*arguments, False)
    return run_forward(*without_signs)[0]


def synchronises(process_group: Any = None) -> bool:
    """Whether there are other processes to ask: torch.distributed is initialised, and the group has more than one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    # -1 for a process that is no member.
    return bool(distributed.get_world_size(process_group) > 1)


def sync_batch_norm(
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
    process_group: Any = None,
) -> torch.Tensor:
    r"""Normalise every channel over the batches of all processes, scale, shift, add a residual, apply an activation.

    Equivalent to ``batch_norm`` of the concatenation of all processes' inputs, of which each gets its part. In
    evaluation, in a group of one and without an initialised ``torch.distributed`` it is ``batch_norm``.

    Formula::

        output = activation((input - mean) / sqrt(variance + eps) * weight + bias + residual)

    where
        - ``mean`` and ``variance`` are taken over all dimensions but the second, and over the processes: each sends its
          count n_r, its mean_r and its sum of squared deviations M2_r, and variance = M2 / n with
          M2 = sum of M2_r + n_r (mean_r - mean)^2;
        - the running statistics, which must be equal in all processes before, are so afterwards, bit for bit.

    Forward takes one collective (an all-gather of 2 C + 2 numbers: a mean and an M2 a channel, and the count in two
    parts), backward one (an all-reduce of 2 C numbers), the latter where the input's gradient is wanted. Gradients of
    weight and bias are this process' own, which DistributedDataParallel and FSDP then average.

    All processes of the group have to make the call, with the same channels, accumulation dtype and options; a batch
    may have any size, also 0 or one value a channel. As with torch, a process whose input needs no gradient does not
    take part in the backward's collective, so either all inputs need one or none does. CPU tensors go over gloo, which
    torch's own layer refuses; CUDA tensors over NCCL, without waiting for the GPU.

    Args:
        input: this process' part of the batch, float32, bfloat16, float16 or float64.
            Shape: ``(N, C, *)``, N and the spatial sizes differing between processes as they may.
        running_mean, running_var, weight, bias: as in ``batch_norm``; equal in all processes.
            Shape: ``(C,)``.
        training: whether the batches' own statistics are used, and the running ones updated.
        momentum, eps: as in ``batch_norm``.
        residual: added before the activation.
            Shape: the input's.
        activation, negative_slope: as in ``batch_norm``.
        skip_recompute: as in ``batch_norm``; the recomputation exchanges the moments again.
        skip_nonfinite: a channel whose mean or variance over all processes is not finite keeps its running statistics.
        process_group: whose processes share their statistics; None: all of them.

    Returns:
        A dense tensor of the input's shape and dtype, in channels_last if the input is, else contiguous.

    Raises:
        ValueError: no channels; an eps out of range; only one of the running statistics; an unknown activation. One
            value a channel raises where there is no other process, as in torch; over several it is allowed, and if it
            is the only one of all, its output is the bias.
        RuntimeError: shapes, dtypes or devices that do not fit; forward-mode differentiation or a transform of
            ``torch.func`` in training over several processes, which the collectives have no rules for.
        NotImplementedError: an input that is not floating point.
        TypeError: an argument of the wrong type.

    An error that one process raises alone leaves the others waiting for it until their collective times out.

    Accumulation is in fp32 (fp64 for fp64 input), the merge in fp64; each output is rounded once. Deterministic: two
    runs of the same processes give equal bits, backward as far as the engine's all-reduce does. Differentiable twice,
    by the plain PyTorch formula and more collectives. ``torch.compile`` breaks the graph around a synchronised call.

    References: Ioffe and Szegedy, 2015, arXiv:1502.03167; Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", 1979.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            sync_batch_norm,
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
            process_group=process_group,
        )
    if not (training and synchronises(process_group)):
        return batch_norm(
            *(input, running_mean, running_var, weight, bias, training, momentum, eps),
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
            skip_recompute=skip_recompute,
            skip_nonfinite=skip_nonfinite,
        )
    number = _activations.number("sync_batch_norm", activation)
    _channel_checks.sync_batch_norm(input, running_mean, running_var, weight, bias, momentum, eps, residual)
    if _norm.transformed():
        raise RuntimeError(
            "sync_batch_norm: forward-mode differentiation and the transforms of torch.func cannot pass the "
            "collectives between processes; use reverse mode, or evaluation mode"
        )
    dtype = input.dtype
    if residual is not None and residual.dtype != dtype:
        wide = torch.promote_types(dtype, residual.dtype)
        input, residual = input.to(wide), residual.to(wide)
    input, residual = laid_out(input, residual)
    if skip_recompute and recomputing():
        running_mean = running_var = None
    # Dynamo leaves the collectives to eager mode.
    run = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run
    output = run(
        *(input, residual, contiguous(weight), contiguous(bias), running_mean, running_var, momentum, eps),
        *(number, negative_slope, skip_nonfinite, process_group),
    )
    return output.to(dtype)
