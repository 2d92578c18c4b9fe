"""`python -m proofs`: what it lists, runs and refuses, and how a proof ends."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import measure, vqav2
from benchmarks.measure import Claim
from proofs import __main__ as command
from vlm_vqa.errors import UserError

ROOT = Path(__file__).parents[2]


def test_it_lists_every_proof_with_its_first_line(capsys):
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(command.KNOWN)
    assert all(len(line.split()) > 5 for line in lines)


def test_proofs_use_neither_stages_nor_tests():
    for path in (ROOT / "proofs").glob("*.py"):
        assert "from stages" not in path.read_text() and "from tests" not in path.read_text(), path


def test_an_unknown_name_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["kills", "nonsense"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "nonsense" in error and all(name in error for name in command.KNOWN)


def test_a_missed_claim_and_a_failure_are_said_last(tmp_path, monkeypatch, capsys):
    claims = [asdict(Claim("kills survived", 0.9, 0.9, 0.9, target=1.0)) | {"met": True}]
    (tmp_path / "kills.json").write_text(json.dumps({"machine": {}, "data": {}, "claims": claims, "details": {}}))
    monkeypatch.setattr(command, "run", lambda name, package: "" if name == "kills" else "no memory.")
    assert command.main(["kills", "real_shape"], tmp_path) == 1
    error = capsys.readouterr().err
    assert "MISSED: kills survived" in error and "FAILED: real_shape: no memory." in error


@pytest.mark.parametrize("name", command.KNOWN)
def test_options_that_are_not_there_are_refused(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"proofs.{name}").main(["--nonsense"])
    assert stop.value.code == 2 and f"python -m proofs.{name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in command.KNOWN if (measure.COMMITTED / f"{name}.json").exists()])
def test_every_result_says_what_it_is_of(name):
    content = json.loads((measure.COMMITTED / f"{name}.json").read_text())
    assert content["data"] and all(content["data"].values())
    origins = set(content["data"].values())
    for claim in content["claims"]:
        assert vqav2.DRAWN not in claim["what"].split() or vqav2.DRAWN in origins, claim["what"]
        assert " real " not in claim["what"] or vqav2.REAL in origins, claim["what"]


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_proved(tmp_path, monkeypatch):
    (tmp_path / "results").write_text("a file")
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    (tmp_path / vqav2.SAMPLE).mkdir()
    monkeypatch.setenv("VLM_VQA_SHARED_DATA", str(tmp_path))
    for name in command.KNOWN:
        options = ["--results", str(tmp_path / "results")] if name == "strategies" else []
        with pytest.raises(UserError, match="results cannot be written there"):
            importlib.import_module(f"proofs.{name}").main(options)


@pytest.mark.parametrize("name", ["learning", "masks", "rates", "seeds", "serving", "strategies"])
def test_before_make_repro_the_missing_stage_is_named(name, tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_bytes((ROOT / "presets/small.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Run `vlm-vqa repair (fetch-vqav2|extract-features|train)`"):
        importlib.import_module(f"proofs.{name}").main([])
