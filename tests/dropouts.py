"""What every function of the dropout family must return: its cases, and the exact values from masks.py."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fastreg
from backend_under_test import dtypes_for
from cases import CHANNEL_LAYOUTS, LAYOUTS, SHORT, covering
from criterion import Exact, Rejected, check
from masks import keep_elements, keep_units, scale
from suite import same_bits, unwritten_memory_is_nan

HALF_LANES, LANES = 2**16, 2**32


@dataclass(frozen=True)
class Form:
    """A function with one kind of unit.

    Attributes:
        function: its name.
        shapes: what it is tested with.
        leading: for a shape's number of dimensions, how many of them tell units apart; None: elements.
        options: further arguments.
        adds: whether it takes a residual.
    """

    function: str
    shapes: tuple[tuple[int, ...], ...]
    leading: Callable[[int], int] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    adds: bool = False

    def __str__(self) -> str:
        return "-".join([self.function, *(f"{name}={value}" for name, value in self.options)])


_ANY = (
    (),
    (1,),
    (7,),
    (8,),
    (3, 17),
    (129,),
    (2, 3, 5, 7),
    (4, 257),
    (2, 8, 4, 4),
    (3, 2, 2, 3, 5),
    (3, 1000),
)
FORMS = (
    Form("dropout", _ANY),
    Form("dropout_add", _ANY, adds=True),
    Form("dropout1d", ((4, 5, 9), (5, 9), (3, 65, 1), (2, 3, 2048)), lambda dimensions: dimensions - 1),
    Form("dropout2d", ((2, 5, 7, 7), (3, 8, 4, 4), (1, 33, 1, 1), (2, 16, 3, 11)), lambda _: 2),
    Form("dropout3d", ((2, 3, 2, 4, 5), (3, 2, 4, 5), (2, 8, 1, 2, 4)), lambda dimensions: dimensions - 3),
    Form("drop_path", ((5, 3, 7), (4,), (6, 2, 3, 3), (9, 4, 128)), lambda _: 1),
    Form("drop_path", ((5, 3, 7), (6, 16, 4)), lambda _: 1, (("scale_by_keep", False),), adds=True),
    Form("drop_path", ((5, 3, 7), (6, 8, 3, 3), (2, 4, 136)), lambda _: 1, adds=True),
    Form("drop_path", ((5, 3, 7), (3, 8, 4, 4)), lambda _: 0, (("mode", "batch"),), adds=True),
)
_LAYOUTS = {
    "contiguous": LAYOUTS["contiguous"],
    "channels_last": lambda values: CHANNEL_LAYOUTS["channels_last"](values) if values.dim() > 2 else values,
    "transposed": lambda values: LAYOUTS["transposed"](values) if values.dim() > 1 else values,
    "unaligned": LAYOUTS["unaligned"],
    "sliced": lambda values: LAYOUTS["sliced_odd"](values) if values.dim() else values,
    "scalar": LAYOUTS["scalar"],
}
RATES = (0.1, 0.5, 0.9, 1.0, 0.0, 1e-6)
SEEDS = (0, 1, 2**40 + 7, -(2**63))


@dataclass(frozen=True)
class Drop:
    """Everything that decides one run. ``scales``: which of row_scale and layer_scale there are."""

    form: Form
    shape: tuple[int, ...]
    dtype: torch.dtype
    other: torch.dtype | None
    layout: str
    grad_layout: str
    p: float
    in_tensor: bool
    seed: int
    scales: tuple[str, ...] = ()
    inplace: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        residual = f"-r_{SHORT[self.other]}" if self.other is not None else ""
        parts = [f"-{name}" for name in self.scales] + (["-inplace"] if self.inplace else [])
        return (
            f"{self.form}-{shape}-{SHORT[self.dtype]}{residual}-{self.layout}-dy_{self.grad_layout}-p{self.p}"
            f"{'t' if self.in_tensor else ''}-s{self.seed}{''.join(parts)}"
        )

    @property
    def leading(self) -> int | None:
        return None if self.form.leading is None else self.form.leading(len(self.shape))

    @property
    def lanes(self) -> int:
        return HALF_LANES if self.leading is None else LANES


def drops(backend: str, device: str, only: str | None = None) -> list[Drop]:
    """The covering choice of cases for a backend."""
    dtypes = dtypes_for(backend, device, only)
    chosen: dict[str, Drop] = {}
    for form in FORMS:
        takes_scales = form.function == "dropout_add"
        choices = covering(
            {
                "shape": form.shapes,
                "dtype": dtypes,
                "other": ("same", "wide", "other") if form.adds else (None,),
                "layout": list(_LAYOUTS),
                "grad_layout": list(_LAYOUTS),
                "p": RATES,
                "in_tensor": (False, True),
                "seed": SEEDS,
                "scales": ((), ("row_scale",), ("layer_scale",), ("row_scale", "layer_scale"))
                if takes_scales
                else ((),),
                "inplace": (False, True) if not form.adds else (False,),
            },
            apart=[("grad_layout", "seed"), ("seed", "shape"), ("seed", "layout"), ("grad_layout", "p")],
            candidates=8,
        )
        for choice in choices:
            case = _sensible(form, choice)
            chosen[str(case)] = case
    return list(chosen.values())


def _sensible(form: Form, choice: dict[str, Any]) -> Drop:
    dtype, other = choice["dtype"], choice["other"]
    if other is not None:
        low = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        other = {"same": dtype, "wide": torch.float32, "other": low}[other]
        other = torch.float64 if dtype == torch.float64 else other
    scales = choice["scales"] if len(choice["shape"]) > 1 else ()
    inplace = choice["inplace"] and choice["layout"] != "scalar"
    return Drop(**{**choice, "form": form, "other": other, "scales": scales, "inplace": inplace})


# --- one case ---------------------------------------------------------------------------------------------


def make_tensors(case: Drop, device: str) -> dict[str, torch.Tensor]:
    """Random tensors of a case, the same ones on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
        values = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
        return _LAYOUTS[layout](values.to(dtype).to(device))

    tensors = {"input": draw(case.shape, case.dtype, case.layout)}
    if case.other is not None:
        tensors["residual"] = draw(case.shape, case.other, case.grad_layout)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    if "row_scale" in case.scales:
        tensors["row_scale"] = draw(case.shape[:1], wide, "unaligned")
    if "layer_scale" in case.scales:
        tensors["layer_scale"] = draw(case.shape[-1:], case.dtype, "unaligned")
    tensors["grad_output"] = draw(case.shape, output_dtype(case), case.grad_layout)
    return tensors


