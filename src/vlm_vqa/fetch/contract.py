"""What data must hold before anything is made of it.

Every violation is collected, so that one run shows all that is wrong, each with its file and id; the end is one
`UserError`. The remedy of each kind stands beside its name in `ViolationKind`.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

from vlm_vqa.errors import UserError
from vlm_vqa.params import IMAGE_NAME

ANSWERS_PER_QUESTION = 10
# Ids are stored as 64-bit integers.
_LARGEST_ID = 2**63 - 1
# A wrong path makes every image a violation: the message names this many of a kind and counts the rest.
_SHOWN_PER_KIND = 20


class ViolationKind(Enum):
    """A way in which data can be wrong: its name in messages, and the remedy."""

    MISSING_FILE = (
        "missing file",
        "put the file there, or correct data.directory and the names under data.train, data.val",
    )
    BROKEN_FILE = (
        "unreadable file",
        "download or unpack the file again; it is cut short, damaged or of another layout",
    )
    OTHER_ARCHIVE = ("archive that is not read", "unpack it and name the folder, or make a zip archive of it")
    BAD_QUESTION = ("malformed question", "compare with VQAv2's layout: question_id, image_id, question")
    BAD_ANNOTATION = (
        "malformed annotation",
        "compare with VQAv2's layout: question_id, image_id, question_type, answer_type, multiple_choice_answer, "
        "answers",
    )
    ANSWER_COUNT = ("not 10 answers", "give every annotation exactly 10 answers")
    DUPLICATE_QUESTION = ("duplicate question id", "remove or renumber one of them")
    DUPLICATE_ANNOTATION = ("duplicate annotation", "remove all but one annotation of the question")
    NO_ANNOTATION = ("question without annotation", "use the annotations file that belongs to the questions file")
    NO_QUESTION = ("annotation without question", "use the questions file that belongs to the annotations file")
    IMAGE_MISMATCH = ("image id differs", "make question and annotation name the same image")
    IMAGE_ID = ("image id does not fit the name pattern", "correct the id, or data.SPLIT.image_name")
    QUESTION_OVERLAP = ("question id in both splits", "renumber one split, or set data.allow_split_overlap: true")
    IMAGE_OVERLAP = ("image in both splits", "keep it in one split, or set data.allow_split_overlap: true")
    IMAGE_TWIN = ("picture in both splits", "keep it in one split, or set data.allow_split_overlap: true")
    LOOKALIKE = ("look-alikes in both splits", "keep them in one split, or set data.doubtful: count")
    IMAGE_CONFLICT = ("one image id, two images", "give different images different ids")
    MISSING_IMAGE = ("missing image", "put the file there, or correct data.SPLIT.images and data.SPLIT.image_name")
    BROKEN_IMAGE = (
        "unreadable image",
        "replace the file by an intact one of a kind that is read, or raise data.max_image_pixels if it is too large",
    )

    def __init__(self, label: str, remedy: str):
        self.label = label
        self.remedy = remedy


class Violations:
    """All that is wrong with the data, counted by kind; the first few of a kind are kept in words."""

    def __init__(self) -> None:
        self.count: Counter[ViolationKind] = Counter()
        self._shown: defaultdict[ViolationKind, list[str]] = defaultdict(list)

    def add(self, kind: ViolationKind, text: str) -> None:
        """Note one violation; `text` names its file and id."""
        self.count[kind] += 1
        if len(self._shown[kind]) < _SHOWN_PER_KIND:
            self._shown[kind].append(text)

    def __bool__(self) -> bool:
        return bool(self.count)

    def raise_if_any(self) -> None:
        """Raise one `UserError` that lists every kind with its count, its first cases and its remedy."""
        if not self:
            return
        lines = [f"the data breaks its contract in {self.count.total()} places; no records were made."]
        for kind, count in self.count.items():
            lines.append(f"{kind.label}: {count}. To do: {kind.remedy}.")
            lines += [f"  {text}" for text in self._shown[kind]]
            if count > _SHOWN_PER_KIND:
                lines.append(f"  ... and {count - _SHOWN_PER_KIND} more")
        raise UserError("\n".join(lines))


class MalformedRecord(Exception):
    """One entry is not what its layout says; the message says how, without naming file or id."""

    def __init__(self, kind: ViolationKind, text: str):
        super().__init__(text)
        self.kind = kind


class Question(NamedTuple):
    """One entry of a questions file."""

    question_id: int
    image_id: int
    question: str


class Annotation(NamedTuple):
    """One entry of an annotations file; answers and their confidences keep the file's order."""

    question_id: int
    image_id: int
    question_type: str
    answer_type: str
    multiple_choice_answer: str
    answers: tuple[str, ...]
    answer_confidences: tuple[str, ...]


def parse_question(entry: Any) -> Question:
    """Turn a JSON object into a `Question`, or raise `MalformedRecord`."""
    kind = ViolationKind.BAD_QUESTION
    _check_object(entry, ("question_id", "image_id", "question"), kind)
    _check_id(entry, "question_id", kind)
    _check_id(entry, "image_id", kind)
    _check_text(entry, "question", kind)
    return Question(entry["question_id"], entry["image_id"], entry["question"])


