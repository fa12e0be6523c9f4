"""The suite every op goes through, on whichever backend, device and dtype the command line names.

An op is described once, by an ``OpSpec``; a test file derives from ``OpSuite`` with that spec and adds what is
special to the op. ``check_case`` is the heart: it holds outputs, gradients and saved statistics against the exact
values, and it is what the deliberately wrong implementations under mutants/ must fail.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import fastreg
from cases import DATA, LAYOUTS, Case, Mix, Size, covering
from criterion import Exact, Rejected, check

Tensors = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class OpSpec:
    """What the suite needs to know about an op.

    Attributes:
        name: the op, which is also its name in ``fastreg.functional`` and the file stem.
        parameters: the learnable tensors, in the order of the operators' arguments.
        sizes, mixes, options: the levels that ``cases`` covers; a mix has one dtype for the input and each parameter.
        parameter_shape: the shape of a parameter in a case.
        exact: the exact values of "output", of "saved", a tuple of parts that the operator saves for backward, and of
            "grad_<name>" for the input and each parameter.
        forward: (case, tensors) to the arguments of ``fastreg::<name>_fwd``, laid out as that operator requires.
        backward: (case, tensors, saved) to the arguments of ``fastreg::<name>_bwd`` without the mask.
        split_saved: the saved tensor as the parts that ``exact`` describes, by name.
    """

    name: str
    parameters: tuple[str, ...]
    sizes: tuple[Size, ...]
    mixes: tuple[Mix, ...]
    options: tuple[Mapping[str, Any], ...]
    parameter_shape: Callable[[Case], tuple[int, ...]]
    exact: Callable[[Case, Tensors], dict[str, Exact]]
    forward: Callable[[Case, Tensors], tuple[Any, ...]]
    backward: Callable[[Case, Tensors, torch.Tensor], tuple[Any, ...]]
    split_saved: Callable[[torch.Tensor], dict[str, torch.Tensor]]

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return getattr(fastreg.functional, self.name)  # type: ignore[no-any-return]

    @property
    def torch_function(self) -> Callable[..., torch.Tensor]:
        return getattr(torch.nn.functional, self.name)  # type: ignore[no-any-return]

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("input", *self.parameters)


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset of ``names``, the full one first and the empty one last."""
    count = len(names)
    masks = sorted(range(2**count), key=lambda mask: -mask.bit_count())
    return [tuple(name for place, name in enumerate(names) if mask >> place & 1) for mask in masks]


def cases(spec: OpSpec, sparse: bool = False) -> list[Case]:
    """The covering choice of cases for an op, the ordinary ones first.

    ``sparse`` is for a backend a hundred times slower than the others: sizes then meet dtypes, layouts and wanted
    gradients by chance only, which more than halves the number of cases; all other pairs still occur.
    """
    by_chance = [("size", name) for name in ("mix", "layout", "grad_layout", "wanted")]
    choices = covering(
        {
            "size": spec.sizes,
            "mix": spec.mixes,
            "layout": [name for name in LAYOUTS if name != "scalar"],
            "grad_layout": list(LAYOUTS),
            "parameter_layout": ("contiguous", "unaligned", "columns"),
            "data": list(DATA),
            "wanted": subsets(spec.differentiable),
            "arguments": spec.options,
        },
        apart=by_chance if sparse else (),
    )
    chosen = [
        Case(**{**choice, "arguments": {**choice["size"].arguments, **choice["arguments"]}})
        for choice in choices
    ]
    return [plain_case(spec, size, spec.mixes[0]) for size in spec.sizes] + chosen


def plain_case(spec: OpSpec, size: Size, mix: Mix, **changes: Any) -> Case:
    """A contiguous case with every gradient asked for."""
    arguments = {**size.arguments, **changes.pop("arguments", {})}
    return Case(
        **{"size": size, "mix": mix, "arguments": arguments, "wanted": spec.differentiable, **changes}
    )


# --- one case ---------------------------------------------------------------------------------------------


