"""The demo's chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, also where there is no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from fastreg.cli import summary
from fastreg.cli.photographs import Comparison
from fastreg.cli.providers import label
from fastreg.cli.training import CONVERTED, NAMES, PLAIN, Training
from fastreg.cli.workloads import BOTH, call_name

_COLOURS = {PLAIN: "#8c8c8c", CONVERTED: "#d1495b"}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
}
# One colour a provider, the same in every chart; torch in greys.
_PROVIDER_COLOURS = {
    "eager": "#8c8c8c",
    "compile": "#c7c7c7",
    "reference": "#edae49",
    "native": "#d1495b",
    "triton": "#00798c",
    "liger": "#5f7d4e",
}


def draw(shown: Mapping[str, tuple[Training, Comparison]], document: dict[str, Any], path: Path) -> None:
    """Draw what the demo found, a row of panels for each network, and save it as a PNG."""
    with plt.rc_context(_STYLE):
        kernels = _rows(document)
        rows = len(shown) + len(kernels)
        figure = plt.figure(figsize=(14, 4.5 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        figure.suptitle(f"fastreg demo · {summary.machine_line(document)}", fontsize=11, x=0.01, ha="left")
        parts: Any = figure.subfigures(
            rows, 1, squeeze=False, height_ratios=[1.0] * len(shown) + [1.1] * len(kernels)
        )
        for part, (network, found) in zip(parts[:, 0], shown.items(), strict=False):
            _network(part, network, *found)
        for part, panels in zip(parts[len(shown) :, 0], kernels, strict=True):
            _kernels(part, panels, summary.timed_providers(document))
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _network(part: Any, network: str, trained: Training, compared: Comparison) -> None:
    loss, difference, step, memory = part.subplots(1, 4, width_ratios=(2, 1.7, 1, 1.3))
    _losses(loss, network, trained)
    _differences(difference, trained)
    milliseconds = {name: 1e3 * compared.seconds[name].median for name in NAMES}
    _pair(step, "Two photographs", "ms", {"forward+\nbackward": milliseconds})
    kinds = {"kept for\nbackward": compared.saved_bytes, "peak": compared.peak_bytes}
    megabytes = {k: {name: v[name] / 1e6 for name in NAMES} for k, v in kinds.items() if v is not None}
    _pair(memory, "Memory of that step", "MB", megabytes)


def _losses(axes: Axes, network: str, trained: Training) -> None:
    epochs = [epoch.number for epoch in trained.epochs]
    widths = {PLAIN: 5.0, CONVERTED: 1.5}
    for name in NAMES:
        values = [epoch.loss[name] for epoch in trained.epochs]
        axes.plot(epochs, values, color=_COLOURS[name], linewidth=widths[name], label=f"{name}, loss")
    axes.set(
        title=f"{network.capitalize()}: loss and test accuracy",
        xlabel="epoch",
        ylabel="mean cross entropy (nats)",
    )
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    for name in NAMES:
        values = [100 * epoch.accuracy[name] for epoch in trained.epochs]
        right.plot(
            epochs,
            values,
            color=_COLOURS[name],
            linewidth=widths[name],
            linestyle=(0, (4, 2)),
            label=f"{name}, accuracy",
        )
    right.set(ylabel="test accuracy (%)", ylim=(0, 102))
    handles = [*axes.get_lines(), *right.get_lines()]
    axes.legend(
        handles, [str(line.get_label()) for line in handles], frameon=False, fontsize=8, loc="center right"
    )


def _differences(axes: Axes, trained: Training) -> None:
    epochs = [epoch.number for epoch in trained.epochs]
    # A difference of exactly 0 has no place on a logarithmic axis; it is drawn at the bottom.
    values = [max(epoch.loss_difference, 1e-8) for epoch in trained.epochs]
    axes.semilogy(epochs, values, color=_COLOURS[CONVERTED], marker="o", markersize=3)
    axes.set(title="Loss difference", xlabel="epoch", ylabel="|plain - converted| (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _pair(axes: Axes, title: str, unit: str, figures: dict[str, dict[str, float]]) -> None:
    """Two bars, plain and converted, for each kind of figure."""
    for index, values in enumerate(figures.values()):
        for offset, name in enumerate(NAMES):
            bar = axes.bar(2.6 * index + offset, values[name], width=0.85, color=_COLOURS[name], label=name)
            axes.bar_label(bar, fmt=lambda value: summary.number(value), fontsize=9, padding=2)
    axes.set_xticks([2.6 * index + 0.5 for index in range(len(figures))], list(figures))
    axes.set(title=title, ylabel=unit)
    axes.margins(y=0.22)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:2], labels[:2], frameon=False, fontsize=8, loc="upper center", ncols=2)


def _caption(record: dict[str, Any]) -> str:
    shape = "×".join(map(str, record["shape"]))
    return "\n".join(filter(None, (record["dtype"], record["layout"], shape)))


def _rows(document: dict[str, Any]) -> list[list[list[dict[str, Any]]]]:
    """Rows of panels, a panel an op, of the cases forward+backward: as many in a row as its captions leave room for."""
    rows: list[list[list[dict[str, Any]]]] = []
    room = 0
    records = [record for record in document["cases"] if record["direction"] == BOTH]
    for op in dict.fromkeys(record["op"] for record in records):
        panel = [record for record in records if record["op"] == op]
        # A panel of one case is as wide as two, for its title.
        width = max(2, len(panel))
        if width > room:
            rows.append([])
            room = 12
        rows[-1].append(panel)
        room -= width
    return rows


def _kernels(part: Any, panels: list[list[dict[str, Any]]], providers: list[str]) -> None:
    """GB/s of every provider; the copy as a line over each group."""
    widths = [max(2, len(panel)) for panel in panels]
    all_axes = part.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, chosen in zip(all_axes, panels, strict=True):
        width = 0.84 / len(providers)
        for offset, name in enumerate(providers):
            heights = [record["providers"].get(name, {}).get("gigabytes_per_second", 0) for record in chosen]
            places = [index + (offset - (len(providers) - 1) / 2) * width for index in range(len(chosen))]
            bars = axes.bar(
                places, heights, width * 0.94, color=_PROVIDER_COLOURS.get(name, "#30638e"), label=label(name)
            )
            axes.bar_label(
                bars, fmt=lambda value: summary.number(value, 2) if value else "", fontsize=7, padding=1
            )
        for index, record in enumerate(chosen):
            rate = record["copy"]["gigabytes_per_second"]
            caption = "copy of the input, same rounds" if index == 0 else None
            axes.hlines(rate, index - 0.44, index + 0.44, color="black", linewidth=1.2, label=caption)
        axes.set_xticks(range(len(chosen)), [_caption(record) for record in chosen], fontsize=7)
        axes.set_title(call_name(chosen[0]), fontsize=9)
    all_axes[0].set_ylabel("GB/s, forward+backward\n(the op's minimum traffic / time)")
    part.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
