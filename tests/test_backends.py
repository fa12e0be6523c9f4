"""Choosing a backend: by name, by the environment, automatically, and what a choice means for backward."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastreg
from fastreg import backends
from mutants.rights import RIGHTS
from specs import OWN_WAYS, SPECS
from suite import OpSpec, make_tensors, plain_case, run

pytestmark = pytest.mark.backend_independent


class Recorder:
    """A right backend that notes which of its operators ran, with the mask of a backward."""

    def __init__(self, op: str, calls: list[tuple[str, Any]]) -> None:
        self.right = RIGHTS[op](op)
        self.calls = calls

    def operator(self, name: str) -> Any:
        right = self.right.operator(name)

        def run(*arguments: Any) -> Any:
            self.calls.append((name, tuple(arguments[-1]) if name.endswith("_bwd") else None))
            return right(*arguments)

        return run


_unique = itertools.count()


def recording_backend() -> tuple[str, list[tuple[str, Any]]]:
    name, calls = f"recorder {next(_unique)}", []
    backends.register(name, lambda op, operator: Recorder(op, calls).operator(operator))
    return name, calls


@pytest.fixture(autouse=True)
def _automatic() -> Iterator[None]:
    previous = backends.requested()
    backends.use(None)
    yield
    backends.use(previous)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter whose environment holds none of the variables that fastreg or triton read."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("FASTREG_", "TRITON_"))
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_use_as_a_function_and_as_a_context() -> None:
    backends.use("reference")
    assert backends.requested() == "reference"
    with backends.use(None):
        assert backends.requested() is None
        with backends.use("reference"):
            assert backends.requested() == "reference"
        assert backends.requested() is None
    assert backends.requested() == "reference"


def test_use_is_undone_when_the_block_raises() -> None:
    with pytest.raises(KeyError), backends.use("reference"):
        raise KeyError
    assert backends.requested() is None


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"fastreg\.backends\.use: unknown backend 'cudnn'.*native, triton, reference"
    ):
        backends.use("cudnn")
    assert backends.requested() is None


def test_a_built_in_name_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="'triton' is a built-in backend"):
        backends.register("triton", lambda op, operator: None)


def test_the_environment_variable_asks_for_a_backend() -> None:
    report = "from fastreg import backends as b; print(b.requested()); b.use(None); print(b.requested())"
    assert python(report, FASTREG_BACKEND="reference").stdout.split() == ["reference", "None"]
    assert python(report, FASTREG_BACKEND="").stdout.split() == ["None", "None"]
    refused = python("import fastreg", FASTREG_BACKEND="cudnn")
    assert refused.returncode != 0
    assert "FASTREG_BACKEND: unknown backend 'cudnn'" in refused.stderr


@pytest.mark.parametrize("spec", OWN_WAYS, ids=lambda spec: spec.name)
def test_a_named_backend_that_cannot_serve_says_why_and_what_helps(spec: OpSpec) -> None:
    arguments = {"batch_norm": "None, None, training=True", "group_norm": "1"}.get(spec.name, "(3,)")
    code = f"""
import fastreg, torch
fastreg.backends.use("triton")
try:
    fastreg.functional.{spec.name}(torch.ones(2, 3), {arguments})
except fastreg.backends.BackendUnavailable as error:
    print(error)
