"""``python -m fastreg check``: is every backend right on this machine? A quick pass against float64, with a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from fastreg import backends
from fastreg.cli import machine, workloads
from fastreg.cli.bench import progress_bar
from fastreg.cli.gate import judge
from fastreg.cli.providers import interpreted
from fastreg.cli.workloads import Case, dtype_name

# Input and parameters: a model in one dtype, and a half-precision activation with fp32 parameters.
MIXES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
)


@dataclass
class Outcome:
    """What one backend made of one op in one mix of dtypes, over all its cases.

    Attributes:
        unavailable: why it was not tried; None if it was.
        budget_used: the worst error as a share of its rounding budget.
        failures: a line for each case that is wrong, raises, or differs between two runs.
    """

    device: torch.device
    op: str
    backend: str
    dtypes: tuple[torch.dtype, torch.dtype]
    unavailable: str | None = None
    budget_used: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def mix(self) -> str:
        """The dtypes of input and parameters."""
        return " / ".join(map(dtype_name, self.dtypes))


def cases(op: str, dtype: torch.dtype) -> list[Case]:
    """The shapes, layouts and chains of an op that are tried."""
    return [Case(op, shape, dtype, layout, chain) for shape, layout, chain in workloads.workload(op).CHECKS]


def outcomes(
    devices: Sequence[torch.device],
    only: str | None = None,
    choose: Callable[[str, torch.dtype], Sequence[Case]] = cases,
) -> Iterator[Outcome]:
    """Check every backend (or only one) on the devices, one op and mix of dtypes at a time."""
    for device in devices:
        for op in workloads.names():
            for backend in backends.NAMES if only is None else (only,):
                for dtypes in MIXES:
                    outcome = Outcome(device, op, backend, dtypes)
                    outcome.unavailable = backends.unavailable(backend, op, device.type, dtypes[0])
                    if outcome.unavailable is None and only is None and interpreted(backend, device):
                        outcome.unavailable = "runs in Triton's interpreter here: ask with --backend triton"
                    if outcome.unavailable is None:
                        for case in choose(op, dtypes[0]):
                            _try(outcome, case)
                    yield outcome


def _try(outcome: Outcome, case: Case) -> None:
    problem = case.problem(outcome.device, outcome.dtypes[1])
    where = " ".join(filter(None, (case.chain, case.layout, str(case.shape))))
    try:
        with backends.use(outcome.backend):
            first, second = (problem.results(problem.fastreg_function) for _ in range(2))
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is this check's finding
        outcome.failures.append(f"{where}: {type(error).__name__}: {error}")
        return
    found = judge({"": first}, problem.truth())[""]
    outcome.budget_used = max(outcome.budget_used, found.budget_used)
    refusal = found.refusal(peer=False)
    if refusal is not None:
        outcome.failures.append(f"{where}: {refusal}")
    changed = [name for name, result in first.items() if not torch.equal(result, second[name])]
    if changed and refusal is None:
        outcome.failures.append(f"{where}: two runs differ in {', '.join(changed)}")


def command(device: torch.device | None, backend: str | None, console: Console) -> int:
    """Run the check, print its table; 1 if anything is wrong."""
    default = machine.default_device()
    devices = [device] if device is not None else list(dict.fromkeys((torch.device("cpu"), default)))
    count = len(backends.NAMES) if backend is None else 1
    found = []
    with progress_bar(console) as progress:
        task = progress.add_task("check", total=len(devices) * len(workloads.names()) * count * len(MIXES))
        for outcome in outcomes(devices, backend):
            found.append(outcome)
            progress.update(task, advance=1, description=f"{outcome.op} {outcome.backend} {outcome.mix}")
    print_outcomes(found, console)
    tried = [outcome for outcome in found if outcome.unavailable is None]
    wrong = [outcome for outcome in tried if outcome.failures]
    if not tried:
        console.print("[bold red]nothing was checked: no backend that was asked for can run here[/bold red]")
    elif wrong:
        console.print(f"[bold red]{len(wrong)} of {len(tried)} are wrong[/bold red]")
    else:
        console.print(
            f"[bold green]all {len(tried)} are right[/bold green] (forward, every gradient, two runs alike)"
        )
    return 1 if wrong or not tried else 0


def print_outcomes(found: Sequence[Outcome], console: Console) -> None:
    """The table, what failed, and once each why something was not tried."""
    table = Table(title="worst error against float64, of its rounding budget")
    for heading in ("device", "op", "backend", "input / parameters", "worst", "verdict"):
        table.add_column(heading, justify="right" if heading == "worst" else "left")
    for outcome in found:
        if outcome.unavailable is None:
            verdict = "[red]WRONG[/red]" if outcome.failures else "[green]right[/green]"
            worst = f"{100 * outcome.budget_used:.0f} %"
            table.add_row(outcome.device.type, outcome.op, outcome.backend, outcome.mix, worst, verdict)
    console.print(table)
    for outcome in found:
        for line in outcome.failures:
            text = f"{outcome.device.type} {outcome.op} {outcome.backend} {outcome.mix} {line}"
            console.print(text, style="red", markup=False, highlight=False)
    reasons = {(o.device.type, o.backend, o.unavailable): None for o in found if o.unavailable is not None}
    for device_type, name, reason in reasons:
        console.print(
            f"not checked: {name} on {device_type}: {reason}", style="yellow", markup=False, highlight=False
        )
