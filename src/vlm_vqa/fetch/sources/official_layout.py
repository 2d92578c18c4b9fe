"""Source `directory`: VQAv2's official file layout in a local folder, and what it has in common with other text files."""

import functools
import gzip
import json
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from vlm_vqa.data.records import SPLITS
from vlm_vqa.errors import UserError
from vlm_vqa.fetch import contract
from vlm_vqa.fetch.contract import MalformedRecord, Row, Source, Split, ViolationKind, Violations
from vlm_vqa.fetch.recognise import refusal, shown
from vlm_vqa.fetch.sources.image_files import DAMAGE, ENCRYPTED
from vlm_vqa.fetch.sources.zip_archive import files, open_zip
from vlm_vqa.files import MOST_BYTES, check_regular
from vlm_vqa.params import DataParams, SplitFiles

log = logging.getLogger(__name__)

_COCO = ("train2014", "val2014")
_IDS = {"question_id", "image_id"}
_MORE = ("question_type", "answer_type", "multiple_choice_answer")
_FOREIGN = {"questions": {"direct_answers", "answers", "answer"}, "annotations": {"question", "direct_answers"}}
"""What no entry of a bare list has."""
READ_ERRORS = (OSError, RecursionError, *DAMAGE)  # of a file of texts: JSON's errors are ValueErrors too

OFFICIAL = {
    split: SplitFiles(
        f"v2_OpenEnded_mscoco_{split}2014_questions.json",
        f"v2_mscoco_{split}2014_annotations.json",
        f"{split}2014",
        f"COCO_{split}2014_{{image_id:012d}}.jpg",
    )
    for split in SPLITS
}
"""VQAv2's own file names."""


def directory_source(data: DataParams) -> Source:
    """Return the files that `data.directory`, `data.train` and `data.val` name, or raise `UserError` as `folder_of`."""
    folder = folder_of(data)
    train = official_split(folder, "train", data.train, data.val.images)
    return Source("directory", {}, (train, official_split(folder, "val", data.val, data.train.images)))


def folder_of(data: DataParams) -> Path:
    """Return the folder that `data.directory` names, or raise `UserError`."""
    if not os.path.isdir(data.directory):
        what = f"data.directory is {data.directory!r}, which is no folder. Put the data there (VQAv2's as"
        raise UserError(f"{what} data/vqav2/README.md says), or set data.source: easy-vqa.")
    return Path(data.directory)


def places(folder: Path, names: str | Sequence[str]) -> list[Path]:
    """Return the folders and archives that a parameter names."""
    return [folder / name for name in ([names] if isinstance(names, str) else names)]


def official_split(folder: Path, split: str, files: SplitFiles, others: str | Sequence[str] = ()) -> Split:
    """Return a split that is read from its questions and annotations files; `others` are the images of the other split,
    looked through where an entry says that its image is of that part of COCO."""
    inputs = {"questions": folder / files.questions, "annotations": folder / files.annotations}
    images, more = places(folder, files.images), places(folder, others)
    rows = functools.partial(_rows, *inputs.values(), files.image_name, images, more)
    return Split(split, str(inputs["questions"]), images, rows, inputs)


def _rows(
    asked: Path, answered: Path, pattern: str, images: list[Path], others: list[Path], violations: Violations
) -> Iterator[Row]:
    """Yield the pairs of question and annotation whose image has a file name."""
    questions = _read_entries(asked, "questions", violations)
    annotations = _read_entries(answered, "annotations", violations)
    if questions is None or annotations is None:
        return
    for (question_id, image_id, (question, part)), answers in _pair(questions, annotations, violations):
        where = f"{asked}: question_id {question_id}"
        try:
            own = name = contract.image_name(pattern, image_id)
            if name is None:
                long = f"image_id {image_id} is too long for {pattern}"
                raise MalformedRecord(ViolationKind.IMAGE_ID, long)
            if part and (name := re.sub("|".join(_COCO), part, name)) != own:
                images.extend(place for place in others if place not in images)
            record = {"question_id": question_id, "image_id": image_id, "question": question}
            yield Row(where, name, record | contract.answered(question, *answers))
        except MalformedRecord as error:
            violations.add(error.kind, f"{where}: {error}")


