"""The suite accepts a right norm in every case and rejects every deliberately wrong one, for the right reason."""

from __future__ import annotations

import re
from typing import Any

import pytest

from criterion import Rejected
from fastreg import backends
from group_norms import INSTANCE_NORM
from mutants import batch_norms, group_norms, norms
from mutants.rights import RIGHTS
from specs import ROW_NORMS, SPECS
from suite import OpSpec, cases, check_case

pytestmark = pytest.mark.backend_independent

MUTANTS: tuple[Any, ...] = (*norms.MUTANTS, *batch_norms.MUTANTS, *group_norms.MUTANTS)


def _as_backend(norm: Any) -> str:
    """Make a norm reachable by name, so that it is tested through the public function like any backend."""
    name = f"mutant {norm.__name__}"
    backends.register(name, lambda op, operator: norm(op).operator(operator))
    return name


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_right_norm_is_accepted(spec: OpSpec) -> None:
    chosen = cases(spec)
    with backends.use(_as_backend(RIGHTS[spec.name])):
        for case in chosen:
            check_case(spec, case)
    assert len(chosen) > (30 if spec is INSTANCE_NORM else 100)


@pytest.mark.parametrize(
    ("spec", "mutant"),
    [
        pytest.param(spec, mutant, id=f"{spec.name}-{mutant.__name__}")
        for spec in SPECS
        for mutant in MUTANTS
        if spec.name in mutant.ops
    ],
)
def test_a_wrong_norm_is_rejected(spec: OpSpec, mutant: Any) -> None:
    other_reasons = []
    with backends.use(_as_backend(mutant)):
        for case in cases(spec):
            try:
                check_case(spec, case)
            except Rejected as rejection:
                if re.search(mutant.symptom, str(rejection)):
                    return
                other_reasons.append(str(rejection))
    pytest.fail(
        f"the suite does not see {mutant.__name__} ({mutant.symptom!r}); rejections: {other_reasons[:3]}"
    )


def test_there_are_enough_mutants_of_each_op() -> None:
    for spec in SPECS:
        assert sum(spec.name in mutant.ops for mutant in MUTANTS) >= (14 if spec in ROW_NORMS else 40)
