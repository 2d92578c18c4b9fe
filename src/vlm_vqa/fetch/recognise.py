"""What a file or folder of questions is, told from its head, and the `data` section of params.yaml that reads it.

No file is read beyond its first MB and its first entries, and no more than `_MOST_FILES` names are listed.
"""

import csv
import json
import os
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlm_vqa.errors import UserError
from vlm_vqa.yaml_file import Unquoted

USUAL = {
    "image": ("image", "image_path", "image_file", "image_name", "file_name", "filename", "file_path", "img", "img_path",
              "img_name", "picture", "photo"),
    "question": ("question", "query", "prompt", "conversations"),
    "answers": ("answers_original", "answers", "answer", "direct_answers", "label", "conversations"),
    "question_id": ("question_id", "questionid", "qid", "id"),
    "image_id": ("image_id", "id_image", "imageid", "img_id"),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
    "main_answer": ("multiple_choice_answer", "main_answer"),
}  # fmt: skip
"""The usual names of a table's columns by what they hold, in small letters; the earlier first."""
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
PICTURES = tuple(".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .heic .heif .avif .mpo".split())
"""Endings of pictures: what else lies beside them under their names, a text say, is not meant."""
_KINDS = {
    "a file of LLaVA's conversations": {"conversations"},
    "an A-OKVQA file": {"direct_answers"},
    "a VizWiz annotations file": {"image", "answerable"},
    "a TextVQA file": {"flickr_300k_url"},
    "an ST-VQA file": {"file_path", "set_name"},
    "a DocVQA file": {"docId", "questionId"},
    "a GQA file": {"imageId", "fullAnswer"},
    "a VQA-RAD file": {"phrase_type", "image_name"},
    "a SLAKE file": {"img_name", "q_lang"},
}
"""Published data sets by keys of an entry that others lack."""
_MOST_BYTES, _MOST_ENTRIES, _MOST_FILES = 2**20, 100, 500_000
_TEST = "there is no other second split: choose nothing by its scores"
_LIST = re.compile(r"\[\s*(?=\{)")
_BY_ID = re.compile(r'[\s,{]*"([^"]*)"\s*:\s*(?=\{)')
_SPLIT = re.compile(r"(?<![a-z])(train|val|dev|minival|test)(?:ing|id|idation|dev)?(?![a-z])")
_PLAIN = re.compile(r"(?!(?:null|true|false|yes|no|on|off|y|n)$)[A-Za-z_/]([\w./{}:-]*[\w/}])?", re.IGNORECASE)


Head = list[dict[str, Any]]  # the first entries of a file; none where it is no table and nothing like one


def _names(one: Head) -> list[str]:
    return list(dict.fromkeys(name for entry in one for name in entry))


def _kind(one: Head) -> str:
    """Return what it is, in words that follow "this is"."""
    return next((kind for kind, wanted in _KINDS.items() if wanted <= {*_names(one)}), "a table")


def _role(one: Head) -> str | None:
    """Tell a table of questions and answers from VQAv2's questions or annotations alone."""
    keys = {name.strip().lower() for name in _names(one)}
    asks, answers = (bool(keys & {*USUAL[role]}) for role in ("question", "answers"))
    if asks and answers:
        return "table"
    official = {"question_id", "image_id"} <= keys
    return "questions" if official and asks else "annotations" if official and answers else None


def written_as(ending: str, first: str, second: str) -> str:
    """Return how a table's text is written, from its first two lines: csv's delimiter, else `lines` of JSON or `whole`."""
    if ending in (".csv", ".tsv"):
        return "\t" if ending == ".tsv" else max(",;\t|", key=first.count)
    with suppress(ValueError, RecursionError):
        # Many a .json holds JSON lines.
        if ending == ".json" and second.lstrip().startswith("{") and isinstance(json.loads(first), dict):
            return "lines"
    return "whole" if ending == ".json" else "lines"


