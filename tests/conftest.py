"""Command line of the tests: one invocation tests one backend on one device.

    pytest tests --backend reference      plain PyTorch, and every test that does not depend on a backend
    pytest tests --backend triton         Triton kernels (on the CPU: in Triton's interpreter, mended)
    pytest tests --backend native         the compiled C++ or CUDA kernels
    pytest tests --backend cuda_sim       the CUDA kernels, run on the CPU by the host simulator

``--device cuda`` runs on the GPU, ``--dtype bfloat16`` keeps only the cases with that input dtype. A module or test
marked ``backend_independent`` runs under ``--backend reference`` only. What does not belong to an invocation is
deselected or never generated; a skip is always a missing part of the machine, and the last lines count them by reason.

Triton's shapes are compiled for one architecture each, by turns, and every kernel for all of them; with ``--complete``
every shape for all. Tests marked ``complete`` run with ``--complete`` only. What is left out is deselected, and counted
in the last lines.

``--shard 2/8`` runs every eighth test, and with ``--every-kernel`` it has to reach all Triton kernels all the same.
``--journal FILE`` writes a line as each test starts and ends, so that whoever kills a run that hangs knows how far it
got; tests that the file already holds are not run again (journal.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
if importlib.util.find_spec("expecttest") is None:
    sys.path.append(str(Path(__file__).parent / "stand_ins"))

from backend_under_test import BACKENDS, cases_for, dtypes_for, emulated, select
from fastreg import backends
from journal import Journal

# What a test with offsets beyond 2^31 elements leaves with torch's allocator, other processes on the GPU may need.
_MUCH_MEMORY = 2**30
_LEFT_OUT = pytest.StashKey[int]()
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastreg")
    group.addoption("--backend", choices=BACKENDS, default="reference", help="the backend under test")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where its tensors live")
    group.addoption(
        "--dtype", choices=_DTYPES, default=None, help="keep only the cases with this input dtype"
    )
    group.addoption("--triton", default=None, help="refuse to run with another version of Triton")
    group.addoption("--shard", type=_shard, default=(1, 1), help="2/8: of every eight tests the second")
    group.addoption("--complete", action="store_true", help="run what is otherwise left out or done by turns")
    group.addoption(
        "--every-kernel", action="store_true", help="fail unless all Triton kernels are interpreted"
    )
    group.addoption("--journal", type=Path, default=None, help="write the tests' results there as they come")


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard: expected 1/8 to 8/8, or the like")
    return int(found[1]), int(found[2])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "backend_independent: runs once, under --backend reference --device cpu"
    )
    config.addinivalue_line(
        "markers", "only(backend=..., device=...): runs with these options alone; several in a tuple"
    )
    config.addinivalue_line(
        "markers", "every_kernel: reaches a kernel that few others do: with --every-kernel in every shard"
    )
    config.addinivalue_line(
        "markers",
        "complete(backend=...): with --complete alone, if the backend is one of these; any if not given",
    )
    backend, device = config.getoption("--backend"), config.getoption("--device")
    if backend == "cuda_sim" and device == "cuda":
        raise pytest.UsageError(
            "cuda_sim runs CUDA kernels on the CPU; use --backend native --device cuda on a GPU"
        )
    if backend == "triton" and device == "cpu":
        # Read by triton when a kernel is decorated, so it has to be there before anything imports triton.
        os.environ["TRITON_INTERPRET"] = "1"
        import triton_interpreter

        triton_interpreter.install()
    if config.getoption("--every-kernel"):
        if backend != "triton" or device != "cpu":
            raise pytest.UsageError(
                "--every-kernel is about Triton's interpreter: --backend triton --device cpu"
            )
        from interpreted_kernels import InterpretedKernels

        config.pluginmanager.register(InterpretedKernels())
    expected = config.getoption("--triton")
    if expected is not None and triton_in_use()[0] != expected:
        found, folder = triton_in_use()
        raise pytest.UsageError(
            f"--triton {expected}, but Triton {found} is imported from {folder}; put the folder of {expected} first on "
            "PYTHONPATH"
        )
    try:
        select(backend, device)
    except (RuntimeError, OSError) as reason:
        pytest.exit(f"the {backend} backend cannot be tested on {device}: {reason}", returncode=3)
    if config.getoption("--journal") is not None:
        config.pluginmanager.register(Journal(config.getoption("--journal"), device))


def triton_in_use() -> tuple[str, Path]:
    """The version of the Triton that is imported, and where from."""
    import triton

    return triton.__version__, Path(triton.__file__).parent


def pytest_unconfigure(config: pytest.Config) -> None:
    backends.use(None)


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--backend"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _same_state_after_each_test(pytestconfig: pytest.Config) -> Iterator[None]:
    """A test that leaves another backend requested would make the ones after it test the wrong thing."""
    yield
    left, expected = backends.requested(), pytestconfig.getoption("--backend")
    backends.use(expected)
    if pytestconfig.getoption("--device") == "cuda" and torch.cuda.memory_reserved() > _MUCH_MEMORY:
        torch.cuda.empty_cache()
    assert left == expected, f"the test left the backend {left!r} requested"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise ``case``, ``dtype`` and ``threads`` with what means something to the backend under test."""
    backend, device = metafunc.config.getoption("--backend"), metafunc.config.getoption("--device")
    only = metafunc.config.getoption("--dtype")
    if "case" in metafunc.fixturenames and metafunc.cls is not None:
        chosen = cases_for(metafunc.cls.spec, backend, device, only)
        metafunc.parametrize("case", chosen, ids=str)
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", [1] if emulated(backend, device) else [1, 2, 3])
    if "dtype" in metafunc.fixturenames:
        dtypes = dtypes_for(backend, device, only)
        metafunc.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Not even import a module that runs once: it may need packages that only a development machine has."""
    if _once(config) or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.backend_independent\n" in collection_path.read_text() or None


def _once(config: pytest.Config) -> bool:
    """Whether this is the run in which what depends on no backend is tested."""
    return bool(config.getoption("--backend") == "reference" and config.getoption("--device") == "cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    options = {name: config.getoption(f"--{name}") for name in ("backend", "device")}
    once = _once(config)
    part, parts = config.getoption("--shard")

    def belongs(item: pytest.Item) -> bool:
        if item.get_closest_marker("backend_independent") and not once:
            return False
        markers = item.iter_markers("only")
        return all(
            options[name] in (value if isinstance(value, tuple) else (value,))
            for marker in markers
            for name, value in marker.kwargs.items()
        )

    chosen = [item for item in items if belongs(item)]
    if not config.getoption("--complete"):
        left_out = {item for item in chosen if _left_to_complete(item, options["backend"], options["device"])}
        if options["device"] == "cpu" and parts == 1:
            left_out |= _not_their_turn(chosen, _BY_TURNS.get(options["backend"], {}))
        chosen = [item for item in chosen if item not in left_out]
        config.stash[_LEFT_OUT] = len(left_out)
    every_kernel = config.getoption("--every-kernel")
    chosen = [
        item
        for place, item in enumerate(chosen)
        if place % parts == part - 1 or (every_kernel and item.get_closest_marker("every_kernel"))
    ]
    if len(chosen) < len(items):
        kept = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = chosen


# Backend -> test functions of which only every so many-th runs where a run is not complete: they take minutes. What is
# left out of the op suites on Triton's interpreter the other backends have; the bytes moved it alone counts.
_BY_TURNS = {
    "triton": {
        "test_case": 5,
        "test_the_halves_make_a_whole": 6,
        "test_a_residual_of_another_dtype": 3,
        "test_long_rows": 2,
        "test_module_info_samples": 2,
        "test_opinfo_samples": 2,
        "test_opinfo_noncontiguous_samples": 2,
        "test_training_reads_twice_or_once": 2,
        "test_backward_reads_twice_or_once": 2,
        "test_groups_are_read_twice_or_once": 2,
        "test_backward_of_groups_reads_twice_or_once": 2,
        "test_backward_reads_once_and_writes_once": 2,
        "test_drop_block_reads_once_and_writes_once": 2,
        "test_constant_channels": 2,
        "test_extreme_sizes": 2,
        "test_backward_takes_the_branch_that_forward_took": 2,
        "test_a_nonfinite_value_stays_in_its_channel": 3,
        "test_a_nonfinite_value_stays_in_its_element_in_evaluation": 3,
        "test_what_is_dropped_is_zero_whatever_it_was": 3,
    },
    "native": {"test_as_one_process_with_the_whole_batch": 2, "test_opcheck_backward": 2},
    "reference": {"test_a_wrong_norm_is_rejected": 4, "test_a_wrong_one_is_rejected": 2},
}


def _not_their_turn(items: list[pytest.Item], turns: dict[str, int]) -> set[pytest.Item]:
    left_out: set[pytest.Item] = set()
    for name, every in turns.items():
        cases = [item for item in items if isinstance(item, pytest.Function) and item.originalname == name]
        left_out |= set(cases) - set(cases[::every])
    return left_out


def _left_to_complete(item: pytest.Item, backend: str, device: str) -> bool:
    """Whether this is marked so, or about a shape compiled for an architecture that is not the shape's turn."""
    for marker in item.iter_markers("complete"):
        if device == "cpu" and backend in marker.kwargs.get("backend", (backend,)):
            return True
    given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    shapes = [each for each in given.values() if hasattr(each, "launches")]
    if not shapes or "architecture" not in given:
        return False
    from bench.static_evidence.triton_kernels import compilations_left_out

    return (shapes[0], given["architecture"]) in compilations_left_out()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in skipped
    )
    if "triton" in sys.modules:
        terminalreporter.write_line("fastreg: with Triton {} from {}".format(*triton_in_use()))
    if left_out := terminalreporter.config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"fastreg: {left_out} tests left to --complete")
    terminalreporter.write_line(f"fastreg: {sum(reasons.values())} skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"fastreg: {count} skipped: {reason}")
