"""The suite every op goes through, on whichever backend, device and dtype the command line names.

An op is described once, by an ``OpSpec``; a test file derives from ``OpSuite`` with that spec and adds what is
special to the op. ``check_case`` is the heart: it holds outputs, gradients and saved statistics against the exact
values, and it is what the deliberately wrong implementations under mutants/ must fail.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

import fastreg
from cases import DATA, LAYOUTS, Case, Mix, Size, covering
from criterion import Exact, Rejected, check

Tensors = dict[str, torch.Tensor | None]


def _contiguous(name: str, result: torch.Tensor, tensors: Tensors) -> bool:
    return name not in ("output", "grad_input") or result.is_contiguous()


@dataclass(frozen=True)
class OpSpec:
    """What the suite needs to know about an op.

    Attributes:
        name: the op, which is also its name in ``fastreg.functional`` and the file stem.
        parameters: the learnable tensors, in the order of the operators' arguments.
        sizes, mixes, options: the levels that ``cases`` covers; a mix has one dtype for the input, each companion,
            parameter and buffer.
        parameter_shape: the shape of a parameter or buffer in a case.
        exact: the exact values of "output", of the parts of what the operator saves for backward, of the buffers
            afterwards, and of "grad_<name>" for the input, each companion and each parameter.
        forward: (case, tensors) to the arguments of the forward operator, laid out as that operator requires.
        backward: (case, tensors, saved) to the arguments of the backward operator without the mask.
        split_saved: what was saved as the parts that ``exact`` describes, by name.
        size: (rows, columns) to a two-dimensional size with columns parameters.
        call: (function, input, parameters in order, options) to the function over the input's last dimension.
        companions: other inputs of the input's shape, differentiable as it is.
        buffers: tensors shaped as a parameter that a forward may change.
        layouts: the layouts that ``cases`` covers.
        wanted: the sets of gradients that ``cases`` covers; all if None.
        forward_operator: (case) to the forward operator's name; ``<name>_fwd`` if None.
        backward_operator: the backward operator's name; ``<name>_bwd`` if None.
        spared: pairs of factors whose levels meet in ``cases`` by chance only.
        passed_on: (case) to the tensors whose gradient is grad_output itself, which no operator is asked for.
        laid_out: (name, result, tensors) to whether a result lies in memory as it must.
        sensible: a case to the nearest one that means something.
    """

    name: str
    parameters: tuple[str, ...]
    sizes: tuple[Size, ...]
    mixes: tuple[Mix, ...]
    options: tuple[Mapping[str, Any], ...]
    parameter_shape: Callable[[Case], tuple[int, ...]]
    exact: Callable[[Case, Tensors], dict[str, Exact]]
    forward: Callable[[Case, Tensors], tuple[Any, ...]]
    backward: Callable[[Case, Tensors, Any], tuple[Any, ...]]
    split_saved: Callable[[Any], dict[str, torch.Tensor]]
    size: Callable[[int, int], Size]
    call: Callable[..., torch.Tensor]
    companions: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    layouts: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=lambda: LAYOUTS)
    wanted: Sequence[tuple[str, ...]] | None = None
    forward_operator: Callable[[Case], str] | None = None
    backward_operator: str | None = None
    spared: Collection[tuple[str, str]] = ()
    passed_on: Callable[[Case], Collection[str]] = lambda case: ()
    laid_out: Callable[[str, torch.Tensor, Tensors], bool] = _contiguous
    sensible: Callable[[Case], Case] = lambda case: case

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return getattr(fastreg.functional, self.name)  # type: ignore[no-any-return]

    @property
    def torch_function(self) -> Callable[..., torch.Tensor]:
        return getattr(torch.nn.functional, self.name)  # type: ignore[no-any-return]

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("input", *self.companions, *self.parameters)

    def operators(self, case: Case) -> tuple[str, str]:
        """The names of the operators of a case, forward and backward."""
        forward = f"{self.name}_fwd" if self.forward_operator is None else self.forward_operator(case)
        return forward, self.backward_operator or f"{self.name}_bwd"

    def mix(self, dtype: torch.dtype) -> Mix:
        """One dtype for everything."""
        return Mix((dtype,) * (len(self.differentiable) + len(self.buffers)))


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
    input_layouts = [name for name in spec.layouts if name != "scalar"]
    factors = {
        "size": spec.sizes,
        "mix": spec.mixes,
        "layout": input_layouts,
        "grad_layout": list(spec.layouts),
        "parameter_layout": ("contiguous", "unaligned", "columns"),
        "data": list(DATA),
        "wanted": spec.wanted or subsets(spec.differentiable),
        "arguments": spec.options,
    }
    if spec.companions:
        factors["companion_layout"] = input_layouts
        by_chance.append(("size", "companion_layout"))
    choices = covering(factors, apart=[*spec.spared, *(by_chance if sparse else ())])
    chosen = [
        spec.sensible(Case(**{**choice, "arguments": {**choice["size"].arguments, **choice["arguments"]}}))
        for choice in choices
    ]
    plain = [plain_case(spec, size, spec.mixes[0]) for size in spec.sizes]
    # By name, since two cases may have the same sensible one.
    return list({str(case): case for case in plain + chosen}.values())


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
        return spec.layouts[layout](values.to(device))

    tensors: Tensors = {"input": draw(case.size.shape, case.mix.input, case.data, case.layout)}
    others = (*spec.companions, *spec.parameters, *spec.buffers)
    for name, dtype in zip(others, case.mix.dtypes[1:], strict=True):
        if dtype is None:
            tensors[name] = None
        elif name in spec.companions:
            tensors[name] = draw(case.size.shape, dtype, "plain", case.companion_layout)
        else:
            # A running mean is of the size of the input's.
            data = case.data if name.endswith("mean") else "plain"
            values = DATA[data](spec.parameter_shape(case), dtype, generator).to(dtype)
            layout = LAYOUTS[case.parameter_layout]
            # A variance is positive.
            tensors[name] = layout((values.abs() + 0.1 if name.endswith("var") else values).to(device))
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
    with buffers_restored(spec, tensors) as after:
        output = spec.function(**leaves, **{name: tensors[name] for name in spec.buffers}, **case.arguments)
    results = {"output": output.detach(), **after}
    if output.requires_grad != bool(wanted):
        raise Rejected(
            f"output.requires_grad is {output.requires_grad} where gradients are asked for {wanted}"
        )
    if wanted:
        gradients = torch.autograd.grad(output, [leaves[name] for name in wanted], tensors["grad_output"])
        results.update({f"grad_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)})
    return results


@contextmanager
def buffers_restored(spec: OpSpec, tensors: Tensors) -> Iterator[dict[str, torch.Tensor]]:
    """Afterwards the buffers hold what they held before; what they held in between is in the dictionary."""
    given = {name: buffer for name in spec.buffers if (buffer := tensors[name]) is not None}
    before = {name: buffer.clone() for name, buffer in given.items()}
    after: dict[str, torch.Tensor] = {}
    try:
        yield after
    finally:
        for name, buffer in given.items():
            after[name] = buffer.clone()
            buffer.copy_(before[name])


def run_operators(spec: OpSpec, case: Case, tensors: Tensors) -> tuple[dict[str, torch.Tensor], Any]:
    """What the operators ``fastreg::`` return for the case's mask: results named as in ``run``, and what was saved.

    That is one tensor, or a list of them if the forward operator returns more than one beside the output.
    """
    forward, backward = (getattr(torch.ops.fastreg, name) for name in spec.operators(case))
    buffers = {name: buffer.contiguous() for name in spec.buffers if (buffer := tensors[name]) is not None}
    given: Tensors = {**tensors, **buffers}
    with buffers_restored(spec, given) as after:
        output, *saved = forward(*spec.forward(case, given))
    saved = saved[0] if len(saved) == 1 else saved
    results = {"output": output, **after}
    wanted, passed_on = wanted_names(case, tensors), spec.passed_on(case)
    results.update({f"grad_{name}": tensors["grad_output"] for name in passed_on if name in wanted})  # type: ignore[misc]
    mask = [name in wanted and name not in passed_on for name in spec.differentiable]
    gradients = backward(*spec.backward(case, tensors, saved), mask)
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
        if not spec.laid_out(name, result, tensors):
            raise Rejected(f"{name} is not laid out as it should be: strides {result.stride()}")
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
