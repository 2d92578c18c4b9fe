"""An installed package holds every file that its code reads, not its modules alone."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_package_data_names_every_file_beside_the_modules():
    package = ROOT / "src" / "vlm_vqa"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["vlm_vqa"]
    there = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert package / "inference" / "card.md" in there
    assert sorted(there - {path for pattern in patterns for path in package.glob(pattern)}) == []
