"""The scorer's benchmark: both sides score the same questions, and it says so when they do not agree."""

import pytest

from benchmarks import scorer
from benchmarks.measure import Timing
from vlm_vqa.evaluation import vqa_accuracy as ours

ANSWERS = {
    1: ["yes"] * 10,
    2: ["two"] * 5 + ["2"] * 3 + ["a pair."] * 2,
    3: ["t-shirt"] * 2 + ["The t shirt"] + ["dont know"] * 3 + ["1,000"] * 4,
    4: ["red"] * 3 + ["blue", "Blue", "green", "none", "no, 2.5", "black/white", "[x] y"],
}


@pytest.fixture
def annotations():
    return [
        {
            "question_id": number,
            "question_type": f"type {number % 3}",
            "answer_type": "other",
            "answers": [{"answer": answer, "answer_id": at} for at, answer in enumerate(answers, start=1)],
        }
        for number, answers in ANSWERS.items()
    ]


def test_both_scorers_give_the_same_figures(annotations):
    slow, fast, figures = scorer.compare(scorer.repeat(annotations, 400), rounds=2)
    assert len(slow.seconds) == len(fast.seconds) == 2
    assert sorted(figures) == list(range(400))
    assert {0.0, 0.3, 0.6, 0.9, 1.0} <= {round(score, 3) for score in figures.values()}
    questions = scorer.repeat(annotations, 400)
    assert figures == scorer.own_scores(scorer.draw_predictions(questions), scorer.as_records(questions))


def test_a_share_of_the_questions_is_scaled_up_to_all(annotations, monkeypatch):
    timing = {"official structure": Timing((2.0,)), "ours": Timing((1.0,))}
    alternate = lambda candidates, *_, **__: [run() for run in candidates.values()] and timing  # noqa: E731
    monkeypatch.setattr(scorer.measure, "alternate", alternate)
    slow, fast, figures = scorer.compare(scorer.repeat(annotations, 400), slow_share=3)
    assert slow.seconds == (2.0 * 400 / 134,) and fast.seconds == (1.0,)
    assert sorted(figures) == list(range(0, 400, 3))


def test_the_ground_truth_stays_as_it_was(annotations):
    before = [[answer["answer"] for answer in row["answers"]] for row in annotations]
    scorer.official_structure(scorer.draw_predictions(annotations), annotations)
    assert [[answer["answer"] for answer in row["answers"]] for row in annotations] == before


@pytest.mark.parametrize("broken", ["normalise", "_tidy", "_leave_one_out"])
def test_scorers_that_differ_stop_the_benchmark(annotations, monkeypatch, broken):
    wrong = {"normalise": str.upper, "_tidy": str.lower, "_leave_one_out": lambda matches: sum(matches) / len(matches)}
    monkeypatch.setattr(ours, broken, wrong[broken])
    with pytest.raises(ValueError, match="the scorers differ, in [0-9]+ questions"):
        scorer.compare(scorer.repeat(annotations, 400), rounds=1)


def test_predictions_are_drawn_by_seed(annotations):
    questions = scorer.repeat(annotations, 50)
    assert scorer.draw_predictions(questions) == scorer.draw_predictions(questions)
    assert scorer.draw_predictions(questions) != scorer.draw_predictions(questions, seed=1)
