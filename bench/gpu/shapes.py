"""Runs every kernel of one backend on shapes small enough for compute-sanitizer, and holds the results to float64.

    python -m bench.gpu.shapes --backend native --device cuda

No torch kernel is launched on the device: what the tools report, fastreg's kernels did. Tensors are made on the CPU,
copied there and copied back, unaligned ones as views of a copied buffer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from bench.gpu.build import ROOT

sys.path.insert(0, str(ROOT / "tests"))

import suite
from bench.gpu import mask_shapes, sum_norm_shapes
from cases import Case, Mix, Size
from channel_norms import BATCH_NORM
from criterion import Rejected, check
from fastreg import backends
from group_norms import GROUP_NORM, INSTANCE_NORM
from norms import LAYER_NORM, RMS_NORM

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Shape:
    """Rows of columns, at 16-byte addresses or an element behind them."""

    rows: int
    columns: int
    dtype: torch.dtype = BF16
    aligned: bool = True

    def case(self, spec: suite.OpSpec, mixed: bool) -> Case:
        """The case, with parameters of other dtypes if ``mixed``."""
        dtypes = (F32, BF16) if mixed else (self.dtype,) * 2
        mix = Mix((self.dtype, *dtypes[: len(spec.parameters)]))
        size = Size((self.rows, self.columns), {"normalized_shape": (self.columns,)})
        return suite.plain_case(spec, size, mix)


@dataclass(frozen=True)
class Maps:
    """Samples of channels of something, likewise; ``options`` are the op's, ``residual`` is batch norm's alone."""

    shape: tuple[int, ...]
    dtype: torch.dtype = BF16
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)
    residual: bool = True
    aligned: bool = True

    def case(self, spec: suite.OpSpec, mixed: bool) -> Case:
        """The case, with parameters and running statistics of other dtypes if ``mixed``."""
        vectors = len(spec.parameters) + len(spec.buffers)
        dtypes: tuple[torch.dtype | None, ...] = (F32, BF16, F32, F32) if mixed else (self.dtype,) * 4
        options, wanted = self.options, spec.differentiable
        if spec is BATCH_NORM:
            vectors, dtypes = vectors + 1, (self.dtype if self.residual else None, *dtypes)
            options = {"training": True, **options}
            wanted = wanted if self.residual else ("input", *spec.parameters)
        mix = Mix((self.dtype, *dtypes[:vectors]))
        layouts = dict.fromkeys(("layout", "grad_layout", "companion_layout"), self.layout)
        return suite.plain_case(spec, Size(self.shape, options), mix, wanted=wanted, **layouts)


# For some 130 multiprocessors and clusters (sm_90): what the plan of csrc/cuda/layer_norm_plan.h makes of them.
# Triton's own families (short rows, whole rows by 1 to 32 warps, packed, looped, split backward) are among them.
SHAPES: tuple[Shape, ...] = (
    Shape(37, 8),  # part of a warp a row
    Shape(37, 32, F16),
    Shape(21, 384),  # a warp a row
    Shape(21, 768, F32),
    Shape(300, 1000),  # several rows a persistent block backward
    Shape(9, 4096, F32),  # a block or a small cluster a row
    Shape(140, 5120),  # a block a row, more rows than multiprocessors
    Shape(5, 5120, F16),  # a cluster a row, since there are few rows
    Shape(3, 20480),  # a cluster a row, since it is long
    Shape(140, 16640),  # the same, several rows a cluster
    Shape(2, 66560),  # sums in shared memory
    Shape(2, 66560, F32),
    Shape(2, 98432),  # looped backward
    Shape(1, 262400, F32),  # looped forward
    Shape(37, 3, F32),  # one-element packs, within a warp
    Shape(21, 131),
    Shape(21, 384, BF16, aligned=False),
    Shape(9, 1027),  # by a block
    Shape(3, 8195, F16),  # by a cluster
    Shape(1, 131075),  # looped
)
REHEARSED = (Shape(5, 8), Shape(3, 131), Shape(2, 1000, F32))

LAST = "channels_last"
RELU, SILU = {"activation": "relu"}, {"activation": "silu"}
EVALUATION = {"training": False}
# What csrc/cuda/batch_norm_plan.h and batch_norm_resident_plan.h make of them.
MAPS: tuple[Maps, ...] = (
    Maps((4, 8, 8, 8), options=RELU),  # planes on chip, a block a channel
    Maps((5, 3, 7, 7), F32, residual=False),  # odd planes
    Maps((32, 140, 14, 14), options=RELU),  # more channels than multiprocessors
    Maps((8, 4, 56, 56), F32, options=SILU),  # a cluster a channel, since there are few
    Maps((64, 3, 48, 48), F16, options=RELU),  # a cluster a channel, since it is long
    Maps((6, 2, 400, 400), options=RELU),  # streamed, many blocks a channel
    Maps((6, 2, 301, 301), F32, residual=False, options=RELU, aligned=False),
    Maps((4, 8, 9, 9), options={**EVALUATION, **RELU}),
    Maps((6, 5, 16, 16), F32, options=EVALUATION, residual=False),
    Maps((128, 64), F16, options=RELU),  # rows, a block
    Maps((65, 17), F32, residual=False),  # odd rows
    Maps((8, 64, 14, 14), layout=LAST, options=RELU),  # rows on chip, blocks that wait for each other
    Maps((16, 256, 14, 14), F32, layout=LAST, options=SILU),
    Maps((16, 320, 7, 7), F16, layout=LAST, residual=False),
    Maps((4, 131, 9, 9), layout=LAST, options=RELU),  # streamed, one-element packs
    Maps((4, 72, 9, 9), F32, layout=LAST, options={**EVALUATION, **SILU}),
    Maps((40, 16, 10, 10), layout=LAST, options=RELU, aligned=False),
)
# What csrc/cuda/group_norm_plan.h makes of them: a block a group, a cluster, parts of groups, rows of pixels.
GROUPS: tuple[Maps, ...] = tuple(
    Maps(shape, dtype, layout, {"num_groups": groups, **options})
    for shape, groups, dtype, layout, options in (
        ((2, 64, 8, 8), 32, BF16, "contiguous", SILU),  # a block a group
        ((3, 6, 7, 7), 2, F32, "contiguous", {}),  # odd planes
        ((1, 320, 32, 32), 32, BF16, "contiguous", SILU),  # few groups
        ((1, 128, 64, 64), 32, F32, "contiguous", RELU),
        ((1, 8, 300, 300), 2, BF16, "contiguous", SILU),  # in parts
        ((2, 6, 201, 201), 1, F16, "contiguous", RELU),
        ((40, 96), 8, F32, "contiguous", SILU),  # one pixel
        ((2, 64, 14, 14), 32, BF16, LAST, SILU),
        ((2, 320, 8, 8), 32, F32, LAST, RELU),
        ((1, 131, 9, 9), 1, F16, LAST, {}),  # one-element packs
        ((1, 128, 128, 128), 32, BF16, LAST, SILU),
    )
)
INSTANCES: tuple[Maps, ...] = (
    Maps((4, 8, 16, 16), options=RELU),
    Maps((2, 3, 9, 9), F32, options=SILU),
    Maps((2, 3, 200, 200), F16),
    Maps((2, 32, 12, 12), layout=LAST, options=RELU),
)
REHEARSED_GROUPS = (Maps((2, 8, 4, 4), options={"num_groups": 2, **SILU}),)
REHEARSED_INSTANCES = (Maps((2, 3, 3, 5), F32, layout=LAST),)
REHEARSED_MAPS = (Maps((3, 8, 4, 4), options=RELU), Maps((3, 8, 3, 5), F32, layout=LAST, residual=False))


def copied(values: torch.Tensor, device: str, aligned: bool) -> torch.Tensor:
    """The values on the device, by copies alone."""
    offset = 0 if aligned else 1
    # In the order in which they lie in memory, without gaps.
    lying = values.as_strided((values.numel(),), (1,))
    flat = torch.cat((values.new_zeros(offset), lying)).to(device)
    return flat.as_strided(values.shape, values.stride(), offset)


def cases(
    spec: suite.OpSpec, shapes: tuple[Shape, ...] | tuple[Maps, ...]
) -> Iterator[tuple[str, Case, Shape | Maps]]:
    """Every shape, with parameters of the input's dtype and of others in turn."""
    for place, shape in enumerate(shapes):
        case = shape.case(spec, mixed=place % 2 == 1)
        yield f"{spec.name} {case}{'' if shape.aligned else ' unaligned'}", case, shape
        if place % 5 == 0:
            name = f"{spec.name} {case} input alone"
            yield name, replace(case, wanted=("input",)), shape


