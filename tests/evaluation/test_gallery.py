"""The gallery shows right and wrong answers, the same ones for the same seed."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_vqa.cli import main
from vlm_vqa.data.records import load_questions
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.gallery import _choose, _verdict, draw_gallery
from vlm_vqa.evaluation.helm.files import write_table
from vlm_vqa.training.answers_picture import PAGE


@pytest.fixture
def predictions(records, tmp_path):
    """Every third answer is wrong."""
    rows = load_questions(records, "val").to_list()
    columns = {name: [row[name] for row in rows] for name in ("image_id", "question", "answers")}
    columns["prediction"] = ["costs $5 or $6" if at % 3 == 0 else row["answers"][0] for at, row in enumerate(rows)]
    columns["score"] = [0.0 if at % 3 == 0 else 1.0 for at in range(len(rows))]
    path = tmp_path / "predictions.parquet"
    write_table(pa.table(columns), path)
    return path


def test_same_seed_same_bytes_and_another_seed_another_picture(records, predictions, tmp_path):
    first, again, other = (
        draw_gallery(records, predictions, tmp_path / "images" / f"{name}.png", right=3, wrong=2, seed=seed)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    assert Image.open(first).width == PAGE


@pytest.mark.parametrize("text", ["$", "$5 or $6?", r"$\frac{$", r"a $\undefined$ b", r"\$1 $_$"])
def test_dollars_are_dollars(text, records, predictions, tmp_path):
    table = pq.read_table(predictions)
    for name in ("question", "prediction"):
        table = table.set_column(table.column_names.index(name), name, pa.array([text] * len(table)))
    write_table(table, predictions)
    assert draw_gallery(records, predictions, tmp_path / "a.png", right=1, wrong=1).is_file()


def test_either_score_is_drawn_and_silence_is_no_answer_of_humans(records, predictions, tmp_path):
    table = pq.read_table(predictions)
    named = table.rename_columns(["answer_accuracy" if name == "score" else name for name in table.column_names])
    first = draw_gallery(records, predictions, tmp_path / "first.png").read_bytes()
    write_table(named, predictions)
    assert draw_gallery(records, predictions, tmp_path / "second.png").read_bytes() == first
    row = {"score": 0.0, "prediction": "blue", "answers": ["", "", "red"]}
    assert _verdict(row) == "wrong: blue (humans: red)"


def test_right_and_wrong_ones_are_chosen_and_images_are_not_shown_twice(predictions):
    rows = _choose(predictions, right=3, wrong=2, seed=0)
    assert [row["score"] for row in rows] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert len({row["image_id"] for row in rows}) == 5


def test_fewer_wrong_answers_than_asked_for_are_no_error(predictions):
    assert len(_choose(predictions, right=0, wrong=100, seed=0)) == 6


def test_what_cannot_be_written_is_refused(records, predictions, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for name, seed, message in (
        ("file/a.png", 0, "cannot be written"),
        ("folder.png", 0, "cannot be written"),
        ("a.pdf", 0, "ends in .png"),
        ("a", 0, "ends in .png"),
        ("a.png", -1, "seed is -1"),
    ):
        with pytest.raises(UserError, match=message):
            draw_gallery(records, predictions, tmp_path / name, seed=seed)


def test_the_command_writes_where_it_is_told(records, predictions, tmp_path, monkeypatch, capsys):
    for path, place in ((records, "data/records"), (predictions, "reports/predictions.parquet")):
        (tmp_path / "here" / place).parent.mkdir(parents=True)
        (tmp_path / "here" / place).symlink_to(path)
    monkeypatch.chdir(tmp_path / "here")
    assert main(["gallery", "--out", "../pictures/a.PNG", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "wrote ../pictures/a.PNG\n"
    asked, drawn = tmp_path / "pictures/a.PNG", draw_gallery(records, predictions, tmp_path / "b.png", seed=3)
    assert asked.read_bytes() == drawn.read_bytes()
    assert main(["gallery", "--out", "reports/predictions.parquet/a.png"]) == 2
    assert "cannot be written (" in capsys.readouterr().err


def test_missing_predictions_and_images_are_named(records, predictions, tmp_path):
    with pytest.raises(UserError, match="vlm-vqa repair helm-eval"):
        draw_gallery(records, tmp_path / "no.parquet", tmp_path / "a.png")
    table = pq.read_table(predictions)
    ids = pa.array([999] * len(table), pa.int64())
    write_table(table.set_column(0, "image_id", ids), predictions)
    with pytest.raises(UserError, match="no image 999"):
        draw_gallery(records, predictions, tmp_path / "a.png")
