"""The masks' part of shapes.py: the kernels of the dropout family and of DropBlock on small shapes, by their operators.

What they return is held to the reference's formula on the CPU: masks, counts and what a mask alone is applied to have
to be the same bits, sums are within the rounding budget of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch

from criterion import Exact, Rejected, check
from fastreg import _units
from fastreg.backends.reference import drop_block as block_formula
from fastreg.backends.reference import dropout as formula
from fastreg.ops import _drop_block, _dropout

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# The values on the device, by copies alone: ``copied`` of shapes.py.
Copy = Callable[[torch.Tensor], torch.Tensor]
_SEED = torch.tensor(2**40 + 7)


@dataclass(frozen=True)
class Drop:
    """What is dropped from, and what else a call has.

    Attributes:
        residual, wide: whether there is one, and whether it is in fp32.
        scales: row_scale and layer_scale.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = BF16
    unit: int = _units.ELEMENT
    residual: bool = False
    wide: bool = False
    scales: bool = False
    layout: str = "contiguous"
    inplace: bool = False
    aligned: bool = True

    def __str__(self) -> str:
        return _described("dropout", self, Drop(self.shape))


@dataclass(frozen=True)
class Blocks:
    """Maps and the blocks dropped from them."""

    shape: tuple[int, ...]
    block: tuple[int, ...]
    dtype: torch.dtype = BF16
    anywhere: bool = False
    shared: bool = False
    layout: str = "contiguous"
    inplace: bool = False
    aligned: bool = True

    def __str__(self) -> str:
        return _described("drop_block", self, Blocks(self.shape, self.block))


def _described(op: str, case: Drop | Blocks, plain: Drop | Blocks) -> str:
    """The shape, and whatever differs from a plain case."""
    words = [
        f"{field.name}={getattr(case, field.name)}"
        for field in fields(case)
        if getattr(case, field.name) != getattr(plain, field.name) or field.name in ("block", "dtype")
    ]
    return f"{op} {'x'.join(map(str, case.shape))} {' '.join(words)}".replace("torch.", "").replace(", ", "x")


LAST = "channels_last"
# What csrc/cuda/dropout_plan.h makes of them: tiles in packs or one by one, units, sums of columns.
DROPS: tuple[Drop, ...] = (
    Drop((37, 768)),  # whole tiles and a rest
    Drop((7,), F32),
    Drop((3, 129), F16),  # odd
    Drop((21, 384), aligned=False),
    Drop((21, 384), F32, inplace=True),
    Drop((37, 768), residual=True),
    Drop((21, 384), F16, residual=True, wide=True),
    Drop((37, 768), residual=True, scales=True),
    Drop((65, 131), F32, residual=True, scales=True),
    Drop((300, 1000), F16, scales=True),  # sums by many blocks
    Drop((9, 5, 264), F32, _units.SAMPLE, residual=True),
    Drop((7, 3, 43), BF16, _units.SAMPLE, aligned=False),
    Drop((6, 40, 8), BF16, _units.SAMPLE, residual=True, wide=True, scales=True),
    Drop((4, 24, 9, 8), BF16, _units.CHANNEL),
    Drop((4, 24, 9, 8), F32, _units.CHANNEL, layout=LAST),
    Drop((3, 131, 5, 3), F16, _units.CHANNEL, layout=LAST, inplace=True),
    Drop((4, 40, 8), BF16, _units.BATCH, residual=True),
    Drop((2, 16, 7, 7), F16, layout=LAST),
)
# What csrc/cuda/drop_block_plan.h makes of them: rows shorter and longer than a word of bits, blocks as large as maps.
BLOCKS: tuple[Blocks, ...] = (
    Blocks((4, 24, 14, 14), (7, 7)),
    Blocks((3, 8, 7, 7), (7, 7), F32),
    Blocks((2, 5, 9, 40), (3, 5), F16),
    Blocks((1, 3, 6, 70), (3, 33), F32, anywhere=True),
    Blocks((4, 24, 14, 14), (7, 7), anywhere=True, shared=True),
    Blocks((4, 24, 14, 14), (7, 7), layout=LAST),
    Blocks((2, 131, 9, 9), (4, 4), F16, layout=LAST, inplace=True),
    Blocks((3, 16, 28, 28), (7, 7), F32, inplace=True, aligned=False),
    Blocks((2, 6, 4, 9, 11), (2, 3, 7)),
    Blocks((3, 8, 14, 14), (6, 6), shared=True, layout=LAST),
    Blocks((40, 64, 7, 7), (3, 3)),  # more samples than a multiprocessor's blocks
)
REHEARSED: tuple[Drop | Blocks, ...] = (
    Drop((5, 40), residual=True, scales=True),
    Drop((3, 4, 5), F32, _units.SAMPLE),
    Blocks((2, 3, 8, 9), (3, 3), layout=LAST),
)


