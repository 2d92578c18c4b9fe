"""What data must hold before anything is made of it: one run shows every violation, each with its file and id."""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from vlm_vqa.data.records import SPLITS
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.question_types import answer_type, question_type
from vlm_vqa.params import IMAGE_NAME, BadRecords, DataParams

LARGEST_ID = 2**63 - 1  # ids are stored as 64-bit integers
IN_A_COPY = (
    "This is DVC's copy of the project for an experiment. It has only what git or DVC know: give data.directory as an "
    "absolute path, or `dvc add` a folder of the data's own (docs/data.md, Where the data lie)."
)
# A wrong path makes every image a violation: the message names this many of a kind and counts the rest.
_SHOWN_PER_KIND = 20


class ViolationKind(Enum):
    """A way in which data can be wrong: its name in messages, the remedy, and whether it is about one record alone."""

    MISSING_FILE = ("missing file", "put it there, or correct data.directory and the names in data.train, .val, .table")
    BROKEN_FILE = ("unreadable file", "download or unpack the file again; it is cut short or damaged")
    FOREIGN_FILE = (
        "file of another layout",
        "name VQAv2's questions and annotations (source: directory), or csv, tsv, JSON or Parquet (source: table)",
    )
    CLOSED_FILE = ("file that cannot be opened", "put a file there that may be read, of at most 2 GiB")
    BAD_SYNTAX = ("file that is not valid JSON", "mend the place it names, or write the file again")
    ENCODING = ("file that is not UTF-8", "save it as UTF-8, as editors and spreadsheets can")
    EMPTY_FILE = ("file without questions", "name the file that holds them")
    COLUMNS = ("columns that cannot be told", "name them under data.table.columns")
    BAD_ROW = ("malformed row", "mend it; a text with commas or line breaks stands in quotes", True)
    OTHER_ARCHIVE = ("archive that is not read", "unpack it and name the folder, or make a zip archive of it")
    BAD_QUESTION = ("malformed question", "write it out; in VQAv2's layout its question_id and image_id, too", True)
    BAD_ANNOTATION = ("malformed annotation", "give question_id, image_id and answers as in VQAv2's layout", True)
    NO_ANSWER = ("question without any answer", "give an answer that says something, or leave the question out", True)
    UNSAID_ANSWER = ("main answer that nobody gave", "use the questions' own annotations, or set data.doubtful: count")
    DUPLICATE_QUESTION = ("duplicate question id", "remove or renumber one of them", True)
    DUPLICATE_ANNOTATION = ("duplicate annotation", "remove all but one annotation of the question")
    NO_ANNOTATION = ("question without annotation", "use the annotations file that belongs to the questions file", True)
    NO_QUESTION = ("annotation without question", "use the questions file that belongs to the annotations file", True)
    IMAGE_MISMATCH = ("image id differs", "make question and annotation name the same image", True)
    IMAGE_ID = ("image id does not fit the name pattern", "correct the id, or image_name in params.yaml", True)
    TOO_MANY_DROPPED = ("too many bad records", "mend them, or raise data.most_dropped")
    FEW_VALIDATION = ("validation on fewer than two images", "give val two: each question is shown another one, too")
    FEW_IMAGES = ("too few images to share out", "give at least three images, or name a table in data.table.val")
    QUESTION_OVERLAP = ("question id in both splits", "renumber one split")
    IMAGE_OVERLAP = ("image in both splits", "keep it in one split, or set data.allow_split_overlap: true")
    IMAGE_TWIN = ("image in both splits under two ids", "keep it in one split, or set data.allow_split_overlap: true")
    LOOKALIKE = ("look-alikes in both splits", "keep them in one split, or set data.doubtful: count")
    IMAGE_CONFLICT = ("one image id, two images", "give different images different ids")
    MISSING_IMAGE = ("missing image", "put the file there, or correct images and image_name in params.yaml", True)
    BROKEN_IMAGE = ("unreadable image", "give an intact one of a known kind, or raise data.max_image_pixels", True)

    def __init__(self, label: str, remedy: str, of_record: bool = False):
        self.label, self.remedy, self.of_record = label, remedy, of_record


