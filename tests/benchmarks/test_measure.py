"""How a benchmark ends: in one line and the stages' exit codes where a person can mend it, else with a traceback."""

import errno
import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmarks
from benchmarks import measure, vqav2
from benchmarks.__main__ import KNOWN
from vlm_vqa.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("data/features: missing."), 2, "scorer: error: data/features: missing.\n"),
        (KeyboardInterrupt(), 130, "scorer: interrupted; results are as they were."),
        (ModuleNotFoundError("No module named 'torch'"), 2, "source .venv/bin/activate"),
        (MemoryError(), 2, "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 2, "memory ran out"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), 2, "'/tmp/x'. Make it writable or free some space"),
    ],
)  # fmt: skip
def test_what_a_person_can_mend_is_one_line(error, code, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/scorer.py"])
    with pytest.raises(SystemExit) as stop:
        benchmarks.end(type(error), error, None)
    shown = capsys.readouterr().err
    assert stop.value.code == code and words in shown and shown.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback(capsys):
    try:
        raise ValueError("the scorers differ")
    except ValueError as error:
        benchmarks.end(ValueError, error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", KNOWN)
def test_options_that_are_not_there_are_refused(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{name}").main(["--nonsense"])
    assert stop.value.code == 2 and f"python -m benchmarks.{name}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", ""])
def test_a_count_is_a_whole_number_from_one(value, capsys):
    parser = measure.parser("scorer", "Doc.\n\nMore.", rounds=3)
    assert (parser.parse_args([]).rounds, parser.parse_args(["--rounds", "2"]).rounds) == (3, 2)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([f"--rounds={value}"])
    assert stop.value.code == 2 and "no whole number from 1" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "results").write_text("a file")
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    # One that did not look would measure for minutes: these empty folders end it at once.
    for name in (vqav2.TEXT, vqav2.SAMPLE):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("VLM_VQA_SHARED_DATA", str(tmp_path))
    for name in KNOWN:
        with pytest.raises(UserError, match="results cannot be written there"):
            importlib.import_module(f"benchmarks.{name}").main([])


def test_programs_end_without_a_traceback(tmp_path):
    """After a mistake; and after Ctrl-C, which may come while libraries are imported."""
    (tmp_path / "vqav2-text").mkdir()
    environment = {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "PATH": "/usr/bin:/bin",
        "VLM_VQA_SHARED_DATA": str(tmp_path),
    }
    mistaken, stopped = (
        subprocess.Popen([sys.executable, "-m", *names], env=environment, stderr=subprocess.PIPE, text=True)
        for names in (("benchmarks.scorer",), ("benchmarks", "scorer"))
    )
    time.sleep(1.5)
    stopped.send_signal(signal.SIGINT)
    for process, code, words in ((mistaken, 2, "questions.json: cannot be read"), (stopped, 130, "interrupted")):
        _, shown = process.communicate(timeout=300)
        assert process.returncode == code and words in shown and "Traceback" not in shown, shown
