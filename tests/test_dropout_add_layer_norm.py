"""Dropout + residual + layer norm on the backend under test."""

import pytest

from dropout_add_norms import DropoutAddNormSuite, generate


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    generate("layer_norm", metafunc)


class TestDropoutAddLayerNorm(DropoutAddNormSuite):
    norm = "layer_norm"