def output_dtype(case: Drop) -> torch.dtype:
    return case.dtype if case.other is None else torch.promote_types(case.dtype, case.other)


def threshold_of(case: Drop) -> int:
    """Half to even, as the contract has it."""
    return round(case.p * case.lanes)


def keep_of(case: Drop, input: torch.Tensor) -> torch.Tensor:
    threshold = threshold_of(case)
    if case.leading is not None:
        return keep_units(case.shape, case.leading, case.seed, threshold)
    # With a scale, other layouts are copied, and then positions are row-major.
    seen = input.contiguous() if case.scales else input
    return keep_elements(seen, case.seed, threshold)


def exact(case: Drop, tensors: dict[str, torch.Tensor]) -> dict[str, Exact]:
    """The exact output and gradients in float64."""
    wide = {name: tensor.detach().cpu().double() for name, tensor in tensors.items()}
    keep = keep_of(case, tensors["input"].cpu())
    rescales = dict(case.form.options).get("scale_by_keep", True)
    factor = torch.full(
        case.shape, scale(threshold_of(case), case.lanes) if rescales else 1.0, dtype=torch.float64
    )
    if "row_scale" in wide:
        factor = factor * wide["row_scale"].reshape(-1, *(1,) * (len(case.shape) - 1))
    without_layer_scale = torch.where(keep, factor, 0.0)
    factor = without_layer_scale * wide.get("layer_scale", torch.ones((), dtype=torch.float64))
    # A product is rounded at most three times in fp32, unless it is dropped: then nothing is off.
    branch = wide["input"] * factor
    terms = branch.abs() + wide["residual"].abs() if "residual" in wide else branch.abs()
    total = branch + wide["residual"] if "residual" in wide else branch
    grad_input = wide["grad_output"] * factor
    results = {
        "output": Exact(total, terms, output_dtype(case)),
        "grad_input": Exact(grad_input, grad_input.abs(), case.dtype),
    }
    if "residual" in wide:
        gradient = wide["grad_output"]
        results["grad_residual"] = Exact(gradient, torch.zeros_like(gradient), tensors["residual"].dtype)
    if "layer_scale" in wide:
        columns = (wide["grad_output"] * without_layer_scale * wide["input"]).reshape(-1, case.shape[-1])
        results["grad_layer_scale"] = Exact(
            columns.sum(0), columns.abs().sum(0), tensors["layer_scale"].dtype
        )
    return results


