"""How a stage ends: exit codes, one message, and what a failing disk needs."""

import ast
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_vqa import hashing
from vlm_vqa.pipeline import early
from vlm_vqa.pipeline.entrypoint import EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USER_ERROR, disk_remedy

SCRIPT = """
import sys, time
from vlm_vqa.pipeline import entrypoint
from vlm_vqa.errors import UserError
def main():
    {body}
entrypoint.run("fetch", main)
"""


def run(body, *, stop=None):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": "src", "PYTHONUNBUFFERED": "1"},
        # A test runner in the background may ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    if stop:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("raise UserError('params.yaml: mend it')", EXIT_USER_ERROR, "fetch: error: params.yaml: mend it"),
        ("raise OSError(28, 'No space left on device', 'data/x')", EXIT_USER_ERROR, "data/x: the disk is full"),
        (
            "raise OSError(30, 'Read-only file system', 'data/x')",
            EXIT_USER_ERROR,
            "data/x: the file system is read-only",
        ),
    ],
)
def test_what_a_person_can_mend_is_one_message(body, code, words):
    returncode, errors = run(body)
    assert (returncode, "Traceback" in errors) == (code, False)
    assert words in errors


def test_a_bug_keeps_its_traceback():
    returncode, errors = run("raise KeyError('bug')")
    assert returncode == 1 and "Traceback" in errors and "KeyError: 'bug'" in errors


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_TERMINATED)])
def test_signals_unwind(stop, code):
    returncode, errors = run("""
    try:
        print("ready"); time.sleep(60)
    finally:
        print("unwound", file=sys.stderr)""", stop=stop)  # fmt: skip
    assert returncode == code and "unwound" in errors and "Traceback" not in errors


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_TERMINATED)])
def test_a_signal_that_meets_a_finalizer_is_not_lost(stop, code):
    """Python drops what is raised there, with a traceback; SQLAlchemy's met a SIGTERM so."""
    returncode, errors = run("""
    class Thing:
        def __del__(self):
            print("ready"); time.sleep(1)
    thing = Thing()
    del thing
    time.sleep(60)""", stop=stop)  # fmt: skip
    assert returncode == code and "Traceback" not in errors


def test_a_second_signal_that_meets_the_hook_of_lost_ones_is_not_lost():
    """Python prints and drops what is raised there; a launcher's SIGTERM met one from `orphans` so."""
    returncode, errors = run("""
    import os, signal
    from vlm_vqa.pipeline import early
    later = early._later
    def slowly(signum):
        early._later = later
        os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)
    early._later = slowly
    class Thing:
        def __del__(self):
            print("ready"); time.sleep(1)
    thing = Thing()
    del thing
    time.sleep(60)""", stop=signal.SIGTERM)  # fmt: skip
    assert returncode == EXIT_TERMINATED and "Traceback" not in errors


def test_another_fault_of_a_finalizer_is_shown():
    assert (
        "KeyError: 'bug'"
        in run("""
    class Thing:
        def __del__(self):
            raise KeyError("bug")
    Thing()""")[1]
    )


@pytest.mark.parametrize("name", ["train.py", "vlm-vqa", "notebook.py"])
def test_ctrl_c_during_imports(name, tmp_path):
    """Our programs end with a word; whoever else imports the package keeps Python's own way."""
    (tmp_path / "slow.py").write_text("import time; print('ready'); time.sleep(60)")
    (tmp_path / name).write_text("import vlm_vqa\nimport slow\n")
    process = subprocess.Popen(
        [sys.executable, tmp_path / name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"src:{tmp_path}", "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if name == "notebook.py":
        assert "KeyboardInterrupt" in errors
    else:
        assert (process.returncode, errors) == (EXIT_INTERRUPTED, "interrupted\n")


def test_after_the_imports_ctrl_c_unwinds_again(tmp_path):
    (tmp_path / "train.py").write_text("""
import signal
import vlm_vqa
from vlm_vqa.pipeline import early
assert signal.getsignal(signal.SIGINT) is early.end_quietly
from vlm_vqa.pipeline import entrypoint
def main():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return
    raise AssertionError("nothing was raised")
entrypoint.run("train", main)
""")
    subprocess.run(
        [sys.executable, tmp_path / "train.py"], check=True, timeout=60, env={**os.environ, "PYTHONPATH": "src"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.mark.parametrize("path", sorted(Path("stages").glob("*.py")), ids=lambda path: path.stem)
def test_every_stage_imports_the_package_first(path):
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert isinstance(imports[0], ast.Import) and imports[0].names[0].name == "vlm_vqa"
    assert path.name in early._STAGES


def test_a_disks_error_is_found_inside_a_librarys_own():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "shard")
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert "shard: the disk is full" in disk_remedy(error)
    assert "the disk is full" in disk_remedy(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert disk_remedy(RuntimeError("another thing")) is None


def test_hashes_name_contents_and_names(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("b")
    both = hashing.hash_files([one, two], tmp_path)
    assert hashing.hash_files([two, one], tmp_path) == both
    two.write_text("c")
    assert hashing.hash_files([one, two], tmp_path) != both
    assert hashing.hash_json({"a": 1, "b": 2}) == hashing.hash_json({"b": 2, "a": 1})
    hashing.write_json(tmp_path / "x.json", {"b": 1, "a": 2})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'
