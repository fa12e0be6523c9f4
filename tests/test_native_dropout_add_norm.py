"""Dropout, residual and norm in one CPU kernel: every kernel instance, and the ways that only some shapes take."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from criterion import Exact, check
from fastreg.backends.reference import _philox
from fastreg.backends.reference.dropout import DTYPES
from instruction_sets import LEVELS, has, kernels_of
from masks import keep_elements, scale
from suite import same_bits, unwritten_memory_is_nan

pytestmark = pytest.mark.only(backend="native", device="cpu")

each_level = pytest.mark.parametrize("level", [level for level in LEVELS if has(level)])
each_norm = pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LANES, EPS = 2**16, 1e-5
# The types of input, residual and sum: each pair of the first and the last is a kernel.
TYPES = {
    "float32": (F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16),
    "bfloat16, sum in float32": (BF16, BF16, F32),
    "bfloat16, residual in float32": (BF16, F32, F32),
    "float16": (F16, F16, F16),
    "float16, sum in float32": (F16, F16, F32),
    "float16, residual in float32": (F16, F32, F32),
    "float64": (F64, F64, F64),
}
each_type = pytest.mark.parametrize("types", TYPES.values(), ids=list(TYPES))

Tensors = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Problem:
    """Everything that decides one call.

    Attributes:
        norm: the norm alone.
        shape: the input's; its last dimension is the row.
        types: of input, residual (None: no residual) and sum.
        absent: which of weight, bias, row_scale and layer_scale there are not.
        leading: how many dimensions row_scale has.
        threshold: lanes out of 2^16 that are dropped; None: no mask.
        dynamic: the threshold is in a tensor.
    """

    norm: str
    shape: tuple[int, ...]
    types: tuple[torch.dtype, torch.dtype | None, torch.dtype] = TYPES["float32"]
    absent: tuple[str, ...] = ()
    leading: int = 1
    threshold: int | None = 20000
    dynamic: bool = False
    seed: int = 2**40 + 7

    @property
    def results(self) -> tuple[str, ...]:
        """What can have a gradient, in the order of the operators."""
        bias = ("bias",) if self.norm == "layer_norm" else ()
        return ("input", "residual", "weight", *bias, "layer_scale")

    @property
    def rows(self) -> int:
        return torch.Size(self.shape[:-1]).numel()


def make(problem: Problem) -> Tensors:
    """Random tensors of a problem, the same ones on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(problem).encode()))
    kind, residual, total = problem.types
    columns = problem.shape[-1:]
    low = {F32: BF16, BF16: F32, F16: BF16, F64: F64}[kind]
    wide = F64 if kind == F64 else F32

    def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        values = 1.5 * torch.randn(shape, generator=generator, dtype=F64) + 0.4
        return None if name in problem.absent else values.to(dtype)

    tensors: Tensors = {
        "input": draw("input", problem.shape, kind),
        "residual": None if residual is None else draw("residual", problem.shape, residual),
        "weight": draw("weight", columns, wide),
        "bias": draw("bias", columns, low) if problem.norm == "layer_norm" else None,
        "row_scale": draw("row_scale", problem.shape[: problem.leading], low),
        "layer_scale": draw("layer_scale", columns, kind),
        "grad_output": draw("grad_output", problem.shape, kind),
        "grad_sum": draw("grad_sum", problem.shape, total),
    }
    if problem.threshold is not None:
        tensors["seed"] = torch.tensor(problem.seed)
        if problem.dynamic:
            tensors["dynamic_threshold"] = torch.tensor([problem.threshold])
    return tensors


def _operator(problem: Problem, direction: str) -> Any:
    return getattr(torch.ops.fastreg_native, f"dropout_add_{problem.norm}_{direction}")


def _branch(problem: Problem, tensors: Tensors) -> list[Any]:
    parameters = ("weight", "bias") if problem.norm == "layer_norm" else ("weight",)
    names = (*parameters, "row_scale", "layer_scale", "seed")
    # Where a tensor tells the threshold, the number is not looked at.
    number = 1 if problem.dynamic else (problem.threshold or 0)
    return [*map(tensors.get, names), number, tensors.get("dynamic_threshold")]


