"""Source `official`: VQAv2's six archives, downloaded into `archives` beside the records and read as they are. That is
neither an output nor a dependency of the stage: DVC removes outputs before it runs one, and a download must outlive it.

Downloads go on where they stopped, are retried, and are in place only when their checksum is right. Beside a file NAME lies
`NAME.part`, its first bytes, which can be deleted at any time. It is gone on with whichever server it is from: the checksum
tells whether all bytes are of one file, and if not, all are fetched anew.
"""

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm
from urllib3.exceptions import HTTPError, InvalidHeader

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.contract import Source
from vlm_vqa.fetch.sources.official_layout import OFFICIAL, official_split
from vlm_vqa.params import OfficialParams
from vlm_vqa.sealed import PART, publish
from vlm_vqa.secrets import without_secrets

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
# Failures in a row that bring nothing new, before the download ends; the waits between them add up to two minutes.
_TRIES, _BUSY = 8, (408, 425, 429, 500, 502, 503, 504)
_RETRY = urllib3.Retry(_TRIES - 1, status_forcelist=_BUSY, backoff_factor=1, backoff_max=60, retry_after_max=60)
# Seconds to connect, and seconds without a byte.
_TIMEOUT = (20.0, 30.0)
# Slower than this over a window, an attempt has failed: a byte a second would be progress for ever.
_LEAST_RATE = 1024
_WINDOW = 30.0
_BLOCK_BYTES = 2**20
_AS_IT_IS = {"Accept-Encoding": "identity"}  # a compressed answer could not be resumed


def official_source(params: OfficialParams, records: Path) -> Source:
    """Download what is missing of the six archives, into a folder beside `records`, and return them as a source;
    UserError if one cannot be had with the right checksum, or the disk is full."""
    folder, downloads = records.parent / FOLDER, []
    for name, (checksum, size) in ARCHIVES.items():
        option = "texts_url" if name.startswith("v2_") else "images_url"
        url = f"{getattr(params, option).rstrip('/')}/{name}"
        downloads.append(Download(url, folder / name, checksum, size, f"data.official.{option}"))
    missing = [one for one in downloads if not is_verified(one)]
    # The records take as much again: they hold the images as they are in the archives, and compressed texts.
    rest = sum(max(0, one.bytes - bytes_here(one)) for one in missing)
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
        fetch_all(missing, params.downloads)
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


@dataclass(frozen=True)
class Download:
    url: str
    path: Path
    checksum: str  # `md5:` or `sha256:`, and the digest in hex
    bytes: int
    option: str  # the parameter that the URL comes from, for messages

    @property
    def part(self) -> Path:
        """Where its first bytes lie until all are there."""
        return self.path.with_name(self.path.name + PART)


class _Transient(Exception):
    """An attempt has failed in a way that may pass; `seconds` is how long the server asks to wait."""

    seconds = 0.0


_PASSING = (_Transient, HTTPError, requests.ConnectionError, requests.Timeout)


def is_verified(download: Download) -> bool:
    """Tell whether the file is there with the right checksum; another one is deleted."""
    if not download.path.is_file():
        return False
    log.info("checking %s", download.path)
    if (found := _checksum(download, download.path)) == download.checksum:
        return True
    log.warning("%s: deleted, its checksum is %s and not %s", download.path, found, download.checksum)
    download.path.unlink()
    return False


def bytes_here(download: Download) -> int:
    """Return how many bytes of an unfinished file are there."""
    return download.part.stat().st_size if download.part.is_file() else 0


def fetch_all(downloads: Sequence[Download], at_once: int) -> None:
    """Download files, `at_once` of them at a time, and check them. The first failure stops all, to be resumed: UserError
    if a file is not there, has another size or twice the wrong checksum, or the server fails too often."""
    stop, total, here = threading.Event(), sum(one.bytes for one in downloads), sum(map(bytes_here, downloads))
    with (
        ThreadPoolExecutor(at_once) as pool,
        tqdm(desc="download", total=total, initial=here, unit="B", unit_scale=True, unit_divisor=1024) as bar,
    ):
        futures = [pool.submit(_fetch, download, bar, stop) for download in downloads]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            # On an error, and on Ctrl-C, which reaches this thread alone: the others end by CancelledError.
            stop.set()


def _fetch(download: Download, bar: tqdm, stop: threading.Event) -> None:
    """Download one file; wrong bytes are thrown away and fetched once more."""
    download.path.parent.mkdir(parents=True, exist_ok=True)
    if here := bytes_here(download):
        log.info("%s: going on at byte %d", download.path.name, here)
    for _ in range(2):
        _complete(download, bar, stop)
        if (found := _checksum(download, download.part)) == download.checksum:
            publish(download.part, download.path)
            log.info("%s: complete, %s", download.path.name, found)
            return
        log.warning("%s: thrown away, its checksum is %s and not %s", download.part, found, download.checksum)
        _restart(download, bar)
    raise _wrong(download, f"has checksum {found} instead of {download.checksum}, twice: another file, or damaged")


