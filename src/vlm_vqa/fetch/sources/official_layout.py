"""Source `directory`: VQAv2's official file layout in a local folder. Every other source ends here too."""

import gzip
import json
import logging
import os
import zipfile
from collections.abc import Callable, Generator
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
    ViolationKind,
    Violations,
    parse_annotation,
    parse_question,
)
from vlm_vqa.fetch.sources.image_files import DAMAGE, ENCRYPTED
from vlm_vqa.fetch.sources.zip_archive import files, open_zip, shown
from vlm_vqa.files import MOST_BYTES, check_regular
from vlm_vqa.params import DataParams

log = logging.getLogger(__name__)

_GZIP_MAGIC = b"\x1f\x8b"
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class SplitPaths:
    """The files of one split in official layout."""

    split: str
    questions: Path
    annotations: Path
    images: tuple[Path, ...]
    """Folders of images, or zip archives of them."""
    names: ImageNames


@dataclass(frozen=True)
class Source:
    """Data in official layout, ready to be checked and stored."""

    name: str
    """The value of `data.source`."""
    origin: dict[str, Any]
    """What identifies the data beyond the files read (a package and its version, say); kept in the manifest."""
    splits: tuple[SplitPaths, ...]
    notes: tuple[str, ...] = ()
    """What was changed before the files were written; kept in the manifest."""


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
        images = tuple(folder / name for name in ([files.images] if isinstance(files.images, str) else files.images))
        texts = (folder / files.questions, folder / files.annotations)
        splits.append(SplitPaths(split, *texts, images, ImageNames(files.image_name)))
    return Source("directory", {}, tuple(splits))


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

    try:
        log.info("reading %s (%.0f MB)", path.name, path.stat().st_size / 1e6)
        with _open_text(path) as file:
            # A few MB can unpack to anything.
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise OSError(f"it unpacks to more than {MOST_BYTES:,} bytes")
        # One name for both: a split's annotations need not be held twice.
        text = text.decode("utf-8")
        content = json.loads(text, object_hook=compact)
    except FileNotFoundError:
        violations.add(ViolationKind.MISSING_FILE, f"{path}")
        return None
    # JSON's errors are ValueErrors too; nested a thousand deep it is a RecursionError.
    except (OSError, RecursionError, *DAMAGE) as error:
        violations.add(ViolationKind.BROKEN_FILE, f"{path}: not complete JSON ({error})")
        return None
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        violations.add(ViolationKind.BROKEN_FILE, f"{path}: without a list {key!r}")
        return None
    if not content[key]:
        violations.add(ViolationKind.BROKEN_FILE, f"{path}: the list {key!r} is empty")
        return None
    return _sort_out(path, content[key], kind, parse, violations)


@contextmanager
def _open_text(path: Path) -> Generator[IO[bytes] | gzip.GzipFile]:
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
    result = Entries(str(path), [], set())
    for row, entry in enumerate(entries):
        if isinstance(entry, kind):
            result.good.append(entry)
            continue
        try:
            result.good.append(parse(entry))
        except MalformedRecord as error:
            question_id = entry.get("question_id") if isinstance(entry, dict) else None
            if isinstance(question_id, int):
                result.reported.add(question_id)
            violations.add(error.kind, f"{path}: entry {row} (question_id {question_id}): {error}")
    return result