def forward(
    problem: Problem, tensors: Tensors, keep_sum: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, sum and statistics."""
    float_sum = problem.types[2] != (problem.types[1] or problem.types[0])
    with unwritten_memory_is_nan():
        return _operator(problem, "fwd")(  # type: ignore[no-any-return]
            *(tensors["input"], tensors["residual"], 1, *_branch(problem, tensors), EPS, float_sum, keep_sum)
        )


def backward(
    problem: Problem,
    tensors: Tensors,
    total: torch.Tensor,
    statistics: torch.Tensor,
    wanted: tuple[str, ...] | None = None,
) -> dict[str, torch.Tensor]:
    """The gradients by name, all that there are if not said which."""
    if wanted is None:
        wanted = tuple(name for name in problem.results if tensors[name] is not None)
    input = tensors["input"] if "layer_scale" in wanted else None
    with unwritten_memory_is_nan():
        found = _operator(problem, "bwd")(
            *(tensors["grad_output"], tensors["grad_sum"], total, input, 1, statistics),
            *(*_branch(problem, tensors), DTYPES.index(problem.types[0])),
            [name in wanted for name in problem.results],
        )
    for name, gradient in zip(problem.results, found, strict=True):
        assert name in wanted or gradient.shape == (0,)
    return {f"grad_{name}": found[problem.results.index(name)] for name in wanted}


def run(problem: Problem, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Both directions: every result by name."""
    output, total, statistics = forward(problem, tensors)
    found = backward(problem, tensors, total, statistics)
    return {"output": output, "sum": total, "statistics": statistics, **found}


# --- exact values -----------------------------------------------------------------------------------------


def kept(problem: Problem) -> torch.Tensor:
    """Which elements are, in rows."""
    rows, columns = problem.rows, problem.shape[-1]
    if problem.threshold is None:
        return torch.ones(rows, columns, dtype=torch.bool)
    if rows * columns <= 20000:
        like = torch.empty(rows, columns)
        return keep_elements(like, problem.seed, problem.threshold)
    lanes = _philox.half_lanes(torch.tensor(problem.seed), rows * columns)
    return (lanes >= problem.threshold).reshape(rows, columns)


def exact(problem: Problem, tensors: Tensors, results: dict[str, torch.Tensor]) -> dict[str, Exact]:
    """Exact values in float64, and the sums of absolute terms that budget their roundings.

    The norm's are those of the sum as the kernel rounded it. ``shift`` is as in norms.py.
    """
    kind, _, total_dtype = problem.types
    columns = problem.shape[-1]

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double().reshape(-1, columns)

    def of(name: str, other: float) -> torch.Tensor:
        given = tensors[name]
        return torch.full((1, 1), other, dtype=F64) if given is None else rows(given)

    row_scale = tensors["row_scale"]
    factor = torch.full((problem.rows, 1), 1.0, dtype=F64)
    if problem.threshold is not None:
        factor = factor * scale(problem.threshold, LANES)
    if row_scale is not None:
        factor = factor * row_scale.double().reshape(-1, 1).repeat_interleave(
            problem.rows // row_scale.numel(), 0
        )
    mask = kept(problem)
    without_layer_scale = torch.where(mask, factor, 0.0)
    factor = without_layer_scale * of("layer_scale", 1.0)
    branch, residual = torch.where(mask, rows(results["input"]) * factor, 0.0), of("residual", 0.0)

    values = rows(results["sum"])
    centred, shift = values, torch.zeros(problem.rows, 1, dtype=F64)
    saved = {"rstd": results["statistics"]}
    if problem.norm == "layer_norm":
        saved = {"mean": results["statistics"][0], "rstd": results["statistics"][1]}
        mean, size = values.mean(1, keepdim=True), values.abs().mean(1, keepdim=True)
        centred, shift = values - mean, size
    rstd = (centred.square().mean(1, keepdim=True) + EPS).rsqrt()
    normalized, shift = centred * rstd, shift * rstd
    weight, bias = of("weight", 1.0), of("bias", 0.0)

    grad = rows(results["grad_output"])
    scaled = grad * weight
    projection = (scaled * normalized).mean(1, keepdim=True)
    gradient = scaled - normalized * projection
    terms = scaled.abs() + normalized.abs() * (scaled * normalized).abs().mean(1, keepdim=True)
    if problem.norm == "layer_norm":
        spread = scaled.abs().mean(1, keepdim=True)
        gradient = gradient - scaled.mean(1, keepdim=True)
        terms = terms + spread + shift * (projection.abs() + normalized.abs() * spread)
    grad_sum = of("grad_sum", 0.0)
    gradient, terms = gradient * rstd + grad_sum, terms * rstd + grad_sum.abs()
    branch_terms = terms * without_layer_scale * rows(results["input"])

    wide = F64 if kind == F64 else F32
    found = {
        "sum": Exact(branch + residual, branch.abs() + residual.abs(), total_dtype),
        "output": Exact(
            normalized * weight + bias, (normalized.abs() + shift) * weight.abs() + bias.abs(), kind
        ),
        "rstd": Exact(rstd[:, 0], (rstd * (1 + 8 * torch.finfo(wide).eps * shift.square()))[:, 0], wide),
        "grad_input": Exact(gradient * factor, terms * factor.abs(), kind),
        "grad_residual": Exact(gradient, terms, total_dtype),
        "grad_weight": Exact(
            (grad * normalized).sum(0), (grad.abs() * (normalized.abs() + shift)).sum(0), F32
        ),
        "grad_bias": Exact(grad.sum(0), grad.abs().sum(0), F32),
        "grad_layer_scale": Exact(
            (gradient * without_layer_scale * rows(results["input"])).sum(0), branch_terms.abs().sum(0), F32
        ),
    }
    if problem.norm == "layer_norm":
        found["mean"] = Exact(mean[:, 0], size[:, 0], wide)
    for name in ("weight", "bias", "layer_scale"):
        parameter = tensors[name]
        if parameter is not None:
            found[f"grad_{name}"] = replace(found[f"grad_{name}"], dtype=parameter.dtype)
    shapes = {name: results[name].shape for name in found if name in results}
    for name, shape in shapes.items():
        found[name] = replace(
            found[name], value=found[name].value.reshape(shape), terms=found[name].terms.reshape(shape)
        )
    results.update(saved)
    return found


def check_results(problem: Problem, tensors: Tensors, results: dict[str, torch.Tensor]) -> None:
    """Raise ``Rejected`` where a result is beyond its budget, and fail where a mask is not the contract's."""
    given = {name: tensor for name in ("input", "grad_output") if (tensor := tensors[name]) is not None}
    both = {**results, **given}
    expected = exact(problem, tensors, both)
    for name in (*results, "rstd", *(("mean",) if problem.norm == "layer_norm" else ())):
        if name != "statistics":
            check(name, both[name], expected[name])
    dropped = ~kept(problem).reshape(problem.shape)
    residual = tensors["residual"]
    left = torch.zeros(problem.shape) if residual is None else residual
    assert torch.equal(results["sum"][dropped], left.to(results["sum"].dtype)[dropped])
    assert not results["grad_input"][dropped].any()


def check_problem(problem: Problem) -> None:
    tensors = make(problem)
    check_results(problem, tensors, run(problem, tensors))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def all_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


# --- every kernel -----------------------------------------------------------------------------------------


@each_level
@each_norm
@each_type
@pytest.mark.parametrize(
    "shape", [(6, 1), (5, 2), (9, 3), (2, 3, 17), (5, 129), (7, 257), (6, 1000)], ids=str
)
def test_kernels(norm: str, types: Any, shape: tuple[int, ...], level: str) -> None:
    """Groups of four rows and the rest, rows that begin anywhere in a block of lanes."""
    with kernels_of(level):
        check_problem(Problem(norm, shape, types))


@each_level
@each_norm
@each_type
@pytest.mark.parametrize("shape", [pytest.param((9, 8193), marks=pytest.mark.complete), (2, 8193)], ids=str)
def test_long_rows(norm: str, types: Any, shape: tuple[int, ...], level: str) -> None:
    """Block by block; the few are cut among threads."""
    with kernels_of(level), threads(2):
        check_problem(Problem(norm, shape, types))


@each_norm
@pytest.mark.parametrize("residual", ["none", "same", "wide"])
@pytest.mark.parametrize(
    "absent",
    [
        ("weight", "bias", "row_scale", "layer_scale", "grad_sum"),
        ("bias", "row_scale"),
        ("weight", "layer_scale", "grad_sum"),
        ("row_scale", "grad_sum"),
        ("layer_scale",),
        (),
    ],
    ids=lambda names: f"without {', '.join(names)}",
)
@pytest.mark.parametrize(
    ("threshold", "dynamic"),
    [(None, False), (0, False), (6554, False), (6554, True), (LANES, False), (LANES, True)],
)
def test_absent_arguments(
    norm: str, residual: str, absent: tuple[str, ...], threshold: int | None, dynamic: bool
) -> None:
    types = {"none": (BF16, None, BF16), "same": (BF16, BF16, BF16), "wide": (BF16, F32, F32)}[residual]
    problem = Problem(norm, (6, 70), types, absent, threshold=threshold, dynamic=dynamic)
    check_problem(problem)


@each_norm
@pytest.mark.parametrize("leading", [0, 1, 2, 3])
def test_scales_of_several_rows(norm: str, leading: int) -> None:
    check_problem(Problem(norm, (2, 3, 5, 20), leading=leading))


@each_norm
@pytest.mark.parametrize("shape", [(9, 300), (2, 33000)], ids=str)
@pytest.mark.parametrize("types", [TYPES["float32"], TYPES["bfloat16, residual in float32"]], ids=str)
def test_every_set_of_gradients(norm: str, types: Any, shape: tuple[int, ...]) -> None:
    """One that is not asked for is empty, and the others do not change; long rows are cut among threads."""
    problem = Problem(norm, shape, types)
    tensors = make(problem)
    _, total, statistics = forward(problem, tensors)
    everything = backward(problem, tensors, total, statistics)
    for chosen in range(2 ** len(problem.results)):
        wanted = tuple(name for place, name in enumerate(problem.results) if chosen >> place & 1)
        with threads(2):
            found = backward(problem, tensors, total, statistics, wanted)
        assert all(same_bits(found[name], everything[name]) for name in found)


@each_norm
@each_type
@pytest.mark.parametrize("shape", [(9, 300), (2, 9000)], ids=str)
def test_a_sum_that_is_not_kept(norm: str, types: Any, shape: tuple[int, ...]) -> None:
    problem = Problem(norm, shape, types)
    tensors = make(problem)
    output, total, statistics = forward(problem, tensors)
    alone, nothing, again = forward(problem, tensors, keep_sum=False)
    assert (nothing.shape, nothing.dtype) == ((0,), total.dtype)
    assert same_bits(alone, output)
    assert same_bits(again, statistics)


# --- the kernels that it is made of -----------------------------------------------------------------------


@each_level
@each_norm
@pytest.mark.parametrize("types", [TYPES["float32"], TYPES["bfloat16"], TYPES["float64"]], ids=str)
@pytest.mark.parametrize("shape", [(7, 257), (133, 24), (3, 9000)], ids=str)
def test_the_bits_are_those_of_two_operators(
    norm: str, types: Any, shape: tuple[int, ...], level: str
) -> None:
    """The sum is dropout's, and output and gradients are those of the norm alone over it."""
    problem = Problem(norm, shape, types, ("grad_sum",))
    tensors = make(problem)
    native = torch.ops.fastreg_native
    parameters = [tensors["weight"], *([tensors["bias"]] if norm == "layer_norm" else [])]
    with kernels_of(level):
        results = run(problem, tensors)
        total = native.dropout_fwd(
            *(tensors["input"], tensors["residual"], tensors["row_scale"], tensors["layer_scale"]),
            *(tensors["seed"], problem.threshold, None, 0, True),
        )
        assert same_bits(results["sum"], total)
        output, statistics = getattr(native, f"{norm}_fwd")(total, 1, *parameters, EPS)
        assert same_bits(results["output"], output)
        assert same_bits(results["statistics"], statistics)
        gradients = getattr(native, f"{norm}_bwd")(
            *(tensors["grad_output"], total, 1, statistics, *parameters, [True] * (1 + len(parameters)))
        )
    for name, gradient in zip(problem.results[1:], gradients, strict=False):
        assert same_bits(results[f"grad_{name}"], gradient), name


# --- layouts ----------------------------------------------------------------------------------------------


def _far(tensor: torch.Tensor) -> torch.Tensor:
    """Rows with a gap, the first of them not aligned."""
    rows = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
    return rows[..., 1 : 1 + tensor.shape[-1]].copy_(tensor)


@each_norm
@pytest.mark.parametrize("shape", [(9, 300), (4, 9000)], ids=str)
@pytest.mark.parametrize("moved", ["input", "residual", "grad_output", "grad_sum"])
def test_rows_at_any_distance(norm: str, shape: tuple[int, ...], moved: str) -> None:
    problem = Problem(norm, shape, TYPES["bfloat16, residual in float32"])
    tensors = make(problem)
    near = run(problem, tensors)
    given = tensors[moved]
    assert given is not None
    assert all_same(near, run(problem, {**tensors, moved: _far(given)}))
    # One row, again and again.
    row = given[:1].clone()
    repeated = {**tensors, moved: row.expand(shape)}
    assert all_same(run(problem, {**tensors, moved: row.expand(shape).contiguous()}), run(problem, repeated))


@each_norm
def test_vectors_that_are_not_aligned(norm: str) -> None:
    problem = Problem(norm, (9, 300))
    tensors = make(problem)
    near = run(problem, tensors)
    for name in ("weight", "bias", "row_scale", "layer_scale"):
        given = tensors[name]
        if given is not None:
            tensors[name] = torch.cat([given.new_zeros(1), given])[1:]
    assert all_same(near, run(problem, tensors))


# --- the ways through the schedule ------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize(
    "shape",
    [(1000, 40), (131, 768), (40, 4097), (1, 70000), (2, 33000), (3, 20000), (5, 9000), (7, 9000)],
    ids=str,
)
def test_bits_do_not_depend_on_threads(norm: str, shape: tuple[int, ...]) -> None:
    problem = Problem(norm, shape, TYPES["bfloat16, sum in float32"])
    tensors = make(problem)
    results = []
    for count in (1, 2, 3, 7, 24):
        with threads(count):
            results.append(run(problem, tensors))
    assert all(all_same(results[0], others) for others in results[1:])
    check_results(problem, tensors, results[0])


