"""Compiles csrc/cuda with the host compiler, into a folder named after the contents of everything that goes in."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_sim"

_WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-maybe-uninitialized")
_SOURCES = ("simulator.cpp", "context.cpp")


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def cuda_include() -> Path:
    """The folder that has cuda_bf16.h: of the toolkit, or of the wheels that NVIDIA publishes on PyPI."""
    candidates: list[Path] = []
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            candidates.append(Path(home) / "include")
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


def _make(target: Path, objects: Sequence[tuple[Path, Sequence[str]]], link: Sequence[str]) -> Path:
    """Compile and link into a scratch folder and move the result into place, so that two builds never mix."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        outputs = [str(Path(scratch) / f"{index}.o") for index in range(len(objects))]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            commands = [
                [compiler(), *flags, "-x", "c++", "-c", str(source), "-o", output]
                for (source, flags), output in zip(objects, outputs, strict=True)
            ]
            list(pool.map(_run, commands))
        result = Path(scratch) / target.name
        _run([compiler(), "-o", str(result), *outputs, *link])
        result.replace(target)
    return target


def library() -> Path:
    """The simulator with the doors of every op, as a library for ``torch.ops.load_library``."""
    flags = [*_common_flags(), "-O1", "-g1", "-fPIC", "-fno-gnu-unique"]
    target = BUILD / _digest((ROOT / "csrc", HERE), flags) / "libfastreg_cuda_sim.so"
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "ops.cpp"]
    objects = [(source, [*flags, *_torch_flags()]) for source in sources]
    objects += [(HERE / name, flags) for name in _SOURCES]
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{torch_libraries}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-ldl"]
    return _make(target, objects, link)


def standalone(source_root: Path = ROOT / "csrc", sanitize: str = "") -> Path:
    """The program of standalone.cpp: the kernels against fp64 without torch.

    Args:
        source_root: csrc, or a copy of it that was changed on purpose.
        sanitize: what to give to ``-fsanitize=``.
    """
    flags = [*_common_flags(), "-O1", "-g1", f"-I{source_root / 'cuda'}"]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
    key = [flag.replace(str(source_root), "csrc") for flag in flags]
    target = BUILD / _digest((source_root, HERE), key) / "standalone"
    objects = [(HERE / name, flags) for name in ("standalone.cpp", *_SOURCES)]
    return _make(target, objects, [flag for flag in flags if "sanitize" in flag] + ["-rdynamic", "-ldl"])
