"""Source `hub`: VQAv2 in a `datasets` repository at a pinned commit, streamed and written out in VQAv2's own file layout.

Rows carry their image; images that several questions share are written once, as the bytes that the repository holds. What
each Parquet file there gives is a part: a folder that gets its name when it is whole. A run that was interrupted goes on
with the first part that is missing. Parts lie under a hash of repository, commit, split and files, so those of two data sets
never meet.
"""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets
import fsspec
import pyarrow as pa
from datasets.data_files import DataFilesList, get_data_patterns, sanitize_patterns
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData, HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from tqdm import tqdm

from vlm_vqa.data.records import SPLITS
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.sources.official_layout import Source, SplitPaths, official_paths
from vlm_vqa.hashing import hash_json, sha256_bytes
from vlm_vqa.hf_hub import Repository, translate_errors
from vlm_vqa.params import HubParams, HubRepository
from vlm_vqa.sealed import aside, flush

log = logging.getLogger(__name__)
T = TypeVar("T")

NOTES = (
    "Rows of a datasets repository in VQAv2's layout; images are the bytes that it holds, which its makers may have encoded "
    "anew.",
)
_COLUMNS = {
    "question_id": ("question_id",),
    "image_id": ("image_id", "id_image"),
    "question": ("question",),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
    "multiple_choice_answer": ("multiple_choice_answer",),
    "answers": ("answers", "answers_original"),
    "image": ("image",),
}
"""The columns of lmms-lab/VQAv2, which are VQAv2's own names, and after them those of Multimodal-Fatima/VQAv2_train."""
_ANSWER_FIELDS = {"answer", "answer_confidence"}
_ROWS_AT_ONCE = 100
"""Rows decoded together: with their images, some 20 MB."""
_PAUSES = (5, 15, 45, 135)
"""Seconds before each further try. huggingface_hub itself has tried 6 times within 25 s by then."""


@contextmanager
def hub_source(hub: HubParams, folder: Path) -> Generator[Source]:
    """Stream both splits into `folder` and yield them; they are removed if the block succeeds, and kept if it fails.

    Raises:
        UserError: a repository cannot be read, has a loading script, or lacks the split or columns; it names what to do.
    """
    splits = tuple(_stream_split(split, getattr(hub, split), folder) for split in SPLITS)
    yield Source("hub", dataclasses.asdict(hub), splits, NOTES)
    for paths in splits:
        shutil.rmtree(paths.questions.parent)


def _stream_split(split: str, wanted: HubRepository, folder: Path) -> SplitPaths:
    """Write one split into a folder of its own, or complete what an earlier run has left there."""
    key = f"data.hub.{split}"
    repository = Repository(f"{key}.repository", wanted.repository, f"{key}.revision", wanted.revision, "dataset")
    with translate_errors(repository):
        found = _persistently(repository.name, lambda: _find_files(repository, wanted.split, f"{key}.split"))
        made_of = {**dataclasses.asdict(wanted), "to": split, "files": found.names, "columns": _COLUMNS}
        place = folder / hash_json(made_of)[:16]
        paths = official_paths(place)[SPLITS.index(split)]
        paths.images[0].mkdir(parents=True, exist_ok=True)
        parts = [place / f"part-{index:05d}" for index in range(len(found.files))]
        with tqdm(total=found.questions, desc=f"{split} from {repository.name}", unit="question") as progress:
            writer = _PartWriter(repository, paths, progress)
            for file, part in zip(found.files, parts, strict=True):
                if part.is_dir():
                    writer.skip(part)
                else:
                    _persistently(file, lambda file=file, part=part: writer.write(file, part))
    _join(parts, "questions", paths.questions)
    _join(parts, "annotations", paths.annotations)
    return paths


