"""Reads what cuobjdump prints of a library or a cubin, and what ptxas said when it made it.

All readers give a mapping from (architecture, mangled name of the kernel).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.static_evidence.occupancy import SHARED_RESERVED

Kernel = tuple[int, str]


def tool(name: str) -> Path:
    """NVIDIA's ``name``: of a CUDA toolkit on the PATH, else of the installed triton.

    Raises:
        FileNotFoundError: it is in neither.
    """
    spec = importlib.util.find_spec("triton")
    found = shutil.which(name)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        found = found or shutil.which(name, path=str(Path(root) / "backends" / "nvidia" / "bin"))
    if found is None:
        raise FileNotFoundError(f"{name} is needed: install a CUDA toolkit, or triton, whose wheel has it")
    return Path(found)


def cuobjdump(file: Path, *options: str) -> list[str]:
    """The lines that cuobjdump prints of ``file``.

    Raises:
        RuntimeError: it cannot read the file; the text has its reason.
    """
    finished = subprocess.run(
        [str(tool("cuobjdump")), *options, str(file)], capture_output=True, text=True, errors="replace"
    )
    if finished.returncode != 0:
        raise RuntimeError(f"cuobjdump cannot read {file}: {finished.stderr.strip()}")
    return finished.stdout.splitlines()


# --- resources --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """Of a thread: registers and bytes of stack; of a block: bytes of static shared memory."""

    registers: int
    stack_bytes: int
    static_shared_bytes: int


def resources(lines: Iterable[str]) -> dict[Kernel, Resources]:
    """Of ``cuobjdump --dump-resource-usage``; of a lone cubin the architecture reads 0.

    From sm_90 on cuobjdump counts what the driver reserves as the kernel's; ptxas and the occupancy do not.
    """
    found: dict[Kernel, Resources] = {}
    architecture, name = 0, ""
    for line in lines:
        if arch := re.match(r"arch = sm_(\d+)", line):
            architecture = int(arch[1])
        elif function := re.match(r"\s*Function (\S+):", line):
            name = function[1]
        elif usage := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, usage.groups())
            reserved = SHARED_RESERVED if architecture >= 90 else 0
            # A kernel without any is listed without what is reserved.
            found[architecture, name] = Resources(registers, stack, max(shared - reserved, 0))
    return found


# --- accesses to memory -----------------------------------------------------------------------------------------------

# From global into shared memory, LDGSTS is both: what it is here is a load. STAS stores to another block of a cluster.
# LD and ST find out at run time which memory they mean.
KINDS = {
    "LDG": "global_loads",
    "LDGSTS": "global_loads",
    "LD": "global_loads",
    "STG": "global_stores",
    "ST": "global_stores",
    "LDS": "shared_loads",
    "STS": "shared_stores",
    "STAS": "shared_stores",
    "LDL": "local",
    "STL": "local",
}
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_INSTRUCTION = re.compile(
    rf"\s+/\*[0-9a-f]{{4,}}\*/\s+(?:@!?U?P\w+\s+)?({'|'.join(sorted(KINDS, key=len, reverse=True))})((?:\.\w+)*)\s"
)


@dataclass
class Accesses:
    """How many load and store instructions a kernel has, by the bytes that a thread moves with each."""

    global_loads: Counter[int] = field(default_factory=Counter)
    global_stores: Counter[int] = field(default_factory=Counter)
    shared_loads: Counter[int] = field(default_factory=Counter)
    shared_stores: Counter[int] = field(default_factory=Counter)
    local: Counter[int] = field(default_factory=Counter)


def accesses(lines: Iterable[str]) -> dict[Kernel, Accesses]:
    """Of ``cuobjdump -sass``."""
    found: dict[Kernel, Accesses] = defaultdict(Accesses)
    architecture = 0
    current = Accesses()
    for line in lines:
        if instruction := _INSTRUCTION.match(line):
            modifiers = instruction[2].split(".")
            width = next((_WIDTHS[each] for each in modifiers if each in _WIDTHS), 4)
            getattr(current, KINDS[instruction[1]])[width] += 1
        elif code := re.match(r"\s*code for sm_(\d+)", line):
            architecture = int(code[1])
        elif function := re.match(r"\s*Function : (\S+)", line):
            current = found[architecture, function[1]]
    return dict(found)


_PTX = re.compile(r"\b(ld|st)\.[\w.:]*?\b(global|shared|local)\b[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\s")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x)?(\d+)")


def accesses_in_ptx(text: str) -> Accesses:
    """The same of one kernel's PTX, which ptxas translates access by access; it has no spills yet."""
    found = Accesses()
    for verb, space, vector, bits in _PTX.findall(text):
        kind = space if space == "local" else f"{space}_{'loads' if verb == 'ld' else 'stores'}"
        getattr(found, kind)[int(vector or 1) * int(bits) // 8] += 1
    for prefix, number in _PTX_COPY.findall(text):
        found.global_loads[int(number, 16 if prefix else 10)] += 1
    return found


# --- what the ELF sections say ----------------------------------------------------------------------------------------


def maximum_threads(lines: Iterable[str]) -> dict[Kernel, int]:
    """The threads a block that a kernel was compiled for, of ``cuobjdump -elf``."""
    found: dict[Kernel, int] = {}
    architecture, name, asked = 0, "", False
    for line in lines:
        if arch := re.match(r"arch = sm_(\d+)", line):
            architecture = int(arch[1])
        elif line.startswith("."):
            name = line.removeprefix(".nv.info.").strip() if line.startswith(".nv.info.") else ""
        elif "Attribute:" in line:
            asked = "EIATTR_MAX_THREADS" in line
        elif asked and name and (value := re.match(r"\s*Value:\s*(0x\w+) (0x\w+) (0x\w+)", line)):
            x, y, z = (int(part, 16) for part in value.groups())
            found[architecture, name] = x * y * z
    return found


def compilers(lines: Iterable[str]) -> set[str]:
    """The releases of ptxas that made the code, of ``cuobjdump -elf``."""
    matches = (re.search(r"Tool Version:.*release [\d.]+, (V[\d.]+)", line) for line in lines)
    return {match[1] for match in matches if match}


# --- what ptxas said --------------------------------------------------------------------------------------------------


@dataclass
class Compilation:
    """What ptxas counts of a kernel; bytes of spills are those stored and loaded, in functions that it calls too."""

    registers: int = 0
    static_shared_bytes: int = 0
    spill_bytes: int = 0


def compilations(lines: Iterable[str]) -> dict[Kernel, Compilation]:
    """Of ``ptxas -v``; functions that were not inlined are counted with the kernel that they follow."""
    found: dict[Kernel, Compilation] = {}
    current = Compilation()
    for line in lines:
        if entry := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)", line):
            current = found[int(entry[2]), entry[1]] = Compilation()
        elif spilled := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.spill_bytes += int(spilled[1]) + int(spilled[2])
        elif used := re.search(r"Used (\d+) registers", line):
            current.registers = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.static_shared_bytes = int(shared[1]) if shared else 0
    return found
