"""The commands' options, with typer; what they do is in the module of each command, imported when it is called."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from fastreg import backends
from fastreg.cli import doctor as doctors
from fastreg.cli import machine, workloads

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fused normalisation kernels for PyTorch: what runs here, how right, how fast.",
)


class Device(str, Enum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Where = Annotated[Device, typer.Option("--device", help="auto: the GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own number if not given.")]


def _device(chosen: Device, threads: int | None) -> torch.device:
    if threads is not None:
        torch.set_num_threads(threads)
    if chosen is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here; `python -m fastreg doctor` says more")
    return torch.device("cpu") if chosen is Device.cpu else machine.default_device()


def _console() -> Console:
    """Into a file or a pipe, lines of 120 columns: the tables need them, and rich would take 80."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _known(value: str, known: tuple[str, ...], option: str) -> str:
    if value not in known:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=option)
    return value


@app.command()
def doctor() -> None:
    """Versions, GPU, native libraries; which backend would run each op and why; what is missing and how to mend it."""
    print(doctors.report())


@app.command()
def check(
    device: Where = Device.auto,
    backend: Annotated[str | None, typer.Option(help="Check this backend only.")] = None,
    threads: Threads = None,
) -> None:
    """Compare every backend with float64 on this machine, forward and backward. Exit code 1 if one is wrong."""
    from fastreg.cli import check as checks

    if backend is not None:
        _known(backend, backends.NAMES, "--backend")
    only = None if device is Device.auto else _device(device, None)
    _device(device, threads)
    raise typer.Exit(checks.command(only, backend, _console()))


@app.command()
def bench(
    device: Where = Device.auto,
    op: Annotated[list[str] | None, typer.Option(help="This op only; may be repeated.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16; may be repeated.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.01, help="Roughly how long the rounds of one case take; by the op if not given."),
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Saves <machine>/<date>.json in here; with the ops in its name if not all.")
    ] = Path("fastreg-bench"),
    threads: Threads = None,
) -> None:
    """Time every backend, torch eager and torch.compile, taking turns. Exit code 1 if a backend is wrong."""
    from fastreg.cli import bench as benches
    from fastreg.cli import benchmark

    ops = [_known(name, workloads.names(), "--op") for name in op or ()]
    dtypes = [
        getattr(torch, _known(name, ("float32", "bfloat16", "float16"), "--dtype")) for name in dtype or ()
    ]
    where = _device(device, threads)
    cases = benchmark.grid(where, ops, dtypes or benchmark.DTYPES)
    plan = benchmark.Plan(where, tuple(cases), complete=not dtypes, seconds=seconds)
    raise typer.Exit(benches.command(plan, results, _console()))


@app.command()
def demo(
    device: Where = Device.auto,
    output: Annotated[Path, typer.Option(help="Where the chart and the figures go.")] = Path("fastreg-demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds, to see that it works: tiny everything.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Train two small networks plain and converted, compare them on photographs, and time the kernels."""
    from dataclasses import replace

    from fastreg.cli import demo as demos

    plan = demos.QUICK if quick else demos.Plan()
    if epochs is not None:
        plan = replace(plan, models=tuple(replace(each, epochs=epochs) for each in plan.models))
    raise typer.Exit(demos.command(plan, _device(device, threads), output, _console()))
