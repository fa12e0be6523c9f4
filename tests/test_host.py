"""What the host side has to bear: threads, thread counts, tensor subclasses, tracing modes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from backend_under_test import emulated
from cases import Case
from group_norms import GROUP_NORM
from specs import OWN_WAYS, ROW_NORMS
from suite import OpSpec, check_case, make_tensors, plain_case, run, same_bits

# What is above the kernels is the same for every backend: the others have it in a complete run.
pytestmark = pytest.mark.complete(backend=("reference", "triton", "cuda_sim"))

each_spec = pytest.mark.parametrize("spec", OWN_WAYS, ids=lambda spec: spec.name)
each_row_norm = pytest.mark.parametrize("spec", ROW_NORMS, ids=lambda spec: spec.name)


def case_of(spec: OpSpec, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Case:
    return plain_case(spec, spec.size(rows, columns), spec.mix(dtype))


@each_spec
def test_any_number_of_torch_threads(spec: OpSpec, threads: int, backend: str, device: str) -> None:
    """Enough rows that a parallel backend shares them out; a thread count keeps its bits (check_case runs twice).

    conftest.py leaves one thread count to the emulated backends, which make nothing of it.
    """
    sizes = ((301, 65), (64, 257), (2, 1031))
    if spec is GROUP_NORM and emulated(backend, device):
        # Rows are samples there, each a program of its own.
        sizes = sizes[2:]
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, columns in sizes:
            check_case(spec, case_of(spec, rows, columns), device)
            check_case(spec, case_of(spec, rows, columns, torch.bfloat16), device)
    finally:
        torch.set_num_threads(previous)


@each_spec
def test_calls_from_several_threads(spec: OpSpec, backend: str, device: str) -> None:
    # Triton's interpreter keeps the program that runs in global variables: there, one thread that is not the main one.
    threads = 1 if (backend, device) == ("triton", "cpu") else 4
    rows = 5 if spec is GROUP_NORM else 33
    examples = [case_of(spec, rows, 40 + extra) for extra in range(8)]
    tensors = [make_tensors(spec, case, device) for case in examples]
    alone = [run(spec, case, each) for case, each in zip(examples, tensors, strict=True)]
    # Each call has tensors of its own: a training step updates its running statistics.
    own = [
        {name: None if tensor is None else tensor.clone() for name, tensor in each.items()}
        for each in tensors * 3
    ]
    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(lambda pair: run(spec, *pair), zip(examples * 3, own, strict=True)))
    for index, results in enumerate(together):
        for name, result in results.items():
            assert same_bits(result, alone[index % 8][name])


@each_spec
def test_a_tensor_subclass_is_asked_first(spec: OpSpec, device: str) -> None:
    seen: list[Any] = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    input = torch.randn(3, 4, device=device)
    output = spec.call(spec.function, input.as_subclass(Watched))
    ours = [each for each in seen if (getattr(each, "__module__", None) or "").startswith("fastreg")]
    assert ours[0] is spec.function
    assert torch.equal(output.as_subclass(torch.Tensor), spec.call(spec.function, input))


@each_spec
def test_a_mode_sees_the_call(spec: OpSpec, device: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    input = torch.randn(3, 4, device=device, requires_grad=True)
    with Watch():
        spec.call(spec.function, input).backward(torch.ones(3, 4, device=device))
    assert [name.partition(".")[2] for name in seen if name.startswith("fastreg")] == [
        f"{spec.name}_fwd.default",
        f"{spec.name}_bwd.default",
    ]


@each_row_norm
def test_views_and_layouts_of_the_output(spec: OpSpec, device: str) -> None:
    """The output is a fresh, contiguous tensor whatever the input's layout, as torch's."""
    base = torch.randn(2, 5, 6, 4, device=device)
    for input in (base, base.permute(0, 2, 1, 3), base[:, ::2], base[:, :1].expand(2, 5, 6, 4)):
        output = spec.function(input, (4,))
        assert output.is_contiguous()
        assert output.untyped_storage().data_ptr() != input.untyped_storage().data_ptr()
        torch.testing.assert_close(output, spec.torch_function(input, (4,)))
    channels_last = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        spec.function(channels_last, (3, 4, 5)), spec.torch_function(channels_last, (3, 4, 5))
    )


@each_spec
def test_parameters_cut_from_one_flat_buffer(spec: OpSpec, device: str) -> None:
    """As optimisers and FSDP lay them out: each parameter starts wherever the one before it ends."""
    case = case_of(spec, 5, 129)
    tensors = make_tensors(spec, case, device)
    flat = torch.full((3 + 129 * len(spec.parameters),), torch.nan, device=device)
    expected = run(spec, case, tensors)
    for place, name in enumerate(spec.parameters):
        start = 3 + 129 * place
        values = tensors[name]
        assert values is not None
        tensors[name] = flat[start : start + 129].copy_(values)
    for name, result in run(spec, replace(case), tensors).items():
        torch.testing.assert_close(result, expected[name])


@each_row_norm
def test_fake_and_real_agree_when_nothing_is_there(spec: OpSpec, device: str) -> None:
    for shape in ((0, 4), (2, 0, 4), (1, 1)):
        input = torch.randn(shape, device=device, requires_grad=True)
        output = spec.function(input, shape[-1:])
        traced = spec.function(torch.empty(shape, device="meta", requires_grad=True), shape[-1:])
        assert (output.shape, output.stride()) == (traced.shape, traced.stride())
        output.sum().backward()
        assert input.grad is not None
        assert input.grad.shape == shape
