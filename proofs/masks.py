"""What does each mask learn? The small run under the three of them, at two lengths of training, over several seeds.

`python -m proofs.masks` needs what the first two stages write (`make repro`). All see the same questions in the same order;
under prefix-lm, where the image sees its question, each has a row of its own. Accuracy is counted on all validation
questions, after the last step.
"""

import itertools
import statistics
from collections.abc import Sequence
from functools import partial

from benchmarks import measure
from benchmarks.small_run import LEAST_ACCURACY
from proofs.trainings import accuracies, changed, forget, run_all, table, train_and_score
from vlm_vqa.params import Mask, load_params

EPOCHS = (2, 3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all, or what is left, and write `masks.json`."""
    params = load_params()
    parser, known = measure.parser("masks", __doc__, "proofs", seeds=3), [mask.value for mask in Mask]
    parser.add_argument("--masks", nargs="+", choices=known, default=known, help="those to compare; default: all")
    options = measure.parse(parser, arguments)
    seeds, masks = range(options.seeds), [Mask(mask) for mask in options.masks]
    trainings = {}
    # One row per question takes longest, so it comes last.
    for mask in sorted(masks, key=lambda mask: mask is Mask.PREFIX_LM):
        per_row = 1 if mask is Mask.PREFIX_LM else params.train.questions_per_row
        for seed, epochs in itertools.product(seeds, EPOCHS):
            changes = {"seed": seed, "prompt.mask": mask.value, "train.questions_per_row": per_row}
            changes["train.num_train_epochs"] = epochs
            trainings[name(mask, epochs, seed)] = partial(train_and_score, changed(params, changes))
    done = run_all("masks", trainings)
    rows = {
        f"`{mask.value}`, {epochs} epochs": accuracies(done, [name(mask, epochs, seed) for seed in seeds])
        for mask in masks
        for epochs in EPOCHS
    }
    print(table(rows, "mask"))
    # What the committed params.yaml is held to; the others are there to be compared.
    own = f"`{params.prompt.mask.value}`, {params.train.num_train_epochs} epochs"
    claims = [
        measure.Claim(
            f"accuracy: {row}", statistics.mean(found), min(found), max(found), LEAST_ACCURACY if row == own else None
        )
        for row, found in rows.items()
    ]
    measure.write("masks", claims, {"runs": done, "rows": rows}, {"questions and pictures": params.data.source.value})
    forget("masks")


def name(mask: Mask, epochs: int, seed: int) -> str:
    """Return how one training is called."""
    return f"{mask.value}, {epochs} epochs, seed {seed}"


if __name__ == "__main__":
    main()
