"""What a file or folder of questions is, told from its head, and the `data` section of params.yaml that reads it.

No file is read beyond its first MB and its first entries, and no more than `_MOST_FILES` names of a folder are listed.
"""

import csv
import itertools
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlm_vqa.errors import UserError

_MOST_BYTES = 2**20
_MOST_ENTRIES = 100
_MOST_FILES = 500_000
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
KINDS = {
    "LLaVA conversations": {"conversations"},
    "an A-OKVQA file": {"direct_answers", "question"},
    "a VizWiz annotations file": {"image", "question", "answerable"},
    "a TextVQA file": {"flickr_300k_url", "question"},
    "an ST-VQA file": {"file_path", "question", "set_name"},
    "a DocVQA file": {"docId", "questionId", "question"},
    "a GQA file": {"imageId", "fullAnswer", "question"},
    "a VQA-RAD file": {"phrase_type", "image_name", "question"},
    "a SLAKE file": {"img_name", "q_lang", "question"},
    "a VQA-CP file": {"coco_split", "question_id"},
    "VQAv2's annotations": {"annotations", "question_id", "image_id"},
    "VQAv2's questions": {"questions", "question_id", "image_id", "question"},
}
"""Data sets by the keys of an entry that others lack; an envelope's key counts as one of them."""
_GAP = re.compile(r"[\s,:]*")


class Head(NamedTuple):
    """The beginning of a file of questions."""

    entries: list[dict[str, Any]]
    envelope: str
    """The key under which the entries stand in their file; empty where they are the file."""
    whole: bool
    """Whether these are all entries."""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(itertools.chain.from_iterable(self.entries)))

    @property
    def kind(self) -> str:
        """What it is, in words that follow "this is"."""
        keys = {*self.columns, self.envelope}
        return next((kind for kind, wanted in KINDS.items() if wanted <= keys), "a table")


def head(path: Path) -> Head:
    """Return the first entries of a csv, tsv, JSON, JSON lines or Parquet file; none where it is something else."""
    entries: Iterable[Any]
    envelope, ending = "", path.suffix.lower()
    try:
        if ending == ".parquet":
            with pq.ParquetFile(path) as file:
                entries = next(file.iter_batches(_MOST_ENTRIES), pa.record_batch({})).to_pylist()
                return Head(entries, "", file.metadata.num_rows <= len(entries))
        text, cut = _text(path)
        if ending in (".csv", ".tsv"):
            lines = text.splitlines()[: -1 if cut else None]
            entries = csv.DictReader(lines, dialect="excel-tab" if ending == ".tsv" else "excel")
        elif ending in (".jsonl", ".ndjson"):
            entries = _items(text, 0)
        else:
            envelope, entries = _json(text)
        found = [one for one in itertools.islice(entries, _MOST_ENTRIES + 1) if isinstance(one, dict)]
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException):
        return Head([], "", True)
    return Head(found[:_MOST_ENTRIES], envelope, not cut and len(found) <= _MOST_ENTRIES)


def _text(path: Path) -> tuple[str, bool]:
    """Return a file's first MB and whether there is more; as UTF-8 or, where it says so, as UTF-16."""
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return data[:_MOST_BYTES].decode(encoding, "ignore"), len(data) > _MOST_BYTES


def _json(text: str) -> tuple[str, Iterator[Any]]:
    """Return the entries of a JSON text, which may be cut: its list, its first list of objects, or its objects by id."""
    start = _GAP.match(text)
    assert start is not None
    place = start.end()
    if text[place : place + 1] == "[":
        return "", _items(text, place + 1)
    by_id = []
    with suppress(ValueError):
        for key, at in _keys(text, place + 1):
            if text[at] == "[" and isinstance(next(_items(text, at + 1), None), dict):
                return key, _items(text, at + 1)
            by_id += [{"id": key, **one} for one in itertools.islice(_items(text, at), 1) if isinstance(one, dict)]
    return "", iter([one for one in by_id if "question" in one])


def _keys(text: str, place: int) -> Iterator[tuple[str, int]]:
    """Yield the keys of a JSON object and where their values begin."""
    decode = json.JSONDecoder().raw_decode
    while text[(place := _GAP.match(text, place).end()) : place + 1] == '"':  # ty: ignore[unresolved-attribute]
        key, place = decode(text, place)
        place = _GAP.match(text, place).end()  # ty: ignore[unresolved-attribute]
        yield key, place
        _, place = decode(text, place)


def _items(text: str, place: int) -> Iterator[Any]:
    """Yield JSON values one after the other, up to what is none."""
    with suppress(ValueError):
        while True:
            one, place = json.JSONDecoder().raw_decode(text, _GAP.match(text, place).end())  # ty: ignore[unresolved-attribute]
            yield one


