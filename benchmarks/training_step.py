"""How fast an optimizer step's loss and gradients come, against the reference recipe and against the machine.

    python -m benchmarks.training_step [--dtype bfloat16] [--rounds 3] [--rounds-gains 2]

The same 60 questions are computed by each recipe of `benchmarks.recipes`, optimizer apart, in turn:

    small shape           all recipes, the whole step; before that all must give the same loss and the same gradients
    Gemma 2 2B's layers   reference and ours, with 2 and 4 layers and vocabulary 256,000; in the rounds with 2 layers also
                          with 2 and 10 layers and vocabulary 32,000: an eighth of what these lie apart is a layer in its
                          place, of which 24 more make the figures at 26 layers. Then the same of what each of ours gains
    share of the machine  model FLOP/s of one of our micro-batches over the rate of the same matrix products alone

A round computes all that a ratio needs, one after another, and its spread is that of the rounds. About 70 minutes on 2 quiet
cores; 18 GiB of memory. `--rounds 1 --rounds-gains 1` shows that it works.
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
"""Layers of the models with Gemma's vocabulary."""
THIN, THIN_VOCABULARY = (2, 10), SMALL_VOCABULARY
"""Of those which tell what a layer takes in its place; with Gemma's vocabulary so many would not fit."""
FORMULA = (
    "6 x parameters of the layers' linear maps x real tokens + 4 x projector's parameters x image tokens + "
    "6 x hidden x vocabulary x supervised tokens + "
    "12 x heads x head width x layers x (query, key) pairs that see each other; "
    "in the last layer, of tokens that are not supervised, keys and values alone"
)
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
LARGE_CLAIMS: dict[str, dict[str, tuple[str, str, float | None]]] = {
    "whole": {
        "whole step": ("reference", "ours", 8.5),
        "whole step, compiled": ("reference", "compiled", None),
    },
    "gains": {
        "the last layer at supervised positions": ("whole_last_layer", "ours", None),
        "attention's scores recomputed, not all layers": ("recomputed_layers", "recomputed_scores", None),
        "what recomputed scores cost": ("recomputed_scores", "ours", None),
        "against padding to the longest, full logits": ("dynamic", "ours", None),
    },
}
"""The same at the large shape, in two sets of rounds: all in one would be too long for ratios of neighbours."""
Place = tuple[int, int]  # layers and vocabulary
Timings = dict[Place, dict[str, Timing]]  # by recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `training_step.json`."""
    parser = measure.parser("training_step", __doc__, rounds=3, rounds_gains=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: by autocast")
    options = measure.parse(parser, arguments)
    dtype = getattr(torch, options.dtype)
    workload = draw_step(read_questions())
    print(f"one optimizer step: {workload.facts}", flush=True)
    small, small_details = small_shape(workload, SMALL, SMALL_VOCABULARY, options.rounds, dtype)
    rounds = {"whole": options.rounds, "gains": options.rounds_gains}
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
    workload: Workload, shape: LanguageConfig, vocabulary: int, rounds: Mapping[str, int], dtype: torch.dtype
) -> tuple[list[Claim], dict[str, Any]]:
    """Time a few layers of `shape`, extrapolate to all of them, and measure the share of the machine.

    Args:
        rounds: measured rounds of each set of claims.
    """
    timings: dict[str, Timings] = {what: {} for what in LARGE_CLAIMS}
    few, deep = DEPTHS
    extrapolated = [(few, vocabulary), *((depth, THIN_VOCABULARY) for depth in THIN)]
    # No part of the extrapolation, so the fewest rounds are enough; beside the other, a second vocabulary does not fit.
    alone, fewest = [(deep, vocabulary)], dict.fromkeys(rounds, min(rounds.values()))
    for places, numbers in ((extrapolated, rounds), (alone, fewest)):
        models = {place: recipes.build_model(with_layers(shape, place[0]), place[1], workload) for place in places}
        for what, number in numbers.items():
            timings[what] |= time_places(models, workload, what, number, dtype)
        if (deep, vocabulary) in models:
            # The deepest is nearest to the real model, where the embedding's dense gradient is a small part of the work.
            model = models[deep, vocabulary]
            shares, share_details = machine_share(
                model, with_layers(shape, deep), vocabulary, workload, rounds["whole"]
            )
        del models
        gc.collect()
    claims = large_claims(timings, shape.num_hidden_layers, vocabulary)
    details = {
        "shape": asdict(shape) | {"vocabulary": vocabulary},
        "seconds": {
            what: {named(with_layers(shape, place[0]), place[1]): seconds(of) for place, of in places.items()}
            for what, places in timings.items()
        },
        "stock class": "its micro-batch of median width timed, times the positions of all over its own",
        "ours": "all micro-batches timed; of thin models its own of median width, times the positions of all over its own",
        "extrapolation": "a round's step with 2 layers, and 24 times an eighth of what 10 and 2 thin ones lie apart",
        "spread": {one.what: (one.high - one.low) / one.ratio for one in claims if one.note},
        "share_of_the_machine": share_details,
    }
    return claims + shares, details


