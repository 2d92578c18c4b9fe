"""A launcher ends with what its processes said and a line of its own, never with a traceback of torchrun's."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_vqa.errors import GO_ON

SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
open(f"started-{os.environ['RANK']}", "w").close()
if os.environ["RANK"] == "1":
    exec(os.environ["BODY"])
time.sleep(60)
"""
BY_SIGKILL = rf"rank 1 \(process \d+\) was ended by SIGKILL\. {GO_ON}\n"


@pytest.mark.parametrize(
    ("body", "stop", "code", "said"),
    [
        ("sys.exit('train: error: mend it')", None, 1, "train: error: mend it\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", None, 137, BY_SIGKILL),
        ("pass", signal.SIGINT, 130, ""),
        ("pass", signal.SIGTERM, 143, ""),
        ("import it at once", signal.SIGINT, 130, "interrupted\n"),
    ],
)
def test_how_a_launch_ends(tmp_path, body, stop, code, said):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "vlm_vqa.pipeline.launcher", "--quiet", "--config_file",
         os.path.abspath("launch/cpu-ddp.yaml"), "script.py"],
        cwd=tmp_path, env={**os.environ, "BODY": body, "PYTHONPATH": os.path.abspath("src")}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
        # A test runner in the background may ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    if stop and body == "import it at once":
        until(lambda: "libtorch_cpu" in Path(f"/proc/{launcher.pid}/maps").read_text())
        launcher.send_signal(stop)
    elif stop:
        until(lambda: all((tmp_path / f"started-{rank}").exists() for rank in (0, 1)))
        launcher.send_signal(stop)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == code, errors
    assert re.fullmatch(said, errors)


def until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)
