"""The suites of dropout and DropBlock accept a right one and reject every wrong one, for the right reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from criterion import Rejected
from drop_blocks import check_drop_block, drop_blocks
from dropouts import check_drop, drops
from fastreg import backends
from mutants import dropouts
from mutants.right_dropout import RightDropout

pytestmark = pytest.mark.backend_independent

SUITES: dict[str, tuple[Callable[..., list[Any]], Callable[[Any, str], None]]] = {
    "dropout": (drops, check_drop),
    "drop_block": (drop_blocks, check_drop_block),
}


def _as_backend(kind: type[RightDropout]) -> str:
    """Make it reachable by name, so that it is tested through the public functions like any backend."""
    name = f"mutant {kind.__name__}"
    backends.register(name, lambda op, operator: kind().operator(operator))
    return name


@pytest.mark.parametrize("of", SUITES)
def test_the_right_one_is_accepted(of: str) -> None:
    cases, check = SUITES[of]
    chosen = cases("reference", "cpu")
    with backends.use(_as_backend(RightDropout)):
        for case in chosen:
            check(case, "cpu")
    assert len(chosen) > 70


@pytest.mark.parametrize("mutant", dropouts.MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_wrong_one_is_rejected(mutant: type[dropouts.Mutant]) -> None:
    cases, check = SUITES[mutant.of]
    other_reasons = []
    with backends.use(_as_backend(mutant)):
        for case in cases("reference", "cpu"):
            try:
                check(case, "cpu")
            except Rejected as rejection:
                if re.search(mutant.symptom, str(rejection)):
                    return
                other_reasons.append(str(rejection))
    pytest.fail(
        f"the suite does not see {mutant.__name__} ({mutant.symptom!r}); rejections: {other_reasons[:3]}"
    )


def test_there_are_enough_mutants() -> None:
    for of, enough in (("dropout", 25), ("drop_block", 12)):
        assert sum(mutant.of == of for mutant in dropouts.MUTANTS) >= enough
