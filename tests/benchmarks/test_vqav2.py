"""Real samples where they are, drawn ones like them where not, and both say which they are."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import extraction, features, measure, scorer, vqav2
from benchmarks.__main__ import KNOWN
from benchmarks.workload import data, draw_step, read_questions
from proofs.project import ROOT, sample_params
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.predict import changed
from vlm_vqa.evaluation import vqa_accuracy as ours
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import load_params

QUESTIONS = [{"image_id": 7, "question_id": 7000, "question": "Is it?"}]
ANNOTATIONS = [{"question_id": 7000, "multiple_choice_answer": "yes"}]


@pytest.fixture
def absent(monkeypatch, tmp_path):
    """No sample is there."""
    monkeypatch.setenv("VLM_VQA_SHARED_DATA", str(tmp_path / "nowhere"))


@pytest.fixture(scope="module")
def drawn():
    return vqav2.draw(6000, 4000)


def write_texts(folder: Path, questions: bytes, annotations: bytes) -> None:
    (folder / vqav2.TEXT).mkdir()
    (folder / vqav2.TEXT / "questions.json.gz").write_bytes(questions)
    (folder / vqav2.TEXT / "annotations.json.gz").write_bytes(annotations)


def packed(kind: str, rows: list) -> bytes:
    return gzip.compress(json.dumps({kind: rows}).encode())


def figures(rows: tuple[vqav2.Rows, vqav2.Rows]) -> dict[str, float]:
    """What the cost of a question and of its scoring depends on: means, and shares of all human answers."""
    questions, annotations = rows
    texts = [row["question"] for row in questions]
    tens = [[answer["answer"] for answer in row["answers"]] for row in annotations]
    answers = [answer for ten in tens for answer in ten]

    def share(of) -> float:
        return sum(map(of, answers)) / len(answers)

    return {
        "words of a question": sum(len(text.split()) for text in texts) / len(texts),
        "letters of a question": sum(map(len, texts)) / len(texts),
        "letters of an answer": sum(map(len, answers)) / len(answers),
        "different answers of ten": sum(len(set(ten)) for ten in tens) / len(tens),
        "unanimous": sum(len(set(ten)) == 1 for ten in tens) / len(tens),
        "with digits": share(lambda text: any(letter.isdigit() for letter in text)),
        "of several words": share(lambda text: " " in text),
        "normalised to others": share(lambda text: ours.normalise(text) != text),
        "with a mark": share(lambda text: bool(ours._PUNCTUATION.intersection(text))),
        "with an apostrophe": share(lambda text: "'" in text),
        "with a number word": share(lambda text: any(word in ours._NUMBERS for word in text.split())),
        # Fewer of fewer answers.
        "different ones": len(set(answers[:60_000])) / 60_000,
    }


def test_what_is_drawn_is_like_the_real_sample(shared_data, drawn):
    real = figures(tuple(rows[:6000] for rows in vqav2.read(shared_data / vqav2.TEXT)))
    found = figures(drawn)
    rare = {"normalised to others", "with a mark", "with an apostrophe", "with a number word", "of several words"}
    for what, value in real.items():
        assert found[what] == pytest.approx(value, rel=0.5 if what in rare else 0.15), what


def test_what_is_drawn_has_every_form_that_the_scorer_meets(drawn):
    """Also where the real ones are not there to compare with."""
    found = figures(drawn)
    assert found["unanimous"] == pytest.approx(0.356, abs=0.03)
    assert found["words of a question"] == pytest.approx(6.24, abs=0.1)
    assert 0.005 < found["normalised to others"] < 0.02 and found["with an apostrophe"] > 0.001
    assert Counter(row["answer_type"] for row in drawn[1]) == dict.fromkeys(("yes/no", "number", "other"), 2000)
    assert len({row["question_type"] for row in drawn[1]}) == 65
    for row in drawn[1]:
        counts = Counter(answer["answer"] for answer in row["answers"])
        assert sum(counts.values()) == 10 and counts[row["multiple_choice_answer"]] == max(counts.values())
    slow, fast, scored = scorer.compare(scorer.repeat(drawn[1], 600), rounds=1)
    assert 0.4 < sum(scored.values()) / len(scored) < 0.8


def test_the_same_is_drawn_again(drawn):
    assert vqav2.draw(300, 200) == vqav2.draw(300, 200) != vqav2.draw(300, 200, seed=1)
    assert len({row["question_id"] for row in drawn[0]}) == 6000 and len({row["image_id"] for row in drawn[0]}) == 4000


def test_without_the_texts_a_step_is_of_drawn_ones(absent, monkeypatch):
    monkeypatch.setitem(vqav2.COUNTS, vqav2.TEXT, (3000, 2000))
    assert data() == {"questions": "drawn", "image features": "random"}
    workload = draw_step(read_questions(), num_patches=2, feature_width=2)
    assert workload.facts["records"] == 3000 and workload.facts["records_dropped_as_too_long"] < 20
    # As of real ones, see `test_the_real_step`.
    assert len(workload.questions) == 60 and 10 <= workload.facts["images"] <= 14
    assert 60 * 2 <= workload.supervised < 60 * 3


def test_without_the_sample_pictures_of_cocos_sizes_are_drawn(absent, monkeypatch, tmp_path):
    monkeypatch.setitem(vqav2.COUNTS, vqav2.SAMPLE, (16, 12))
    with vqav2.sample() as folder:
        questions, pictures = vqav2.read(folder)[0], vqav2.pictures(folder)
        assert (len(questions), len(pictures)) == vqav2.COUNTS[vqav2.SAMPLE]
        assert {row["image_id"] for row in questions} == {int(path.stem.rpartition("_")[2]) for path in pictures}
        photographs = extraction.read_photographs()
        assert photographs == [path.read_bytes() for path in pictures]
    assert len(photographs) == 12 == len(set(photographs))
    # COCO's own of 640 x 480 have 0.22 to 0.96 bytes a pixel.
    assert all(0.25 < len(data) / (640 * 480) < 0.6 for data in photographs)
    with vqav2.sample() as folder:
        params = changed(
            load_params(ROOT / "presets/small.yaml"), {"data.source": "directory", **sample_params(folder.parent)}
        )
        manifest = fetch(params.data, tmp_path / "records")
    assert (manifest["splits"]["train"]["questions"], manifest["splits"]["train"]["images"]) == (16, 12)
    encoded = features.see_photographs()
    assert features.compare_errors(encoded)["int8"]["median"] == pytest.approx(0.006, rel=0.3)


def test_texts_that_are_there_are_read(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_VQA_SHARED_DATA", str(tmp_path))
    write_texts(tmp_path, packed("questions", QUESTIONS), packed("annotations", ANNOTATIONS))
    assert read_questions() == [("Is it?", "yes")]
    assert data()["questions"] == "real VQAv2" and vqav2.origin(vqav2.SAMPLE) == "drawn"


def test_the_real_sample_is_read_where_it_lies(shared_data, monkeypatch):
    monkeypatch.setenv("VLM_VQA_SHARED_DATA", str(shared_data))
    with vqav2.sample() as folder:
        assert folder == shared_data / vqav2.SAMPLE and len(vqav2.read(folder)[0]) == 109
    assert vqav2.origin(vqav2.SAMPLE) == vqav2.REAL


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", packed("questions", QUESTIONS)[:-9], packed("other", []), gzip.compress(b"[]")],
    ids=["empty", "no gzip", "cut off", "other rows", "no rows"],
)
def test_damaged_texts_are_named_and_not_replaced_by_drawn_ones(monkeypatch, tmp_path, content):
    monkeypatch.setenv("VLM_VQA_SHARED_DATA", str(tmp_path))
    write_texts(tmp_path, content, packed("annotations", ANNOTATIONS))
    with pytest.raises(UserError, match=r"questions\.json\.gz: cannot be read .*Get a whole copy of vqav2-text"):
        vqav2.texts()


def test_a_sample_without_pictures_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_VQA_SHARED_DATA", str(tmp_path))
    images = tmp_path / vqav2.SAMPLE / "images"
    images.mkdir(parents=True)
    with pytest.raises(UserError, match="no pictures there"):
        extraction.read_photographs()
    Image.new("RGB", (947, 710)).save(images / "COCO_train2014_000000000001.jpg")
    with pytest.raises(UserError, match="no photographs of 640 pixels there"):
        extraction.read_photographs()


@pytest.mark.parametrize("name", KNOWN)
def test_every_result_says_what_it_is_of(name):
    content = json.loads((measure.COMMITTED / f"{name}.json").read_text())
    assert content["data"] and all(content["data"].values())
    origins = set(content["data"].values())
    for claim in content["claims"]:
        assert vqav2.DRAWN not in claim["what"].split() or vqav2.DRAWN in origins, claim["what"]
        assert " real " not in claim["what"] or vqav2.REAL in origins, claim["what"]
