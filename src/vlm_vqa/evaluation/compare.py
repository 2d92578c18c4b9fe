"""The gate of continuous integration: are this checkout's scores as good as those committed at another revision?

Both have answered the same questions, so that scores are compared question by question: the interval of the mean difference,
clustered by image, is far narrower than those of the two scores. The gate fails where all of it lies below the tolerance.
"""

import io
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.helm.files import read_table
from vlm_vqa.evaluation.intervals import LEVEL, Interval, of_difference, p_value, smallest_difference
from vlm_vqa.evaluation.vqa_accuracy import metric_in
from vlm_vqa.params import Gate

REPORT, SCORES_TABLE = Path("reports/evaluation.json"), Path("reports/scores.parquet")
# More than seeds of the small run differ by (0.9959 .. 0.9991), and half of what must be caught: `proofs/coverage.py`.
TOLERANCE = 0.004

# What is shown, by its place in the report, and the count that must agree for the scores to be of the same questions.
# METRIC is the one that a report holds.
SCORES = {
    "helm.bleu_1": "helm.instances",
    "METRIC.overall": "METRIC.questions",
    "baselines.shuffled_images.METRIC": "METRIC.questions",
    "baselines.prior.METRIC": "METRIC.questions",
}
GATES = {Gate.BLEU_1: "helm.bleu_1", Gate.ACCURACY: "METRIC.overall"}


@dataclass(frozen=True)
class Paired:
    """One score of the same questions, new against base."""

    difference: Interval
    p: float
    """How often chance alone would make as large a difference."""
    better: int
    worse: int
    """Questions whose score rose or fell."""

    @classmethod
    def of(cls, new: np.ndarray, base: np.ndarray, images: np.ndarray) -> Self:
        """Compare scores [questions], of the same questions."""
        counts = [int(np.count_nonzero(one)) for one in (new > base, new < base)]
        return cls(of_difference(new, base, images), p_value(new, base, images), *counts)

    @property
    def smallest(self) -> float:
        """The true difference that these questions would show in four of five cases."""
        return min(1.0, smallest_difference(self.difference))

    @property
    def verdict(self) -> str:
        """`better` or `worse` where interval and permutation test both say so: of few pictures that differ, one may not."""
        if self.p > 1 - LEVEL or self.difference.low <= 0 <= self.difference.high:
            return "no difference shown"
        return "better" if self.difference.low > 0 else "worse"

    @property
    def line(self) -> str:
        """One sentence for people."""
        found = self.difference
        counts = (
            f"{self.better} questions better and {self.worse} worse of {found.questions:,} on {found.images:,} images"
        )
        if not self.better + self.worse:
            return f"{self.verdict}: {counts}"
        return (
            f"{self.verdict}: {found.mean:+.4f} (95 % interval {found.low:+.4f} .. {found.high:+.4f}, p = {self.p:.2g}), "
            f"{counts}; a true difference of {self.smallest:.4f} would be shown in four of five cases"
        )


@dataclass(frozen=True)
class Comparison:
    """Scores of two reports side by side.

    `rows` holds (name, base, new); one that only the new report holds, or of another number of questions, has no base.
    """

    rows: tuple[tuple[str, float | None, float], ...]
    tolerance: float
    gate: str
    """The score that decides, as the rows name it."""
    selection: str = ""
    """Which of the training's weights the new scores are of, in sentences."""
    paired: Mapping[str, Paired] | None = None
    """By score, where both reports have their `scores.parquet`, for the same questions."""

    @property
    def drop(self) -> float:
        """How much lower the gate's score surely is than the base's: by the interval's upper end, where there is one."""
        if self.paired is not None and self.gate in self.paired:
            return -self.paired[self.gate].difference.high
        (row,) = (row for row in self.rows if row[0] == self.gate)
        return 0.0 if row[1] is None else row[1] - row[2]

    @property
    def passed(self) -> bool:
        # A drop of exactly the tolerance passes, also where 0.99 - 0.98 is a bit more than 0.01.
        return self.drop <= self.tolerance + 1e-9

    def table(self) -> str:
        """A markdown table, readable as plain text too."""
        width = max(len(name) for name, _, _ in self.rows)
        lines = [f"| {'score':{width}} | base   | new    | change  |"]
        lines.append(f"|{'-' * (width + 2)}|--------|--------|---------|")
        for name, base, new in self.rows:
            before, change = ("-     ", "-      ") if base is None else (f"{base:.4f}", f"{new - base:+.4f}")
            lines.append(f"| {name:{width}} | {before} | {new:.4f} | {change} |")
        lines += [""] * bool(self.paired) + [f"- {name}: {one.line}" for name, one in (self.paired or {}).items()]
        return "\n".join(lines)

    def verdict(self) -> str:
        """One sentence."""
        (base,) = (row[1] for row in self.rows if row[0] == self.gate)
        if base is None:
            return f"Passed without a comparison: the base has no {self.gate} in {REPORT}."
        passed = "Passed" if self.passed else "FAILED"
        if self.paired is None or self.gate not in self.paired:
            return (
                f"{passed}: {self.gate} changed by {-self.drop:+.4f} (a drop of {self.tolerance:g} is tolerated; the base "
                f"has no {SCORES_TABLE}, so that chance is not told apart)."
            )
        lies = "lies" if not self.passed else "does not lie"
        return f"{passed}: the interval of {self.gate}'s change {lies} below -{self.tolerance:g} as a whole."


