"""Source `easy-vqa`: the package's data, whole, in VQAv2's layout."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from vlm_vqa import params
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.contract import Violations, image_name
from vlm_vqa.fetch.question_types import answer_type, question_type
from vlm_vqa.fetch.sources import easy_vqa, open_source
from vlm_vqa.fetch.sources.official_layout import OFFICIAL, official_split

PACKAGE_SPLITS = {"train": ("train", 0), "val": ("test", 4000)}


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """{split: (the folder, its records)} of all of easy-VQA."""
    folder = tmp_path_factory.mktemp("easy-vqa")
    easy_vqa.write_official_layout(folder)
    violations = Violations()
    read = {}
    for split, files in OFFICIAL.items():
        read[split] = folder, [row.record for row in official_split(folder, split, files).rows(violations)]
    violations.raise_if_any()
    return read


@pytest.mark.parametrize(("split", "questions", "images"), [("train", 38_575, 4_000), ("val", 9_673, 1_000)])
def test_every_question_is_there_with_its_answer_ten_times(layout, split, questions, images):
    _, rows = layout[split]
    name, offset = PACKAGE_SPLITS[split]
    original = json.loads((easy_vqa._package_data() / name / "questions.json").read_text())
    assert [(row["question"], row["multiple_choice_answer"], row["image_id"] - offset) for row in rows] == [
        tuple(entry) for entry in original
    ]
    assert len(rows) == questions and len({row["image_id"] for row in rows}) == images
    assert all(row["answers"] == (row["multiple_choice_answer"],) * 10 for row in rows)
    assert all(row["question_id"] // 1000 == row["image_id"] for row in rows)


def test_no_id_is_in_both_splits(layout):
    ids = [{row["question_id"] for row in rows} for _, rows in layout.values()]
    images = [{row["image_id"] for row in rows} for _, rows in layout.values()]
    assert not ids[0] & ids[1] and not images[0] & images[1]
    assert [len(found) for found in ids] == [38_575, 9_673]


def test_types_are_those_of_vqav2(layout):
    assert Counter(row["answer_type"] for row in layout["train"][1]) == {"yes/no": 28_407, "other": 10_168}
    types = {row["question"]: row["question_type"] for _, rows in layout.values() for row in rows}
    assert types["what color is the shape?"] == "what color is the"
    assert types["what is the color of the circle?"] == "what is the color of the"
    assert types["what is the blue shape?"] == "what is the"
    assert types["what shape is present?"] == "what"
    assert types["is there a red shape?"] == "is there a"
    assert types["is there not a red shape?"] == "is there"
    assert types["is no circle present?"] == "is"
    assert types["does the image not contain a circle?"] == "does the"
    assert "none" not in types.values()


def test_types_follow_vqav2s_rule_on_real_questions(shared_data):
    sample = shared_data / "vqav2-sample"
    questions = json.loads((sample / "questions.json").read_text())["questions"]
    annotations = json.loads((sample / "annotations.json").read_text())["annotations"]
    found = [question_type(question["question"]) for question in questions]
    given = [annotation["question_type"].replace("none of the above", "none") for annotation in annotations]
    assert found == given
    answers = [(one["answer_type"], answer_type(one["multiple_choice_answer"])) for one in annotations]
    assert sum(given == found for given, found in answers) > 0.9 * len(answers)


@pytest.mark.parametrize(
    ("answer", "kind"), [("yes", "yes/no"), (" No", "yes/no"), ("12", "number"), ("1,000", "number"), ("red", "other")]
)
def test_answer_types(answer, kind):
    assert answer_type(answer) == kind


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What color is the car?", "what color is the"),
        ("Why?", "why"),
        ("Whatever?", "none"),
        ("Name it", "none"),
        ("?", "none"),
    ],
)
def test_question_types(question, kind):
    assert question_type(question) == kind


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_jpegs_of_the_same_pictures(layout, split):
    images = layout[split][0] / OFFICIAL[split].images
    name, offset = PACKAGE_SPLITS[split]
    assert len(list(images.iterdir())) == (4_000 if split == "train" else 1_000)
    for image_id in (0, 7, 999):
        with Image.open(images / image_name(OFFICIAL[split].image_name, image_id + offset)) as image:
            assert image.format == "JPEG" and image.size == (64, 64)
            assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4: colour at every pixel
            ours = np.asarray(image.convert("RGB"), dtype=int)
        with Image.open(easy_vqa._package_data() / name / "images" / f"{image_id}.png") as image:
            original = np.asarray(image.convert("RGB"), dtype=int)
        assert np.abs(ours - original).mean() < 2


def test_other_data_stop_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(easy_vqa, "DATA_HASH", "0" * 64)
    with pytest.raises(UserError, match="easy-VQA's files have hash .*pip install --force-reinstall .*easy-vqa==1.0"):
        easy_vqa.write_official_layout(tmp_path)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(easy_vqa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install easy-vqa==1.0"):
        easy_vqa.write_official_layout(tmp_path)


def test_the_source_is_identified_and_cleans_up(monkeypatch, directory_params, tmp_path):
    # Writing is tested above; here only what stands around it.
    monkeypatch.setattr(easy_vqa, "write_official_layout", Path.mkdir)
    with open_source(directory_params(".", source=params.Source.EASY_VQA), tmp_path / "records") as source:
        folder = source.splits[0].inputs["questions"].parent
        assert folder.is_dir()
        assert source.name == "easy-vqa" and source.origin["version"] == "1.0" and len(source.origin["data_hash"]) == 64
        assert any("10 times" in note for note in source.notes) and any("4000" in note for note in source.notes)
    assert not folder.exists()
