"""Copies of the kernels with one barrier, mask, bound or wait removed. Each must be found, or a pass proves nothing.

A mutant is compiled into the program of standalone.cpp and run under several schedules, with the address sanitizer
where it is about bounds.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cuda_sim import build

# Order of threads, seed, clusters under way at once.
SCHEDULES = (("0", "0", "1"), ("1", "0", "2"), ("2", "1", "3"))


@dataclass(frozen=True)
class Mutant:
    """One change to one file of csrc/cuda.

    Attributes:
        name: what is wrong with it.
        file: the file in csrc/cuda.
        old, new: the text that is replaced, wherever it occurs in the file, and what replaces it.
        found_by: part of what the program prints when it finds the mistake.
        sanitize: build and run it under these sanitizers.
    """

    name: str
    file: str
    old: str
    new: str
    found_by: str
    sanitize: str = ""


_FORWARD, _BACKWARD, _REDUCE = "layer_norm_forward.cuh", "layer_norm_backward.cuh", "reduce.cuh"

MUTANTS = (
    Mutant(
        "no barrier between what the warps write and read",
        _REDUCE,
        "    }\n    __syncthreads();\n",
        "    }\n",
        "is ",
    ),
    Mutant(
        "one set of exchange slots instead of two",
        _REDUCE,
        "exchange.warps[turn]",
        "exchange.warps[0]",
        "is ",
    ),
    Mutant(
        "no wait for what other blocks send",
        _REDUCE,
        "    mailbox_wait(mailbox, round / 2 % 2);\n",
        "",
        "is |which has ended",
    ),
    Mutant(
        "a mailbox that does not know how much to expect",
        _REDUCE,
        "cluster * sizeof(values)",
        "sizeof(values)",
        "wait|is ",
    ),
    Mutant("the wrong round of a mailbox", _REDUCE, "round / 2 % 2", "round % 2", "wait|is |twice"),
    Mutant(
        "sends to blocks that may not have started",
        _REDUCE,
        "    if (cluster > 1) {\n      cluster_wait();\n    }\n",
        "",
        "has not started|not been opened",
    ),
    Mutant(
        "half of the lanes missing in the mask",
        _REDUCE,
        "all_lanes = 0xffffffffu",
        "all_lanes = 0xffffu",
        "mask",
    ),
    Mutant(
        "a barrier that only teams with a row reach",
        _BACKWARD,
        "    if (wants_input) {\n      sums[0] =",
        "    if (wants_input && active) {\n      sums[0] =",
        "divergent",
    ),
    Mutant(
        "packs are read before they have arrived",
        _BACKWARD,
        "    if constexpr (stages > 0) copy_async_wait<stages - 1>();\n",
        "",
        "is ",
    ),
    Mutant(
        "one group too many may still be on its way",
        _BACKWARD,
        "copy_async_wait<stages - 1>()",
        "copy_async_wait<stages>()",
        "is ",
    ),
    Mutant(
        "the next row overwrites the one to be read",
        _BACKWARD,
        "    Data grad_output[packs];\n    Data input[packs];\n    if constexpr (stages > 0) copy",
        "    fetch(stage, row + stages * step);\n    Data grad_output[packs];\n    Data input[packs];\n"
        "    if constexpr (stages > 0) copy",
        "is ",
    ),
    Mutant(
        "partial sums written over rows that others still read",
        _BACKWARD,
        "    __syncthreads();  // the ring's place is reused\n",
        "",
        "is ",
    ),
    Mutant(
        "partial sums of other teams read before they are written",
        _BACKWARD,
        "      __syncthreads();\n      for (int column",
        "      for (int column",
        "is ",
    ),
    Mutant(
        "the bias' partial sums written over the weight's",
        _BACKWARD,
        "      __syncthreads();\n      return;",
        "      return;",
        "is ",
    ),
    Mutant(
        "no barrier in the sum of the partial sums",
        _BACKWARD,
        "  sums.values[slice][lane] = sum;\n  __syncthreads();\n",
        "  sums.values[slice][lane] = sum;\n",
        "is ",
    ),
    Mutant(
        "sums in shared memory that do not start at 0",
        _BACKWARD,
        "*at(place, quad) = float4{0.0f, 0.0f, 0.0f, 0.0f};",
        "at(place, quad);",
        "is -?nan",
    ),
    Mutant(
        "wide loads from rows that are not aligned",
        "layer_norm.cuh",
        "return aligned(data, 16) && row_stride * element_size % 16 == 0;",
        "return aligned(data, 16) && row_stride * element_size % 2 == 0;",
        "misaligned",
    ),
    Mutant(
        "a store that truncates",
        "vec.cuh",
        "__floats2bfloat162_rn(values[2 * index], values[2 * index + 1]);",
        "__nv_bfloat162(__float2bfloat16_rz(values[2 * index]), __float2bfloat16_rz(values[2 * index + 1]));",
        "is ",
    ),
    Mutant(
        "a read beyond the last row",
        _FORWARD,
        "      if (row < arguments.rows && offset < slice.count) {\n        input[turn]",
        "      if (offset < slice.count) {\n        input[turn]",
        "AddressSanitizer: heap-buffer-overflow",
        "address",
    ),
    Mutant(
        "one column beyond the row",
        "layer_norm_backward_looped.cuh",
        "  if (offset >= packs) {",
        "  if (offset > packs) {",
        "AddressSanitizer: heap-buffer-overflow",
        "address",
    ),
)


def output_of(program: Path) -> str:
    """What the program prints under the first schedule that it fails in; nothing where it passes all of them."""
    for schedule in SCHEDULES:
        finished = subprocess.run([str(program), *schedule], capture_output=True, text=True, timeout=300)
        if finished.returncode != 0:
            return f"schedule {' '.join(schedule)}: {finished.stdout}{finished.stderr or finished.returncode}"
    return ""


def run(mutant: Mutant) -> str:
    """Build and run a mutant; returns what the program says of it."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "csrc"
        shutil.copytree(build.ROOT / "csrc", sources)
        path = sources / "cuda" / mutant.file
        text = path.read_text()
        if mutant.old not in text:
            raise ValueError(f"{mutant.name}: {mutant.file} has no longer what it replaces")
        path.write_text(text.replace(mutant.old, mutant.new))
        return output_of(
            build.standalone(sources, mutant.sanitize, ("-w", "-DFASTREG_STANDALONE_CENTRED_ONLY"))
        )
