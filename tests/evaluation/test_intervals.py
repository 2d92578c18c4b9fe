"""Intervals: against the formulas of two other evaluators, written out; at the edges; and by simulation."""

import numpy as np
import pytest
from scipy import stats

from proofs.coverage import alarms, coverage
from tests.evaluation.second_opinion import of_mean as second
from tests.evaluation.second_opinion import t_quantile
from vlm_vqa.evaluation.intervals import of_difference, of_mean, p_value, smallest_difference

DRAWN = np.random.default_rng(5)
IMAGES = DRAWN.integers(0, 40, size=200)
SCORES, OTHERS = DRAWN.choice([0, 0.3, 0.6, 0.9, 1.0], size=(2, 200))


def cross_products(values, images):
    """The sum over all pairs of questions of one image, pair by pair."""
    mean = sum(values) / len(values)
    return [
        (a - mean) * (b - mean)
        for a, of_a in zip(values, images, strict=True)
        for b, of_b in zip(values, images, strict=True)
        if of_a == of_b
    ]


def test_the_clustered_error_is_inspect_ais():
    clusters = len(set(IMAGES.tolist()))
    expected = np.sqrt(sum(cross_products(SCORES, IMAGES)) * clusters / (clusters - 1)) / len(SCORES)
    assert of_mean(SCORES, IMAGES).error == pytest.approx(expected, abs=1e-12)


def test_the_clustered_error_is_lmms_evals_but_for_its_two_corrections():
    # sqrt(var / n + pairs / n^2): the variance by n - 1, and no correction for few clusters.
    found, count = of_mean(SCORES, IMAGES), len(SCORES)
    own = sum((SCORES - SCORES.mean()) ** 2)
    theirs = np.sqrt(own / (count - 1) / count + (sum(cross_products(SCORES, IMAGES)) - own) / count**2)
    uncorrected = found.error**2 * (found.images - 1) / found.images
    assert np.sqrt(uncorrected + own / (count - 1) / count - own / count**2) == pytest.approx(theirs, abs=1e-12)


def test_a_difference_is_paired_by_question():
    found = of_difference(SCORES, OTHERS, IMAGES)
    assert found.mean == pytest.approx(np.mean(SCORES) - np.mean(OTHERS))
    shifted = of_difference(np.minimum(SCORES, 0.5) + 0.25, np.minimum(SCORES, 0.5), IMAGES)
    # Paired, a constant difference is known exactly, however much the scores themselves vary.
    assert (shifted.low, shifted.high) == (pytest.approx(0.25), pytest.approx(0.25))


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_all_right_is_not_known_for_sure(score):
    found = of_mean([score] * 200, IMAGES)
    assert found.mean == score and found.low <= score <= found.high
    assert 0.05 < found.high - found.low < 0.15, "about 4 over the number of images"


def test_one_image_tells_nothing():
    assert [of_mean([1, 0], [7, 7]).low, of_mean([1, 0], [7, 7]).high] == [0, 1]
    assert [of_difference([1, 1], [0, 1], [7, 7]).low, of_difference([1, 1], [0, 1], [7, 7]).high] == [-1, 1]
    assert smallest_difference(of_difference([1, 1], [0, 1], [7, 7])) == 1


def test_more_questions_on_the_same_images_are_not_more_images():
    once, fourfold = of_mean(SCORES, IMAGES), of_mean(np.tile(SCORES, 4), np.tile(IMAGES, 4))
    assert fourfold.error == pytest.approx(once.error)


def test_chance():
    assert p_value(SCORES, SCORES, IMAGES) == 1
    assert p_value(np.ones(200), np.zeros(200), IMAGES) < 0.001
    assert p_value(SCORES, OTHERS, IMAGES) == p_value(OTHERS, SCORES, IMAGES), "either way, and seeded"
    # Two answers to one picture are one coin.
    assert p_value([1, 1], [0, 0], [3, 3]) == 1


def test_p_and_interval_agree():
    found = of_difference(SCORES, OTHERS, IMAGES)
    assert (p_value(SCORES, OTHERS, IMAGES) < 0.05) == (not found.low <= 0 <= found.high)


@pytest.mark.parametrize(("score", "alike"), [(0.66, 0.3), (0.997, 0.02)])
def test_an_interval_holds_the_truth(score, alike):
    mean, difference = coverage(300, score, alike, 400, np.random.default_rng(1))
    assert 0.92 <= mean <= 0.985 and 0.91 <= difference <= 0.985


def test_the_gate_is_quiet_at_an_equal_model_and_sees_a_point():
    assert alarms(0.0, 100, np.random.default_rng(1)) <= 0.02
    assert alarms(0.01, 100, np.random.default_rng(1)) >= 0.95


@pytest.mark.parametrize("freedom", [1, 2, 7, 999])
def test_the_second_opinion_knows_students_t(freedom):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_the_second_opinion_agrees_on_drawn_scores():
    found = of_mean(SCORES, IMAGES)
    assert (found.mean, found.low, found.high, found.error) == pytest.approx(second(SCORES, IMAGES), abs=1e-9)