def head(path: Path) -> Head:
    """Return the head of a csv, tsv, JSON, JSON lines or Parquet file."""
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            with pq.ParquetFile(path) as parquet:
                return next(parquet.iter_batches(_MOST_ENTRIES)).to_pylist()
        if ending == ".arrow":
            with pa.ipc.open_stream(pa.OSFile(str(path))) as stream:
                rows = next(iter(stream)).slice(0, _MOST_ENTRIES)
                # Damaged offsets would lead out of the file.
                rows.validate(full=True)
                return rows.to_pylist()
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES)
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "ignore")
        # The last line may be cut.
        lines = text.splitlines(keepends=True)[: -1 if len(data) == _MOST_BYTES else None]
        kind = written_as(ending, *[*lines, "", ""][:2])
        if kind == "whole":
            return _json(text)
        rows = map(json.loads, lines) if kind == "lines" else csv.DictReader(lines, delimiter=kind, restkey="")
        return [row for row in islice(rows, _MOST_ENTRIES) if isinstance(row, dict)]
    except (OSError, ValueError, RecursionError, StopIteration, csv.Error, pa.ArrowException):
        return []


def _json(text: str) -> Head:
    """Return the head of a JSON text, which may be cut: of its list, of its first list of objects, or of objects by id."""
    decode = json.JSONDecoder().raw_decode
    found: list[dict[str, Any]] = []
    by_id = _BY_ID.match(text)
    if by_id and "question" not in decode(text, by_id.end())[0]:
        by_id = None
    start = by_id or _LIST.search(text)
    place = start.end() if start else len(text)
    with suppress(ValueError):
        while len(found) < _MOST_ENTRIES:
            one, place = decode(text, place)
            found.append({"question_id": by_id[1], **one} if by_id else one)
            by_id = by_id and _BY_ID.match(text, place)
            place = by_id.end() if by_id else len(text) - len(text[place:].lstrip(", \r\n\t"))
    return [one for one in found if isinstance(one, dict)]


class Found(NamedTuple):
    what: str
    data: dict[str, Any]  # keys of the `data` section that read it; the others stay as they are
    unsure: dict[str, str]  # why a key's value may be wrong, by its full name


def recognise(path: Path) -> Found:
    """Tell what a file or folder of questions is, and how it is read; UserError if it is not clear which files are meant."""
    if not path.exists():
        mend = "Mend the path; a hub repository is named OWNER/NAME."
        raise UserError(f"{path}: there is no such file or folder. {mend}")
    folder = path if path.is_dir() else path.parent
    files: list[PurePath] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        inside = PurePath(os.path.relpath(place, folder))
        files += (inside / name for name in sorted(names) if not name.startswith("."))
        if len(files) > _MOST_FILES:
            break
    heads = {name: head(folder / name) for name in files if name.suffix.lower() in TABLES}
    official = {name: one for name, one in heads.items() if _role(one) in ("questions", "annotations")}
    tables = {name: one for name, one in heads.items() if _role(one) == "table"}
    # A folder as `datasets` writes it, one split in many files.
    for place in {name.parent for name in tables if path.is_dir() and re.search(r"-\d{5}-of-\d{5}$", name.stem)}:
        parts = [name for name in tables if name.parent == place]
        if len({*map(_split, parts)}) == 1:
            tables[place] = [tables.pop(name) for name in parts][0]
    if path.is_file():
        mine, official = PurePath(path.name), {}
        others = [name for name in tables if {_split(mine), _split(name)} > {"train"}]
        tables = {name: tables[name] for name in (mine, *others) if name in tables}
    if tables:
        return _table(folder, files, tables)
    if official:
        return _official(folder, files, official)
    pictures = [name.name for name in files if name.suffix.lower() in PICTURES]
    example = f"image,question,answer\n{[*pictures, 'a.jpg'][0]},What is it?,cup"
    others = (f" {name} has the columns {', '.join(_names(one))}." for name, one in heads.items() if _names(one))
    raise UserError(
        f"{path}: no questions with answers in {', '.join(TABLES)}, and {len(pictures)} pictures.{next(others, '')} Unpack "
        f"archives, and write a table beside the pictures, such as questions.csv:\n{example}"
    )


def _split(name: PurePath) -> str | None:
    """Return train, val or test where a file's name says so, or the nearest folder's."""
    for part in (name.stem, *(folder.name for folder in name.parents)):
        if found := _SPLIT.search(part.lower()):
            return found[1] if found[1] in ("train", "test") else "val"
    return None


