"""Source `directory`: VQAv2's official file layout in a local folder, and what it has in common with other text files."""

import functools
import gzip
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlm_vqa.data.records import SPLITS
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.contract import (
    Annotation,
    Entries,
    ImageNames,
    MalformedRecord,
    Question,
    Row,
    Source,
    Split,
    ViolationKind,
    Violations,
    answered,
    pair,
    parse_annotation,
    parse_question,
)
from vlm_vqa.fetch.recognise import refusal
from vlm_vqa.fetch.sources.image_files import DAMAGE, ENCRYPTED
from vlm_vqa.fetch.sources.zip_archive import files, open_zip, shown
from vlm_vqa.files import MOST_BYTES, check_regular
from vlm_vqa.params import DataParams

log = logging.getLogger(__name__)

_GZIP_MAGIC = b"\x1f\x8b"
_ZIP_MAGIC = b"PK\x03\x04"
_COCO = ("train2014", "val2014")
READ_ERRORS = (OSError, RecursionError, *DAMAGE)
"""What reading a file of texts raises: JSON's errors are ValueErrors too; nested a thousand deep it is a RecursionError."""


@dataclass(frozen=True)
class SplitPaths:
    """The files of one split in official layout."""

    split: str
    questions: Path
    annotations: Path
    images: tuple[Path, ...]
    """Folders of images, or zip archives of them."""
    names: ImageNames


def directory_source(data: DataParams) -> Source:
    """Return the files that `data.directory`, `data.train` and `data.val` name.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(data.directory)
    if not os.path.isdir(folder):
        raise UserError(
            f"data.directory is {data.directory!r}, which is no folder. Put the VQAv2 files there as "
            "data/vqav2/README.md says, or set data.source: easy-vqa."
        )
    splits = []
    for split in SPLITS:
        files = getattr(data, split)
        texts = (folder / files.questions, folder / files.annotations)
        images = tuple(places(folder, files.images))
        splits.append(official_split(SplitPaths(split, *texts, images, ImageNames(files.image_name))))
    return Source("directory", {}, tuple(splits))


def places(folder: Path, names: str | Sequence[str]) -> list[Path]:
    """Return the folders and archives that a parameter names."""
    return [folder / name for name in ([names] if isinstance(names, str) else names)]


def official_split(paths: SplitPaths) -> Split:
    """Return a split that is read from its questions and annotations files."""
    inputs = {"questions": paths.questions, "annotations": paths.annotations}
    return Split(paths.split, str(paths.questions), paths.images, functools.partial(_rows, paths), inputs)


def _rows(paths: SplitPaths, violations: Violations) -> Iterator[Row]:
    """Yield the pairs of question and annotation whose image has a file name."""
    questions = read_questions(paths.questions, violations)
    annotations = read_annotations(paths.annotations, violations)
    if questions is None or annotations is None:
        return
    misfits: set[int] = set()
    for question, annotation in pair(questions, annotations, violations):
        where = f"{paths.questions}: question_id {question.question_id}"
        name = paths.names.name(question.image_id)
        if name and question.coco_split in _COCO:
            name = re.sub("|".join(_COCO), question.coco_split, name)
        try:
            if name is not None:
                yield Row(where, name, _record(question, annotation))
            elif question.image_id not in misfits or violations.drops:
                misfits.add(question.image_id)
                long = f"{where} has image_id {question.image_id}, too long for {paths.names.pattern}"
                violations.add(ViolationKind.IMAGE_ID, long)
        except MalformedRecord as error:
            violations.add(error.kind, f"{where}: {error}")


def _record(question: Question, annotation: Annotation) -> dict[str, Any]:
    given = (annotation.answers, annotation.answer_confidences)
    return {
        "question_id": question.question_id,
        "image_id": question.image_id,
        "question": question.question,
        **answered(question.question, given, annotation.kinds, annotation.multiple_choice_answer),
    }


def official_paths(folder: Path) -> tuple[SplitPaths, ...]:
    """Return VQAv2's own file names below `folder`, for both splits."""
    return tuple(
        SplitPaths(
            split,
            folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json",
            folder / f"v2_mscoco_{split}2014_annotations.json",
            (folder / f"{split}2014",),
            ImageNames(f"COCO_{split}2014_{{image_id:012d}}.jpg"),
        )
        for split in SPLITS
    )