# --- a folder -----------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What was recognised."""

    what: str
    data: dict[str, Any]
    """Keys of the `data` section that read it; the others stay as they are."""
    unsure: dict[str, str]
    """Why a key's value may be wrong, by its full name."""


def recognise(path: Path) -> Found:
    """Tell what a file of questions is, or a folder with one, and how it is read.

    Raises:
        UserError: there is nothing to read, or it is not clear which files are meant; it says what to do.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder, and a hub repository is named OWNER/NAME. Mend the path.")
    if path.is_file() and path.suffix.lower() not in TABLES:
        raise UserError(f"{path}: is none of {', '.join(TABLES)}. Unpack it if it is an archive, and name the folder.")
    folder = path if path.is_dir() else path.parent
    files = _files(folder)
    heads = {name: found for name in files if name.suffix.lower() in TABLES and (found := head(folder / name)).entries}
    asked = {name: one for name, one in heads.items() if {"questions", "annotations"} & _roles(one)}
    tables = {name: one for name, one in heads.items() if "table" in _roles(one)}
    if path.is_file():
        mine = path.relative_to(folder)
        if mine not in tables:
            asked = {}
        alike = {} if _split(mine) is None else {n: h for n, h in tables.items() if _split(n) != _split(mine)}
        tables = {mine: head(path)} | {name: one for name, one in alike.items() if one.columns == head(path).columns}
    if asked and not tables:
        found = _official(folder, files, asked)
    elif tables:
        found = _table(folder, files, tables)
    else:
        raise UserError(_nothing(folder, files))
    if sum(name.suffix.lower() not in (*TABLES, *PICTURES, ".zip") for name in files) > len(files) / 2:
        found.unsure["data.directory"] = "DVC reads every file in it: move questions and pictures to a folder of their own"
    return found


def _files(folder: Path) -> list[PurePath]:
    """Return the files below a folder, relative to it, hidden ones left out."""
    found: list[PurePath] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        inside = PurePath(os.path.relpath(place, folder))
        found += [inside / name for name in sorted(names) if not name.startswith(".")]
        if len(found) > _MOST_FILES:
            break
    return found[:_MOST_FILES]


def _roles(one: Head) -> set[str]:
    """Return what a file can be of: VQAv2's questions or annotations, or a table of questions and answers."""
    keys = {name.lower() for name in one.columns}
    asks, answers = bool(keys & QUESTION), bool(keys & ANSWERS)
    if asks and answers:
        return {"table"}
    if {"question_id", "image_id"} <= keys and (asks or answers):
        return {"questions" if asks else "annotations"}
    return {"conversations"} & keys


def _split(name: PurePath) -> str | None:
    """Return train, val or test where a file's name says so, or the nearest folder's."""
    for part in (name.stem, *(folder.name for folder in name.parents)):
        if found := re.search(r"(?<![a-z])(train|val|dev|minival|test)(?:ing|id|idation|dev)?(?![a-z])", part.lower()):
            return {"train": "train", "test": "test"}.get(found[1], "val")
    return None


def _official(folder: Path, files: list[PurePath], heads: dict[PurePath, Head]) -> Found:
    """Return the keys for VQAv2's layout."""
    unsure, data = {}, {}
    of = {(_split(name), *_roles(one)): name for name, one in reversed(heads.items())}
    second = "val" if ("val", "annotations") in of else "test"
    for split, there in (("train", "train"), ("val", second)):
        names = {role: of.get((there, role)) for role in ("questions", "annotations")}
        if None in names.values():
            lacks = " and ".join(role for role, name in names.items() if name is None)
            raise UserError(
                f"{folder}: this is VQAv2's layout ({_shown(heads)}), but no file has {lacks} of {split} by its name. Call "
                "them train_questions.json, train_annotations.json, val_questions.json and val_annotations.json; or write "
                "one table (csv or JSON lines) with image, question and answers, of which a share becomes val."
            )
        values = [one["image_id"] for name in names.values() for one in heads[name].entries if "image_id" in one]  # ty: ignore[invalid-argument-type] - none is None
        images, pattern = _images(folder, files, values, f"data.{split}.images", unsure)
        if pattern is None:
            pattern = "{image_id}.jpg"
            unsure[f"data.{split}.image_name"] = "no picture has a number of the questions in its name"
        data[split] = {role: str(name) for role, name in names.items()} | {"images": images or ".", "image_name": pattern}
        if len([name for name in heads if _split(name) == there]) > 2:
            unsure[f"data.{split}.questions"] = f"there are more files for it: {_shown(n for n in heads if _split(n) == there)}"
    if second == "test":
        unsure["data.val.questions"] = "there is no other second split: choose nothing by its scores"
    return Found("VQAv2's layout", {"source": "directory", "table": None} | data, unsure)


