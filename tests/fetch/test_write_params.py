"""`vlm-vqa init` and `vlm-vqa check`: parameters that fit the data, and all that is wrong with them."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from PIL import Image

from vlm_vqa.cli import main
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import load_params

ROOT = Path(__file__).parents[2]
KEYS = ("batch_size", "gradient_accumulation_steps", "num_train_epochs")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's folder with its presets and launches, to work in."""
    folder = tmp_path / "project"
    for name in ("presets", "launch"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "presets/small.yaml", folder / "params.yaml")
    monkeypatch.chdir(folder)
    return folder


def photos(folder: Path, images: int = 15, each: int = 2, answer: str = "cup") -> Path:
    """Write pictures into sub-folders, and questions about them into a csv."""
    with open(_made(folder / "questions.csv"), "w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "question", "answer"))
        for number in range(images):
            Image.new("RGB", (20, 20), (number, 0, 0)).save(_made(folder / f"{'ab'[number % 2]}/IMG_{number:04d}.JPG"))
            rows.writerows((f"img_{number:04d}.jpeg", f"What is it, {turn}?", answer) for turn in range(each))
    return folder


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet", "datasets"])
def test_init_writes_parameters_that_load_and_read_the_data(project, tmp_path, capsys, kind):
    folder = photos(tmp_path / "photos")
    if kind != "csv":
        rows = list(csv.DictReader((folder / "questions.csv").read_text("utf-8-sig").splitlines()))
        (folder / "questions.csv").unlink()
        table = datasets.Dataset.from_list(rows)
        match kind:
            case "datasets":
                table.save_to_disk(folder / "table", num_shards=2)
            case "parquet":
                table.to_parquet(folder / "questions.parquet")
            case _:
                text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
                (folder / f"questions.{kind}").write_text(text)
    assert main(["init", str(folder)]) == 0
    said = capsys.readouterr().out
    params = load_params("params.yaml")
    assert "24 questions on 12 images for train and 6 questions on 3 images for val" in said and "unsure" not in said
    assert 'make repro, then: vlm-vqa ask PICTURE "QUESTION"' in said
    assert params.data.directory == str(folder) and params.data.table.val_share == 0.2
    assert [getattr(params.train, key) for key in KEYS] == [8, 1, 100], "300 steps of 8 questions"
    assert params.evaluation.helm_instances == 6
    longest = len(params.prompt.instruction.encode()) + len("What is it, 1?cup") + 4
    assert longest <= params.prompt.text_length < longest + 32
    before = (ROOT / "presets/small.yaml").read_text().splitlines()
    kept = [line for line in (project / "params.yaml").read_text().splitlines() if line in before]
    assert len(kept) > len(before) - 12 and before[:4] == kept[:4], "all else stays, comments too"
    assert main(["check"]) == 0 and "6 questions for val, which keep the data contract" in capsys.readouterr().out
    manifest = fetch(params.data, tmp_path / "records")
    assert manifest["splits"]["val"]["questions"] == 6
    table = replace(params.data.table, train="questions.csv")
    as_csv = replace(params.data, directory=str(photos(tmp_path / "csv")), table=table)
    assert manifest["data_hash"] == fetch(as_csv, tmp_path / "others")["data_hash"], "whatever it is written in"


def test_an_edited_file_is_replaced_by_force_only(project, tmp_path, capsys):
    folder = photos(tmp_path / "photos")
    for preset in ("small", "vqav2"):
        shutil.copy(f"presets/{preset}.yaml", "params.yaml")
        assert main(["init", str(folder)]) == 0
    mine = (project / "params.yaml").read_text().replace("learning_rate: 1.0e-3", "learning_rate: 5.0e-4")
    (project / "params.yaml").write_text(mine)
    assert main(["init", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "--force replaces it" in said and f"directory: {folder}" in said, "it says what it would write"
    assert (project / "params.yaml").read_text() == mine and not list(project.glob("*.part"))
    assert main(["init", str(folder), "--force"]) == 0 and (project / "params.yaml").read_text() != mine


@pytest.mark.parametrize(
    ("preset", "images", "expected", "validation"),
    [
        ("small", 3000, [64, 1, 4], [480, 250, 60, "best"]),
        ("small", 100, [16, 1, 30], [0, 0, 200, "last"]),
        ("small", 200, [32, 1, 30], [32, 32, 60, "last"]),
        ("vqav2-1gpu", 100, [16, 1, 10], [0, 0, 500, "last"]),
        ("vqav2", 100, [4, 1, 10], [0, 0, 500, "last"]),
        ("vqav2-reference", 1000, [6, 5, 8], [0, 0, 100, "last"]),
    ],
)
def test_small_data_get_small_steps_and_enough_of_them(
    project, tmp_path, capsys, monkeypatch, preset, images, expected, validation
):
    monkeypatch.setattr("vlm_vqa.fetch.write_records._store_images", lambda *_: "")
    folder = photos(tmp_path / "photos", images=2)
    rows = [f"img_{number}.jpg,What?,cup" for number in range(images)] * 2
    (folder / "questions.csv").write_text("\n".join(["image,question,answer", *rows]))
    assert main(["init", str(folder), "--preset", preset]) == 0
    params = load_params("params.yaml")
    assert [getattr(params.train, key) for key in KEYS] == expected
    settings = params.validation
    assert [settings.questions, settings.train_questions, settings.every_steps, settings.keep] == validation


def test_what_init_and_check_say_of_bad_data(project, tmp_path, capsys):
    folder = photos(project / "my data")
    (folder / "a/IMG_0000.JPG").write_text("no picture")
    (folder / "b/IMG_0001.JPG").unlink()
    with open(folder / "questions.csv", "a") as file:
        file.write("img_0002.jpeg,,cup\n")
    assert main(["init", "my data"]) == 0
    said = capsys.readouterr().out
    assert "dvc add" in said and load_params("params.yaml").data.directory == "my data"
    assert main(["check"]) == 2
    for text in (said, capsys.readouterr().err):
        for found in ("unreadable image: 1.", "missing image: 1.", "malformed question: 1."):
            assert found in text
    assert main(["check", "--params-only"]) == 0
    assert sorted(path.name for path in project.iterdir()) == ["launch", "my data", "params.yaml", "presets"]


def test_what_init_refuses(project, tmp_path, capsys):
    for words, reason in (
        (["gone.csv"], "gone.csv: there is no such file or folder"),
        ([str(project)], "no questions with answers"),
        ([str(photos(tmp_path))], "the project lies in it"),
        ([str(tmp_path), "--preset", "huge"], "--preset is 'huge'; it must be one of paligemma2-vqav2, small, "),
    ):
        assert main(["init", *words]) == 2
        assert reason in capsys.readouterr().err


def test_a_copy_of_dvcs_says_why_files_are_missing(tmp_path, monkeypatch, capsys):
    copy = tmp_path / ".dvc/tmp/exps/standalone/tmpx1"
    shutil.copytree(ROOT / "launch", copy / "launch")
    (copy / "data/vqav2").mkdir(parents=True)
    text = (ROOT / "presets/small.yaml").read_text().replace("source: easy-vqa", "source: directory")
    (copy / "params.yaml").write_text(text)
    for folder, told in ((copy, True), (tmp_path, False)):
        monkeypatch.chdir(folder)
        shutil.copytree(copy, tmp_path, dirs_exist_ok=True) if not told else None
        assert main(["check"]) == 2
        assert ("`dvc add` a folder of the data's own" in capsys.readouterr().err) == told
