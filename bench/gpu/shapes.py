"""Runs every kernel of one backend on shapes small enough for compute-sanitizer, and holds the results to float64.

    python -m bench.gpu.shapes --backend native --device cuda

No torch kernel is launched on the device: what the tools report, fastreg's kernels did. Tensors are made on the CPU,
copied there and copied back, unaligned ones as views of a copied buffer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bench.gpu.build import ROOT

sys.path.insert(0, str(ROOT / "tests"))

import suite
from cases import Case, Mix, Size
from criterion import Rejected, check
from fastreg import backends
from norms import LAYER_NORM, RMS_NORM

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Shape:
    """Rows of columns, at 16-byte addresses or an element behind them."""

    rows: int
    columns: int
    dtype: torch.dtype = BF16
    aligned: bool = True


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


def copied(values: torch.Tensor, device: str, aligned: bool) -> torch.Tensor:
    """The values on the device, by copies alone."""
    if aligned:
        return values.contiguous().to(device)
    flat = torch.cat((values.new_zeros(1), values.flatten()))
    return flat.to(device)[1:].view(values.shape)


def cases(spec: suite.OpSpec, shapes: tuple[Shape, ...]) -> Iterator[tuple[str, Case, Shape]]:
    """Every shape, with parameters of the input's dtype and of others in turn."""
    for place, shape in enumerate(shapes):
        mixed = (F32, BF16) if place % 2 else (shape.dtype,) * 2
        mix = Mix((shape.dtype, *mixed[: len(spec.parameters)]))
        size = Size((shape.rows, shape.columns), {"normalized_shape": (shape.columns,)})
        case = suite.plain_case(spec, size, mix)
        yield f"{spec.name} {case}{'' if shape.aligned else ' unaligned'}", case, shape
        if place % 5 == 0:
            name = f"{spec.name} {case} input alone"
            yield name, replace(case, wanted=("input",)), shape


def run(spec: suite.OpSpec, case: Case, shape: Shape, device: str) -> None:
    """One case, forward and backward, or Rejected."""
    here = suite.make_tensors(spec, case)
    there = {
        name: None if values is None else copied(values, device, shape.aligned)
        for name, values in here.items()
    }
    results, saved = suite.run_operators(spec, case, there)
    exact = spec.exact(case, here)
    # Parts of a tensor are cut out on the CPU.
    for key, result in {**results, **spec.split_saved(saved.cpu())}.items():
        check(key, result.cpu(), exact[key])


def main() -> int:
    """Run all cases; 1 where a result is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=("native", "triton"), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    shapes = SHAPES
    if options.device == "cpu":
        shapes = REHEARSED
        if options.backend == "triton":
            import triton_interpreter

            triton_interpreter.install()
    count, wrong = 0, 0
    with backends.use(options.backend), torch.no_grad():
        for spec in (LAYER_NORM, RMS_NORM):
            for name, case, shape in cases(spec, shapes):
                count += 1
                try:
                    run(spec, case, shape, options.device)
                except Rejected as rejection:
                    wrong += 1
                    print(f"wrong: {name}: {rejection}", flush=True)
                else:
                    print(f"right: {name}", flush=True)
    print(f"{count - wrong} of {count} cases right", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
