"""How often do the evaluation's intervals hold the truth, and how often does the gate raise an alarm?

    python -m proofs.coverage [--sets 2000]

Synthetic question sets, drawn from what is known: pictures with one to seven questions each, answers that are right with a
probability of their picture's own. Each set gives an interval of its score and one of its difference from a second model's;
counted is how many hold the expected value. Then the gate: a second model that is as good as the first, and one that is
worse by a point, on as many questions as the small run's, at its score.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks import measure
from benchmarks.measure import Claim
from vlm_vqa.evaluation import intervals
from vlm_vqa.gate import TOLERANCE

SCORES = (0.35, 0.66, 0.95, 0.997)
IMAGES = (100, 300, 2000)
ALIKE = (0.02, 0.3)
"""How much the answers about one picture are correlated: hardly, strongly."""
SMALL_RUN = (9_673, 1_000, 0.997)
"""Validation questions of easy-VQA, on so many pictures, and what share the small run answers rightly."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, count, and write `coverage.json`."""
    parser = measure.parser("coverage", __doc__, "proofs")
    parser.add_argument("--sets", type=int, default=2000, help="synthetic sets of each kind (default: 2000)")
    options = measure.parse(parser, arguments)
    draw = np.random.default_rng(0)
    means, differences = {}, {}
    for images in IMAGES:
        for score in SCORES:
            for alike in ALIKE:
                kind = f"{images} images, score {score}, correlation {alike}"
                means[kind], differences[kind] = coverage(images, score, alike, options.sets, draw)
                print(f"{kind}: mean {means[kind]:.3f}, difference {differences[kind]:.3f}", flush=True)
    false, caught = (alarms(drop, options.sets, draw) for drop in (0.0, 0.01))
    claims = [
        _held("intervals of a score", means),
        _held("intervals of a difference", differences),
        Claim("alarms of the gate at an equal model", false, false, false, 0.02, at_most=True),
        Claim("alarms of the gate at a model worse by a point", caught, caught, caught, 0.95),
    ]
    measure.write("coverage", claims, {"sets": options.sets, "means": means, "differences": differences}, {})


def coverage(images: int, score: float, alike: float, sets: int, draw: np.random.Generator) -> tuple[float, float]:
    """Return in which share of sets the interval of a score holds the truth, and that of its difference from another."""
    means = differences = 0
    other = max(0.0, score - 0.02)
    for _ in range(sets):
        of = _questions(draw.integers(1, 8, size=images))
        mine, theirs = (_answered(of, expected, alike, draw) for expected in (score, other))
        mean, difference = intervals.of_mean(mine, of), intervals.of_difference(mine, theirs, of)
        means += mean.low <= score <= mean.high
        differences += difference.low <= score - other <= difference.high
    return means / sets, differences / sets


def alarms(drop: float, sets: int, draw: np.random.Generator) -> float:
    """Return how often the gate fails a model whose true score is lower by `drop`."""
    questions, images, score = SMALL_RUN
    of = _questions(np.full(images, questions // images) + (np.arange(images) < questions % images))
    failed = 0
    for _ in range(sets):
        base, new = (_answered(of, expected, 0.05, draw) for expected in (score, score - drop))
        failed += intervals.of_difference(new, base, of).high < -TOLERANCE
    return failed / sets


def _questions(sizes: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def _answered(of: np.ndarray, score: float, alike: float, draw: np.random.Generator) -> np.ndarray:
    """Return 1 or 0 for each question; a picture's own probability is beta-distributed, so that answers correlate."""
    weight = (1 - alike) / alike
    own = draw.beta(score * weight, (1 - score) * weight, size=of.max() + 1)
    return (draw.random(len(of)) < own[of]).astype(np.float64)


def _held(what: str, found: dict[str, float]) -> Claim:
    """The mean over kinds, which must be 94 to 96 %; the note names the kind that is furthest from it."""
    mean = float(np.mean([*found.values()]))
    low, high = min(found.values()), max(found.values())
    worst = max(found, key=lambda kind: abs(found[kind] - intervals.LEVEL))
    return Claim(
        f"{what}: share that holds the truth, off by", abs(mean - 0.95), low, high, 0.01, at_most=True, note=worst
    )


if __name__ == "__main__":
    main()
