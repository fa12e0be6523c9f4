"""Compiles csrc/cuda with the host compiler, into files named after the contents of everything that goes into them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_sim"

_WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
    "-Wno-maybe-uninitialized",
)


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def cuda_include() -> Path:
    """The folder that has cuda_bf16.h: of the toolkit, or of the wheels that NVIDIA publishes on PyPI."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    candidates = [Path(home) / "include" for home in homes if home]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(Path(nvcc).resolve().parents[1] / "include")
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        candidates += sorted(Path(root).glob("cu*/include"), reverse=True)
    for candidate in candidates:
        if (candidate / "cuda_bf16.h").exists() and (candidate / "cuda_runtime_api.h").exists():
            return candidate
    raise FileNotFoundError(
        "cuda_sim needs NVIDIA's headers (cuda_runtime_api.h, cuda_bf16.h): install CUDA 12.8 or newer, or "
        "pip install -r requirements/nvcc.txt"
    )


def _torch_flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-isystem{include}",
        f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}",
    ]


def _common_flags() -> list[str]:
    return ["-std=c++20", "-DFASTREG_CUDA_SIMULATOR", f"-I{HERE}", f"-isystem{cuda_include()}", *_WARNINGS]


def _digest(folders: Iterable[Path], extra: Sequence[str]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    digest.update("\0".join([torch.__version__, version, *extra]).encode())
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: Sequence[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{finished.stdout}{finished.stderr}")


def _moved_into_place(target: Path, command: Sequence[str]) -> Path:
    """Run ``command``, which ends in ``-o`` without its argument, unless the target is there; two builds never mix."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            result = Path(scratch) / target.name
            _run([*command, str(result)])
            result.replace(target)
    return target


def _object(source: Path, folders: Sequence[Path], flags: Sequence[str], key: Sequence[str] = ()) -> Path:
    """The object file of ``source``; ``folders`` hold everything of ours that it includes."""
    target = BUILD / f"{source.stem}-{_digest(folders, [source.name, *(key or flags)])}.o"
    return _moved_into_place(target, [compiler(), *flags, "-x", "c++", "-c", str(source), "-o"])


def _prefix(flags: Sequence[str]) -> list[str]:
    """The flags that put prefix.h, compiled once for these flags, before a program: a third of a mutant's compilation.

    The compiler reads the header itself where it finds that the compiled one does not fit.
    """
    source = HERE / "prefix.h"
    digest = _digest((HERE,), [source.name, *flags])
    compiled = BUILD / f"prefix-{digest}.h.gch"
    _moved_into_place(compiled, [compiler(), *flags, "-x", "c++-header", str(source), "-o"])
    header = compiled.with_suffix("")
    if not header.exists():
        header.write_text(f'#include "{source}"\n')
    return ["-include", str(header)]


def _linked(name: str, objects: Sequence[Path], link: Sequence[str]) -> Path:
    digest = hashlib.sha256("\0".join([*(path.name for path in objects), *link]).encode()).hexdigest()[:16]
    stem, _, suffix = name.partition(".")
    target = BUILD / (f"{stem}-{digest}" + (f".{suffix}" if suffix else ""))
    # The libraries come after the objects that need them.
    return _moved_into_place(target, [compiler(), *map(str, objects), *link, "-o"])


_SIMULATOR = ("threads.cpp", "operations.cpp", "launches.cpp", "context.cpp", "tracer.cpp")


def _simulator_objects(flags: Sequence[str]) -> list[Path]:
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(lambda name: _object(HERE / name, (HERE,), flags), _SIMULATOR))


@cache
def library() -> Path:
    """The simulator with the doors of every op, as a library for ``torch.ops.load_library``."""
    flags = [*_common_flags(), "-O1", "-g1", "-fPIC", "-fno-gnu-unique"]
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "ops.cpp"]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        folders = (ROOT / "csrc", HERE)
        doors = list(pool.map(lambda source: _object(source, folders, [*flags, *_torch_flags()]), sources))
    torch_libraries = Path(torch.__file__).parent / "lib"
    # -Bsymbolic: where torch has CUDA, its runtime has the same names as the simulator.
    link = [
        "-shared",
        "-Wl,-Bsymbolic",
        f"-L{torch_libraries}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-ldl",
    ]
    return _linked("libfastreg_cuda_sim.so", [*doors, *_simulator_objects(flags)], link)


def _program(
    source: Path,
    kernels: Path,
    *,
    sanitize: str = "",
    trace: bool = False,
    extra: Sequence[str] = (),
    everywhere: Sequence[str] = (),
) -> Path:
    """A program of the simulator and one source file that includes kernels; ``extra`` flags are for that file."""
    common = [*_common_flags(), "-O1", "-g1", *everywhere]
    sanitizer = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
    common += sanitizer
    if trace:
        common.append("-DFASTREG_TRACE")
    # The calls before each access are in the kernels alone; what they call is the simulator's, not a sanitizer's.
    own = [*common, *(["-fsanitize=thread"] if trace else []), *extra]
    prefix = _prefix(own) if trace else []
    program = _object(source, (kernels, HERE), [*own, *prefix, f"-I{kernels / 'cuda'}"], own)
    # The program comes last: of the standard library's templates that both have, the simulator's are taken, which do
    # not call the tracer.
    return _linked(source.stem, [*_simulator_objects(common), program], [*sanitizer, "-rdynamic", "-ldl"])


STANDALONE = (
    *("standalone", "standalone_batch_norm", "standalone_group_norm"),
    *("standalone_dropout", "standalone_dropout_add_norm"),
)


def standalone(
    kernels: Path = ROOT / "csrc",
    sanitize: str = "",
    trace: bool = False,
    extra: Sequence[str] = (),
    name: str = STANDALONE[0],
) -> Path:
    """A program of kernels against fp64 without torch.

    Args:
        kernels: csrc, or a copy of it that was changed on purpose.
        sanitize: what to give to ``-fsanitize=``.
        trace: whether every access to memory is checked (tracer.h).
        extra: flags for the compiler.
        name: of its source file, one of ``STANDALONE``.
    """
    return _program(HERE / f"{name}.cpp", kernels, sanitize=sanitize, trace=trace, extra=extra)


def features(trace: bool = False, ucontext: bool = False) -> Path:
    """The program of features.cu, which also runs on a GPU."""
    everywhere = ["-DFASTREG_UCONTEXT"] if ucontext else []
    return _program(HERE / "features.cu", ROOT / "csrc", trace=trace, everywhere=everywhere)


def mistakes() -> Path:
    """The program of mistakes.cu: ``mistakes <name>`` makes one."""
    return _program(HERE / "mistakes.cu", ROOT / "csrc", trace=True)
