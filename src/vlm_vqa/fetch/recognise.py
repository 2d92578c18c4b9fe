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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlm_vqa.errors import UserError
from vlm_vqa.yaml_file import Unquoted

_MOST_BYTES = 2**20
_MOST_ENTRIES = 100
_MOST_FILES = 500_000
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
KINDS = {
    "a file of LLaVA's conversations": {"conversations"},
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
USUAL = {
    "image": ("image", "image_path", "image_file", "image_name", "file_name", "filename", "file_path", "img", "img_path",
              "img_name", "picture", "photo", "file"),
    "question": ("question", "query", "prompt", "conversations"),
    "answers": ("answers_original", "answers", "answer", "direct_answers", "label", "conversations"),
    "question_id": ("question_id", "questionid", "qid", "id"),
    "image_id": ("image_id", "id_image", "imageid", "img_id"),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
    "main_answer": ("multiple_choice_answer", "main_answer"),
}  # fmt: skip
"""The usual names of a table's columns by what they hold, in small letters; the earlier first."""
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
_TEST = "there is no other second split: choose nothing by its scores"
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
            lines = text.splitlines(keepends=True)[: -1 if cut else None] or [""]
            entries = csv.DictReader(lines, delimiter="\t" if ending == ".tsv" else max(",;\t|", key=lines[0].count))
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
            if text[at : at + 1] == "[" and isinstance(next(_items(text, at + 1), None), dict):
                return key, _items(text, at + 1)
            by_id += [
                {"question_id": key, **one} for one in itertools.islice(_items(text, at), 1) if isinstance(one, dict)
            ]
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
        raise UserError(
            f"{path}: there is no such file or folder, and a hub repository is named OWNER/NAME. Mend the path."
        )
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
        found.unsure["data.directory"] = (
            "DVC reads every file in it: move questions and pictures to a folder of their own"
        )
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
    asks, answers = (bool(keys & {*USUAL[role]}) for role in ("question", "answers"))
    if asks and answers:
        return {"table"}
    asks, answers = asks or one.envelope == "questions", answers or "multiple_choice_answer" in keys
    if {"question_id", "image_id"} <= keys and (asks or answers):
        return {"questions" if asks else "annotations"}
    return set()


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
    second = "test" if ("test", "annotations") in of and ("val", "annotations") not in of else "val"
    for split, there in (("train", "train"), ("val", second)):
        names = {role: of.get((there, role)) for role in ("questions", "annotations")}
        if None in names.values():
            raise UserError(
                f"{folder}: this is VQAv2's layout ({_shown(heads)}), but no file has "
                f"{' and '.join(role for role, name in names.items() if name is None)} of {split} by its name. Call them "
                "train_questions.json, train_annotations.json, val_questions.json and val_annotations.json; or write one "
                "table (csv or JSON lines) with image, question and answer, of which a share becomes val."
            )
        values = [one["image_id"] for name, head in heads.items() if name in names.values() for one in head.entries]
        images, pattern = _images(folder, files, values, split, unsure, f"data.{split}.images")
        data[split] = {role: str(name) for role, name in names.items()}
        data[split] |= {"images": images, "image_name": pattern or "{image_id}.jpg"}
        more = [name for name in heads if _split(name) == there and name not in names.values()]
        if more:
            unsure[f"data.{split}.questions"] = f"{_shown(more)} could be meant too"
    if second == "test":
        unsure["data.val.questions"] = _TEST
    return Found("VQAv2's layout", {"source": "directory"} | data, unsure)


def _table(folder: Path, files: list[PurePath], heads: dict[PurePath, Head]) -> Found:
    """Return the keys for a table, or one for each split."""
    unsure: dict[str, str] = {}
    of: dict[str | None, list[PurePath]] = {}
    for name in heads:
        of.setdefault(_split(name), []).append(name)
    train, val = of.get("train", []), of.get("val") or of.get("test", [])
    if len(heads) == 1:
        train, val = [*heads], []
    if len(train) != 1 or len(val) > 1:
        raise UserError(
            f"{folder}: it is not clear which of {_shown(heads)} are for training and which for validation. Name one file, "
            "or call two of them train and val with their endings."
        )
    if val and "val" not in of:
        unsure["data.table.val"] = _TEST
    if len(heads) > len(train + val):
        unsure["data.table.train"] = f"nothing is read from {_shown(name for name in heads if name not in train + val)}"
    columns = _columns(heads[train[0]].columns, unsure)
    images: Any = None
    pattern = None
    for split, name in zip(("train", "val"), train + val, strict=False):
        values = [one[columns["image"]] for one in heads[name].entries if one.get(columns["image"]) not in (None, "")]
        if values and isinstance(values[0], str | int):
            place, pattern = _images(folder, files, values, split, unsure, "data.table.images")
            images = place if images in (None, place) else _both(images, place)
    first, second = str(train[0]), str(val[0]) if val else None
    table = {"train": first, "val": second, "val_share": None if val else 0.2, "val_seed": 0}
    table |= {"images": images, "image_name": pattern, "columns": columns}
    return Found(heads[train[0]].kind, {"source": "table", "table": table}, unsure)


def _columns(names: list[str], unsure: dict[str, str]) -> dict[str, str | None]:
    """Return a table's columns by what they hold."""
    there = {name.strip().lower(): name for name in reversed(names)}
    found = {role: [there[name] for name in usual if name in there] for role, usual in USUAL.items()}
    for role in ("image", "question", "answers"):
        if len(found[role]) > 1:
            unsure[f"data.table.columns.{role}"] = f"{_shown(found[role][1:])} could be meant too"
    # Many data sets call their pictures by numbers alone.
    found["image"] = found["image"] or found["image_id"]
    return {role: one[0] if one else None for role, one in found.items()}


def _both(train: str | list[str], val: str | list[str]) -> str | list[str]:
    """Return where the pictures of both splits are; `{split}` stands for train or val."""
    named = train.replace("train", "{split}") if isinstance(train, str) else ""
    if isinstance(val, str) and named == val.replace("val", "{split}"):
        return named
    places = [*([train] if isinstance(train, str) else train), *([val] if isinstance(val, str) else val)]
    return "." if "." in places else list(dict.fromkeys(places))


def _images(
    folder: Path, files: list[PurePath], values: list[Any], split: str, unsure: dict[str, str], key: str
) -> tuple[str | list[str], str | None]:
    """Return the folders or archives in which pictures of these names or numbers lie, and the pattern of numbers' names."""
    inside = [(name, str(name.parts[0]) if len(name.parts) > 1 else ".") for name in files]
    for archive in (name for name in files if name.suffix.lower() == ".zip"):
        with suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(folder / archive) as file:
            inside += [(_path(member), str(archive)) for member in file.namelist()[:_MOST_FILES]]
    inside = [(name, place) for name, place in inside if name.suffix.lower() in PICTURES]
    wanted = {_stem(_path(value)) for value in values}
    hits: dict[str, set[str]] = {}
    for name, place in inside:
        if _stem(name) in wanted:
            hits.setdefault(place, set()).add(_stem(name))
    pattern = None
    if not hits and all(stem.isdecimal() for stem in wanted):
        numbered: dict[str, list[tuple[str, PurePath]]] = {}
        for name, place in inside:
            parts = re.fullmatch(r"([^{}]*?)(\d+)", name.stem)
            if parts and str(int(parts[2])) in wanted:
                width = f":0{len(parts[2])}d" if parts[2][0] == "0" < parts[2] else ""
                numbered.setdefault(f"{parts[1]}{{image_id{width}}}", []).append((place, name))
        for stem, names in sorted(numbered.items(), key=lambda one: len(one[1]))[-1:]:
            for place, name in names:
                hits.setdefault(place, set()).add(name.stem)
            pattern = stem + Counter(name.suffix for _, name in names).most_common(1)[0][0]
    lacking = len(wanted) - len(set().union(*hits.values()))
    if lacking:
        unsure[key] = f"of the first {len(wanted)} pictures {lacking} were not found by name"
    places = sorted(hits, key=lambda place: (len(hits[place]) < len(wanted), _split(PurePath(place)) != split))
    if places and (len(hits[places[0]]) >= len(wanted) or len(places) == 1):
        return places[0], pattern
    return places if any(place.endswith(".zip") for place in places) else ".", pattern


def _stem(name: PurePath) -> str:
    """Return a picture's name as it is looked for: case and ending do not count."""
    return (name.stem if name.suffix.lower() in PICTURES else name.name).lower()


def _path(name: Any) -> PurePath:
    return PurePath(str(name).replace("\\", "/"))


def _nothing(folder: Path, files: list[PurePath]) -> str:
    pictures = [name.name for name in files if name.suffix.lower() in PICTURES]
    if not pictures:
        return (
            f"{folder}: neither questions ({', '.join(TABLES)}) nor pictures are here. Name the folder that has them."
        )
    return (
        f"{folder}: {len(pictures)} pictures, but no questions. Write a table beside them, such as questions.csv:\n"
        f"image,question,answer\n{pictures[0]},What is it?,a cat"
    )


def _shown(names: Iterable[Any]) -> str:
    few = [str(name) for name in names]
    return ", ".join(few[:6]) + (f" and {len(few) - 6} more" if len(few) > 6 else "")


# --- in words -----------------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str | None:
    """Return what a file is that stands where VQAv2's layout is wanted, with the block that reads it; None if unknown."""
    one = head(path) if path.is_file() else Head([], "", True)
    if not one.entries or {"questions", "annotations"} & _roles(one):
        return None
    count = f"{len(one.entries)}" if one.whole else f"more than {len(one.entries)}"
    what = f"this is {one.kind} ({count} entries with {_shown(one.columns)})"
    if "table" not in _roles(one):
        return None if path.suffix.lower() == ".json" else f"{what}: set data.source: table and name data.table.columns"
    try:
        found = recognise(path)
    except UserError as error:
        return f"{what}: set data.source: table; {error}"
    return f"{what}: set\n{block({'directory': str(path.parent)} | found.data, found.unsure)}"


def block(data: Mapping[str, Any], unsure: Mapping[str, str]) -> str:
    """Return the text of a `data` section, with what is unsure marked."""
    return "\n".join(_lines({"data": data}, "", unsure))


def _lines(values: Mapping[str, Any], prefix: str, unsure: Mapping[str, str]) -> Iterator[str]:
    for name, value in values.items():
        mark = f"  # unsure: {unsure[prefix + name]}" if prefix + name in unsure else ""
        written = "" if isinstance(value, dict) else f" {_written(value)}"
        yield "  " * prefix.count(".") + f"{name}:{written}{mark}"
        if isinstance(value, dict):
            yield from _lines(value, f"{prefix}{name}.", unsure)


def _written(value: Any) -> str:
    if isinstance(value, Unquoted):
        return str(value)
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_/]([\w./{}:-]*[\w/}])?", value) and value.lower() not in _WORDS
    return value if plain else json.dumps(value, ensure_ascii=False)
