"""What a file or folder is, told from its head; data sets by one entry each in the layout that they are published in."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.fetch import recognise as module
from vlm_vqa.fetch.recognise import block, head, recognise, refusal
from vlm_vqa.params import Source, parse_params
from vlm_vqa.yaml_file import read_yaml

ROOT = Path(__file__).parents[2]
TEN = [{"answer": "cup", "answer_confidence": "yes"}] * 10
ASKED = {"question_id": 1, "image_id": 7, "question": "What?"}
ANSWERED = {"question_id": 1, "image_id": 7, "multiple_choice_answer": "cup", "answers": TEN}
TABLES = {
    "a VizWiz annotations file": [{"image": "a.jpg", "question": "What?", "answerable": 1, "answers": TEN}],
    "an A-OKVQA file": [{"image_id": 7, "question": "What?", "direct_answers": ["cup"], "question_id": "x"}],
    "a TextVQA file": {"data": [{"image_id": "a", "question": "What?", "answers": ["cup"], "flickr_300k_url": "u"}]},
    "an ST-VQA file": {
        "data": [{"file_path": "x/a.jpg", "question": "What?", "answers": ["cup"], "set_name": "train"}]
    },
    "a DocVQA file": {
        "data": [{"image": "x/a.jpg", "question": "What?", "answers": ["cup"], "docId": 1, "questionId": 2}]
    },
    "a GQA file": {"01": {"imageId": "a", "question": "What?", "answer": "cup", "fullAnswer": "a cup"}},
    "a VQA-RAD file": [{"image_name": "a.jpg", "question": "What?", "answer": "cup", "phrase_type": "freeform"}],
    "a SLAKE file": [{"img_name": "x/a.jpg", "question": "What?", "answer": "cup", "q_lang": "en"}],
    "a file of LLaVA's conversations": [{"image": "a.jpg", "conversations": [{"from": "human", "value": "What?"}]}],
    "a table": [{"Picture": "A.JPG", "Question": "What?", "Answer": "cup"}],
}


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def load(found) -> Source:
    """Return the source of a params.yaml with what was found: it must load."""
    small = read_yaml(ROOT / "presets/small.yaml")
    return parse_params(small | {"data": small["data"] | {"table": None} | found.data}).data.source


@pytest.mark.parametrize(("kind", "content"), TABLES.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_published_layouts_are_known_by_an_entry(tmp_path, kind, content):
    write(tmp_path / "train.json", content)
    for place in ("pictures/x/a.jpg", "pictures/000007.jpg"):
        write(tmp_path / place, "")
    found = recognise(tmp_path)
    table = found.data["table"]
    assert (found.what, load(found), found.unsure) == (kind, Source.TABLE, {})
    assert table["images"] == "pictures" and (table["val"], table["val_share"]) == (None, 0.2)
    assert table["image_name"] == ("{image_id:06d}.jpg" if "A-OKVQA" in kind else None)
    said = refusal(tmp_path / "train.json")
    assert f"this is {kind} (1 entries with " in said and block(found.data, {}).removeprefix("data:\n  source") in said


def test_vqav2s_layout_is_known_with_any_names(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"{split}_q.json", {"info": {"a": [1]}, "questions": [ASKED]})
        write(tmp_path / f"{split}_a.json", [ANSWERED])
        write(tmp_path / f"{split}2017/sub/COCO_{split}_000000000007.jpg", "")
    found = recognise(tmp_path)
    assert (found.what, load(found), found.unsure) == ("VQAv2's layout", Source.DIRECTORY, {})
    assert found.data["val"] == {
        "questions": "val_q.json", "annotations": "val_a.json", "images": "val2017",
        "image_name": "COCO_val_{image_id:012d}.jpg"}  # fmt: skip
    assert refusal(tmp_path / "val_q.json") is None, "a damaged one must not be called another layout"
    (tmp_path / "val_a.json").unlink()
    with pytest.raises(UserError, match="no file has annotations of val by its name.*train_questions.json"):
        recognise(tmp_path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_one_table_in_any_form(tmp_path, ending):
    rows = [{"image": "a/IMG_1.JPG", "question": "Wo, bitte?\nHier?", "answer": "dort"}] * 3
    path = tmp_path / f"questions.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending in ("csv", "tsv"):
        mark = "," if ending == "csv" else "\t"
        line = mark.join(("a/IMG_1.JPG", '"Wo, bitte?\nHier?"', "dort"))
        write(path, "\ufeff" + mark.join(rows[0]) + f"\n{line}" * 3)
    else:
        write(path, rows if ending == "json" else "\n".join(map(json.dumps, rows)))
    assert head(path) == rows
    write(tmp_path / "photos/a/img_1.jpg", "")
    for given in (path, tmp_path):
        table = recognise(given).data["table"]
        assert (table["train"], table["images"], table["columns"]["answers"]) == (path.name, "photos", "answer")


def test_no_more_than_the_head_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 5000)
    rows = [{"image": f"{number}.jpg", "question": "What?", "answer": "cup"} for number in range(1000)]
    for name, text in {
        "list.json": json.dumps(rows),
        "data.json": json.dumps({"info": "x", "data": rows}),
        "lines.jsonl": "\n".join(map(json.dumps, rows)),
        "table.csv": "image,question,answer\n" + "\n".join(",".join(row.values()) for row in rows),
    }.items():
        one = head(write(tmp_path / name, text))
        assert 50 < len(one) <= 100 and one == rows[: len(one)], name


@pytest.mark.parametrize(
    "text", ["", "[", "{", "[[", '{"a"', '{"a":', "[1, 2]", '{"a": [1]}', "\0\0\0", "[" * 100_000, '{"a":' * 100_000]
)
def test_what_is_none_is_none(tmp_path, text):
    for ending in ("json", "parquet"):
        path = write(tmp_path / f"a.{ending}", text)
        assert head(path) == [] and refusal(path) is None


def test_pictures_of_both_splits_and_what_is_unsure(tmp_path):
    for split, name in (("train", "IMG_1.JPG"), ("validation", "IMG_2.JPG")):
        write(tmp_path / f"{split}.csv", f"image,question,answer\n{name},What?,cup")
    write(tmp_path / "train/IMG_1.jpeg", "")
    found = recognise(tmp_path)
    assert found.unsure == {"data.table.images": "of the first 1 pictures 1 were not found by name"}
    write(tmp_path / "other/IMG_2.jpg", "")
    assert recognise(tmp_path).data["table"]["images"] == ["train", "other"]
    write(tmp_path / "third.csv", "image,question,answer\nx,What?,cup")
    assert recognise(tmp_path).unsure == {"data.table.train": "nothing is read from third.csv"}
    assert "# unsure: nothing is read" in block(*recognise(tmp_path)[1:])
    for name in ("train/IMG_2.JPG", "val/IMG_1.JPG", "val/IMG_2.JPG"):
        write(tmp_path / name, "")
    assert recognise(tmp_path).data["table"]["images"] == "{split}", "names mean other pictures in each split"


def test_what_cannot_be_told_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no such file or folder. Mend the path; a hub repository is named OWNER/NAME"):
        recognise(tmp_path / "gone")
    with pytest.raises(UserError, match="no questions with answers in .csv, .* and 0 pictures"):
        recognise(tmp_path)
    write(tmp_path / "a/IMG_1.HEIC", "")
    write(tmp_path / "notes.csv", "who,when\nme,now")
    for path in (tmp_path, write(tmp_path / "all.zip", ""), tmp_path / "notes.csv"):
        with pytest.raises(UserError, match="(?s)1 pictures. .*Unpack archives.*\nimage,question,answer\nIMG_1.HEIC,"):
            recognise(path)
    with pytest.raises(UserError, match="notes.csv has the columns who, when. Unpack"):
        recognise(tmp_path)
    assert "this is a table (1 entries with who, when): set data.source: table" in refusal(tmp_path / "notes.csv")
    for name in ("one.csv", "two.csv"):
        write(tmp_path / name, "image,question,answer\nIMG_1,What?,cup")
    with pytest.raises(UserError, match="not clear which of one.csv, two.csv are for training"):
        recognise(tmp_path)
    assert recognise(tmp_path / "two.csv").data["table"]["train"] == "two.csv"


def test_a_folder_of_datasets_is_one_table_a_split(tmp_path):
    rows = [{"image": {"bytes": b"x", "path": None}, "question": "What?", "answer": "cup"}] * 4
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=one, validation=one).save_to_disk(
        tmp_path / "two", num_shards={"train": 2, "validation": 1}
    )
    tables = [recognise(tmp_path / name).data["table"] for name in ("one", "two")]
    assert [(table["train"], table["val"], table["images"]) for table in tables] == [
        (".", None, None), ("train", "validation", None)]  # fmt: skip
    assert recognise(tmp_path / "two/train").data["table"]["train"] == "."


def test_a_table_without_pictures_or_with_more_cells_than_columns(tmp_path):
    path = write(tmp_path / "a.csv", "question,answer\nWhat?,cup,mug\nWho?\n")
    assert recognise(path).data["table"]["columns"]["image"] is None
    assert "question, answer" in refusal(path)
