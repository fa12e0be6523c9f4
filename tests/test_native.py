"""The compiled library itself: its schemas, the checks at its doors, and the kernels of every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cases import Case
from channel_norms import BATCH_NORM
from fastreg import _library
from instruction_sets import LEVELS, has, kernels_of
from specs import ROW_NORMS, SPECS
from suite import OpSpec, cases, check_case, make_tensors, plain_case

pytestmark = pytest.mark.only(backend="native")

each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def native(name: str) -> Any:
    return getattr(torch.ops.fastreg_native, name).default


def test_the_loaded_schemas_are_those_of_python() -> None:
    for name, operator in _library.OPERATORS.items():
        assert str(native(name)._schema) == str(operator.overload._schema).replace(
            "fastreg::", "fastreg_native::"
        )


# --- doors ---


def arguments(spec: OpSpec, device: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of both operators by name, with some changed."""
    case: Case = plain_case(spec, spec.size(6, 40), spec.mix(torch.float32))
    tensors = make_tensors(spec, case, device)
    _, *saved = native(f"{spec.name}_fwd")(*spec.forward(case, tensors))
    both = []
    for direction, given in (
        ("fwd", spec.forward(case, tensors)),
        (
            "bwd",
            (
                *spec.backward(case, tensors, saved[0] if len(saved) == 1 else saved),
                [True] * len(spec.differentiable),
            ),
        ),
    ):
        names = [argument.name for argument in native(f"{spec.name}_{direction}")._schema.arguments]
        named = dict(zip(names, given, strict=True))
        both.append({**named, **{name: value for name, value in changes.items() if name in names}})
    return both[0], both[1]


