"""From records to rows."""

import re

import datasets
import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.params import Answers, TooLong
from vlm_vqa.training.dataset import QuestionDataset
from vlm_vqa.training.sampler import PlannedRow


def records(answer="yes"):
    return datasets.Dataset.from_dict(
        {"question_id": [7, 8], "image_id": [1, 1], "question": ["Is it red?", "Is it?"],
         "multiple_choice_answer": ["yes", answer]}
    )  # fmt: skip


def test_a_record_too_long_is_an_error_or_a_counted_drop(tiny):
    layout = tiny.layout("image-prefix")
    layout.text_length = layout.text_tokens(layout.tokenize("Is it red?", "yes"))
    assert QuestionDataset(records(), layout, TooLong.ERROR).dropped == 0
    with pytest.raises(UserError, match="question_id 8: .*prompt.text_length"):
        QuestionDataset(records("a long answer of many words"), layout, TooLong.ERROR)
    kept = QuestionDataset(records("a long answer of many words"), layout, TooLong.DROP)
    assert (len(kept), kept.dropped) == (1, 1)


def test_a_planned_row_becomes_its_image_and_questions(tiny):
    data = QuestionDataset(records(), tiny.layout("image-prefix"), TooLong.ERROR)
    row = data[PlannedRow(1, (1, 0))]
    assert row.image_id == 1 and row.questions == (data.tokens(1, 0), data.tokens(0, 0))
    # What a question adds to a row's length is what the sampler counts.
    rows = [data[PlannedRow(1, (0,))], data[PlannedRow(1, (0, 1))]]
    one, both = (tiny.layout("image-prefix").collate([row])["input_ids"].shape[1] for row in rows)
    assert both - one == data.text_lengths(0)[1]


def asked(answers):
    return datasets.Dataset.from_dict(
        {"question_id": range(40), "image_id": [1] * 40, "question": ["Is it red?"] * 40,
         "multiple_choice_answer": ["yes"] * 40, "answers": [answers] * 40}
    )  # fmt: skip


def test_one_of_the_ten_answers_is_drawn_anew_each_epoch(tiny):
    layout = tiny.layout("image-prefix")
    data = QuestionDataset(asked(["yes"] * 7 + ["no", "two", ""]), layout, TooLong.ERROR, Answers.DRAWN, seed=3)
    said = lambda epoch: [layout.decode(data.tokens(question, epoch).answer) for question in range(40)]  # noqa: E731
    first, second = said(0), said(1)
    assert first != second and said(0) == first
    assert set(first + second) == {"yes", "no", "two"}, "nobody teaches silence"
    assert 0.6 < (first + second).count("yes") / 80 < 0.95
    # Rows and the sampler's lengths are those of the same epoch.
    assert data[PlannedRow(1, (5,), epoch=1)].questions == (data.tokens(5, 1),)
    assert data.text_lengths(1) == [len(data.tokens(question, 1).read) for question in range(40)]
    again = QuestionDataset(asked(["yes"] * 7 + ["no", "two", ""]), layout, TooLong.ERROR, Answers.DRAWN, seed=4)
    assert [again.tokens(question, 0).answer for question in range(40)] != [data.tokens(q, 0).answer for q in range(40)]


def test_of_drawn_answers_those_that_fit_are_taught(tiny):
    layout = tiny.layout("image-prefix")
    layout.text_length = layout.text_tokens(layout.tokenize("Is it red?", "yes"))
    answers = ["yes", "a long answer of many words"]
    data = QuestionDataset(asked(answers), layout, TooLong.DROP, Answers.DRAWN)
    assert data.dropped == 0 and {layout.decode(data.tokens(q, 0).answer) for q in range(40)} == {"yes"}
    with pytest.raises(UserError, match="question_id 0: .*prompt.text_length"):
        QuestionDataset(asked(answers), layout, TooLong.ERROR, Answers.DRAWN)
    with pytest.raises(UserError, match="no training record"):
        QuestionDataset(asked(answers[1:]), layout, TooLong.DROP, Answers.DRAWN)
    with pytest.raises(UserError, match="has an empty answer"):
        QuestionDataset(asked(["", " "]), layout, TooLong.DROP, Answers.DRAWN)


def test_the_longest_record_is_named_with_the_length_that_holds_all(tiny):
    layout = tiny.layout("image-prefix")
    layout.text_length = layout.text_tokens(layout.tokenize("Is it red?", "yes"))
    texts = ["Is it red?", "Is it red or blue?", "Is it red or blue or of another colour?", "Is it red or green?"]
    many = datasets.Dataset.from_dict(
        {"question_id": [4, 5, 6, 7], "image_id": [1] * 4, "question": texts, "multiple_choice_answer": ["yes"] * 4}
    )
    with pytest.raises(
        UserError, match="^question_id 6: .*prompt.text_length is.* It is the longest of 3 such."
    ) as error:
        QuestionDataset(many, layout, TooLong.ERROR)
    layout.text_length = int(re.search(r"Set it to (\d+)", str(error.value))[1])
    assert QuestionDataset(many, layout, TooLong.ERROR).dropped == 0
    layout.text_length -= 1
    with pytest.raises(UserError, match="^question_id 6: "):
        QuestionDataset(many, layout, TooLong.ERROR)


def test_one_answer_and_the_same_ten_times_teach_the_same(tiny):
    layout = tiny.layout("image-prefix")
    one, ten = asked(["red"]), asked(["red"] * 10)
    for answers in Answers:
        first, second = (QuestionDataset(given, layout, TooLong.ERROR, answers, seed=3) for given in (one, ten))
        assert all(first.tokens(q, epoch) == second.tokens(q, epoch) for q in range(40) for epoch in range(3))
        assert first.image_ids == second.image_ids and first.text_lengths(1) == second.text_lengths(1)


def test_ten_answers_are_drawn_as_ever(tiny):
    layout = tiny.layout("image-prefix")
    data = QuestionDataset(asked([f"{number}" for number in range(10)]), layout, TooLong.ERROR, Answers.DRAWN, seed=3)
    said = "".join(layout.decode(data.tokens(question, 1).answer) for question in range(40))
    assert said == "1440271543511969876595223164074460378351", "as before there were other numbers of answers"
