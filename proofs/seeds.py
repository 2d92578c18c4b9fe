"""Does the small run end above its floor with every seed, on a CPU that takes all its own instructions?

`python -m proofs.seeds` needs what the first two stages write (`make repro`). Unlike `make repro` it asks for no particular
instructions: on a CPU with AVX512 the last bits are others than those of the committed run. Accuracy is counted on all
validation questions, after the last step.
"""

import statistics
from collections.abc import Sequence
from functools import partial

from benchmarks import measure
from benchmarks.small_run import LEAST_ACCURACY
from proofs.trainings import accuracies, changed, forget, run_all, table, train_and_score
from vlm_vqa.params import load_params


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all, or what is left, and write `seeds.json`."""
    params = load_params()
    options = measure.parse(measure.parser("seeds", __doc__, "proofs", seeds=10), arguments)
    names = {f"seed {seed}": seed for seed in range(options.seeds)}
    done = run_all(
        "seeds", {name: partial(train_and_score, changed(params, {"seed": seed})) for name, seed in names.items()}
    )
    found = accuracies(done, names)
    rows = {f"{len(found)} seeds": found}
    print(table(rows, "small run"))
    # The lowest is what is promised, so it is held to the floor.
    spread = measure.Claim("accuracy: mean over seeds", statistics.mean(found), min(found), max(found))
    lowest = measure.Claim("accuracy: lowest seed", min(found), min(found), min(found), LEAST_ACCURACY)
    data = {"questions and pictures": params.data.source.value}
    measure.write("seeds", [spread, lowest], {"runs": done, "rows": rows}, data)
    forget("seeds")


if __name__ == "__main__":
    main()
