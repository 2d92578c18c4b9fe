"""What the report on the data counts: one pass over questions and images, a few MB whatever their number."""

import zlib
from bisect import insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from vlm_vqa.fetch.lookalikes import Look, Lookalikes

_EXAMPLES = 6
_Row = dict[str, Any]
_Files = dict[int, bytes]  # said here, for a class with a field `bytes` means that by `bytes`


@dataclass
class QuestionStatistics:
    """Counts over one split's questions; every counter maps a value to the number of questions that have it."""

    questions: int = 0
    answer_types: Counter[str] = field(default_factory=Counter)
    question_types: Counter[str] = field(default_factory=Counter)
    question_words: Counter[int] = field(default_factory=Counter)
    main_answers: Counter[str] = field(default_factory=Counter)
    answer_words: Counter[int] = field(default_factory=Counter)
    """Words of the main answer."""
    agreement: Counter[int] = field(default_factory=Counter)
    """How many of the humans gave the answer that most of them gave."""
    humans: Counter[int] = field(default_factory=Counter)
    """Questions by the number of their answers."""
    distinct_answers: Counter[int] = field(default_factory=Counter)
    confidences: Counter[str] = field(default_factory=Counter)
    """Counts the humans' answers."""
    of_image: Counter[int] = field(default_factory=Counter)
    """Questions by image id."""
    unsaid_answers: list[str] = field(default_factory=list)
    """Where main answers stand that none of the humans gave."""
    blank_humans: int = 0
    """Humans' answers that are blank."""
    asked_again: int = 0
    """Questions in the words of an earlier one about the same image."""
    asked_in_both: int = 0
    """Questions in the words of one in the other split about the same image."""
    longest: int = 0
    """Bytes of the longest question with the longest of its answers."""
    files_without_questions: int = 0
    asked: set[int] = field(default_factory=set)
    """Hashes of image and question, which need a tenth of the memory."""
    _examples: dict[str, list[tuple[int, _Row]]] = field(default_factory=dict)

    def add(self, row: _Row, where: str = "") -> None:
        """Count one row of `records.QUESTION_FEATURES`; `where` it stands, for messages."""
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


@dataclass
class ImageStatistics:
    """Counts over the images of all splits."""

    lookalikes: Lookalikes
    wanted: set[int]
    """Ids of the images that the report shows."""
    images: int = 0
    bytes: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images by (width, height)."""
    changes: Counter[str] = field(default_factory=Counter)
    """Images by what was changed beside decoding, as `decoding.open_with_changes` says it."""
    alike: list[tuple[int, int]] = field(default_factory=list)
    """Ids of pictures that look alike, of the first split and the second."""
    bad: dict[int, tuple[Any, str]] = field(default_factory=dict)
    """Images that are dropped with their questions: the kind of violation, and its words, by id."""
    conflicts: set[int] = field(default_factory=set)
    """Ids that stand for different images."""
    pictures: _Files = field(default_factory=dict)
    """Files of the images that the report shows, by id."""

    def add(self, row: _Row, changes: Iterable[str], look: Look) -> None:
        """Count one row of `records.IMAGE_FEATURES`."""
        self.images += 1
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
