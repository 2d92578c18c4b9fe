"""The command `vlm-vqa`: what it prints, its exit codes, and that asking for help costs nothing."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm_vqa.cli import main

REPO = Path(__file__).parents[1]


def test_help_names_every_command_and_imports_nothing_heavy():
    script = (
        "import sys; sys.path.insert(0, 'src')\n"
        "from vlm_vqa.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'pandas', 'datasets'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    for command in ("ask", "check", "compare", "easy-vqa", "gallery", "helm-web", "track"):
        assert f"\n    {command} " in done.stdout


def test_check_accepts_the_committed_parameters(capsys):
    assert main(["check", str(REPO / "params.yaml")]) == 0
    assert "valid; params_hash" in capsys.readouterr().out


def test_check_names_a_misspelt_key(tmp_path, capsys):
    text = (REPO / "params.yaml").read_text().replace("learning_rate:", "learning_rat:")
    (tmp_path / "params.yaml").write_text(text)
    assert main(["check", str(tmp_path / "params.yaml")]) == 2
    assert "train.learning_rat" in capsys.readouterr().err


def test_ask_prints_the_answer(tmp_path, capsys, monkeypatch):
    from PIL import Image

    Image.new("L", (8, 6)).save(tmp_path / "grey.png")
    asked = []

    def answer(questions, images):
        asked.append((questions, images[0].mode, images[0].size))
        return ["a circle"]

    answering = SimpleNamespace(Answerer=SimpleNamespace(from_export=lambda folder: SimpleNamespace(answer=answer)))
    monkeypatch.setitem(sys.modules, "vlm_vqa.model.answering", answering)
    assert main(["ask", str(tmp_path / "grey.png"), "what shape?"]) == 0
    assert capsys.readouterr().out == "a circle\n"
    assert asked == [(["what shape?"], "RGB", (8, 6))]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.jpg", None, "cannot be read"),
        ("broken.jpg", b"\xff\xd8\xff", "broken.jpg"),
        ("big.png", "big", "big.png"),
    ],
)
def test_ask_names_a_picture_it_cannot_open(tmp_path, capsys, name, data, message):
    if data == "big":
        from PIL import Image

        Image.new("L", (100, 100)).save(tmp_path / name)
    elif data is not None:
        (tmp_path / name).write_bytes(data)
    assert main(["ask", str(tmp_path / name), "what?", "--max-image-pixels", "9999"]) == 2
    error = capsys.readouterr().err
    assert name in error and message in error


def test_easy_vqa_is_written_where_asked(tmp_path, capsys, monkeypatch):
    written = []
    monkeypatch.setattr("vlm_vqa.data.sources.easy_vqa.write_official_layout", written.append)
    assert main(["easy-vqa", str(tmp_path / "copy")]) == 0
    assert written == [tmp_path / "copy"]


def test_track_says_whether_there_was_anything_to_do(capsys, monkeypatch):
    for made, words in ((True, "recorded these outputs as MLflow run abc"), (False, "nothing to do")):
        monkeypatch.setattr("vlm_vqa.tracking.recreate_run", lambda made=made: ("abc", made))
        assert main(["track"]) == 0
        assert words in capsys.readouterr().out


def test_track_without_outputs_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((REPO / "params.yaml").read_text())
    assert main(["track"]) == 2
    assert "models/trained/training.json is missing: `dvc pull` or `dvc repro`" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm_vqa.tracking.recreate_run", interrupt)
    assert main(["track"]) == 130
