"""The proof of kills without trainings: what a call's tree is, what a trial draws, how it goes on, what it claims."""

import argparse
import contextlib
import json
import os
import signal
import subprocess

import pytest

from benchmarks import measure
from proofs import kills, tree
from proofs.kills import Trial
from proofs.states import BARE, MAKE, Changes, States
from vlm_vqa.errors import UserError

KILL = {"signal": "SIGKILL", "victim": "python dvc repro", "moment": "any time", "stage": "train", "outlived": 1.0}


def call(tmp_path, command):
    return tree.Call(command, tmp_path, dict(os.environ), tmp_path / "terminal.txt")


def test_a_child_that_outlives_its_parent_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "OUTLIVES_BY", 0.5)
    with call(tmp_path, "sleep 60 & sleep 0.3; echo said") as one:
        assert "outlived its parent" in one.end(20) and "sleep 60" in one.end(20)
        assert one.text() == "said\n"
        left = one.processes()
    assert len(left) == 1
    left[0].wait(5)


def test_a_tree_in_sessions_of_its_own_is_one(tmp_path):
    with call(tmp_path, "setsid sleep 60 & sleep 60; true") as one:
        assert one.wait(lambda: len(one.victims()) == 2, 10)
        assert not [victim for victim in one.victims() if victim.pid == one.shell.pid]
        one.signal(signal.SIGKILL, None)
        assert one.end(10) is None and one.shell.returncode == -signal.SIGKILL


def test_the_shell_that_became_the_command_is_a_victim(tmp_path):
    with call(tmp_path, "sleep 60") as one:
        assert one.wait(lambda: [tree.name(victim) for victim in one.victims()] == ["sleep 60"], 10)
        one.signal(signal.SIGTERM, one.victims()[0])
        assert one.end(10) is None and one.shell.returncode == -signal.SIGTERM


def test_changes_are_counted(tmp_path):
    changes = Changes([tmp_path / "a", tmp_path])
    assert changes.seen() == 0
    (tmp_path / "a").write_text("x")
    assert changes.seen() == changes.seen() == 1


def stub(folder, monkeypatch):
    """States of a project of one command, `sh run`, that two kills hit and a third call finishes."""
    states = States.__new__(States)
    states.folder, states.launch, states.place, states.expected = folder, "cpu", folder / "trial", b"done"
    states.seconds = {"train": 0.3}
    script = "sleep 0.4; printf done > dvc.lock; echo \"Running stage 'train'\""
    monkeypatch.setattr(States, "call", lambda self, command: call(self.place, script))
    monkeypatch.setattr(States, "restore", lambda self, state: self.place.mkdir(exist_ok=True))
    monkeypatch.setattr(kills, "recorded", lambda *_: contextlib.nullcontext([]))
    return states


@pytest.mark.parametrize("content", ["done", "torn"])
def test_a_trial_compares_dvc_lock(tmp_path, monkeypatch, content):
    states = stub(tmp_path, monkeypatch)
    states.expected = b"other" if content == "torn" else b"done"
    trials = [kills.run(states, number, 7) for number in range(3)]
    assert sum(len(trial.kills) for trial in trials)
    for trial in trials:
        wrong = [problem for problem in trial.problems if "dvc.lock differs" in problem]
        assert bool(wrong) == (content == "torn") and trial.command in (BARE, MAKE)


def test_the_make_command_is_the_makefile_s(tmp_path):
    states = States.__new__(States)
    states.folder, states.place = tmp_path, tmp_path
    with states.call(MAKE) as one:
        words = subprocess.run(["ps", "-o", "args=", "-p", str(one.shell.pid)], capture_output=True, text=True).stdout
    assert "vlm-vqa unlock --quiet && dvc repro" in words


def test_it_goes_on_where_it_stopped_and_claims_what_was_run(tmp_path, monkeypatch, capsys):
    found = {}
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(
        measure, "write", lambda name, claims, details, data: found.update(claims=claims, details=details)
    )
    monkeypatch.setattr(kills, "States", lambda folder, launch: argparse.Namespace(launch=launch))

    def run(states, number, seed):
        problems = ["dvc.lock differs"] if number == 3 else []
        return Trial(seed, number, states.launch, 0, BARE, True, [dict(KILL)], problems=problems)

    monkeypatch.setattr(kills, "run", run)
    options = ["--folder", str(tmp_path), "--launches", "cpu", "cpu-ddp", "--kills"]
    kills.main([*options, "3"])
    assert [claim.met for claim in found["claims"]] == [True] * 4 and "3 of 3 kills" in capsys.readouterr().out
    kills.main([*options, "5"])
    assert len(found["details"]["kills"]) == 5 and "FAILED: trial 3 (seed 0, cpu-ddp)" in capsys.readouterr().out
    assert [claim.met for claim in found["claims"]] == [True, False, True, True]
    assert [json.loads(line)["number"] for line in (tmp_path / "kills.jsonl").read_text().splitlines()] == [*range(5)]
    with pytest.raises(UserError, match="another --seed"):
        kills.main([*options, "5", "--seed", "1"])
    options[1] = str(tmp_path / "other")
    kills.main([*options, "7", "--seed", "1", "--also", str(tmp_path)])
    assert [trial["seed"] for trial in found["details"]["trials"]] == [1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("error", "faults"), [("ValueError: 1", 1), (kills.FSSPEC, 0)])
def test_a_traceback_is_a_fault_and_kept_but_fsspec_s_in_dvc_is_not(tmp_path, error, faults):
    states = States.__new__(States)
    states.folder = tmp_path
    (tmp_path / "said").write_text(f'Traceback (most recent call last):\n  File "a", line 1\n    b()\n{error}\nmore\n')
    with call(tmp_path, "cat said") as one:
        problems = kills.after(states, one, kill := dict(KILL))
    assert len(problems) == faults == len(list(tmp_path.glob("terminal-*.txt"))), problems
    assert kill["fsspec"] == 1 - faults