"""
    said = python(code).stdout
    assert f"the triton backend was asked for and cannot serve {spec.name} on cpu torch.float32" in said
    assert "TRITON_INTERPRET" in said


@pytest.mark.parametrize("spec", OWN_WAYS, ids=lambda spec: spec.name)
def test_a_device_without_kernels_gets_the_reference(spec: OpSpec) -> None:
    assert backends.available("xpu", op=spec.name) == ("reference",)
    assert "reference (first choice available on xpu)" in backends.explain(spec.name, device_type="xpu")
    output = spec.call(spec.function, torch.ones(2, 3, device="meta"))
    assert (output.device.type, output.shape, output.stride()) == ("meta", (2, 3), (3, 1))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_explain_names_the_choice_and_a_reason_for_every_backend(spec: OpSpec) -> None:
    tensor = torch.ones(2, 3)
    lines = backends.explain(spec.name, tensor).splitlines()
    assert f"{spec.name} on cpu torch.float32: {backends.pick(spec.name, tensor)}" in lines[0]
    for name in backends.NAMES:
        (line,) = (line for line in lines[1:] if line.strip().startswith(f"{name}:"))
        reason = backends.unavailable(name, spec.name, "cpu", torch.float32)
        assert ("available" if reason is None else reason) in line
        assert line.endswith("(chosen)") == (name == backends.pick(spec.name, tensor))
    with backends.use("reference"):
        assert "reference (asked for by name" in backends.explain(spec.name, tensor)
    with backends.use("triton"):
        assert "none (the triton backend was asked for" in backends.explain(spec.name, device_type="xpu")


def test_available_is_best_first_and_ends_with_the_reference() -> None:
    found = backends.available("cpu")
    assert found[-1] == "reference"
    assert backends.pick("layer_norm", torch.ones(1, 1)) == found[0]


def test_preferences_name_known_backends_and_end_with_the_reference() -> None:
    measured = [order for ops in backends.MEASURED.values() for order in ops.values()]
    for order in [*backends.PREFERENCE.values(), *measured]:
        assert set(order) <= set(backends.NAMES)
        assert order[-1] == "reference"


def test_a_measured_architecture_has_its_own_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, first in (((9, 0), "native"), ((8, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert backends.preference("group_norm", "cuda")[0] == first
        assert backends.preference("layer_norm", "cuda")[0] == "triton"
        assert backends.preference("group_norm", "cpu")[0] == "native"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.preference("group_norm", "cuda")[0] == "triton"


@pytest.mark.parametrize("spec", OWN_WAYS, ids=lambda spec: spec.name)
def test_a_failing_backend_is_not_replaced_by_another(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def implementation(name: str, op: str, operator: str) -> Any:
        def fail(*_: Any) -> Any:
            raise ArithmeticError(f"{operator} failed")

        return fail

    monkeypatch.setattr(backends, "implementation", implementation)
    backends.use("reference")
    with pytest.raises(ArithmeticError, match=f"{spec.name}_fwd failed"):
        spec.call(spec.function, torch.ones(2, 3))


@pytest.mark.parametrize("spec", OWN_WAYS, ids=lambda spec: spec.name)
def test_backward_runs_where_its_forward_ran(spec: OpSpec) -> None:
    first, first_calls = recording_backend()
    second, second_calls = recording_backend()
    input = torch.randn(4, 5, requires_grad=True)
    with backends.use(first):
        output = spec.call(spec.function, input)
    with backends.use(second):
        output.sum().backward()
    assert [name for name, _ in first_calls] == [f"{spec.name}_fwd", f"{spec.name}_bwd"]
    assert second_calls == []


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_only_wanted_gradients_are_asked_for(spec: OpSpec) -> None:
    for wanted in itertools.product((True, False), repeat=len(spec.differentiable)):
        name, calls = recording_backend()
        case = plain_case(spec, spec.size(4, 5), spec.mix(torch.float32))
        asked = tuple(each for each, flag in zip(spec.differentiable, wanted, strict=True) if flag)
        case = replace(case, wanted=asked)
        with backends.use(name):
            results = run(spec, case, make_tensors(spec, case))
        forward, backward = spec.operators(case)
        expected: list[tuple[str, Any]] = [(forward, None)]
        if any(wanted):
            expected.append((backward, wanted))
        assert calls == expected
        assert {each for each in results if each.startswith("grad_")} == {f"grad_{each}" for each in asked}


@pytest.mark.parametrize("spec", OWN_WAYS, ids=lambda spec: spec.name)
def test_one_operator_a_direction(spec: OpSpec) -> None:
    """A call crosses the dispatcher once a direction, and a constant is not differentiated."""
    input = torch.randn(4, 5, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        spec.call(spec.function, input).backward(torch.randn(4, 5))
    names = [event.key for event in profile.key_averages() if event.key.startswith("fastreg")]
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("fastreg")}
    assert len(names) == 2, counts
    assert set(counts.values()) == {1}
    assert fastreg.backends.requested() is None
