"""An installed package holds every file that its code reads, not its modules alone."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_package_data_names_every_file_beside_the_modules():
    package = ROOT / "src" / "vlm_vqa"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["vlm_vqa"]
    there = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert package / "inference" / "card.md" in there
    assert sorted(there - {path for pattern in patterns for path in package.glob(pattern)}) == []


@pytest.mark.slow
def test_the_wheel_writes_a_model_card(tmp_path):
    """Built, unpacked into a folder of its own and used from there: nothing of the checkout is read."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("vlm_vqa-*.whl")
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--target", str(tmp_path / "there"), str(wheel)], check=True
    )
    script = (
        "import sys; from vlm_vqa.inference import export; from vlm_vqa.params import load_params\n"
        "data = {'splits': {'train': {'questions': 1, 'images': 1}}, 'source': 's', 'notes': []}\n"
        "print(export.__file__)\nprint(export.card(load_params(sys.argv[1]), {}, {}, data))\n"
    )
    command = [sys.executable, "-c", script, str(ROOT / "presets/small.yaml")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "there")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "there")) and "# A visual question answering model" in done.stdout
    assert (tmp_path / "there/vlm_vqa/model/small_encoder/model.safetensors").is_file()
