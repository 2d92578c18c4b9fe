"""The gate of continuous integration: are this checkout's scores as good as those committed at another revision?"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.vqa_accuracy import metric_in

REPORT = Path("reports/evaluation.json")
# Three standard errors of a `bleu_1` of 0.99 over HELM's 1,000 instances: what another machine's rounding may cost.
TOLERANCE = 0.01

# What is shown, by its place in the report, and the count that must agree for the scores to be of the same questions.
# METRIC is the one that a report holds. The first is the gate's.
SCORES = {
    "helm.bleu_1": "helm.instances",
    "METRIC.overall": "METRIC.questions",
    "baselines.shuffled_images.METRIC": "METRIC.questions",
    "baselines.prior.METRIC": "METRIC.questions",
}
GATE = "helm.bleu_1"


@dataclass(frozen=True)
class Comparison:
    """Scores of two reports side by side.

    `rows` holds (name, base, new), the gate's score first; one that only the new report holds, or of another number of
    questions, has no base (None).
    """

    rows: tuple[tuple[str, float | None, float], ...]
    tolerance: float
    selection: str = ""
    """Which of the training's weights the new scores are of, in sentences."""

    @property
    def drop(self) -> float:
        """How much lower the gate's score is than the base's; negative where it rose."""
        _, base, new = self.rows[0]
        return 0.0 if base is None else base - new

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
        return "\n".join(lines)

    def verdict(self) -> str:
        """One sentence."""
        if self.rows[0][1] is None:
            return f"Passed without a comparison: the base has no {REPORT}."
        passed = "Passed" if self.passed else "FAILED"
        return f"{passed}: {GATE} changed by {-self.drop:+.4f} (a drop of {self.tolerance:g} is tolerated)."


def compare_reports(base: Mapping[str, Any] | None, new: Mapping[str, Any], tolerance: float = TOLERANCE) -> Comparison:
    """Compares two `reports/evaluation.json`; `base` None means there is nothing to compare with, which passes.

    Raises UserError where a report lacks a score, or HELM ran another number of instances.
    """
    if not 0 <= tolerance <= 1:
        raise UserError(f"--tolerance {tolerance:g} is not between 0 and 1: scores are fractions, 0.01 is one point")
    mine, theirs = metric_in(new), metric_in(base or new)
    rows = []
    for name, count in SCORES.items():
        shown, before = name.replace("METRIC", mine), None
        now = _score(new, count.replace("METRIC", mine), "this checkout's")
        if base is not None:
            then = _score(base, count.replace("METRIC", theirs), "the base's")
            if name == GATE and then != now:
                raise UserError(
                    f"{count} is {then:g} at the base and {now:g} here: scores of other questions do not compare."
                    " Set evaluation.helm_instances as in the base, or commit the new report first, as a change of its own"
                )
            if then == now and (mine == theirs or name == GATE):
                before = _score(base, shown, "the base's")
        rows.append((shown, before, _score(new, shown, "this checkout's")))
    return Comparison(tuple(rows), tolerance, _selection(new))


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
