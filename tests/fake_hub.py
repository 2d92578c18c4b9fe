"""A Hugging Face hub on this machine: folders served as huggingface_hub asks for them, with tokens, gates and faults.

It speaks what the real one does to the libraries used here: repository information, file trees, `resolve` with a redirect of
large files to a storage host (another host name, so that a token must not follow), byte ranges, and its error headers. It
takes new repositories and commits, of files with their content or uploaded as git LFS has it.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import datasets
import huggingface_hub
import pytest

from vlm_vqa.fetch.contract import image_name
from vlm_vqa.fetch.sources.official_layout import OFFICIAL

TOKEN = "secret-hf_0123456789abcdefTOKEN"
"""The one token that may read gated and private repositories."""
STRANGER = "secret-hf_of_somebody_else"
"""A token that the hub knows, of an account that has accepted no licence."""
LARGE = (".safetensors", ".parquet", ".bin", ".model")


class Request(NamedTuple):
    method: str
    path: str
    authorization: str | None
    span: str | None


@dataclass
class Hosted:
    """A repository: its files at its one commit."""

    folder: Path
    revision: str
    gated: bool = False
    private: bool = False


@dataclass
class FakeHub:
    """What is served, what was asked for, and how to be unkind."""

    port: int = 0
    hosted: dict[str, Hosted] = field(default_factory=dict)
    """By API name: `models/owner/name` or `datasets/owner/name`."""
    requests: list[Request] = field(default_factory=list)
    made_in: Path | None = None
    """Where repositories that `TOKEN` makes lie."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256, before a commit names them."""
    fault: Callable[[Request], str | int | None] = lambda request: None
    """What to do instead of answering: an HTTP status, or `drop`: cut the answer in its middle."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked_for(self, part: str) -> list[Request]:
        return [request for request in self.requests if part in request.path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def log_message(self, *arguments):
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, self.headers.get("Authorization"), self.headers.get("Range"))
        self.hub.requests.append(request)
        self.cut = False
        match self.hub.fault(request):
            case int(status):
                return self._send(status, b"out of order")
            case "drop":
                self.cut = True
        if path.startswith("/upload/"):
            self.hub.uploads[path.removeprefix("/upload/")] = body
            return self._send(200, b"")
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._send_json({"objects": [
                {**entry, "actions": {"upload": {"href": f"http://localhost:{self.hub.port}/upload/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]})  # fmt: skip
        if path.startswith("/storage/"):
            name, file = path.removeprefix("/storage/").split("//")
            return self._send_file(self.hub.hosted[name], file)
        if path.startswith("/api/"):
            kind, owner, name, *rest = path.removeprefix("/api/").split("/")
            return self._describe(f"{kind}/{owner}/{name}", rest, "recursive=true" in self.path, body)
        before, after = path.strip("/").split("/resolve/")
        name = before if before.startswith("datasets/") else f"models/{before}"
        revision, file = after.split("/", 1)
        if self._may_pass(name, revision, content=True):
            self._resolve(name, file)

    def _may_pass(self, name: str, revision: str | None, content: bool) -> bool:
        """Refuse as the real hub does."""
        hosted = self.hub.hosted.get(name)
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}", f"Bearer {STRANGER}"):
            self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif hosted is None or (hosted.private and given != f"Bearer {TOKEN}"):
            self._send(404 if given else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", hosted.revision):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif content and hosted.gated and given != f"Bearer {TOKEN}":
            self._send(403 if given else 401, b"", {"X-Error-Code": "GatedRepo"})
        else:
            return True
        return False

    def _create(self, wanted: dict) -> None:
        name = f"models/{wanted['organization']}/{wanted['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(403 if self.headers.get("Authorization") else 401, b"{}")
        url = json.dumps({"url": f"{self.hub.url}/{name.removeprefix('models/')}"}).encode()
        if name in self.hub.hosted:
            return self._send(409, url)
        folder = self.hub.made_in / name
        folder.mkdir(parents=True)
        self.hub.hosted[name] = Hosted(folder, "0" * 40, private=wanted["visibility"] == "private")
        self._send(200, url)

    def _commit(self, hosted: Hosted, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    content = base64.b64decode(value["content"])
                case "lfsFile":
                    content = self.hub.uploads[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                case "deletedFile":
                    (hosted.folder / value["path"]).unlink()
                    continue
                case _:
                    continue
            (hosted.folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (hosted.folder / value["path"]).write_bytes(content)
        hosted.revision = hashlib.sha256(hosted.revision.encode()).hexdigest()[:40]
        url = f"{self.hub.url}/{hosted.folder.relative_to(self.hub.made_in / 'models')}/commit/{hosted.revision}"
        self._send_json({"commitUrl": url, "commitOid": hosted.revision})

    def _describe(self, name: str, rest: list[str], recursive: bool, body: bytes) -> None:
        what, revision, *place = [*rest, None, None][: max(len(rest), 2)]
        if not self._may_pass(name, revision, content=False):
            return
        hosted = self.hub.hosted[name]
        if what in ("preupload", "commit") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(403, b"{}")
        elif what == "preupload":
            named = [Path(entry["path"]) for entry in json.loads(body)["files"]]
            self._send_json({"files": [
                {"path": str(path), "uploadMode": "lfs" if path.suffix in LARGE else "regular", "shouldIgnore": False}
                for path in named
            ]})  # fmt: skip
        elif what == "commit":
            self._commit(hosted, [json.loads(line) for line in body.splitlines()])
        elif what in (None, "revision"):
            siblings = [{"rfilename": entry["path"]} for entry in self._tree(hosted) if entry["type"] == "file"]
            owner_name = name.split("/", 1)[1]
            self._send_json({"id": owner_name, "sha": hosted.revision, "siblings": siblings, "private": hosted.private,
                             "gated": "manual" if hosted.gated else False, "tags": [], "downloads": 0, "likes": 0,
                             "lastModified": "2024-01-01T00:00:00.000Z", "disabled": False})  # fmt: skip
        elif what == "tree":
            folder = "/".join(place)
            inside = [entry for entry in self._tree(hosted) if entry["path"].startswith(f"{folder}/" if folder else "")]
            deep = [entry for entry in inside if recursive or "/" not in entry["path"].removeprefix(folder).strip("/")]
            self._send_json(deep)
        elif what == "paths-info":
            paths = json.loads(body)["paths"]
            self._send_json([entry for entry in self._tree(hosted) if entry["path"] in paths])
        else:
            self._send(404, b"")

    def _tree(self, hosted: Hosted) -> Iterator[dict]:
        for path in sorted(hosted.folder.rglob("*")):
            name = path.relative_to(hosted.folder).as_posix()
            if path.is_dir():
                yield {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            else:
                size = path.stat().st_size
                entry = {"type": "file", "oid": _etag(path)[:40], "size": size, "path": name}
                if path.suffix in LARGE:
                    entry["lfs"] = {"oid": _etag(path), "size": size, "pointerSize": 134}
                yield entry

    def _resolve(self, name: str, file: str) -> None:
        hosted = self.hub.hosted[name]
        path = hosted.folder / file
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hosted.revision})
        elif path.suffix in LARGE:
            etag = _etag(path)
            where = f"http://localhost:{self.hub.port}/storage/{name}//{file}"
            self._send(302, b"", {"Location": where, "X-Repo-Commit": hosted.revision, "X-Linked-ETag": f'"{etag}"',
                                  "X-Linked-Size": str(path.stat().st_size)})  # fmt: skip
        else:
            self._send_file(hosted, file)

    def _send_file(self, hosted: Hosted, file: str) -> None:
        path = hosted.folder / file
        size = path.stat().st_size
        headers = {"X-Repo-Commit": hosted.revision, "ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes"}
        first, last, status = 0, size - 1, 200
        if self.headers.get("Range"):
            asked_first, asked_last = self.headers["Range"].removeprefix("bytes=").split("-")
            first, last, status = int(asked_first), min(int(asked_last or last), last), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        with open(path, "rb") as content:
            content.seek(first)
            self._send(status, content.read(last - first + 1), headers)

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        if self.cut:
            self.close_connection = True


def _etag(path: Path) -> str:
    """A name for a file's content, made without reading it."""
    found = path.stat()
    return hashlib.sha256(f"{path} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Serve an empty hub on a free port until the block ends."""
    hub = FakeHub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        server.daemon_threads = True
        hub.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def environment(hub: FakeHub, home: Path) -> dict[str, str]:
    """Return the variables that lead another process to this hub, and to nothing of the user's."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}


def lead_to(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do in this process what `environment` does in another: these libraries read the variables when they are imported."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "datasets"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub.HfFileSystem.clear_instance_cache()


# --- VQAv2 as a `datasets` repository --------------------------------------------------------------------------------

TEXT = datasets.Value("string")
INT = datasets.Value("int64")
ANSWERS = [{"answer": TEXT, "answer_confidence": TEXT, "answer_id": INT}]
# As lmms-lab/VQAv2's card lists them.
FEATURES = {
    "question_type": TEXT, "multiple_choice_answer": TEXT, "answers": ANSWERS, "image_id": INT, "answer_type": TEXT,
    "question_id": INT, "question": TEXT, "image": datasets.Image(),
}  # fmt: skip
CARD = """---
dataset_info:
  features:
  - {name: question, dtype: string}
  splits:
  - {name: train, num_bytes: 1, num_examples: 12}
  - {name: validation, num_bytes: 1, num_examples: 6}
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
---
# VQAv2
"""


def rows_of(folder):
    """{split: rows} of a folder in official layout."""
    rows = {}
    for split, files in OFFICIAL.items():
        questions = json.loads((folder / files.questions).read_text())["questions"]
        annotations = json.loads((folder / files.annotations).read_text())["annotations"]
        rows[split] = [
            {**annotation, **question, "image": {"bytes": file.read_bytes(), "path": file.name}}
            for question, annotation in zip(questions, annotations, strict=True)
            for file in [folder / files.images / image_name(files.image_name, question["image_id"])]
        ]
    return rows


def write_repository(
    folder, rows, features=None, rows_per_file=7, names="data/{split}-{index:05d}-of-{count:05d}.parquet"
):
    """Write rows as Parquet files; with seven rows each, three questions an image, images stand in two files."""
    for split, hub_split in (("train", "train"), ("val", "validation")):
        count = -(-len(rows[split]) // rows_per_file)
        for index in range(count):
            part = rows[split][index * rows_per_file :][:rows_per_file]
            path = folder / names.format(split=hub_split, index=index, count=count)
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(part, datasets.Features(features or FEATURES)).to_parquet(path)
    return folder
