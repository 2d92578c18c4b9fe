"""The house's order: imports run one way, between rooms and between files, inside functions too."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vlm_vqa"
# From below to above: a room imports only itself, rooms of lower lines and lone files that allow it.
LEVELS = (
    ("errors", "secrets", "hashing", "files", "cores", "prefetch", "sealed", "yaml_file"),
    ("params", "hf_hub", "launch_file", "pipeline", "workers"),
    ("data",),
    ("model",),
    ("fetch", "features", "training", "inference"),
    ("evaluation", "tracking"),
    ("checks", "demo", "gate", "promote", "publish", "sides"),
    ("estimate",),
    ("quick_start",),
    ("cli",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# One room of a level may use another where the one is what the other is about.
BESIDE = {
    "secrets": {"errors"},
    "errors": {"secrets"},
    "sealed": {"errors", "files", "hashing"},
    "files": {"errors"},
    "yaml_file": {"errors", "files", "secrets"},
    "cores": {"errors"},
    "launch_file": {"params"},
    "hf_hub": {"params"},
    "workers": {"launch_file"},
    "pipeline": {"launch_file", "params", "workers"},
    "gate": {"sides"},
    "promote": {"sides"},
}


def imports_of(path: Path) -> Iterator[Path]:
    """Yield the files of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if _files(name) else node.module for name in below]
        else:
            continue
        yield from (file for name in names if name.startswith("vlm_vqa.") for file in _files(name) if file != path)


def _files(name: str) -> list[Path]:
    place = ROOT / "src" / Path(*name.split("."))
    return [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
GRAPH = {path: {file for file in imports_of(path)} for path in FILES}


def test_no_file_imports_itself_by_any_way():
    TopologicalSorter(GRAPH).prepare()


def test_every_room_has_its_place_and_a_face():
    assert {room(path) for path in FILES} == set(LEVEL_OF)
    for folder in {path.parent for path in FILES}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_downwards(path):
    mine = room(path)
    wrong = {
        other
        for other in map(room, GRAPH[path])
        if other != mine and LEVEL_OF[other] >= LEVEL_OF[mine] and other not in BESIDE.get(mine, ())
    }
    assert not wrong, f"{mine} imports {', '.join(sorted(wrong))}"


def test_no_function_is_longer_than_a_screen():
    for path in [
        *FILES,
        *(ROOT / "stages").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "proofs").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


@pytest.mark.parametrize("folder", ["proofs", "benchmarks"])
def test_proofs_and_benchmarks_import_neither_stages_nor_tests(folder):
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                assert not [name for name in names if name.split(".")[0] in ("stages", "tests")], path