def _table(folder: Path, files: list[PurePath], heads: dict[PurePath, Head]) -> Found:
    """Return the keys for a table, or one for each split."""
    unsure: dict[str, str] = {}
    of: dict[str | None, list[PurePath]] = {}
    for name in heads:
        of.setdefault(_split(name), []).append(name)
    if len(heads) == 1:
        of = {"train": [*heads]}
    train, val = of.get("train", []), of.get("val") or of.get("test", [])
    if len(train) != 1 or len(val) > 1:
        raise UserError(
            f"{folder}: it is not clear which of {_shown(heads)} are for training and which for validation. Name one file, or"
            " call them train and val with their endings."
        )
    first = heads[train[0]]
    if val and "val" not in of:
        unsure["data.table.val"] = "there is no other second split: choose nothing by its scores"
    if None in of and len(heads) > 1:
        unsure["data.table.train"] = f"{_shown(of[None])} are read by nothing"
    columns = find_columns(first.columns)
    column = columns["image"]
    values = [one[column] for name in (*train, *val) for one in heads[name].entries if one.get(column) not in (None, "")]
    images, pattern = _images(folder, files, values, "data.table.images", unsure)
    table = {
        "train": str(train[0]),
        "val": str(val[0]) if val else None,
        "val_share": None if val else 0.2,
        "val_seed": 0,
        "images": images,
        "image_name": pattern,
        "columns": columns,
    }
    return Found(first.kind, {"source": "table", "table": table}, unsure)


def _images(
    folder: Path, files: list[PurePath], values: list[Any], key: str, unsure: dict[str, str]
) -> tuple[str | None, str | None]:
    """Return the folder or archive in which pictures of these names or numbers lie, and the pattern of numbers' names."""
    if not values or isinstance(values[0], dict | bytes):
        return None, None
    pictures = [name for name in files if name.suffix.lower() in PICTURES]
    archives = {name: _members(folder / name) for name in files if name.suffix.lower() == ".zip"}
    inside = [(name, str(name.parts[0]) if len(name.parts) > 1 else ".") for name in pictures]
    inside += [(member, str(archive)) for archive, members in archives.items() for member in members]
    wanted = {PurePath(str(value).replace("\\", "/")).name.lower() for value in values}
    hits = [place for name, place in inside if {name.name.lower(), name.stem.lower()} & wanted]
    pattern = None
    if not hits and all(text.isdigit() for text in wanted):
        hits, pattern = _numbered(inside, {int(text) for text in wanted})
    if not hits:
        unsure[key] = f"no picture below {folder} is called like {min(wanted)}"
    elif len(hits) < len(wanted):
        unsure[key] = f"of the first {len(wanted)} pictures {len(wanted) - len(hits)} were not found by name"
    places = sorted(set(hits))
    return places[0] if len(places) == 1 else ".", pattern


def _numbered(inside: list[tuple[PurePath, str]], wanted: set[int]) -> tuple[list[str], str | None]:
    """Return where the pictures with these numbers lie, and the names' pattern that most of them share."""
    found: dict[str, list[str]] = {}
    for name, place in inside:
        parts = re.fullmatch(r"([^{}]*?)(\d+)", name.stem)
        if parts and int(parts[2]) in wanted:
            width = f":0{len(parts[2])}d" if parts[2].startswith("0") and parts[2] != "0" else ""
            found.setdefault(f"{parts[1]}{{image_id{width}}}{name.suffix}", []).append(place)
    pattern = max(found, key=lambda one: len(found[one]), default=None)
    return found.get(pattern, []), pattern  # ty: ignore[no-matching-overload]


def _members(archive: Path) -> list[PurePath]:
    with suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(archive) as file:
        return [PurePath(name) for name in file.namelist()[:_MOST_FILES] if name.lower().endswith(PICTURES)]
    return []


def _nothing(folder: Path, files: list[PurePath]) -> str:
    pictures = [name.name for name in files if name.suffix.lower() in PICTURES]
    if not pictures:
        return f"{folder}: neither questions ({', '.join(TABLES)}) nor pictures are here. Name the folder that has them."
    return (
        f"{folder}: {len(pictures)} pictures, but no questions. Write a table beside them, such as questions.csv:\n"
        f"image,question,answer\n{pictures[0]},What is it?,a cat"
    )


def _shown(names: Iterable[Any]) -> str:
    few = [str(name) for name in names]
    return ", ".join(few[:6]) + (f" and {len(few) - 6} more" if len(few) > 6 else "")
