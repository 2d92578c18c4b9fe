"""Two evaluated models side by side: parameters, every score paired by question, and the questions that flipped.

The second is compared with the first. `vlm_vqa.sides` says where a side comes from, `difference_page` shows what is found.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.bleu import bleu_1, prepare_punkt
from vlm_vqa.evaluation.intervals import LEVEL, Interval, of_difference, p_value, smallest_difference
from vlm_vqa.evaluation.score_table import BLIND, MODEL
from vlm_vqa.evaluation.vqa_accuracy import METRICS, metric_in
from vlm_vqa.params import Gate, Punkt

REPORT, SCORES_TABLE = Path("reports/evaluation.json"), Path("reports/scores.parquet")
OVERALL, BLEU = "overall", "bleu_1"
BASELINES = {BLIND: "prediction_prior", "shuffled_images": "prediction_shuffled", "blank_image": "prediction_blank"}
"""Their columns among the predictions."""
RIGHT = 0.5
"""From this score on an answer counts as right where one must be called so: VQA's scores go in steps of 0.3."""


@dataclass(frozen=True)
class Side:
    """One evaluated model."""

    name: str  # as the reader of a comparison knows it
    report: Mapping[str, Any]
    scores: pa.Table  # of `reports/scores.parquet`, by ascending question id, as the predictions are
    predictions: pa.Table | None  # of `reports/predictions.parquet`, where they are to be had
    params: Mapping[str, str]  # by full name; empty where nothing says them
    data_hash: str | None

    @property
    def metric(self) -> str:
        """The kind of accuracy that it is scored by."""
        return metric_in(self.report)


@dataclass(frozen=True)
class Paired:
    """One score of the same questions, new against base."""

    difference: Interval
    p: float  # how often chance alone would make as large a difference
    better: int
    worse: int  # questions whose score rose or fell

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
class Row:
    """A score of one answerer over one group of questions."""

    score: str
    who: str
    group: str  # `overall`, or a type of answer
    before: float
    after: float
    paired: Paired


@dataclass(frozen=True)
class Flip:
    """A question that one side answers rightly and the other wrongly."""

    question_id: int
    image_id: int
    question: str
    said: str  # the answer that most people gave; empty where no side has them
    before: str
    after: str


@dataclass(frozen=True)
class Differences:
    """All that differs between two sides."""

    sides: tuple[Side, Side]
    params: list[tuple[str, str, str]] | None
    """Name and both values of what differs; None where one side's are not known."""
    rows: list[Row]
    mended: list[Flip]
    broken: list[Flip]
    notes: list[str]

    def deciding(self, gate: Gate = Gate.ACCURACY) -> Row:
        """Return the model's overall score that `evaluation.gate` names."""
        score = BLEU if gate is Gate.BLEU_1 else self.sides[1].metric
        return next(row for row in self.rows if (row.score, row.who, row.group) == (score, MODEL, OVERALL))


def compare_sides(old: Side, new: Side) -> Differences:
    """Compare `new` with `old`.

    UserError: they are of other questions or truths, or scored otherwise.
    """
    notes = _check_same_questions(old, new)
    notes += [f"{side.name}: {said}" for side in (old, new) if (said := _selection(side.report["model"]))]
    rows = list(_rows(old, new, notes))
    changed = _changed(old.params, new.params) if old.params and new.params else None
    weights = [side.report["model"]["weights_hash"] for side in (old, new)]
    if weights[0] == weights[1]:
        notes.append("Both have the same weights.")
    elif [key for key, *_ in changed or () if not key.startswith("tracking.")] == ["seed"]:
        notes.append(
            "The parameters differ in the seed alone: what the scores differ by is luck, whatever the verdict."
        )
    else:
        notes.append("Compared are two trained models, not two recipes: another seed of either may differ as much.")
    if old.data_hash and new.data_hash and old.data_hash != new.data_hash:
        notes.append("Their data differ, these questions and people's answers do not: they may have trained on others.")
    notes.append(
        f"Where nothing differs one comparison in twenty shows a difference all the same: here are {len(rows)}."
    )
    flips = list(_flips(old, new))
    mended, broken = ([flip for flip, right in flips if right is way] for way in (True, False))
    return Differences((old, new), changed, rows, mended, broken, notes)


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[tuple[str, str, str]]:
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return [(key, old.get(key, "-"), new.get(key, "-")) for key in keys]


def _selection(model: Mapping[str, Any]) -> str:
    """Say what selected a model's weights, where its report says it."""
    if not model.get("step_is"):
        return ""
    biased = " It was selected by the reported questions: their scores are higher than those of others would be."
    said = f"the weights are those of step {model['step']}: {model['step_is']}."
    return said + biased * (model.get("selected_on") == "reported questions")


