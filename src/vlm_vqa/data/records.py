"""VQA records and image bytes on disk: the format of `data/records` and how every later stage reads it.

`questions-SPLIT.parquet` holds one row per question in the order of the split's questions file (HELM joins by that
position); `images-NNNNN-of-NNNNN.parquet` hold every image of both splits once, by ascending image id, in row groups
small enough to stream; `report.html` shows a person what they hold; `manifest.json` says what is in there, is sealed and
written last. Every block of a Parquet file is compared with its checksum in the manifest when it is read. The schema of
each file carries its `datasets.Features`, so `datasets.load_dataset("parquet", data_files=...)` reads them as they are.
"""

import functools
import logging
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_vqa.errors import UserError, make_again
from vlm_vqa.sealed import open_checked, read_sealed

if TYPE_CHECKING:
    # Imported where it is needed: what only counts or names records does without.
    import datasets

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
# Raised when the files change in a way that older readers would misunderstand.
SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
REPORT = "report.html"

_REMAKE = make_again("fetch-vqav2")


def question_features() -> "datasets.Features":
    """Return the columns of a file of questions."""
    from datasets import Features, Sequence, Value

    return Features(
        dict.fromkeys(("question_id", "image_id"), Value("int64"))
        | dict.fromkeys(("question", "question_type", "answer_type", "multiple_choice_answer"), Value("string"))
        # One to n each, in their file's order; confidences are empty where nobody gave any.
        | dict.fromkeys(("answers", "answer_confidences"), Sequence(Value("string")))
        # What the source calls them, where that is no whole number or was not distinct.
        | dict.fromkeys(("original_question_id", "original_image_id"), Value("string"))
    )


def image_features() -> "datasets.Features":
    """Return the columns of a file of images."""
    from datasets import Features, Image, Value

    kinds = {"image_id": "int64", "file_name": "string", "width": "int32", "height": "int32", "sha256": "string"}
    return Features({**{name: Value(kind) for name, kind in kinds.items()}, "image": Image()})


class ImageRecord(NamedTuple):
    """One stored image: its id, the name of the file it came from, and that file's bytes as they were."""

    image_id: int
    file_name: str
    data: bytes


def questions_file(split: str) -> str:
    """Return the name of a split's file of questions; `split` is one of `SPLITS`."""
    return f"questions-{split}.parquet"


def load_questions(folder: str | Path, split: str, columns: list[str] | None = None) -> "datasets.Dataset":
    """Return a split's questions in memory, in the order of its questions file; columns: `question_features`, or some.
    UserError if the file is missing, damaged or of another schema."""
    import datasets
    from datasets.table import InMemoryTable

    path = Path(folder) / questions_file(split)
    with (
        _open_parquet(path, question_features(), read_manifest(folder)["files"]) as file,
        _readable(f"{path}: cannot be read"),
    ):
        table = file.read(columns)
    return datasets.Dataset(InMemoryTable(table), split=datasets.NamedSplit(split))


def iter_images(folder: str | Path, start: int = 0, stop: int = sys.maxsize) -> Iterator[ImageRecord]:
    """Yield images by ascending `image_id`, all or those from place `start` up to, without it, place `stop`. Only the row
    groups that hold them are read, one at a time. UserError if a shard is missing, damaged or of another schema."""
    first = 0
    for group, read in _row_groups(folder):
        rows = group.num_rows
        if wanted := range(max(start - first, 0), min(stop - first, rows)):
            yield from read(wanted)
        first += rows
        if first >= stop:
            return


def _shards(folder: str | Path) -> Iterator[tuple[Path, pq.ParquetFile]]:
    files = read_manifest(folder)["files"]
    paths = [Path(folder) / name for name in sorted(files) if name.startswith("images-")]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise UserError(f"{folder}: the image files are not complete ({', '.join(missing)} missing). {_REMAKE}")
    for path in paths:
        with _open_parquet(path, image_features(), files) as file:
            yield path, file


def _row_groups(folder: str | Path) -> Iterator[tuple[pq.RowGroupMetaData, Callable[[range], Iterator[ImageRecord]]]]:
    """Yield what is noted of each row group of images, and what reads some of its rows."""
    for path, file in _shards(folder):
        for group in range(file.num_row_groups):
            yield file.metadata.row_group(group), functools.partial(_read_group, file, path, group)


