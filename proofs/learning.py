"""Does packed training learn as well as one row per question? The small run both ways, over several seeds.

`python -m proofs.learning` needs what the first two stages write (`make repro`). Both ways see the same number of
questions in the same number of optimizer steps: packed, questions of an image in one row and in one step; plain, one row
per question, drawn in random order (`train.questions_per_row: 1`). Accuracy is counted on all validation questions.
"""

import statistics
from collections.abc import Sequence
from functools import partial

from benchmarks import measure
from proofs.trainings import accuracies, changed, forget, run_all, train_and_score
from vlm_vqa.params import load_params

WAYS = ("packed", "one row per question")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all, or what is left, and write `learning.json`."""
    params = load_params()
    parser = measure.parser("learning", __doc__, "proofs", seeds=3, epochs=params.train.num_train_epochs)
    options = measure.parse(parser, arguments)
    seeds, epochs = range(options.seeds), options.epochs
    trainings = {}
    for seed in seeds:
        for way, per_row in zip(WAYS, (params.train.questions_per_row, 1), strict=True):
            changes = {"seed": seed, "train.questions_per_row": per_row, "train.num_train_epochs": epochs}
            trainings[f"{way}, seed {seed}, {epochs} epochs"] = partial(train_and_score, changed(params, changes))
    done = run_all("learning", trainings)
    accuracy = {way: accuracies(done, [f"{way}, seed {seed}, {epochs} epochs" for seed in seeds]) for way in WAYS}
    packed, plain = accuracy.values()
    ratios = [one / other for one, other in zip(packed, plain, strict=True)]
    within_a_point = 1 - 0.01 / statistics.mean(plain)
    claim = measure.Claim(
        f"accuracy of packed training over that of one row per question, {len(seeds)} seeds, {epochs} epochs",
        statistics.mean(packed) / statistics.mean(plain),
        min(ratios),
        max(ratios),
        target=within_a_point,
    )
    measure.write(
        "learning",
        [claim],
        {"runs": done, "mean_accuracy": {k: statistics.mean(v) for k, v in accuracy.items()}},
        {"questions and pictures": params.data.source.value},
    )
    forget("learning")


if __name__ == "__main__":
    main()