def run(case: Drop, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The public function's output and gradients."""
    function = getattr(fastreg.functional, case.form.function)
    names = [name for name in ("input", "residual", "layer_scale") if name in tensors]
    leaves = {name: tensors[name].detach().requires_grad_() for name in names}
    given = dict(leaves)
    if "row_scale" in tensors:
        given["row_scale"] = tensors["row_scale"]
    device = tensors["input"].device
    options: dict[str, Any] = dict(case.form.options)
    options["p"] = torch.tensor(case.p, dtype=torch.float64, device=device) if case.in_tensor else case.p
    if case.inplace:
        # Into a copy that is no leaf, laid out as the input.
        options["inplace"] = True
        copy = torch.empty_strided(case.shape, leaves["input"].stride(), dtype=case.dtype, device=device)
        given["input"] = copy.copy_(leaves["input"])
    output = function(**given, **options, seed=case.seed)
    if case.inplace and output is not given["input"]:
        raise Rejected("output is not the input, though inplace")
    gradients = torch.autograd.grad(output, list(leaves.values()), tensors["grad_output"])
    results = {"output": output.detach()}
    return results | {f"grad_{name}": each for name, each in zip(names, gradients, strict=True)}


def check_drop(case: Drop, device: str) -> None:
    """Raise ``Rejected`` where a function breaks its contract in this case."""
    tensors = make_tensors(case, device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = exact(case, tensors)
    with unwritten_memory_is_nan():
        results, again = run(case, tensors), run(case, tensors)
    for name, tensor in before.items():
        if not same_bits(tensors[name], tensor):
            raise Rejected(f"{name} was written to")
    if set(results) != set(expected):
        raise Rejected(f"results are {sorted(results)}, expected {sorted(expected)}")
    for name, result in results.items():
        check(name, result, expected[name])
        if not same_bits(result, again[name]):
            raise Rejected(f"{name} differs between two runs")
    dropped = ~keep_of(case, tensors["input"].cpu())
    zeros = {"grad_input"} if case.other is not None else {"output", "grad_input"}
    for name in zeros:
        if results[name].cpu()[dropped].ne(0).any():
            raise Rejected(f"{name} is not zero where a unit is dropped")
    _check_layout(case, tensors["input"], results["output"])


def _check_layout(case: Drop, input: torch.Tensor, output: torch.Tensor) -> None:
    if case.layout in ("contiguous", "unaligned") and not output.is_contiguous():
        raise Rejected(f"the output of a contiguous input has strides {output.stride()}")
    kept = case.layout == "channels_last" and not case.scales and case.leading in (None, 2)
    if kept and output.stride() != input.stride():
        raise Rejected(f"the output has strides {output.stride()}, the input {input.stride()}")