def make_tensors(spec: OpSpec, case: Case, device: str = "cpu") -> Tensors:
    """Random input, parameters (never ones and zeros) and grad_output of a case; the same ones on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.name} {case}".encode()))

    def draw(shape: tuple[int, ...], dtype: torch.dtype, data: str, layout: str) -> torch.Tensor:
        values = DATA[data](shape, dtype, generator).to(dtype)
        return LAYOUTS[layout](values.to(device))

    tensors: Tensors = {"input": draw(case.size.shape, case.mix.input, case.data, case.layout)}
    for name, dtype in zip(spec.parameters, case.mix.dtypes[1:], strict=True):
        shape = spec.parameter_shape(case)
        tensors[name] = None if dtype is None else draw(shape, dtype, "plain", case.parameter_layout)
    tensors["grad_output"] = draw(case.size.shape, case.mix.input, "plain", case.grad_layout)
    return tensors


def wanted_names(case: Case, tensors: Tensors) -> tuple[str, ...]:
    return tuple(name for name in case.wanted if tensors[name] is not None)


def run(spec: OpSpec, case: Case, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The public function's output and the gradients that the case asks for."""
    wanted = wanted_names(case, tensors)
    leaves: dict[str, Any] = {}
    for name in spec.differentiable:
        tensor = tensors[name]
        leaves[name] = None if tensor is None else tensor.detach().requires_grad_(name in wanted)
    output = spec.function(**leaves, **case.arguments)
    results = {"output": output.detach()}
    if output.requires_grad != bool(wanted):
        raise Rejected(
            f"output.requires_grad is {output.requires_grad} where gradients are asked for {wanted}"
        )
    if wanted:
        gradients = torch.autograd.grad(output, [leaves[name] for name in wanted], tensors["grad_output"])
        results.update({f"grad_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)})
    return results


def run_operators(spec: OpSpec, case: Case, tensors: Tensors) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the operators ``fastreg::`` return for the case's mask: results named as in ``run``, and what was saved."""
    namespace = torch.ops.fastreg
    output, saved = getattr(namespace, f"{spec.name}_fwd")(*spec.forward(case, tensors))
    results = {"output": output}
    wanted = wanted_names(case, tensors)
    mask = [name in wanted for name in spec.differentiable]
    gradients = getattr(namespace, f"{spec.name}_bwd")(*spec.backward(case, tensors, saved), mask)
    for name, asked, gradient in zip(spec.differentiable, mask, gradients, strict=True):
        if asked:
            results[f"grad_{name}"] = gradient
        elif gradient.shape != (0,):
            raise Rejected(
                f"grad_{name} was not asked for, yet its shape is {tuple(gradient.shape)} instead of (0,)"
            )
    return results, saved


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality that tells 0 from -0 and lets NaN equal itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(as_integers), other.contiguous().view(as_integers))


def check_case(spec: OpSpec, case: Case, device: str = "cpu") -> None:
    """Raise ``Rejected`` where the op breaks its contract in this case."""
    check_tensors(spec, case, make_tensors(spec, case, device))


def check_tensors(spec: OpSpec, case: Case, tensors: Tensors) -> None:
    """``check_case`` for tensors of one's own, whatever the case says of layouts and data."""
    before = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    exact = spec.exact(case, tensors)
    with unwritten_memory_is_nan():
        results = run(spec, case, tensors)
        raw, saved = run_operators(spec, case, tensors)
    for name, tensor in before.items():
        now = tensors[name]
        if now is None or not same_bits(now, tensor):
            raise Rejected(f"{name} was written to")
    for name, result in results.items():
        check(name, result, exact[name])
        if name in ("output", "grad_input") and not result.is_contiguous():
            raise Rejected(f"{name} is not contiguous: strides {result.stride()}")
        # The operators are the second run of the same kernels on the same tensors.
        if not same_bits(result, raw[name]):
            raise Rejected(f"{name} differs between two runs")
    for name, part in spec.split_saved(saved).items():
        check(name, part, exact[name])


@contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN in here, so that an element which no kernel wrote shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)


class OpSuite:
    """The tests every op has. A subclass sets ``spec``; conftest.py parametrises ``case`` from it."""

    spec: ClassVar[OpSpec]

    def test_case(self, case: Case, device: str) -> None:
        check_case(self.spec, case, device)
