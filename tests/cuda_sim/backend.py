"""The backend ``cuda_sim``: the CUDA kernels behind the functions that every backend has, on CPU tensors."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cuda_sim import build

OPERATORS = (
    *("layer_norm_fwd", "layer_norm_bwd", "rms_norm_fwd", "rms_norm_bwd"),
    *("batch_norm_fwd", "batch_norm_eval", "batch_norm_moments", "batch_norm_apply"),
    *("batch_norm_bwd", "batch_norm_sums", "batch_norm_bwd_apply"),
    *("group_norm_fwd", "group_norm_bwd", "instance_norm_fwd"),
    *("dropout_fwd", "dropout_inplace", "dropout_bwd"),
    *("drop_block_mask", "drop_block_apply", "drop_block_inplace"),
    *("dropout_add_layer_norm_fwd", "dropout_add_layer_norm_bwd"),
    *("dropout_add_rms_norm_fwd", "dropout_add_rms_norm_bwd"),
)
ORDERS = ("first in first out", "last in first out", "random")


@dataclass(frozen=True)
class Device:
    """The device to simulate, and what it leaves open.

    Attributes:
        architecture: 90 for compute capability 9.0; clusters exist from there on.
        multiprocessors: how many; with few, a persistent kernel goes over many rows in each block.
        order: which of the threads that can continue does: one of ``ORDERS``.
        seed: of the random order.
        clusters_at_once: how many clusters (or blocks, without clusters) are under way together.
        execute: whether kernels run; otherwise launches are checked and recorded, and outputs are left as they are.
    """

    architecture: int = 90
    multiprocessors: int = 6
    order: str = ORDERS[0]
    seed: int = 0
    clusters_at_once: int = 1
    execute: bool = True


@dataclass(frozen=True)
class Launch:
    """A kernel and the configuration that it was launched with, ``count`` times."""

    count: int
    blocks: int
    threads: int
    cluster: int
    dynamic_shared_bytes: int
    cooperative: bool
    kernel: str


H100 = Device(architecture=90, multiprocessors=132)
A100 = Device(architecture=80, multiprocessors=108)
PART_OF_AN_H100 = Device(architecture=90, multiprocessors=6)
PART_OF_AN_A100 = Device(architecture=80, multiprocessors=6)


@cache
def loaded_library() -> ctypes.CDLL:
    path = build.library()
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.cuda_sim_configure.argtypes = [ctypes.c_int] * 3 + [
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_bool,
    ]
    loaded.cuda_sim_configure.restype = None
    loaded.cuda_sim_launches.restype = ctypes.c_char_p
    _configure(loaded, PART_OF_AN_H100)
    return loaded


_current = PART_OF_AN_H100


def _configure(loaded: ctypes.CDLL, device: Device) -> None:
    loaded.cuda_sim_configure(
        device.architecture,
        device.multiprocessors,
        ORDERS.index(device.order),
        device.seed,
        device.clusters_at_once,
        device.execute,
    )


@contextmanager
def simulating(device: Device) -> Iterator[None]:
    """Run on ``device`` inside the block; outside it is part of an H100."""
    global _current
    previous, _current = _current, device
    _configure(loaded_library(), device)
    try:
        yield
    finally:
        _current = previous
        _configure(loaded_library(), previous)


def readable(signature: str) -> str:
    """``forward_kernel<float, true, 4, 1, 4>`` of a demangled signature."""
    return re.sub(r"\(.*|^void |fastreg::cuda::", "", signature)


def parse_launches(text: str) -> list[Launch]:
    """What ``simulator::launches()`` says."""
    found = []
    for line in text.splitlines():
        *numbers, cooperative, name = line.split(" ", 6)
        count, blocks, threads, cluster, shared = map(int, numbers)
        found.append(Launch(count, blocks, threads, cluster, shared, cooperative == "1", readable(name)))
    return found


def launches() -> list[Launch]:
    """Every kernel and configuration launched since the last call."""
    return parse_launches(loaded_library().cuda_sim_launches().decode())


def launched() -> dict[str, int]:
    """How often each kernel was launched since the last call."""
    counts: Counter[str] = Counter()
    for launch in launches():
        counts[launch.kernel] += launch.count
    return dict(counts)


@cache
def kernels() -> frozenset[str]:
    """Every instance of every ``__global__`` function in the library."""
    names = global_functions()
    loaded_library()
    listing = subprocess.run(
        ["nm", "-C", str(build.library())], capture_output=True, text=True, check=True
    ).stdout
    symbols = {
        readable(line.split(" ", 2)[2]) for line in listing.splitlines() if " W " in line or " T " in line
    }
    return frozenset(symbol for symbol in symbols if symbol.partition("<")[0] in names)


def global_functions(folder: Path = build.ROOT / "csrc" / "cuda") -> set[str]:
    """The names of the ``__global__`` functions in the sources."""
    found: set[str] = set()
    for path in folder.glob("*.cu*"):
        found |= set(re.findall(r"__global__[^;{]*?(\w+)\(const \w+ arguments\)", path.read_text()))
    return found


def _passed_on(name: str) -> Callable[..., Any]:
    """The door of csrc/cuda that the operator ``fastreg::<name>`` has; it takes the same arguments."""

    def call(*arguments: Any) -> Any:
        dtype = next(each.dtype for each in arguments if isinstance(each, torch.Tensor))
        if dtype == torch.float64:
            raise RuntimeError(f"the cuda_sim backend cannot serve {dtype}: the reference backend does")
        loaded_library()
        return getattr(torch.ops.fastreg_cuda_sim, name).default(*arguments)

    return call


layer_norm_fwd = _passed_on("layer_norm_fwd")
layer_norm_bwd = _passed_on("layer_norm_bwd")
rms_norm_fwd = _passed_on("rms_norm_fwd")
rms_norm_bwd = _passed_on("rms_norm_bwd")
batch_norm_fwd = _passed_on("batch_norm_fwd")
batch_norm_eval = _passed_on("batch_norm_eval")
batch_norm_bwd = _passed_on("batch_norm_bwd")
batch_norm_moments = _passed_on("batch_norm_moments")
batch_norm_apply = _passed_on("batch_norm_apply")
batch_norm_sums = _passed_on("batch_norm_sums")
batch_norm_bwd_apply = _passed_on("batch_norm_bwd_apply")
group_norm_fwd = _passed_on("group_norm_fwd")
group_norm_bwd = _passed_on("group_norm_bwd")
instance_norm_fwd = _passed_on("instance_norm_fwd")
dropout_fwd = _passed_on("dropout_fwd")
dropout_inplace = _passed_on("dropout_inplace")
dropout_bwd = _passed_on("dropout_bwd")
drop_block_mask = _passed_on("drop_block_mask")
drop_block_apply = _passed_on("drop_block_apply")
drop_block_inplace = _passed_on("drop_block_inplace")
dropout_add_layer_norm_fwd = _passed_on("dropout_add_layer_norm_fwd")
dropout_add_layer_norm_bwd = _passed_on("dropout_add_layer_norm_bwd")
dropout_add_rms_norm_fwd = _passed_on("dropout_add_rms_norm_fwd")
dropout_add_rms_norm_bwd = _passed_on("dropout_add_rms_norm_bwd")


def register() -> None:
    """Make ``fastreg.backends.use("cuda_sim")`` work, for CPU tensors in tests."""
    from fastreg import backends

    def load(op: str, operator: str) -> Callable[..., Any]:
        if operator not in OPERATORS:
            raise backends.BackendUnavailable(f"csrc/cuda has no {operator}")
        found: Callable[..., Any] = globals()[operator]
        return found

    loaded_library()
    backends.register("cuda_sim", load)
