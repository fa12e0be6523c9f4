"""The Triton kernels compiled, without a GPU, for every architecture they are meant for.

The launchers run with a recorder in place of Triton's launch, so what is compiled is exactly what they would launch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from bench.static_evidence import machine_code
from fastreg.backends.triton import _device, layer_norm

ARCHITECTURES = (80, 90, 100, 120)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """A recorded launch: a kernel, its arguments by name, and its options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    warps: int

    def constants(self) -> dict[str, Any]:
        constexprs = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        return {name: value for name, value in self.arguments.items() if name in constexprs or value is None}

    def types(self) -> dict[str, str]:
        return {name: self._type(name, value) for name, value in self.arguments.items()}

    def _type(self, name: str, value: Any) -> str:
        if name in self.constants():
            return "constexpr"
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        # A parameter that says so is of 64 bits whatever its value.
        annotated: str = self.kernel.params[self.kernel.arg_names.index(name)].annotation_type
        return annotated or ("i32" if -(2**31) <= value < 2**31 else "i64")

    def aligned(self) -> frozenset[str]:
        """The pointers that Triton finds aligned to 16 bytes when it launches."""
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}
        return frozenset(name for name, tensor in tensors.items() if tensor.data_ptr() % 16 == 0)


@dataclass(frozen=True)
class Compiled:
    """What became of a launch.

    Attributes:
        shared_bytes: of a block.
        wide_loads, wide_stores: the 16-byte accesses of a thread that its tiles of aligned activations make.
        accesses: those in its PTX; a disassembler takes longer than the compilation, and a test compares the two.
    """

    kernel: str
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    wide_loads: int
    wide_stores: int
    accesses: machine_code.Accesses

    def __str__(self) -> str:
        memory = f"{self.stack_bytes} bytes of stack, {self.shared_bytes} of shared memory"
        return f"{self.kernel}: {self.warps} warps, {self.registers} registers, {memory}"


def record(call: Callable[[], Any]) -> list[Launch]:
    launches: list[Launch] = []

    def run(
        self: JITFunction, *arguments: Any, grid: Any, warmup: bool, num_warps: int, **options: Any
    ) -> None:
        named = {**dict(zip(self.arg_names, arguments, strict=False)), **options}
        launches.append(Launch(self, {name: named[name] for name in self.arg_names}, num_warps))

    multiprocessors = mock.patch.object(_device, "multiprocessors", return_value=132)
    with mock.patch.object(JITFunction, "run", run), multiprocessors:
        call()
    return launches


def compiled_kernel(launch: Launch, architecture: int) -> Any:
    names = launch.kernel.arg_names
    constants = {(names.index(name),): value for name, value in launch.constants().items()}
    # In order, since Triton's cache knows a kernel by this text.
    alignment = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(launch.aligned())}
    source = ASTSource(launch.kernel, launch.types(), constants, alignment)
    target = GPUTarget("cuda", architecture, 32)
    return compile(source, target=target, options={"num_warps": launch.warps})


