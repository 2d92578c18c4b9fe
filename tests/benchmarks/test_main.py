"""`python -m benchmarks`: what it runs, what it refuses, table, picture and exit code."""

import json
from dataclasses import asdict

import pytest
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import vqav2
from benchmarks.measure import Claim
from vlm_vqa.errors import UserError

MACHINE = {
    "cpu": "Some CPU", "cores": 2, "threads": 2, "cpu_capability": "AVX2", "memory_gib": 24.0, "gpu": None, "torch": "9.9",
    "transformers": "8.8",
}  # fmt: skip
MET = Claim("whole step", 9.0, 8.5, 9.5, 8.0)
MISSED = Claim("logits and loss", 0.5, 0.5, 0.5, 0.333, at_most=True, note="1 against 2 MiB")
OPEN = Claim("padding alone", 1.1, 1.0, 1.2)


@pytest.fixture
def results(tmp_path):
    """Return a function that writes made-up results and returns their folder."""

    def write(**claims):
        for name, some in claims.items():
            content = {"machine": MACHINE, "claims": [asdict(one) | {"met": one.met} for one in some], "details": {}}
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.fixture
def no_runs(monkeypatch):
    """Return the list of the benchmarks that would have been run."""
    names = []
    monkeypatch.setattr(command, "run", lambda name: names.append(name) or "")
    return names


@pytest.mark.parametrize("arguments", [["nonsense"], ["memory", "nonsense"]])
def test_an_unknown_name_is_refused_with_the_known_ones(arguments, no_runs, results, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments, results(memory=[MET]))
    assert stop.value.code == 2 and not no_runs
    error = capsys.readouterr().err
    assert "nonsense" in error and all(name in error for name in command.KNOWN)


def test_draw_runs_nothing(no_runs, results, capsys):
    folder = results(training_step=[MET, OPEN], scorer=[MET])
    assert command.main(["--draw"], folder) == 0
    assert not no_runs
    shown = capsys.readouterr().out
    assert shown.count("Some CPU") == 1 and shown.index("training_step") < shown.index("scorer")
    assert "whole step" in shown and "padding alone" in shown and "torch 9.9" in shown
    with Image.open(folder / "speed.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(100_000)) > 10


def test_a_missed_target_shows_after_everything_else(no_runs, results, capsys):
    folder = results(memory=[MISSED], scorer=[MET])
    assert command.main(["--draw"], folder) == 1
    output = capsys.readouterr()
    assert "scorer" in output.out and "MISSED: logits and loss" in output.err
    assert (folder / "speed.png").is_file()


def test_a_target_is_judged_by_its_numbers_not_by_what_the_file_says(no_runs, results):
    folder = results(memory=[MISSED])
    path = folder / "memory.json"
    path.write_text(path.read_text().replace('"met": false', '"met": true'))
    assert command.main(["--draw"], folder) == 1


def test_features_are_known_but_not_run_by_default(no_runs, results):
    folder = results(memory=[MET])
    assert command.main([], folder) == 0
    assert no_runs == list(command.DEFAULT) and "features" not in no_runs
    no_runs.clear()
    assert command.main(["features", "memory"], folder) == 0
    assert no_runs == ["features", "memory"]


def test_a_failing_benchmark_does_not_hide_the_others(monkeypatch, results, capsys):
    monkeypatch.setattr(command, "run", lambda name: "no memory." if name == "memory" else "")
    assert command.main([], results(scorer=[MET])) == 1
    output = capsys.readouterr()
    assert "whole step" in output.out and "FAILED: memory: no memory." in output.err


def test_a_benchmark_is_a_process_of_its_own(monkeypatch, tmp_path, capfd):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "memory.py").write_text("raise SystemExit(3)")
    (tmp_path / "benchmarks" / "threads.py").write_text("import os; os.kill(os.getpid(), 9)")
    (tmp_path / "benchmarks" / "features.py").write_text("raise SystemExit('features: error: this.\\nand so on')")
    (tmp_path / "benchmarks" / "small_run.py").write_text("raise ValueError('a fault')")
    (tmp_path / "benchmarks" / "scorer.py").write_text("print('ran')")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert command.run("memory") == "it ended with 3."
    assert command.run("threads") == "it was killed by SIGKILL (mostly for want of memory)."
    assert command.run("features") == "this."
    assert command.run("small_run") == "ValueError: a fault"
    assert command.run("scorer") == ""
    assert "ValueError: a fault" in capfd.readouterr().err


def test_a_damaged_result_is_named(no_runs, results):
    folder = results(memory=[MET], scorer=[MET])
    for content in ("{", '{"claims": []}', '{"machine": {}, "claims": [{"what": "x"}]}', "[]"):
        (folder / "scorer.json").write_text(content)
        with pytest.raises(UserError, match=r"scorer\.json: damaged .*python -m benchmarks scorer"):
            command.main(["--draw"], folder)


def test_the_table_says_what_was_measured_with(no_runs, results, capsys):
    folder = results(memory=[MET], scorer=[MET])
    path = folder / "scorer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": {"questions": vqav2.DRAWN}}))
    assert command.main(["--draw"], folder) == 0
    shown = capsys.readouterr().out
    assert "scorer (questions: drawn)" in shown and "memory (data: not said)" in shown


def test_nothing_measured_yet(no_runs, tmp_path, capsys):
    assert command.main(["--draw"], tmp_path) == 1
    assert "python -m benchmarks" in capsys.readouterr().err


def test_two_machines_are_both_named(results, no_runs, capsys):
    folder = results(memory=[MET], scorer=[MET])
    path = folder / "scorer.json"
    path.write_text(path.read_text().replace("Some CPU", "Other CPU"))
    assert command.main(["--draw"], folder) == 0
    shown = capsys.readouterr().out
    assert "Some CPU" in shown and "Other CPU" in shown
