"""What a score is worth: the best predictor that sees no image, and the model itself when it sees another image."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_vqa.data.records import said_answers
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.vqa_accuracy import score_answer

FOLDS = 5
JUDGED = 20_000  # training questions that the ways are compared on, at most: enough to tell half a point
NEGATIONS = frozenset("no not never none without isn't aren't doesn't don't can't wasn't weren't".split())

Row = Mapping[str, Any]
Key = tuple[Hashable, int]
"""What questions are counted together by, and how many of them training must have asked for the count to speak."""


def _of_type(question: str, kind: str) -> Iterator[Key]:
    yield ("type", kind), 1


def _exact(question: str, kind: str) -> Iterator[Key]:
    # One asking of a question says less about its answer than its type does (on real VQAv2 questions 0.341 against 0.344).
    yield ("question", question), 2
    yield from _of_type(question, kind)


def _leading_words(question: str, kind: str) -> Iterator[Key]:
    yield ("question", question), 2
    words = question.lower().rstrip("?").split()
    for count in range(len(words), 0, -1):
        yield tuple(words[:count]), 10


def _type_and_negation(question: str, kind: str) -> Iterator[Key]:
    yield ("negated", kind, not NEGATIONS.isdisjoint(question.lower().replace("?", "").split())), 1
    yield from _of_type(question, kind)


WAYS: dict[str, Callable[[str, str], Iterator[Key]]] = {
    "exact question": _exact,
    "question type": _of_type,
    "longest leading words": _leading_words,
    "type and negation": _type_and_negation,
    "always the commonest": lambda question, kind: iter(()),
}
"""How an answer can be had from question and question type alone: by the first key that training asked often enough, else
the most common answer of all."""


def count(way: str, rows: Sequence[Row], said: Sequence[Counter[str]]) -> Callable[[str, str], str]:
    """Count `said`, each row's answers that say something, in one of `WAYS`; ties go to the alphabetically first.

    Return what answers a question of a type by it.
    """
    keys_of = WAYS[way]
    keys = [[*keys_of(row["question"], row["question_type"])] for row in rows]
    askings = Counter(key for found in keys for key, _ in found)
    counted: dict[Hashable, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for found, answers in zip(keys, said, strict=True):
        overall.update(answers)
        for key, least in found:
            # Of rare keys, which most are, nothing is kept.
            if answers and askings[key] >= least:
                counted[key].update(answers)
    answer_to = {key: most_common(counter) for key, counter in counted.items()}
    commonest = most_common(overall)
    return lambda *asked: next((answer_to[key] for key, _ in keys_of(*asked) if key in answer_to), commonest)


class QuestionOnlyBaseline:
    """Answers from the question's text alone, counted on the training split.

    Of `WAYS` the one that answers best where it was not counted: in training's own questions, divided by image.
    """

    def __init__(
        self,
        training_questions: Iterable[Row],
        way: str | None = None,
        score_of: Callable[[str, Sequence[str]], float] = score_answer,
    ):
        """Count all human answers that say something.

        Args:
            training_questions: rows with `question`, `question_type`, `answers` and, to choose a way, `image_id`.
            way: one of `WAYS`; by default the best is chosen.
            score_of: one of `vqa_accuracy.METRICS`, to choose by.

        UserError: there is no question.
        """
        rows = list(training_questions)
        said = [Counter(said_answers(row["answers"])) for row in rows]
        if not any(said):
            raise UserError("baselines.prior: the training split has no question to count. Check the records.")
        self.cross_validated = {} if way else cross_validate(rows, said, score_of)
        """The score of every way on questions about other images than those it was counted on."""
        self.way = way or max(self.cross_validated, key=lambda name: self.cross_validated[name])
        self.answer = count(self.way, rows, said)


def cross_validate(
    rows: Sequence[Row], said: Sequence[Counter[str]], score_of: Callable[[str, Sequence[str]], float]
) -> dict[str, float]:
    """Return the mean score of every way in `FOLDS` parts, each answered by what the others were counted on.

    Images stay whole; of many questions `JUDGED` are taken, those of the first images in a drawn order. Of questions about a
    single image nothing can be told: the first way is as good as any.
    """
    images, place = np.unique([row["image_id"] for row in rows], return_inverse=True)
    rank = np.random.RandomState(0).permutation(len(images))[place]
    judged = np.argsort(rank, kind="stable")[:JUDGED].tolist()
    scores: dict[str, list[float]] = {way: [] for way in WAYS}
    for fold in range(FOLDS):
        own = [rows[at] for at in judged if rank[at] % FOLDS == fold]
        others = [at for at in judged if rank[at] % FOLDS != fold]
        if not any(said[at] for at in others):
            continue
        for way, found in scores.items():
            answer = count(way, [rows[at] for at in others], [said[at] for at in others])
            found += [score_of(answer(row["question"], row["question_type"]), row["answers"]) for row in own]
    return {way: float(np.mean(found)) if found else 0.0 for way, found in scores.items()}


def shuffled_images(image_ids: Iterable[int], seed: int) -> dict[int, int]:
    """Give every image another one, never itself; all questions of an image get the same one.

    The images come in any order, repeats allowed; the same seed and the same set of them give the same assignment.
    UserError if there are fewer than two.
    """
    distinct = np.unique(np.fromiter(image_ids, dtype=np.int64))
    if len(distinct) < 2:
        raise UserError(
            "baselines.shuffled_images: the validation questions are all about one image, so none can be shown "
            "another. Evaluate on questions of at least two images."
        )
    # A random cycle over the images: no image maps to itself.
    trip = np.random.RandomState(seed).permutation(distinct)
    return dict(zip(trip.tolist(), np.roll(trip, -1).tolist(), strict=True))


def most_common(counter: Counter[str]) -> str:
    """Return the alphabetically first of the most common answers."""
    return min(counter, key=lambda answer: (-counter[answer], answer))
