"""The table of the CUDA kernels: the machine code of the built library, and what the launch code asks for."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import torch

from bench.static_evidence import ROOT, machine_code
from bench.static_evidence.record import Launch, Record, Table, record
from cuda_sim import backend
from fastreg import _activations, _units

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by the operators' numbers
LIBRARY = ROOT / "fastreg" / "lib" / "libfastreg_cuda.so"
LOGS = ROOT / "build" / "ptxas"
# Multiprocessors: of an A100, an H100, a B200 and an RTX 5090.
DEVICES = {80: 108, 90: 132, 100: 148, 120: 170}

ROWS = (1, 128, 4096, 65536)
HIDDEN = (
    *(8, 64, 128, 256, 384, 512, 768, 1000, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192),
    *(10240, 12288, 14336, 16384, 20480, 24576, 28672, 32768, 49152, 65536, 98304, 131072, 262144),
    *(1, 3, 17, 127, 257, 1002, 4095, 8193, 16387),
)
# (channels, height and width): the norms of ResNet-50, with EfficientNet's and ConvNeXt's between them.
CHANNELS = (
    *(
        (64, 112),
        (32, 112),
        (96, 112),
        (64, 56),
        (256, 56),
        (144, 56),
        (96, 56),
        (128, 28),
        (512, 28),
        (240, 28),
    ),
    *(
        (256, 14),
        (1024, 14),
        (672, 14),
        (112, 14),
        (512, 7),
        (2048, 7),
        (1152, 7),
        (768, 7),
        (1024, 1),
        (1001, 1),
    ),
)
SAMPLES = (1, 32, 256)
# (channels, height and width, groups), at batches of 1 and 8: of diffusion models, of detection heads, and the instance
# norms of a style-transfer net.
GROUPS = (
    *(
        (320, 64, 32),
        (640, 32, 32),
        (1280, 16, 32),
        (1280, 8, 32),
        (512, 64, 32),
        (256, 256, 32),
        (128, 512, 32),
    ),
    *((256, 100, 32), (256, 25, 32), (256, 7, 32), (1280, 1, 32), (330, 7, 33)),
    *((32, 256, 32), (64, 128, 64), (128, 64, 128), (512, 14, 512)),
)
GROUP_SAMPLES = (1, 8)
MOST_ELEMENTS = 1 << 28  # of a tensor: nothing of it is touched, but an allocator may refuse more


# --- launches ---------------------------------------------------------------------------------------------------------


def _rows(rows: int, hidden: int, dtype: torch.dtype, aligned: bool) -> torch.Tensor:
    flat = torch.empty(rows * hidden + 1, dtype=dtype)
    return (flat[:-1] if aligned else flat[1:]).view(rows, hidden)


def _maps(
    samples: int, channels: int, side: int, rows: bool, dtype: torch.dtype, aligned: bool
) -> torch.Tensor:
    elements = _rows(samples * channels, side * side, dtype, aligned)
    if rows:
        return elements.view(samples, side, side, channels).permute(0, 3, 1, 2)
    return elements.view(samples, channels, side, side)


def _call_all(rows: int, hidden: int, dtype: torch.dtype, aligned: bool) -> None:
    """Forward and backward of both norms, all gradients asked for."""
    input = _rows(rows, hidden, dtype, aligned)
    weight = torch.empty(hidden)
    backend.layer_norm_fwd(input, 1, weight, weight, 1e-5)
    backend.layer_norm_bwd(input, input, 1, torch.empty(2, rows), weight, weight, (True, True, True))
    backend.rms_norm_fwd(input, 1, weight, 1e-5)
    backend.rms_norm_bwd(input, input, 1, torch.empty(rows), weight, (True, True))


def _call_batch_norm(
    samples: int, channels: int, side: int, rows: bool, dtype: torch.dtype, aligned: bool
) -> None:
    """Training and evaluation, forward and backward, with the residual's signs and the residual itself; the halves."""
    input = _maps(samples, channels, side, rows, dtype, aligned)
    vector, statistics, everything = torch.empty(channels), torch.empty(2, channels), (True, True, True, True)
    for activation in (_activations.NAMES.index("relu"), _activations.NAMES.index("silu")):
        operands = (input, input, vector, vector)
        _, _, signs = backend.batch_norm_fwd(
            *operands, vector, vector, 0.1, 1e-5, activation, 0.0, False, True
        )
        backend.batch_norm_eval(*operands, vector, vector, 1e-5, activation, 0.0, False)
        residual, kept = (None, signs) if signs.numel() else (input, None)
        given = (input, input, residual, kept, statistics, vector, vector)
        for training in (True, False):
            backend.batch_norm_bwd(*given, training, activation, 0.0, everything)
    backend.batch_norm_fwd(input, None, vector, vector, vector, vector, 0.1, 1e-5, 1, 0.0, False, True)
    backend.batch_norm_bwd(input, input, None, None, statistics, vector, vector, True, 1, 0.0, everything)
    backend.batch_norm_moments(input)
    backend.batch_norm_sums(*given, activation, 0.0)
    backend.batch_norm_bwd_apply(*given, statistics, activation, 0.0, (True, True))


