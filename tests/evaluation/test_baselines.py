"""The baselines: from the question alone, in five ways, and with another image."""

from collections import Counter

import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.baselines import WAYS, QuestionOnlyBaseline, shuffled_images
from vlm_vqa.evaluation.vqa_accuracy import match_answer


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
    prior = QuestionOnlyBaseline(TRAIN, "exact question")
    assert prior.answer("is it red?", "is it") == "no"
    assert prior.answer("is it blue?", "is it") == "yes"  # asked once only: its type decides
    assert prior.answer("is it new?", "is it") == "yes"
    assert prior.answer("what?", "what") == "yes"


def test_prior_takes_the_alphabetically_first_of_equally_common_answers():
    assert QuestionOnlyBaseline(TRAIN, "exact question").answer("how many?", "how many") == "2"
    assert QuestionOnlyBaseline(TRAIN[::-1], "exact question").answer("how many?", "how many") == "2"


def test_prior_counts_any_number_of_answers_but_no_blank_ones():
    once = [row(one["question"], one["question_type"], one["answers"][0]) for one in TRAIN]
    ten = [one | {"answers": one["answers"] * 10} for one in once]
    blank = [one | {"answers": [*one["answers"], *[" "] * 9]} for one in once]
    priors = [QuestionOnlyBaseline(rows, "exact question") for rows in (once, ten, blank)]
    for question in TRAIN:
        (answer,) = {prior.answer(question["question"], question["question_type"]) for prior in priors}
        assert answer.strip()


def test_prior_without_training_questions_is_refused():
    with pytest.raises(UserError, match="no question"):
        QuestionOnlyBaseline([])


def asked(question, answer, image, kind="what"):
    return row(question, kind, answer) | {"image_id": image}


# Which way answers best, by what decides the answers: a hundred pictures each, so that every fold has seen enough.
DECIDED_BY = {
    "exact question": [asked(f"how {n} is it", str(n), image) for image in range(100) for n in range(20)],
    "longest leading words": [asked(f"is the cat number {9 * i + n}", "yes", i) for i in range(100) for n in range(9)]
    + [asked(f"is the dog number {9 * i + n}", "no", i) for i in range(100) for n in range(9)],
    "type and negation": [
        asked(f"{n * i} {'not ' * (n % 2)}?", ("yes", "no")[n % 2], i, "is") for i in range(100) for n in range(9)
    ],
    "question type": [asked(f"{i} {n}", f"a{n}", i, f"type {n}") for i in range(100) for n in range(9)],
}


@pytest.mark.parametrize("way", DECIDED_BY)
def test_the_way_that_answers_best_is_chosen(way):
    blind = QuestionOnlyBaseline(DECIDED_BY[way], score_of=match_answer)
    assert blind.cross_validated[way] > 0.95
    # Where several know all, the first does.
    best = [name for name, score in blind.cross_validated.items() if score == max(blind.cross_validated.values())]
    assert way in best and blind.way == best[0]
    assert set(blind.cross_validated) == set(WAYS)


def test_a_way_is_judged_by_images_that_it_was_not_counted_on():
    # Each picture has a question and an answer of its own, asked twice: known by heart, and worth nothing elsewhere.
    rows = [asked(f"what is in picture {image}?", f"thing {image}", image) for image in range(100) for _ in range(2)]
    blind = QuestionOnlyBaseline(rows, score_of=match_answer)
    assert blind.cross_validated["exact question"] == 0
    assert QuestionOnlyBaseline(rows, "exact question").answer("what is in picture 7?", "what") == "thing 7"


def test_questions_of_a_single_image_choose_nothing():
    blind = QuestionOnlyBaseline([asked("what?", "a", 1)] * 3, score_of=match_answer)
    assert blind.way == "exact question" and set(blind.cross_validated.values()) == {0.0}


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
