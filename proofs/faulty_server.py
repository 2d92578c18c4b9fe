"""A server on loopback that hands out files from memory and misbehaves as it is told."""

import contextlib
import http.server
import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

# A client that never gives up must not go on for ever.
_MOST_GETS = 100


# The command's name before the package is imported, as Python itself sets it.
_FETCH = """
import json, runpy, sys
sys.argv = sys.argv[1:]
import vlm_vqa.fetch.sources.official_archives as archives
archives.ARCHIVES = json.load(open(sys.argv.pop()))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def fetch_command(checksums: Path) -> list[str]:
    """Return the command of stage fetch-vqav2 on other archives; a JSON file holds their checksums and sizes by name."""
    stage = Path(__file__).parents[1] / "stages" / "fetch_vqav2.py"
    return [sys.executable, "-c", _FETCH, str(stage), str(checksums)]


class Request(NamedTuple):
    """What a client asked for: `start` is that of a range, or None."""

    method: str
    name: str
    start: int | None


class FaultyServer:
    """Serves `files` by the last part of the path. Ranges are known, as S3 knows them.

    `faults[name]` are what happens to the next GETs of a file, in turn: a status code; `drop` (the connection ends after
    half of what was asked for), `drip` (a few bytes a second), `endless` (no length, and no end),
    `stall` (nothing more comes after half for a minute), `wrong` (as many bytes, but others);
    an address (a redirect to it).
    `always[name]` happens after those, for ever.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files = dict(files)
        self.faults: defaultdict[str, list[Any]] = defaultdict(list)
        self.always: dict[str, Any] = {}
        self.ranges = True
        self.retry_after = "0"
        self.requests: list[Request] = []
        self.authorizations: set[str | None] = set()
        self.sent: Counter[str] = Counter()
        self.release = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"outer": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def gets(self, name: str | None = None) -> list[Request]:
        return [one for one in self.requests if one.method == "GET" and name in (None, one.name)]

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers one connection as its `FaultyServer` says."""

    outer: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rsplit("/", 1)[-1]
        self.outer.authorizations.add(self.headers.get("Authorization"))
        asked = self.headers.get("Range")
        self.outer.requests.append(Request("GET", name, int(asked[6:-1]) if asked else None))
        if len(self.outer.gets()) > _MOST_GETS:
            return self._status(410)
        fault = self.outer.faults[name].pop(0) if self.outer.faults[name] else self.outer.always.get(name)
        if isinstance(fault, int):
            return self._status(fault)
        if fault and "://" in fault:
            return self._status(302, fault)
        data, start = self.outer.files[name], 0
        if fault == "endless":
            self.close_connection = True
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while not self.outer.release.is_set():
                    self.wfile.write(bytes(2**16))
            return None
        if asked and self.outer.ranges:
            start = int(asked[6:-1])
            if start >= len(data):
                return self._status(416)
        self._headers(206 if start else 200, data, start)
        self._body(name, data[start:], fault)

    def _headers(self, status: int, data: bytes, start: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()

    def _body(self, name: str, data: bytes, fault: Any) -> None:
        if fault == "wrong":
            data = bytes(len(data))
        if fault == "drip":
            with contextlib.suppress(OSError):
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    if self.outer.release.wait(0.02):
                        break
            return
        part = data if fault in (None, "wrong") else data[: len(data) // 2]
        self.wfile.write(part)
        self.wfile.flush()
        self.outer.sent[name] += len(part)
        if fault == "stall":
            self.outer.release.wait(60.0)
        self.close_connection = fault is not None

    def _status(self, status: int, location: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if location:
            self.send_header("Location", location)
        self.send_header("Retry-After", self.outer.retry_after)
        self.end_headers()