# Of 12 MiB or more: past the caches, where the rows are whole cache lines.
@each_norm
@pytest.mark.parametrize(
    ("shape", "types"),
    [
        ((4099, 768), "float32"),
        pytest.param((4101, 770), "float32", marks=pytest.mark.complete),
        pytest.param((800, 4096), "float32", marks=pytest.mark.complete),
        pytest.param((8195, 768), "bfloat16", marks=pytest.mark.complete),
        ((4100, 784), "bfloat16, sum in float32"),
    ],
    ids=str,
)
def test_large_outputs(norm: str, shape: tuple[int, ...], types: str) -> None:
    """The same bits as in parts that are small."""
    problem = Problem(norm, shape, TYPES[types], ("row_scale", "weight", "bias"))
    tensors = make(problem)
    results = run(problem, tensors)
    alone, _, _ = forward(problem, tensors, keep_sum=False)
    assert same_bits(alone, results["output"])
    total = torch.ops.fastreg_native.dropout_fwd(
        *(tensors["input"], tensors["residual"], None, tensors["layer_scale"]),
        *(tensors["seed"], problem.threshold, None, 0, True),
    )
    if results["sum"].dtype == total.dtype:
        assert same_bits(results["sum"], total)
    check_results(problem, tensors, results)


# --- data -------------------------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_what_is_dropped_is_not_looked_at(norm: str, poison: float) -> None:
    problem = Problem(norm, (6, 257))
    tensors = make(problem)
    clean = run(problem, tensors)
    given = tensors["input"]
    assert given is not None
    tensors["input"] = torch.where(kept(problem), given, poison)
    poisoned = run(problem, tensors)
    assert all_same(clean, poisoned)


