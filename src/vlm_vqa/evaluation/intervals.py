"""How sure a score is: 95 % intervals of means and of paired differences, questions of one image counted as one cluster.

The standard error is the clustered one of Miller, "Adding Error Bars to Evals" (arXiv 2411.00640), with inspect_ai's
correction for few clusters. `python -m proofs.coverage` shows how often the intervals hold what they should.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL = 0.95
POWER = 0.8  # with this chance a difference of `smallest_difference` is shown
RESAMPLES = 9_999


@dataclass(frozen=True)
class Interval:
    """A mean over questions, or of paired differences between two sets of answers, and where it may truly lie."""

    mean: float
    low: float
    high: float
    error: float  # standard error, clustered by image
    questions: int
    images: int


def of_mean(scores: npt.ArrayLike, images: npt.ArrayLike) -> Interval:
    """Return the interval of a mean score.

    Wilson's interval for as many independent questions as would have this clustered error: near 0 and 1, where few wrong
    answers tell, the usual mean +- t times error holds the truth too seldom.

    Args:
        scores: of each question, in 0..1.
        images: the image id of each question.
    """
    scores = np.asarray(scores, dtype=np.float64)
    mean, error, clusters = _clustered(scores, images)
    if clusters < 2:
        return Interval(mean, 0.0, 1.0, error, len(scores), clusters)
    spread = mean * (1 - mean)
    # All right or all wrong: as sure as so many pictures make it.
    alike = spread / error**2 if error > 0 else clusters
    squared = stats.t.ppf((1 + LEVEL) / 2, clusters - 1) ** 2
    middle = (mean + squared / (2 * alike)) / (1 + squared / alike)
    half = np.sqrt(squared * (spread / alike + squared / (4 * alike**2))) / (1 + squared / alike)
    # Of rounding: with all right the middle and half of the interval sum up to 1.
    low, high = max(0.0, float(middle - half)), min(1.0, float(middle + half))
    return Interval(mean, low if mean > 0 else 0.0, high if mean < 1 else 1.0, error, len(scores), clusters)


def of_difference(scores: npt.ArrayLike, others: npt.ArrayLike, images: npt.ArrayLike) -> Interval:
    """Return the interval of the mean of `scores - others`, paired by question: mean +- t times the clustered error."""
    differences = np.asarray(scores, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    mean, error, clusters = _clustered(differences, images)
    if clusters < 2:
        return Interval(mean, -1.0, 1.0, error, len(differences), clusters)
    half = float(stats.t.ppf((1 + LEVEL) / 2, clusters - 1)) * error
    return Interval(mean, max(-1.0, mean - half), min(1.0, mean + half), error, len(differences), clusters)


def smallest_difference(difference: Interval) -> float:
    """Return the true difference that questions like these would show with a chance of `POWER`."""
    if difference.images < 2:
        return 1.0
    freedom = difference.images - 1
    return float((stats.t.ppf((1 + LEVEL) / 2, freedom) + stats.t.ppf(POWER, freedom)) * difference.error)


def p_value(scores: npt.ArrayLike, others: npt.ArrayLike, images: npt.ArrayLike, seed: int = 0) -> float:
    """Return how often chance alone would make a mean difference as large, either way.

    A permutation test: which set of answers a picture's scores belong to is drawn by coin, for all its questions at once.
    """
    place = np.unique(np.asarray(images), return_inverse=True)[1]
    sums = [np.bincount(place, weights=np.asarray(one, dtype=np.float64)) for one in (scores, others)]
    # Pictures that both answer alike would be permuted without effect, and a single one gives its two orders.
    unlike = sums[0] != sums[1]
    if unlike.sum() < 2:
        return 1.0

    data = (sums[0][unlike], sums[1][unlike])
    summed = lambda one, other, axis=-1: (one - other).sum(axis=axis)  # noqa: E731
    done = stats.permutation_test(
        data, summed, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True, batch=500, rng=seed
    )
    return float(done.pvalue)


def _clustered(values: npt.NDArray[np.float64], images: npt.ArrayLike) -> tuple[float, float, int]:
    """Return mean, clustered standard error (of one cluster: 0) and the number of clusters."""
    place = np.unique(np.asarray(images), return_inverse=True)[1]
    assert len(values) == len(place) > 0, "a score for each question"
    clusters, mean = int(place.max()) + 1, float(values.mean())
    summed = np.bincount(place, weights=values - mean)
    correction = clusters / (clusters - 1) if clusters > 1 else 0.0
    return mean, float(np.sqrt(correction * (summed**2).sum()) / len(values)), clusters
