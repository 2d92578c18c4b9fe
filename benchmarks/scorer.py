"""VQA accuracy of a whole validation split: ours against the official evaluator's structure.

    python -m benchmarks.scorer [--rounds 3]

Real or drawn questions with their ten answers (see `benchmarks.vqav2`) are repeated under new ids until they are as many as
VQAv2's validation questions. Predictions are drawn by seed. Both scorers start from what they read, in memory, and must give
the same figures to the last bit, of every question that both have scored (see `SLOW_SHARE`).

The slow side is a re-statement in Python 3 of GT-Vision-Lab/VQA's `vqaEval.py` as far as its structure costs time: every
answer processed on its own, a search for each mark, nothing remembered, ten leave-one-out lists a question. Printing its
progress is left out. It works on shallow copies of the answers, as the original spoils what it is given.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import measure, vqav2
from vlm_vqa.evaluation import vqa_accuracy as ours

QUESTIONS = 214_354
"""Questions of VQAv2's validation split."""
SLOW_SHARE = 5
"""Of the repeated questions the slow scorer gets every fifth, and its time counts five times: all would take minutes."""
TARGET = 10
ROUNDS = 3

_MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
_ARTICLES = ["a", "an", "the"]
# re.ASCII is what Python 2 did; the first look-behind is mistyped in the original.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)", re.ASCII)
_COMMA = re.compile(r"(\d)(\,)(\d)", re.ASCII)
_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))

Annotation = dict[str, Any]


def official_structure(
    predictions: Mapping[int, str],
    annotations: Sequence[Annotation],
    contractions: Mapping[str, str] = ours.CONTRACTIONS,
) -> dict[int, float]:
    """Score as `vqaEval.py` goes about it; the test of our scorer compares with this, by the official table.

    Args:
        predictions: answer by question id.
        annotations: in the official layout: `answers` is a list of `{"answer", "answer_id", "answer_confidence"}`.
        contractions: spelling and what it becomes; a test holds ours to the official table.

    Returns:
        A score by question id.
    """
    numbers = {**_NUMBERS, "none": "0"}
    scores: dict[int, float] = {}
    for row in annotations:
        humans = [dict(answer) for answer in row["answers"]]
        for human in humans:
            human["answer"] = _clean(human["answer"])
        guess = _clean(predictions[row["question_id"]])
        if len({human["answer"] for human in humans}) > 1:
            for human in humans:
                human["answer"] = _official_words(_official_marks(human["answer"]), numbers, contractions)
            guess = _official_words(_official_marks(guess), numbers, contractions)
        terms = []
        for one in humans:
            others = [human for human in humans if human != one]
            terms.append(min(1, float(len([human for human in others if human["answer"] == guess])) / 3))
        scores[row["question_id"]] = float(sum(terms)) / len(terms)
    return scores