def run(spec: suite.OpSpec, case: Case, aligned: bool, device: str) -> None:
    """One case, forward and backward, or Rejected."""
    here = suite.make_tensors(spec, case)
    there = {
        name: None if values is None else copied(values, device, aligned) for name, values in here.items()
    }
    results, saved = suite.run_operators(spec, case, there)
    exact = spec.exact(case, here)
    # Parts of a tensor are cut out on the CPU.
    saved = [each.cpu() for each in saved] if isinstance(saved, list | tuple) else saved.cpu()
    for key, result in {**results, **spec.split_saved(saved)}.items():
        check(key, result.cpu(), exact[key])


def everything(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """The name of every case of every op, and what runs it."""
    shapes, maps, groups, instances = SHAPES, MAPS, GROUPS, INSTANCES
    if device == "cpu":
        shapes, maps, groups, instances = REHEARSED, REHEARSED_MAPS, REHEARSED_GROUPS, REHEARSED_INSTANCES
    for spec, chosen in (
        *((LAYER_NORM, shapes), (RMS_NORM, shapes), (BATCH_NORM, maps)),
        *((GROUP_NORM, groups), (INSTANCE_NORM, instances)),
    ):
        for name, case, shape in cases(spec, chosen):
            yield name, partial(run, spec, case, shape.aligned, device)
    for part in (mask_shapes, sum_norm_shapes):
        for name, run_case, aligned in part.cases(rehearsal=device == "cpu"):
            yield name, partial(run_case, partial(copied, device=device, aligned=aligned))


def main() -> int:
    """Run all cases; 1 where a result is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=("native", "triton"), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cpu" and options.backend == "triton":
        import triton_interpreter

        triton_interpreter.install()
    count, wrong = 0, 0
    with backends.use(options.backend), torch.no_grad():
        for name, run_case in everything(options.device):
            count += 1
            try:
                run_case()
            except Rejected as rejection:
                wrong += 1
                print(f"wrong: {name}: {rejection}", flush=True)
            else:
                print(f"right: {name}", flush=True)
    print(f"{count - wrong} of {count} cases right", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
