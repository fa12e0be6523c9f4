"""Dropout + residual + RMS norm on the backend under test."""

import pytest

from dropout_add_norms import DropoutAddNormSuite, generate


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    generate("rms_norm", metafunc)


class TestDropoutAddRMSNorm(DropoutAddNormSuite):
    norm = "rms_norm"
