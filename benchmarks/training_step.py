"""How fast an optimizer step's loss and gradients come, against the reference recipe and against the machine.

    python -m benchmarks.training_step [--dtype bfloat16] [--rounds 7] [--rounds-deepest 3]

The same 60 questions are computed by each recipe of `benchmarks.recipes`, optimizer apart, in turn:

    small shape           all recipes, the whole step; before that all must give the same loss and the same gradients
    Gemma 2 2B's layers   reference and ours, and ours as variants, with 2 and 4 layers and vocabulary 256,000; in the rounds
                          with 2 layers also one layer alone, of which 24 more make the figures at 26 layers
    share of the machine  model FLOP/s of one of our micro-batches over the rate of the same matrix products alone

A round computes all that a ratio needs, one after another, and its spread is that of the rounds. About 40 minutes on 2 quiet
cores; 18 GiB of memory. `--rounds 1 --rounds-deepest 1` shows that it works.
"""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure, recipes
from benchmarks.measure import Claim, Timing
from benchmarks.recipes import MicroBatch, Recipe
from benchmarks.workload import Workload, data, draw_step, read_questions
from vlm_vqa.model.flops import cost, linear_maps, rows_work
from vlm_vqa.model.layout import Row
from vlm_vqa.model.vlm import VlmForTraining
from vlm_vqa.params import LanguageConfig

