"""``python -m fastreg demo``: two models trained plain and converted, photographs, the kernels; a chart and a file.

Every figure is of this run on this machine; what is slower prints slower, and a disagreement makes the exit code 1.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastreg import backends
from fastreg.cli import bench, benchmark, chart, images, machine, photographs, summary, timing, training
from fastreg.cli.measure import Record, measure
from fastreg.cli.providers import COMPILE, Provider, providers_for
from fastreg.cli.training import CONVERTED, NAMES, PLAIN
from fastreg.cli.workloads import Case, Problem

# Rows and hidden sizes of the norms over rows; and a layer of ResNet-50 with its residual and ReLU, in both layouts.
KERNEL_SHAPES = {"cpu": ((2048, 768), (8192, 1024)), "cuda": ((65536, 1024), (16384, 4096))}
KERNEL_MAPS = {"cpu": (32, 512, 28, 28), "cuda": (256, 512, 28, 28)}
# A stage that DropBlock's paper has it in, where torch's chain takes less than a second.
KERNEL_BLOCKS = {"cpu": (32, 1024, 14, 14), "cuda": (256, 1024, 14, 14)}


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
        models: that are trained and shown the photographs.
        kernel_shapes, kernel_map: the sizes of the kernel table; None for those that suit the device.
        kernel_seconds: for the rounds of one of its cases.
        compile: time torch.compile too, which has to compile first.
    """

    models: tuple[training.Settings, ...] = (
        training.Settings(),
        training.Settings(training.RESIDUAL_NETWORK, epochs=8, width=16, depth=1, learning_rate=1e-3),
    )
    photograph_rounds: int = 11
    patch_size: int = 16
    kernel_shapes: tuple[tuple[int, int], ...] | None = None
    kernel_map: tuple[int, ...] | None = None
    kernel_seconds: float = 1.0
    compile: bool = True

    def cases(self, device: torch.device) -> list[Case]:
        """The kernel table's cases: every op, most of them in fp32 and bf16."""
        shapes = self.kernel_shapes or KERNEL_SHAPES[device.type]
        over_rows = [
            Case(op, shape, dtype)
            for op in ("layer_norm", "rms_norm")
            for dtype in benchmark.DTYPES
            for shape in shapes
        ]
        kernel_map = self.kernel_map or KERNEL_MAPS[device.type]
        over_channels = [
            Case("batch_norm", kernel_map, dtype, layout, "add+relu")
            for dtype in benchmark.DTYPES
            for layout in ("contiguous", "channels_last")
        ]
        # torch.compile takes ten seconds a case: one of each of these has to do.
        over_groups = [
            Case(op, kernel_map, benchmark.DTYPES[0], "contiguous", chain)
            for op, chain in (("group_norm", "silu"), ("instance_norm", "relu"))
        ]
        masked = [
            Case("dropout", shapes[-1], benchmark.DTYPES[0], chain="add"),
            *(
                Case(f"dropout_add_{norm}", shapes[-1], benchmark.DTYPES[0])
                for norm in ("layer_norm", "rms_norm")
            ),
            Case(
                "drop_block", self.kernel_map or KERNEL_BLOCKS[device.type], benchmark.DTYPES[0], "contiguous"
            ),
        ]
        return over_rows + over_channels + over_groups + masked


QUICK = Plan(
    models=(
        training.Settings(epochs=2, width=32, depth=2, heads=2, train_limit=256),
        training.Settings(training.RESIDUAL_NETWORK, epochs=2, width=8, depth=1, train_limit=256),
    ),
    photograph_rounds=3,
    patch_size=64,
    kernel_shapes=((64, 256),),
    kernel_map=(4, 16, 8, 8),
    kernel_seconds=0.05,
    compile=False,
)


