"""What `vlm-vqa preflight` prints for every preset, to the last digit: golden/NAME.txt, on the device that it is meant for.

`GOLDEN_WRITE=1 python -m pytest tests/estimate/test_golden.py` writes them anew: read `git diff` before a commit.
"""

import os
from pathlib import Path

import pytest

from vlm_vqa.cli import main
from vlm_vqa.estimate import devices
from vlm_vqa.training.throughput import Peak

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
CPU = devices.Device("cpu", 16 * devices.GIB, Peak(0.05, None, 0.1), "fixed for the test")


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_figures(name, capsys, monkeypatch, tmp_path):
    for folder in ("presets", "launch"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[cache]\n    type = hardlink\n")
    monkeypatch.chdir(tmp_path)
    # Its rate is measured anew on each machine.
    monkeypatch.setattr(devices, "_cpu", lambda: CPU)
    device = [] if name == "small" else ["--device", "RTX 4090"]
    fixed = ["--host-memory", "256", "--disk", "500", "--price", "1"]
    assert main(["preflight", f"presets/{name}.yaml", *device, *fixed, "--details"]) == 0
    printed, golden = capsys.readouterr().out, GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN_WRITE"):
        golden.write_text(printed)
    assert printed == golden.read_text()
