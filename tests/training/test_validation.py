"""Validation while training: its score is that of greedy decoding, every process sees its part, and the best step stays."""

import dataclasses
import itertools

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from tests.tiny_model import GivenFeatures
from vlm_vqa.data import held_out
from vlm_vqa.data import records as stored
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.vqa_accuracy import METRICS
from vlm_vqa.inference.generation import generate
from vlm_vqa.model.layout import Row
from vlm_vqa.model.vlm import initial_model, trained_state
from vlm_vqa.params import Answers, Keep, TooLong, ValidateOn, ValidationParams, load_params
from vlm_vqa.training import checkpoint_files, launch
from vlm_vqa.training.dataset import Collator, QuestionDataset
from vlm_vqa.training.trainer import VqaTrainer, training_arguments
from vlm_vqa.training.validation import (
    ANSWERS,
    COLUMNS,
    LOSS,
    SCORE,
    Part,
    Validation,
    best_step,
    is_over,
    validations,
)

ASKED = [
    # What is said differs between people; `Two.` is `2` only when both are normalised.
    ("What color is the shape?", ["red"] * 7 + ["Red", "dark red", "blue"]),
    ("Is it?", ["yes"] * 10),
    ("How many dogs are there?", ["two"] * 4 + ["2"] * 5 + ["Two."]),
    ("Is it a circle?", ["no"] * 6 + ["yes"] * 4),
]


def questions(count, images, first=0):
    """Return `count` records, in turns about `images` images."""
    asked = [ASKED[number % len(ASKED)] for number in range(count)]
    return datasets.Dataset.from_list([
        {
            "question_id": first + number, "image_id": number % images, "question": text,
            "multiple_choice_answer": max(answers, key=answers.count), "answers": answers,
        }
        for number, (text, answers) in enumerate(asked)
    ])  # fmt: skip


@pytest.fixture
def build(tiny, tmp_path):
    """Return a function that builds a Trainer on 24 questions with a validation of 16 others."""
    features = torch.randn(6, tiny.num_patches, 24, generator=torch.Generator().manual_seed(0))
    store = GivenFeatures(features)
    base = load_params("presets/small.yaml")

    def make(folder="run", mask="image-prefix", callbacks=(), validates=True, epochs=4, **settings):
        layout = tiny.layout(mask)
        settings = {"questions": 16, "train_questions": 8, "every_steps": 2, "keep": Keep.LAST, **settings}
        per_row = 1 if mask == "prefix-lm" else 4
        train = dataclasses.replace(
            base.train, batch_size=8, num_train_epochs=epochs, learning_rate=1e-2, save_steps=5, logging_steps=1,
            questions_per_row=per_row, answers=Answers.DRAWN,
        )  # fmt: skip
        params = dataclasses.replace(base, train=train, validation=ValidationParams(**settings))
        data = QuestionDataset(questions(24, 6), layout, TooLong.ERROR, Answers.DRAWN)
        collator = Collator(layout, store)
        held, trained = questions(16, 4, first=100), questions(8, 6)
        model = initial_model(tiny.language, tiny.encoder_config, tiny.processor, seed=1)
        running = launch.start(train)
        arguments = training_arguments(train, 0, tmp_path / folder, running)
        measured = (
            Validation(params, layout, collator, held, trained, {0: 1, 1: 2, 2: 3, 3: 0}, METRICS)
            if validates
            else None
        )
        return VqaTrainer(model, arguments, train, data, collator, list(callbacks), running, validation=measured)

    return make


def greedy(trainer):
    """Return the answers that generation gives to the held questions."""
    held, layout = trainer.validation.held.questions, trainer.validation.layout
    asked = [layout.tokenize(row["question"]) for row in held]
    features = trainer.data_collator.features.features[[row["image_id"] for row in held]]
    with torch.no_grad():
        answers = generate(trainer.model.eval(), layout, features, asked, range(len(held)), max_new_tokens=20)
    return [layout.decode(answer.tokens) for answer in answers]


@pytest.mark.parametrize(
    ("mask", "epochs"), [("image-prefix", 4), ("prefix-lm", 4), ("causal", 4), ("image-prefix", 12)]
)
def test_the_score_is_that_of_greedy_decoding_where_an_answer_is_a_reference(build, mask, epochs):
    trainer = build(mask=mask, epochs=epochs)
    trainer.run()
    held = trainer.validation.held.questions
    said = greedy(trainer)
    expected = [
        METRICS["vqa_accuracy"](answer, row["answers"]) if answer in row["answers"] else 0.0
        for answer, row in zip(said, held, strict=True)
    ]
    last = validations(trainer.state.log_history)[-1]
    assert last["step"] == trainer.state.global_step
    assert last[SCORE] == pytest.approx(sum(expected) / len(held), abs=1e-12)
    assert any(expected) and (epochs > 4 or not all(expected)), f"all the same: {said}"
    by_id = {row["question_id"]: answer for row, answer in zip(held, said, strict=True)}
    shown = [by_id[row["question_id"]] for row in trainer.validation.shown]
    assert len({row["image_id"] for row in trainer.validation.shown}) == len(shown) == 4
    assert [entry[ANSWERS] for entry in trainer.state.log_history if ANSWERS in entry][-1] == shown


