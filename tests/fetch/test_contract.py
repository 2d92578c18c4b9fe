"""The data contract: each way in which data can be wrong is found, named with file and id, and stops the fetch."""

import json
import re
import shutil
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.contract import ViolationKind, image_name
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import BadRecords, DataParams, Doubtful, Source, TableParams

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
IMAGE = "train2014/COCO_train2014_000000000025.jpg"


def change(folder, name, edit):
    """Apply `edit` to the list of entries of a JSON file."""
    path = folder / name
    content = json.loads(path.read_text())
    (entries,) = (value for value in content.values() if isinstance(value, list))
    edit(entries)
    path.write_text(json.dumps(content))


def by_id(entries, question_id=25001):
    return next(entry for entry in entries if entry["question_id"] == question_id)


def edit_question(**values):
    return lambda folder: change(folder, QUESTIONS, lambda entries: by_id(entries).update(values))


def edit_annotation(**values):
    return lambda folder: change(folder, ANNOTATIONS, lambda entries: by_id(entries).update(values))


def without(name, key):
    return lambda folder: change(folder, name, lambda entries: by_id(entries).pop(key))


def drop(name):
    return lambda folder: change(folder, name, lambda entries: entries.remove(by_id(entries)))


def double(name):
    return lambda folder: change(folder, name, lambda entries: entries.append(by_id(entries)))


