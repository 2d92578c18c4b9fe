"""`proofs.gpu`: what it makes of checks that fail, and all of them with the smallest models in a bare environment."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from proofs import gpu
from vlm_vqa.errors import UserError

ROOT = Path(__file__).parents[2]
BEHAVIOUR = """
import json, os, sys, time
ways = {"rates": "passed", "rounding": "failed: on purpose", "eight_bit": "die", "autocast": "hang", "step": "passed"}
for name in [one for one in sys.argv[1:] if one in ways]:
    print("MARK" + json.dumps({"begin": name}), flush=True)
    if ways[name] == "die":
        os._exit(7)
    if ways[name] == "hang":
        time.sleep(60)
    result = {"end": name, "status": ways[name], "seconds": 1, "claims": [], "details": {"made": name}}
    print("MARK" + json.dumps(result), flush=True)
    if ways[name] != "passed":
        break
""".replace("MARK", gpu.MARK)
HIDE = """
import sys
hidden = HIDDEN


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def test_a_check_that_fails_dies_or_hangs_is_named_and_the_others_run_on(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PROGRAM", (sys.executable, "-c", BEHAVIOUR))
    monkeypatch.setitem(gpu.CHECKS, "autocast", gpu.Check(1, "hangs"))
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    names = ["rates", "rounding", "eight_bit", "autocast", "step"]
    found = {one.pop("end"): one for one in gpu.run(names, time.time() + 60, tiny=False)}
    assert {name: one["status"] for name, one in found.items()} == {
        "rates": "passed", "rounding": "failed: on purpose", "eight_bit": "failed: ended with 7",
        "autocast": "failed: no end after 2 s", "step": "passed",
    }  # fmt: skip
    claims = gpu.write("gpu", found, [*names, "flex_step"])
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert claims[0].ratio == 0.4 and claims[0].note == "rounding, eight_bit, autocast" and claims[0].met is False
    checks = content["details"]["checks"]
    assert checks["flex_step"]["status"] == "not run: not yet" and checks["step"]["details"] == {"made": "step"}
    # What is not asked for, or has no time, stays; what runs again is as it is now.
    again = {"step": found["step"] | {"status": "not run: time"}, "rounding": found["rounding"] | {"status": "passed"}}
    gpu.write("gpu", again, list(again))
    kept = json.loads((tmp_path / "gpu.json").read_text())["details"]["checks"]
    assert {name: one["status"] for name, one in kept.items()} == {
        name: one["status"] for name, one in checks.items()
    } | {"rounding": "passed"}
    # Another card's are no part of it.
    monkeypatch.setattr(gpu, "card", lambda: {"name": "another"})
    gpu.write("gpu", again, list(again))
    assert set(json.loads((tmp_path / "gpu.json").read_text())["details"]["checks"]) == set(again)


def test_a_program_that_cannot_begin_fails_all(monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAM", (sys.executable, "-c", "raise SystemExit(3)"))
    found = list(gpu.run(["rates", "step"], time.time() + 60, tiny=False))
    assert [one["status"] for one in found] == ["failed: its process ended with 3"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    with pytest.raises(UserError, match="sees no GPU here"):
        gpu.main([])


def test_the_page_shows_what_missed_its_target_and_what_did_not_run():
    claim = {"what": "GPU: step", "ratio": 4.0, "low": 3.5, "high": 4.5, "target": 5.0, "at_most": False, "met": False}
    made = {
        "card": {"name": "GPU X", "memory_gib": 79.2, "driver": "580.1"},
        "checks": {"flex_step": {"status": "not run: time"}},
    }
    text = gpu.page({"machine": {"torch": "2.11", "transformers": "5.17"}, "claims": [claim], "details": made})
    assert "GPU X, 79.2 GiB, driver 580.1" in text and "`flex_step`: not run: time" in text
    assert "| step | 4 | 3.5 .. 4.5 | at least 5 | **missed** |" in text


def bare(folder: Path) -> None:
    """Write what makes Python see only the packages that docs/gpu.md installs, and what these need."""
    (line,) = re.findall(r"^pip install (.+)$", (ROOT / "docs/gpu.md").read_text(), flags=re.MULTILINE)
    plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    waiting, needed = line.split(), set()
    while waiting:
        name = plain(waiting.pop())
        if name not in needed:
            needed.add(name)
            wanted = (metadata.requires(name) or []) if any(metadata.distributions(name=name)) else []
            waiting += [re.match(r"[\w.-]+", one)[0] for one in wanted if "extra ==" not in one]
    ours = {"vlm_vqa", "benchmarks", "proofs"}
    hidden = {module for module, of in metadata.packages_distributions().items() if not needed & set(map(plain, of))}
    assert {"datasets", "mlflow", "dvc", "helm", "deepspeed", "nltk", "torchvision"} <= hidden
    (folder / "sitecustomize.py").write_text(HIDE.replace("HIDDEN", repr(hidden - ours)))


@pytest.mark.slow
def test_every_check_runs_on_a_cpu_with_nothing_but_what_the_page_installs(tmp_path, monkeypatch):
    import setuptools  # noqa: F401 - whoever imports it has its own `jaraco` and others on the path, too

    with monkeypatch.context() as only:
        only.setattr(sys, "path", [sysconfig.get_path("purelib")])
        bare(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "proofs.gpu", "--tiny"], cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "VLM_VQA_RESULTS": str(tmp_path),
             "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, tmp_path)))},
    )  # fmt: skip
    content = json.loads((tmp_path / "gpu_tiny.json").read_text())
    status = {name: one["status"] for name, one in content["details"]["checks"].items()}
    assert [name for name, said in status.items() if said != "passed"] == ["flex_step"], (status, done.stderr[-3000:])
    assert "needs CUDA" in status["flex_step"] and "deepspeed" in content["details"]["missing_packages"]
    assert not [claim["what"] for claim in content["claims"] if claim["met"] is False] and done.returncode == 0