@each_norm
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (3, 0), (0, 0)], ids=str)
def test_nothing(norm: str, shape: tuple[int, ...]) -> None:
    problem = Problem(norm, shape, TYPES["bfloat16, residual in float32"])
    results = run(problem, make(problem))
    for name in ("output", "sum", "grad_input", "grad_residual"):
        assert results[name].shape == shape
    for name in problem.results[2:]:
        assert torch.equal(results[f"grad_{name}"], torch.zeros_like(results[f"grad_{name}"]))
        assert results[f"grad_{name}"].shape == shape[-1:]
    assert results["statistics"].isnan().all()


# --- doors ------------------------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual": torch.ones(6, 41)}, "residual must have the shape and device of input"),
        ({"residual": torch.ones(6, 40, dtype=BF16)}, "residual is bfloat16 but input is float32"),
        ({"weight": torch.ones(41)}, "weight must have 40 elements"),
        ({"row_scale": torch.ones(5)}, "row_scale must have the first of the dimensions"),
        ({"row_scale": torch.ones(6, 40)}, "row_scale must have the first of the dimensions"),
        ({"row_scale": torch.ones(6, dtype=F64)}, "row_scale is float64 but input is float32"),
        ({"layer_scale": torch.ones(40, dtype=F64)}, "layer_scale is float64 but input is float32"),
        ({"seed": torch.ones(2, dtype=torch.int64)}, "seed must be one int64"),
        ({"seed": torch.ones(1)}, "seed must be one int64"),
        ({"dynamic_threshold": torch.ones(1)}, "dynamic_threshold must be one int64"),
        ({"input": torch.ones(40, 6).t()}, "input cannot be viewed as rows"),
    ],
    ids=str,
)
def test_forward_refuses(norm: str, changes: Tensors, words: str) -> None:
    problem = Problem(norm, (6, 40))
    with pytest.raises(RuntimeError, match=words):
        forward(problem, {**make(problem), **changes})