def cut(name, share=0.5):
    def half(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return half


def replace_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def silence(annotation):
    annotation["answers"] = ["", {"answer": " "}, ""]


def edit_answers(edit):
    return lambda folder: change(folder, ANNOTATIONS, lambda entries: edit(by_id(entries)["answers"]))


BROKEN = {
    "image missing": (lambda folder: (folder / IMAGE).unlink(), ViolationKind.MISSING_IMAGE, f"{IMAGE} (image_id 25)"),
    "image cut": (cut(IMAGE), ViolationKind.BROKEN_IMAGE, IMAGE),
    "image empty": (cut(IMAGE, 0), ViolationKind.BROKEN_IMAGE, IMAGE),
    "image is text": (replace_text(IMAGE, "no image"), ViolationKind.BROKEN_IMAGE, f"{IMAGE}: not a readable image"),
    "image is a folder": (
        lambda folder: ((folder / IMAGE).unlink(), (folder / IMAGE).mkdir()),
        ViolationKind.MISSING_IMAGE,
        IMAGE,
    ),
    "questions missing": (lambda folder: (folder / QUESTIONS).unlink(), ViolationKind.MISSING_FILE, QUESTIONS),
    "annotations missing": (lambda folder: (folder / ANNOTATIONS).unlink(), ViolationKind.MISSING_FILE, ANNOTATIONS),
    "images missing": (
        lambda folder: shutil.rmtree(folder / "train2014"),
        ViolationKind.MISSING_FILE,
        "train2014: neither",
    ),
    "questions cut": (cut(QUESTIONS), ViolationKind.BROKEN_FILE, QUESTIONS),
    "annotations cut": (cut(ANNOTATIONS), ViolationKind.BROKEN_FILE, ANNOTATIONS),
    "questions are bytes": (
        lambda folder: (folder / QUESTIONS).write_bytes(b"{\xff\xfe"),
        ViolationKind.ENCODING,
        f"{QUESTIONS}: is not UTF-8 (invalid start byte at byte 1)",
    ),
    "questions in UTF-16": (
        lambda folder: (folder / QUESTIONS).write_text((folder / QUESTIONS).read_text(), encoding="utf-16"),
        ViolationKind.ENCODING,
        f"{QUESTIONS}: is UTF-16; save it as UTF-8",
    ),
    "questions with a comma too many": (
        lambda folder: (folder / QUESTIONS).write_text((folder / QUESTIONS).read_text().replace("}, {", "},, {", 1)),
        ViolationKind.BAD_SYNTAX,
        f"{QUESTIONS}: Expecting value: line 1 column",
    ),
    "every answer blank": (
        lambda folder: change(folder, ANNOTATIONS, lambda entries: silence(by_id(entries))),
        ViolationKind.NO_ANSWER,
        f"{QUESTIONS}: question_id 25001: its answers are ['', ' ', '']",
    ),
    "no answer": (edit_annotation(answers=[]), ViolationKind.NO_ANSWER, "question_id 25001: its answers are []"),
    "one image to validate on": (
        lambda folder: [
            change(folder, name, lambda entries: entries.__delitem__(slice(3, 6)))
            for name in (QUESTIONS.replace("train", "val"), ANNOTATIONS.replace("train", "val"))
        ],
        ViolationKind.FEW_VALIDATION,
        "3 questions about 1 image",
    ),
    "questions nested": (replace_text(QUESTIONS, "[" * 100_000), ViolationKind.BROKEN_FILE, QUESTIONS),
    "other top level": (replace_text(QUESTIONS, '"x"'), ViolationKind.FOREIGN_FILE, "without a list 'questions'"),
    "other key": (
        replace_text(ANNOTATIONS, '{"questions": []}'),
        ViolationKind.FOREIGN_FILE,
        "without a list 'annotations'",
    ),
    "no questions": (replace_text(QUESTIONS, '{"questions": []}'), ViolationKind.EMPTY_FILE, "'questions' is empty"),
    "question is a number": (
        lambda folder: change(folder, QUESTIONS, lambda entries: entries.append(5)),
        ViolationKind.BAD_QUESTION,
        "entry 12",
    ),
    "question without text": (without(QUESTIONS, "question"), ViolationKind.BAD_QUESTION, "25001): without question"),
    "question blank": (edit_question(question=" \n"), ViolationKind.BAD_QUESTION, "(question_id 25001): question is"),
    "question with half a character": (
        edit_question(question="Is it \ud83d?"),
        ViolationKind.BAD_QUESTION,
        "question is 'Is it",
    ),
    "answer with half a character": (
        edit_answers(lambda answers: answers[3].update(answer="\udc00")),
        ViolationKind.BAD_ANNOTATION,
        "(question_id 25001): an answer is",
    ),
    "image id negative": (edit_question(image_id=-1), ViolationKind.BAD_QUESTION, "image_id is -1"),
    "image id huge": (edit_question(image_id=2**63), ViolationKind.BAD_QUESTION, "image_id is 9223372036854775808"),
    "annotation without answers": (
        without(ANNOTATIONS, "answers"),
        ViolationKind.BAD_ANNOTATION,
        "(question_id 25001): without answers",
    ),
    "type no text": (edit_annotation(answer_type=1), ViolationKind.BAD_ANNOTATION, "answer_type is 1, not text"),
    "main answer a number": (
        edit_annotation(multiple_choice_answer=1),
        ViolationKind.BAD_ANNOTATION,
        "multiple_choice_answer is 1, not text",
    ),
    "answers no list": (
        edit_annotation(answers={"red": 1}),
        ViolationKind.BAD_ANNOTATION,
        "(question_id 25001): answers is {'red': 1}",
    ),
    "answer no text": (
        edit_answers(lambda answers: answers[3].update(answer=7)),
        ViolationKind.BAD_ANNOTATION,
        "(question_id 25001): an answer is",
    ),
    "question twice": (double(QUESTIONS), ViolationKind.DUPLICATE_QUESTION, f"{QUESTIONS}: question_id 25001"),
    "annotation twice": (double(ANNOTATIONS), ViolationKind.DUPLICATE_ANNOTATION, f"{ANNOTATIONS}: question_id 25001"),
    "no annotation": (drop(ANNOTATIONS), ViolationKind.NO_ANNOTATION, f"{QUESTIONS}: question_id 25001"),
    "no question": (drop(QUESTIONS), ViolationKind.NO_QUESTION, f"{ANNOTATIONS}: question_id 25001"),
    "images differ": (
        edit_question(image_id=9),
        ViolationKind.IMAGE_MISMATCH,
        f"{QUESTIONS}: question_id 25001 has image_id 9",
    ),
}


def as_table(rows, **changes):
    """Name a table in the images' place, with this as its rows."""
    names = {"train": "train.csv", "val": "train.csv", "images": ["train2014", "val2014"]} | changes
    return lambda folder: (folder / "train.csv").write_text(rows), lambda params: {
        "source": Source.TABLE,
        "table": TableParams(**names),
    }


def copy_into_val(more=b""):
    def copy(folder):
        path = next((folder / "val2014").iterdir())
        path.write_bytes((folder / IMAGE).read_bytes() + more)

    return copy


REFUSE, HEAD = {"doubtful": Doubtful.REFUSE}, "image,question,answer\n"
RAISED = {kind: (damage, lambda params: {}) for damage, kind, _ in BROKEN.values()} | {
    ViolationKind.CLOSED_FILE: (
        lambda folder: ((folder / QUESTIONS).unlink(), (folder / QUESTIONS).mkdir()),
        lambda params: {},
    ),
    ViolationKind.COLUMNS: as_table("a,b\n1,2\n"),
    ViolationKind.BAD_ROW: as_table(HEAD + "1.jpg,What?,this\n1.jpg,What?\n"),
    ViolationKind.FEW_IMAGES: as_table(HEAD + f"{IMAGE},What?,this\n", val=None, val_share=0.5),
    ViolationKind.OTHER_ARCHIVE: (
        lambda folder: (shutil.rmtree(folder / "train2014"), (folder / "train2014").write_bytes(b"Rar!")),
        lambda params: {},
    ),
    ViolationKind.UNSAID_ANSWER: (edit_annotation(multiple_choice_answer="nobody's"), lambda params: REFUSE),
    ViolationKind.IMAGE_ID: (
        lambda folder: [
            change(folder, name, lambda entries: by_id(entries).update(image_id=10**12))
            for name in (QUESTIONS, ANNOTATIONS)
        ],
        lambda params: {},
    ),
    ViolationKind.TOO_MANY_DROPPED: (edit_annotation(answers=[]), lambda params: {"bad_records": BadRecords.DROP}),
    ViolationKind.QUESTION_OVERLAP: (lambda folder: None, lambda params: {"val": params.train}),
    ViolationKind.IMAGE_OVERLAP: (lambda folder: None, lambda params: {"val": params.train}),
    ViolationKind.IMAGE_TWIN: (copy_into_val(), lambda params: {}),
    ViolationKind.LOOKALIKE: (copy_into_val(b"more"), lambda params: REFUSE),
    ViolationKind.IMAGE_CONFLICT: as_table(
        HEAD.replace("image", "image_id,image") + f"1,{IMAGE},What?,this\n1,other.jpg,What?,this\n"
    ),
}
"""For each kind an input that raises it: what it does to the folder, and to the parameters."""


@pytest.mark.parametrize("kind", ViolationKind)
def test_every_kind_is_raised_with_a_remedy_that_names_what_there_is(kind, vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    damage, changes = RAISED[kind]
    damage(folder)
    with pytest.raises(UserError) as caught:
        fetch(directory_params(folder, **changes(directory_params(folder))), tmp_path / "records")
    assert f"{kind.label}: " in str(caught.value) and f". To do: {kind.remedy}.\n  " in str(caught.value)
    assert str(folder) in str(caught.value) or kind is ViolationKind.TOO_MANY_DROPPED
    keys = re.findall(r"data\.([a-z_]+)", kind.remedy)
    assert set(keys) <= {field.name for field in fields(DataParams)}


@pytest.mark.parametrize("case", BROKEN)
def test_a_violation_is_named_alone_and_nothing_is_stored(case, vqav2_folder, directory_params, tmp_path):
    damage, kind, where = BROKEN[case]
    folder = vqav2_folder()
    damage(folder)
    with pytest.raises(UserError) as caught:
        fetch(directory_params(folder), tmp_path / "records")
    message = str(caught.value)
    # One fault is one violation: nothing that follows from it is reported beside it.
    assert "in 1 places" in message and f"{kind.label}: 1. To do: {kind.remedy}" in message
    assert where in message and str(folder) in message
    assert list((tmp_path / "records").iterdir()) == []


@pytest.mark.parametrize("question_id", ["25001", True, -1, 25001.0, None, "a", ["b"]])
def test_a_question_id_is_a_whole_number(question_id, vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    edit_question(question_id=question_id)(folder)
    with pytest.raises(UserError) as caught:
        fetch(directory_params(folder), tmp_path / "records")
    # Its annotation has lost its question, which is no further violation.
    assert "in 1 places" in str(caught.value) and f"question_id is {question_id!r}, not a whole" in str(caught.value)


def test_an_id_that_does_not_fit_the_name_is_named(vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    for name in (QUESTIONS, ANNOTATIONS):
        change(folder, name, lambda entries: by_id(entries).update(image_id=10**12))
    with pytest.raises(UserError, match=r"does not fit the name pattern: 1(.|\n)*question_id 25001: image_id 10000"):
        fetch(directory_params(folder), tmp_path / "records")


def test_an_image_over_the_bound_is_named(vqav2_folder, directory_params, tmp_path):
    params = directory_params(vqav2_folder(val_images=1), max_image_pixels=32 * 24 - 1)
    with pytest.raises(UserError, match=r"unreadable image: 5(.|\n)*32 x 24 is more than data.max_image_pixels"):
        fetch(params, tmp_path / "records")


@pytest.mark.parametrize("images", ["train2014", "train2014.zip"])
def test_a_file_far_too_long_for_its_pixels_is_not_read(images, vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    params = directory_params(folder, max_image_pixels=32 * 24)
    with open(folder / IMAGE, "ab") as file:
        file.write(bytes(2**20 + 8 * 32 * 24))
    if images.endswith(".zip"):
        zipped(folder)
    train = replace(params.train, images=images)
    with pytest.raises(UserError, match=r"unreadable image: 1(.|\n)*0025.jpg: 10\d{5} bytes are too many"):
        fetch(replace(params, train=train), tmp_path / "records")


def test_all_violations_are_counted_and_the_first_are_shown(vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder(train_images=30)
    for path in (folder / "train2014").iterdir():
        path.unlink()
    edit_question(question="")(folder)
    (folder / "v2_mscoco_val2014_annotations.json").write_text("{")
    with pytest.raises(UserError) as caught:
        fetch(directory_params(folder), tmp_path / "records")
    message = str(caught.value)
    assert "in 32 places" in message
    assert "malformed question: 1." in message and "unreadable file: 1." in message and "missing image: 30." in message
    assert "... and 10 more" in message and message.count("(image_id ") == 20


def test_overlapping_splits_are_refused_unless_allowed(vqav2_folder, directory_params, tmp_path):
    params = directory_params(vqav2_folder())
    same = {"val": params.train}
    with pytest.raises(UserError) as caught:
        fetch(directory_params(params.directory, **same), tmp_path / "records")
    assert "image in both splits: 4." in str(caught.value) and "question id in both splits: 12." in str(caught.value)
    manifest = fetch(directory_params(params.directory, **same, allow_split_overlap=True), tmp_path / "records")
    assert manifest["images"] == manifest["splits"]["val"]["images"] == manifest["splits"]["train"]["images"] == 4
    assert manifest["allow_split_overlap"] is True
    # A file that both splits name is read once, and missed once.
    (Path(params.directory) / IMAGE).unlink()
    with pytest.raises(UserError, match="missing image: 1\\."):
        fetch(directory_params(params.directory, **same, allow_split_overlap=True), tmp_path / "records")


def test_one_id_for_two_images_is_refused_even_where_overlap_is_allowed(vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    other = vqav2_folder("other", size=(16, 16))
    shutil.move(other / "train2014", folder / "other2014")
    params = directory_params(folder, allow_split_overlap=True)
    with pytest.raises(UserError, match=r"one image id, two images: 4(.|\n)*other2014.* differ \(image_id 9\)"):
        fetch(replace(params, val=replace(params.train, images="other2014")), tmp_path / "records")


def zipped(folder, damage=None):
    """Put the training images into a zip below two folders, and name it in the parameters."""
    path = folder / "train2014.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for image in sorted((folder / "train2014").iterdir()):
            archive.write(image, f"some/train2014/{image.name}")
            if damage == "twice" and image.name in IMAGE:
                archive.write(image, f"elsewhere/{image.name}")
    shutil.rmtree(folder / "train2014")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    if damage == "flipped":
        data = bytearray(path.read_bytes())
        data[data.index(b"\xff\xd8\xff", data.index(b"000000000025")) + 300] ^= 0xFF
        path.write_bytes(data)
    if damage in FIELDS:
        set_field(path, **FIELDS[damage])
    return path


# Fields of a zip's local header and of its directory: what damage puts where, as (offset in either, 16 bits).
FIELDS = {
    "encrypted": {"local": 6, "central": 8, "value": 0x1},
    "compressed in an unknown way": {"local": 8, "central": 10, "value": 97},
}


def set_field(path, local, central, value):
    """Overwrite a 16-bit field of the member of image 25, in both places where it stands."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        start = data.rindex(signature, 0, data.index(b"000000000025", data.index(signature)))
        data[start + offset : start + offset + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("cut", r"unreadable file: 1(.|\n)*train2014.zip: not a usable zip archive"),
        (
            "flipped",
            r"unreadable image: 1(.|\n)*train2014.zip: some/train2014/COCO_train2014_0+25.jpg: cannot be unpacked",
        ),
        ("encrypted", r"unreadable image: 1(.|\n)*COCO_train2014_0+25.jpg: is encrypted; unpack the archive"),
        (
            "compressed in an unknown way",
            r"unreadable image: 1(.|\n)*COCO_train2014_0+25.jpg: cannot be unpacked \(That compression",
        ),
        ("twice", r"unreadable image: 1(.|\n)*COCO_train2014_0+25.jpg': 2 files are meant .*(elsewhere|some)"),
    ],
)
def test_damage_inside_an_archive_is_named(damage, expected, vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    params = directory_params(folder)
    train = replace(params.train, images=zipped(folder, damage).name)
    with pytest.raises(UserError, match=expected):
        fetch(replace(params, train=train), tmp_path / "records")


def test_a_name_pattern_makes_official_names():
    coco = "COCO_val2014_{image_id:012d}.jpg"
    assert image_name(coco, 42) == "COCO_val2014_000000000042.jpg"
    assert image_name(coco, 10**12 - 1) is not None and image_name(coco, 10**12) is None
    assert image_name("{image_id}.png", 10**15) == "1000000000000000.png"