def picture_ids(folder: str | Path, split: str, image_ids: Sequence[int]) -> np.ndarray:
    """Return, for each image id of a split, the first id under which there is a picture of the same bytes, int64 [ids].
    The shards are read only where the manifest says that the split has such twins; UserError as for `iter_images`."""
    found = np.asarray(image_ids, dtype=np.int64)
    if not read_manifest(folder)["pictures"]["twins"][split]:
        return found
    first: dict[str, int] = {}
    same = {}
    for _, file in _shards(folder):
        for image_id, digest in zip(*file.read(["image_id", "sha256"]).to_pydict().values(), strict=True):
            same[image_id] = first.setdefault(digest, image_id)
    return np.array([same[image_id] for image_id in found.tolist()], dtype=np.int64)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return `manifest.json` of the records; UserError if it is missing, damaged, or of another version.

    Keys: `schema_version`; `data_hash`, a hash of all records and image bytes that does not depend on file names, shards or
    time; `source` and `origin`, where they came from; `splits`, per split the counts `questions`, `images`, `answer_types`
    (by type), `answers_per_question` (questions by the number of their answers, as text), `unsaid_answers` (questions whose
    main answer nobody gave), `asked_in_both` (questions whose picture and words stand in the other split too), `dropped`
    (bad records left out; `dropped_records` names each with its reason) and `inputs` (name and hash of the files read);
    `images`, the number of images of both splits; `pictures`, how many were `changed` on the way in, by how, and how many
    are there twice: `twins` by split, `twins_across` splits, `alike_across` them by their looks; `files`, the
    `sealed.fingerprint` of each Parquet file; `allow_split_overlap`; `notes`, what was changed on the way.
    """
    path = Path(folder) / MANIFEST
    manifest = read_sealed(path, "a manifest of records", _REMAKE)
    if (version := manifest["schema_version"]) != SCHEMA_VERSION:
        raise UserError(f"{path}: records of version {version}; this code reads version {SCHEMA_VERSION}. {_REMAKE}")
    return manifest


def metric_of(manifest: Mapping[str, Any]) -> str:
    """Return what scores val: `vqa_accuracy` where each of its questions has exactly ten answers, else `answer_accuracy`."""
    return "vqa_accuracy" if set(manifest["splits"]["val"]["answers_per_question"]) == {"10"} else "answer_accuracy"


def said_answers(answers: Sequence[str]) -> list[str]:
    """Return a question's answers without those of people who said nothing; there is at least one, as fetch has checked."""
    return [answer for answer in answers if answer.strip()]


def manifest_for_a_look(folder: str | Path) -> dict[str, Any] | None:
    """Return the manifest for who only looks ahead; None where there is none, or, with a warning, none that can be read."""
    if not (Path(folder) / MANIFEST).is_file():
        return None
    try:
        return read_manifest(folder)
    except UserError as error:
        log.warning("%s", error)
        return None


def image_shard(index: int, count: int) -> str:
    """Return the name of image file `index` of `count`."""
    return f"images-{index:05d}-of-{count:05d}.parquet"


@contextmanager
def _readable(problem: str) -> Generator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        # Arrow's messages have line breaks.
        raise UserError(f"{problem} ({' '.join(str(error).split())}). {_REMAKE}") from error


def _open_parquet(path: Path, features: "datasets.Features", files: dict[str, Any]) -> pq.ParquetFile:
    if not path.is_file():
        raise UserError(f"{path}: missing. {_REMAKE}")
    with _readable(f"{path}: not a readable Parquet file"):
        file = pq.ParquetFile(open_checked(path, files[path.name], _REMAKE))
    if type(features).from_arrow_schema(file.schema_arrow) != features:
        file.close()
        raise UserError(f"{path}: columns are not those of the records ({file.schema_arrow.names}). {_REMAKE}")
    return file


class Images:
    """Images of records by id, from wherever they lie. It can be used in forked and pickled processes: each opens the files
    itself."""

    def __init__(self, folder: str | Path):
        """Read the files' footers; UserError if one is missing, damaged or of another schema."""
        self._folder, self._files = Path(folder), read_manifest(folder)["files"]
        self._opened: tuple[int, dict[Path, pq.ParquetFile]] = (0, {})
        self._last: tuple[tuple[Path, int], pa.Table] | None = None
        # Ids ascend through all files: of each row group the lowest one, its file and its number there.
        self._lowest: list[int] = []
        self._places: list[tuple[Path, int]] = []
        for path, file in _shards(folder):
            for group in range(file.num_row_groups):
                self._lowest.append(file.metadata.row_group(group).column(0).statistics.min)
                self._places.append((path, group))

    def __getitem__(self, image_id: int) -> ImageRecord:
        """Read the row group that an image lies in, unless it was the last one to be read; UserError if there is no such
        image, or it is damaged."""
        if at := bisect_right(self._lowest, image_id):
            columns = self._group(*self._places[at - 1])
            ids = columns["image_id"].to_numpy()
            if (row := int(np.searchsorted(ids, image_id))) < len(ids) and ids[row] == image_id:
                (found,) = columns.slice(row, 1).to_pylist()
                return ImageRecord(image_id, found["file_name"], found["image"]["bytes"])
        raise UserError(f"{self._folder}: no image {image_id} of the questions. {_REMAKE}")

    def _group(self, path: Path, group: int) -> pa.Table:
        if self._last is None or self._last[0] != (path, group):
            self._last = (path, group), _read_columns(self._file(path), path, group)
        return self._last[1]

    def _file(self, path: Path) -> pq.ParquetFile:
        # A file's place of reading is shared with the process that has opened it.
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), {}
        if path not in self._opened[1]:
            self._opened[1][path] = _open_parquet(path, image_features(), self._files)
        return self._opened[1][path]

    def __reduce__(self) -> tuple[Any, ...]:
        return Images, (self._folder,)


def images_of(folder: str | Path, image_ids: Iterable[int]) -> Iterator[ImageRecord]:
    """Yield the images of these ids, in ascending order; UserError as `Images`."""
    return map(Images(folder).__getitem__, sorted(set(image_ids)))


def _read_columns(file: pq.ParquetFile, path: Path, group: int) -> pa.Table:
    with _readable(f"{path}: row group {group} cannot be read"):
        return file.read_row_group(group, columns=["image_id", "file_name", "image"])


def _read_group(file: pq.ParquetFile, path: Path, group: int, rows: range) -> Iterator[ImageRecord]:
    columns = _read_columns(file, path, group).slice(rows.start, len(rows))
    for image_id, file_name, image in zip(*columns.to_pydict().values(), strict=True):
        yield ImageRecord(image_id, file_name, image["bytes"])