def _call_group_norm(
    samples: int, channels: int, side: int, groups: int, rows: bool, dtype: torch.dtype, aligned: bool
) -> None:
    """Forward and backward, all gradients asked for; of an instance norm with its running statistics."""
    input = _maps(samples, channels, side, rows, dtype, aligned)
    vector, statistics = torch.empty(channels), torch.empty(2, samples, groups)
    activation = _activations.NAMES.index("silu")
    if groups == channels:
        backend.instance_norm_fwd(input, vector, vector, vector, vector, 0.1, 1e-5, activation, 0.0)
    backend.group_norm_fwd(input, groups, vector, vector, 1e-5, activation, 0.0)
    everything = (True, True, True)
    backend.group_norm_bwd(input, input, groups, statistics, vector, vector, activation, 0.0, everything)


def _call_dropout_add_norm(rows: int, hidden: int, dtype: torch.dtype, aligned: bool) -> None:
    """Forward and backward of both norms with everything that there may be, the sum in the input's dtype or fp32."""
    input, vector = _rows(rows, hidden, dtype, aligned), torch.empty(hidden)
    seed, number = torch.zeros((), dtype=torch.int64), _DTYPES.index(dtype)
    for total in {dtype, torch.float32}:
        residual = _rows(rows, hidden, total, aligned)
        branch = (None, vector, seed, 1 << 13, None)
        sums = (input, residual, residual, input, 1)
        for statistics, parameters, forward, backward in (
            (
                torch.empty(2, rows),
                (vector, vector),
                backend.dropout_add_layer_norm_fwd,
                backend.dropout_add_layer_norm_bwd,
            ),
            (
                torch.empty(rows),
                (vector,),
                backend.dropout_add_rms_norm_fwd,
                backend.dropout_add_rms_norm_bwd,
            ),
        ):
            forward(input, residual, 1, *parameters, *branch, 1e-5, False, True)
            everything = (True,) * (len(parameters) + 3)
            for given, mask in ((branch, everything), ((None, None, *branch[2:]), (*everything[:-1], False))):
                backward(*sums, statistics, *parameters, *given, number, mask)


def _call_dropout(rows: int, hidden: int, dtype: torch.dtype, aligned: bool) -> None:
    """Elements and rows dropped, with a residual of either dtype and without; the gradient of layer_scale."""
    input, wide = (_rows(rows, hidden, each, aligned) for each in (dtype, torch.float32))
    seed, vector, number = torch.zeros((), dtype=torch.int64), torch.empty(hidden), _DTYPES.index(dtype)
    for unit, threshold in ((_units.ELEMENT, 1 << 13), (_units.SAMPLE, 1 << 29)):
        for residual in (None, input, wide):
            backend.dropout_fwd(input, residual, None, vector, seed, threshold, None, unit, True)
        for grad_output, mask in product((input, wide), ((True, False), (True, True))):
            scales = (input, None, vector) if mask[1] else (None, None, None)
            backend.dropout_bwd(grad_output, *scales, seed, threshold, None, unit, True, number, mask)


def _call_drop_block(
    samples: int, channels: int, side: int, rows: bool, dtype: torch.dtype, aligned: bool
) -> None:
    """The mask of each channel, and its application."""
    input = _maps(samples, channels, side, rows, dtype, aligned)
    block, seed = [min(7, side)] * 2, torch.zeros((), dtype=torch.int64)
    bits, _ = backend.drop_block_mask(seed, list(input.shape), block, 1 << 27, None, False)
    backend.drop_block_apply(input, bits, torch.ones(1, dtype=torch.float64))


