"""The part of shapes.py for dropout + residual + norm: its kernels on small shapes, by their operators.

Results are held to float64, those of the norm for the sum as it was rounded, as tests/dropout_add_norms.py does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from criterion import check
from dropout_add_norms import SEED, Branch, exact, make_tensors
from fastreg.backends.reference import dropout as formula
from fastreg.ops import _dropout_add_norm

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# The values on the device, by copies alone: ``copied`` of shapes.py.
Copy = Callable[[torch.Tensor], torch.Tensor]
_P = 0.3
# The defaults of the public functions.
_EPS = {"layer_norm": 1e-5, "rms_norm": torch.finfo(F32).eps}
_WANTED = ("input", "residual", "weight", "bias", "layer_scale")


def _branch(
    rows: int,
    columns: int,
    dtype: torch.dtype = BF16,
    residual: torch.dtype | None = None,
    absent: tuple[str, ...] = (),
    wanted: tuple[str, ...] = _WANTED,
    in_fp32: bool = False,
    prenorm: bool = True,
) -> Branch:
    return Branch(
        *(((rows,), (columns,)), dtype, residual or dtype, dtype, "contiguous", "contiguous", _P),
        *(False, prenorm, in_fp32, absent, wanted),
    )


_SCALES = ("layer_scale", "row_scale")
# For some 130 multiprocessors and clusters (sm_90): what the plans of csrc/cuda make of them, and whether at 16-byte
# addresses or an element behind them.
SHAPES: tuple[tuple[Branch, bool], ...] = (
    *((_branch(37, 8, absent=_SCALES), True), (_branch(21, 384), True), (_branch(21, 768, F32), True)),
    (_branch(300, 1000, F16, absent=_SCALES, prenorm=False), True),
    (_branch(300, 1000, BF16, F32), True),
    *((_branch(9, 4096, F32, absent=_SCALES), True), (_branch(140, 5120, in_fp32=True), True)),
    *((_branch(5, 5120, F16), True), (_branch(3, 20480), True), (_branch(140, 16640), True)),
    *((_branch(2, 66560, absent=_SCALES), True), (_branch(2, 66560, F32), True)),
    *((_branch(2, 98432), True), (_branch(1, 262400, F32), True)),
    # One-element packs.
    *((_branch(37, 3, F32), True), (_branch(21, 131), True), (_branch(21, 384), False)),
    *((_branch(9, 1027, F16, F32), True), (_branch(3, 8195, F16), True), (_branch(1, 131075), True)),
    # Not every gradient.
    (_branch(37, 768, absent=("weight", "bias"), wanted=("input",)), True),
    (_branch(37, 768, wanted=("residual", "layer_scale")), True),
)
REHEARSED = ((_branch(5, 8), True), (_branch(3, 131, BF16, F32, _SCALES), True))


def _run(name: str, branch: Branch, there: Copy) -> None:
    """Forward and backward of one case, or Rejected."""
    norm = _dropout_add_norm.NORMS[name]
    here = make_tensors(name, branch, "cpu")
    given = {key: there(values.contiguous()) for key, values in here.items()}
    threshold, seed = round(_P * 2**16), there(torch.tensor([SEED])).reshape(())
    parameters = norm.parameters(given.get("weight"), given.get("bias"))
    scales = (given.get("row_scale"), given.get("layer_scale"))
    output, total, statistics = norm.forward(
        *(given["input"], given.get("residual"), 1, *parameters, *scales, seed, threshold, None, _EPS[name]),
        *(branch.in_fp32, True),
    )
    wanted = [key in branch.wanted and key in given for key in _WANTED]
    if not norm.has_bias:
        del wanted[_WANTED.index("bias")]
    gradients = norm.backward(
        *(given["grad_output"], given.get("grad_sum"), total),
        *(given["input"] if wanted[-1] else None, 1, statistics, *parameters, *scales, seed, threshold, None),
        *(formula.DTYPES.index(branch.dtype), wanted),
    )
    expected = exact(name, branch, here, total.cpu())
    results = {"output": output, "sum": total}
    names = [key for key in _WANTED if norm.has_bias or key != "bias"]
    for key, gradient, asked in zip(names, gradients, wanted, strict=True):
        if asked:
            results[f"grad_{key}"] = gradient
    for key, result in results.items():
        # The operator's has the sum's dtype; autograd rounds it to the residual's.
        of_residual = {"dtype": branch.sum_dtype} if key == "grad_residual" else {}
        check(key, result.cpu(), replace(expected[key], **of_residual))


def cases(rehearsal: bool) -> Iterator[tuple[str, Callable[[Copy], None], bool]]:
    """Of every case its name, what runs it, and whether its tensors are aligned."""
    for branch, aligned in REHEARSED if rehearsal else SHAPES:
        for name, norm in _dropout_add_norm.NORMS.items():
            yield f"{norm.op} {branch}{'' if aligned else ' unaligned'}", partial(_run, name, branch), aligned
