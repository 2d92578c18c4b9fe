"""What a score is worth: the best predictor that sees no image, and the model itself when it sees another image."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vlm_vqa.data.records import said_answers
from vlm_vqa.errors import UserError

# One asking of a question says less about its answer than the question's type does (on real VQAv2 questions 0.341
# against 0.344 for two).
_LEAST_ASKINGS = 2


class QuestionOnlyBaseline:
    """Answers from the question's text alone, counted on the training split.

    The most common answer to exactly this question if training asked it at least twice; else to questions of its
    type; else the most common answer of all. All human answers count that say something; ties go to the
    alphabetically first.
    """

    def __init__(self, training_questions: Iterable[Mapping[str, Any]]):
        """Count answers; rows need `question`, `question_type` and `answers`. UserError if there is none."""
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        by_type: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        askings: Counter[str] = Counter()
        for row in training_questions:
            askings[row["question"]] += 1
            for counter in (by_question[row["question"]], by_type[row["question_type"]], overall):
                counter.update(said_answers(row["answers"]))
        if not overall:
            raise UserError("baselines.prior: the training split has no question to count. Check the records.")
        self._by_question = {
            question: most_common(counter)
            for question, counter in by_question.items()
            if askings[question] >= _LEAST_ASKINGS
        }
        self._by_type = {name: most_common(counter) for name, counter in by_type.items()}
        self._overall = most_common(overall)

    def answer(self, question: str, question_type: str) -> str:
        """Return the answer to a question of the given type."""
        return self._by_question.get(question) or self._by_type.get(question_type) or self._overall


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
