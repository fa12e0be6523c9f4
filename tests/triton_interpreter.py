"""Mends Triton's interpreter, so that a kernel which passes on the CPU deserves some trust on a GPU.

As it comes, the interpreter truncates when it converts fp32 to bf16, computes bf16 arithmetic on the raw bits, reads 0
where a masked load names no ``other`` (a GPU reads anything), and notices neither a lane out of bounds nor a misaligned
one. ``install`` replaces the functions in which it does so:

- fp32 becomes bf16 by rounding to nearest, ties to even;
- a fused multiply-add of fp32 rounds once;
- arithmetic, reductions and conversions that would be computed on the raw bits of bf16 raise ``Unfaithful``;
- every lane of every load and store must hit an element of one of the tensors passed to the launch: not the storage
  around a view, not the gap between the rows of a slice; else ``OutOfBounds``;
- masked lanes without ``other`` read NaN, or the largest integer;
- atomics raise ``Unfaithful``: fastreg has none, and they would go unchecked;
- bytes are counted for each argument of each kernel: ``with traffic() as counted: ...``.

These are internals of Triton, the same from 3.6 to 3.9. ``install`` checks that they are there and, by a kernel with a
planted error for each, that the replacements are in use; a Triton whose internals moved fails there, not silently.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    """A lane of a load or store does not hit an element of any tensor passed to the kernel."""


class Unfaithful(AssertionError):
    """The interpreter would compute something else than a GPU."""


class InterpreterChanged(RuntimeError):
    """This version of Triton's interpreter is not the one that this module knows how to mend."""


