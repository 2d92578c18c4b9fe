"""The report's plots as SVG that stands in the page: the same bytes for the same numbers, and texts are never formulas."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

GROUPS = 14
COLOURS = ("#3b6fb6", "#e08a3c", "#8a8f98", "#a9788f", "#4f9d69")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vlm-vqa",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
Columns = Mapping[str, Sequence[float]]


def curves(lines: Mapping[str, tuple[Columns, str]], y_label: str, logarithmic: bool = False) -> Markup:
    """Draw columns against their `step`: by label, the table and the column's name."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.8, 3.1)
        for (label, (table, name)), colour in zip(lines.items(), COLOURS, strict=False):
            if name in table:
                axes.plot(
                    table["step"], table[name], label=label, color=colour, marker="." if len(table["step"]) < 30 else ""
                )
        axes.set(xlabel="step", ylabel=y_label)
        if logarithmic:
            _logarithmic(axes)
        axes.legend()
        return _svg(figure, f"{y_label} by step")


def groups(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], x_label: str) -> Markup:
    """Draw who scores what in each of the first groups, with intervals."""
    rows = rows[:GROUPS]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.8, 1.5 + 0.34 * len(rows))
        for number, (who, label) in enumerate(names.items()):
            places = [at + 0.16 * (number - (len(names) - 1) / 2) for at in range(len(rows))]
            _points(axes, [row["scores"][who] for row in rows], places, COLOURS[number], label)
        labels = [f"{row['group'][:22]} ({row['questions']:,})" for row in rows]
        axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel=x_label)
        axes.set_yticks(range(len(rows)), labels)
        figure.legend(loc="outside upper center", ncols=2, columnspacing=1)
        return _svg(figure, f"{x_label} by group")


def reliability(bins: Sequence[Mapping[str, Any]], y_label: str) -> Markup:
    """Draw each bin's score over its mean probability, and below how many questions it holds."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 4.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color=COLOURS[2], linestyle=":", label="as probable as right")
        scores = [one["score"] for one in bins]
        spread = [[one["score"] - one["low"] for one in bins], [one["high"] - one["score"] for one in bins]]
        probabilities = [one["probability"] for one in bins]
        upper.errorbar(probabilities, scores, spread, color=COLOURS[0], marker="o", capsize=2, label="this model")
        upper.set(xlim=(0, 1.02), ylim=(0, 1.04), ylabel=y_label)
        upper.legend(loc="upper left")
        middles = [(one["start"] + one["end"]) / 2 for one in bins]
        lower.bar(middles, [one["questions"] for one in bins], width=0.09, color=COLOURS[0])
        lower.set(xlabel="probability of the answer", ylabel="questions", ylim=(0.5, None))
        _logarithmic(lower)
        return _svg(figure, "score by probability")


def _points(axes: Axes, found: Sequence[Mapping[str, float]], places: Sequence[float], colour: str, label: str) -> None:
    means = [one["mean"] for one in found]
    spread = [[one["mean"] - one["low"] for one in found], [one["high"] - one["mean"] for one in found]]
    axes.errorbar(means, places, xerr=spread, fmt="o", markersize=4, color=colour, label=label, elinewidth=1.2)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    # By default powers of ten are formulas.
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, description: str) -> Markup:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # What stands before it is of a file, not of a page.
    drawn = file.getvalue()[file.getvalue().index("<svg") + len("<svg") :]
    return Markup(f'<svg role="img" aria-label="{escape(description)}"{drawn}')
