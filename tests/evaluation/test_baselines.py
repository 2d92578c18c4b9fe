"""The two baselines: from the question alone, and with another image."""

from collections import Counter

import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.baselines import QuestionOnlyBaseline, shuffled_images


def row(question, question_type, *answers):
    return {"question": question, "question_type": question_type, "answers": list(answers)}


TRAIN = [
    row("is it red?", "is it", "no", "no"),
    row("is it red?", "is it", "no", "yes"),
    row("is it blue?", "is it", "blue", "blue"),
    row("is it big?", "is it", "yes", "yes"),
    row("is it big?", "is it", "yes", "yes"),
    row("how many?", "how many", "2", "3"),
]


def test_prior_backs_off_from_question_to_type_to_all():
    prior = QuestionOnlyBaseline(TRAIN)
    assert prior.answer("is it red?", "is it") == "no"
    assert prior.answer("is it blue?", "is it") == "yes"  # asked once only: its type decides
    assert prior.answer("is it new?", "is it") == "yes"
    assert prior.answer("what?", "what") == "yes"


def test_prior_takes_the_alphabetically_first_of_equally_common_answers():
    assert QuestionOnlyBaseline(TRAIN).answer("how many?", "how many") == "2"
    assert QuestionOnlyBaseline(TRAIN[::-1]).answer("how many?", "how many") == "2"


def test_prior_counts_any_number_of_answers_but_no_blank_ones():
    once = [row(one["question"], one["question_type"], one["answers"][0]) for one in TRAIN]
    ten = [one | {"answers": one["answers"] * 10} for one in once]
    blank = [one | {"answers": [*one["answers"], *[" "] * 9]} for one in once]
    priors = [QuestionOnlyBaseline(rows) for rows in (once, ten, blank)]
    for question in TRAIN:
        (answer,) = {prior.answer(question["question"], question["question_type"]) for prior in priors}
        assert answer.strip()


def test_prior_without_training_questions_is_refused():
    with pytest.raises(UserError, match="no question"):
        QuestionOnlyBaseline([])


@pytest.mark.parametrize("count", [2, 3, 100])
def test_every_image_gets_another_one_and_each_is_given_once(count):
    ids = [7 * index for index in range(count)] * 3
    given = shuffled_images(ids, seed=0)
    assert set(given) == set(ids)
    assert all(image != other for image, other in given.items())
    assert set(Counter(given.values()).values()) == {1}


def test_assignment_depends_on_the_seed_and_not_on_the_order():
    ids = list(range(50))
    assert shuffled_images(ids, 1) == shuffled_images(ids[::-1] + ids, 1)
    assert shuffled_images(ids, 1) != shuffled_images(ids, 2)


def test_a_single_image_is_refused():
    with pytest.raises(UserError, match="all about one image"):
        shuffled_images([3, 3], 0)
