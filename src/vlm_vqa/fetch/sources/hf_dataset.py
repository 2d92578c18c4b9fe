"""Source `hub`: a table in a `datasets` repository at a pinned commit, whose Parquet files hold its pictures."""

import dataclasses
import functools
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from datasets.data_files import DataFilesList, get_data_patterns, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from vlm_vqa.data.records import SPLITS
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.contract import Source, Split
from vlm_vqa.fetch.sources.table import Tables
from vlm_vqa.hf_hub import Repository, translate_errors
from vlm_vqa.params import HubParams, HubTable, TableParams

log = logging.getLogger(__name__)

NOTES = ("Rows of a datasets repository; images are the bytes that it holds, which its makers may have encoded anew.",)
_PAUSES = (5, 15, 45, 135, 135)  # seconds before each further try


def hub_source(hub: HubParams, table: HubTable | None, spilled: Path) -> Source:
    """Download both splits into the hub's own cache and return them; their pictures go into `spilled`. UserError if a
    repository cannot be read, has a loading script, or lacks the split; it names what to do."""
    files, called = {}, {}
    for split in SPLITS:
        one, key = getattr(hub, split), f"data.hub.{split}"
        repository = Repository(f"{key}.repository", one.repository, f"{key}.revision", one.revision, "dataset")
        called[split] = str(repository)
        with translate_errors(repository):
            base, patterns = _patterns(repository)
            if one.split not in patterns:
                raise UserError(f"{key}.split is {one.split!r}; {one.repository} has {', '.join(map(str, patterns))}.")
            found = []
            # A plain name that is not there ends in an error, a pattern without a match in an empty list.
            with suppress(FileNotFoundError):
                found = DataFilesList.from_patterns(patterns[one.split], base, allowed_extensions=[".parquet"])
            if not found:
                raise UserError(f"{repository} has no Parquet files of split {one.split!r}; only such are read.")
            files[split] = [_download(repository, file.removeprefix(f"{base}/")) for file in found]
    columns = table.columns if table else None
    images = {split: [spilled] for split in SPLITS}
    spilled.mkdir(parents=True)
    reader = Tables(files, called, TableParams(train="train", columns=columns), images, spilled)
    splits = (Split(split, called[split], images[split], functools.partial(reader.rows, split)) for split in SPLITS)
    return Source("hub", dataclasses.asdict(hub), tuple(splits), NOTES)


def _download(repository: Repository, name: str) -> Path:
    """Return a file, downloaded again and again after pauses while the network or the hub fails."""
    for seconds in (*_PAUSES, None):
        try:
            return Path(hf_hub_download(repository.name, name, repo_type="dataset", revision=repository.revision))
        except (HTTPError, ConnectionError, TimeoutError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
            # 408 and 429 say that the hub is busy.
            if seconds is None or (status < 500 and status not in (408, 429)):
                raise
            # Not the error's text: it may hold the signed address of a file in storage.
            log.warning("%s: %s; trying again in %d s", name, type(error).__name__, seconds)
            time.sleep(seconds)
    raise AssertionError("the last error has been raised")


def newest(name: str) -> tuple[str, list[str]]:
    """Return a repository's newest commit and the splits that it has there, or raise `UserError`."""
    repository = Repository("PATH", name, "its newest commit", "main", "dataset")
    with translate_errors(repository):
        commit = str(HfApi().dataset_info(name).sha)
        _, patterns = _patterns(dataclasses.replace(repository, revision=commit))
        return commit, list(map(str, patterns))


def _patterns(repository: Repository) -> tuple[str, dict[Any, list[str]]]:
    """Return where a repository is read from, and its files' patterns by split, as its card or they themselves tell.

    `datasets.load_dataset(name)` does the same, but the pinned `datasets` calls huggingface_hub in a way that the pinned
    huggingface_hub refuses. Given the files, its Parquet reader does its work, and no loading script has a part in it.
    """
    name, revision = repository.name, repository.revision
    if constants.is_offline_mode():
        # All that `hf download` has brought, if it is there.
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision))
        base, names = str(folder), [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    else:
        names = HfApi().list_repo_files(name, revision=revision, repo_type="dataset")
        base = f"hf://datasets/{name}@{revision}"
    if (script := f"{name.split('/')[-1]}.py") in names:
        raise UserError(
            f"{repository} is read by a program of its own, {script}, which is not run here. Name a repository of Parquet "
            "files; or, if it holds all rows, a commit of this one's branch refs/convert/parquet "
            f"({repository.page}/tree/refs%2Fconvert%2Fparquet); or set data.source: official."
        )
    card = DatasetCard("")
    if "README.md" in names:
        with fsspec.open(f"{base}/README.md", "rt", encoding="utf-8") as file:
            card = DatasetCard(file.read(), ignore_metadata_errors=True)
    configs = MetadataConfigs.from_dataset_card_data(card.data)  # ty: ignore[invalid-argument-type] - typed as its base
    if len(configs) > 1 and "default" not in configs:
        raise UserError(f"{repository} holds several data sets ({', '.join(configs)}); name one that holds one.")
    config = configs.get("default") or next(iter(configs.values()), {})
    if "data_files" in config:
        return base, sanitize_patterns(config["data_files"])
    try:
        return base, get_data_patterns(base)
    except FileNotFoundError as error:
        raise UserError(f"{repository} has no data files that can be told apart by split.") from error
