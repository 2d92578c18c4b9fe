"""HELM's page: a copy with its pictures, that asks no other machine and is shown to this one alone."""

import re
import threading
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer

import pytest

from vlm_vqa.cli import main
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.helm.run import RESULTS, SCENARIO
from vlm_vqa.evaluation.helm.web import _Handler, serve, write_page

RUN = "vqa:model=a_b,groups=vqa_base"


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """What a finished evaluation leaves, but for the contents."""
    monkeypatch.chdir(tmp_path)
    for file in (RESULTS / RUN / "scenario_state.json", RESULTS / "costs.json",
                 SCENARIO / "valid" / "images" / "COCO_val2014_000000000001.jpg"):  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")


def test_the_copy_has_the_pictures_and_replaces_an_earlier_one(finished, tmp_path):
    assert write_page() == "#/runs/vqa%3Amodel%3Da_b%2Cgroups%3Dvqa_base"
    page = tmp_path / "helm-web"
    assert (page / "benchmark_output/scenarios/vqa/valid/images/COCO_val2014_000000000001.jpg").is_file()
    assert (page / "benchmark_output/runs/vlm-vqa" / RUN / "scenario_state.json").is_file()
    (page / "of-yesterday").touch()
    # What an interrupted call leaves.
    (tmp_path / "helm-web.new").mkdir()
    (tmp_path / "helm-web.new" / "half").touch()
    write_page()
    assert not (page / "of-yesterday").exists() and not (page / "half").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark_output", "helm-web"]


def test_the_copy_names_no_other_machine_to_fetch_from(finished, tmp_path):
    write_page()
    index = (tmp_path / "helm-web" / "index.html").read_text()
    assert index.index("Content-Security-Policy") < index.index("<script")
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', index)
    code = "".join(path.read_text() for path in (tmp_path / "helm-web" / "assets").glob("*.js"))
    assert "fetch(" in code and not re.findall(r"""fetch\(["'`]https?://""", code)


@pytest.mark.parametrize("lost", ["costs.json", f"{RUN}/scenario_state.json", "../../scenarios/vqa"])
def test_without_a_finished_evaluation_it_says_what_to_do(finished, lost, capsys):
    (RESULTS / lost).rename("lost")
    assert main(["helm-web", "--no-serve"]) == 2
    error = capsys.readouterr().err
    assert "no finished HELM evaluation" in error and "`dvc repro --single-item --force helm-eval`" in error


def test_the_server_is_heard_on_this_machine_alone_and_keeps_nothing_in_caches(tmp_path, capsys):
    (tmp_path / "config.js").write_text("1;")
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Handler(*args, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(f"{address}/config.js") as answer:
            assert answer.headers["Cache-Control"] == "no-cache"
        assert capsys.readouterr().err == ""
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/absent.jpg")
        assert '"GET /absent.jpg HTTP/1.1" 404' in capsys.readouterr().err
        with pytest.raises(UserError, match=f"port {server.server_port} cannot be used .*--port"):
            serve("", server.server_port)
        server.shutdown()
    with pytest.raises(UserError, match="port 70000 cannot be used"):
        serve("", 70000)


def test_serve_listens_on_loopback(monkeypatch):
    bound = []

    def refuse(address, handler):
        bound.append(address)
        raise OSError("enough seen")

    monkeypatch.setattr("vlm_vqa.evaluation.helm.web.ThreadingHTTPServer", refuse)
    with pytest.raises(UserError, match="enough seen"):
        serve("", 8000)
    assert bound == [("127.0.0.1", 8000)]