def _official(folder: Path, files: list[PurePath], heads: dict[PurePath, Head]) -> Found:
    """Return the keys for VQAv2's layout."""
    unsure, data = {}, {}
    of = {(_split(name), _role(one)): name for name, one in reversed(heads.items())}
    second = "test" if ("test", "annotations") in of and ("val", "annotations") not in of else "val"
    for split, there in (("train", "train"), ("val", second)):
        names = {role: of.get((there, role)) for role in ("questions", "annotations")}
        lacking = [role for role, name in names.items() if name is None]
        if lacking:
            raise UserError(
                f"{folder}: this is VQAv2's layout ({shown(heads)}), but no file has {' and '.join(lacking)} of {split} by "
                "its name. Call them train_questions.json, train_annotations.json, val_questions.json and "
                "val_annotations.json; or write one table with image, question and answer, of which a share becomes val."
            )
        values = [one.get("image_id", "") for name in names.values() if name for one in heads[name]]
        images, pattern = _images(folder, files, values, split, unsure, f"data.{split}.images")
        if "coco_split" in _names(heads[of[there, "questions"]]):
            # VQA-CP's pictures of each split lie in both folders of COCO's.
            images, _ = ".", unsure.pop(f"data.{split}.images", None)
        data[split] = {role: str(name) for role, name in names.items()}
        data[split] |= {"images": images, "image_name": pattern or "{image_id}.jpg"}
        if more := [name for name in heads if _split(name) == there and name not in names.values()]:
            unsure[f"data.{split}.questions"] = f"{shown(more)} could be meant too"
    if second == "test":
        unsure["data.val.questions"] = _TEST
    return Found("VQAv2's layout", {"source": "directory"} | data, unsure)


def _table(folder: Path, files: list[PurePath], heads: dict[PurePath, Head]) -> Found:
    """Return the keys for a table, or one for each split."""
    unsure: dict[str, str] = {}
    names = {split: [name for name in heads if _split(name) == split] for split in ("train", "val", "test")}
    train, val = names["train"], names["val"] or names["test"]
    if len(heads) == 1:
        train, val = [*heads], []
    if len(train) != 1 or len(val) > 1:
        mend = "Name one file, or call two of them train and val with their endings."
        raise UserError(f"{folder}: it is not clear which of {shown(heads)} are for training or validation. {mend}")
    if val and not names["val"]:
        unsure["data.table.val"] = _TEST
    if rest := [name for name in heads if name not in train + val]:
        unsure["data.table.train"] = f"nothing is read from {shown(rest)}"
    there = {name.strip().lower(): name for name in reversed(_names(heads[train[0]]))}
    found = {role: [there[name] for name in usual if name in there] for role, usual in USUAL.items()}
    for role in ("image", "question", "answers"):
        if len(found[role]) > 1:
            unsure[f"data.table.columns.{role}"] = f"{shown(found[role][1:])} could be meant too"
    # Many data sets call their pictures by numbers alone.
    found["image"] = found["image"] or found["image_id"]
    columns = {role: one[0] if one else None for role, one in found.items()}
    image, places, pattern = columns["image"], [], None
    for split, name in zip(("train", "val"), train + val, strict=False):
        values = [one[image] for one in heads[name] if image and one.get(image) not in (None, "")]
        if values and isinstance(values[0], str | int):
            place, pattern = _images(folder, files, values, split, unsure, "data.table.images")
            places.append(place)
    first, second = (str(name[0]) if name else None for name in (train, val))
    table: dict[str, Any] = {"train": first, "val": second, "val_share": None if val else 0.2, "val_seed": 0}
    # `{split}` stands for train or val; of two other places the folder with both is looked through.
    images = places[0] if len(set(places)) == 1 else None
    if len(set(places)) == 2:
        named = places[0].replace("train", "{split}")
        images = named if named == places[1].replace("val", "{split}") else "." if "." in places else places
    table |= {"images": images, "image_name": pattern, "columns": columns}
    return Found(_kind(heads[train[0]]), {"source": "table", "table": table}, unsure)


