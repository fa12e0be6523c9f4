"""What dropout + residual + norm must return: its cases, and exact values from masks.py and the specs of the norms."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import fastreg
from backend_under_test import dtypes_for
from cases import LAYOUTS, SHORT, Case, Mix, Size, covering
from criterion import Exact, Rejected, check
from masks import keep_elements, scale
from norms import LAYER_NORM, RMS_NORM
from suite import same_bits, unwritten_memory_is_nan

NORMS = {"layer_norm": LAYER_NORM, "rms_norm": RMS_NORM}
# Leading and normalised dimensions, around the widths of vectors, warps and blocks.
SIZES = (
    *(
        ((3,), (1,)),
        ((5,), (2,)),
        ((2,), (3,)),
        ((33,), (17,)),
        ((4,), (64,)),
        ((2,), (129,)),
        ((3,), (257,)),
    ),
    *(
        ((5,), (1000,)),
        ((9,), (256,)),
        ((2, 3), (40,)),
        ((), (33,)),
        ((3, 2), (4, 5)),
        ((2,), (4104,)),
        ((1,), (8193,)),
    ),
)
SEED = 11
_LAYOUTS = ("contiguous", "unaligned", "sliced", "rows", "transposed", "expanded")
_GRAD_LAYOUTS = (*_LAYOUTS, "scalar")
_OPTIONAL = ("residual", "row_scale", "layer_scale", "weight", "bias")


@dataclass(frozen=True)
class Branch:
    """Everything that decides one run.

    Attributes:
        residual: its dtype, or None.
        absent: which of the other optional tensors there are not.
        wanted: which gradients are asked for.
    """

    size: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype
    residual: torch.dtype | None
    other: torch.dtype
    layout: str
    grad_layout: str
    p: float
    in_tensor: bool
    prenorm: bool
    in_fp32: bool
    absent: tuple[str, ...]
    wanted: tuple[str, ...]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        flags = [name for name in ("prenorm", "in_fp32", "in_tensor") if getattr(self, name)]
        without = "".join(f"-no_{name}" for name in self.absent)
        return (
            f"{shape}-{SHORT[self.dtype]}-r_{SHORT[self.residual]}-{SHORT[self.other]}-{self.layout}"
            f"-dy_{self.grad_layout}-p{self.p}-{'-'.join(flags)}{without}-d_{''.join(name[0] for name in self.wanted)}"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.size[0], *self.size[1])

    @property
    def sum_dtype(self) -> torch.dtype:
        if self.in_fp32:
            return torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.dtype if self.residual is None else torch.promote_types(self.dtype, self.residual)


def branches(backend: str, device: str, only: str | None = None) -> list[Branch]:
    """The covering choice of cases for a backend."""
    choices = covering(
        {
            "size": SIZES,
            "dtype": dtypes_for(backend, device, only),
            "residual": ("same", "wide", "other", None),
            "other": ("same", "wide"),
            "layout": _LAYOUTS,
            "grad_layout": _GRAD_LAYOUTS,
            "p": (0.1, 0.5, 0.0, 1.0),
            "in_tensor": (False, True),
            "prenorm": (False, True),
            "in_fp32": (False, True),
            "absent": (
                (),
                ("row_scale",),
                ("layer_scale",),
                ("row_scale", "layer_scale"),
                ("weight", "bias"),
                _OPTIONAL[1:],
            ),
            "wanted": (
                ("input", "residual", "weight", "bias", "layer_scale"),
                ("input",),
                ("residual", "weight"),
                ("layer_scale", "bias"),
                ("weight",),
            ),
        },
        apart=[("size", "grad_layout"), ("layout", "grad_layout")],
        candidates=8,
    )
    return list({str(branch): branch for branch in map(_sensible, choices)}.values())


def _sensible(choice: dict[str, Any]) -> Branch:
    dtype = choice["dtype"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    low = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    low = torch.float64 if dtype == torch.float64 else low
    named = {"same": dtype, "wide": wide, "other": low, None: None}
    absent = choice["absent"] if choice["size"][0] else tuple({*choice["absent"], "row_scale"})
    return Branch(
        **{
            **choice,
            "residual": named[choice["residual"]],
            "other": named[choice["other"]],
            "absent": tuple(sorted(absent)),
        }
    )


# --- one case ---------------------------------------------------------------------------------------------


def make_tensors(norm: str, branch: Branch, device: str) -> dict[str, torch.Tensor]:
    """Random tensors of a case, the same ones on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{norm} {branch}".encode()))

    def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
        values = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
        return LAYOUTS[layout if shape else "contiguous"](values.to(dtype).to(device))

    leading, row = branch.size
    # Kernels of whole packs take aligned vectors only; those have two of three cases.
    vectors = "contiguous" if zlib.crc32(str(branch).encode()) % 3 else "unaligned"
    tensors = {"input": draw(branch.shape, branch.dtype, branch.layout)}
    if branch.residual is not None:
        tensors["residual"] = draw(branch.shape, branch.residual, branch.grad_layout)
    for name, shape in (("weight", row), ("bias", row), ("row_scale", leading[:1]), ("layer_scale", row)):
        if name not in branch.absent and not (name == "bias" and norm == "rms_norm"):
            tensors[name] = draw(shape, branch.other, vectors)
    tensors["grad_output"] = draw(branch.shape, branch.dtype, branch.grad_layout)
    if branch.prenorm:
        tensors["grad_sum"] = draw(branch.shape, branch.sum_dtype, branch.layout)
    return tensors


