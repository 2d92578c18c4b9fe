"""Source `table`: questions in csv, tsv, JSON lines, JSON or Parquet, each row with its picture's name and its answers.

A table is read row by row: anew from the first id that is no whole number, and once more where a share of its pictures is
drawn. Texts are read by Python's own csv and json, for other readers take `NA` for nothing, `01` for a number and
`2020-01-02` for a date; Parquet by `datasets`.
"""

import ast
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from tqdm import tqdm

from vlm_vqa.data.records import SPLITS
from vlm_vqa.errors import UserError
from vlm_vqa.fetch import contract
from vlm_vqa.fetch.contract import MalformedRecord, ReadAgain, Row, Source, Split, ViolationKind, Violations
from vlm_vqa.fetch.recognise import USUAL, refusal, written_as
from vlm_vqa.fetch.sources.image_files import ImageFiles, MissingImage
from vlm_vqa.fetch.sources.official_layout import READ_ERRORS, folder_of, open_bytes, places, read_json, unreadable
from vlm_vqa.files import MOST_BYTES, check_regular
from vlm_vqa.hashing import sha256_bytes
from vlm_vqa.params import Columns, DataParams, TableParams

_TEXTS = ("image", "question_id", "image_id", "question_type", "answer_type", "main_answer")
_ROLES = ("question", "answers", *_TEXTS)
_FIRST = ("question_id", "image_id")  # where several names are there, the first one holds
_LOOK = 100  # rows of JSON that are asked for the names of their columns
_PARQUET = {"path": "parquet", "batch_size": 100}  # rows that are decoded together are, with their images, some 20 MB
_FILE_NAME = re.compile(r"\w[\w .()+,=-]{0,120}")  # that means the same everywhere
_WHOLE = re.compile("0|[1-9][0-9]{,18}")
_Raw = dict[str, Any] | MalformedRecord
_Paths = Mapping[str, list[Path]]  # by split


def table_source(data: DataParams, spilled: Path) -> Source:
    """Return the tables that `data.table` names, or raise `UserError` as `folder_of`; their pictures go into `spilled`."""
    table, folder = data.table, folder_of(data)
    assert isinstance(table, TableParams), "load_params asks for it"
    files = {split: folder / (getattr(table, split) or table.train) for split in SPLITS}
    written = [table.images] if isinstance(table.images, str) else table.images or ["."]
    images = {split: places(folder, [name.replace("{split}", split) for name in written]) for split in SPLITS}
    endings = (".parquet", ".arrow", ".jsonl")
    parts = {
        split: sorted(path for path in file.rglob("*") if path.suffix in endings) if file.is_dir() else [file]
        for split, file in files.items()
    }
    reader = Tables(parts, {split: str(file) for split, file in files.items()}, table, images, spilled)
    splits = []
    for split, file in files.items():
        inputs = {path.name if file.is_dir() else "table": path for path in parts[split] if path.is_file()}
        splits.append(Split(split, str(file), images[split], functools.partial(reader.rows, split), inputs))
    origin = {} if table.val_share is None else {"val_share": table.val_share, "val_seed": table.val_seed}
    return Source("table", origin, tuple(splits))