def _check_same_questions(old: Side, new: Side) -> list[str]:
    """Return what the comparison must say of its questions; UserError unless they and their truths are the same."""
    other = f"{old.name} and {new.name} cannot be compared: "
    if old.metric != new.metric:
        raise UserError(
            f"{other}one is scored by {old.metric}, the other by {new.metric}. Evaluate both on the same data."
        )
    for column in ("question_id", "image_id", "question"):
        if not old.scores[column].equals(new.scores[column]):
            raise UserError(
                f"{other}they answered other questions ({len(old.scores):,} and {len(new.scores):,}; `{column}` differs). "
                "Evaluate both on the same data, with the same evaluation.vqa_questions."
            )
    if old.predictions is not None and new.predictions is not None:
        if not old.predictions["answers"].equals(new.predictions["answers"]):
            raise UserError(f"{other}people's answers to these questions differ. Evaluate both on the same data.")
        return []
    if old.data_hash and new.data_hash and old.data_hash != new.data_hash:
        raise UserError(
            f"{other}their data differ (data_hash {old.data_hash[:12]} and {new.data_hash[:12]}), and without both "
            "reports/predictions.parquet nothing tells whether people's answers do. `dvc pull reports/predictions.parquet`."
        )
    lacking = " and ".join(side.name for side in (old, new) if side.predictions is None)
    notes = [
        f"{lacking}: no reports/predictions.parquet of this evaluation is to be had, so the baselines are left out."
    ]
    if not (old.data_hash and new.data_hash):
        notes.append("Whether both were scored by the same answers of people is not known.")
    return notes


def _rows(old: Side, new: Side, notes: list[str]) -> Iterator[Row]:
    images, groups = new.scores["image_id"].to_numpy(), {OVERALL: np.ones(len(new.scores), dtype=bool)}
    told = new.predictions if new.predictions is not None else old.predictions
    if told is None:
        notes.append("Without them, no types of answers are known.")
    else:
        types = told["answer_type"].to_numpy(zero_copy_only=False)
        groups |= {f"{name}": types == name for name in sorted(set(types))}
    before, after = (_scored(side) for side in (old, new))
    for key in (key for key in after if key in before):
        both = np.isfinite(before[key]) & np.isfinite(after[key])
        if key == (BLEU, MODEL) and (
            lost := np.isfinite(before[key]).sum() + np.isfinite(after[key]).sum() - 2 * both.sum()
        ):
            notes.append(
                f"{BLEU} is over the {both.sum():,} questions that HELM has asked both; {lost:,} others are left out."
            )
        for group, members in groups.items():
            if (at := members & both).any():
                one, other = before[key][at], after[key][at]
                yield Row(*key, group, one.mean(), other.mean(), Paired.of(other, one, images[at]))


def _scored(side: Side) -> dict[tuple[str, str], np.ndarray]:
    """Return each question's score, NaN where it has none, by the score's name and by who answered."""
    accuracy, bleu = (side.scores[name].to_numpy(zero_copy_only=False).astype(float) for name in ("accuracy", BLEU))
    found = {(side.metric, MODEL): accuracy, (BLEU, MODEL): bleu}
    if abs(accuracy.mean() - side.report[side.metric]["overall"]) > 1e-9:
        raise UserError(
            f"{side.name}: evaluation.json and scores.parquet are not of one evaluation. `dvc repro helm-eval`."
        )
    if side.predictions is None:
        return found
    prepare_punkt(Punkt(side.params.get("evaluation.punkt_tab", Punkt.BUNDLED.value)))
    people = side.predictions["answers"].to_pylist()
    for who, column in BASELINES.items():
        if column in side.predictions.column_names:
            pairs = list(zip(side.predictions[column].to_pylist(), people, strict=True))
            found[side.metric, who] = np.array([METRICS[side.metric](*pair) for pair in pairs])
            asked = zip(pairs, np.isfinite(bleu), strict=True)
            found[BLEU, who] = np.array([bleu_1(*pair) if at_helm else np.nan for pair, at_helm in asked])
    return found


def _flips(old: Side, new: Side) -> Iterator[tuple[Flip, bool]]:
    """Yield the questions that flipped, and whether the new side is the right one."""
    told = new.predictions if new.predictions is not None else old.predictions
    right = [side.scores["accuracy"].to_numpy() >= RIGHT for side in (old, new)]
    for at in np.flatnonzero(right[0] != right[1]).tolist():
        row, before = ({**side.scores.slice(at, 1).to_pylist()[0]} for side in (new, old))
        answers = told["answers"][at].as_py() if told is not None else []
        said = max(sorted({*answers}), key=answers.count, default="")
        ids = (row["question_id"], row["image_id"])
        yield Flip(*ids, row["question"], said, before["prediction"], row["prediction"]), bool(right[1][at])
