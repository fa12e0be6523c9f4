"""Tests nobody here wrote: PyTorch's own samples and error inputs, run through fastreg on the backend under test."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import fastreg
from backend_under_test import emulated
from specs import ROW_NORMS, SPECS
from suite import OpSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.opinfo.core import OpInfo

# Of several of one name the first; the others are variants for a GPU.
OP_INFOS = {
    info.name.removeprefix("nn.functional."): info
    for info in reversed(op_db)
    if info.name.startswith("nn.functional.")
}
# Those that torch has too and that need no other process; tests/test_sync_batch_norm.py has the rest.
MODULES = [
    getattr(fastreg.nn, name)
    for name in fastreg.nn.__all__
    if hasattr(torch.nn, name)
    and not issubclass(
        getattr(fastreg.nn, name), torch.nn.SyncBatchNorm | torch.nn.modules.dropout._DropoutNd
    )
]
DROPOUTS = ("dropout", "dropout2d", "dropout3d")
# Wide: the op suite holds the same kernels to a rounding budget; here the samples count.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_LARGE = 1000
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def in_float64(tree: Any) -> Any:
    """Copies of the same tensors in float64, detached, with the same requires_grad."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.detach().to(torch.float64, copy=True).requires_grad_(leaf.requires_grad)

    return tree_map(convert, tree)


def requiring_grad(*trees: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(trees)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def assert_close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def samples(spec: OpSpec, device: str, dtype: torch.dtype, backend: str) -> Iterator[Any]:
    """Reference inputs are all samples and more of them, where there are any."""
    info: OpInfo = OP_INFOS[spec.name]
    for sample in info.reference_inputs(device, dtype, requires_grad=True):
        # Torch's batch norm lets an empty vector pass, which has no channels; ours wants two dimensions.
        vector = sample.input.dim() < 2 and spec not in ROW_NORMS
        # Group norm's are ten thousand elements each, the same again for every choice of parameters.
        large = sample.input.numel() > _LARGE and emulated(backend, device)
        if not vector and not large:
            yield sample


@each_spec
def test_opinfo_samples(spec: OpSpec, dtype: torch.dtype, backend: str, device: str) -> None:
    count = 0
    for sample in samples(spec, device, dtype, backend):
        count += 1
        copies = in_float64((sample.input, sample.args, sample.kwargs))
        output = spec.function(sample.input, *sample.args, **sample.kwargs)
        exact = spec.torch_function(copies[0], *copies[1], **copies[2])
        assert_close(output, exact, dtype)
        leaves, exact_leaves = (
            requiring_grad(sample.input, sample.args, sample.kwargs),
            requiring_grad(*copies),
        )
        weights = torch.randn(output.shape, device=device).to(dtype)
        gradients = torch.autograd.grad(output, leaves, weights)
        exact_gradients = torch.autograd.grad(exact, exact_leaves, weights.double())
        for leaf, found, expected in zip(leaves, gradients, exact_gradients, strict=True):
            assert_close(found, expected, leaf.dtype)
        # What was changed in place.
        for found, expected in zip(sample.args, copies[1], strict=True):
            if isinstance(found, torch.Tensor):
                assert_close(found, expected, dtype)
    assert count >= 6


@each_spec
def test_opinfo_noncontiguous_samples(spec: OpSpec, dtype: torch.dtype, backend: str, device: str) -> None:
    count = 0
    for sample in samples(spec, device, dtype, backend):
        count += 1
        other = sample.noncontiguous()
        found = spec.function(other.input, *other.args, **other.kwargs)
        expected = spec.function(sample.input, *sample.args, **sample.kwargs)
        assert found.is_contiguous() or spec not in ROW_NORMS
        torch.testing.assert_close(found, expected)
    assert count >= 6


@each_spec
def test_opinfo_error_inputs(spec: OpSpec, device: str) -> None:
    """Not every OpInfo has error inputs; where there are some, ours are refused alike."""
    info = OP_INFOS[spec.name]
    refused = list(info.error_inputs(torch.device(device))) if info.error_inputs_func is not None else []
    for each in refused:
        sample = each.sample_input
        with pytest.raises(each.error_type, match=each.error_regex):
            spec.function(sample.input, *sample.args, **sample.kwargs)
    assert len(refused) >= 2 or info.error_inputs_func is None


@each_spec
def test_opinfo_dtypes_are_all_served(spec: OpSpec) -> None:
    real = {dtype for dtype in OP_INFOS[spec.name].dtypes if not dtype.is_complex}
    assert real == {torch.float32, torch.bfloat16, torch.float16, torch.float64}


@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.filterwarnings("ignore:dropout")
def test_opinfo_samples_of_dropout(name: str, dtype: torch.dtype, device: str) -> None:
    """What is kept is torch's value; what is dropped is up to the random stream. Torch's modules have no samples."""
    count = 0
    for sample in OP_INFOS[name].sample_inputs(torch.device(device), dtype):
        count += 1
        p, training = sample.kwargs.get("p", 0.5), sample.kwargs.get("training", True)
        input = sample.input.detach()
        found = getattr(fastreg.functional, name)(sample.input.detach(), *sample.args, **sample.kwargs)
        expected = input.double() / (1 - p) if training and p < 1 else input.double()
        kept = found != 0
        assert found.shape == input.shape
        torch.testing.assert_close(found[kept].double(), expected[kept], rtol=1e-2, atol=0)
        assert kept.all() or training
    assert count >= 3


@pytest.mark.parametrize(
    ("module", "training"),
    [
        pytest.param(module, training, id=f"{'train' if training else 'eval'}-{module.__name__}")
        for training in (True, False)
        for module in MODULES
        # Which is the same in evaluation.
        if training or module is not fastreg.nn.GroupNorm
    ],
)
def test_module_info_samples(
    module: type[torch.nn.Module], training: bool, dtype: torch.dtype, device: str
) -> None:
    (info,) = [info for info in module_db if info.module_cls is getattr(torch.nn, module.__name__)]
    count = 0
    for sample in info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=training
    ):
        count += 1
        arguments = sample.constructor_input
        layer = module(*arguments.args, **arguments.kwargs).to(device, dtype).train(training)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_()
        original = (
            info.module_cls(*arguments.args, **arguments.kwargs).to(device, torch.float64).train(training)
        )
        original.load_state_dict(layer.state_dict())
        inputs = sample.forward_input
        copies = in_float64((inputs.args, inputs.kwargs))
        output, exact = layer(*inputs.args, **inputs.kwargs), original(*copies[0], **copies[1])
        assert_close(output, exact, dtype)
        weights = torch.linspace(-1, 2, output.numel(), device=device).view(output.shape)
        output.backward(weights.to(dtype))
        exact.backward(weights.to(dtype).double())
        for found, expected in zip(layer.parameters(), original.parameters(), strict=True):
            assert_close(found.grad, expected.grad, dtype)
        for found, expected in zip(layer.buffers(), original.buffers(), strict=True):
            assert_close(found, expected, dtype) if found.is_floating_point() else torch.testing.assert_close(
                found, expected
            )
        if sample.reference_fn is not None:
            # Torch's own reference functions pass through float32 whatever they are given.
            expected = sample.reference_fn(original, *copies[0], **copies[1])
            tolerance = max(TOLERANCE[dtype], TOLERANCE[torch.float32])
            torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    assert count >= 3
