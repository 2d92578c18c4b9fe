"""Large files over HTTP: resumed where they stopped, retried, and in place only when their checksum is right.

Beside a file NAME lie `NAME.part` (its first bytes), `NAME.part.json` (which of the server's files these are of) and
`NAME.verified.json` (the checksum that it had, and its size and time then). Each of them can be deleted at any time.
"""

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import requests
import urllib3
from tqdm import tqdm

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import write_json
from vlm_vqa.secrets import without_secrets

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# So many failures in a row that brought nothing new end the download; the waits between them add up to two minutes.
_ATTEMPTS = 8
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 60.0
# Seconds to connect, and seconds without a byte.
_TIMEOUT = (20.0, 30.0)
# Slower than this over a window, an attempt has failed: a byte a second would be progress for ever.
_LEAST_RATE = 1024
_WINDOW = 30.0
# Where no server tells a size; VQAv2's largest archive has 13.5 GB.
_MOST_BYTES = 20 * 2**30
_BLOCK_BYTES = 2**20
# Answers that may be others a minute later.
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Download:
    """A file that is wanted."""

    url: str
    path: Path
    checksum: str
    """`md5:` or `sha256:`, and the digest in hex."""
    option: str
    """The parameter that the URL comes from, for messages."""

    def beside(self, ending: str) -> Path:
        """Return the path of the file beside `path` with this ending."""
        return self.path.with_name(self.path.name + ending)


class _Transient(Exception):
    """An attempt has failed in a way that may pass; `seconds` is how long the server asks to wait."""

    def __init__(self, reason: str, seconds: float = 0.0):
        super().__init__(reason)
        self.seconds = seconds


class _Slow(_Transient):
    """What has come is kept, but is no progress."""


class _Stopped(Exception):
    """Another file has failed, or a person stops the program; what has come so far is kept."""