def test_each_wrong_token_counts_and_the_loss_is_that_of_the_main_answers(tiny, build):
    """By hand, one answer at a time, through the model's own loss."""
    trainer = build(validates=True)
    measured = trainer.validation
    figures = measured.measure(trainer.model, torch.device("cpu"), lambda: None)
    total = tokens = 0
    for row in measured.held.questions:
        asked = measured.layout.tokenize(row["question"], row["multiple_choice_answer"])
        batch = trainer.data_collator.ready(trainer.data_collator([Row(row["image_id"], (asked,))]))
        with torch.no_grad():
            total += float(trainer.model(**batch)["loss"]) * len(asked.answer)
        tokens += len(asked.answer)
    assert figures[LOSS] == pytest.approx(total / tokens, rel=1e-5)
    right = torch.ones(len(measured.held.branches))
    # The best that people's own answers score.
    assert measured.held.scores(right)[:4] == [1.0, 1.0, 1.0, 1.0]
    assert set(measured.held.scores(1 - right)) == {0.0}


def test_every_branch_is_computed_once_and_every_process_computes_equally_often(tiny):
    part = Part(questions(40, 7), tiny.layout("image-prefix"), TooLong.ERROR, METRICS["vqa_accuracy"], 4, 9)
    assert len(part.branches) == 10 * (4 + 1 + 3 + 2), "distinct answers"
    for processes in (1, 2, 3, 5):
        batches = [list(part.batches(process, processes)) for process in range(processes)]
        assert len(set(map(len, batches))) == 1
        seen = [number for mine in batches for _, numbers in mine for number in numbers]
        assert sorted(seen) == list(range(len(part.branches)))
        for rows, numbers in itertools.chain(*batches):
            assert len(numbers) <= 9 and all(len(row.questions) <= 4 for row in rows)
            assert [part.branches[one].tokens for one in numbers] == [one for row in rows for one in row.questions]


def test_measuring_changes_nothing_of_the_training(build):
    with_it, without = build("with"), build("without", validates=False)
    with_it.run()
    without.run()
    for name, value in trained_state(without.model).items():
        assert torch.equal(value, trained_state(with_it.model)[name]), name
    assert [entry["loss"] for entry in with_it.state.log_history if "loss" in entry] == [
        entry["loss"] for entry in without.state.log_history if "loss" in entry
    ]
    entries = validations(with_it.state.log_history)
    assert [entry["step"] for entry in entries] == [0, 2, 4, 6, 8, 10, 12]
    assert all(set(COLUMNS) <= entry.keys() for entry in entries)


# --- what is kept -------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


class StopAt(TrainerCallback):
    """Ends a training as a kill would, after the checkpoint of a step is whole; notes each step's weights."""

    def __init__(self, step=None):
        self.step, self.weights = step, {}

    def on_step_end(self, args, state, control, **_):
        self.weights[state.global_step] = {k: v.clone() for k, v in trained_state(self.trainer.model).items()}
        if state.global_step == self.step:
            self.trainer.writer.wait()
            self.trainer.lock.close()
            raise Stop


def scripted(monkeypatch, scores):
    """Let validations find these scores by step."""
    plain = Validation.measure

    def measure(self, model, device, beat):
        found = plain(self, model, device, beat)
        step = next(trainers).state.global_step
        return found | {SCORE: scores[step], LOSS: 1.0}

    trainers: list = []
    monkeypatch.setattr(Validation, "measure", measure)

    def follow(trainer):
        nonlocal trainers
        trainers = itertools.repeat(trainer)
        return trainer

    return follow


SCORES = {0: 0.9, 2: 0.1, 4: 0.5, 6: 0.3, 8: 0.5, 10: 0.2, 12: 0.4}


@pytest.mark.parametrize("stops", [[], [3], [5], [7, 11], [4, 6, 8, 10, 12]])
def test_the_best_step_stays_whatever_interrupts(build, monkeypatch, stops):
    follow = scripted(monkeypatch, SCORES)
    undisturbed = StopAt()
    follow(build("whole", callbacks=[undisturbed], keep=Keep.BEST)).run()
    for stop in stops:
        with pytest.raises(Stop):
            follow(build("run", callbacks=[StopAt(stop)], keep=Keep.BEST)).run()
    trainer = follow(build("run", callbacks=[StopAt()], keep=Keep.BEST))
    trainer.run()
    assert trainer.state.global_step == 12 and trainer.kept_step == 4
    for name, value in trainer.whole_weights().items():
        assert torch.equal(value, undisturbed.weights[4][name]), name
    assert "the best of 6 validations" in trainer.kept_because