@contextmanager
def cubin(kernel: Any) -> Iterator[Path]:
    """A file with the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        yield Path(file.name)


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    kernel = compiled_kernel(launch, architecture)
    with cubin(kernel) as path:
        usage = machine_code.cuobjdump(path, "--dump-resource-usage")
    (used,) = machine_code.resources(usage).values()
    wide_loads, wide_stores = wide_accesses(launch)
    return Compiled(
        kernel=launch.kernel.__name__,
        warps=launch.warps,
        registers=used.registers,
        stack_bytes=used.stack_bytes,
        shared_bytes=kernel.metadata.shared,
        wide_loads=wide_loads,
        wide_stores=wide_stores,
        accesses=machine_code.accesses_in_ptx(kernel.asm["ptx"]),
    )


LOADED = {
    "normalize_resident": ("input", "residual"),
    "normalize_looped": ("input", "input"),
    "project_looped": ("grad_output", "input"),
    "differentiate": ("grad_output", "input", "grad_sum", "branch"),
    "moments": ("input",),
    "normalize_channels": ("input", "residual"),
    "normalize_slab": ("input", "residual"),
    "sum_gradients": ("grad_output", "input", "residual"),
    "differentiate_channels": ("grad_output", "input", "residual"),
    "differentiate_slab": ("grad_output", "input", "residual"),
    "normalize_groups": ("input",),
    "normalize_group_slab": ("input",),
    "sum_group_gradients": ("grad_output", "input"),
    "differentiate_groups": ("grad_output", "input"),
    "differentiate_group_slab": ("grad_output", "input"),
    "drop": ("input", "residual"),
    "sum_layer_scale": ("grad_output", "input"),
    "apply_planes": ("input",),
    "apply_pixels": ("input",),
}
STORED = {
    "normalize_resident": ("output", "total"),
    "normalize_looped": ("output",),
    "differentiate": ("grad_input", "grad_branch"),
    "normalize_channels": ("output",),
    "normalize_slab": ("output",),
    "sum_gradients": ("grad_input", "grad_residual"),
    "differentiate_channels": ("grad_input", "grad_residual"),
    "differentiate_slab": ("grad_input", "grad_residual"),
    "normalize_groups": ("output",),
    "normalize_group_slab": ("output",),
    "differentiate_groups": ("grad_input",),
    "differentiate_group_slab": ("grad_input",),
    "drop": ("output",),
    "sum_layer_scale": ("grad_input",),
    "apply_planes": ("output",),
    "apply_pixels": ("output",),
}


def wide_accesses(launch: Launch) -> tuple[int, int]:
    """How many 16-byte loads and stores of activations a thread makes for a tile; 0 where nothing is aligned."""
    name, arguments = launch.kernel.__name__, launch.arguments
    if arguments.get("VECTOR", arguments.get("RUN", 0)) < (arguments.get("RUN") or 8):
        return 0, 0
    loaded = tuple(each for each in LOADED.get(name, ()) if arguments[each] is not None)
    stored = tuple(each for each in STORED.get(name, ()) if arguments[each] is not None)
    if name == "differentiate" and not stored and arguments["partial_weight"] is None:
        loaded = ("grad_output",)
    return sum(_wide(launch, each) for each in loaded), sum(_wide(launch, each) for each in stored)


def _wide(launch: Launch, name: str) -> int:
    tile = launch.arguments
    if "RUN" in tile:
        # A run is what a thread has next to each other: of 16-bit elements beside 32-bit ones 8 bytes.
        if tile["RUN"] * tile[name].element_size() < 16 or name not in launch.aligned():
            return 0
        return int(tile.get("ROWS", 1) * tile["RUNS"] // (32 * launch.warps))
    if tile.get("DRAW") is not None and _narrower_than_the_sum(tile, name):
        return 0
    rows = tile.get("ROWS", tile.get("SAMPLES", 1) * tile.get("LINES", 1))
    if "OCTETS" in tile:
        rows = tile["LINES"] * tile["OCTETS"] * 8
    elements = rows * tile["BLOCK"] * tile.get("CHUNKS", 1)
    return int(elements * tile[name].element_size() // (16 * 32 * launch.warps))


def _narrower_than_the_sum(tile: dict[str, Any], name: str) -> bool:
    """Whether these are 16-bit elements of a branch beside 32-bit ones of the sum; or a sum that is not written."""
    total = tile.get("total", tile["input"])
    not_written = name == "total" and not tile.get("KEEPS_TOTAL", True)
    return bool(tile[name].element_size() < total.element_size() or not_written)


# --- what is compiled ----------------------------------------------------------------------------------------------

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


ROWS = 512


@dataclass(frozen=True)
class Shape:
    """A forward, or a backward asked for the ``gradients`` of input, weight and bias, named by their first letters."""

    hidden: int
    dtype: torch.dtype
    parameter: torch.dtype | None
    centred: bool = True
    gradients: str = ""
    aligned: bool = True

    def __str__(self) -> str:
        dtypes = f"{self.dtype}-{self.parameter}".replace("torch.", "")
        tail = f"-d_{self.gradients}" if self.gradients else ""
        tail += "" if self.aligned else "-unaligned"
        return f"{'layer' if self.centred else 'rms'}-{self.hidden}-{dtypes}{tail}"

    def launches(self) -> list[Launch]:
        input, grad_output = self._rows(), self._rows()
        weight = bias = None
        if self.parameter is not None:
            weight, bias = torch.empty(2, self.hidden, dtype=self.parameter).unbind()
        if not self.centred:
            bias = None
        if not self.gradients:
            return record(lambda: layer_norm.norm_forward(input, 1, weight, bias, 1e-5, centred=self.centred))
        statistics = torch.empty((2, ROWS) if self.centred else (ROWS,))
        mask = [name in self.gradients for name in "iwb"]
        return record(
            lambda: layer_norm.norm_backward(
                grad_output, input, 1, statistics, weight, bias, mask, centred=self.centred
            )
        )

    def _rows(self) -> torch.Tensor:
        """Rows of which no element is ever written, and which therefore take no memory."""
        flat = torch.empty(ROWS * self.hidden + 1, dtype=self.dtype)
        return flat[:-1].view(ROWS, self.hidden) if self.aligned else flat[1:].view(ROWS, self.hidden)


# fp32 parameters need the most registers beside 16-bit elements. Sizes at every limit of _launch.py, and odd ones.
SHAPES = (
    *(
        Shape(hidden, BF16, F32)
        for hidden in (64, 768, 1000, 1024, 7168, 8192, 28672, 32768, 65536, 262144, 262152)
    ),
    *(Shape(hidden, BF16, F32) for hidden in (1, 3, 17, 257, 1002, 8193)),
    *(Shape(hidden, F32, F32) for hidden in (64, 1024, 7168, 28672, 32768, 65536)),
    Shape(28672, F32, F32, aligned=False),
    Shape(65536, F16, BF16),
    Shape(4096, F16, F16, centred=False),
    Shape(65536, BF16, BF16, centred=False),
    Shape(1024, BF16, None),
    *(
        Shape(hidden, BF16, F32, gradients="iwb")
        for hidden in (64, 768, 1000, 1024, 5120, 8192, 12288, 65536)
    ),
    *(Shape(hidden, BF16, F32, gradients="iwb") for hidden in (1, 3, 17, 257, 1002, 1004, 8191, 8193)),
    *(Shape(hidden, F32, F32, gradients="iwb") for hidden in (64, 768, 1000, 4096, 10240, 65536)),
    *(Shape(hidden, F16, F16, centred=False, gradients="iw") for hidden in (4096, 12288, 20480)),
    *(Shape(hidden, F32, BF16, centred=False, gradients="iw") for hidden in (10240, 12288)),
    *(Shape(hidden, BF16, F32, gradients="i") for hidden in (64, 1024, 7168, 14336, 20480, 14335)),
    *(Shape(hidden, F32, F32, gradients="i") for hidden in (7168, 14336)),
    Shape(4096, BF16, F32, gradients="b"),
    Shape(65536, BF16, F32, gradients="w"),
    Shape(65535, F16, F16, centred=False, gradients="iw"),
    Shape(65532, F32, F32, gradients="iwb"),
)


class Compilable(Protocol):
    """What can be compiled: a call, and the name by which tests and tables know it."""

    def launches(self) -> list[Launch]: ...


def examine(shape: Compilable, architecture: int) -> list[Compiled]:
    return [compile_launch(launch, architecture) for launch in shape.launches()]


# --- every core of the machine -------------------------------------------------------------------------------------


Compilations = dict[tuple[Any, int], "Future[list[Compiled]]"]

_asked: Compilations = {}


def compilations(wanted: Iterable[tuple[Compilable, int]]) -> Compilations:
    """What becomes of these shapes on these architectures; nothing is compiled twice in a process.

    Raises:
        RuntimeError: Triton is here as its interpreter.
    """
    if not isinstance(layer_norm.differentiate, JITFunction):
        raise RuntimeError("Triton was imported for its interpreter: unset TRITON_INTERPRET to compile")
    keys = list(wanted)
    if missing := [key for key in keys if key not in _asked]:
        pool = ProcessPoolExecutor(mp_context=get_context("spawn"))
        _asked.update({key: pool.submit(examine, *key) for key in missing})
        # Its processes end with the last of these.
        pool.shutdown(wait=False)
    return {key: _asked[key] for key in keys}


# What a release of Triton is known to do worse: the beginning of its version, the case, and how it fails.
_KNOWN_SPILLS = (
    ("3.6.", "layer-7168-float32-float32", 120, "Triton 3.6 spills 16 bytes for sm_120"),
    ("3.6.", "layer-257-bfloat16-float32-d_iwb", 100, "Triton 3.6 spills 8 bytes for sm_100"),
    (
        "3.6.",
        "batch-32x256x14x14-rows-bfloat16-float32-relu-unaligned",
        100,
        "Triton 3.6 spills 8 bytes for sm_100",
    ),
    ("3.6.", "group32-16x640x32x32-planes-float32-float32-gelu", 120, "Triton 3.6 spills 8 bytes for sm_120"),
    (
        "3.6.",
        "dropout_add_layer-1002-bfloat16-float32-float32-d_irwbl-scaled",
        120,
        "Triton 3.6 spills 16 bytes for sm_120",
    ),
)


def expect_known_spills(request: pytest.FixtureRequest, case: str, architecture: int) -> None:
    """Let the test of a case that is known to spill with this release fail, and only fail."""
    for release, name, known, reason in _KNOWN_SPILLS:
        if triton.__version__.startswith(release) and (case, architecture) == (name, known):
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
