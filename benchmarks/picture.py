"""Draw the claims: one bar a ratio, on a logarithmic axis, with spread and target."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import measure

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter

COLOURS = {True: "#2e7d57", False: "#b3372f", None: "#8296ab"}
"""By whether a target is met; None: there is none."""
INK, TARGET = "#222222", "#e69500"
LABELS = {True: "target met", False: "target missed", None: "no target"}
LINE_HEIGHT, MARGINS = 0.27, 1.7
"""Inches."""


def draw(contents: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the results of all benchmarks to a PNG.

    Args:
        contents: what `measure.write` wrote, by benchmark.
    """
    # A heading line over each benchmark's bars.
    lines = sum(len(content["claims"]) + 1 for content in contents.values())
    figure, axes = plt.subplots(figsize=(13, LINE_HEIGHT * lines + MARGINS), layout="constrained")
    place, ticks, names, headings = 0, [], [], []
    for name, content in contents.items():
        ticks.append(place)
        names.append(f"{name.replace('_', ' ')} ({measure.named(content.get('data'))})")
        headings.append(len(ticks) - 1)
        for number, one in enumerate(content["claims"], start=1):
            _bar(axes, place + number, one)
            ticks.append(place + number)
            names.append(one["what"])
        place += len(content["claims"]) + 1
    axes.set_xscale("log")
    axes.set_yticks(ticks, names, fontsize=9, color=INK)
    for index in headings:
        axes.get_yticklabels()[index].set_fontweight("bold")
    axes.set_ylim(place - 0.3, -0.7)
    _frame(axes, contents)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bar(axes: Axes, place: float, one: Mapping[str, Any]) -> None:
    """Draw one ratio from 1, where nothing is gained, with its spread, its target and its value."""
    ratio, low, high, target = (one[key] for key in ("ratio", "low", "high", "target"))
    axes.barh(place, ratio - 1, left=1, height=0.62, color=COLOURS[one["met"]], zorder=2)
    if low < high:
        axes.plot([low, high], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt", zorder=3)
        axes.plot([low, high], [place, place], linestyle="", marker="|", markersize=6, color=INK, zorder=3)
    ends = [1.0, ratio, low, high]
    if target is not None:
        axes.plot([target, target], [place - 0.45, place + 0.45], color=TARGET, linewidth=2.6, zorder=4)
        ends.append(target)
    axes.annotate(
        f"{ratio:.3g}",
        (max(ends), place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
    )


def _frame(axes: Axes, contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Add axis, legend and the machines' names."""
    axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
    axes.grid(axis="x", which="major", color="#dddddd", zorder=0)
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    # Room for the value behind the longest bar.
    axes.set_xlim(right=axes.get_xlim()[1] * 1.3)
    machines = dict.fromkeys(_machine(content["machine"]) for content in contents.values())
    axes.set_xlabel(
        "ratio (logarithmic); 1 is no difference; thin line: spread over the rounds\n" + "\n".join(machines),
        fontsize=9,
        color=INK,
    )
    met = {one["met"] for content in contents.values() for one in content["claims"]}
    handles = [Line2D([], [], color=COLOURS[one], linewidth=7, label=LABELS[one]) for one in LABELS if one in met]
    target = Line2D([], [], linestyle="", marker="|", markersize=11, markeredgewidth=2.6, color=TARGET, label="target")
    axes.legend(
        handles=[*handles, target], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9
    )


def _machine(machine: Mapping[str, Any]) -> str:
    """Name a machine in a line."""
    where = machine["gpu"] or f"no GPU, {machine['cpu_capability']}"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']} GiB, {where}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}"
    )