class Violations:
    """All that is wrong with the data. Bad records are violations too, or they are dropped and noted."""

    def __init__(self, data: DataParams | None = None) -> None:
        self.drops = data is not None and data.bad_records is BadRecords.DROP  # whether bad records are dropped
        self._most_dropped = data.most_dropped if data else 0.0
        self.found: defaultdict[ViolationKind, list[str]] = defaultdict(list)
        self._dropped = {split: self.found.copy() for split in SPLITS}
        self.split: str | None = None  # whose records are being read

    def add(self, kind: ViolationKind, text: str) -> None:
        """Note one violation; `text` names its file and id."""
        found = (self._dropped[self.split] if kind.of_record and self.split and self.drops else self.found)[kind]
        # A file that holds questions and answers is read as both.
        if kind.of_record or text not in found[:_SHOWN_PER_KIND]:
            found.append(text)

    def settle(self, split: str, questions: int) -> None:
        """End a split, of which `questions` are left: refuse it where more was dropped than may be."""
        self.split = None
        dropped = self._dropped[split]
        total = (count := sum(map(len, dropped.values()))) + questions
        if count > self._most_dropped * total:
            share = f"{count} of {total} records of {split} are bad; data.most_dropped is {self._most_dropped:g}"
            self.add(ViolationKind.TOO_MANY_DROPPED, share)
            for kind, texts in dropped.items():
                self.found[kind] += texts

    def dropped_records(self, split: str) -> list[str]:
        """Return what was dropped of a split, each with its reason."""
        return [f"{kind.label}: {text}" for kind, texts in self._dropped[split].items() for text in texts]

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    def raise_if_any(self) -> None:
        """Raise one `UserError` with `text`."""
        if self:
            raise UserError(self.text())

    def text(self) -> str:
        """Return every kind with its count, its first cases and its remedy."""
        lines = [f"the data breaks its contract in {len(self)} places; no records were made."]
        for kind, texts in self.found.items():
            lines.append(f"{kind.label}: {len(texts)}. To do: {kind.remedy}.")
            lines += [f"  {text}" for text in texts[:_SHOWN_PER_KIND]]
            if len(texts) > _SHOWN_PER_KIND:
                lines.append(f"  ... and {len(texts) - _SHOWN_PER_KIND} more")
        if "/.dvc/tmp/exps/" in f"{Path.cwd()}/":
            lines.append(IN_A_COPY)
        return "\n".join(lines)


class ReadAgain(Exception):
    """A source has learnt from a row what it should have known before the first: its splits are to be read anew."""


class MalformedRecord(Exception):
    """One entry is not what its layout says; the message says how, without naming file or id."""

    def __init__(self, kind: ViolationKind, text: str):
        super().__init__(text)
        self.kind = kind


class Row(NamedTuple):
    where: str  # file and id, for messages
    image_name: str
    record: dict[str, Any]  # as `records.question_features`


@dataclass
class Split:
    split: str
    name: str  # the file or files of its questions, for messages
    images: Sequence[Path]  # folders of images and zip archives of them
    rows: Callable[[Violations], Iterator[Row]]  # in the file's order; what is wrong becomes a violation
    inputs: dict[str, Path] = field(default_factory=dict)  # the files read, by what they hold


@dataclass(frozen=True)
class Source:
    """Data ready to be checked and stored."""

    name: str  # the value of `data.source`
    origin: dict[str, Any]  # what identifies the data beyond the files read; kept in the manifest
    splits: tuple[Split, ...]
    notes: tuple[str, ...] = ()  # what was changed before the rows; kept in the manifest


def answered(question: str, given: Any, kinds: Sequence[str], main: str) -> dict[str, Any]:
    """Return the part of a record that is about the answers; what is not given, or blank, is filled in. `given` is what
    `read_answers` returns, `kinds` the types of question and answer. The taught answer is the main one, else the most
    common one that says something, the earlier first."""
    answers, confidences = given
    if not any(map(str.strip, answers)):
        raise MalformedRecord(ViolationKind.NO_ANSWER, f"its answers are {list(answers)!r:.60}")
    # Equal counts stay in the order of the answers.
    taught = main if main.strip() else Counter(filter(str.strip, answers)).most_common(1)[0][0]
    return {
        "question_type": sys.intern(kinds[0] if kinds[0].strip() else question_type(question)),
        "answer_type": sys.intern(kinds[1] if kinds[1].strip() else answer_type(taught)),
        "multiple_choice_answer": taught,
        "answers": answers,
        "answer_confidences": confidences,
    }


def as_question(value: Any) -> str:
    """Return a question's text, or raise `MalformedRecord`."""
    if not is_text(value) or not value.strip():
        raise MalformedRecord(ViolationKind.BAD_QUESTION, f"question is {value!r:.60}, not text that says something")
    return value


def read_answers(items: Sequence[Any], text: Callable[[Any, str], str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return answers, and how sure who gave them was, if that is said. Items are texts, or objects with `answer` and
    `answer_confidence`; `text` makes a text of a value that is called so."""
    given = [item if isinstance(item, dict) else {"answer": item} for item in items]
    # Interned, because a few thousand different strings make up VQAv2's 13 million.
    said = tuple(sys.intern(text(one.get("answer"), "an answer")) for one in given)
    sure = tuple(sys.intern(text(one.get("answer_confidence") or None, "answer_confidence")) for one in given)
    return said, sure if any(sure) else ()


def image_name(pattern: str, image_id: int) -> str | None:
    """Return an image's file name by `params.IMAGE_NAME`'s pattern; None where the id has more digits than that has."""
    found = IMAGE_NAME.fullmatch(pattern)
    assert found is not None, "load_params has checked it"
    # Without a width any id fits.
    return pattern.format(image_id=image_id) if not found[1] or len(str(image_id)) <= int(found[1]) else None


def is_text(value: Any) -> bool:
    """Tell text from other values, and from halves of a character: JSON can hold them, files cannot."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= mark <= "\udfff" for mark in value))
