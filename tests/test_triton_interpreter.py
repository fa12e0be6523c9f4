"""The mended interpreter notices every kind of error that it claims to, each planted in a small kernel."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import triton_interpreter
from triton_interpreter import InterpreterChanged, OutOfBounds, Unfaithful, traffic

# The interpreter is mended in the run with --backend triton only; nothing is collected from this module in another.
__test__ = triton_interpreter.installed()

BF16 = torch.bfloat16


# --- kernels, right ones and others ---


@triton.jit
def copy(source: tl.tensor, target: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:  # noqa: N803
    offsets = tl.arange(0, BLOCK)
    values = tl.load(source + offsets, mask=offsets < size, other=0.0)
    tl.store(target + offsets, values.to(tl.float32).to(target.dtype.element_ty), mask=offsets < size)


@triton.jit
def copy_rows(
    source: tl.tensor,
    target: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    offsets = tl.arange(0, BLOCK)
    for row in range(rows):
        values = tl.load(source + row * stride + offsets, mask=offsets < columns, other=0.0)
        tl.store(target + row * columns + offsets, values, mask=offsets < columns)


@triton.jit
def copy_row_32(source: tl.tensor, target: tl.tensor, row: tl.tensor, stride: tl.tensor) -> None:
    """int32 offsets, which overflow past 2^31 elements."""
    offsets = row * stride + tl.arange(0, 4)
    tl.store(target + tl.arange(0, 4), tl.load(source + offsets))


@triton.jit
def copy_row_64(source: tl.tensor, target: tl.tensor, row: tl.tensor, stride: tl.tensor) -> None:
    offsets = row.to(tl.int64) * stride + tl.arange(0, 4)
    tl.store(target + tl.arange(0, 4), tl.load(source + offsets))


@triton.jit
def load_without_other(source: tl.tensor, target: tl.tensor, size: tl.tensor) -> None:
    offsets = tl.arange(0, 8)
    tl.store(target + offsets, tl.load(source + offsets, mask=offsets < size))


@triton.jit
def sum_with_padding(source: tl.tensor, target: tl.tensor, size: tl.tensor) -> None:
    offsets = tl.arange(0, 8)
    tl.store(target, tl.sum(tl.load(source + offsets, mask=offsets < size)))


@triton.jit
def double(source: tl.tensor, target: tl.tensor) -> None:
    values = tl.load(source + tl.arange(0, 4))
    tl.store(target + tl.arange(0, 4), values + values)


@triton.jit
def compare(source: tl.tensor, target: tl.tensor) -> None:
    values = tl.load(source + tl.arange(0, 4))
    tl.store(target + tl.arange(0, 4), values < values)


@triton.jit
def total(source: tl.tensor, target: tl.tensor) -> None:
    tl.store(target, tl.reduce(tl.load(source + tl.arange(0, 4)), 0, _larger))


@triton.jit
def _larger(first: tl.tensor, second: tl.tensor) -> tl.tensor:
    return tl.maximum(first, second)


@triton.jit
def add_atomically(source: tl.tensor, target: tl.tensor) -> None:
    tl.atomic_add(target + tl.arange(0, 4), tl.load(source + tl.arange(0, 4)))


@triton.jit
def load_misaligned(source: tl.tensor, target: tl.tensor) -> None:
    half = (source.to(tl.int64, bitcast=True) + 2).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(target, tl.load(half))


@triton.jit
def copy_in_a_function(source: tl.tensor, target: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:  # noqa: N803
    copy(source, target, size, BLOCK)


# --- rounding ---


def test_bf16_is_rounded_to_nearest_even() -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(2048, dtype=torch.int32) << 19) + 0x8000
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-40])
    source = torch.cat((bits.view(torch.float32), ties.view(torch.float32), special))
    target = torch.zeros(source.numel(), dtype=BF16)
    copy[(1,)](source, target, source.numel(), 8192)
    torch.testing.assert_close(target, source.to(BF16), rtol=0, atol=0, equal_nan=True)


def test_bf16_is_widened_exactly() -> None:
    source = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    target = torch.zeros(source.numel())
    copy[(1,)](source, target, source.numel(), 65536)
    torch.testing.assert_close(target, source.float(), rtol=0, atol=0, equal_nan=True)


# --- what is refused ---


@pytest.mark.parametrize("kernel", [double, compare, total], ids=lambda kernel: kernel.__name__)
def test_bf16_arithmetic_is_refused(kernel: interpreter.InterpretedFunction) -> None:
    kernel[(1,)](torch.ones(4), torch.zeros(4))
    with pytest.raises(Unfaithful, match="raw bits"):
        kernel[(1,)](torch.ones(4, dtype=BF16), torch.zeros(4))


def test_atomics_are_refused() -> None:
    with pytest.raises(Unfaithful, match="order of programs"):
        add_atomically[(1,)](torch.ones(4), torch.zeros(4))


# --- bounds ---


def test_a_lane_past_the_end_is_noticed() -> None:
    storage = torch.zeros(64)
    copy[(1,)](storage[:10], storage[32:42], 10, 16)
    with pytest.raises(OutOfBounds, match=r"copy: 1 lanes of loads of 4 bytes .* 40 bytes from source"):
        copy[(1,)](storage[:10], storage[32:], 11, 16)
    with pytest.raises(OutOfBounds, match="lanes of stores"):
        copy[(1,)](storage[:16], storage[32:42], 11, 16)


def test_a_lane_before_the_start_is_noticed() -> None:
    storage = torch.zeros(64)
    with pytest.raises(OutOfBounds, match="-4 bytes from source"):
        copy_rows[(1,)](storage[1:9], storage[32:], 2, 4, -1, 4)


def test_the_gap_between_the_rows_of_a_slice_is_out_of_bounds() -> None:
    source = torch.zeros(3, 8)[:, :5]
    copy_rows[(1,)](source, torch.zeros(3, 5), 3, 5, 8, 8)
    with pytest.raises(OutOfBounds, match="of loads"):
        copy_rows[(1,)](source, torch.zeros(3, 6), 3, 6, 8, 8)


def test_an_expanded_row_may_be_read_again() -> None:
    target = torch.zeros(3, 5)
    copy_rows[(1,)](torch.arange(5.0).expand(3, 5), target, 3, 5, 0, 8)
    assert target.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_a_misaligned_lane_is_noticed() -> None:
    with pytest.raises(OutOfBounds, match="hit no element"):
        load_misaligned[(1,)](torch.zeros(4), torch.zeros(4))


def test_an_empty_tensor_has_no_element() -> None:
    with pytest.raises(OutOfBounds, match="of loads"):
        copy[(1,)](torch.zeros(0), torch.zeros(4), 1, 4)


def test_int32_offsets_that_overflow_are_noticed() -> None:
    """A strided view of memory that is never touched, and therefore never there."""
    stride = 2**30
    source = torch.empty(3 * stride + 4, dtype=torch.float16).as_strided((4, 4), (stride, 1))
    source[3] = torch.arange(4.0)
    target = torch.zeros(4, dtype=torch.float16)
    copy_row_64[(1,)](source, target, 3, stride)
    assert target.tolist() == [0, 1, 2, 3]
    with pytest.raises(OutOfBounds, match="of loads"):
        copy_row_32[(1,)](source, target, 3, stride)


# --- poison ---


@pytest.mark.parametrize("dtype_name", ["float32", "float16", "bfloat16"])
def test_a_masked_lane_without_other_is_not_a_number(dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    target = torch.zeros(8, dtype=dtype)
    load_without_other[(1,)](torch.ones(5, dtype=dtype), target, 5)
    assert target[:5].tolist() == [1] * 5
    assert target[5:].isnan().all()


def test_a_masked_integer_lane_without_other_is_large() -> None:
    target = torch.zeros(8, dtype=torch.int32)
    load_without_other[(1,)](torch.ones(5, dtype=torch.int32), target, 5)
    assert target.tolist() == [1] * 5 + [2**31 - 1] * 3


def test_padding_that_leaks_into_a_sum_shows() -> None:
    target = torch.zeros(1)
    sum_with_padding[(1,)](torch.ones(8), target, 8)
    assert target.item() == 8
    sum_with_padding[(1,)](torch.ones(5), target, 5)
    assert target.isnan().all()


# --- traffic ---


def test_traffic_counts_the_lanes_that_are_on() -> None:
    source, target = torch.zeros(12), torch.zeros(12, dtype=BF16)
    with traffic() as counted:
        copy[(1,)](source, target, 10, 16)
        with traffic() as inner:
            copy[(1,)](source, target, 3, 16)
    copy[(1,)](source, target, 10, 16)
    assert (inner.loaded, inner.stored) == (12, 6)
    assert (counted.loaded, counted.stored) == (52, 26)
    assert counted.loads == {("copy", "source"): 52}
    assert counted.of("target") == 26
    assert counted.of("source", "target") == 78


def test_traffic_of_a_function_counts_for_its_kernel() -> None:
    with traffic() as counted:
        copy_in_a_function[(1,)](torch.zeros(8), torch.zeros(8), 8, 8)
    assert counted.stores == {("copy_in_a_function", "target"): 32}


# --- a Triton with other internals ---


def test_a_hook_that_is_gone_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_interpreter, "_installed", False)
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_masked_store")
    with pytest.raises(InterpreterChanged, match=r"create_masked_store.*no longer exists"):
        triton_interpreter.install()


def test_a_hook_with_other_arguments_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_interpreter, "_installed", False)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "binary_op", lambda self, op, lhs, rhs: None)
    with pytest.raises(InterpreterChanged, match="binary_op should take"):
        triton_interpreter.install()


@pytest.mark.parametrize("hook", ["create_masked_load", "create_masked_store", "binary_op"])
def test_a_hook_that_is_not_in_use_fails_loudly(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mended = getattr(interpreter.InterpreterBuilder, hook)
    monkeypatch.setattr(interpreter.InterpreterBuilder, hook, mended.__wrapped__)
    with pytest.raises(InterpreterChanged, match="not true any more"):
        triton_interpreter.prove()


def test_another_rounding_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_convert_float", interpreter._convert_float.__wrapped__)
    with pytest.raises(InterpreterChanged, match="rounded to bf16"):
        triton_interpreter.prove()
