"""Small inputs of strangers, each with what is right for it: records, records as another input's, or one refusal by name.

They are no part of the project: `cases` beside the real samples (`VLM_VQA_SHARED_DATA`), a folder each, with a README that
says where people met it.
"""

import re

import pytest

from vlm_vqa.data.records import MANIFEST, iter_images, load_questions, read_manifest
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import load_params

CASES = {
    "00-control": {"images": 7},
    "01-openvqa62-one-answer-no-mca": {"images": 7, "answers": {"1"}},
    "01b-one-answer-with-mca": {"images": 7, "answers": {"1"}},
    "02-okvqa-no-mca": {"images": 7, "answers": {"10"}},
    "03-vizwiz": {"refused": ["VizWiz", "source: table", "train.json"]},
    "04-aokvqa": {"refused": ["A-OKVQA", "source: table", "direct_answers"]},
    "06-vqacp-lists-two-image-folders": {"images": 7},
    "08-own-csv": {"refused": ["train.csv", "source: table", "question", "answer"]},
    "10-utf8-bom": {"as": "00-control"},
    "10b-utf16": {"refused": ["is UTF-16; save it as UTF-8"]},
    "11-coco2017-names": {"refused": ["missing image", r"train2017/000000000102.jpg: make data.SPLIT.images a list"]},
    "12-mixed-extensions": {"images": 7},
    "14-windows-zip-backslashes": {"as": "00-control"},
    "15-macos-zip": {"as": "00-control"},
    "16-test-split-as-val": {"refused": ["missing file", "v2_mscoco_val2014_annotations.json"]},
    "17-numeric-answers": {"refused": [r"entry 0 \(question_id 1000\): multiple_choice_answer is 1, not text"]},
    "18-one-blank-answer-of-ten-in-val": {"images": 7},
    "18b-nobody-answered-in-train": {"refused": ["question without any answer", "question_id"]},
    "19-texts-of-the-world": {"images": 7},
    "20-string-and-missing-fields": {"refused": ["in 4 places", "question_id is '1000', not a whole number"]},
    "30-exif-orientation": {"sizes": {(64, 96)}},
    "31-transparent-png": {"images": 7},
    "32-tiny-and-narrow-images": {"images": 7},
    "33-damaged-images": {"refused": ["unreadable image: 3", "empty", "a web page"]},
    "33b-premature-end-of-jpeg": {"refused": ["unreadable image: 1"]},
    "34-cmyk-grey-palette-animated": {"images": 7},
    "35-16-bit-png": {"images": 7},
    "36-heic-named-jpg": {"refused": ["HEIC"]},
    "37-png-large-text-chunk": {"images": 7},
    "38-corrupt-exif-jpeg": {"images": 7},
    "40-one-val-question": {"refused": ["validation on fewer than two images"]},
    "41-huge-ids": {"images": 7},
    "42-same-image-ids-in-both-splits": {
        "refused": ["give different images different ids"],
        "not": ["allow_split_overlap"],
    },
    "44-main-answer-nobody-gave": {"images": 7},
    "45-test-questions-with-val-annotations": {
        "refused": ["question without annotation", "annotation without question"]
    },
    "46-same-photo-in-both-splits-other-id": {"refused": ["image in both splits", "allow_split_overlap"]},
    "48-two-image-archives": {"as": "00-control"},
    "49-image-name-with-folder": {"images": 7},
    "50-own-csv-converted": {"images": 7},
    "51-tar-of-images": {"refused": ["tar"]},
    "52-vqa-v1-abstract-png": {"images": 7},
    "55-one-string-answer": {"images": 7, "answers": {"1"}},
}
"""`images` in the records; the same `data_hash` as the case named by `as`; sizes among the records' images; how many
`answers` the questions have; patterns that the refusal has, and words that it has not."""


@pytest.fixture
def cases(shared_data):
    folder = shared_data.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"the small inputs are not in {folder}")
    return folder


def fetch_case(folder, tmp_path, name="", **changes):
    """Fetch a case into a folder of its own; `changes` replace texts of its parameters."""
    text = (folder / name / "params.yaml").read_text().replace("@CASE@", str(folder / name))
    for before, after in changes.items():
        text = text.replace(before.replace("__", ": "), after)
    (tmp_path / f"{name}.yaml").write_text(text)
    records = tmp_path / name
    fetch(load_params(tmp_path / f"{name}.yaml").data, records)
    return records


def test_every_case_has_its_outcome_here(cases):
    there = {path.name for path in cases.iterdir() if (path / "params.yaml").is_file()}
    assert there == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_ends_as_is_right(cases, tmp_path, name):
    wanted = CASES[name]
    if "refused" in wanted:
        with pytest.raises(UserError) as refusal:
            fetch_case(cases, tmp_path, name)
        message = str(refusal.value)
        for pattern in wanted["refused"]:
            assert re.search(pattern, message), message
        assert not [word for word in (*wanted.get("not", ()), "object at 0x", "Traceback") if word in message], message
        assert "download" not in message or name == "33-damaged-images", message
        assert not (tmp_path / name / MANIFEST).exists()
        return
    records = fetch_case(cases, tmp_path, name)
    manifest = read_manifest(records)
    if "as" in wanted:
        assert manifest["data_hash"] == read_manifest(fetch_case(cases, tmp_path, wanted["as"]))["data_hash"]
    if "images" in wanted:
        assert len(list(iter_images(records))) == manifest["images"] == wanted["images"]
    if "answers" in wanted:
        assert set(manifest["splits"]["val"]["answers_per_question"]) == wanted["answers"]
    for split in ("train", "val"):
        assert all(row["multiple_choice_answer"].strip() for row in load_questions(records, split))