def _images(
    folder: Path, files: list[PurePath], values: list[Any], split: str, unsure: dict[str, str], key: str
) -> tuple[str, str | None]:
    """Return the folder or archive in which pictures of these names or numbers lie, and the pattern of numbers' names."""
    inside = [(name, name.parts[0] if len(name.parts) > 1 else ".") for name in files]
    for archive in (name for name in files if name.suffix.lower() == ".zip"):
        with suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(folder / archive) as file:
            inside += [(PurePath(member), str(archive)) for member in file.namelist()[:_MOST_FILES]]
    wanted = {_stem(value) for value in values}
    by_pattern: defaultdict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for name, place in inside:
        stem, pattern = _stem(name), ""
        if stem not in wanted and (parts := re.fullmatch(r"(.*[/\\])?([^{}]*?)0*(\d+)", str(name.with_suffix("")))):
            digits, stem = len(_stem(name)) - len(parts[2]), parts[3]
            pattern = f"{parts[2]}{{image_id{f':0{digits}d' if digits > len(stem) else ''}}}"
        if stem in wanted and name.suffix.lower() in PICTURES:
            by_pattern[pattern].append((place, stem, name.suffix))
    of_split = Counter(name for name, hits in by_pattern.items() for hit in hits if _split(PurePath(hit[0])) == split)
    pattern = max(by_pattern, key=lambda one: (one == "", len(by_pattern[one]), of_split[one]), default="")
    hits = by_pattern.get(pattern, [])
    if lacking := len(wanted - {stem for _, stem, _ in hits}):
        unsure[key] = f"of the first {len(wanted)} pictures {lacking} were not found by name"
    count = Counter(place for place, _ in {hit[:2] for hit in hits})
    best = max(count, key=lambda place: (count[place], _split(PurePath(place)) == split), default=".")
    ending = Counter(hit[2] for hit in hits).most_common(1)[0][0] if pattern else ""
    return best if len(count) < 2 or count[best] == len(wanted) else ".", pattern + ending or None


def _stem(name: Any) -> str:
    """Return a picture's name as it is looked for: case and ending do not count, nor whose slashes they are."""
    path = PurePath(str(name).replace("\\", "/").lower())
    return path.stem if path.suffix in PICTURES else path.name


def shown(names: Iterable[Any]) -> str:
    """Return the first few names, and how many more there are."""
    few = [str(name) for name in names]
    return ", ".join(few[:6]) + (f" and {len(few) - 6} more" if len(few) > 6 else "")


def refusal(path: Path) -> str | None:
    """Return what a file is that stands where VQAv2's layout is wanted, with the block that reads it; None if unknown."""
    one = head(path) if path.is_file() else []
    more = len(one) == _MOST_ENTRIES or path.stat().st_size > _MOST_BYTES if one else False
    what = f"this is {_kind(one)} ({len(one)}{' or more' * more} entries with {shown(_names(one))})"
    if _role(one) == "table":
        try:
            found = recognise(path)
        except UserError as error:
            return f"{what}: set data.source: table. {error}"
        return f"{what}: set\n{block({'directory': str(path.parent)} | found.data, found.unsure)}"
    known = one and _role(one) is None and path.suffix.lower() != ".json"
    return f"{what}: set data.source: table, and name its columns under data.table.columns" if known else None


def block(data: Mapping[str, Any], unsure: Mapping[str, str]) -> str:
    """Return the text of a `data` section, with what is unsure marked."""
    return "data:\n" + "\n".join(_lines(data, "data.", unsure))


def _lines(values: Mapping[str, Any], prefix: str, unsure: Mapping[str, str]) -> Iterator[str]:
    for name, value in values.items():
        key, plain = prefix + name, isinstance(value, Unquoted) or isinstance(value, str) and _PLAIN.fullmatch(value)
        written = "" if isinstance(value, dict) else f" {value if plain else json.dumps(value, ensure_ascii=False)}"
        yield "  " * prefix.count(".") + f"{name}:{written}" + (f"  # unsure: {unsure[key]}" if key in unsure else "")
        if isinstance(value, dict):
            yield from _lines(value, f"{key}.", unsure)
