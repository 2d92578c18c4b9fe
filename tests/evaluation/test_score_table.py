"""Scores by group on real questions, against a second implementation; and what people's questions tell without a picture."""

import gzip
import json

import numpy as np
import pytest

from tests.evaluation.second_opinion import groups, recomputed, recomputed_difference
from tests.shared_data import SHARED
from vlm_vqa.evaluation.baselines import QuestionOnlyBaseline
from vlm_vqa.evaluation.score_table import looks_at_image, with_intervals
from vlm_vqa.evaluation.vqa_accuracy import score_answer, score_people


def real_questions(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no real VQAv2 questions at {folder} (set VLM_VQA_SHARED_DATA)")
    (annotations,) = folder.glob("annotations.json*")
    (questions,) = folder.glob("questions.json*")

    def read(path):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
            return json.load(file)

    asked = {row["question_id"]: row["question"] for row in read(questions)["questions"]}
    rows = read(annotations)["annotations"]
    return [
        row | {"question": asked[row["question_id"]], "answers": [one["answer"] for one in row["answers"]]}
        for row in rows
    ]


@pytest.mark.parametrize("name", ["vqav2-text", "vqav2-sample"])
def test_every_figure_on_real_questions(name):
    rows = real_questions(name)
    # Somebody's answer, and the commonest of the question's type.
    blind = QuestionOnlyBaseline(rows, "question type")
    given = {
        "model": [row["answers"][at % 10] for at, row in enumerate(rows)],
        "prior": [blind.answer(row["question"], row["question_type"]) for row in rows],
    }
    scores = {
        who: np.array([score_answer(one, row["answers"]) for one, row in zip(answers, rows, strict=True)])
        for who, answers in given.items()
    }
    tables = [(with_intervals(scores, rows)[who], recomputed(scores[who], rows)) for who in given]
    tables.append((looks_at_image(scores, rows), recomputed_difference(scores["model"], scores["prior"], rows)))
    assert 0.5 < tables[0][0]["overall"]["mean"] < 0.9 and len(groups(rows)) > 10
    for shown, expected in tables:
        flat = {("overall",): shown["overall"]}
        flat |= {(kind, group): one for kind in shown if kind != "overall" for group, one in shown[kind].items()}
        assert set(flat) == set(expected)
        for group, found in flat.items():
            figures = [found[key] for key in ("mean", "low", "high", "error")]
            assert figures == pytest.approx(expected[group], abs=1e-9), group


def test_on_real_questions_the_longest_leading_words_tell_most():
    found = QuestionOnlyBaseline(real_questions("vqav2-text"))
    assert found.way == "longest leading words"
    assert found.cross_validated[found.way] - found.cross_validated["exact question"] > 0.002


def test_people_do_not_agree_with_each_other():
    rows = real_questions("vqav2-text")
    # As published for VQAv1's balanced successor, about five of six.
    assert 0.75 < np.mean([score_people(row["answers"]) for row in rows]) < 0.9
    assert score_people(["a"] * 10) == 1 and score_people(list("abcdefghij")) == 0
    assert score_people(["Two"] * 2 + ["2"] * 2 + list("abcdef")) == pytest.approx(4 / 10)
