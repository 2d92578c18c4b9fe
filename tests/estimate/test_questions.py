"""Counts, lengths of texts, and the batches made of them."""

import gzip
import json

import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.estimate.predict import changed
from vlm_vqa.estimate.questions import VQAV2_DISTINCT, VQAV2_QUESTION, plan_batches, read_size, tokens, validation_work


def test_estimated_tokens_are_close_to_a_trained_tokenizers(shared_data):
    from benchmarks.workload import TOKENIZER_LIMIT, read_questions
    from vlm_vqa.model.vlm import train_tokenizer

    pairs = read_questions()[:5000]
    tokenizer = train_tokenizer([text for pair in pairs for text in pair], TOKENIZER_LIMIT)
    for kind, tolerance in ((0, 0.02), (1, 0.1)):
        texts = [pair[kind] for pair in pairs]
        real = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
        assert sum(map(tokens, texts)) == pytest.approx(real, rel=tolerance)


def test_the_known_counts_are_vqav2s_and_its_sample_is_like_it(preset, tmp_path):
    size = read_size(preset("vqav2-reference"), tmp_path)
    assert (size.train, size.val, size.images) == (443_757, 214_354, 123_287)
    images, questions, _ = zip(*size.sample, strict=True)
    assert len(images) / len(set(images)) == pytest.approx(443_757 / 82_783, rel=0.02)
    assert sum(questions) / len(questions) == pytest.approx(sum(VQAV2_QUESTION) / 20, rel=0.01)


def test_records_of_the_source_count_and_others_do_not(preset, tmp_path, vqav2_folder):
    from vlm_vqa.fetch.write_records import fetch

    params = preset("small", **{"data.source": "directory", "data.directory": str(vqav2_folder())})
    params = changed(params, {"data.train.questions": "v2_OpenEnded_mscoco_train2014_questions.json"})
    fetch(params.data, tmp_path / "records")
    size = read_size(params, tmp_path / "records")
    asked = ("What color is the picture?", "Is the picture red?", "How many colors are there?")
    assert (size.train, size.images, len(size.sample)) == (12, 6, 12)
    assert {question for _, question, _ in size.sample} == {tokens(text) + 1 for text in asked}
    assert len(size.branches) == 24, "nine people agree, the tenth says maybe"
    assert read_size(preset("small"), tmp_path / "records").train == 38_575


def test_a_folder_of_unknown_content_is_asked_for(preset, tmp_path):
    params = preset("small", **{"data.source": "directory", "data.train.questions": "mine.json"})
    with pytest.raises(UserError, match="dvc repro fetch-vqav2"):
        read_size(params, tmp_path)


def test_batches_hold_a_windows_questions(preset, tmp_path):
    params = preset("vqav2-reference")
    size = read_size(params, tmp_path)
    batches = plan_batches(params, 4, size)
    assert batches.questions_a_step == 240 and batches.steps == -(-443_757 // 240)
    assert batches.questions_a_row == 1 and all(one.prefix == 0 for one in batches.sample)
    assert max(one.rows for one in batches.sample) <= 7
    # Each row holds 257 image tokens, the instruction, and a question with all of its text but <eos>.
    mean = sum(question + answer for _, question, answer in size.sample) / len(size.sample) - 1
    instruction = tokens(params.prompt.instruction) + 2
    assert batches.work.tokens / 443_757 == pytest.approx(257 + instruction + mean, rel=0.01)


def test_a_step_of_more_images_in_a_row_shares_more(preset, tmp_path):
    """The same questions are fewer tokens where they share their image."""
    shared, alone = preset("vqav2"), preset("vqav2", **{"train.questions_per_row": 1})
    found = [plan_batches(params, 4, read_size(params, tmp_path)).work.tokens for params in (shared, alone)]
    assert 3 < found[1] / found[0] < 5.36


def test_the_known_number_of_distinct_answers_is_that_of_real_questions(shared_data):
    with gzip.open(shared_data / "vqav2-text/annotations.json.gz") as file:
        rows = json.load(file)["annotations"]
    real = [len({row["multiple_choice_answer"], *(one["answer"] for one in row["answers"])}) for row in rows]
    assert sum(VQAV2_DISTINCT) / 20 == pytest.approx(sum(real) / len(real), rel=0.01)


def test_a_validation_reads_each_question_with_each_answer_and_twice_those_that_are_held_out(preset, tmp_path):
    """Alone in its row each branch is an image, the instruction and its texts; rows that branches share are fewer."""
    asked = {"validation.questions": 300, "validation.train_questions": 100, "train.questions_per_row": 1}
    alone, shared = preset("vqav2", **asked), preset("vqav2", **asked | {"train.questions_per_row": 8})
    size = read_size(alone, tmp_path)
    answers = len(size.branches) / len(size.sample)
    assert answers == pytest.approx(2.8, rel=0.02) and set(size.branches) == set(size.sample)
    mean = sum(question + answer for _, question, answer in size.branches) / len(size.branches) - 1
    row = 257 + tokens(alone.prompt.instruction) + 2 + mean
    assert validation_work(alone, size).tokens == pytest.approx(700 * answers * row, rel=0.02)
    assert validation_work(alone, size).image_tokens == pytest.approx(700 * answers * 257, rel=0.001)
    assert 5 < validation_work(alone, size).tokens / validation_work(shared, size).tokens < 8