def _laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return values if layout != LAST else values.contiguous(memory_format=formats[values.dim()])


def _same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.stride() != expected.stride():
        raise Rejected(f"{name} has strides {found.stride()}, expected {expected.stride()}")
    if not torch.equal(found.cpu(), expected):
        raise Rejected(f"{name} has other bits than the reference's")


def _run_drop(case: Drop, there: Copy) -> None:
    """Forward and backward of one case, or Rejected."""
    generator = torch.Generator().manual_seed(sum(case.shape))

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return _laid_out(
            torch.randn(shape, generator=generator).to(dtype), case.layout if len(shape) > 2 else ""
        )

    output_dtype = F32 if case.wide else case.dtype
    input, grad_output = random(*case.shape), random(*case.shape, dtype=output_dtype)
    residual = random(*case.shape, dtype=output_dtype) if case.residual else None
    rows = random(*case.shape[:1], dtype=F32) if case.scales else None
    columns = random(*case.shape[-1:]) if case.scales else None
    threshold = round(0.3 * _units.lanes(case.unit))
    mask = (threshold, None, case.unit, True)
    here = (input, residual, rows, columns)
    on_device = [None if values is None else there(values) for values in here]
    seed = there(_SEED.reshape(1)).reshape(())
    wanted = (True, case.scales)
    backward = (*mask, formula.DTYPES.index(case.dtype), wanted)
    if case.inplace:
        _dropout.dropout_inplace(on_device[0], seed, *mask)
        output = on_device[0]
    else:
        output = _dropout.dropout_fwd(*on_device, seed, *mask)
    gradients = _dropout.dropout_bwd(
        there(grad_output),
        on_device[0] if case.scales and not case.inplace else None,
        *on_device[2:],
        seed,
        *backward,
    )
    if residual is None and not case.scales:
        _same("output", output, formula.dropout_fwd(*here, _SEED, *mask))
        expected, _ = formula.dropout_bwd(grad_output, None, None, None, _SEED, *backward)
        _same("grad_input", gradients[0], expected)
        return
    value, terms = (
        formula.dropout_fwd(
            *(None if values is None else change(values.double()) for values in here), _SEED, *mask
        )
        for change in (torch.Tensor.clone, torch.Tensor.abs)
    )
    check("output", output.cpu(), Exact(value, terms, output_dtype))
    in_double = (*mask, formula.DTYPES.index(torch.float64), wanted)
    values, sums = (
        formula.dropout_bwd(
            *(
                None if each is None else change(each.double())
                for each in (grad_output, input if case.scales else None, rows, columns)
            ),
            *(_SEED, *in_double),
        )
        for change in (torch.Tensor.clone, torch.Tensor.abs)
    )
    check("grad_input", gradients[0].cpu(), Exact(values[0], sums[0], case.dtype))
    if case.scales:
        check("grad_layer_scale", gradients[1].cpu(), Exact(values[1], sums[1], case.dtype))


def _run_blocks(case: Blocks, there: Copy) -> None:
    """The mask of one case and what it is applied to, or Rejected."""
    shape = (case.shape[0], 1 if case.shared else case.shape[1], *case.shape[2:])
    arguments = (shape, case.block, round(0.02 * _units.LANES), None, case.anywhere)
    expected_bits, expected_counts = block_formula.drop_block_mask(_SEED, *arguments)
    seed = there(_SEED.reshape(1)).reshape(())
    bits, counts = _drop_block.drop_block_mask(seed, *arguments)
    _same("bits", bits, expected_bits)
    _same("counts", counts, expected_counts)
    values = torch.randn(case.shape, generator=torch.Generator().manual_seed(sum(case.shape))).to(case.dtype)
    input = _laid_out(values, case.layout)
    # One for all, and one for each sample.
    for scale in (torch.tensor([1.25], dtype=torch.float64), torch.linspace(0.5, 2, case.shape[0]).double()):
        output = there(input)
        if case.inplace:
            _drop_block.drop_block_inplace(output, bits, there(scale))
        else:
            output = _drop_block.drop_block_apply(output, bits, there(scale))
        _same("output", output, block_formula.drop_block_apply(input, expected_bits, scale))


def cases(rehearsal: bool) -> Iterator[tuple[str, Callable[[Copy], None], bool]]:
    """Of every case its name, what runs it, and whether its tensors are aligned."""
    for case in REHEARSED if rehearsal else (*DROPS, *BLOCKS):
        if isinstance(case, Drop):
            yield str(case), lambda there, case=case: _run_drop(case, there), case.aligned
        else:
            yield str(case), lambda there, case=case: _run_blocks(case, there), case.aligned