def test_the_best_checkpoint_outlives_newer_ones_and_those_without_it_are_passed_over(build, monkeypatch, caplog):
    follow = scripted(monkeypatch, {**SCORES, 12: 0.2})
    with pytest.raises(Stop):
        follow(build(callbacks=[StopAt(11)], keep=Keep.BEST)).run()
    folder = build().folder
    names = [path.name for path in checkpoint_files.whole_checkpoints(folder)]
    # Steps 5 and 10 by save_steps, 2 and 4 as the best so far; two are kept, and the best of each.
    assert names == ["checkpoint-10", "checkpoint-5", "checkpoint-4"]
    checkpoint_files.remove(folder / "checkpoint-4")
    assert checkpoint_files.latest(folder) is None
    assert "the best one before it, checkpoint-4, is not there" in caplog.text
    assert not list(folder.glob("checkpoint-*"))


def test_a_damaged_best_checkpoint_is_named_before_training_goes_on(build, monkeypatch):
    follow = scripted(monkeypatch, SCORES)
    with pytest.raises(Stop):
        follow(build(callbacks=[StopAt(11)], keep=Keep.BEST)).run()
    (path,) = (build().folder / "checkpoint-4").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="checkpoint-4.*Delete the folder"):
        follow(build(keep=Keep.BEST)).run()


@pytest.mark.parametrize("stops", [[], [9]])
def test_patience_ends_it_also_after_a_resume_and_leaves_no_checkpoint_past_the_end(build, monkeypatch, stops):
    # At step 10, a step of save_steps too, three validations in a row were no better than step 4's.
    follow = scripted(monkeypatch, SCORES)
    for stop in stops:
        with pytest.raises(Stop):
            follow(build(callbacks=[StopAt(stop)], patience=3)).run()
    trainer = follow(build(patience=3))
    trainer.run()
    assert trainer.state.global_step == 10 and trainer.kept_step == 10
    assert "checkpoint-10" not in [path.name for path in checkpoint_files.whole_checkpoints(trainer.folder)]
    assert trainer.kept_because == "the last step"


def history(*scores, losses=None):
    losses = losses or [1.0] * len(scores)
    return [
        {"step": 10 * at, SCORE: score, LOSS: loss} for at, (score, loss) in enumerate(zip(scores, losses, strict=True))
    ]


def test_the_best_is_the_highest_score_then_the_lowest_loss_then_the_earliest_but_never_the_start():
    assert best_step([]) is None and best_step(history(0.5)) is None
    assert best_step(history(0.9, 0.1, 0.4, 0.4)) == 20
    assert best_step(history(0.0, 0.4, 0.4, 0.3, losses=[1, 0.2, 0.1, 0.0])) == 20
    assert not is_over(history(0.9, 0.5), 1) and not is_over(history(0.9, 0.5, 0.4), None)
    assert is_over(history(0.9, 0.5, 0.5), 1) and not is_over(history(0.9, 0.5, 0.4, 0.6), 2)


# --- which questions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def divide(monkeypatch):
    """Return a function that divides 100 questions about 20 images, of which 3 and 11 are one picture twice."""

    def make(seed=0, **settings):
        params = dataclasses.replace(
            load_params("presets/small.yaml"), seed=seed, validation=ValidationParams(**settings)
        )
        same = {11: 3}
        monkeypatch.setattr(
            held_out, "picture_ids", lambda folder, split, ids: np.array([same.get(one, one) for one in ids])
        )
        return held_out.divide(questions(100, 20), params, None)

    return make


def test_the_dev_part_has_whole_images_of_its_own(divide):
    parts = {seed: divide(seed, questions=23) for seed in range(30)}
    for trained, held in parts.values():
        assert len(trained) + len(held) == 100 and 23 <= len(held) <= 30
        assert not set(trained["image_id"]) & set(held["image_id"])
        assert ({3, 11} <= set(held["image_id"])) or not {3, 11} & set(held["image_id"]), "one picture, two sides"
    assert any({3, 11} <= set(held["image_id"]) for _, held in parts.values())
    assert len({tuple(held["question_id"]) for _, held in parts.values()}) > 20
    assert divide(0, questions=23)[1]["question_id"] == parts[0][1]["question_id"]


def test_it_is_of_two_images_at_least_and_leaves_some_to_train(divide):
    assert len(set(divide(questions=2)[1]["image_id"])) >= 2
    with pytest.raises(UserError, match="validation.questions is 99.*none is left to train on"):
        divide(questions=99)
    with pytest.raises(UserError, match="validation.questions is 101"):
        divide(questions=101)


@pytest.mark.parametrize("settings", [{"questions": 0}, {"questions": 9, "from_": ValidateOn.VAL}])
def test_without_a_dev_part_all_are_trained_on(divide, settings):
    trained, held = divide(**settings)
    assert len(trained) == 100 and len(held) == 0


def test_twins_are_found_by_their_bytes(tmp_path, monkeypatch):
    manifest = {"pictures": {"twins": {"train": 0}}}
    monkeypatch.setattr(stored, "read_manifest", lambda folder: manifest)
    assert stored.picture_ids(tmp_path, "train", [5, 7, 5]).tolist() == [5, 7, 5]
