"""The scores of the model and of every baseline: overall, by answer type and by question type, each with its interval."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_vqa.evaluation import intervals
from vlm_vqa.evaluation.intervals import Interval

MODEL, BLIND = "model", "prior"
DIGITS = 12  # what reports are rounded to: no more than another order of adding up changes

Row = Mapping[str, Any]


def compared(values: Mapping[str, tuple[Mapping[str, Sequence[float]], Sequence[Row]]]) -> dict[str, Any]:
    """Return the baselines' means, all scores with intervals, and by how much the model beats who sees no picture.

    Args:
        values: by score, what each answerer has of it and the questions that it is over.
    """
    found = {name: with_intervals(*one) for name, one in values.items()}
    baselines: dict[str, dict[str, float]] = defaultdict(dict)
    for name, of in found.items():
        for who in (who for who in of if who != MODEL):
            baselines[who][name] = of[who]["overall"]["mean"]
    gains = {name: looks_at_image(*one) for name, one in values.items()}
    return {"baselines": baselines, "intervals": found, "looks_at_image": gains}


def with_intervals(scores: Mapping[str, Sequence[float]], questions: Sequence[Row]) -> dict[str, Any]:
    """Return the mean score and its interval by who answered, then by group of questions.

    Args:
        scores: by who answered, one in 0..1 for each question.
        questions: rows with `image_id`, `answer_type` and `question_type`.
    """
    images = np.array([row["image_id"] for row in questions])

    def table(of: npt.NDArray[np.float64]) -> dict[str, Any]:
        return _by_group(questions, lambda at: intervals.of_mean(of[at], images[at]))

    return {who: table(np.asarray(of, dtype=np.float64)) for who, of in scores.items()}


def looks_at_image(scores: Mapping[str, Sequence[float]], questions: Sequence[Row]) -> dict[str, Any]:
    """Return by how much the model beats the best answerer that sees no picture, paired, by group of questions."""
    images = np.array([row["image_id"] for row in questions])
    model, blind = (np.asarray(scores[who], dtype=np.float64) for who in (MODEL, BLIND))
    return _by_group(questions, lambda at: intervals.of_difference(model[at], blind[at], images[at]))


def _by_group(questions: Sequence[Row], of: Callable[[npt.NDArray[np.int64]], Interval]) -> dict[str, Any]:
    found: dict[str, Any] = {"overall": asdict(of(np.arange(len(questions))))}
    for kind in ("answer_type", "question_type"):
        members: dict[str, list[int]] = defaultdict(list)
        for at, row in enumerate(questions):
            members[row[kind]].append(at)
        found[f"per_{kind}"] = {name: asdict(of(np.array(members[name]))) for name in sorted(members)}
    return found


def rounded(values: Any) -> Any:
    """Return nested mappings with their fractions rounded to `DIGITS`."""
    if isinstance(values, Mapping):
        return {name: rounded(value) for name, value in values.items()}
    return round(values, DIGITS) if isinstance(values, float) else values
