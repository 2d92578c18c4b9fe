"""The benchmark of answering: both ways answer the same questions, and it says so when they do not agree."""

from itertools import groupby

import pytest
import torch

from benchmarks import generation
from benchmarks.generation import Features, Shape
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.params import LanguageConfig, Mask

TINY = Shape(
    "tiny", 5, 24, LanguageConfig(32, 64, 2, 4, 2, 8), 300, vocabulary=2000, whole_set=40, helm=20, alone=10,
    batch_size=16, helm_threads=8,
)  # fmt: skip
TEXTS = [f"{what} {thing}s are {where}?" for what in ("How many", "Which", "What kind of", "Whose")
         for thing in ("cat", "dog", "car", "tree") for where in ("there", "in front", "red", "on the left")]  # fmt: skip


def test_answers_are_equal_and_every_way_is_claimed(capsys):
    claims, details = generation.compare(TINY, TEXTS, rounds=1)
    assert len(claims) == 4
    # The target is image-prefix's alone.
    assert [one.target for one in claims] == [generation.TARGET, generation.TARGET, None, None]
    assert all("image-prefix" in one.what for one in claims[:2]) and all("prefix-lm" in one.what for one in claims[2:])
    whole, helm = details["whole set, image-prefix"], details["HELM, image-prefix"]
    assert whole["questions"] >= 40 > 20 == helm["questions"]
    assert whole["asked_alone"] == helm["asked_alone"] == 10
    # Were all answers equal, their equality would say nothing.
    assert whole["different_answers"] > 5 and helm["different_answers"] > 5


def test_answers_that_depend_on_the_batch_stop_the_benchmark(monkeypatch):
    answer_features = Predictor.answer_features

    def by_batch(self, questions, features, images=None):
        answers = answer_features(self, questions, features, images)
        return answers if len(questions) == 1 else [one._replace(answer=one.answer + "!") for one in answers]

    monkeypatch.setattr(Predictor, "answer_features", by_batch)
    with pytest.raises(ValueError, match="10 of 10 answers differ, the first: .*!' in a batch"):
        generation.compare(TINY, TEXTS, rounds=1)


@pytest.mark.parametrize("ask", [generation.as_evaluation, generation.as_helm])
def test_answers_come_in_the_questions_order_and_see_their_own_image(ask):
    questions = generation.pick(generation.asked_of_images(TEXTS), 30)
    features = Features(TINY, sorted({row["image_id"] for row in questions}))
    predictor = generation.answerer_of(TINY, *generation.build_model(TINY, TEXTS), Mask.IMAGE_PREFIX)
    answers = ask(TINY, predictor, features, questions)
    assert answers == [generation.one_answer(predictor, features, row) for row in questions]
    features._features = features._features.roll(1, dims=0)
    assert sum(one != other for one, other in zip(ask(TINY, predictor, features, questions), answers, strict=True)) > 10


def test_questions_are_dealt_as_vqav2s_are():
    questions = generation.asked_of_images([str(number) for number in range(20_000)])
    assert sorted(row["question"] for row in questions) == sorted(map(str, range(20_000)))
    counts = [len(list(group)) for _, group in groupby(row["image_id"] for row in questions)]
    assert sum(counts[:-1]) / len(counts[:-1]) == pytest.approx(5.36, abs=0.1) and min(counts[:-1]) == 3
    whole = generation.whole_images(questions, 100)
    assert whole == questions[: len(whole)] and questions[len(whole)]["image_id"] != whole[-1]["image_id"]
    picks = generation.pick(questions, 1000)
    assert len({row["question_id"] for row in picks}) == 1000
    # Picked from so many, few share an image: this is what HELM's 1,000 are like.
    assert len({row["image_id"] for row in picks}) > 750


def test_the_shapes_are_the_small_presets_and_a_medium_one():
    small, medium = generation.small_shape(), generation.medium_shape()
    assert (small.num_patches, small.feature_width, small.language.hidden_size) == (65, 128, 128)
    assert (medium.num_patches, medium.feature_width, medium.vocabulary) == (257, 768, 32_000)
    assert small.helm == generation.HELM_INSTANCES == 1000
    assert torch.equal(Features(TINY, [3, 5]).batch([5, 3]), Features(TINY, [3, 5]).batch([3, 5]).flip(0))
