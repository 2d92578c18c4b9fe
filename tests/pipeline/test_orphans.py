"""Nothing outlives the program that started it: not a stage its DVC, not HELM its stage."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vlm_vqa.pipeline import orphans

ROOT = Path(__file__).parents[2]

# What DVC does: a shell that runs a command and waits for it. The shell's second command keeps it from becoming the first.
STARTER = """
import os, subprocess, sys
os.environ.update(DVC_STAGE="train")
subprocess.Popen(["/bin/sh", "-c", f"{sys.executable} {sys.argv[1]}; true"]).wait()
"""
STAGE = """
import os, sys, time
from vlm_vqa.pipeline import orphans
orphans.end_with_parents(lambda: os._exit(7))
print(os.getpid(), *(process.name() for process in orphans.started_by()), flush=True)
time.sleep(60)
"""


@pytest.fixture
def started(tmp_path):
    """Return a function that starts a stage as a program of a given name would, and tells both processes."""
    processes = []

    def start(name: str, **environment: str) -> tuple[subprocess.Popen, psutil.Process, int]:
        (tmp_path / name).write_text(STARTER)
        (tmp_path / "stage.py").write_text(STAGE)
        starter = subprocess.Popen(
            [sys.executable, tmp_path / name, tmp_path / "stage.py"], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment,
        )  # fmt: skip
        pid, *watched = starter.stdout.readline().split()
        processes.extend([starter, psutil.Process(int(pid))])
        return starter, psutil.Process(int(pid)), len(watched)

    yield start
    for process in processes:
        if process.pid and (not isinstance(process, psutil.Process) or process.is_running()):
            process.kill()


def ended(process: psutil.Process, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and not orphans.gone(process):
        time.sleep(0.1)
    return orphans.gone(process)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_ends_with_the_dvc_that_started_it(started, number):
    dvc, stage, watched = started("dvc")
    assert watched == 2, "the shell and dvc"
    assert not ended(stage, 1.5)
    dvc.send_signal(number)
    # Not waited for: a zombie, as under a shell that is busy elsewhere, has gone too.
    assert ended(stage, 10)


def test_a_dvc_that_goes_before_the_launcher_has_started_the_stage_is_noticed(tmp_path):
    """The stage would find no dvc above it, and go on for hours."""
    (tmp_path / "dvc").write_text(STARTER)
    (tmp_path / "stage.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    launcher = f"-m vlm_vqa.pipeline.launcher --quiet --config_file {ROOT}/launch/cpu.yaml stage.py"
    dvc = subprocess.Popen(
        [sys.executable, tmp_path / "dvc", launcher], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}
    )
    started = lambda: [one for one in psutil.Process(dvc.pid).children(recursive=True) if "python" in one.name()]  # noqa: E731
    while not (found := started()):
        time.sleep(0.01)
    dvc.kill()
    assert ended(found[0], 10)
    assert not (tmp_path / "ran").exists()
    dvc.wait()


def test_what_a_person_has_started_goes_on_without_his_shell(started):
    shell, stage, watched = started("some_script.py")
    assert watched == 0
    shell.kill()
    assert not ended(stage, 3)


def test_a_process_that_does_not_end_is_ended(monkeypatch):
    script = (
        "import psutil, sys, time\nfrom vlm_vqa.pipeline import orphans\norphans.SECONDS_TO_END = 0.5\n"
        "orphans.end_with_parents(lambda: None, [psutil.Process(int(sys.argv[1]))])\nprint('on', flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(["sleep", "60"])
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(parent.pid)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert child.stdout.readline() == "on\n"
    parent.kill()
    assert child.wait(10) == -signal.SIGKILL
    assert "has gone: ending. Run `dvc repro` again" in child.stderr.read()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends such a child; elsewhere nothing does")
def test_a_child_that_is_not_ours_dies_with_us():
    script = (
        "import subprocess, time\nfrom vlm_vqa.pipeline import orphans\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True, preexec_fn=orphans.die_with_parent)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    assert ended(child, 5)