class _Entry(NamedTuple):
    question_id: int
    image_id: int
    content: Any
    """Of a question: its text, and VQA-CP's part of COCO that has the image. Of an annotation: what `answered` takes."""


class _Entries(NamedTuple):
    """What a questions or annotations file holds, in file order."""

    name: str  # the file's name, for messages
    good: list[_Entry]
    bad: list[int | None]
    """Question ids of malformed entries, which are violations already: their counterparts are no further ones."""


def _read_entries(path: Path, key: str, violations: Violations) -> _Entries | None:
    """Read a questions or annotations file; None, and a violation, where it is none."""

    def compact(entry: dict[str, Any]) -> Any:
        # Entries shrink while the file is parsed: VQAv2's annotations as plain dicts would take 3 GB.
        try:
            return _parse(entry, key) if "question_id" in entry else entry
        except MalformedRecord:
            return entry

    content = read_json(path, violations, compact)
    if content is None:
        return None
    entries = content.get(key) if isinstance(content, dict) else content
    # VQA-CP's files are the bare lists; other data sets' are lists of both at once.
    first = content[0] if isinstance(content, list) and content else None
    both = isinstance(first, dict) and (not _IDS <= first.keys() or _FOREIGN[key] & first.keys())
    if not isinstance(entries, list) or both:
        violations.add(ViolationKind.FOREIGN_FILE, f"{path}: {refusal(path) or f'without a list {key!r}'}")
        return None
    if not entries:
        violations.add(ViolationKind.EMPTY_FILE, f"{path}: the list {key!r} is empty")
        return None
    found = _Entries(str(path), [], [])
    for row, entry in enumerate(entries):
        try:
            found.good.append(entry if isinstance(entry, _Entry) else _parse(entry, key))
        except MalformedRecord as error:
            question_id = str(entry.get("question_id") if isinstance(entry, dict) else None)
            found.bad.append(int(question_id) if question_id.isdecimal() and len(question_id) < 20 else None)
            violations.add(error.kind, f"{path}: entry {row} (question_id {question_id:.60}): {error}")
    return found


def _parse(entry: Any, key: str) -> _Entry:
    asked = key == "questions"
    kind = ViolationKind.BAD_QUESTION if asked else ViolationKind.BAD_ANNOTATION
    if not isinstance(entry, dict):
        raise MalformedRecord(kind, f"{entry!r:.60} is not an object")
    wanted = ("question_id", "image_id", "question") if asked else ("question_id", "image_id")
    if missing := [name for name in wanted if name not in entry]:
        raise MalformedRecord(kind, f"without {', '.join(missing)}")
    ids = [entry[name] for name in wanted[:2]]
    for name, value in zip(wanted, ids, strict=False):
        # bool is a subclass of int.
        if type(value) is not int or not 0 <= value <= contract.LARGEST_ID:
            raise MalformedRecord(kind, f"{name} is {value!r:.60}, not a whole number from 0 up")
    if asked:
        part = entry.get("coco_split")
        return _Entry(*ids, (contract.as_question(entry["question"]), sys.intern(part) if part in _COCO else ""))
    *kinds, main = (sys.intern(_text(entry.get(name), name)) for name in _MORE)
    name = "answers" if "answers" in entry or "answer" not in entry else "answer"
    # One answer may stand alone, under either name.
    items = [entry[name]] if isinstance(entry.get(name), str) else entry.get(name)
    if not isinstance(items, list):
        raise MalformedRecord(kind, f"{name} is {items!r:.60}, not a list" if name in entry else f"without {name}")
    return _Entry(*ids, (contract.read_answers(items, _text), kinds, main))


def _text(value: Any, what: str) -> str:
    if value is None and what != "an answer":
        return ""
    if not contract.is_text(value):
        raise MalformedRecord(ViolationKind.BAD_ANNOTATION, f"{what} is {value!r:.60}, not text")
    return value


