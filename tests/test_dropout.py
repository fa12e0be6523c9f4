"""The dropout family on the backend under test: covering cases, non-finite values, arguments, torch's errors."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

import fastreg
from backend_under_test import emulated, serves_float64
from dropouts import FORMS, check_drop, drops
from fastreg import functional as F
from masks import half_lane, keep_elements, keep_units
from suite import same_bits

NAMES = ("dropout", "dropout1d", "dropout2d", "dropout3d")
PLAIN = {"dropout": (6, 40), "dropout1d": (4, 5, 9), "dropout2d": (2, 5, 7, 7), "dropout3d": (2, 3, 2, 4, 5)}
each_name = pytest.mark.parametrize("name", NAMES)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "drop" in metafunc.fixturenames:
        options = metafunc.config.getoption
        chosen = drops(options("--backend"), options("--device"), options("--dtype"))
        metafunc.parametrize("drop", chosen, ids=str)


def test_case(drop: Any, device: str) -> None:
    check_drop(drop, device)


def test_every_form_is_among_the_cases(backend: str, device: str) -> None:
    assert {str(case.form) for case in drops(backend, device)} == {str(form) for form in FORMS}


# --- values ---


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@each_name
def test_what_is_dropped_is_zero_whatever_it_was(
    name: str, poison: float, dtype: torch.dtype, device: str
) -> None:
    input = torch.full(PLAIN[name], poison, dtype=dtype, device=device)
    function = getattr(F, name)
    output = function(input, 0.5, seed=3)
    kept = function(torch.ones_like(input), 0.5, seed=3) != 0
    assert 0 < kept.sum() < kept.numel()
    assert (output[~kept] == 0).all()
    assert not output[kept].isfinite().any()
    for p in (1.0, torch.tensor(1.0, device=device)):
        assert (function(input, p, seed=3) == 0).all()


def test_a_rate_of_zero_and_evaluation_draw_nothing(device: str) -> None:
    inputs = {name: torch.randn(PLAIN[name], device=device) for name in NAMES}
    input, residual = torch.randn(5, 8, device=device), torch.randn(5, 8, device=device)
    get_state = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    before = get_state()
    for name, given in inputs.items():
        assert getattr(F, name)(given, 0.0) is given
        assert getattr(F, name)(given, 0.5, False) is given
        assert getattr(F, name)(given, torch.tensor(0.5, device=device), False) is given
    assert torch.equal(F.dropout_add(input, residual, 0.5, False), input + residual)
    assert torch.equal(F.drop_path(input, 0.0, residual=residual), input + residual)
    assert torch.equal(before, get_state())


@each_name
def test_empty_inputs(name: str, dtype: torch.dtype, device: str) -> None:
    shape = (0, *PLAIN[name][1:])
    input = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    output = getattr(F, name)(input, 0.5)
    output.sum().backward()
    assert output.shape == shape
    assert input.grad is not None
    assert input.grad.shape == shape
    layer_scale = torch.ones(shape[-1], dtype=dtype, device=device, requires_grad=True)
    F.dropout_add(input.detach(), input.detach(), 0.5, layer_scale=layer_scale).sum().backward()
    assert layer_scale.grad is not None
    assert (layer_scale.grad == 0).all()


def test_a_larger_tensor(backend: str, device: str) -> None:
    """More than one tile or block of every kernel, and a length that is no multiple of anything."""
    rows = 37 if emulated(backend, device) else 1021
    input = torch.ones(rows, 773, dtype=torch.bfloat16, device=device)
    kept = F.dropout(input, 0.25, seed=11) != 0
    sample = torch.arange(0, kept.numel(), 17)
    expected = torch.tensor([half_lane(11, int(unit)) >= 2**14 for unit in sample])
    assert torch.equal(kept.flatten().cpu()[sample], expected)
    channels = F.dropout2d(torch.ones(5, 67, 9, 9, device=device), 0.25, seed=11) != 0
    assert torch.equal(channels.cpu(), keep_units((5, 67, 9, 9), 2, 11, 2**30))


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_functions_of_one_seed_agree(p: float, device: str) -> None:
    """dropout and dropout_add drop the same elements; channels and samples the same units."""
    input = torch.rand(6, 8, 4, 4, device=device) + 0.5
    zero = torch.zeros_like(input)
    for seed in (4, torch.tensor(4, device=device)):
        assert torch.equal(F.dropout(input, p, seed=seed), F.dropout_add(input, zero, p, seed=seed))
        assert torch.equal(F.drop_path(input, p, seed=seed), F.drop_path(input, p, residual=zero, seed=seed))
        last = input.contiguous(memory_format=torch.channels_last)
        assert torch.equal(F.dropout2d(input, p, seed=seed), F.dropout2d(last, p, seed=seed))
    assert torch.equal(
        (F.dropout(input, p, seed=4) != 0).cpu(), keep_elements(input.cpu(), 4, round(p * 2**16))
    )


def test_rates_in_tensors_are_cut_off(device: str) -> None:
    input = torch.ones(50, device=device)
    for value, expected in ((-1.0, 1.0), (2.0, 0.0), (torch.nan, 1.0)):
        p = torch.tensor(value, device=device)
        assert (F.dropout(input, p, seed=1) == expected).all()
        assert (F.drop_path(input, p, seed=1) == expected).all()
    for dtype in (torch.float32, torch.float64, torch.float16):
        p = torch.tensor([0.25], dtype=dtype, device=device)
        assert torch.equal(F.dropout(input, p, seed=1), F.dropout(input, 0.25, seed=1))


@pytest.mark.parametrize("gradient_of", ["row_scale", "all"])
def test_row_scale_may_learn(gradient_of: str, device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*shape, generator=draw).to(device).requires_grad_(gradient_of == "all" or shape == (4, 6))
        for shape in ((4, 6, 8), (4, 6, 8), (4, 6), (8,))
    ]
    input, residual, rows, layers = leaves
    output = F.dropout_add(input, residual, 0.4, row_scale=rows, layer_scale=layers, seed=9)
    expected = residual + F.dropout(input, 0.4, seed=9) * rows[..., None] * layers
    torch.testing.assert_close(output, expected)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    weights = torch.randn_like(output)
    for found, right in zip(
        torch.autograd.grad(output, wanted, weights),
        torch.autograd.grad(expected, wanted, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, right)


def test_second_derivatives(device: str) -> None:
    input = torch.randn(5, 8, device=device, requires_grad=True)
    layers = torch.randn(8, device=device, requires_grad=True)
    output = F.dropout_add(input, input.detach(), 0.4, layer_scale=layers, seed=9)
    (first,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    found = torch.autograd.grad(first.sum(), (input, layers))
    plain = (
        input.detach()
        + torch.where(F.dropout(torch.ones_like(input), 0.4, seed=9) > 0, input, 0) * layers / 0.6
    )
    (first,) = torch.autograd.grad(plain.square().sum(), input, create_graph=True)
    for one, other in zip(found, torch.autograd.grad(first.sum(), (input, layers)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_only_the_seed_is_kept_for_backward(device: str) -> None:
    input = torch.randn(64, 64, device=device, requires_grad=True)
    bytes_of: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        bytes_of.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        F.dropout(input, 0.5)
        F.drop_path(input, 0.5, residual=input.detach())
        F.dropout_add(input, input.detach(), 0.5)
    assert bytes_of == [8, 8, 8]


# --- arguments ---


@each_name
def test_signature_begins_as_torchs(name: str) -> None:
    ours = list(inspect.signature(getattr(F, name)).parameters.values())
    torchs = list(inspect.signature(getattr(torch.nn.functional, name)).parameters.values())
    assert [(each.name, each.default) for each in ours[: len(torchs)]] == [
        (each.name, each.default) for each in torchs
    ]
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in ours[len(torchs) :])


@each_name
@pytest.mark.parametrize("p", [-0.1, 1.1, -1, 2])
def test_a_rate_out_of_range_raises_torchs_error(name: str, p: float, device: str) -> None:
    input = torch.ones(PLAIN[name], device=device)
    for function in (getattr(F, name), getattr(torch.nn.functional, name)):
        with pytest.raises(ValueError, match=f"dropout probability has to be between 0 and 1, but got {p}"):
            function(input, p)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("dropout1d", (3,)), ("dropout1d", (2, 3, 4, 5)), ("dropout2d", (3,)), ("dropout1d", ())],
)
@pytest.mark.filterwarnings("ignore:dropout2d")
def test_shapes_that_raise_torchs_error(name: str, shape: tuple[int, ...], device: str) -> None:
    input = torch.ones(shape, device=device)
    with pytest.raises(RuntimeError) as expected:
        getattr(torch.nn.functional, name)(input, 0.5)
    with pytest.raises(RuntimeError) as raised:
        getattr(F, name)(input, 0.5)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dropout2d", (3, 4)),
        ("dropout2d", (3, 4, 5)),
        ("dropout3d", (3, 4, 5)),
        ("dropout3d", (2, 3, 4, 5, 6, 2)),
    ],
)
def test_torchs_warnings(name: str, shape: tuple[int, ...], device: str) -> None:
    texts = []
    for functions in (F, torch.nn.functional):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = getattr(functions, name)(torch.ones(shape, device=device), 0.5)
        texts.append([str(each.message) for each in caught])
        assert output.shape == shape
    assert texts[0] == texts[1] != []


def test_arguments_that_do_not_go_together(device: str) -> None:
    input = torch.ones(3, 4, device=device)
    with pytest.raises(TypeError, match="argument 'input'"):
        F.dropout([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="argument 'p'"):
        F.dropout(input, "half")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="argument 'seed'"):
        F.dropout(input, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a seed or a generator, but got both"):
        F.dropout(input, seed=1, generator=torch.Generator(device))
    with pytest.raises(ValueError, match="one int64"):
        F.dropout(input, seed=torch.ones(2, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="one element"):
        F.dropout(input, torch.ones(2, device=device))
    with pytest.raises(ValueError, match="p is on meta and the input is on"):
        F.dropout(input, torch.ones((), device="meta"))
    with pytest.raises(RuntimeError, match=r"residual of the input's shape \[3, 4\], but got \[4\]"):
        F.dropout_add(input, input[0])
    with pytest.raises(TypeError, match="argument 'residual'"):
        F.dropout_add(input, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="residual is on meta"):
        F.dropout_add(input, torch.ones(3, 4, device="meta"))
    with pytest.raises(
        RuntimeError, match=r"row_scale to have the first dimensions .*\[3, 4\], but got \[4\]"
    ):
        F.dropout_add(input, input, row_scale=input[0])
    with pytest.raises(RuntimeError, match=r"layer_scale to have the input's last dimension .*but got \[3\]"):
        F.dropout_add(input, input, layer_scale=input[:, 0])
    with pytest.raises(ValueError, match="mode has to be either 'batch' or 'row', but got column"):
        F.drop_path(input, mode="column")
    with pytest.raises(ValueError, match="inplace goes without"):
        F.drop_path(input, inplace=True, residual=input)
    with pytest.raises(RuntimeError, match="without dimensions"):
        F.drop_path(input[0, 0])
    for other, given in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        with pytest.raises(RuntimeError, match=f"residual is {other} where the input is {given}"):
            F.dropout_add(input.to(given), input.to(other))
        with pytest.raises(RuntimeError, match=f"layer_scale is {other} where the input is {given}"):
            F.dropout_add(input.to(given), input.to(given), layer_scale=input[0].to(other))


@pytest.mark.parametrize("unsupported", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_an_unsupported_dtype_is_named(unsupported: torch.dtype, device: str) -> None:
    for name in NAMES:
        with pytest.raises(NotImplementedError, match=str(unsupported)):
            getattr(F, name)(torch.ones(PLAIN[name], device=device).to(unsupported))
        # Which torch returns too.
        given = torch.ones(PLAIN[name], device=device).to(unsupported)
        assert getattr(F, name)(given, 0.5, False) is given


def test_float64_is_served_or_refused_with_the_remedy(backend: str, device: str) -> None:
    input = torch.randn(3, 4, dtype=torch.float64, device=device)
    if serves_float64(backend, device):
        kept = F.dropout(input, 0.5, seed=2)
        assert torch.equal(kept, torch.where(kept != 0, 2 * input, 0.0))
    else:
        with pytest.raises(RuntimeError, match=f"{backend}.*float64"):
            F.dropout(input, 0.5, seed=2)


def test_in_place_bumps_the_version_and_spares_leaves(device: str) -> None:
    input = torch.ones(3, 4, device=device)
    version = input._version
    assert F.dropout(input, 0.5, inplace=True) is input
    assert input._version > version
    leaf = torch.ones(3, 4, device=device, requires_grad=True)
    with pytest.raises(
        RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"
    ):
        F.dropout(leaf, 0.5, inplace=True)
    assert (leaf == 1).all()
    # What an operation before it keeps for backward must not be lost silently.
    root = leaf.exp()
    F.dropout(root, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        root.sum().backward()


def test_a_residual_that_is_the_input(device: str) -> None:
    input = torch.randn(5, 8, device=device, requires_grad=True)
    output = F.dropout_add(input, input, 0.5, seed=3)
    kept = (F.dropout(torch.ones_like(input), 0.5, seed=3) != 0).float()
    assert torch.equal(output, input + 2 * kept * input)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert torch.equal(gradient, 1 + 2 * kept)


def test_same_bits_from_any_number_of_threads(backend: str, device: str) -> None:
    shape = (7, 33, 5) if emulated(backend, device) else (130, 1033)
    input = torch.randn(shape, device=device)
    layers = torch.randn(shape[-1], device=device, requires_grad=True)
    previous, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = F.dropout_add(input, input, 0.3, layer_scale=layers, seed=5)
            found.append((output.detach(), *torch.autograd.grad(output.sum(), layers)))
    finally:
        torch.set_num_threads(previous)
    for others in found[1:] if backend != "reference" else ():
        for one, other in zip(found[0], others, strict=True):
            assert same_bits(one, other)


# --- modules ---


def test_modules_are_torchs_with_fastregs_kernels(device: str) -> None:
    for name, shape in (("Dropout", (6, 40)), ("Dropout1d", (4, 5, 9)), ("Dropout2d", (2, 5, 7, 7))):
        ours, torchs = getattr(fastreg.nn, name), getattr(torch.nn, name)
        layer = ours(0.3)
        assert isinstance(layer, torchs)
        assert repr(layer) == repr(torchs(0.3))
        assert layer.state_dict() == {}
        input = torch.randn(shape, device=device)
        torch.manual_seed(1)
        output = layer(input)
        torch.manual_seed(1)
        assert torch.equal(output, getattr(F, name.lower())(input, 0.3))
        assert layer.eval()(input) is input
        in_place = ours(0.3, inplace=True)
        assert in_place(input) is input
        with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
            ours(1.5)


def test_paths_and_additions_as_modules(device: str) -> None:
    input, residual = torch.randn(6, 8, device=device), torch.randn(6, 8, device=device)
    path, add = fastreg.nn.DropPath(0.5, scale_by_keep=False), fastreg.nn.DropoutAdd(0.5)
    torch.manual_seed(2)
    output = path(input)
    torch.manual_seed(2)
    assert torch.equal(path(input, residual), output + residual)
    assert ((output == 0) | (output == input)).all()
    torch.manual_seed(2)
    assert torch.equal(
        add(input, residual) - residual == 0, F.dropout(input, 0.5, generator=_restarted(2, device)) == 0
    )
    assert torch.equal(add.eval()(input, residual), input + residual)
    assert repr(path) == "DropPath(p=0.5, scale_by_keep=False, mode='row')"


def _restarted(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
