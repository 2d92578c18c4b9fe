"""HELM's own web page of the last evaluation, pictures included, shown to this machine alone."""

import contextlib
import functools
import json
import shutil
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.helm.run import OUTPUT, RESULTS, SCENARIO, SUITE

PAGE = Path("helm-web")

# What HELM's page would ask other machines for: a list of HELM's public leaderboards, and its icon.
_ELSEWHERE = {
    "https://crfm.stanford.edu/helm/project_metadata.json": "data:application/json,[]",
    "https://crfm.stanford.edu/helm/helm.svg": "data:,",
}
# Whatever a page, a question or an answer may name: the browser asks nobody but the server that the page came from.
_POLICY = "default-src 'self'; connect-src 'self' data:; img-src 'self' data:; style-src 'self' 'unsafe-inline'"


def write_page() -> str:
    """Copy HELM's page, its results and their pictures to `PAGE`, in the place of an earlier copy.

    `helm-server --export-path` leaves the pictures out. Any web server can show the copy. Return its page of the run's
    questions and answers. UserError if there is no finished evaluation.
    """
    runs = sorted(RESULTS.glob("*/scenario_state.json"))
    # The last that helm-summarize writes.
    if len(runs) != 1 or not (RESULTS / "costs.json").is_file() or not SCENARIO.is_dir():
        raise UserError(
            f"{RESULTS}: no finished HELM evaluation here. Run `dvc repro` in the project's folder; where it finds "
            "nothing to do (after `dvc pull`, or HELM's output was removed): `dvc repro --single-item --force helm-eval`."
        )
    new = PAGE.with_name(f"{PAGE.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(Path(str(resources.files("helm.benchmark.static_build") / "index.html")).parent, new)
    for part in (RESULTS, SCENARIO):
        shutil.copytree(part, new / "benchmark_output" / part.relative_to(OUTPUT))
    settings = {"BENCHMARK_OUTPUT_BASE_URL": "benchmark_output", "SUITE": SUITE, "PROJECT_ID": "lite"}
    lines = [f"window.{name} = {json.dumps(value)};\n" for name, value in settings.items()]
    (new / "config.js").write_text("".join(lines), encoding="utf-8")
    for path in (new / "index.html", *new.glob("assets/*.js")):
        _keep_home(path)
    shutil.rmtree(PAGE, ignore_errors=True)
    new.rename(PAGE)
    return f"#/runs/{quote(runs[0].parent.name)}"


def serve(first: str, port: int) -> None:
    """Show `PAGE` on this machine alone until Ctrl-C, and print the address of its part `first`.

    UserError where the port is taken, or not for us; 0 is any free one.
    """
    try:
        server = _Server(("127.0.0.1", port), functools.partial(_Handler, directory=PAGE))
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} cannot be used ({error}): name another one by --port") from error
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/{first} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def _keep_home(path: Path) -> None:
    """Take the addresses of other machines out of a file of HELM's page, and forbid the browser any others."""
    text = path.read_text(encoding="utf-8")
    for address, instead in _ELSEWHERE.items():
        text = text.replace(address, instead)
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}" />'
    path.write_text(text.replace("<head>", f"<head>{policy}", 1) if path.suffix == ".html" else text, encoding="utf-8")


class _Handler(SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        # Names are the same after every evaluation: the browser must ask again, or it shows yesterday's answers.
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Print what failed, and nothing of what went well."""
        if int(code) >= 400:
            super().log_request(code, size)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that goes on to another page hangs up in the middle of an answer.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