def parse_annotation(entry: Any) -> Annotation:
    """Turn a JSON object into an `Annotation`, or raise `MalformedRecord`."""
    kind = ViolationKind.BAD_ANNOTATION
    texts = ("question_type", "answer_type", "multiple_choice_answer")
    _check_object(entry, ("question_id", "image_id", *texts, "answers"), kind)
    _check_id(entry, "question_id", kind)
    _check_id(entry, "image_id", kind)
    _check_text(entry, "question_type", kind)
    _check_text(entry, "answer_type", kind)
    # People may have answered nothing; the manifest counts such questions.
    if not _is_text(entry["multiple_choice_answer"]):
        raise MalformedRecord(kind, f"multiple_choice_answer is {entry['multiple_choice_answer']!r:.60}, not text")
    answers = entry["answers"]
    if not isinstance(answers, list):
        raise MalformedRecord(kind, f"answers is {answers!r:.60}, not a list")
    if len(answers) != ANSWERS_PER_QUESTION:
        raise MalformedRecord(ViolationKind.ANSWER_COUNT, f"{len(answers)} answers, not {ANSWERS_PER_QUESTION}")
    for answer in answers:
        _check_object(answer, ("answer", "answer_confidence"), kind)
        if not _is_text(answer["answer"]) or not _is_text(answer["answer_confidence"]):
            raise MalformedRecord(kind, f"answer {answer!r:.60} is not text")
    # Interned, because a few thousand different strings make up VQAv2's 13 million answers and confidences.
    return Annotation(
        entry["question_id"],
        entry["image_id"],
        *(sys.intern(entry[key]) for key in texts),
        tuple(sys.intern(answer["answer"]) for answer in answers),
        tuple(sys.intern(answer["answer_confidence"]) for answer in answers),
    )


class Entries(NamedTuple):
    """What a questions or annotations file holds."""

    name: str
    """The file's name, for messages."""
    good: list[Any]
    """The well-formed entries, `Question` or `Annotation`, in file order."""
    reported: set[int]
    """Question ids of malformed entries: they are violations already, and their counterparts are no further ones."""


def pair(questions: Entries, annotations: Entries, violations: Violations) -> Iterator[tuple[Question, Annotation]]:
    """Yield each question with its annotation, in the order of `questions`; what does not pair is a violation."""
    by_question: dict[int, Annotation] = {}
    for annotation in annotations.good:
        if annotation.question_id in by_question:
            violations.add(
                ViolationKind.DUPLICATE_ANNOTATION, f"{annotations.name}: question_id {annotation.question_id}"
            )
        by_question[annotation.question_id] = annotation
    seen: set[int] = set()
    for question in questions.good:
        where = f"{questions.name}: question_id {question.question_id}"
        annotation = by_question.get(question.question_id)
        if question.question_id in seen:
            violations.add(ViolationKind.DUPLICATE_QUESTION, where)
        elif annotation is None:
            if question.question_id not in annotations.reported:
                violations.add(ViolationKind.NO_ANNOTATION, f"{where} is not in {annotations.name}")
        elif annotation.image_id != question.image_id:
            there = f"{annotation.image_id} in {annotations.name}"
            violations.add(ViolationKind.IMAGE_MISMATCH, f"{where} has image_id {question.image_id}, but {there}")
        else:
            yield question, annotation
        seen.add(question.question_id)
    for question_id in by_question:
        if question_id not in seen and question_id not in questions.reported:
            violations.add(
                ViolationKind.NO_QUESTION, f"{annotations.name}: question_id {question_id} is not in {questions.name}"
            )


class ImageNames:
    """File names of images, as a format string of the image id makes them: `COCO_train2014_{image_id:012d}.jpg`."""

    def __init__(self, pattern: str):
        """`pattern` matches `vlm_vqa.params.IMAGE_NAME`, as `load_params` has checked."""
        found = IMAGE_NAME.fullmatch(pattern)
        assert found is not None, pattern
        self.pattern = pattern
        # Without a width any id fits.
        self._digits = int(found[1]) if found[1] else sys.maxsize

    def name(self, image_id: int) -> str | None:
        """Return the image's file name, or None where the id has more digits than the pattern."""
        return self.pattern.format(image_id=image_id) if len(str(image_id)) <= self._digits else None


def _check_object(entry: Any, keys: tuple[str, ...], kind: ViolationKind) -> None:
    if not isinstance(entry, dict):
        raise MalformedRecord(kind, f"{entry!r:.60} is not an object")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise MalformedRecord(kind, f"without {', '.join(missing)}")


def _check_id(entry: dict[str, Any], key: str, kind: ViolationKind) -> None:
    value = entry[key]
    # bool is a subclass of int.
    if type(value) is not int or not 0 <= value <= _LARGEST_ID:
        raise MalformedRecord(kind, f"{key} is {value!r:.60}, not a whole number from 0 up")


def _check_text(entry: dict[str, Any], key: str, kind: ViolationKind) -> None:
    value = entry[key]
    if not _is_text(value) or not value.strip():
        raise MalformedRecord(kind, f"{key} is {value!r:.60}, not text that says something")


def _is_text(value: Any) -> bool:
    """Tell text from other values, and from halves of a character: JSON can hold them, files cannot."""
    if not isinstance(value, str):
        return False
    # The first question is answered at once, for nearly every string.
    return value.isascii() or not any("\ud800" <= mark <= "\udfff" for mark in value)