def with_layers(shape: LanguageConfig, layers: int) -> LanguageConfig:
    return replace(shape, num_hidden_layers=layers)


def seconds(timings: Mapping[str, Timing]) -> dict[str, tuple[float, ...]]:
    return {name: timing.seconds for name, timing in timings.items()}


def large_claims(timings: Mapping[str, Timings], layers: int, vocabulary: int) -> list[Claim]:
    """Claim the measured ratios and those at `layers`."""
    made = []
    for group, claims in LARGE_CLAIMS.items():
        for what, (slow, fast, target) in claims.items():
            for depth in DEPTHS:
                of = timings[group][depth, vocabulary]
                made.append(measure.claim(f"2B shape, {count(depth)}: {what}", of[slow], of[fast]))
            many = (at_depth(timings[group], name, layers, vocabulary) for name in (slow, fast))
            made.append(measure.claim(f"2B shape, {layers} layers: {what}", *many, target=target, note="extrapolated"))
    return made


def at_depth(timings: Timings, name: str, layers: int, vocabulary: int) -> Timing:
    """Return what a step with `layers` takes in each round: that with the fewest, and one more layer for each other."""
    few, (fewer, more) = min(DEPTHS), THIN
    # A layer that is not the last is the same with both.
    thin = "ours" if name == "whole_last_layer" else name
    pairs = zip(*(timings[depth, THIN_VOCABULARY][thin].seconds for depth in (fewer, more)), strict=True)
    each = [(long - short) / (more - fewer) for short, long in pairs]
    steps = timings[few, vocabulary][name].seconds
    return Timing(tuple(step + (layers - few) * layer for step, layer in zip(steps, each, strict=True)))


def time_places(
    models: Mapping[Place, VlmForTraining], workload: Workload, group: str, rounds: int, dtype: torch.dtype
) -> Timings:
    """Return the seconds of a whole step by each recipe of the group's claims; see `large_shape` for what is timed."""
    runs: dict[str, Callable[[], object]] = {}
    factors: dict[tuple[Place, str], float] = {}
    for place, model in models.items():
        possible = large_recipes(model, workload, dtype)
        for name in dict.fromkeys(name for slow, fast, _ in LARGE_CLAIMS[group].values() for name in (slow, fast)):
            if name == "whole_last_layer" and place[1] == THIN_VOCABULARY:
                continue
            recipe = possible[name]
            whole = recipe.model is model and place[1] != THIN_VOCABULARY
            batches = recipe.batches if whole else [median_batch(recipe)]
            factors[place, name] = recipe.positions / sum(batch.positions for batch in batches)
            runs[label(place, name)] = partial(step, recipe, batches)
            if name in ("ours", "compiled"):
                # Enough to warm up: the products are large, and a whole round of the reference takes minutes.
                step(recipe, batches)
    timings = measure.alternate(runs, rounds, warm_up=0)
    found: Timings = {place: {} for place in models}
    for (place, name), factor in factors.items():
        found[place][name] = Timing(tuple(one * factor for one in timings[label(place, name)].seconds))
    return found


def label(place: Place, name: str) -> str:
    return f"{count(place[0])}, vocabulary {place[1]:,}: {name}"


def step(recipe: Recipe, batches: Sequence[MicroBatch]) -> None:
    """Compute loss and gradients and let the gradients go: another model's are to fit."""
    recipe.run(batches)
    recipe.model.zero_grad(set_to_none=True)


def large_recipes(model: VlmForTraining, workload: Workload, dtype: torch.dtype) -> dict[str, Recipe]:
    """Return the recipes of `LARGE_CLAIMS` over the parameters of `model`."""
    stock = recipes.stock_model(model)
    ways = (recipes.reference, recipes.dynamic)
    return {way.__name__: way(stock, workload, dtype=dtype) for way in ways} | variants(model, workload, dtype)


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