# --- what a launch may touch, and what it did ----------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """The elements of a tensor passed to a launch."""

    name: str
    start: int
    itemsize: int
    extent: int
    gaps: bool
    dims: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _View | None:
        if tensor.numel() == 0:
            return None
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        dims = sorted((pair for pair in pairs if pair[0] and pair[1] > 1), reverse=True)
        extent = 1 + sum(stride * (size - 1) for stride, size in dims)
        gaps = extent != math.prod(size for _, size in dims)
        return cls(name, tensor.data_ptr(), tensor.element_size(), extent, gaps, tuple(dims))

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """Which of the addresses are those of an element."""
        index, remainder = np.divmod(addresses.astype(np.int64) - self.start, self.itemsize)
        inside = (index >= 0) & (index < self.extent) & (remainder == 0)
        if not self.gaps:
            return inside
        for stride, size in self.dims:
            index = index - np.minimum(index // stride, size - 1) * stride
        return inside & (index == 0)

    def near(self, addresses: np.ndarray) -> bool:
        """Whether an address may be one of an element."""
        return bool(
            addresses.max() >= self.start and addresses.min() < self.start + self.extent * self.itemsize
        )


@dataclass
class Traffic:
    """Bytes moved by lanes that are not masked off, by kernel and argument."""

    loads: Counter[tuple[str, str]] = field(default_factory=Counter)
    stores: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def loaded(self) -> int:
        return self.loads.total()

    @property
    def stored(self) -> int:
        return self.stores.total()

    def of(self, *arguments: str) -> int:
        """Bytes loaded from and stored to the arguments of these names, in all kernels."""
        both = self.loads + self.stores
        return sum(count for (_, argument), count in both.items() if argument in arguments)


@dataclass
class _Launch:
    kernel: str
    views: list[_View]
    patched: set[str] = field(default_factory=set)


_launch: _Launch | None = None
_counting: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the bytes that kernels launched inside the block load and store."""
    counted = Traffic()
    _counting.append(counted)
    try:
        yield counted
    finally:
        _counting.remove(counted)


def _record(kind: str, pointers: Any, mask: Any) -> None:
    """Check the addresses of the lanes that are on, and count their bytes."""
    if _launch is None:
        raise InterpreterChanged("a memory access outside of any launch that this module has seen")
    lanes = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
    addresses = pointers.data[lanes]
    itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    missed = np.ones(addresses.shape, dtype=bool)
    for view in _launch.views:
        if view.itemsize != itemsize or not missed.any() or not view.near(addresses):
            continue
        hit = missed & view.holds(addresses)
        missed &= ~hit
        count = int(hit.sum()) * itemsize
        if count:
            for counted in _counting:
                getattr(counted, kind)[_launch.kernel, view.name] += count
    if missed.any():
        raise OutOfBounds(_describe(kind, addresses[missed], itemsize))


def _describe(kind: str, addresses: np.ndarray, itemsize: int) -> str:
    assert _launch is not None
    first = int(addresses[0])
    nearest = min(_launch.views, key=lambda view: abs(first - view.start), default=None)
    where = "far from any" if nearest is None else f"{first - nearest.start} bytes from {nearest.name}"
    lanes = f"{addresses.size} lanes of {kind} of {itemsize} bytes"
    return f"{_launch.kernel}: {lanes} hit no element; the first is {where}"


# --- replacements --------------------------------------------------------------------------------------------------


def _convert_float(original: Callable[..., Any]) -> Callable[..., Any]:
    """fp32 to bf16 rounds as a GPU does; the way back is exact."""

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.bfloat16 and target == tl.float32:
            return (data.view(np.uint16).astype(np.uint32) << 16).reshape(data.shape)
        if source != tl.float32 or target != tl.bfloat16:
            converted: np.ndarray = original(data, source, target, rounding)
            return converted
        if rounding is not None and "RTNE" not in str(rounding):
            raise Unfaithful(f"fp32 to bf16 with rounding mode {rounding}")
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(is_nan, np.uint16(0x7FC0), rounded).reshape(data.shape)

    return convert


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _refuse_bf16(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute(self: Any, *arguments: Any, **options: Any) -> Any:
        if any(_is_bf16(argument) for argument in arguments):
            raise Unfaithful(
                f"bf16 arithmetic ({original.__name__}) works on raw bits here; cast to float32 first"
            )
        return original(self, *arguments, **options)

    return compute


def _fused(original: Callable[..., Any]) -> Callable[..., Any]:
    refused = _refuse_bf16(original)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.float32:
            return refused(self, x, y, z)
        # In float64 the product is exact. The sum is not: rounded to odd, it can be rounded once more.
        product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
        total = product + addend
        other = total - product
        error = (product - (total - other)) + (addend - other)
        inexact = np.isfinite(error) & (error != 0) & (total.view(np.int64) % 2 == 0)
        odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return interpreter.TensorHandle(np.where(inexact, odd, total).astype(np.float32), z.dtype.scalar)

    return create_fma


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any) -> Any:
        types = {source.dtype.scalar, target.scalar}
        if tl.bfloat16 in types and not types <= {tl.bfloat16, tl.float32}:
            raise Unfaithful(
                f"conversion of {source.dtype} to {target} works on raw bits here; go through float32"
            )
        return original(self, source, target)

    return cast


def _check_reduced(original: Callable[..., Any]) -> Callable[..., Any]:
    def check_tensor(self: Any, tensors: Any) -> Any:
        if any(_is_bf16(tensor.handle) for tensor in tensors):
            raise Unfaithful("a reduction or scan of bf16 works on raw bits here; cast to float32 first")
        return original(self, tensors)

    return check_tensor


def _refuse_atomic(original: Callable[..., Any]) -> Callable[..., Any]:
    def atomic(self: Any, *arguments: Any, **options: Any) -> Any:
        raise Unfaithful(
            f"{original.__name__}: results would depend on the order of programs, and go unchecked here"
        )

    return atomic


def _masked_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, pointers: Any, mask: Any, other: Any, *policy: Any, **options: Any) -> Any:
        _record("loads", pointers, mask)
        if other is None:
            other = _poison(pointers)
        return original(self, pointers, mask, other, *policy, **options)

    return load


def _poison(pointers: Any) -> Any:
    element = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    if element == tl.bfloat16:
        value: Any = 0x7FC0
    elif np.issubdtype(dtype, np.floating):
        value = np.nan
    else:
        value = True if dtype == np.bool_ else np.iinfo(dtype).max
    return interpreter.TensorHandle(np.full(pointers.data.shape, value, dtype=dtype), element)


def _masked_store(original: Callable[..., Any]) -> Callable[..., Any]:
    def store(self: Any, pointers: Any, value: Any, mask: Any, *policy: Any, **options: Any) -> Any:
        _record("stores", pointers, mask)
        return original(self, pointers, value, mask, *policy, **options)

    return store


def _arguments_on_host(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where a launch has copied its arguments to the host, note which memory they are."""

    def arguments_on_host(self: Any, positional: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        global _launch
        host_positional, host_keywords = original(self, positional, keywords)
        named = {**dict(zip(self.arg_names, host_positional, strict=False)), **host_keywords}
        views = [_View.of(name, value) for name, value in named.items() if isinstance(value, torch.Tensor)]
        _launch = _Launch(self.fn.__name__, [view for view in views if view is not None])
        return host_positional, host_keywords

    return arguments_on_host


def _launched(original: Callable[..., Any]) -> Callable[..., Any]:
    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        global _launch
        try:
            return original(self, *arguments, **options)
        except interpreter.InterpreterError as error:
            # Triton wraps what a kernel raises in one error for each function it was raised through.
            cause: BaseException | None = error
            while isinstance(cause, interpreter.InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, OutOfBounds | Unfaithful | InterpreterChanged):
                raise cause from None
            raise
        finally:
            _launch = None

    return launch


def _patched_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        # Triton 3.6 calls int() on an array of one element, which NumPy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def _patched_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Triton patches its language again for every call of a function inside a kernel, at half the cost of a kernel."""

    def patch(function: Any) -> Any:
        modules = {name for name in ("tl", "core") if function.__globals__.get(name) in (tl, tl.core)}
        if _launch is None or not modules:
            return original(function)
        if modules <= _launch.patched:
            return interpreter._LangPatchScope()
        _launch.patched |= modules
        return original(function)

    return patch


# (owner, name, replacement, its leading parameters in the versions of Triton that are known)
_REPLACEMENTS: tuple[tuple[Any, str, Callable[..., Any], tuple[str, ...]], ...] = (
    (
        interpreter,
        "_convert_float",
        _convert_float,
        ("input", "input_dtype", "output_dtype", "rounding_mode"),
    ),
    (interpreter, "_patch_lang", _patched_once, ("fn",)),
    (interpreter, "_patch_lang_tensor", _patched_tensor, ("tensor", "scope")),
    (interpreter.InterpreterBuilder, "binary_op", _refuse_bf16, ("self", "lhs", "rhs", "op")),
    (interpreter.InterpreterBuilder, "unary_op", _refuse_bf16, ("self", "arg", "op")),
    (interpreter.InterpreterBuilder, "create_fma", _fused, ("self", "x", "y", "z")),
    (interpreter.InterpreterBuilder, "create_rsqrt", _refuse_bf16, ("self", "arg")),
    (interpreter.InterpreterBuilder, "create_dot", _refuse_bf16, ("self", "a", "b", "d")),
    (interpreter.InterpreterBuilder, "cast_impl", _cast, ("self", "src", "dst_type")),
    (interpreter.InterpreterBuilder, "create_masked_load", _masked_load, ("self", "ptrs", "mask", "other")),
    (interpreter.InterpreterBuilder, "create_masked_store", _masked_store, ("self", "ptrs", "value", "mask")),
    (interpreter.InterpreterBuilder, "create_atomic_rmw", _refuse_atomic, ("self",)),
    (interpreter.InterpreterBuilder, "create_atomic_cas", _refuse_atomic, ("self",)),
    (interpreter.ReduceScanOpInterface, "check_tensor", _check_reduced, ("self", "input")),
    (interpreter.GridExecutor, "_init_args_hst", _arguments_on_host, ("self", "args_dev", "kwargs")),
    (interpreter.GridExecutor, "__call__", _launched, ("self",)),
)
_installed = False


def installed() -> bool:
    """Whether the interpreter of this process has been mended."""
    return _installed


def install() -> None:
    """Mend the interpreter, once, and prove it.

    Raises:
        InterpreterChanged: TRITON_INTERPRET=1 was not set before triton was imported, or this version of Triton has
            other internals than those that this module replaces.
    """
    global _installed
    if _installed:
        return
    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        raise InterpreterChanged("set TRITON_INTERPRET=1 before anything imports triton")
    for owner, name, _, parameters in _REPLACEMENTS:
        original = getattr(owner, name, None)
        found = tuple(inspect.signature(original).parameters) if original is not None else ()
        if original is None or found[: len(parameters)] != parameters:
            raise InterpreterChanged(
                f"triton {triton.__version__}: {owner.__name__}.{name} should take {parameters} and more, "
                + (f"takes {found}" if original is not None else "no longer exists")
            )
    for owner, name, replacement, _ in _REPLACEMENTS:
        original = getattr(owner, name)
        setattr(owner, name, wraps(original)(replacement(original)))
    _installed = True
    prove()


# --- proof ---------------------------------------------------------------------------------------------------------


@triton.jit
def _probe(
    source: tl.tensor,
    target: tl.tensor,
    size: tl.tensor,
    target_size: tl.tensor,
    OTHER: tl.constexpr,  # noqa: N803
    BF16: tl.constexpr,  # noqa: N803
    FMA: tl.constexpr = False,  # noqa: N803
) -> None:
    offsets = tl.arange(0, 8)
    values = tl.load(source + offsets, mask=offsets < size, other=OTHER)
    if BF16:
        values = values.to(tl.bfloat16) + values.to(tl.bfloat16)
    if FMA:
        values = tl.fma(values, values, -1.0)
    tl.store(target + offsets, values.to(target.dtype.element_ty), mask=offsets < target_size)


def _raises(kind: type[AssertionError], *arguments: Any) -> bool:
    try:
        _probe[(1,)](*arguments)
    except kind:
        return True
    return False


def prove() -> None:
    """Raise ``InterpreterChanged`` unless each replacement is in use."""
    # 1 + 2^-8 + 2^-20 rounds up in bf16, and 1 + 2^-8 down to even; truncation takes both down.
    source = torch.tensor([1 + 2**-8 + 2**-20, 1 + 2**-8, 1.0, 2.0, 3.0])
    rounded, poisoned = torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8)
    with traffic() as counted:
        _probe[(1,)](source, rounded, 5, 5, 0.0, False)
    _probe[(1,)](source, poisoned, 5, 8, None, False)
    # (1 + 2^-12)^2 - 1 has as many digits as the product, of which the last is lost if that is rounded.
    fused, factors = torch.zeros(8), torch.full((5,), 1 + 2**-12)
    _probe[(1,)](factors, fused, 5, 5, 0.0, False, True)
    found = {
        "fp32 is rounded to bf16": rounded[:2].tolist() == [1 + 2**-7, 1.0],
        "a fused multiply-add rounds once": fused[0].item() == 2**-11 + 2**-24,
        "loads are counted": counted.loads == {("_probe", "source"): 20},
        "stores are counted": counted.stores == {("_probe", "target"): 10},
        "masked lanes without other are poisoned": bool(poisoned[5:].isnan().all()),
        "a load out of bounds is noticed": _raises(OutOfBounds, source, poisoned, 6, 5, 0.0, False),
        "a store out of bounds is noticed": _raises(OutOfBounds, source, poisoned[:4], 5, 5, 0.0, False),
        "bf16 arithmetic is refused": _raises(Unfaithful, source, poisoned, 5, 5, 0.0, True),
    }
    failed = [claim for claim, holds in found.items() if not holds]
    if failed:
        raise InterpreterChanged(f"triton {triton.__version__}: not true any more: {'; '.join(failed)}")
