"""What is kept of questions and images that have been stored: one pass over them, a few MB whatever their number."""

import hashlib
import json
import zlib
from bisect import insort
from collections import Counter
from collections.abc import Iterable
from itertools import chain, zip_longest
from typing import Any

from vlm_vqa.fetch.contract import Split
from vlm_vqa.fetch.lookalikes import Look, Lookalikes

_EXAMPLES = 6
_Row = dict[str, Any]


class Texts:
    """One split's questions. Every counter maps a value to the number of questions that have it."""

    def __init__(self, paths: Split):
        self.paths = paths
        self.digest = hashlib.sha256()
        self.images: dict[int, str] = {}  # file name by image id
        self.question_ids: set[int] = set()
        self.answer_types, self.question_types, self.main_answers, self.confidences = (Counter[str]() for _ in range(4))
        """The last counts the humans' answers."""
        self.question_words, self.answer_words, self.humans, self.distinct_answers, self.agreement, self.of_image = (
            Counter[int]() for _ in range(6)
        )
        """Words of question and main answer; answers; how many humans gave the most common one; the image's id."""
        self.unsaid_answers: list[str] = []  # where main answers stand that none of the humans gave
        self.questions = self.blank_humans = self.asked_again = self.asked_in_both = self.files_without_questions = 0
        """Of the others: humans' answers that are blank; questions in the words of an earlier one about the same image,
        and of one in the other split."""
        self.longest = 0  # bytes of the longest question with the longest of its answers
        self.asked: set[int] = set()  # hashes of image and question, which need a tenth of the memory
        self._examples: dict[str, list[tuple[int, _Row]]] = {}

    def add(self, row: _Row, where: str = "") -> None:
        """Count one row of `records.question_features`; `where` it stands, for messages."""
        # A column that came later counts only where it says something: the hash of data that lack it is as ever.
        said = {key: value for key, value in row.items() if value is not None}
        self.digest.update(json.dumps(said, sort_keys=True).encode() + b"\n")
        self.question_ids.add(row["question_id"])
        self.questions += 1
        self.answer_types[row["answer_type"]] += 1
        self.question_types[row["question_type"]] += 1
        self.question_words[len(row["question"].split())] += 1
        main, humans = row["multiple_choice_answer"], Counter(row["answers"])
        self.main_answers[main] += 1
        self.answer_words[len(main.split())] += 1
        longest = max(len(answer.encode()) for answer in (*humans, main))
        self.longest = max(self.longest, len(row["question"].encode()) + longest)
        self.agreement[max(humans.values())] += 1
        self.humans[len(row["answers"])] += 1
        self.distinct_answers[len(humans)] += 1
        self.confidences.update(row["answer_confidences"])
        self.of_image[row["image_id"]] += 1
        if main not in humans and main.strip().lower() not in {answer.strip().lower() for answer in humans}:
            self.unsaid_answers.append(f"{where}: {main!r:.60}")
        self.blank_humans += sum(count for answer, count in humans.items() if not answer.strip())
        asked = hash((row["image_id"], row["question"]))
        self.asked_again += asked in self.asked
        self.asked.add(asked)
        # The rows with the lowest checksums of their question's id are as good as a draw.
        kept, lot = self._examples.setdefault(row["answer_type"], []), zlib.crc32(str(row["question_id"]).encode())
        if len(kept) < _EXAMPLES or lot < kept[-1][0]:
            insort(kept, (lot, row), key=lambda one: (one[0], one[1]["question_id"]))
            del kept[_EXAMPLES:]

    @property
    def questions_of_image(self) -> Counter[int]:
        """How many questions an image has; counts images."""
        return Counter(self.of_image.values())

    def examples(self) -> list[_Row]:
        """Return a few rows on different images, of all answer types in turn: a draw that is the same in every run."""
        queues = [[row for _, row in self._examples[kind]] for kind, _ in self.answer_types.most_common(_EXAMPLES)]
        chosen: dict[int, _Row] = {}
        for row in filter(None, chain.from_iterable(zip_longest(*queues))):
            chosen.setdefault(row["image_id"], row)
        return list(chosen.values())[:_EXAMPLES]


class Images:
    """The images of both splits."""

    def __init__(self, lookalikes: Lookalikes, wanted: set[int]):
        self.lookalikes = lookalikes
        self.wanted, self.pictures = wanted, dict[int, bytes]()  # ids of what the report shows, and files by id
        self.digest = hashlib.sha256()
        self.count = self.bytes = 0
        self.sizes = Counter[tuple[int, int]]()  # images by (width, height)
        self.changes = Counter[str]()  # images by what was changed beside decoding, as `decoding.open_image` says it
        self.alike: list[tuple[int, int]] = []  # ids of pictures that look alike, of the first split and the second
        self.bad: dict[int, tuple[Any, str]] = {}  # of images dropped with their questions: violation and its words
        self.conflicts: set[int] = set()  # ids that stand for different images

    def add(self, row: _Row, changes: Iterable[str], look: Look) -> None:
        """Count one row of `records.image_features`."""
        self.digest.update(f"{row['image_id']} {row['sha256']}\n".encode())
        self.count += 1
        self.bytes += len(row["image"]["bytes"])
        self.sizes[row["width"], row["height"]] += 1
        self.changes.update(changes)
        self.lookalikes.add(row["image_id"], row["sha256"], look)
        if row["image_id"] in self.wanted:
            self.pictures[row["image_id"]] = row["image"]["bytes"]


def total(counts: Counter[int]) -> int:
    """Return the sum of the counted values."""
    return sum(value * count for value, count in counts.items())


def mean(counts: Counter[int]) -> float:
    """Return the mean of the counted values."""
    return total(counts) / counts.total()
