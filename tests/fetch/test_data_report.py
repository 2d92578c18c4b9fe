"""The page about the data: true counts, readable by itself, and the same bytes for the same data."""

import base64
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from io import BytesIO

import pyarrow.parquet as pq
from PIL import Image

from tests.html_page import Page
from vlm_vqa.data import records
from vlm_vqa.fetch.statistics import Texts, mean
from vlm_vqa.fetch.write_records import fetch

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"


def page(folder):
    return (folder / records.REPORT).read_text(encoding="utf-8")


def change(path, key, edit):
    content = json.loads(path.read_text())
    edit(content[key])
    path.write_text(json.dumps(content))


def test_the_counts_are_those_of_the_data(vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()

    def blank(annotations):
        annotations[0]["multiple_choice_answer"] = ""
        annotations[0]["answers"] = [
            {**answer, "answer": "" if n < 3 else str(n)} for n, answer in enumerate(annotations[0]["answers"])
        ]

    change(folder / ANNOTATIONS, "annotations", blank)
    change(folder / QUESTIONS, "questions", lambda questions: questions[1].update(question=questions[0]["question"]))
    (folder / "train2014" / "COCO_train2014_000000000001.jpg").write_text("never asked about")
    fetch(directory_params(folder), tmp_path / "records")
    rows = Page(page(tmp_path / "records")).rows
    assert rows["questions"] == ["12", "6"] and rows["images with questions"] == ["4", "2"]
    assert rows["main answers that nobody gave"] == ["0 (0.00 %)", "0 (0.00 %)"]
    assert rows["blank answers among the humans'"] == ["3 (2.50 %)", "0 (0.00 %)"]
    assert rows["humans who agree on the main answer, mean"] == [f"{(11 * 9 + 3) / 12:.2f} of 10", "9.00 of 10"]
    assert rows["asked in the same words of the same image before"] == ["1 (8.33 %)", "0 (0.00 %)"]
    assert rows["files left out, having no question"] == ["1", "0"]
    assert rows["number"][:2] == ["33.33 %", "33.33 %"]
    assert rows["images of both splits"] == ["6"] and rows["most common sizes"] == ["32 x 24: 6 (100.00 %)"]


def test_the_page_is_whole_and_stands_alone(vqav2_folder, directory_params, tmp_path):
    fetch(directory_params(vqav2_folder(train_images=20, val_images=20, size=(640, 480))), tmp_path / "records")
    text = page(tmp_path / "records")
    read = Page(text)
    # Six examples of each split, and twelve pairs of the plain pictures that look alike.
    assert not read.open and len(read.sources) == 12 + 24
    for source in read.sources:
        with Image.open(BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))) as image:
            assert image.format == "JPEG" and image.size == (293, 220)
    assert not re.findall(r"https?://|<script|<link|@import|url\(", text) and len(text) < 200_000


def test_equal_data_give_equal_pages(vqav2_folder, directory_params, tmp_path):
    for name in ("one", "two"):
        fetch(directory_params(vqav2_folder(f"source-{name}")), tmp_path / name / "records")
    assert page(tmp_path / "one" / "records") == page(tmp_path / "two" / "records")
    # Nor does it depend on how the images are kept.
    folder = vqav2_folder("zipped")
    shutil.make_archive(folder / "train", "zip", folder / "train2014")
    params = directory_params(folder)
    fetch(replace(params, train=replace(params.train, images="train.zip")), tmp_path / "three" / "records")
    assert page(tmp_path / "one" / "records") == page(tmp_path / "three" / "records")


def test_untrusted_words_are_no_markup(vqav2_folder, directory_params, tmp_path):
    folder, evil = vqav2_folder(train_images=1), "<script>alert('x')</script>&\"'"

    def spoil(annotations):
        for one in annotations:
            one.update(question_type=evil, answer_type=evil, multiple_choice_answer=evil)
            one["answers"] = [{**answer, "answer": evil, "answer_confidence": evil} for answer in one["answers"]]

    change(folder / ANNOTATIONS, "annotations", spoil)
    change(folder / QUESTIONS, "questions", lambda questions: [one.update(question=evil) for one in questions])
    fetch(directory_params(folder), tmp_path / "records")
    text = page(tmp_path / "records")
    assert "<script" not in text and "&lt;script&gt;" in text and not Page(text).open


def test_equal_images_are_counted(vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    images = sorted((folder / "train2014").iterdir())
    for image in images[1:]:
        shutil.copy(images[0], image)
    fetch(directory_params(folder), tmp_path / "records")
    rows = Page(page(tmp_path / "records")).rows
    assert rows["the bytes of an earlier image of train, another id"] == ["3 (50.00 %)"]
    assert rows["the bytes of an earlier image of val, another id"] == ["0 (0.00 %)"]


def test_what_was_changed_on_the_way_in_is_counted(vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    turned, clear = sorted((folder / "train2014").iterdir())[:2]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 24), "red").save(turned, exif=exif)
    Image.new("RGBA", (32, 24), (0, 0, 0, 0)).save(clear, "PNG")
    manifest = fetch(directory_params(folder), tmp_path / "records")
    assert manifest["pictures"]["changed"] == {
        "transparent, laid over white": 1,
        "turned upright, as its EXIF says": 1,
    }
    rows = Page(page(tmp_path / "records")).rows
    assert rows["changed: turned upright, as its EXIF says"] == ["1 (16.67 %)"]
    image = pq.read_table(next((tmp_path / "records").glob("images-*.parquet"))).to_pylist()[0]
    assert (image["width"], image["height"]) == (24, 32) and image["image"]["bytes"] == turned.read_bytes()


def test_look_alikes_stand_side_by_side(vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder(train_images=1)
    one, other = (next((folder / f"{split}2014").iterdir()) for split in ("train", "val"))
    other.write_bytes(one.read_bytes() + b"not a byte of the picture")
    manifest = fetch(directory_params(folder), tmp_path / "records")
    text = page(tmp_path / "records")
    ids = [int(path.stem.rpartition("_")[2]) for path in (one, other)]
    assert manifest["pictures"]["alike_across"] >= 1 and f"{ids[0]} and {ids[1]}" in text and 'class="pair"' in text


def row(number, kind):
    return {
        "question_id": number,
        "image_id": number // 2,
        "question": "Is it?",
        "question_type": "is it",
        "answer_type": kind,
        "multiple_choice_answer": "yes",
        "answers": ("yes",) * 10,
        "answer_confidences": ("yes",) * 10,
    }


def test_examples_are_of_all_types_and_of_different_images():
    counted = Texts(None)
    for number in range(1000):
        counted.add(row(number, ("yes/no", "number", "other")[number % 3 if number < 30 else 0]))
    examples = counted.examples()
    assert len({one["image_id"] for one in examples}) == len(examples) == 6
    assert Counter(one["answer_type"] for one in examples) == {"yes/no": 2, "number": 2, "other": 2}
    reordered = Texts(None)
    for number in reversed(range(1000)):
        reordered.add(row(number, ("yes/no", "number", "other")[number % 3 if number < 30 else 0]))
    assert sorted(one["question_id"] for one in reordered.examples()) == sorted(one["question_id"] for one in examples)


def test_means_are_of_what_was_counted():
    assert mean(Counter({9: 1, 1: 1, 2: 2})) == 14 / 4
