"""The native libraries as files, how they are loaded, and what setup.py builds with and without torch at hand.

None of this depends on a backend. The libraries and their objects are those that `make native` leaves in fastreg/lib
and build; their absence is a failure. What the compiled CUDA kernels are like: test_static_evidence.py.
"""

from __future__ import annotations

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastreg
from fastreg import _native

pytestmark = pytest.mark.backend_independent

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LIBRARIES = ("libfastreg_cpu.so", "libfastreg_cuda.so")


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def library(name: str) -> Path:
    path = _native.LIBRARY_DIRECTORY / name
    assert path.exists(), f"{path} was not built: run `make native`"
    return path


def undefined_symbols(path: Path) -> dict[str, str]:
    """Name to kind, as nm writes it: U, or w for one that may stay missing."""
    lines = output_of("nm", "-D", "--undefined-only", path).splitlines()
    return {name.split("@")[0]: kind for kind, name in (line.split() for line in lines)}


# --- the libraries ----------------------------------------------------------------------------------------------------


def test_both_load_in_a_fresh_process_and_only_when_asked() -> None:
    script = """
import torch, fastreg
from fastreg import _native
assert not any("libfastreg" in path for path in torch.ops.loaded_libraries), torch.ops.loaded_libraries
assert _native.loaded("cpu"), _native.reason("cpu")
assert _native.loaded("cuda"), _native.reason("cuda")
assert (_native.reason("cpu"), _native.reason("cuda")) == ("", "")
assert "mps" in _native.reason("mps") and not _native.loaded("mps")
torch.ops.fastreg_native.rms_norm_fwd(torch.ones(2, 3), 1, None, 1e-6)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", LIBRARIES)
def test_needed_libraries(name: str) -> None:
    dynamic = output_of("readelf", "--dynamic", "--wide", library(name))
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    # libtorch.so though nothing but the weak CUDA stream symbol may come from it; of CUDA and Python nothing at all.
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    rest = needed - {"libtorch.so", "libtorch_cpu.so"}
    allowed = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux.*)\.so\.\d+"
    assert not [other for other in rest if not re.fullmatch(allowed, other)]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@pytest.mark.parametrize("name", LIBRARIES)
def test_torch_2_11_has_every_symbol(name: str) -> None:
    lines = (ROOT / "tests" / "torch_2_11_symbols.txt").read_text().splitlines()
    torch_2_11 = {line for line in lines if not line.startswith("#")}
    undefined = undefined_symbols(library(name))
    used = {symbol for symbol in undefined if re.match(r"(aoti_)?torch_", symbol)}
    assert used
    assert used <= torch_2_11
    # A C++ function of torch would tie the library to one release.
    assert not [symbol for symbol in undefined if re.match(r"_ZN?K?(5torch|2at|3c10)", symbol)]


def test_the_cuda_stream_symbol_is_weak() -> None:
    # A CPU-only torch does not have it; on a GPU machine launching anywhere but on this stream would be wrong.
    assert undefined_symbols(library("libfastreg_cuda.so"))["aoti_torch_get_current_cuda_stream"] in "wv"


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_of_ours_or_cudas_is_exported(name: str) -> None:
    exported = output_of("nm", "-D", "--defined-only", library(name))
    # Another copy of the CUDA runtime in the process must not bind to ours.
    assert not re.findall(r"\S*fastreg\S*|\scu[A-Z]\S*|\scuda\S*", exported)


def test_simd_objects_share_no_inline_function() -> None:
    # Of the functions that several objects define under one name the linker keeps one: were it the one compiled for
    # AVX-512, the others would crash on a lesser CPU. So every such name must have its instruction set in it.
    objects = sorted(BUILD.glob("CMakeFiles/fastreg_cpu_*.dir/**/*.simd.cpp.o"))
    assert objects, "run `make native`"
    for file in objects:
        (isa,) = re.findall(r"fastreg_cpu_(\w+)\.dir", str(file))
        merged = [line for line in output_of("nm", "-C", file).splitlines() if re.search(r" [WVu] ", line)]
        shared = [line for line in merged if f"fastreg::{isa}::" not in line]
        assert not shared, f"{isa}: {shared}"


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded() -> ModuleType:
    """fastreg._native once more, as if nothing had been asked of it yet."""
    spec = importlib.util.spec_from_file_location("native_once_more", _native.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_library_comes_with_the_remedy(unloaded: ModuleType, tmp_path: Path) -> None:
    unloaded.LIBRARY_DIRECTORY = tmp_path
    for device_type in ("cpu", "cuda"):
        assert not unloaded.loaded(device_type)
        assert f"{tmp_path}/libfastreg_cpu.so does not exist" in unloaded.reason(device_type)
        assert "pip install --no-build-isolation ." in unloaded.reason(device_type)


def test_without_the_cuda_library_the_cpu_one_is_there(
    unloaded: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unloaded.LIBRARY_DIRECTORY = tmp_path
    (tmp_path / "libfastreg_cpu.so").touch()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert unloaded.loaded("cpu")
    assert not unloaded.loaded("cuda")
    assert "nvcc" in unloaded.reason("cuda")


def test_the_loaders_error_is_kept(unloaded: ModuleType, tmp_path: Path) -> None:
    unloaded.LIBRARY_DIRECTORY = tmp_path
    (tmp_path / "libfastreg_cpu.so").write_bytes(b"not a library")
    assert re.search("file too short|invalid ELF header", unloaded.reason("cpu"))
    assert "pip install --no-build-isolation ." in unloaded.reason("cpu")


def test_threads_load_once(unloaded: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unloaded.LIBRARY_DIRECTORY = tmp_path
    for name in LIBRARIES:
        (tmp_path / name).touch()
    loads: list[str] = []
    answers: list[bool] = []
    start = threading.Barrier(8)
    monkeypatch.setattr(torch.ops, "load_library", loads.append)

    def ask() -> None:
        start.wait()
        answers.append(unloaded.loaded("cuda"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8
    assert [Path(path).name for path in loads] == list(LIBRARIES)


# --- setup.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The project with the schemas as its only native source: everything of the build but the minutes of kernels."""
    tree = tmp_path / "source"
    tree.mkdir()
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "cmake", tree / "cmake")
    shutil.copytree(ROOT / "fastreg", tree / "fastreg", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (tree / "csrc").mkdir()
    shutil.copy(ROOT / "csrc" / "ops.cpp", tree / "csrc")
    return tree


def build_wheel(source: Path, *python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTREG_")}
    return subprocess.run(
        [sys.executable, *python, "setup.py", "-q", "bdist_wheel", "--dist-dir", "dist"],
        cwd=source, env={**inherited, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def contents_of_wheel(source: Path) -> tuple[str, set[str], str]:
    """Its file name, what it holds of the package, and the version in its metadata."""
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        version = email.message_from_bytes(archive.read(metadata))["Version"]
    return wheel.name, {name for name in names if name.startswith("fastreg/")}, version


def python_files() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "fastreg").rglob("*.py")}


def test_wheel_with_native_libraries(source: Path) -> None:
    finished = build_wheel(source, FASTREG_NATIVE="1", FASTREG_CUDA="0")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    name, files, version = contents_of_wheel(source)
    # No Python version and no ABI in the tag: the libraries know of neither.
    assert re.fullmatch(rf"fastreg-{re.escape(fastreg.__version__)}-py3-none-linux_\w+\.whl", name)
    assert files == python_files() | {"fastreg/lib/libfastreg_cpu.so"}
    assert version == fastreg.__version__


@pytest.fixture
def without_torch(source: Path) -> tuple[str, dict[str, str]]:
    """Arguments and environment of a Python that can import setuptools and no torch, as under build isolation."""
    packages = source.parent / "isolated"
    packages.mkdir()
    setuptools = importlib.util.find_spec("setuptools")
    assert setuptools is not None
    assert setuptools.origin is not None
    installed = Path(setuptools.origin).parent.parent
    for path in (installed / "_distutils_hack", *installed.glob("setuptools*")):
        (packages / path.name).symlink_to(path)
    return "-S", {"PYTHONPATH": str(packages)}


def test_without_torch_the_wheel_is_pure_and_says_so(
    source: Path, without_torch: tuple[str, dict[str, str]]
) -> None:
    option, environment = without_torch
    finished = build_wheel(source, option, **environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "WITHOUT the native libraries, because torch is not importable" in finished.stderr
    assert "pip install --no-build-isolation ." in finished.stderr
    name, files, _ = contents_of_wheel(source)
    assert name == f"fastreg-{fastreg.__version__}-py3-none-any.whl"
    assert files == python_files()


@pytest.mark.parametrize("request_", [{"FASTREG_NATIVE": "1"}, {"FASTREG_CUDA": "1"}])
def test_without_torch_asking_for_libraries_fails(
    source: Path, without_torch: tuple[str, dict[str, str]], request_: dict[str, str]
) -> None:
    option, environment = without_torch
    finished = build_wheel(source, option, **environment, **request_)
    assert finished.returncode != 0
    assert "the native libraries were asked for, but torch is not importable" in finished.stderr
    assert "pip install --no-build-isolation ." in finished.stderr
    assert "Traceback" not in finished.stderr


def test_cuda_asked_for_without_nvcc_fails(source: Path) -> None:
    (source / "csrc" / "cuda").mkdir()
    (source / "csrc" / "cuda" / "empty.cu").touch()
    finished = build_wheel(source, FASTREG_CUDA="1", CUDACXX=str(source / "nvcc"))
    assert finished.returncode != 0
    assert "FASTREG_CUDA=1, but no working nvcc was found" in finished.stderr
    assert not list(source.glob("dist/*"))


def test_native_libraries_can_be_left_out(source: Path) -> None:
    finished = build_wheel(source, FASTREG_NATIVE="0")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert contents_of_wheel(source)[0].endswith("-py3-none-any.whl")