class Tables:
    """Both splits of a table, and what is known of all their rows."""

    def __init__(self, files: _Paths, called: Mapping[str, str], table: TableParams, images: _Paths, spilled: Path):
        """Take the files by split, the same for both where a share of train's images is val; what messages call them; where
        the pictures are; and the folder for pictures that stand in rows, which becomes the place of that split's."""
        self.files, self.called, self.table, self.images, self.spilled = files, called, table, images, spilled
        # SHA-256 and name of what is spilled, by its name in small letters.
        self._written: dict[str, tuple[str, str]] = {}
        self._whole = dict.fromkeys(_FIRST, True)  # whether all ids are whole numbers as they stand
        self._val_images: set[str] | None = None
        self._few = ""  # what is wrong where there are too few images for a share
        self._questions: dict[int, str] = {}  # the split of each question id
        self._places: dict[int, tuple[str, str]] = {}  # the first split and the picture of each image id

    def rows(self, split: str, violations: Violations) -> Iterator[Row]:
        """Yield a split's questions, train's before val's; raise `ReadAgain` at the first id that is no whole number."""
        if self.table.val_share is not None and self._val_images is None:
            self._draw(self.table.val_share)
        if self._few and split == "train":
            violations.add(ViolationKind.FEW_IMAGES, self._few)
        columns, rows = self._open(split, violations)
        for number, row in enumerate(rows, 1):
            where = f"{self.called[split]}: row {number}"
            try:
                if isinstance(row, MalformedRecord):
                    raise row
                if self._val_images is None or (self._image(row, columns) in self._val_images) == (split == "val"):
                    yield from self._records(row, columns, split, where)
            except MalformedRecord as error:
                # A row that cannot be read has no picture by which it belongs to val.
                if isinstance(row, dict) or self._val_images is None or split == "train":
                    violations.add(error.kind, f"{where}: {error}")

    def _open(self, split: str, violations: Violations) -> tuple[dict[str, str], Iterable[_Raw]]:
        """Return a table's columns by what they hold, and its rows; none, and a violation, where it is no table."""
        before, files, called = len(violations), self.files[split], self.called[split]
        rows = read_rows(files, violations)
        first = list(islice(rows, _LOOK))
        there, columns = dict.fromkeys(name for row in first if isinstance(row, dict) for name in row), {}
        if first and not there:
            violations.add(ViolationKind.FOREIGN_FILE, f"{called}: {refusal(files[0]) or f'row 1: {first[0]}'}")
        elif there:
            columns = find_columns(called, list(there), self.table.columns or Columns(), violations)
        elif len(violations) == before:
            violations.add(ViolationKind.EMPTY_FILE, f"{called}: no rows")
        if not columns:
            return columns, ()
        rows = chain(first, rows)
        return columns, rows if self.table.images else self._spill(rows, columns["image"], split)

    def _spill(self, rows: Iterable[_Raw], column: str, split: str) -> Iterator[_Raw]:
        """Yield rows; pictures that stand in them as bytes are written out, and their files' names stand there instead."""
        for row in rows:
            cell = row.get(column) if isinstance(row, dict) else None
            data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
            if isinstance(row, dict) and isinstance(data, bytes):
                self.images[split][:] = [self.spilled]
                sha256, name = sha256_bytes(data), PurePosixPath(path or "").name
                if not _FILE_NAME.fullmatch(name) or self._written.get(name.lower(), [sha256])[0] != sha256:
                    name = sha256[:32]
                if name.lower() not in self._written:
                    self.spilled.mkdir(parents=True, exist_ok=True)
                    (self.spilled / name).write_bytes(data)
                row[column] = self._written.setdefault(name.lower(), (sha256, name))[1]
            yield row

    def _draw(self, share: float) -> None:
        """Draw val's pictures: equal files go to one split, under whatever names. What is wrong is said on reading them."""
        columns, rows = self._open("train", Violations())
        images = {
            self._image(row, columns): self._image(row, {"image": columns["image"]})
            for row in rows
            if isinstance(row, dict)
        }
        images.pop("", None)
        contents: dict[str, str] = {}
        with contextlib.suppress(UserError, OSError, zipfile.BadZipFile), ImageFiles(self.images["train"]) as files:
            for image, name in tqdm(images.items(), "pictures to share out", unit="picture"):
                with contextlib.suppress(MissingImage, UserError, OSError):
                    contents[image] = sha256_bytes(files.read(self._file(name) or name, MOST_BYTES))
        equal: defaultdict[str, list[str]] = defaultdict(list)
        for image in images:
            # What cannot be read stands for itself.
            equal[contents.get(image, image)].append(image)
        count = max(2, round(share * len(equal)))
        if 0 < len(equal) <= count:
            self._few = f"{self.called['train']}: {len(equal)} images, of which {count} would be val"
        drawn = sorted(equal, key=lambda content: hashlib.sha256(f"{self.table.val_seed}:{content}".encode()).digest())
        self._val_images = {image for content in drawn[:count] for image in equal[content]}

    def _image(self, row: dict[str, Any], columns: dict[str, str]) -> str:
        """Return what tells a row's picture from others: its id, else its name; blank where it has none."""
        value = row.get(columns.get("image_id") or columns["image"])
        value = value.get("path") if isinstance(value, dict) else value
        return str(value).strip() if isinstance(value, str | int) else ""

    def _records(self, row: dict[str, Any], columns: dict[str, str], split: str, where: str) -> Iterator[Row]:
        """Yield the records of a row: one, or one for each turn of a conversation."""
        question, answers, *others = [row.get(columns.get(role)) for role in _ROLES]
        image, called, given, *kinds, main = map(_text, others, _TEXTS)
        kinds = [kind.strip() for kind in kinds]
        said = []
        for asked, told in _turns(question) if columns["question"] == columns["answers"] else [(question, answers)]:
            text = contract.as_question(_text(asked, "question"))
            said.append((text, contract.answered(text, read_cell(told), kinds, main)))
        image_id, original, name = self._picture(image.strip(), given.strip(), split)
        for place, (text, record) in enumerate(said):
            given = f"{called.strip()}#{place}" if place and called.strip() else called.strip()
            question_id, original_id = self._question_id(given, split, f"{image_id}\n{text}")
            ids = {"question_id": question_id, "image_id": image_id, "original_question_id": original_id}
            yield Row(where, name, {**ids, "question": text, **record, "original_image_id": original})

    def _picture(self, name: str, given: str, split: str) -> tuple[int, str | None, str]:
        """Return a picture's id, what the table calls it if it is called otherwise, and its file's name."""
        if not name:
            raise MalformedRecord(ViolationKind.BAD_ROW, "names no picture")
        given = given or name
        if (file := self._file(name)) is None:
            raise MalformedRecord(ViolationKind.IMAGE_ID, f"image is {name!r:.60}, no id for {self.table.image_name}")
        image_id = self._id("image_id", given)
        image_id = made_id(given) if image_id is None else image_id
        place = f"{split}/{file}" if "{split}" in str(self.table.images) else file
        first, known = self._places.setdefault(image_id, (split, place))
        if known != place:
            if first == split:
                clash = f"image_id {given!r:.60} stands for {known!r:.60} before"
                raise MalformedRecord(ViolationKind.IMAGE_CONFLICT, clash)
            # Each split numbers its own pictures.
            image_id = made_id(f"{split}/{given}")
            self._places[image_id] = (split, place)
        return image_id, None if str(image_id) == given else given, file

    def _file(self, name: str) -> str | None:
        """Return the name of a picture's file; None where a pattern makes it and this is no id for that."""
        if (pattern := self.table.image_name) is None:
            return name
        return contract.image_name(pattern, int(name)) if name.isdecimal() else None

    def _question_id(self, given: str, split: str, about: str) -> tuple[int, str | None]:
        """Return a question's id, made of what it is `about` where the table has none, and the table's own if it is
        another."""
        whole = self._id("question_id", given)
        made, place = made_id(given or about) if whole is None else whole, 0
        while (first := self._questions.get(made)) is not None:
            if given and first == split:
                raise MalformedRecord(ViolationKind.DUPLICATE_QUESTION, f"question_id {given!r:.60}")
            place += 1
            made = made_id(f"{split}/{given}" if given else f"{about}\n{place}")
        self._questions[made] = split
        return made, None if not given or str(made) == given else given

    def _id(self, kind: str, given: str) -> int | None:
        """Return the whole number that an id is; None where not all ids of that kind are whole numbers."""
        if not self._whole[kind]:
            return None
        if _WHOLE.fullmatch(given) and int(given) <= contract.LARGEST_ID:
            return int(given)
        # In most tables with such ids it is the first.
        self._whole[kind] = False
        self._questions.clear()
        self._places.clear()
        raise ReadAgain