def read_questions(path: Path, violations: Violations) -> Entries | None:
    """Read a questions file, JSON, gzipped JSON or in a zip of its own; None, and a violation, where it is not one."""
    return _read_entries(path, "questions", Question, parse_question, violations)


def read_annotations(path: Path, violations: Violations) -> Entries | None:
    """Read an annotations file, JSON, gzipped JSON or in a zip of its own; None, and a violation, where it is not one."""
    return _read_entries(path, "annotations", Annotation, parse_annotation, violations)


def _read_entries(
    path: Path, key: str, kind: type, parse: Callable[[Any], Any], violations: Violations
) -> Entries | None:
    def compact(entry: dict[str, Any]) -> Any:
        # Entries shrink while the file is parsed: VQAv2's annotations as plain dicts would take 3 GB.
        if "question_id" not in entry:
            return entry
        try:
            return parse(entry)
        except MalformedRecord:
            return entry

    content = read_json(path, violations, compact)
    if content is None:
        return None
    entries = content.get(key) if isinstance(content, dict) else content
    # VQA-CP's files are the bare lists; other data sets' are lists of both at once.
    foreign = isinstance(content, list) and content and not _is_official(content[0], key)
    if not isinstance(entries, list) or foreign:
        violations.add(ViolationKind.FOREIGN_FILE, f"{path}: {refusal(path) or f'without a list {key!r}'}")
        return None
    if not entries:
        violations.add(ViolationKind.EMPTY_FILE, f"{path}: the list {key!r} is empty")
        return None
    return _sort_out(path, entries, kind, parse, violations)


def _is_official(entry: Any, key: str) -> bool:
    """Tell an entry of a bare list of questions, or of annotations, from one that holds both."""
    known = {"question_id", "image_id"} | ({"question"} if key == "questions" else set())
    both = {"question", "direct_answers", "answers", "answer"} - (
        {"question"} if key == "questions" else {"answers", "answer"}
    )
    return (
        isinstance(entry, Question | Annotation)
        or isinstance(entry, dict)
        and known <= entry.keys()
        and not both & entry.keys()
    )


def read_json(path: Path, violations: Violations, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return what a file of JSON holds, as it is, gzipped or in a zip of its own; None, and a violation, if it is none."""
    try:
        log.info("reading %s (%.0f MB)", path.name, path.stat().st_size / 1e6)
        with open_bytes(path) as file:
            # A few MB can unpack to anything.
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise OSError(f"it unpacks to more than {MOST_BYTES:,} bytes")
        # One name for all: a split's annotations need not be held twice.
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
    if magic != _ZIP_MAGIC:
        with (gzip.open if magic.startswith(_GZIP_MAGIC) else open)(path, "rb") as file:
            yield file
        return
    with open_zip(path) as archive:
        members = files(archive)
        if len(members) != 1:
            names = shown(member.filename for member in members)
            raise zipfile.BadZipFile(f"the archive holds {len(members)} files instead of one: {names}")
        if members[0].flag_bits & ENCRYPTED:
            raise zipfile.BadZipFile(f"{members[0].filename} is encrypted")
        if members[0].file_size > MOST_BYTES:
            raise zipfile.BadZipFile(f"{members[0].filename} would unpack to {members[0].file_size} bytes")
        # No more than the declared size is ever unpacked.
        with archive.open(members[0]) as file:
            yield file


def _sort_out(
    path: Path, entries: list[Any], kind: type, parse: Callable[[Any], Any], violations: Violations
) -> Entries:
    """Part well-formed entries from malformed ones."""
    good: list[Any] = []
    reported: set[int] = set()
    unnamed = 0
    for row, entry in enumerate(entries):
        if isinstance(entry, kind):
            good.append(entry)
            continue
        try:
            good.append(parse(entry))
        except MalformedRecord as error:
            question_id = entry.get("question_id") if isinstance(entry, dict) else None
            if str(question_id).isdecimal() and len(str(question_id)) < 20:
                reported.add(int(str(question_id)))
            else:
                unnamed += 1
            violations.add(error.kind, f"{path}: entry {row} (question_id {question_id}): {error}")
    return Entries(str(path), good, reported, unnamed)