def own_scores(predictions: Mapping[int, str], rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return our scorer's score by question id, of rows as the records hold them."""
    return {row["question_id"]: ours.score_answer(predictions[row["question_id"]], row["answers"]) for row in rows}


def repeat(annotations: Sequence[Annotation], count: int) -> list[Annotation]:
    """Return `count` questions: the given ones over and over, their ids counted from 0."""
    return [annotations[at % len(annotations)] | {"question_id": at} for at in range(count)]


def draw_predictions(annotations: Sequence[Annotation], seed: int = 0) -> dict[int, str]:
    """Draw one answer a question: 6 in 10 a human's of this question, 3 of another one, 1 a human's in an odd form."""
    chance = random.Random(seed)
    odd = [str.upper, str.title, "the {}".format, "{}.".format, " {}\n".format, "{}, 1,000".format, "({}) -".format]
    predictions = {}
    for row in annotations:
        kind = chance.random()
        source = row if kind < 0.7 else chance.choice(annotations)
        answer = chance.choice(source["answers"])["answer"]
        predictions[row["question_id"]] = chance.choice(odd)(answer) if 0.6 <= kind < 0.7 else answer
    return predictions


def compare(
    annotations: Sequence[Annotation], rounds: int = ROUNDS, slow_share: int = 1
) -> tuple[measure.Timing, measure.Timing, dict[int, float]]:
    """Time both on the same questions.

    Args:
        annotations: in the official layout.
        rounds: measured rounds.
        slow_share: the official structure scores every so many-th question, and its seconds are scaled up.

    Returns:
        Seconds of the official structure, seconds of ours, and by question id the score that both gave, of what both
        have scored.

    Raises:
        ValueError: they gave different figures.
    """
    predictions = draw_predictions(annotations)
    some = annotations[::slow_share]
    rows = as_records(annotations)
    results: dict[str, dict[int, float]] = {}

    def official() -> None:
        results["official"] = official_structure(predictions, some)

    def own() -> None:
        _forget()
        results["ours"] = own_scores(predictions, rows)

    seconds = measure.alternate({"official structure": official, "ours": own}, rounds, warm_up=0)
    of_some = own_scores(predictions, as_records(some))
    check_equal(results["official"], of_some)
    if any(results["ours"][number] != score for number, score in of_some.items()):
        raise ValueError("our scorer gives a question another score when it is among others")
    scale = len(annotations) / len(some)
    slow = measure.Timing(tuple(scale * one for one in seconds["official structure"].seconds))
    return slow, seconds["ours"], of_some


def as_records(annotations: Sequence[Annotation]) -> list[dict[str, Any]]:
    """Return rows as the records hold them, with answers as strings."""
    return [row | {"answers": [answer["answer"] for answer in row["answers"]]} for row in annotations]


def check_equal(official: Mapping[int, float], own: Mapping[int, float]) -> None:
    """Refuse figures that differ in a single bit."""
    if official != own:
        differing = [number for number, score in own.items() if official[number] != score]
        raise ValueError(f"the scorers differ, in {len(differing)} questions (the first: {differing[:3]})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write `scorer.json`."""
    options = measure.parse(measure.parser("scorer", __doc__, rounds=ROUNDS), arguments)
    (_, once), of = vqav2.texts(), vqav2.origin(vqav2.TEXT)
    kind = of.split()[0]
    claims: list[measure.Claim] = []
    details: dict[str, Any] = {f"{kind}_questions": len(once)}
    for what, count, slow_share in (
        (f"VQA accuracy of {QUESTIONS:,} questions, {len(once):,} {kind} ones repeated", QUESTIONS, SLOW_SHARE),
        # Repetition favours a scorer that remembers strings, as ours does.
        (f"VQA accuracy of {len(once):,} {kind} questions, each once", len(once), 1),
    ):
        annotations = repeat(once, count)
        slow, fast, figures = compare(annotations, options.rounds, slow_share)
        claims.append(measure.claim(what, slow, fast, target=TARGET, note="re-stated official structure / ours"))
        details[f"{len(annotations)}_questions"] = {
            "slow_scorer_gets_every": slow_share,
            "official_structure_seconds": slow.seconds,
            "ours_seconds": fast.seconds,
            "overall_of_both": sum(figures.values()) / len(figures),
        }
    measure.write("scorer", claims, details, {"questions and answers": of})


def _forget() -> None:
    """Empty our scorer's caches, so that every round starts as a new process does."""
    for function in vars(ours).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _clean(text: str) -> str:
    text = text.replace("\n", " ")
    text = text.replace("\t", " ")
    return text.strip()


def _official_marks(text: str) -> str:
    out = text
    for mark in _MARKS:
        if (mark + " " in text or " " + mark in text) or (re.search(_COMMA, text) is not None):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    return _PERIOD.sub("", out, int(re.UNICODE))


def _official_words(text: str, numbers: dict[str, str], contractions: Mapping[str, str]) -> str:
    out = []
    for word in text.lower().split():
        word = numbers.setdefault(word, word)
        if word not in _ARTICLES:
            out.append(word)
    for at, word in enumerate(out):
        if word in contractions:
            out[at] = contractions[word]
    return " ".join(out)


if __name__ == "__main__":
    main()