def _restart(download: Download, bar: tqdm) -> None:
    """Throw away what is there."""
    with bar.get_lock():
        bar.update(-bytes_here(download))
    download.part.unlink(missing_ok=True)


def _attempt(download: Download, bar: tqdm, stop: threading.Event) -> None:
    """Ask for what is missing of a file and take it as far as it comes."""
    if (here := bytes_here(download)) == download.bytes:
        return
    if stop.is_set():
        raise CancelledError
    ask = {"Range": f"bytes={here}-"} if here else {}
    with requests.get(download.url, headers=_AS_IT_IS | ask, stream=True, timeout=_TIMEOUT) as response:
        status, begins = response.status_code, f"bytes {here}-"
        if status == 416 or status == 206 and not response.headers.get("Content-Range", "").startswith(begins):
            _restart(download, bar)
            raise _Transient("the file has changed on the server; starting again")
        said = f"the server answers {status} ({response.reason})"
        if _RETRY.is_retry("GET", status, "Retry-After" in response.headers):
            error = _Transient(said)
            with suppress(InvalidHeader):
                error.seconds = _RETRY.get_retry_after(response.raw) or 0.0
            raise error
        if status not in (200, 206):
            raise _wrong(download, said)
        length = response.headers.get("Content-Length", "")
        if status == 200 and length.isdecimal() and int(length) != download.bytes:
            raise _wrong(download, f"sends {int(length):,} bytes instead of {download.bytes:,}: another file")
        if status == 200:
            # The server sends the whole file: it knows no ranges, or this is the start.
            _restart(download, bar)
        _receive(response, download, bar, stop)
    if (here := bytes_here(download)) != download.bytes:
        raise _Transient(f"the answer ended after {here} bytes")


def _receive(response: requests.Response, download: Download, bar: tqdm, stop: threading.Event) -> None:
    """Take what comes, no more of it than there should be, and no slower than `_LEAST_RATE`."""
    with open(download.part, "ab") as file:
        begun, before = time.monotonic(), file.tell()
        # `read1` hands over what has come; `iter_content` would lose up to a block when the connection ends.
        while block := response.raw.read1(_BLOCK_BYTES):
            file.write(block)
            file.flush()  # to the disk's cache: it outlives a killed process
            with bar.get_lock():
                bar.update(len(block))
            if stop.is_set():
                raise CancelledError
            if file.tell() > download.bytes:
                _restart(download, bar)
                raise _wrong(download, f"sends more than {download.bytes:,} bytes: another file")
            if (seconds := time.monotonic() - begun) > _WINDOW:
                if file.tell() - before < _LEAST_RATE * seconds:
                    raise _Transient(f"less than {_LEAST_RATE} bytes a second over {seconds:.0f} s")
                begun, before = time.monotonic(), file.tell()


def _complete(download: Download, bar: tqdm, stop: threading.Event) -> None:
    """Attempt until the file is whole; what comes further than all before, and is more than too slow, is no failure."""
    # Not as requests' adapter would use it: its waits could not be stopped, and it knows nothing of progress.
    retry, furthest = _RETRY, bytes_here(download)
    while True:
        try:
            return _attempt(download, bar, stop)
        except (_Transient, HTTPError, requests.RequestException) as error:
            if not isinstance(error, _PASSING) or isinstance(error, requests.exceptions.SSLError):
                raise _wrong(download, f"cannot be fetched ({error})") from error
            if (here := bytes_here(download)) > furthest + _LEAST_RATE * _WINDOW:
                retry = _RETRY
            furthest = max(furthest, here)
            # urllib3 repeats itself in its second argument.
            reason = error.args[0] if error.args else error
            if retry.total == 0:
                mend = f"Run `dvc repro` again to go on where it stopped, or correct {download.option}."
                raise UserError(f"{download.url}: failed {_TRIES} times in a row ({reason}). {mend}") from error
            retry = retry.increment()
            seconds = max(retry.get_backoff_time(), getattr(error, "seconds", 0.0))
            log.warning("%s; again in %.0f s", without_secrets(f"{download.url}: {reason}"), seconds)
            if stop.wait(seconds):
                raise CancelledError from error


def _wrong(download: Download, what: str) -> UserError:
    mend = f"Correct {download.option}, or put an intact {download.path.name} into {download.path.parent}."
    return UserError(f"{download.url}: {what}. {mend}")


def _checksum(download: Download, path: Path) -> str:
    """Return the checksum of a file, written as `Download.checksum` is."""
    algorithm = download.checksum.split(":")[0]
    with open(path, "rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
