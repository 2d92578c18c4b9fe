"""Every figure of a report's intervals once more, from the predictions alone: other formulas, numpy and nothing else."""

import math
from collections import defaultdict
from functools import cache

import numpy as np


def recomputed(scores, rows):
    """Return (mean, low, high, error) of a score by group, as `score_table.with_intervals` names the groups."""
    return {group: of_mean(scores[at], [rows[i]["image_id"] for i in at]) for group, at in groups(rows).items()}


def recomputed_difference(scores, others, rows):
    """The same of paired differences, as `score_table.looks_at_image`."""
    gaps = scores - others
    found = {}
    for group, at in groups(rows).items():
        mean, error, count = clustered(gaps[at], [rows[i]["image_id"] for i in at])
        half = t_quantile(count - 1) * error if count > 1 else 2.0
        found[group] = (mean, max(-1.0, mean - half), min(1.0, mean + half), error)
    return found


def groups(rows):
    found = defaultdict(list)
    for at, row in enumerate(rows):
        for group in (
            ("overall",),
            ("per_answer_type", row["answer_type"]),
            ("per_question_type", row["question_type"]),
        ):
            found[group].append(at)
    return {group: np.array(at) for group, at in found.items()}


def clustered(values, images):
    """Pair by pair within an image, in plain loops."""
    mean, of_image = float(np.mean(values)), defaultdict(list)
    for value, image in zip(values.tolist(), images, strict=True):
        of_image[image].append(value - mean)
    total = sum(a * b for own in of_image.values() for a in own for b in own)
    count = len(of_image)
    # Rounding leaves less than nothing where all pairs cancel out.
    error = math.sqrt(max(0.0, total) * count / (count - 1)) / len(values) if count > 1 else 0.0
    return mean, error, count


def of_mean(values, images):
    """The two scores from which this mean would be just so unlikely: the roots of Wilson's quadratic."""
    mean, error, count = clustered(values, images)
    if count < 2:
        return mean, 0.0, 1.0, error
    alike = mean * (1 - mean) / error**2 if error > 1e-12 else count
    squared = t_quantile(count - 1) ** 2
    low, high = sorted(np.roots([1 + squared / alike, -(2 * mean + squared / alike), mean**2]).real.tolist())
    return mean, max(0.0, low) if mean > 0 else 0.0, min(1.0, high) if mean < 1 else 1.0, error


@cache
def t_quantile(freedom, probability=0.975):
    """Student's t, by bisection of its density's integral (Simpson's rule)."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def below(t):
        # x = tan(angle): the tails of few degrees of freedom are long.
        angle = np.linspace(0, math.atan(t), 20_001)
        height = scale * (1 + np.tan(angle) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(angle) ** 2
        weights = np.ones_like(angle)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        return 0.5 + float((weights * height).sum() * (angle[1] - angle[0]) / 3)

    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return low


def calibration(probabilities, scores, images):
    """Return (questions, mean probability, score, low, high) of each tenth that is not empty, and the expected error."""
    bins, gaps = [], 0.0
    for tenth in range(10):
        own = [i for i, p in enumerate(probabilities) if tenth / 10 <= p and (p < (tenth + 1) / 10 or tenth == 9)]
        if own:
            mean, low, high, _ = of_mean(np.array([scores[i] for i in own]), [images[i] for i in own])
            probability = math.fsum(probabilities[i] for i in own) / len(own)
            bins.append((len(own), probability, mean, low, high))
            gaps += len(own) / len(scores) * abs(mean - probability)
    return bins, gaps
