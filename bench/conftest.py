"""pytest collects bench_*.py in here, which pyproject's own pattern leaves out of the test runs."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """A file of benchmarks is a module of tests."""
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        module: pytest.Module = pytest.Module.from_parent(parent, path=file_path)
        return module
    return None