def on_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The same on a device, the distances between its elements included, which ``to`` closes up."""
    extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.as_strided((extent,), (1,)).to(device).as_strided(tensor.shape, tensor.stride())


ROWS = torch.randn(40, 6)
REFUSED = {
    "input of columns": ({"input": ROWS.t()}, "input cannot be viewed as rows of 40 adjacent elements"),
    "grad_output of columns": ({"grad_output": ROWS.t()}, "grad_output cannot be viewed as rows of 40"),
    "every second element": ({"input": torch.randn(6, 80)[:, ::2]}, "input cannot be viewed as rows"),
    "integers": ({"input": torch.ones(6, 40, dtype=torch.int64)}, "input must be float32, bfloat16, float16"),
    "too few normalised dimensions": ({"normalized_ndim": 0}, "normalized_ndim must be between 1 and .* 2"),
    "too many normalised dimensions": ({"normalized_ndim": 3}, "normalized_ndim must be between 1 and .* 2"),
    "a short weight": ({"weight": torch.ones(39)}, "weight must have 40 elements, but has 39"),
    "a scattered weight": ({"weight": torch.ones(80)[::2]}, "weight must be contiguous"),
    "a weight of integers": ({"weight": torch.ones(40, dtype=torch.int32)}, "weight must be float32"),
    "a weight of doubles": (
        {"weight": torch.ones(40, dtype=torch.float64)},
        "weight is float64 but input is float32",
    ),
    "grad_output of another dtype": (
        {"grad_output": torch.ones(6, 40).half()},
        "grad_output must have the shape, dtype",
    ),
    "grad_output of another shape": (
        {"grad_output": torch.ones(7, 40)},
        "grad_output must have the shape, dtype",
    ),
    "statistics of another dtype": ({"statistics": torch.ones(12).bfloat16()}, "statistics must"),
    "too few statistics": ({"statistics": torch.ones(5)}, "statistics must have .* elements, but has 5"),
    "the gradient of no weight": (
        {"weight": None},
        "output_mask asks for the gradient of weight, which was not given",
    ),
}


REFUSED_BY_CHANNEL_NORMS = {
    **{
        name: (changes, message)
        for name, (changes, message) in REFUSED.items()
        if "columns" not in name and "normalised" not in name and "every second" not in name
    },
    "input of columns": ({"input": ROWS.t()}, "input cannot be viewed as rows of adjacent channels"),
    "grad_output of columns": (
        {"grad_output": ROWS.t()},
        "grad_output cannot be viewed as rows .* as input is",
    ),
    "residual of columns": ({"residual": ROWS.t()}, "residual cannot be viewed as rows .* as input is"),
    "every second element": ({"input": torch.randn(6, 80)[:, ::2]}, "input cannot be viewed as rows"),
    "residual of another dtype": (
        {"residual": torch.ones(6, 40).half()},
        "residual must have the shape, dtype",
    ),
    "residual of another shape": ({"residual": torch.ones(6, 1, 40)}, "residual must have the shape, dtype"),
    "one dimension": ({"input": torch.ones(40)}, "input must have at least 2 dimensions, but has 1"),
    "an activation that there is not": (
        {"activation": 7},
        "activation must be a number from 0 to 6, but is 7",
    ),
    "a short running mean": (
        {"running_mean": torch.ones(39)},
        "running_mean must have 40 elements, but has 39",
    ),
    "a scattered running variance": ({"running_var": torch.ones(80)[::2]}, "running_var must be contiguous"),
    "too few signs": (
        {"residual": None, "activation": 1, "signs": torch.ones(29, dtype=torch.uint8)},
        "signs must be uint8, of 30 bytes",
    ),
    "signs of floats": ({"residual": None, "activation": 1, "signs": torch.ones(30)}, "signs must be uint8"),
    "signs of what is no matter of signs": (
        {"signs": torch.ones(30, dtype=torch.uint8)},
        "signs .* activation",
    ),
}
BROKEN = [(spec, name) for spec in ROW_NORMS for name in REFUSED] + [
    (BATCH_NORM, name) for name in REFUSED_BY_CHANNEL_NORMS
]


@pytest.mark.parametrize(
    ("spec", "name"), BROKEN, ids=lambda each: each if isinstance(each, str) else each.name
)
def test_a_broken_contract_is_refused_at_the_door(spec: OpSpec, name: str, device: str) -> None:
    """ops/ never passes any of these on; a caller of the operators might."""
    changes, message = (REFUSED_BY_CHANNEL_NORMS if spec is BATCH_NORM else REFUSED)[name]
    changes = {
        name: on_device(each, device) if isinstance(each, torch.Tensor) else each
        for name, each in changes.items()
    }
    refused = 0
    for direction, given in zip(("fwd", "bwd"), arguments(spec, device, **changes), strict=True):
        # A missing weight is only wrong where its gradient is asked for, and so on.
        if not (set(changes) & set(given)) or (
            direction == "fwd" and ("output_mask" in message or "signs" in changes)
        ):
            continue
        with pytest.raises(RuntimeError, match=f"fastreg_native::{spec.name}.*{message}"):
            native(f"{spec.name}_{direction}")(**given)
        refused += 1
    assert refused >= 1


# --- instruction sets ---


@pytest.mark.only(backend="native", device="cpu")
@each_spec
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_keeps_the_contract(spec: OpSpec, level: str) -> None:
    """On a processor without it, asking for an instruction set is an error and changes nothing."""
    before = torch.ops.fastreg_native.simd()
    if not has(level):
        with pytest.raises(RuntimeError, match=f"does not have {level}"):
            torch.ops.fastreg_native.set_simd(level)
        assert torch.ops.fastreg_native.simd() == before
        return
    with kernels_of(level):
        for case in cases(spec, sparse=True):
            check_case(spec, case)


@pytest.mark.only(backend="native", device="cpu")
def test_the_widest_instruction_set_is_chosen_and_unknown_ones_are_refused() -> None:
    assert torch.ops.fastreg_native.simd() == [level for level in LEVELS if has(level)][-1]
    with pytest.raises(RuntimeError, match="expected baseline, avx2 or avx512, but got sse"):
        torch.ops.fastreg_native.set_simd("sse")