# Gemma 2 2B's proportions but for the head width: 8 query and 4 key heads, MLP 4 times as wide.
SMALL, SMALL_VOCABULARY = LanguageConfig(512, 2048, 4, 8, 4, 64), 32_000
GEMMA_2B, GEMMA_VOCABULARY = LanguageConfig(2304, 9216, 26, 8, 4, 256), 256_000
DEPTHS = (2, 4)
FORMULA = (
    "6 x parameters of the layers' linear maps x real tokens + 4 x projector's parameters x image tokens + "
    "6 x hidden x vocabulary x supervised tokens + "
    "12 x heads x head width x layers x (query, key) pairs that see each other; "
    "in the last layer, of tokens that are not supervised, keys and values alone"
)
LAYER = "one layer, "
"""Before the name of a recipe whose first layer is timed alone."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
"""Relative, in float32."""
PROBE_TOKENS = 128
"""Few enough that an emulated product takes seconds, not minutes."""

SMALL_CLAIMS = {
    "whole step: sharing, no padding, supervised logits": ("reference", "ours", 8.0),
    "supervised logits alone": ("reference", "supervised_logits", None),
    "padding to the longest alone": ("reference", "dynamic", None),
    "supervised logits and padding to the longest": ("reference", "dynamic_supervised", None),
    "sharing and packing on top of both": ("dynamic_supervised", "whole_last_layer", None),
    "the last layer at supervised positions": ("whole_last_layer", "ours", None),
    "attention's scores recomputed, not all layers": ("recomputed_layers", "recomputed_scores", None),
    "compiled": ("ours", "compiled", None),
}
"""What is claimed, the slower recipe, the faster one, and how many times faster it is to be."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `training_step.json`."""
    parser = measure.parser("training_step", __doc__, rounds=7, rounds_deepest=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: by autocast")
    options = measure.parse(parser, arguments)
    dtype = getattr(torch, options.dtype)
    workload = draw_step(read_questions())
    print(f"one optimizer step: {workload.facts}", flush=True)
    small, small_details = small_shape(workload, SMALL, SMALL_VOCABULARY, options.rounds, dtype)
    rounds = {depth: options.rounds_deepest if depth == max(DEPTHS) else options.rounds for depth in DEPTHS}
    large, large_details = large_shape(workload, GEMMA_2B, GEMMA_VOCABULARY, rounds, dtype)
    details = {"dtype": options.dtype, "workload": workload.facts, "small": small_details, "gemma_2_2b": large_details}
    measure.write("training_step", small + large, details, data())


def small_shape(
    workload: Workload, shape: LanguageConfig, vocabulary: int, rounds: int, dtype: torch.dtype
) -> tuple[list[Claim], dict[str, Any]]:
    """Check that all recipes agree, then time the whole step by each."""
    model = recipes.build_model(shape, vocabulary, workload)
    print(f"{named(shape, vocabulary)}: do the recipes agree?", flush=True)
    disagreement = check_agreement(all_recipes(model, workload, torch.float32))
    print(f"  largest relative differences to the reference: {disagreement}", flush=True)
    candidates = all_recipes(model, workload, dtype)
    # The check was the warm-up, but for kernels of another type.
    timings = measure.alternate(
        {name: recipe.run for name, recipe in candidates.items()}, rounds, warm_up=int(dtype is not torch.float32)
    )
    note = named(shape, vocabulary)
    claims = [
        measure.claim(f"small shape: {what}", timings[slow], timings[fast], target=target, note=note)
        for what, (slow, fast, target) in SMALL_CLAIMS.items()
    ]
    details = {
        "shape": asdict(shape) | {"vocabulary": vocabulary},
        "largest_relative_difference": disagreement,
        "positions": {name: recipe.positions for name, recipe in candidates.items()},
        "seconds": {name: timing.seconds for name, timing in timings.items()},
    }
    return claims, details


def all_recipes(model: VlmForTraining, workload: Workload, dtype: torch.dtype) -> dict[str, Recipe]:
    """Return every recipe over the parameters of `model`, reference first."""
    stock = recipes.stock_model(model)
    ways = (recipes.reference, recipes.dynamic, recipes.supervised_logits, recipes.dynamic_supervised)
    return {way.__name__: way(stock, workload, dtype=dtype) for way in ways} | variants(model, workload, dtype)


def variants(model: VlmForTraining, workload: Workload, dtype: torch.dtype) -> dict[str, Recipe]:
    """Return our own recipes."""
    ways = (
        recipes.ours,
        recipes.compiled,
        recipes.whole_last_layer,
        recipes.recomputed_scores,
        recipes.recomputed_layers,
    )
    return {way.__name__: way(model, workload, dtype=dtype) for way in ways}


def check_agreement(candidates: Mapping[str, Recipe]) -> dict[str, float]:
    """Return the largest relative differences of loss and gradients to the first recipe.

    A gradient's difference is that of its norms, parameter by parameter.

    Raises:
        AssertionError: a recipe computes something else.
    """
    expected_loss: float | None = None
    expected: dict[int, Tensor] = {}
    largest = {"loss": 0.0, "gradient": 0.0}
    for name, recipe in candidates.items():
        loss = recipe.run()
        # All recipes fill the same parameters; only one set of gradients is kept.
        gradients = {id(weight): weight.grad for weight in recipe.model.parameters() if weight.grad is not None}
        if expected_loss is None:
            expected_loss, expected = loss, gradients
            continue
        assert gradients.keys() == expected.keys(), f"{name}: gradients of other parameters"
        of_loss = abs(loss - expected_loss) / expected_loss
        # Not Python's max, which may pass over a NaN.
        of_gradient = (
            torch.stack([(gradients[key] - one).norm() / one.norm() for key, one in expected.items()]).max().item()
        )
        assert of_loss <= LOSS_TOLERANCE, f"{name}: loss {loss}, but {expected_loss} expected"
        assert of_gradient <= GRADIENT_TOLERANCE, f"{name}: a gradient is off by {of_gradient:.1e} of its norm"
        largest = {"loss": max(largest["loss"], of_loss), "gradient": max(largest["gradient"], of_gradient)}
    return largest


def large_shape(
    workload: Workload, shape: LanguageConfig, vocabulary: int, rounds: Mapping[int, int], dtype: torch.dtype
) -> tuple[list[Claim], dict[str, Any]]:
    """Time a few layers of `shape`, extrapolate to all of them, and measure the share of the machine.

    Args:
        rounds: measured rounds of each number of layers.
    """
    timings: dict[int, dict[str, Timing]] = {}
    for depth, number in rounds.items():
        few = replace(shape, num_hidden_layers=depth)
        print(named(few, vocabulary), flush=True)
        model = recipes.build_model(few, vocabulary, workload)
        timings[depth] = time_depth(model, workload, number, depth == min(rounds), dtype)
        if depth == max(rounds):
            # The deepest is nearest to the real model, where the embedding's dense gradient is a small part of the work.
            shares, share_details = machine_share(model, few, vocabulary, workload, number)
        # Two models of this vocabulary do not fit.
        del model
        gc.collect()
    details = {
        "shape": asdict(shape) | {"vocabulary": vocabulary, "layers_measured": list(timings)},
        "seconds": {depth: {name: one.seconds for name, one in of.items()} for depth, of in timings.items()},
        "reference": "one micro-batch timed, times the positions of all over its own: its ten are of one shape",
        "dynamic": "the micro-batch of median width timed, times the positions of all over its own",
        "ours": "all micro-batches timed",
        "extrapolation": "a round's step with the fewest layers and that round's one layer for each of the others",
        "spread": {
            one.what: (one.high - one.low) / one.ratio for one in large_claims(timings, shape.num_hidden_layers)
        },
        "share_of_the_machine": share_details,
    }
    return large_claims(timings, shape.num_hidden_layers) + shares, details


def large_claims(timings: Mapping[int, Mapping[str, Timing]], layers: int) -> list[Claim]:
    """Claim the measured ratios and those at `layers`."""
    pairs = {
        "whole step": ("reference", "ours", 8.5),
        "whole step, compiled": ("reference", "compiled", None),
        "the last layer at supervised positions": ("whole_last_layer", "ours", None),
        "attention's scores recomputed, not all layers": ("recomputed_layers", "recomputed_scores", None),
        "what recomputed scores cost": ("recomputed_scores", "ours", None),
        "against padding to the longest, full logits": ("dynamic", "ours", None),
    }
    made = []
    for what, (slow, fast, target) in pairs.items():
        for depth, of in timings.items():
            if slow in of:
                made.append(measure.claim(f"2B shape, {count(depth)}: {what}", of[slow], of[fast]))
        many = (at_depth(timings, name, layers) for name in (slow, fast))
        made.append(measure.claim(f"2B shape, {layers} layers: {what}", *many, target=target, note="extrapolated"))
    return made


def at_depth(timings: Mapping[int, Mapping[str, Timing]], name: str, layers: int) -> Timing:
    """Return what a step with `layers` takes in each round: that with the fewest, and one more layer for each other."""
    fewest = min(timings)
    of = timings[fewest]
    each = zip(of[name].seconds, of[f"{LAYER}{name}"].seconds, strict=True)
    return Timing(tuple(step + (layers - fewest) * layer for step, layer in each))


def time_depth(
    model: VlmForTraining, workload: Workload, rounds: int, with_layers: bool, dtype: torch.dtype
) -> dict[str, Timing]:
    """Return the seconds of a whole step by each recipe; those of the stock class from one micro-batch.

    Args:
        with_layers: time the first layer of each alone, too, and padding to the longest.
    """
    stock = recipes.stock_model(model)
    candidates = {"reference": recipes.reference(stock, workload, dtype=dtype)}
    if with_layers:
        candidates["dynamic"] = recipes.dynamic(stock, workload, dtype=dtype)
    timed = {name: [median_batch(one)] for name, one in candidates.items()}
    factor = {name: one.positions / timed[name][0].positions for name, one in candidates.items()}
    mine = variants(model, workload, dtype)
    candidates |= mine
    timed |= {name: one.batches for name, one in mine.items()}
    runs: dict[str, Callable[[], object]] = {name: partial(one.run, timed[name]) for name, one in candidates.items()}
    if with_layers:
        runs |= {f"{LAYER}{name}": one.first_layer(timed[name]) for name, one in candidates.items()}
        # It is the same as that of ours, and so is its noise.
        del runs[f"{LAYER}whole_last_layer"]
    # Enough to warm up: the products are large, and a whole round of the reference takes minutes.
    candidates["ours"].run(timed["ours"][-1:])
    candidates["compiled"].run()
    timings = measure.alternate(runs, rounds, warm_up=0)
    if with_layers:
        timings[f"{LAYER}whole_last_layer"] = timings[f"{LAYER}ours"]
    return {
        name: Timing(tuple(one * factor.get(name.removeprefix(LAYER), 1.0) for one in timing.seconds))
        for name, timing in timings.items()
    }


def median_batch(recipe: Recipe) -> MicroBatch:
    """Return the recipe's micro-batch with the median number of positions."""
    return sorted(recipe.batches, key=lambda batch: batch.positions)[len(recipe.batches) // 2]


def machine_share(
    model: VlmForTraining, shape: LanguageConfig, vocabulary: int, workload: Workload, rounds: int
) -> tuple[list[Claim], dict[str, Any]]:
    """Measure the model FLOP/s of our first micro-batch over the machine's rate, in float32 and, where it pays, bfloat16."""
    rows = recipes.pack(workload)[0]
    tokens = sum(recipes.row_tokens(workload.layout, row) for row in rows)
    supervised = sum(len(one.answer) for row in rows for one in row.questions)
    work = model_flops(shape, vocabulary, workload, rows)
    occurring = products(shape, vocabulary, tokens, supervised)
    claims: list[Claim] = []
    details: dict[str, Any] = {"tokens": tokens, "supervised": supervised, "model_flops": work, "formula": FORMULA}
    plain = 0.0
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        probe = measure.matmul_rate(PROBE_TOKENS, shape.hidden_size, shape.intermediate_size, dtype)
        details[name] = {f"flop_per_second_of_an_mlp_product_with_{PROBE_TOKENS}_tokens": probe}
        print(f"  an MLP product of {PROBE_TOKENS} tokens runs at {probe:.3g} FLOP/s in {name}", flush=True)
        if probe < plain:
            # Emulated: nobody would train in it here, and the step would take minutes.
            details[name]["step"] = "not measured: slower than float32 on this machine"
            continue
        plain = probe
        machine = product_rate(occurring, dtype)
        recipe = recipes.ours(model, workload, dtype=dtype)
        timing = measure.alternate({f"ours, one micro-batch, {name}": partial(recipe.run, recipe.batches[:1])}, rounds)
        seconds = next(iter(timing.values())).seconds
        shares = [work / one / machine for one in seconds]
        details[name] |= {"machine_flop_per_second": machine, "seconds": seconds}
        what = f"2B shape, {count(shape.num_hidden_layers)}: share of the matrix-product rate, {name}"
        claims.append(Claim(what, statistics.median(shares), min(shares), max(shares), target=0.6))
    return claims, details


def model_flops(shape: LanguageConfig, vocabulary: int, workload: Workload, rows: Sequence[Row]) -> int:
    """Count the FLOPs that loss and gradients of `rows` need, see `vlm_vqa.model.flops`."""
    return cost(shape, vocabulary, workload.features.shape[-1]).flops(rows_work(workload.layout, rows))


def products(shape: LanguageConfig, vocabulary: int, tokens: int, supervised: int) -> dict[tuple[int, int, int], int]:
    """Return how often each product [m, k] @ [k, n] occurs: the linear maps' outputs, input and weight gradients."""
    maps = [(tokens, *one) for one in linear_maps(shape)] * (shape.num_hidden_layers - 1)
    # Of the last layer only keys and values are of all tokens.
    maps += [(tokens if place in (1, 2) else supervised, *one) for place, one in enumerate(linear_maps(shape))]
    counts: dict[tuple[int, int, int], int] = {}
    for m, k, n in [*maps, (supervised, shape.hidden_size, vocabulary)]:
        for product in ((m, k, n), (m, n, k), (n, m, k)):
            counts[product] = counts.get(product, 0) + 1
    return counts


def product_rate(counts: Mapping[tuple[int, int, int], int], dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Return FLOP/s of all these products one after another, each timed alone for about `seconds`."""
    work = {product: 2 * int(np.prod(product, dtype=np.int64)) * count for product, count in counts.items()}
    spent = sum(flops / measure.matmul_rate(*product, dtype, seconds) for product, flops in work.items())
    return sum(work.values()) / spent


def named(shape: LanguageConfig, vocabulary: int) -> str:
    """Name a shape in a line of text."""
    return f"hidden {shape.hidden_size}, {count(shape.num_hidden_layers)}, vocabulary {vocabulary:,}"


def count(layers: int) -> str:
    """Name a number of layers."""
    return f"{layers} layer" + "s" * (layers != 1)


if __name__ == "__main__":
    main()
