"""In which order the simulator's threads run, as parameters of tests."""

from __future__ import annotations

import pytest

from cuda_sim import mutants
from cuda_sim.backend import ORDERS

SCHEDULES = [
    pytest.param(schedule, id=order) for schedule, order in zip(mutants.SCHEDULES, ORDERS, strict=True)
]

# Of programs with all kernels, traced: half a minute a schedule, and the tracer finds a race whatever the schedule.
TRACED_SCHEDULES = [
    pytest.param(schedule, id=order, marks=pytest.mark.complete if place else ())
    for place, (schedule, order) in enumerate(zip(mutants.SCHEDULES, ORDERS, strict=True))
]
