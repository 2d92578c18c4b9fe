"""Is a new projector worth a rate of its own? A trained Gemma 2, a projector drawn anew, 200 steps, over several seeds.

`python -m proofs.rates` needs what the first three stages write (`make repro`). It is how full-scale fine-tuning begins,
made small: a language model that knows its language, at a low rate that keeps what it knows, and a projector that knows
nothing. Gemma 2 is the trained small run's. It learns at 1e-5, as in the reference recipe; the projector at the same rate,
at a hundred times that rate, or at that and alone for the first half. Accuracy is counted on all validation questions.
"""

import itertools
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from benchmarks import measure
from proofs.trainings import accuracies, changed, forget, run_all, table, train_and_score
from vlm_vqa.errors import UserError, make_again
from vlm_vqa.model.vlm import WEIGHTS_FILE, VlmForTraining
from vlm_vqa.params import load_params

TRAINED = Path("models/trained")
STEPS = 200
RATE = 1e-5
OWN = {"train.projector_learning_rate": 100 * RATE}
WAYS = {
    "one rate": {},
    "projector at 100 times the rate": OWN,
    "projector at 100 times the rate, alone for the first half": OWN | {"train.projector_steps": STEPS // 2},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all, or what is left, and write `rates.json`."""
    params = load_params()
    options = measure.parse(measure.parser("rates", __doc__, "proofs", seeds=3), arguments)
    if not (TRAINED / WEIGHTS_FILE).is_file():
        raise UserError(f"{TRAINED}: no {WEIGHTS_FILE} there. {make_again('train')}")
    # Its own seed would draw the very projector from which the trained Gemma 2 was taught.
    seeds = range(params.seed + 1, params.seed + 1 + options.seeds)
    trainings = {}
    for seed, (way, changes) in itertools.product(seeds, WAYS.items()):
        recipe = changed(params, {"seed": seed, "train.learning_rate": RATE, **changes})
        trainings[f"{way}, seed {seed}"] = partial(train_and_score, recipe, take_language_model, STEPS)
    done = run_all("rates", trainings)
    rows = {way: accuracies(done, [f"{way}, seed {seed}" for seed in seeds]) for way in WAYS}
    print(table(rows, "rates"))
    one, *others = rows.values()
    claims = []
    for way, found in zip([*WAYS][1:], others, strict=True):
        ratios = [new / old for new, old in zip(found, one, strict=True)]
        what = f"accuracy over that of one rate: {way}"
        claims.append(measure.Claim(what, statistics.mean(found) / statistics.mean(one), min(ratios), max(ratios), 1.0))
    measure.write("rates", claims, {"runs": done, "rows": rows}, {"questions and pictures": params.data.source.value})
    forget("rates")


def take_language_model(model: VlmForTraining) -> None:
    """Give a model the trained small run's Gemma 2; its projector stays as it was drawn."""
    weights = load_file(TRAINED / WEIGHTS_FILE)
    kept = {name: value for name, value in weights.items() if not name.startswith("model.multi_modal_projector.")}
    lacking, unknown = model.load_state_dict(kept, strict=False)
    assert not unknown and set(lacking) == {
        "lm_head.weight",
        "model.multi_modal_projector.linear.weight",
        "model.multi_modal_projector.linear.bias",
    }, (lacking, unknown)
    model.tie_weights()


if __name__ == "__main__":
    main()