def made_id(text: str) -> int:
    """Return an id for a text: the first 53 bits of its SHA-256, which every reader of JSON keeps."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) >> 3


def _text(value: Any, what: str) -> str:
    """Return a cell as text: numbers as they are written, nothing as a blank."""
    if isinstance(value, dict) and what == "image":
        # As `datasets` writes a picture that stands elsewhere.
        value = value.get("path")
    if value is None:
        return ""
    if type(value) in (int, float):
        return str(value)
    if not contract.is_text(value):
        raise MalformedRecord(ViolationKind.BAD_ROW, f"{what} is {value!r:.60}, not text")
    return value


def _listed(value: Any) -> Any:
    """Return the list that a text writes, in JSON or as Python prints it; anything else as it is."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(value)
    return value


def read_cell(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the answers of a cell, as `read_answers` does: one text or number; a list of such, or of objects with
    `answer`; or an object of lists, as `datasets` may give the latter."""
    value = _listed(value)
    if isinstance(value, dict) and isinstance(value.get("answer"), list):
        value = [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]
    return contract.read_answers(value if isinstance(value, list) else [value], _text)


def _turns(talk: Any) -> Iterator[tuple[str, str]]:
    """Yield question and answer of a conversation in LLaVA's layout, or in that of chat templates."""
    talk, question = _listed(talk), None
    for turn in talk if isinstance(talk, list) else ():
        kept = turn if isinstance(turn, dict) else {}
        who, said = kept.get("from", kept.get("role")), kept.get("value", kept.get("content"))
        said = _text(said, "a turn").replace("<image>", "").strip()
        if who in ("human", "user"):
            question = said
        elif who in ("gpt", "assistant") and question is not None:
            yield question, said
            question = None
        elif who != "system":
            raise MalformedRecord(ViolationKind.BAD_ROW, f"{turn!r:.60} is no turn of a human's and then of a model's")


def find_columns(file: str, there: Sequence[str], wanted: Columns, violations: Violations) -> dict[str, str]:
    """Return a table's columns by what they hold; none, and a violation, where one cannot be told."""
    found: dict[str, str] = {role: name for role, name in dataclasses.asdict(wanted).items() if name is not None}
    wrong = [f"data.table.columns.{role} is {name!r}" for role, name in found.items() if name not in there]
    named = {name.strip().lower(): name for name in there if name not in found.values()}
    for role in (role for role in USUAL if role not in found):
        names = [named[name] for name in USUAL[role] if name in named]
        if role in _FIRST or USUAL[role][0] in named and role == "answers":
            names = names[:1]
        if len(names) > 1:
            wrong.append(f"{' and '.join(names)} could all be the {role}")
        elif names:
            found[role] = names[0]
    # A picture may be known by its id alone, and one answer be the main one.
    for role, other in (("image", "image_id"), ("answers", "main_answer"), ("question", None)):
        if role not in found and other in found:
            found[role] = found.pop(other) if role == "answers" else found[other]
        elif role not in found and not any(role in text for text in wrong):
            wrong.append(f"no column for the {role}")
    if wrong:
        violations.add(ViolationKind.COLUMNS, f"{file}: {'; '.join(wrong)}; it has {', '.join(there):.300}")
    return {} if wrong else found


def read_rows(files: Sequence[Path], violations: Violations) -> Iterator[_Raw]:
    """Yield a table's rows by column, and for each one that cannot be read why; what is no table is a violation."""
    for path in files:
        kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
        try:
            if kind in ("parquet", "arrow"):
                check_regular(path, sys.maxsize)
                config: dict[str, Any] = {"path": "arrow"} if kind == "arrow" else dict(_PARQUET)
                config |= {"data_files": {"rows": [str(path)]}, "split": "rows"}
                stream = datasets.load_dataset(**config, streaming=True, trust_remote_code=False)
                assert isinstance(stream, datasets.IterableDataset) and stream.features is not None, "it names columns"
                for column, feature in stream.features.items():
                    if isinstance(feature, datasets.Image):
                        stream = stream.cast_column(column, datasets.Image(decode=False))
                yield from stream
            elif kind in ("csv", "tsv", "jsonl", "ndjson", "json"):
                yield from _read_text(path, kind, violations)
            else:
                known = "it is read by its ending, and csv, tsv, jsonl, json and parquet are known"
                violations.add(ViolationKind.FOREIGN_FILE, f"{path}: {refusal(path) or known}")
        except (csv.Error, pa.ArrowException, DatasetsError) as error:
            violations.add(ViolationKind.BROKEN_FILE, f"{path}: {' '.join(str(error).split())}")
        except READ_ERRORS as error:
            violations.add(*unreadable(path, error))


def _read_text(path: Path, kind: str, violations: Violations) -> Iterator[_Raw]:
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        first, second = lines.readline(), lines.readline()
        if "\0" in first:
            raise UnicodeDecodeError("utf-8", first.encode()[:100], 0, 1, "it has zeros")
        rest, written = chain([first, second], lines), written_as(f".{kind}", first, second)
        if written == "lines":
            for line in filter(str.strip, rest):
                try:
                    yield _object(json.loads(line))
                except (ValueError, RecursionError) as error:
                    yield MalformedRecord(ViolationKind.BAD_ROW, f"not JSON ({error})")
            return
        if written != "whole":
            reader = csv.reader(rest, delimiter=written)
            header = [name.strip() for name in next(reader, [])]
            for cells in filter(None, reader):
                if len(cells) == len(header):
                    yield dict(zip(header, cells, strict=True))
                else:
                    found = f"line {reader.line_num}: {len(cells)} cells, but {len(header)} columns"
                    yield MalformedRecord(ViolationKind.BAD_ROW, found)
            return
    content = read_json(path, violations)
    # A list, the one list in an object (TextVQA), or an object of objects by their ids (GQA).
    if isinstance(content, dict):
        lists = (value for value in content.values() if isinstance(value, list))
        lists = [value for value in lists if value and isinstance(value[0], dict)]
        if len(lists) == 1:
            content = lists[0]
        elif content and all(isinstance(value, dict) for value in content.values()):
            content = [{"question_id": key, **value} for key, value in content.items()]
    if isinstance(content, list):
        yield from map(_object, content)
    elif content is not None:
        found = refusal(path) or "neither a list of objects nor an object with one such list"
        violations.add(ViolationKind.FOREIGN_FILE, f"{path}: {found}")


def _object(row: Any) -> _Raw:
    return row if isinstance(row, dict) else MalformedRecord(ViolationKind.BAD_ROW, f"{row!r:.60} is not an object")