@each_norm
@pytest.mark.parametrize("threshold", [-1, LANES + 1])
def test_a_threshold_out_of_range_is_refused(norm: str, threshold: int) -> None:
    problem = Problem(norm, (6, 40), threshold=threshold)
    with pytest.raises(RuntimeError, match="threshold must be between 0 and 65536"):
        forward(problem, make(problem))


@each_norm
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grad_output": torch.ones(6, 41)}, "grad_output must have the shape and device of sum"),
        ({"grad_output": torch.ones(6, 40, dtype=BF16)}, "grad_output must be float32, but is bfloat16"),
        ({"grad_sum": torch.ones(6, 40, dtype=BF16)}, "grad_sum must be float32, but is bfloat16"),
        ({"input": torch.ones(6, 40, dtype=BF16)}, "input must be float32, but is bfloat16"),
        ({"input": None}, "for which input must be given"),
        ({"layer_scale": None}, "asks for the gradient of layer_scale, which was not given"),
    ],
    ids=str,
)
def test_backward_refuses(norm: str, changes: Tensors, words: str) -> None:
    problem = Problem(norm, (6, 40))
    tensors = make(problem)
    _, total, statistics = forward(problem, tensors)
    with pytest.raises(RuntimeError, match=words):
        backward(problem, {**tensors, **changes}, total, statistics, problem.results)