def _pair(questions: _Entries, annotations: _Entries, violations: Violations) -> Iterator[tuple[_Entry, Any]]:
    """Yield each question with its answers, in the order of `questions`; what does not pair is a violation."""
    by_question: dict[int, _Entry] = {}
    for annotation in annotations.good:
        if by_question.setdefault(annotation.question_id, annotation) is not annotation:
            twice = f"{annotations.name}: question_id {annotation.question_id}"
            violations.add(ViolationKind.DUPLICATE_ANNOTATION, twice)
    seen: dict[int, None] = {}  # a dict, for it keeps the order
    for question in questions.good:
        where = f"{questions.name}: question_id {question.question_id}"
        annotation = by_question.get(question.question_id)
        if question.question_id in seen:
            violations.add(ViolationKind.DUPLICATE_QUESTION, where)
        elif annotation is not None and annotation.image_id != question.image_id:
            there = f"{annotation.image_id} in {annotations.name}"
            violations.add(ViolationKind.IMAGE_MISMATCH, f"{where} has image_id {question.image_id}, but {there}")
        elif annotation is not None:
            yield question, annotation.content
        seen[question.question_id] = None
    for kind, ids, here, there in (
        (ViolationKind.NO_ANNOTATION, (one for one in seen if one not in by_question), questions, annotations),
        (ViolationKind.NO_QUESTION, (one for one in by_question if one not in seen), annotations, questions),
    ):
        reported = {*there.bad}
        for question_id in [one for one in ids if one not in reported][there.bad.count(None) :]:
            violations.add(kind, f"{here.name}: question_id {question_id} is not in {there.name}")


def read_json(path: Path, violations: Violations, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return what a file of JSON holds, as it is, gzipped or in a zip of its own; None, and a violation, if it is none."""
    try:
        log.info("reading %s (%.0f MB)", path.name, path.stat().st_size / 1e6)
        with open_bytes(path) as file:
            # A few MB can unpack to anything.
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise OSError(f"it unpacks to more than {MOST_BYTES:,} bytes")
        # Under the one name: a split's annotations need not be held twice.
        text = text.decode("utf-8-sig")
        return json.loads(text, object_hook=object_hook)
    except READ_ERRORS as error:
        violations.add(*unreadable(path, error))
        return None


def unreadable(path: Path, error: Exception) -> tuple[ViolationKind, str]:
    """Return the violation that one of `READ_ERRORS` means, raised when a file of texts was read."""
    if isinstance(error, FileNotFoundError):
        return ViolationKind.MISSING_FILE, f"{path}"
    if isinstance(error, UnicodeDecodeError) and isinstance(error.object, bytes):
        start = error.object[:4]
        wide = start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start
        what = "is UTF-16; save it as UTF-8" if wide else f"is not UTF-8 ({error.reason} at byte {error.start})"
        return ViolationKind.ENCODING, f"{path}: {what}"
    if isinstance(error, OSError) and error.errno:
        return ViolationKind.CLOSED_FILE, f"{path}: {error.strerror}"
    if (what := refusal(path)) is not None:
        return ViolationKind.FOREIGN_FILE, f"{path}: {what}"
    if isinstance(error, json.JSONDecodeError) and len(error.doc) > 4:
        # What is cut short ends inside of something.
        cut = error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip()) - 4
        if not cut:
            kind = ViolationKind.BAD_SYNTAX if error.pos else ViolationKind.FOREIGN_FILE
            return kind, f"{path}: {'' if error.pos else 'is no JSON: '}{error}"
    what = "not complete JSON" if isinstance(error, json.JSONDecodeError | RecursionError) else "cannot be read"
    return ViolationKind.BROKEN_FILE, f"{path}: {what} ({error})"


@contextmanager
def open_bytes(path: Path) -> Generator[IO[bytes] | gzip.GzipFile]:
    """Open a file of JSON as it is, gzipped, or as the one JSON file of a zip archive."""
    check_regular(path)
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"PK\x03\x04":
        with (gzip.open if magic.startswith(b"\x1f\x8b") else open)(path, "rb") as file:
            yield file
        return
    with open_zip(path) as archive:
        if len(members := files(archive)) != 1:
            names = shown(repr(member.filename) for member in members)
            raise zipfile.BadZipFile(f"the archive holds {len(members)} files instead of one: {names}")
        if members[0].flag_bits & ENCRYPTED:
            raise zipfile.BadZipFile(f"{members[0].filename} is encrypted")
        # No more than the declared size is ever unpacked; readers end beyond `MOST_BYTES`.
        with archive.open(members[0]) as file:
            yield file
