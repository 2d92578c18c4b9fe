"""What a killed dvc leaves half-written is mended, by `vlm-vqa unlock`; what a living one holds never."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.dvc_project import DvcProject
from vlm_vqa.cli import main
from vlm_vqa.errors import UserError
from vlm_vqa.pipeline import unlock


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rwlock(root, text):
    path = root / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def held_by(pid):
    return json.dumps(
        {"write": {"/out": {"pid": pid, "cmd": "dvc repro"}}, "read": {"/in": [{"pid": pid, "cmd": "x"}]}}
    )


def ended_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("text", ["", " \n", '{"read": {"/a"', "null", "[]", '{"write": {"/a": 1}}', '{"read": []} x'])
def test_a_lock_that_dvc_cannot_read_is_removed(root, text, capsys):
    path = rwlock(root, text)
    assert main(["unlock"]) == 0
    assert not path.exists() and "rwlock: removed" in capsys.readouterr().out
    assert main(["unlock", "--quiet"]) == 0 and capsys.readouterr().out == ""


def test_a_dead_holders_lock_is_removed_and_a_living_ones_stays(root):
    path = rwlock(root, held_by(ended_pid()))
    assert "was killed" in unlock.unlock(root)[0] and not path.exists()
    path = rwlock(root, held_by(os.getpid()))
    assert unlock.unlock(root) == [] and path.exists()
    # A number that was given to another process since.
    os.utime(path, (0, 0))
    assert len(unlock.unlock(root)) == 1 and not path.exists()
    path = rwlock(root, "{}")
    assert unlock.unlock(root) == [] and path.exists()


@pytest.mark.parametrize("name", ["rwlock.lock", "lock"])
def test_what_a_living_dvc_is_writing_stays(root, name, monkeypatch):
    monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0.2)
    path = rwlock(root, "")
    with path.with_name(name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="living dvc holds it"):
            unlock.unlock(root)
        assert path.exists()
    assert len(unlock.unlock(root)) == 1


def test_a_queues_copies_are_mended_too(root):
    path = rwlock(root / ".dvc/tmp/exps/tmp1", "")
    assert len(unlock.unlock(root)) == 1 and not path.exists()


@pytest.mark.parametrize("module", [True, False])
def test_a_living_dvc_of_this_project_is_not_disturbed(root, module, tmp_path_factory):
    path, inner = rwlock(root, ""), root / "src"
    inner.mkdir()
    program = tmp_path_factory.mktemp("bin") / "dvc"
    program.write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    program.with_suffix(".py").write_text(program.read_text())
    command = [sys.executable, *(["-m", "dvc"] if module else [str(program)]), "repro"]

    def start(folder):
        process = subprocess.Popen(
            command, cwd=folder, env={"PYTHONPATH": str(program.parent)}, stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        return process

    elsewhere = start(tmp_path_factory.mktemp("other"))
    here = start(inner)
    try:
        assert [process.pid for process in unlock.dvc_at_work(root)] == [here.pid]
        with pytest.raises(UserError, match=rf"process {here.pid} \(.*dvc repro`\) may be at work here: wait"):
            unlock.unlock(root)
        assert path.exists()
        here.kill()
        # Not waited for: a process that has ended holds nothing.
        time.sleep(0.2)
        assert len(unlock.unlock(root)) == 1
    finally:
        for process in (here, elsewhere):
            process.kill()
            process.wait()


def test_a_killed_dvc_and_the_command_that_goes_on(tmp_path, monkeypatch, capsys):
    """DVC itself: its living process is seen, and after `unlock` it takes up what it refused."""
    project = DvcProject(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git/sleep").write_text("60")
    (tmp_path / "model.bin").unlink()
    runs = project.runs()
    process = subprocess.Popen(["dvc", "repro"], env=project.environment(), start_new_session=True)
    while project.runs() == runs:
        time.sleep(0.1)
    path = tmp_path / ".dvc/tmp/rwlock"
    assert f'"pid": {process.pid}' in path.read_text() and main(["unlock", "--quiet"]) == 0 and path.exists()
    rwlock(tmp_path, "")
    assert main(["unlock"]) == 2 and f"process {process.pid} (`" in capsys.readouterr().err
    assert main(["repair"]) == 2
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / ".git/sleep").unlink()
    with pytest.raises(subprocess.CalledProcessError) as refused:
        project.dvc("repro")
    assert "JSON structure is corrupted" in refused.value.stderr
    # Cut off in dvc.lock as well.
    (tmp_path / "dvc.lock").write_bytes(project.lock[:300])
    assert main(["unlock"]) == 0
    said = capsys.readouterr().out
    assert "rwlock: removed" in said and "dvc.lock: moved to" in said
    project.dvc("repro")
    assert (tmp_path / "dvc.lock").read_bytes() == project.lock


LOCK = b"schema: '2.0'\nstages:\n  a:\n    cmd: x\n    outs:\n    - path: o\n      md5: 1f3\n      size: 1\n"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("length", [0, 5, 40, 60, len(LOCK) - 1])
def test_a_half_written_dvc_lock(root, kept, length):
    path = root / "dvc.lock"
    path.write_bytes(LOCK)
    if kept:
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
        for words in (["init", "-q"], ["add", "dvc.lock"], ["commit", "-qm", "lock"]):
            subprocess.run([*git, *words], check=True)
    assert unlock.unlock(root) == []
    path.write_bytes(LOCK[:length])
    (said,) = unlock.unlock(root)
    assert "half-written" in said and (root / ".dvc/tmp/dvc.lock.damaged").read_bytes() == LOCK[:length]
    assert path.read_bytes() == LOCK if kept else not path.exists()


def test_a_conflict_in_dvc_lock_is_the_users(root):
    text = b"<<<<<<< HEAD\n" + LOCK + b"=======\n>>>>>>> other\n"
    (root / "dvc.lock").write_bytes(text)
    with pytest.raises(UserError, match="marks of a conflict"):
        unlock.unlock(root)
    assert (root / "dvc.lock").read_bytes() == text


def test_only_in_a_project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["unlock"]) == 2 and "no .dvc here or above" in capsys.readouterr().err