def _persistently(what: str, work: Callable[[], T]) -> T:
    """Do `work`, again and again after pauses while the network or the hub fails."""
    for seconds in _PAUSES:
        try:
            return work()
        except (HTTPError, ConnectionError, TimeoutError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500 and not _busy(error):
                raise
            # Not the error's text: it may hold the signed address of a file in storage.
            log.warning("%s: %s; trying again in %d s", what, type(error).__name__, seconds)
            time.sleep(seconds)
    return work()


def _busy(error: HfHubHTTPError) -> bool:
    return error.response.status_code in (408, 429)


# --- what is there ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The Parquet files of a split."""

    files: list[str]
    """As `datasets` opens them: an address on the hub, or a path."""
    names: list[str]
    """As the repository calls them."""
    questions: int | None
    """How many its card promises; for the progress bar."""


def _find_files(repository: Repository, split: str, split_key: str) -> _Found:
    """Return a split's files, as the repository's card or their names say.

    `datasets.load_dataset(name)` does the same, but the pinned `datasets` calls huggingface_hub in a way that the pinned
    huggingface_hub refuses. Given the files, its Parquet reader does its work, and no loading script has a part in it.
    """
    base, names = _contents(repository)
    script = f"{repository.name.split('/')[-1]}.py"
    if script in names:
        raise UserError(
            f"{repository} is read by a program of its own, {script}, which is not run here. Name a repository of Parquet "
            "files; or, if it holds all rows, a commit of this one's branch refs/convert/parquet "
            f"({repository.page}/tree/refs%2Fconvert%2Fparquet); or set data.source: official."
        )
    card = _card(base, names)
    patterns = _patterns(repository, base, card)
    if split not in patterns:
        raise UserError(f"{split_key} is {split!r}; {repository.name} has {', '.join(map(str, patterns))}.")
    try:
        files = DataFilesList.from_patterns(patterns[split], base_path=base, allowed_extensions=[".parquet"])
    except FileNotFoundError:
        # So a plain name ends that is not there; a pattern without a match ends in an empty list.
        files = DataFilesList([], [])
    if not files:
        raise UserError(f"{repository} has no Parquet files of split {split!r}; only such are read.")
    infos = list(DatasetInfosDict.from_dataset_card_data(card).values())
    promised = infos[0].splits.get(split) if len(infos) == 1 and infos[0].splits else None
    relative = [file.removeprefix(base).lstrip("/") for file in files]
    return _Found(list(files), relative, promised.num_examples if promised else None)


def newest(name: str) -> tuple[str, list[str]]:
    """Return a repository's newest commit and the splits that it has there.

    Raises:
        UserError: it cannot be read.
    """
    repository = Repository("PATH", name, "its newest commit", "main", "dataset")
    with translate_errors(repository):
        commit = str(HfApi().dataset_info(name).sha)
        base, names = _contents(dataclasses.replace(repository, revision=commit))
        return commit, list(map(str, _patterns(repository, base, _card(base, names))))


def _contents(repository: Repository) -> tuple[str, list[str]]:
    """Return where the repository is read from, and the names of its files."""
    name, revision = repository.name, repository.revision
    if constants.is_offline_mode():
        # All that `hf download` has brought, if it is there.
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision))
        return str(folder), [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return f"hf://datasets/{name}@{revision}", HfApi().list_repo_files(name, revision=revision, repo_type="dataset")


def _card(base: str, names: list[str]) -> DatasetCardData:
    if "README.md" not in names:
        return DatasetCardData()
    with fsspec.open(f"{base}/README.md", "rt", encoding="utf-8") as file:
        return DatasetCard(file.read(), ignore_metadata_errors=True).data  # ty: ignore[invalid-explicit-return] - typed as its base


def _patterns(repository: Repository, base: str, card: DatasetCardData) -> dict[Any, list[str]]:
    """Return the files' patterns by split."""
    configs = MetadataConfigs.from_dataset_card_data(card)
    if len(configs) > 1 and "default" not in configs:
        raise UserError(
            f"{repository} holds several data sets ({', '.join(configs)}); one with a single one is wanted."
        )
    config = configs.get("default") or next(iter(configs.values()), {})
    if "data_files" in config:
        return sanitize_patterns(config["data_files"])
    try:
        return get_data_patterns(base)
    except FileNotFoundError as error:
        raise UserError(f"{repository} has no data files that can be told apart by split.") from error


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(repository: Repository, file: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file under VQAv2's names, images as their bytes."""
    stream = datasets.load_dataset(
        "parquet",
        data_files={"rows": [file]},
        split="rows",
        streaming=True,
        batch_size=_ROWS_AT_ONCE,
        trust_remote_code=False,
    )
    assert isinstance(stream, datasets.IterableDataset) and stream.features is not None, "parquet names its columns"
    columns = _columns(repository, stream.features)
    if isinstance(stream.features[columns["image"]], datasets.Image):
        stream = stream.cast_column(columns["image"], datasets.Image(decode=False))
    for row in stream:
        yield {name: row[column] for name, column in columns.items()}


def _columns(repository: Repository, features: datasets.Features) -> dict[str, str]:
    """Return the repository's column for each of VQAv2's."""
    columns = {}
    for name, candidates in _COLUMNS.items():
        for column in candidates:
            # A list of bare answers, without what each person said of it, is no VQAv2 annotation.
            if column in features and (name != "answers" or _fields(features[column]) >= _ANSWER_FIELDS):
                columns.setdefault(name, column)
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise UserError(
            f"{repository} lacks the columns {', '.join(missing)} (answers: ten of {', '.join(sorted(_ANSWER_FIELDS))}); it "
            f"has {', '.join(features)}. Name a repository with all of VQAv2's fields, such as lmms-lab/VQAv2."
        )
    return columns


def _fields(feature: Any) -> set[str]:
    """Return the fields of a list's items."""
    item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return set(item) if isinstance(item, dict) else set()


def _answers(answers: Any) -> Any:
    """Return a row's answers as VQAv2 writes them; `datasets` may give a list of objects as an object of lists."""
    if isinstance(answers, dict):
        return [dict(zip(answers, values, strict=True)) for values in zip(*answers.values(), strict=True)]
    return answers


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass
class _PartWriter:
    """Writes the parts of one split, and each image once."""

    repository: Repository
    paths: SplitPaths
    progress: tqdm
    hashes: dict[int, str] = field(default_factory=dict)
    """SHA-256 by image id, of all parts so far."""

    def skip(self, part: Path) -> None:
        """Take notice of a part that is there."""
        self.hashes |= {int(image_id): sha256 for image_id, sha256 in json.loads((part / "images").read_text())}
        with open(part / "questions", "rb") as lines:
            self.progress.update(sum(1 for _ in lines))

    def write(self, file: str, part: Path) -> None:
        """Write what `file` holds; nothing of it counts before all of it is there."""
        before = self.progress.n
        images: dict[int, str] = {}
        try:
            with aside(part) as folder:
                folder.mkdir()
                with open(folder / "questions", "w") as questions, open(folder / "annotations", "w") as annotations:
                    for row in _rows(self.repository, file):
                        ids = {"question_id": row["question_id"], "image_id": row["image_id"]}
                        kinds = {key: row[key] for key in ("question_type", "answer_type", "multiple_choice_answer")}
                        questions.write(_line({**ids, "question": row["question"]}))
                        annotations.write(_line({**ids, **kinds, "answers": _answers(row["answers"])}))
                        self._write_image(row, images)
                        self.progress.update()
                (folder / "images").write_text(json.dumps(list(images.items())))
                # They count with the part, so they must be on the disk before it.
                for path in (*map(self._image, images), self.paths.images[0]):
                    flush(path)
        except pa.ArrowInvalid as error:
            raise UserError(f"{self.repository}: {file} is no intact Parquet file ({error}).") from error
        except BaseException:
            self.progress.update(before - self.progress.n)
            raise

    def _write_image(self, row: dict[str, Any], images: dict[int, str]) -> None:
        """Write a row's image unless its id is known; `images` notes the ids of this part."""
        image_id = row["image_id"]
        where = f"{self.repository}: question_id {row['question_id']}"
        data = row["image"].get("bytes") if isinstance(row["image"], dict) else row["image"]
        if not isinstance(data, bytes):
            raise UserError(f"{where} comes without the bytes of its image. Name a repository that embeds images.")
        if type(image_id) is not int or image_id < 0 or self.paths.names.name(image_id) is None:
            # The contract, which reads all that is written here, names the bad id.
            return
        sha256 = sha256_bytes(data)
        if image_id not in self.hashes:
            self._image(image_id).write_bytes(data)
            self.hashes[image_id] = sha256
        elif self.hashes[image_id] != sha256:
            raise UserError(f"{where} has another image than earlier questions about image_id {image_id}.")
        images[image_id] = sha256

    def _image(self, image_id: int) -> Path:
        return self.paths.images[0] / self.paths.names.name(image_id)  # ty: ignore[unsupported-operator] - _write_image looked


def _line(entry: dict[str, Any]) -> str:
    # What is no JSON is no VQAv2 either: written as text, it is for the contract to refuse by name.
    return json.dumps(entry, default=repr) + "\n"


def _join(parts: Iterable[Path], key: str, target: Path) -> None:
    """Write VQAv2's questions or annotations file from the lines of all parts."""
    with aside(target) as unfinished, open(unfinished, "w") as file:
        file.write(f'{{"{key}": [')
        separator = "\n"
        for part in parts:
            with open(part / key) as lines:
                for line in lines:
                    file.write(separator + line.rstrip("\n"))
                    separator = ",\n"
        file.write("\n]}\n")
