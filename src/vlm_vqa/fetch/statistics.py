"""What is kept of questions and images that have been stored, in one pass over them: a few MB, and 0.3 kB a picture.

Pictures that stand in both splits under two ids are told by their bytes, and by how they look: by `imagehash.phash` and,
since it knows no colours, by the mean colours of 8 x 8 fields.
"""

import hashlib
import json
import zlib
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import imagehash
import numpy as np
from PIL import Image

from vlm_vqa.fetch.contract import Split

_EXAMPLES = 6
# Copies of photos, encoded again or in another size, mostly stay within both (tests/fetch/test_lookalikes.py). Drawings
# such as easy-VQA's differ in few bits of the first; by both, none of its val pictures looks like one of train.
_BITS, _COLOUR = 6, 10
_FIELDS = 8
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


class Look(NamedTuple):
    bits: bytes  # its perceptual hash, 64 bits
    colours: bytes  # mean colours, `_FIELDS` x `_FIELDS` x RGB


def look(image: Image.Image) -> Look:
    """Return how an RGB picture looks, from 256 x 256 of its pixels: all of them take five times as long."""
    small = image.resize((256, 256), Image.Resampling.NEAREST).reduce(4)
    fields = small.resize((_FIELDS, _FIELDS), Image.Resampling.BOX)
    return Look(np.packbits(imagehash.phash(small).hash).tobytes(), fields.tobytes())


class Lookalikes:
    """Compares the pictures of two splits; 0.3 kB a picture."""

    def __init__(self, splits: Sequence[Collection[int]]):
        """Take the ids of the images of each."""
        self.splits = splits
        self.twins = [0, 0]  # images of each split whose bytes are those of an earlier one of it, under another id
        self._first: tuple[dict[str, int], dict[str, int]] = {}, {}  # by split and hash the first image's id
        self._looks: list[tuple[int, Look]] = []

    def add(self, image_id: int, sha256: str, look: Look) -> None:
        """Take one picture; each comes once."""
        for split, ids in enumerate(self.splits):
            if image_id in ids:
                self.twins[split] += self._first[split].setdefault(sha256, image_id) != image_id
        self._looks.append((image_id, look))

    def equal(self) -> list[tuple[int, int]]:
        """Return pairs of ids, of the first split and the second, whose pictures have the same bytes."""
        train, val = self._first
        pairs = ((train.get(sha256), image_id) for sha256, image_id in val.items())
        return [(first, second) for first, second in pairs if first is not None and first != second]

    def near(self) -> list[tuple[int, int]]:
        """Return pairs as `equal` does whose pictures look alike, the nearest one for each of the second split, nearest
        first."""
        known = {second for _, second in self.equal()}
        first: dict[Look, int] = {}
        second: dict[Look, list[int]] = defaultdict(list)
        for image_id, seen in self._looks:
            if image_id in self.splits[0]:
                first.setdefault(seen, image_id)
            elif image_id not in known:
                second[seen].append(image_id)
        ids = list(first.values())
        bits = np.array([seen.bits for seen in first], "V8").view(np.uint64)
        colours = np.frombuffer(b"".join(seen.colours for seen in first), np.uint8).reshape(len(ids), 3 * _FIELDS**2)
        found = []
        for seen, images in second.items():
            alike = np.flatnonzero(np.bitwise_count(bits ^ np.frombuffer(seen.bits, np.uint64)) <= _BITS)
            differing = colours[alike].astype(np.int16) - np.frombuffer(seen.colours, np.uint8)
            worst = np.abs(differing).max(axis=1, initial=0)
            if len(alike) and worst.min() <= _COLOUR:
                found += [(int(worst.min()), ids[alike[worst.argmin()]], image_id) for image_id in images]
        return [(one, other) for _, one, other in sorted(found)]


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