def run(
    norm: str, branch: Branch, tensors: dict[str, torch.Tensor], prenorm: bool
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Output, sum if ``prenorm``, and gradients; and what the gradients are of."""
    function = getattr(fastreg.functional, f"dropout_add_{norm}")
    wanted = tuple(name for name in branch.wanted if name in tensors)
    given: dict[str, Any] = {"residual": None}
    for name, tensor in tensors.items():
        if not name.startswith("grad_"):
            given[name] = tensor.detach().requires_grad_(name in wanted)
    device = tensors["input"].device
    p = torch.tensor(branch.p, dtype=torch.float64, device=device) if branch.in_tensor else branch.p
    options = {"prenorm": prenorm, "residual_in_fp32": branch.in_fp32, "seed": SEED}
    output = function(**given, normalized_shape=branch.size[1], p=p, **options)
    output, total = output if prenorm else (output, None)
    results = {"output": output.detach()}
    ends = [(output, tensors["grad_output"])]
    if total is not None:
        results["sum"] = total.detach()
        ends.append((total, tensors["grad_sum"]))
    ends = [(end, gradient) for end, gradient in ends if end.requires_grad]
    if wanted:
        gradients = torch.autograd.grad(
            [end for end, _ in ends], [given[name] for name in wanted], [gradient for _, gradient in ends]
        )
        results |= {f"grad_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return results, wanted


def exact(
    norm: str, branch: Branch, tensors: dict[str, torch.Tensor], total: torch.Tensor
) -> dict[str, Exact]:
    """The exact values in float64, of a sum as it was rounded."""
    wide = {name: tensor.detach().cpu().double() for name, tensor in tensors.items()}
    threshold = round(branch.p * 2**16)
    keep = keep_elements(torch.empty(branch.shape), SEED, threshold)
    factor = torch.ones(branch.shape, dtype=torch.float64)
    if branch.in_tensor or branch.p > 0:
        factor = torch.where(keep, scale(threshold, 2**16) * factor, 0.0)
    if "row_scale" in wide:
        factor = factor * wide["row_scale"].reshape(-1, *(1,) * (len(branch.shape) - 1))
    layers = wide.get("layer_scale", torch.ones((), dtype=torch.float64))
    kept = wide["input"] * factor * layers
    before = kept + wide["residual"] if "residual" in wide else kept
    terms = kept.abs() + wide["residual"].abs() if "residual" in wide else kept.abs()

    given = {"input": total, "grad_output": tensors["grad_output"]}
    parameters = {name: tensors.get(name) for name in NORMS[norm].parameters}
    case = Case(Size(branch.shape), Mix((branch.sum_dtype,)), arguments={"normalized_shape": branch.size[1]})
    of_norm = NORMS[norm].exact(case, {**given, **parameters})
    inner = of_norm["grad_input"]
    gradient, gradient_terms = inner.value, inner.terms.expand_as(inner.value)
    if "grad_sum" in wide:
        gradient, gradient_terms = gradient + wide["grad_sum"], gradient_terms + wide["grad_sum"].abs()
    results = {
        "sum": Exact(before, terms, branch.sum_dtype),
        "output": replace(of_norm["output"], dtype=branch.dtype),
        "grad_input": Exact(
            gradient * factor * layers, gradient_terms * (factor * layers).abs(), branch.dtype
        ),
        **{name: of_norm[name] for name in ("grad_weight", "grad_bias") if name in of_norm},
    }
    if "residual" in wide:
        results["grad_residual"] = Exact(gradient, gradient_terms, tensors["residual"].dtype)
    if "layer_scale" in wide:
        columns = math.prod(branch.size[1])
        products = (gradient * factor * wide["input"]).reshape(-1, columns).sum(0)
        sizes = (gradient_terms * (factor * wide["input"]).abs()).reshape(-1, columns).sum(0)
        shape = branch.size[1]
        results["grad_layer_scale"] = Exact(
            products.reshape(shape), sizes.reshape(shape), tensors["layer_scale"].dtype
        )
    return results


def check_branch(norm: str, branch: Branch, device: str) -> None:
    """Raise ``Rejected`` where a function breaks its contract in this case."""
    tensors = make_tensors(norm, branch, device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with unwritten_memory_is_nan():
        results, wanted = run(norm, branch, tensors, branch.prenorm)
        again, _ = run(norm, branch, tensors, branch.prenorm)
        with torch.no_grad():
            # The sum is needed below in any case; and what nobody asks for must change no bit.
            alone, _ = run(
                norm, replace(branch, wanted=()), {**tensors, "grad_sum": torch.empty(0)}, prenorm=True
            )
            short, _ = run(norm, replace(branch, wanted=()), tensors, prenorm=False)
    for name, tensor in before.items():
        if not same_bits(tensors[name], tensor):
            raise Rejected(f"{name} was written to")
    for name, other in {**alone, **short}.items():
        if name in results and not same_bits(results[name], other):
            raise Rejected(f"{name} depends on what else is asked for")
    expected = exact(norm, branch, tensors, alone["sum"])
    names = {"output", *(f"grad_{name}" for name in wanted), *(["sum"] if branch.prenorm else [])}
    if set(results) != names:
        raise Rejected(f"results are {sorted(results)}, expected {sorted(names)}")
    check("sum", alone["sum"], expected["sum"])
    for name, result in results.items():
        check(name, result, _rounded_twice(name, branch, expected[name]))
        if not same_bits(result, again[name]):
            raise Rejected(f"{name} differs between two runs")


def _rounded_twice(name: str, branch: Branch, value: Exact) -> Exact:
    """Autograd rounds the gradient of a residual that is narrower than the sum once more."""
    if name != "grad_residual" or value.dtype == branch.sum_dtype:
        return value
    return replace(value, terms=value.terms + value.value.abs())


# --- what both test files have ----------------------------------------------------------------------------


class DropoutAddNormSuite:
    """The tests of both functions; a subclass says which. The test files parametrise ``branch``."""

    norm: str

    @property
    def function(self) -> Any:
        return getattr(fastreg.functional, f"dropout_add_{self.norm}")

    def test_case(self, branch: Branch, device: str) -> None:
        check_branch(self.norm, branch, device)

    # Of so many odd columns Triton's kernels, too, hold no whole row.
    @pytest.mark.parametrize(
        ("rows", "columns"),
        [
            pytest.param(1, 8_193, marks=pytest.mark.every_kernel),
            pytest.param(2, 12_296, marks=pytest.mark.complete(backend=("triton",))),
            pytest.param(2, 65_541, marks=pytest.mark.complete(backend=("triton",))),
        ],
    )
    def test_long_rows(self, rows: int, columns: int, device: str) -> None:
        for dtype, in_fp32 in ((torch.float32, False), (torch.bfloat16, True)):
            wanted = ("input", "residual", "weight", "layer_scale")
            branch = Branch(
                *(((rows,), (columns,)), dtype, dtype, torch.float32, "contiguous", "contiguous", 0.1),
                *(False, True, in_fp32, ("bias",), wanted),
            )
            check_branch(self.norm, branch, device)

    def test_no_rows(self, dtype: torch.dtype, device: str) -> None:
        input = torch.empty(0, 8, dtype=dtype, device=device, requires_grad=True)
        vectors = [torch.ones(8, dtype=dtype, device=device, requires_grad=True) for _ in range(2)]
        output, total = self.function(
            input, input.detach(), (8,), vectors[0], p=0.5, layer_scale=vectors[1], prenorm=True
        )
        (output.sum() + total.sum()).backward()
        assert output.shape == total.shape == input.grad.shape == (0, 8)
        for vector in vectors:
            assert (vector.grad == 0).all()

    def test_dropout_add_draws_the_same_mask(self, device: str) -> None:
        input, residual = torch.randn(5, 40, device=device), torch.randn(5, 40, device=device)
        _, total = self.function(input, residual, (40,), p=0.3, seed=4, prenorm=True)
        torch.testing.assert_close(total, fastreg.functional.dropout_add(input, residual, 0.3, seed=4))
        torch.manual_seed(7)
        _, drawn = self.function(input, residual, (40,), p=0.3, prenorm=True)
        torch.manual_seed(7)
        torch.testing.assert_close(drawn, fastreg.functional.dropout_add(input, residual, 0.3))
        evaluated = self.function(input, residual, (40,), p=0.3, training=False)
        alone = getattr(fastreg.functional, self.norm)
        torch.testing.assert_close(evaluated, alone(input + residual, (40,)))

    def test_nothing_but_a_norm(self, device: str) -> None:
        input = torch.randn(5, 40, device=device).bfloat16()
        output, total = self.function(input, None, (40,), p=0.3, training=False, prenorm=True)
        assert total is input
        assert same_bits(output, getattr(fastreg.functional, self.norm)(input, (40,)))
        _, wide = self.function(input, None, (40,), p=0.0, prenorm=True, residual_in_fp32=True)
        assert torch.equal(wide, input.float())

    def test_bytes_kept_for_backward(self, device: str) -> None:
        input, residual = (torch.randn(64, 128, device=device, requires_grad=True) for _ in range(2))
        saved: set[tuple[int, int]] = set()

        def note(tensor: torch.Tensor) -> torch.Tensor:
            saved.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.function(input, residual, (128,), p=0.5)
        # The sum, the statistics and the seed.
        statistics = 4 * 64 * (2 if self.norm == "layer_norm" else 1)
        assert sorted(size for _, size in saved) == sorted([64 * 128 * 4, statistics, 8])

    def test_second_derivatives(self, device: str) -> None:
        leaves = [
            torch.randn(*shape, device=device).requires_grad_() for shape in ((3, 8), (3, 8), (8,), (8,))
        ]

        def fused(input: Any, residual: Any, weight: Any, layers: Any) -> Any:
            return self.function(
                input, residual, (8,), weight, p=0.4, layer_scale=layers, prenorm=True, seed=2
            )

        def apart(input: Any, residual: Any, weight: Any, layers: Any) -> Any:
            total = fastreg.functional.dropout_add(input, residual, 0.4, layer_scale=layers, seed=2)
            return getattr(torch.nn.functional, self.norm)(total, (8,), weight), total

        found = []
        for function in (fused, apart):
            output, total = function(*leaves)
            first = torch.autograd.grad((output.pow(3) + total.square()).sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(each.square().sum() for each in first), leaves))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)

    def test_transforms_and_compilation(self, device: str) -> None:
        input, residual = torch.randn(3, 5, 8, device=device), torch.randn(3, 5, 8, device=device)

        def call(x: torch.Tensor, y: torch.Tensor) -> Any:
            return self.function(x, y, (8,), p=0.4, prenorm=True, seed=2)

        mapped = torch.func.vmap(call)(input, residual)
        for one, other in zip(mapped, call(input[1], residual[1]), strict=True):
            torch.testing.assert_close(one[1], other)
        leaf = input.requires_grad_()
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=False)
        for one, other in zip(compiled(leaf, residual), call(leaf, residual), strict=True):
            assert same_bits(one, other)
            gradients = [
                torch.autograd.grad(each.square().sum(), leaf, retain_graph=True)[0] for each in (one, other)
            ]
            assert same_bits(*gradients)
        torch._dynamo.reset()

    def test_opcheck(self, backend: str, device: str) -> None:
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        input, columns = torch.randn(4, 6, device=device), torch.rand(6, device=device)
        seed, rows = torch.tensor(3, device=device), torch.rand(4, device=device)
        bias = (columns,) if self.norm == "layer_norm" else ()
        for library in ["fastreg"] + (["fastreg_native"] if backend == "native" else []):
            forward, backward = (
                getattr(getattr(torch.ops, library), f"dropout_add_{self.norm}_{half}").default
                for half in ("fwd", "bwd")
            )
            for arguments in (
                (input, input, 1, columns, *bias, rows, columns, seed, 9000, None, 1e-5, False, True),
                (
                    input.bfloat16(),
                    None,
                    1,
                    None,
                    *(None for _ in bias),
                    None,
                    None,
                    seed,
                    9000,
                    None,
                    1e-5,
                    True,
                    False,
                ),
            ):
                torch.library.opcheck(forward, arguments, test_utils=tests)
            statistics = forward(
                input, input, 1, columns, *bias, rows, columns, seed, 9000, None, 1e-5, False, True
            )[2]
            torch.library.opcheck(
                backward,
                (
                    *(
                        input,
                        input,
                        input,
                        input,
                        1,
                        statistics,
                        columns,
                        *bias,
                        rows,
                        columns,
                        seed,
                        9000,
                        None,
                        0,
                    ),
                    [True] * (4 + len(bias)),
                ),
                test_utils=tests,
            )

    def test_arguments_that_do_not_go_together(self, device: str) -> None:
        input = torch.ones(3, 4, device=device)
        with pytest.raises(
            RuntimeError, match=r"row_scale to have the first of the dimensions \[3\] .*but got \[4\]"
        ):
            self.function(input, input, (4,), row_scale=input[0])
        with pytest.raises(RuntimeError, match=r"layer_scale of normalized_shape \[4\], but got \[3\]"):
            self.function(input, input, (4,), layer_scale=input[:, 0])
        with pytest.raises(RuntimeError, match=r"residual of the input's shape"):
            self.function(input, input[0], (4,))
        with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
            self.function(input, input, (4,), p=1.5)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            self.function(input, input, (5,))
        with pytest.raises(RuntimeError, match=r"weight is torch\.float64"):
            self.function(input, input, (4,), input[0].double())

    def test_a_row_scale_may_learn(self, device: str) -> None:
        leaves = [
            torch.randn(*shape, device=device).requires_grad_() for shape in ((3, 8), (3, 8), (3,), (8,))
        ]
        input, residual, rows, layers = leaves
        output, total = self.function(
            input, residual, (8,), p=0.4, row_scale=rows, layer_scale=layers, seed=3, prenorm=True
        )
        expected = fastreg.functional.dropout_add(
            input, residual, 0.4, row_scale=rows, layer_scale=layers, seed=3
        )
        torch.testing.assert_close(total, expected)
        (gradient,) = torch.autograd.grad(output.pow(3).sum(), rows)
        right = getattr(torch.nn.functional, self.norm)(expected, (8,))
        torch.testing.assert_close(
            gradient, torch.autograd.grad(right.pow(3).sum(), rows)[0], rtol=1e-3, atol=1e-4
        )

    def test_as_a_module(self, device: str) -> None:
        name = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}[self.norm]
        kind, base = getattr(fastreg.nn, f"DropoutAdd{name}"), getattr(torch.nn, name)
        layer = kind(8, p=0.4, prenorm=True, residual_in_fp32=True, layer_scale=0.5).to(device)
        assert isinstance(layer, base)
        assert set(layer.state_dict()) == {*base(8).state_dict(), "layer_scale"}
        assert set(kind(8).state_dict()) == set(base(8).state_dict())
        input, residual = (
            torch.randn(3, 8, device=device).bfloat16(),
            torch.randn(3, 8, device=device).bfloat16(),
        )
        torch.manual_seed(3)
        output, total = layer(input, residual, torch.full((3,), 2.0, device=device))
        torch.manual_seed(3)
        expected = fastreg.functional.dropout_add(input, residual.float(), 0.4)
        assert total.dtype == torch.float32
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(total, expected)
        assert "prenorm=True" in repr(layer)
        plain = kind(8, p=0.4).to(device).eval()
        assert same_bits(plain(input), getattr(fastreg.nn, name)(8).to(device)(input))
        assert fastreg.nn.LinearSchedule(layer, 0.0, 0.2, 2).layers == [layer]


def generate(norm: str, metafunc: pytest.Metafunc) -> None:
    """Parametrise ``branch``: RMS norm's kernels are layer norm's, and have every second case."""
    if "branch" in metafunc.fixturenames:
        options = metafunc.config.getoption
        chosen = branches(options("--backend"), options("--device"), options("--dtype"))
        metafunc.parametrize("branch", chosen if norm == "layer_norm" else chosen[1::2], ids=str)
