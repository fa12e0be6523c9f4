"""Tests of every fate, for test_make_gpu.py; pytest does not collect this file unless it is named."""

from __future__ import annotations

import os
import time

import pytest


def test_whose_fate_is_to_pass() -> None:
    assert time.monotonic() > 0


def test_whose_fate_is_to_fail() -> None:
    raise ValueError("expected to fail,\nas this test does")


def test_whose_fate_is_to_be_skipped() -> None:
    pytest.skip("a reason that no list expects")


def test_whose_fate_is_to_end_its_process() -> None:
    os._exit(41)


def test_whose_fate_is_to_pass_after_the_crash() -> None:
    assert time.monotonic() > 0


def test_that_runs_a_moment() -> None:
    assert time.monotonic() > 0


def test_that_runs_forever() -> None:
    time.sleep(3600)


def test_that_never_runs() -> None:
    assert time.monotonic() > 0