def is_verified(download: Download) -> bool:
    """Tell whether the file is there with the right checksum; it is read only if it has changed since it was checked.

    A file with another checksum is deleted.
    """
    if not download.path.is_file():
        return False
    if _read_json(download.beside(".verified.json")) == _facts(download):
        return True
    log.info("checking %s", download.path)
    algorithm, digest = download.checksum.split(":")
    with open(download.path, "rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != digest:
        log.warning("%s: deleted, its %s is %s and not %s", download.path, algorithm, found, digest)
        download.path.unlink()
        return False
    write_json(download.beside(".verified.json"), _facts(download))
    return True


def bytes_here(download: Download) -> int:
    """Return how many bytes of an unfinished file are there."""
    part = download.beside(".part")
    return part.stat().st_size if part.is_file() else 0


def remove(download: Download) -> None:
    """Delete the file and what lies beside it."""
    for ending in ("", ".verified.json", ".part", ".part.json"):
        download.beside(ending).unlink(missing_ok=True)


def remote_size(download: Download) -> int | None:
    """Return the file's size in bytes as the server tells it, or None where it does not.

    Raises:
        UserError: there is no such file, or the server fails too often.
    """

    def ask() -> int | None:
        with requests.Session() as session:
            headers = {"Accept-Encoding": "identity"}
            response = session.head(download.url, headers=headers, timeout=_TIMEOUT, allow_redirects=True)
            # A server need not know HEAD.
            if response.status_code in (405, 501):
                return None
            _check_status(response, download)
            return _length(response)

    return _with_retries(ask, download, threading.Event())


def fetch_all(downloads: Mapping[Download, int | None], at_once: int) -> None:
    """Download files, `at_once` of them at a time, and check them. The first failure stops all, to be resumed.

    Args:
        downloads: the size of each in bytes, as `remote_size` gives it.
        at_once: threads, one file each.

    Raises:
        UserError: a file is not there, has the wrong checksum twice, or the server fails too often.
    """
    stop, lock = threading.Event(), threading.Lock()
    total, here = sum(size or 0 for size in downloads.values()), sum(map(bytes_here, downloads))
    with (
        ThreadPoolExecutor(at_once) as pool,
        tqdm(desc="download", total=total, initial=here, unit="B", unit_scale=True, unit_divisor=1024) as bar,
    ):

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        futures = [pool.submit(_fetch, download, advance, stop) for download in downloads]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # On an error, and on Ctrl-C, which reaches this thread alone.
            stop.set()
        for future in done:
            future.result()


def _fetch(download: Download, advance: Callable[[int], None], stop: threading.Event) -> None:
    """Download one file; wrong bytes are thrown away and fetched once more."""
    download.path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        part = _bring(download, advance, stop)
        found = part.checksum()
        if found == download.checksum:
            os.replace(part.path, download.path)
            write_json(download.beside(".verified.json"), _facts(download))
            download.beside(".part.json").unlink()
            log.info("%s: complete, %s", download.path.name, found)
            return
        url = without_secrets(download.url)
        log.warning("%s: thrown away, its checksum is %s and not %s", url, found, download.checksum)
        advance(-part.size)
        part.path.unlink()
    raise UserError(
        f"{download.url}: has checksum {found} instead of {download.checksum}, twice. It is another file, or damaged on "
        f"the way: correct {download.option}, or put an intact {download.path.name} into {download.path.parent}."
    )


def _bring(download: Download, advance: Callable[[int], None], stop: threading.Event) -> "_Part":
    """Return the part that holds all of the file; what it is worth, its checksum says."""
    part = _Part(download)
    with requests.Session() as session:
        _with_retries(partial(_attempt, session, part, advance, stop), download, stop, lambda: part.furthest)
    return part


def _attempt(session: requests.Session, part: "_Part", advance: Callable[[int], None], stop: threading.Event) -> None:
    """Ask for what is missing of a file and take it as far as it comes."""
    if part.is_complete():
        return
    if stop.is_set():
        raise _Stopped
    headers = {"Accept-Encoding": "identity", **part.range_headers()}
    with session.get(part.download.url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == 416 or (response.status_code == 206 and not part.goes_on_with(response)):
            advance(-part.size)
            part.restart(None)
            raise _Transient("the file has changed on the server; starting again")
        _check_status(response, part.download)
        if response.status_code != 206:
            # The server sends the whole file: it knows no ranges, or the file has changed, or this is the start.
            advance(-part.size)
            part.restart(response)
        begun, before, most = time.monotonic(), part.size, part.server.get("bytes") or _MOST_BYTES
        with open(part.path, "ab") as file:
            # `read1` hands over what has come; `iter_content` would lose up to a block when the connection ends.
            while block := response.raw.read1(_BLOCK_BYTES):
                part.append(file, block)
                advance(len(block))
                if stop.is_set():
                    raise _Stopped
                if part.size > most:
                    advance(-part.size)
                    part.restart(None)
                    raise UserError(
                        f"{part.download.url}: sends more than the {most:,} bytes that there should be. It is another file: "
                        f"correct {part.download.option}."
                    )
                if (seconds := time.monotonic() - begun) > _WINDOW:
                    if part.size - before < _LEAST_RATE * seconds:
                        raise _Slow(f"less than {_LEAST_RATE} bytes a second over {seconds:.0f} s")
                    begun, before = time.monotonic(), part.size
    # Where no length was told, urllib3 still knows the end of a chunked answer from a broken connection.
    part.server["bytes"] = part.server.get("bytes") or part.size
    if not part.is_complete():
        raise _Transient(f"the answer ended after {part.size} bytes")


class _Part:
    """The first bytes of a file, the hash over them, and what the server said about the file when they came."""

    def __init__(self, download: Download):
        self.download = download
        self.path = download.beside(".part")
        self._start()
        server = _read_json(download.beside(".part.json"))
        if self.path.is_file() and server is not None and server.get("url") == without_secrets(download.url):
            self.server = server
            with open(self.path, "rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    self._count(block)
            log.info("%s: going on at byte %d", download.path.name, self.size)
        self.furthest = self.size
        """Most bytes there ever were: only more than that is progress."""

    def is_complete(self) -> bool:
        """Tell whether there is as much as the server has told."""
        return self.size == self.server.get("bytes")

    def range_headers(self) -> dict[str, str]:
        """Return what asks for the rest of the same file, and for the whole of another one (RFC 9110, 13.1.5)."""
        if self.size == 0:
            return {}
        etag, modified = self.server.get("etag"), self.server.get("last_modified")
        # Weak tags (W/) do not stand for equal bytes.
        same = etag if etag and not etag.startswith("W/") else modified
        return {"Range": f"bytes={self.size}-", **({"If-Range": same} if same else {})}

    def goes_on_with(self, response: requests.Response) -> bool:
        """Tell whether a partial answer begins where this ends, and is of the same file."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != self.size:
            return False
        told = {**_told(response), "bytes": int(found[2])}
        return all(told[key] is None or self.server.get(key) in (None, told[key]) for key in told)

    def restart(self, response: requests.Response | None) -> None:
        """Throw everything away, to begin with the whole answer in `response` or with the next one."""
        with open(self.path, "wb"):
            pass
        self._start()
        if response is not None:
            self.server = {"url": without_secrets(self.download.url), "bytes": _length(response), **_told(response)}
        write_json(self.download.beside(".part.json"), self.server)

    def append(self, file: Any, block: bytes) -> None:
        """Write bytes through to the disk's cache, so that they outlive a killed process."""
        file.write(block)
        file.flush()
        self._count(block)
        self.furthest = max(self.furthest, self.size)

    def checksum(self) -> str:
        """Return the checksum so far, written as `Download.checksum` is."""
        return f"{self._hash.name}:{self._hash.hexdigest()}"

    def _start(self) -> None:
        self.size = 0
        self.server: dict[str, Any] = {}
        self._hash = hashlib.new(self.download.checksum.split(":")[0])

    def _count(self, block: bytes) -> None:
        self.size += len(block)
        self._hash.update(block)


def _with_retries(
    attempt: Callable[[], Result], download: Download, stop: threading.Event, furthest: Callable[[], int] = lambda: 0
) -> Result:
    """Call until it succeeds; `furthest` says how far all attempts have come, and what comes further is no failure."""
    failures, reached = 0, furthest()
    while True:
        try:
            return attempt()
        except requests.exceptions.SSLError as error:
            raise UserError(f"{download.url}: {error}. Correct {download.option} or the certificates.") from error
        except (_Transient, requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            progress = furthest() > reached and not isinstance(error, _Slow)
            failures, reached = (0 if progress else failures) + 1, furthest()
            # urllib3 repeats itself in its second argument.
            reason = error.args[0] if error.args else error
            if failures == _ATTEMPTS:
                raise UserError(
                    f"{download.url}: failed {failures} times in a row ({reason}). Run `dvc repro` again to go on where it "
                    f"stopped, or correct {download.option}."
                ) from error
            seconds = max(_FIRST_WAIT * 2 ** (failures - 1), getattr(error, "seconds", 0.0))
            told = without_secrets(f"{download.url}: {reason}")
            log.warning("%s; again in %.0f s", told, min(seconds, _LONGEST_WAIT))
            if stop.wait(min(seconds, _LONGEST_WAIT)):
                raise _Stopped from error
        except requests.RequestException as error:
            raise UserError(f"{download.url}: cannot be fetched ({error}). Correct {download.option}.") from error


def _check_status(response: requests.Response, download: Download) -> None:
    """Raise for an answer without the file: `_Transient` where it may come later."""
    status = f"the server answers {response.status_code} ({response.reason})"
    if response.status_code in _TRY_AGAIN:
        asked = response.headers.get("Retry-After", "")
        raise _Transient(status, float(asked) if asked.isdecimal() else 0.0)
    if response.status_code not in (200, 206):
        raise UserError(
            f"{download.url}: {status}. Correct {download.option}, or put {download.path.name} into "
            f"{download.path.parent} yourself."
        )


def _told(response: requests.Response) -> dict[str, str | None]:
    """Return by what a server tells one version of a file from another."""
    return {"etag": response.headers.get("ETag"), "last_modified": response.headers.get("Last-Modified")}


def _length(response: requests.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _facts(download: Download) -> dict[str, Any]:
    status = download.path.stat()
    return {"checksum": download.checksum, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file, or None where there is none: a file that was being written when its process died."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
