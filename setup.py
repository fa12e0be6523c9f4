"""Builds the native libraries by running CMake on CMakeLists.txt; all else about the package is in pyproject.toml.

Environment variables:
    FASTREG_NATIVE: 0 leaves the native libraries out, 1 makes it an error if they cannot be built; unset, they are
        built where torch can be imported (never under pip's build isolation) and a C++ compiler is found.
    FASTREG_CUDA: 0 leaves the CUDA library out, 1 makes it an error if there is no nvcc; unset, nvcc decides.
    FASTREG_CUDA_ARCHITECTURES: such as "80;90"; read by CMakeLists.txt.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    # Without build isolation pip does not look at pyproject.toml's requirement.
    sys.exit(
        f"fastreg is built with setuptools 77 or newer, found {setuptools.__version__}: pip install -U setuptools"
    )

ROOT = Path(__file__).resolve().parent

HOW_TO_GET_NATIVE = """\
    To get the native libraries, build in an environment that has torch 2.11 or newer and a C++ compiler:
        pip install -U torch setuptools cmake ninja
        pip install --no-build-isolation .
    (pip's default, build isolation, hides the installed torch from the build.)"""


def version() -> str:
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "fastreg" / "__init__.py").read_text(), re.MULTILINE)
    if match is None:
        sys.exit("fastreg/__init__.py has no __version__")
    return match[1]


def switch(name: str) -> bool | None:
    """An environment variable as yes, no or unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name} must be 0, 1 or unset, but is {value!r}")
    return None if value == "" else value == "1"


def missing_for_native() -> str | None:
    """What keeps the native libraries from being built here, in a sentence; None if nothing does."""
    if sys.platform != "linux":
        return "the native libraries are built on Linux only"
    if importlib.util.find_spec("torch") is None:
        return "torch is not importable in the build environment"
    for tool in ("cmake", "ninja"):
        if not find_tool(tool):
            return f"{tool} is not installed: pip install -U cmake ninja"
    version = re.search(
        r"(\d+)\.(\d+)", subprocess.check_output([find_tool("cmake"), "--version"], text=True)
    )
    if version is None or (int(version[1]), int(version[2])) < (3, 26):
        return f"{find_tool('cmake')} is older than 3.26: pip install -U cmake ninja"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")):
        return "no C++ compiler was found (CXX, c++, g++ or clang++)"
    return None


def find_tool(name: str) -> str:
    """The executable of a PyPI package: beside this interpreter, or on the PATH (where build isolation has it)."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) or ""


def native_wanted() -> bool:
    """Decides whether this build has the native libraries, and says so where it has not."""
    wanted = switch("FASTREG_NATIVE")
    if switch("FASTREG_CUDA"):
        if wanted is False:
            sys.exit("FASTREG_CUDA=1 needs the native CPU library too, but FASTREG_NATIVE is 0")
        wanted = True
    if wanted is False:
        return False
    missing = missing_for_native()
    if missing is None:
        return True
    if wanted:
        sys.exit(f"fastreg: the native libraries were asked for, but {missing}.\n{HOW_TO_GET_NATIVE}")
    print(
        f"fastreg: building WITHOUT the native libraries, because {missing}.\n"
        f"    The reference and Triton backends work without them.\n{HOW_TO_GET_NATIVE}",
        file=sys.stderr,
    )
    return False


class BuildNative(build_ext):
    """Runs CMake; the libraries go into the wheel, or beside the sources for an editable install."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = ROOT / "fastreg" if in_place else Path(self.build_lib).resolve() / "fastreg"
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *(find_tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DFASTREG_OUTPUT_DIRECTORY={package / 'lib'}",
            f"-DFASTREG_CUDA={ {None: 'AUTO', True: 'ON', False: 'OFF'}[switch('FASTREG_CUDA')] }",
        ]
        jobs = str(self.parallel or os.cpu_count() or 1)
        for command in (configure, [find_tool("cmake"), "--build", str(build), "--parallel", jobs]):
            if subprocess.run(command).returncode:
                sys.exit(
                    "fastreg: the native build failed; CMake's message is above. FASTREG_NATIVE=0 leaves it out."
                )

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(Path(self.build_lib, "fastreg", "lib").glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class WheelForEveryPython(bdist_wheel):
    """The libraries speak torch's stable ABI and know nothing of Python, so only the platform is in the tag."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if self.distribution.has_ext_modules() else (python, abi, platform)


setuptools.setup(
    version=version(),
    ext_modules=[setuptools.Extension("fastreg.lib", sources=[])] if native_wanted() else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelForEveryPython},
)