def launches(architecture: int) -> dict[str, set[Launch]]:
    """How each kernel is launched at realistic problems, by the launch code itself, run by the simulator."""
    found: dict[str, set[Launch]] = defaultdict(set)
    device = backend.Device(architecture, DEVICES[architecture], execute=False)
    with backend.simulating(device):
        backend.launches()
        for rows, hidden, aligned in product(ROWS, HIDDEN, (True, False)):
            if rows * hidden <= MOST_ELEMENTS:
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    _call_all(rows, hidden, dtype, aligned)
                    _call_dropout_add_norm(rows, hidden, dtype, aligned)
                    _call_dropout(rows, hidden, dtype, aligned)
        for samples, (channels, side), rows, aligned in product(
            SAMPLES, CHANNELS, (True, False), (True, False)
        ):
            if samples * channels * side * side <= MOST_ELEMENTS:
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    _call_batch_norm(samples, channels, side, rows, dtype, aligned)
                    _call_drop_block(samples, channels, side, rows, dtype, aligned)
        for samples, (channels, side, groups), rows, aligned in product(
            GROUP_SAMPLES, GROUPS, (True, False), (True, False)
        ):
            if samples * channels * side * side <= MOST_ELEMENTS:
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    _call_group_norm(samples, channels, side, groups, rows, dtype, aligned)
        for each in backend.launches():
            found[each.kernel].add(Launch(each.threads, each.dynamic_shared_bytes, each.cluster))
    return dict(found)


# --- code -------------------------------------------------------------------------------------------------------------


def _demangled(names: Iterable[str]) -> dict[str, str]:
    """Mangled names as the simulator spells them: ``forward_kernel<float, true, 4, 1, 4>``."""
    mangled = sorted(names)
    finished = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return {
        name: backend.readable(signature)
        for name, signature in zip(mangled, finished.stdout.splitlines(), strict=True)
    }


def _logged(folder: Path) -> dict[machine_code.Kernel, machine_code.Compilation]:
    logs = sorted(folder.glob("*.cu.log"))
    return machine_code.compilations(line for log in logs for line in log.read_text().splitlines())


def records(library: Path, logs: Path, elf: list[str]) -> Iterator[Record]:
    """Of every kernel on every architecture that the library has; ``elf`` is what ``cuobjdump -elf`` says of it.

    Raises:
        ImpossibleLaunch: a launch would fail.
        ValueError: the logs of ptxas are not those of this library.
    """
    used = machine_code.resources(machine_code.cuobjdump(library, "--dump-resource-usage"))
    logged = _logged(logs)
    for kernel, resources in used.items():
        of_log = logged.get(kernel, machine_code.Compilation())
        if (of_log.registers, of_log.static_shared_bytes) != (
            resources.registers,
            resources.static_shared_bytes,
        ):
            raise ValueError(f"{logs} has not the logs of {library}: run `make native`")
    accesses = machine_code.accesses(machine_code.cuobjdump(library, "-sass"))
    maximum = machine_code.maximum_threads(elf)
    names = _demangled({name for _, name in used})
    launched = {architecture: launches(architecture) for architecture in {each for each, _ in used}}
    for kernel, resources in used.items():
        architecture, name = kernel
        yield record(
            kernel=names[name],
            architecture=architecture,
            resources=resources,
            accesses=accesses[kernel],
            maximum_threads=maximum[kernel],
            launches=sorted(launched[architecture].get(names[name], ())),
            spill_bytes=logged[kernel].spill_bytes,
        )


def table(library: Path = LIBRARY, logs: Path = LOGS) -> Table:
    """The table of the built library.

    Raises:
        FileNotFoundError: it was not built.
    """
    if not library.exists():
        raise FileNotFoundError(f"{library} does not exist: run `make native`")
    elf = machine_code.cuobjdump(library, "-elf")
    releases = machine_code.compilers(elf)
    found = sorted(records(library, logs, elf), key=lambda each: each.key)
    return Table(f"nvcc {' and '.join(sorted(releases))}", tuple(found))