def command(plan: Plan, device: torch.device, directory: Path, console: Console) -> int:
    """Run all parts, save the chart and the JSON file, say what was found; 1 where the two models disagree."""
    begin = time.perf_counter()
    header = machine.describe(device)
    console.print(f"[bold]fastreg demo[/bold] on {summary.machine_line(header)}")
    if device.type == "cpu":
        console.print("No GPU is used: every figure below is the CPU's, and no CUDA or Triton kernel runs.")
    with bench.progress_bar(console) as progress:
        shown = {}
        for number, settings in enumerate(plan.models, 1):
            console.print(f"\n[bold]{number}. A {settings.network}[/bold], plain and converted")
            trained = _train(settings, device, console, progress)
            shown[settings.network] = (
                trained,
                _photographs(plan, settings, trained, device, console, progress),
            )
        console.print(f"\n[bold]{len(shown) + 1}. Kernels[/bold]: medians of rounds in which all take turns")
        document = _kernels(plan, device, console, progress)
    disagreements = [
        f"{network}: {line}"
        for network, parts in shown.items()
        for part in parts
        for line in part.disagreements()
    ]
    disagreements += benchmark.red(document)
    document |= {"seconds": round(time.perf_counter() - begin, 1), "disagreements": disagreements}
    document["networks"] = {
        network: {"training": _training_record(trained), "photographs": asdict(compared)}
        for network, (trained, compared) in shown.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    data, picture = directory / "demo.json", directory / "demo.png"
    data.write_text(bench.as_text(document))
    chart.draw(shown, document, picture)
    console.print(f"\n{document['seconds']} s; chart {picture}, figures {data}")
    for line in disagreements:
        console.print(f"DISAGREEMENT: {line}", style="bold red", markup=False, highlight=False)
    if not disagreements:
        console.print("[bold green]plain and converted agree[/bold green]")
    return 1 if disagreements else 0


def _train(
    settings: training.Settings, device: torch.device, console: Console, progress: Progress
) -> training.Training:
    digits = images.digits(device, settings.train_limit)
    trained = training.start(settings, device)
    console.print(f"handwritten digits: {len(digits.train_images)} to train on, ", end="")
    console.print(f"{len(digits.test_images)} by other writers to test")
    console.print(str(trained.report), markup=False, highlight=False, soft_wrap=True)
    op = "batch_norm" if trained.report.fused else "layer_norm"
    console.print(f"backend: {backends.pick(op, digits.train_images)}, fp32")
    table = Table()
    for heading in (
        "epoch",
        "loss, plain",
        "loss, converted",
        "difference",
        "accuracy, plain",
        "accuracy, converted",
    ):
        table.add_column(heading, justify="right")
    steps = training.steps_of(settings, digits)
    task = progress.add_task("training", total=settings.epochs * steps)
    for epoch in training.train(trained, settings, digits, lambda: progress.advance(task)):
        losses = [f"{epoch.loss[name]:.5f}" for name in NAMES]
        accuracies = [f"{100 * epoch.accuracy[name]:.1f} %" for name in NAMES]
        table.add_row(str(epoch.number), *losses, f"{epoch.loss_difference:.1e}", *accuracies)
        progress.update(task, description=f"training, loss {losses[0]} and {losses[1]}")
    progress.remove_task(task)
    console.print(table)
    console.print(
        f"with nothing dropped the first gradients differ by {trained.gradient_difference:.1e} of their largest value; "
        f"after {len(trained.step_seconds[PLAIN])} steps with masks of their own the losses by "
        f"{trained.loss_difference:.1e}",
        highlight=False,
    )
    medians = {name: 1e3 * timing.Distribution.of(trained.step_seconds[name]).median for name in NAMES}
    console.print(_faster("training step", medians, "ms"), highlight=False)
    return trained


def _faster(what: str, figures: Mapping[str, float], unit: str) -> str:
    """One line that says which of the two models' figures is smaller, and by how much."""
    plain, converted = figures[PLAIN], figures[CONVERTED]
    change = 100 * (converted / plain - 1)
    verdict = f"{abs(change):.1f} % {'less' if change < 0 else 'more'}"
    return f"{what}: plain {summary.number(plain)} {unit}, converted {summary.number(converted)} {unit} ({verdict})"


def _photographs(
    plan: Plan,
    settings: training.Settings,
    trained: training.Training,
    device: torch.device,
    console: Console,
    progress: Progress,
) -> photographs.Comparison:
    has_patches = settings.network == training.VISION_TRANSFORMER
    patch_size = plan.patch_size if has_patches else None
    # A residual network's step on whole photographs is many times as long.
    rounds = plan.photograph_rounds if has_patches else plan.photograph_rounds // 3
    task = progress.add_task("photographs", total=rounds + 2)

    def advance(what: str) -> None:
        progress.update(task, advance=1, description=f"photographs: {what}")

    compared = photographs.compare(trained.models, settings, device, advance, rounds, patch_size)
    progress.remove_task(task)
    height, width = compared.shape[-2:]
    cut = ""
    if patch_size is not None:
        cut = f"{-(-height // patch_size) * -(-width // patch_size)} patches each, "
    console.print(f"two photographs, {height} x {width}, {cut}the plain model's trained weights in both")
    console.print(f"outputs differ by {compared.output_difference:.1e} of the largest", highlight=False)
    medians = {name: 1e3 * compared.seconds[name].median for name in NAMES}
    console.print(_faster("step (forward+backward)", medians, "ms"), highlight=False)
    console.print(_faster("kept for the backward", _megabytes(compared.saved_bytes), "MB"), highlight=False)
    if compared.peak_bytes is None:
        console.print("peak memory: this system does not tell")
    else:
        how = "allocated by torch" if device.type == "cuda" else "resident, in a process of its own"
        what = f"peak memory of a step ({how})"
        console.print(_faster(what, _megabytes(compared.peak_bytes), "MB"), highlight=False)
    return compared


def _megabytes(figures: Mapping[str, int]) -> dict[str, float]:
    return {name: value / 1e6 for name, value in figures.items()}


def _without_compile(problem: Problem) -> tuple[list[Provider], dict[str, str]]:
    found, missing = providers_for(problem)
    kept = [provider for provider in found if provider.name != COMPILE]
    return kept, {**missing, COMPILE: "left out of a quick run"}


def _kernels(plan: Plan, device: torch.device, console: Console, progress: Progress) -> Record:
    cases = plan.cases(device)
    task = progress.add_task("kernels", total=len(cases))
    document = benchmark.new_document(device, complete=False, copy_size=2**26 if plan == QUICK else 2**28)
    clock = timing.clock_for(device)
    choose = providers_for if plan.compile else _without_compile
    for case in cases:
        progress.update(task, description=f"kernels: {case}")
        document["cases"] += measure(case, device, clock, plan.kernel_seconds, choose=choose).records()
        progress.advance(task)
    progress.remove_task(task)
    console.print(
        "GB/s: the op's minimum traffic over the time; copy: the share of a copy's rate in the same rounds"
    )
    bench.print_cases(document, console)
    for found in summary.overall(document)[:1]:
        console.print(
            f"geometric mean of {found.cases} cases, {found.name[1]}: "
            f"{summary.times(found.eager)} the speed of torch eager, "
            f"{summary.times(found.compile)} that of torch.compile; worst {summary.times(found.worst)} eager "
            f"({found.worst_case})",
            highlight=False,
        )
    bench.print_notes(document, console)
    return document


def _training_record(trained: training.Training) -> dict[str, Any]:
    return {
        "replaced": [asdict(item) for item in trained.report.replaced],
        "kept": [asdict(item) for item in trained.report.kept],
        "fused": [asdict(item) for item in trained.report.fused],
        "epochs": [asdict(epoch) for epoch in trained.epochs],
        "gradient_difference": trained.gradient_difference,
        "loss_difference": trained.loss_difference,
        "step_seconds": {name: asdict(timing.Distribution.of(trained.step_seconds[name])) for name in NAMES},
    }