def compare_reports(
    base: Mapping[str, Any] | None,
    new: Mapping[str, Any],
    tolerance: float = TOLERANCE,
    gate: Gate = Gate.ACCURACY,
    tables: tuple[pa.Table | None, pa.Table | None] = (None, None),
) -> Comparison:
    """Compare two `reports/evaluation.json`; `base` None means there is nothing to compare with, which passes.

    Args:
        gate: the score that decides.
        tables: the `reports/scores.parquet` of base and new, where they have one.

    Raises:
        UserError: a report lacks a score, or the gate's is of other questions.
    """
    if not 0 <= tolerance <= 1:
        raise UserError(f"--tolerance {tolerance:g} is not between 0 and 1: scores are fractions, 0.01 is one point")
    mine, theirs = metric_in(new), metric_in(base or new)
    decides, rows = GATES[gate].replace("METRIC", mine), []
    for name, count in SCORES.items():
        shown, before = name.replace("METRIC", mine), None
        now = _score(new, count.replace("METRIC", mine), "this checkout's")
        if base is not None:
            then = _score(base, count.replace("METRIC", theirs), "the base's")
            if shown == decides and (then != now or mine != theirs and name.startswith("METRIC")):
                raise UserError(
                    f"{shown} is of {then:g} questions at the base ({theirs}) and of {now:g} here ({mine}): scores of other "
                    "questions do not compare. Set the evaluation's sizes as in the base, or commit the new report first, "
                    "as a change of its own"
                )
            if then == now and (mine == theirs or name == "helm.bleu_1"):
                before = _score(base, shown, "the base's")
        rows.append((shown, before, _score(new, shown, "this checkout's")))
    return Comparison(tuple(rows), tolerance, decides, _selection(new), _pair(tables, mine if mine == theirs else None))


def _pair(tables: tuple[pa.Table | None, pa.Table | None], metric: str | None) -> dict[str, Paired] | None:
    """Compare scores question by question, each over the questions that both have it of.

    Raises:
        UserError: the questions are not the same.
    """
    base, new = (None if table is None else table.sort_by("question_id") for table in tables)
    if base is None or new is None:
        return None
    if any(not base[name].equals(new[name]) for name in ("question_id", "image_id")):
        raise UserError(
            f"{SCORES_TABLE} is of other questions at the base ({len(base):,}) than here ({len(new):,}): scores do not "
            "compare. Commit the new reports first, as a change of its own"
        )
    found = {}
    for name, column in {"helm.bleu_1": "bleu_1", f"{metric}.overall": "accuracy"}.items():
        both = base[column].is_valid().to_numpy() & new[column].is_valid().to_numpy()
        if both.any() and (metric or column == "bleu_1"):
            before, after = (table[column].to_numpy()[both] for table in (base, new))
            found[name] = Paired.of(after, before, new["image_id"].to_numpy()[both])
    return found


def _selection(report: Mapping[str, Any]) -> str:
    """Say what selected a model, where its report says it."""
    model = report.get("model")
    if not isinstance(model, Mapping) or not model.get("step_is"):
        return ""
    biased = "**It was selected by the reported questions: their scores are higher than those of others would be.**"
    said = f"The weights are those of step {model['step']}: {model['step_is']}."
    return f"{said} {biased}" if model.get("selected_on") == "reported questions" else said


def _score(report: Mapping[str, Any], name: str, whose: str) -> float:
    value: Any = report
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(
            f"{whose} {REPORT} has no number {name} (but {value!r}): `vlm-vqa repair helm-eval` brings it back"
        )
    return value


def report_here() -> dict[str, Any]:
    """The report of the working tree."""
    try:
        return _parse(REPORT.read_text(encoding="utf-8"), str(REPORT))
    except OSError as error:
        raise UserError(f"{REPORT} cannot be read ({error.strerror}): `make repro` makes it") from error


def report_at(revision: str) -> dict[str, Any] | None:
    """The report that git holds at `revision`, or None where it has none. An unknown revision is a UserError."""
    known = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if known.returncode != 0:
        raise UserError(f"git knows no revision {revision!r} here: `git fetch` it, or name another by --base")
    shown = _git("show", f"{known.stdout.strip()}:./{REPORT.as_posix()}")
    return _parse(shown.stdout, f"{revision}:{REPORT}") if shown.returncode == 0 else None


def scores_here() -> pa.Table | None:
    """The working tree's scores, question by question; None where an earlier version has evaluated."""
    return read_table(SCORES_TABLE) if SCORES_TABLE.exists() else None


def scores_at(revision: str) -> pa.Table | None:
    """The scores that git holds at a revision that it knows, or None where it has none."""
    done = subprocess.run(["git", "show", f"{revision}:./{SCORES_TABLE.as_posix()}"], capture_output=True, check=False)
    return read_table(io.BytesIO(done.stdout), f"{revision}:{SCORES_TABLE}") if done.returncode == 0 else None


def _parse(text: str, name: str) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(report := json.loads(text), dict):
            return report
    raise UserError(f"{name} is no JSON object: `vlm-vqa repair helm-eval` brings it back")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)


def metrics_diff(revision: str) -> str:
    """What `dvc metrics diff REVISION --md` prints."""
    command = [sys.executable, "-m", "dvc", "metrics", "diff", revision, "--md"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"`dvc metrics diff {revision} --md` failed:\n\n```\n{done.stderr.strip()}\n```"
    return done.stdout.strip() or "No metric changed."


def summary(comparison: Comparison, revision: str, diff: str) -> str:
    """The markdown that is posted to a pull request."""
    selection = f"{comparison.selection}\n\n" if comparison.selection else ""
    return (
        f"## HELM evaluation against `{revision}`\n\n{comparison.verdict()}\n\n{comparison.table()}\n\n{selection}"
        f"### `dvc metrics diff`\n\n{diff}\n"
    )
