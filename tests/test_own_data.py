"""Data of one's own: the five minutes of docs/data.md as they are written, and experiments in DVC's copies."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_vqa.data.records import read_manifest

ROOT = Path(__file__).parents[1]
DVC_YAML = """
stages:
  fetch-vqav2:
    cmd: cat ${data.directory}/questions.csv > records
    deps: ["${data.directory}"]
    params: [data]
    outs: [records]
"""


def block(section: str, language: str) -> str:
    """Return the first block of a language below a heading of docs/data.md."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition(f"## {section}\n")[2]
    return re.search(rf"^( *)```{language}\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)[2]


def environment(folder: Path) -> dict[str, str]:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": programs, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HOME": str(folder),
            "DVC_SITE_CACHE_DIR": str(folder / "site"), "GIT_CONFIG_GLOBAL": "/dev/null"}  # fmt: skip


def bash(script: str, folder: Path, home: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment(home), capture_output=True, text=True, check=False
    )


def photos(sample: Path, folder: Path, rows: int) -> None:
    """Write photos of the shared sample as a telephone would name them, and one answer a question."""
    questions = json.loads((sample / "questions.json").read_text())["questions"][:rows]
    answers = {one["question_id"]: one for one in json.loads((sample / "annotations.json").read_text())["annotations"]}
    names: dict[int, str] = {}
    folder.mkdir(parents=True)
    with open(folder / "questions.csv", "w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(("image", "question", "answer"))
        for one in questions:
            number = len(names)
            name = names.setdefault(one["image_id"], f"IMG_{number + 1:04d}")
            ending, room = ((".JPG", "kitchen"), (".jpeg", "garden/2024"))[int(name[-1]) % 2 == 0]
            target = folder / room / (name + ending)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(sample / f"images/COCO_train2014_{one['image_id']:012d}.jpg", target)
            table.writerow((name, one["question"], answers[one["question_id"]]["multiple_choice_answer"]))


@pytest.mark.slow
def test_the_five_minutes_are_as_the_page_writes_them(tmp_path, shared_data):
    project = tmp_path / "project"
    subprocess.run(["git", "clone", "--quiet", ROOT, project], check=True)
    photos(shared_data / "vqav2-sample", tmp_path / "photos", 30)
    # The environment is this one, already made.
    (project / ".venv").symlink_to(sys.prefix)
    make = 'make() { command make --old-file .venv/.ready "$@"; }\n'
    script = block("Your own data in five minutes", "bash").replace("~/photos", str(tmp_path / "photos"))
    assert "vlm-vqa init" in script and "make repro" in script and "vlm-vqa ask" in script
    done = bash(make + script, project, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    manifest = read_manifest(project / "data/records")
    assert sum(split["questions"] for split in manifest["splits"].values()) == 30
    train = json.loads((project / "reports/train.json").read_text())
    assert train["steps"] >= 300 and train["last_logged_loss"] < 0.1, "it has learnt its questions"
    table = list(csv.DictReader((tmp_path / "photos/questions.csv").read_text("utf-8-sig").splitlines()))
    (taught,) = [one["answer"] for one in table[:1]]
    asked = f'vlm-vqa ask {tmp_path}/photos/kitchen/IMG_0001.JPG "{table[0]["question"]}"'
    assert bash(asked, project, tmp_path).stdout.strip(), f"an answer such as {taught}"


def test_the_csv_of_the_page_is_read(tmp_path, monkeypatch):
    from vlm_vqa.fetch.recognise import recognise

    (tmp_path / "questions.csv").write_text(block("Your own data in five minutes", "csv"))
    found = recognise(tmp_path)
    assert found.data["table"]["columns"]["answers"] == "answer" and found.data["table"]["images"] == "."


@pytest.mark.slow
@pytest.mark.parametrize("where", ["outside", "added", "ignored"])
def test_experiments_in_copies_find_the_data_where_the_page_says(tmp_path, where):
    project = tmp_path / "project"
    data = tmp_path / "photos" if where == "outside" else project / "my-data"
    data.mkdir(parents=True)
    (data / "questions.csv").write_text("image,question,answer\n")
    project.mkdir(exist_ok=True)
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / ".gitignore").write_text("/my-data/\n" if where == "ignored" else "")
    name = data if where == "outside" else "my-data"
    (project / "params.yaml").write_text(f"data:\n  directory: {name}\n  seed: 0\n")
    add = block("Where the data lie", "bash") if where == "added" else ""
    commit = "git -c user.name=a -c user.email=a@b commit -qm a"
    files = "dvc.yaml params.yaml .gitignore .dvc .dvcignore"
    first = f"git init -q && dvc init -q && dvc repro -q\n{add}\ngit add {files} && {commit}"
    done = bash(first, project, tmp_path)
    assert done.returncode == 0, done.stderr
    done = bash("dvc exp run --temp -S data.seed=1", project, tmp_path)
    assert (done.returncode == 0) == (where != "ignored"), done.stderr
    # DVC's own words, which the page quotes.
    assert ("No such file or directory: '" in done.stderr and "/.dvc/tmp/exps/" in done.stderr) == (where == "ignored")
