"""The report that people read, `reports/report.html`, and the same tables as Markdown, `reports/report.md`.

Equal evaluations give equal bytes: no time, no host, no file outside. Numbers are made here; words stand in `report.j2`,
once for both, and the markup of either in `report_html.j2` and `report_md.j2`. All texts are escaped.
"""

import csv
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from vlm_vqa.data import page
from vlm_vqa.data.records import images_of, said_answers
from vlm_vqa.evaluation import intervals, report_plots
from vlm_vqa.evaluation.baselines import most_common
from vlm_vqa.evaluation.score_table import BLIND, MODEL, rounded
from vlm_vqa.evaluation.vqa_accuracy import metric_in

NAMES = {
    MODEL: "this model",
    BLIND: "question-only baseline",
    "blank_image": "this model, a grey picture",
    "shuffled_images": "this model, shuffled images",
}
SHOWN, FREQUENT, BINS = 12, 10, 10
WRONG_BELOW = 0.5  # VQA's scores go in steps of 0.3
PACKAGES = ("torch", "transformers", "crfm-helm")
_MARKS = re.compile(r"[<>&\"'\\`*_{}\[\]|$~#\s]")


def write_report(
    folder: Path, report: Mapping[str, Any], predictions: pa.Table, records: Path, run: Mapping[str, Any]
) -> list[Path]:
    """Write `report.html`, `report.md` and `calibration.csv` into `folder`; return their paths.

    There, curves are looked for. `report` and `predictions` are what `evaluation.json` and `predictions.parquet` hold; `run`
    says what was run, in words by name, and its `seed` draws the examples.
    """
    metric = metric_in(report)
    rows = predictions.to_pylist()
    scores = predictions["score" if metric == "vqa_accuracy" else metric].to_numpy()
    bins, error = calibration(predictions["probability"].to_numpy(), scores, predictions["image_id"].to_numpy())
    mistakes = sorted(np.flatnonzero(scores < WRONG_BELOW).tolist(), key=lambda at: -rows[at]["probability"])
    drawn = np.random.RandomState(run["seed"]).permutation(len(rows))
    shown = {"mistakes": mistakes[:SHOWN], "drawn": drawn[:SHOWN].tolist()}
    pictures = _pictures(records, {rows[at]["image_id"] for places in shown.values() for at in places})
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    values: dict[str, Any] = {
        "report": report,
        "metric": metric,
        "names": NAMES,
        "groups": by_group(report),
        "training": _curve(folder / "train_curve.csv"),
        "validation": _curve(folder / "validation/curve.csv"),
        "confusion": confusion(rows),
        "bins": bins,
        "calibration_error": error,
        "wrong": len(mistakes),
        "wrong_below": WRONG_BELOW,
        "examples": {
            name: [{**rows[at], "score": float(scores[at]), "picture": pictures[rows[at]["image_id"]]} for at in places]
            for name, places in shown.items()
        },
        "run": dict(run) | versions,
        "plots": report_plots,
    }
    path = folder / "calibration.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        columns = ("probability", "score", "low", "high", "questions")
        csv.writer(file, lineterminator="\n").writerows([columns, *([one[name] for name in columns] for one in bins)])
    files = [path]
    layouts = {"html": '{% extends "page.html.j2" %}', "md": "{% block body %}{% endblock %}\n"}
    for kind, layout in layouts.items():
        options = {"finalize": _markdown} if kind == "md" else {}
        pages = page.environment(Path(__file__).parent, **options)
        pages.filters |= {"counted": _counted}
        values |= {"parts": f"report_{kind}.j2", "layout": pages.from_string(layout)}
        path = folder / f"report.{kind}"
        # What stands there may be a hard link into DVC's cache: it is removed, never written through.
        path.unlink(missing_ok=True)
        path.write_text(pages.get_template("report.j2").render(values), encoding="utf-8")
        files.append(path)
    return files


def by_group(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return, by score and kind of group, the groups with most questions first: what each answerer scores, and the gain."""
    tables = []
    for name in (metric_in(report), "bleu_1"):
        scores = report["intervals"][name]
        for kind in ("answer_type", "question_type"):
            own = scores[MODEL][f"per_{kind}"]
            rows = [
                own[group]
                | {
                    "group": group,
                    "scores": {who: scores[who][f"per_{kind}"][group] for who in NAMES},
                    "gain": report["looks_at_image"][name][f"per_{kind}"][group],
                }
                for group in sorted(own, key=lambda group: (-own[group]["questions"], group))
            ]
            tables.append(
                {"metric": name, "kind": kind.replace("_", " "), "of": scores[MODEL]["overall"], "rows": rows}
            )
    return tables


def calibration(
    probabilities: np.ndarray, scores: np.ndarray, images: np.ndarray
) -> tuple[list[dict[str, Any]], float]:
    """Return the questions by the probability of their answer, in `BINS` bins of equal width that are not empty, and the
    expected calibration error: by how much mean probability and mean score of a bin differ, in the mean over questions."""
    place = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    bins = []
    for number in np.unique(place).tolist():
        own = place == number
        score = intervals.of_mean(scores[own], images[own])
        found = {"score": score.mean, "low": score.low, "high": score.high, "questions": score.questions}
        bounds = {"start": number / BINS, "end": (number + 1) / BINS}
        bins.append(rounded(bounds | {"probability": float(probabilities[own].mean())} | found))
    gaps = [one["questions"] * abs(one["probability"] - one["score"]) for one in bins]
    return bins, sum(gaps) / len(scores)


def confusion(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how often what was answered where people mostly said one of the most frequent answers."""
    people = [most_common(Counter(said_answers(row["answers"]))) for row in rows]
    counts = Counter(people)
    names = sorted(counts, key=lambda name: (-counts[name], name))[:FREQUENT]
    pairs = Counter((truth, row["prediction"]) for truth, row in zip(people, rows, strict=True))
    table = [(name, [pairs[name, other] for other in names], counts[name]) for name in names]
    return {"names": names, "rows": [(name, [*found, total - sum(found)], total) for name, found, total in table]}


def _pictures(records: Path, image_ids: set[int]) -> dict[int, str]:
    # They were opened within data.max_image_pixels when their features were made.
    found = images_of(records, image_ids)
    return {one.image_id: page.thumbnail(one.data, one.file_name, max_pixels=2**62) for one in found}


def _curve(path: Path) -> dict[str, list[float]]:
    """Return a curve's columns without empty steps, or nothing where there is no file."""
    if not path.is_file():
        return {}
    table = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)
    return {name: table[name].tolist() for name in table.dtype.names or ()}


def _counted(answers: Sequence[str]) -> str:
    return ", ".join(f"{answer} ({count})" for answer, count in Counter(sorted(said_answers(answers))).most_common())


def _markdown(value: Any) -> Any:
    """Escape HTML's marks and Markdown's own as entities, and put blanks for line breaks, which would end a row."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return Markup(_MARKS.sub(lambda mark: " " if mark[0].isspace() else f"&#{ord(mark[0])};", value))
