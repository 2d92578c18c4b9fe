"""Source `official`: VQAv2's six archives, downloaded into `archives` beside the records and read as they are. That is
neither an output nor a dependency of the stage: DVC removes outputs before it runs one, and a download must outlive it."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.contract import Source
from vlm_vqa.fetch.sources import download
from vlm_vqa.fetch.sources.download import Download
from vlm_vqa.fetch.sources.official_layout import OFFICIAL, official_split
from vlm_vqa.params import OfficialParams

log = logging.getLogger(__name__)

FOLDER = "archives"
ARCHIVES: dict[str, tuple[str, int]] = {
    "v2_Questions_Train_mscoco.zip": (
        "sha256:05a64b6e2582d06d7585f5429674a9a33851878be1bff9f8668cdcf792df611e", 7_239_401),
    "v2_Questions_Val_mscoco.zip": (
        "sha256:e71f6c5c3e97a51d050f28243e262b28cd0c48d11a6b4632d769d30d3f93222a", 3_494_929),
    "v2_Annotations_Train_mscoco.zip": (
        "sha256:fb101bcefe91422c543c2bb6d70af11eb3119d0ff745ae283d09acdf66250853", 21_708_861),
    "v2_Annotations_Val_mscoco.zip": (
        "sha256:0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e", 10_518_930),
    "train2014.zip": ("md5:0da8c0bd3d6becc4dcb32757491aca88", 13_510_573_713),
    "val2014.zip": ("md5:a3d79f5ed8d289b7a7554ce06a5782b3", 6_645_013_297),
}  # fmt: skip
"""Checksums, as ParlAI (texts) and LAVIS (images) pin them, and bytes."""


def official_source(params: OfficialParams, records: Path) -> Source:
    """Download what is missing of the six archives, into a folder beside `records`, and return them as a source;
    UserError if one cannot be had with the right checksum, or the disk is full."""
    folder, downloads = records.parent / FOLDER, []
    for name, (checksum, size) in ARCHIVES.items():
        option = "texts_url" if name.startswith("v2_") else "images_url"
        url = f"{getattr(params, option).rstrip('/')}/{name}"
        downloads.append(Download(url, folder / name, checksum, size, f"data.official.{option}"))
    missing = [one for one in downloads if not download.is_verified(one)]
    # The records take as much again: they hold the images as they are in the archives, and compressed texts.
    rest = sum(max(0, one.bytes - download.bytes_here(one)) for one in missing)
    total = sum(one.bytes for one in downloads)
    records.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(records.parent).free
    if rest + total > free:
        raise UserError(
            f"{records.parent}: {(rest + total) / 1e9:.1f} GB are needed ({rest / 1e9:.1f} for {FOLDER}, {total / 1e9:.1f} "
            f"for {records.name}), but {free / 1e9:.1f} GB are free. Free some space, then run `dvc repro` again."
        )
    if missing:
        log.info("downloading %s", ", ".join(one.path.name for one in missing))
        download.fetch_all(missing, params.downloads)
    splits = []
    for split, files in OFFICIAL.items():
        questions, annotations = (f"v2_{kind}_{split.capitalize()}_mscoco.zip" for kind in ("Questions", "Annotations"))
        files = replace(files, questions=questions, annotations=annotations, images=f"{split}2014.zip")
        splits.append(official_split(folder, split, files))
    origin = {"archives": {name: checksum for name, (checksum, _) in ARCHIVES.items()}, "checksums": "official"}
    return Source("official", origin, tuple(splits))


def remove_archives(records: Path) -> None:
    """Delete the archives and what lies beside them: what `keep_archives: false` means when the records are complete."""
    for name in ARCHIVES:
        for path in (records.parent / FOLDER).glob(f"{name}*"):
            path.unlink()
