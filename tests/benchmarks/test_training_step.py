"""The training benchmarks on tiny shapes: all recipes compute the same, and the arithmetic of the claims is right."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import memory, recipes, training_step
from benchmarks.measure import Timing
from benchmarks.workload import TRAIN_IMAGES, TRAIN_QUESTIONS, draw_step, questions_per_image, read_questions
from vlm_vqa.model.flops import supervised_pairs, visible_pairs
from vlm_vqa.model.layout import IGNORED, TokenLayout, visible
from vlm_vqa.params import LanguageConfig

TINY = LanguageConfig(16, 32, 2, 2, 1, 8)
VOCABULARY, THIN = 2000, 1500
WORDS = "red blue dog cat left right two three people table".split()
PAIRS = [(f"What is {one} near the {other}{' now' * (i % 3)}?", WORDS[i % 7]) for i, one in enumerate(WORDS)
         for other in WORDS]  # fmt: skip


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch, request):
    """Traced alone where recipes are compared, not at all where they are timed: making code takes a minute."""
    traced = partial(recipes.compile_layers, backend="eager")
    is_compared = request.node.name == "test_all_recipes_agree"
    monkeypatch.setattr(recipes, "compile_layers", traced if is_compared else lambda model: None)


@pytest.fixture(scope="module")
def workload():
    return draw_step(PAIRS, step_questions=14, num_patches=9, feature_width=12, text_length=70)


@pytest.fixture(scope="module")
def candidates(workload):
    model = recipes.build_model(TINY, VOCABULARY, workload)
    return training_step.all_recipes(model, workload, torch.float32)


def test_all_recipes_agree(candidates, workload):
    """Also where the last micro-batch is smaller, and where ours has several."""
    stock = candidates["reference"].model
    assert [len(batch.inputs["input_ids"]) for batch in candidates["reference"].batches] == [6, 6, 2]
    small = recipes.ours(candidates["ours"].model, workload, tokens=150)
    assert len(small.batches) > 1
    largest = training_step.check_agreement(candidates | {"small": small})
    assert largest["loss"] <= training_step.LOSS_TOLERANCE and largest["gradient"] <= training_step.GRADIENT_TOLERANCE
    assert all(weight.grad is not None for weight in stock.parameters())


def test_disagreement_is_seen(candidates, workload):
    """One wrong label, one lost question: the check must fail, or it would see nothing."""
    reference = candidates["reference"]
    inputs = dict(reference.batches[0].inputs)
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][inputs["labels"] != IGNORED] = workload.layout.eos_id
    wrong = replace(reference, batches=[replace(reference.batches[0], inputs=inputs), *reference.batches[1:]])
    lost = replace(reference, batches=reference.batches[:-1])
    for bad in (wrong, lost):
        with pytest.raises(AssertionError):
            training_step.check_agreement({"reference": reference, "bad": bad})


def test_a_changed_gradient_is_seen(candidates):
    """The loss alone would not show it."""
    reference = candidates["reference"]
    scaled = replace(reference, loss=lambda inputs: _with_double_gradient(reference.loss(inputs)))
    with pytest.raises(AssertionError, match="gradient"):
        training_step.check_agreement({"reference": reference, "scaled": scaled})


def _with_double_gradient(loss):
    return loss * 2 - loss.detach()


def test_positions_count_what_is_computed(candidates, workload):
    layout: TokenLayout = workload.layout
    assert candidates["reference"].positions == len(workload.questions) * (layout.num_patches + layout.text_length)
    assert candidates["dynamic"].positions == sum(
        batch.inputs["input_ids"].numel() for batch in candidates["dynamic"].batches
    )
    assert candidates["ours"].positions == sum(len(layout._columns(row)["input_ids"]) for row in workload.rows)


def test_visible_pairs_are_those_of_the_mask(workload):
    for row in workload.rows:
        batch = workload.layout.collate([row])
        seen = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
        assert visible_pairs(workload.layout, row) == int(seen.sum())


def test_model_flops_follow_torchs_own_count(candidates, workload):
    """Torch counts every product that runs: the linear maps' are ours exactly, attention's are dense and so more."""
    ours = candidates["ours"]
    with FlopCounterMode(display=False) as counter:
        ours.run()
    counted = counter.get_flop_counts()["Global"]
    linear = counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm]
    pairs, last_pairs = (
        sum(count(workload.layout, row) for row in workload.rows) for count in (visible_pairs, supervised_pairs)
    )
    attention = 12 * TINY.num_attention_heads * TINY.head_dim * ((TINY.num_hidden_layers - 1) * pairs + last_pairs)
    assert training_step.model_flops(TINY, VOCABULARY, workload, workload.rows) == linear + attention
    assert attention <= counted[torch.ops.aten.bmm]


def test_products_hold_all_linear_flops(workload):
    tokens, supervised = 100, 7
    listed = training_step.products(TINY, VOCABULARY, tokens, supervised)
    flops = sum(2 * m * k * n * count for (m, k, n), count in listed.items())
    maps = [one * other for one, other in training_step.linear_maps(TINY)]
    keys = maps[1] + maps[2]
    layers = 6 * tokens * ((TINY.num_hidden_layers - 1) * sum(maps) + keys) + 6 * supervised * (sum(maps) - keys)
    assert flops == layers + 6 * TINY.hidden_size * VOCABULARY * supervised


def test_many_layers_are_a_rounds_step_and_its_layers_in_their_place():
    """5 + 3 a layer against 1 + 1 a layer: at 26 layers 83 against 27; a round that is slow is slow in all that it times."""
    rounds = (1.0, 2.0, 1.0)
    thin = training_step.THIN_VOCABULARY

    def timings(slow, ours):
        return {
            name: Timing(tuple(one * number for number in rounds)) for name, one in (("slow", slow), ("ours", ours))
        }

    found = {(2, 9): timings(11, 3), (2, thin): timings(7, 2.5), (10, thin): timings(31, 10.5)}
    assert training_step.at_depth(found, "slow", 26, 9).seconds == (83, 166, 83)
    assert training_step.at_depth(found, "ours", 26, 9).seconds == (27, 54, 27)
    # Its layers but the last are those of ours.
    found[2, 9]["whole_last_layer"] = Timing((5.0, 5.0, 5.0))
    assert training_step.at_depth(found, "whole_last_layer", 26, 9).seconds == (29, 53, 29)


def test_a_timed_step_leaves_no_gradients(candidates):
    """Those of a model with Gemma's vocabulary would not fit beside another's."""
    ours = candidates["ours"]
    training_step.step(ours, ours.batches)
    assert all(weight.grad is None for weight in ours.model.parameters())


def test_small_shape_on_a_tiny_one(workload):
    claims, details = training_step.small_shape(workload, TINY, VOCABULARY, 1, torch.float32)
    assert [claim.target for claim in claims] == [8.0] + [None] * 7
    seconds = details["seconds"]
    assert claims[0].ratio == pytest.approx(seconds["reference"][0] / seconds["ours"][0])
    assert claims[5].ratio == pytest.approx(seconds["whole_last_layer"][0] / seconds["ours"][0])


def test_large_shape_on_a_tiny_one(workload, monkeypatch):
    """The whole path, from timings to claims; the rate of the machine is made up."""
    monkeypatch.setattr(
        training_step.measure, "matmul_rate", lambda *shape, **_: 1e9 if torch.float32 in shape else 1e8
    )
    monkeypatch.setattr(training_step, "THIN_VOCABULARY", THIN)
    shape = replace(TINY, num_hidden_layers=26)
    claims, details = training_step.large_shape(workload, shape, VOCABULARY, {"whole": 2, "gains": 1}, torch.float32)
    depths = [claim.what.split(":")[0].removeprefix("2B shape, ") for claim in claims]
    assert depths == ["2 layers", "4 layers", "26 layers"] * 6 + ["4 layers"]
    assert [claim.target for claim in claims if claim.target] == [8.5, 0.6]
    assert claims[2].low <= claims[2].ratio <= claims[2].high and claims[2].what in details["spread"]
    timed = details["seconds"]["whole"]
    places = [(2, VOCABULARY), (2, THIN), (10, THIN)]
    names = [training_step.named(replace(TINY, num_hidden_layers=layers), size) for layers, size in places]

    def of_round(number, recipe):
        step, short, long = (timed[name][recipe][number] for name in names)
        return step + 3 * (long - short)

    ratios = [of_round(number, "reference") / of_round(number, "ours") for number in range(2)]
    assert (claims[2].low, claims[2].high) == pytest.approx((min(ratios), max(ratios)))
    share = details["share_of_the_machine"]
    assert share["float32"]["machine_flop_per_second"] == pytest.approx(1e9)
    assert share["bfloat16"]["step"].startswith("not measured")
    assert claims[-1].high == pytest.approx(share["model_flops"] / min(share["float32"]["seconds"]) / 1e9)


def test_questions_per_image_are_as_many_as_in_vqav2():
    counts = questions_per_image(20_000, torch.Generator().manual_seed(0))
    assert counts.min() == 3
    assert counts.float().mean().item() == pytest.approx(TRAIN_QUESTIONS / TRAIN_IMAGES, abs=0.05) == 5.36


def test_a_step_is_a_stretch_of_the_grouped_order(workload):
    images = [image for image, _ in workload.questions]
    assert images == sorted(images) and len(images) == 14
    assert set(images) == set(range(len(workload.features)))
    assert len(workload.rows) == len(set(images)) < 14


def test_the_real_step(shared_data):
    workload = draw_step(read_questions()[:6000], num_patches=2, feature_width=2)
    assert len(workload.questions) == 60
    assert 10 <= workload.facts["images"] <= 14
    assert workload.facts["records_dropped_as_too_long"] < 20
    assert all(workload.layout.text_tokens(tokens) <= 64 for _, tokens in workload.questions)


@pytest.mark.parametrize("kind", memory.KINDS)
@pytest.mark.parametrize("recipe", memory.RECIPES)
def test_memory_is_measured(workload, kind, recipe):
    found = memory.measure_one(recipe, kind, workload, replace(TINY, num_hidden_layers=1), VOCABULARY)
    embedding = VOCABULARY * TINY.hidden_size * 4 / memory.MIB
    assert (found["gradients"] >= round(embedding, 1)) == (kind == "step")
    assert found["peak"] >= found["before"] - 1


def test_memory_of_all_kinds_is_written(monkeypatch, tmp_path):
    """One process for each recipe and kind; here none is started."""
    asked = []
    numbers = {"peak": 3.0, "before": 1.0, "gradients": 1.0, "without": 1.0}
    lacking = numbers | {"peak": 2.0}
    monkeypatch.setattr(
        memory,
        "in_a_process",
        lambda recipe, kind: asked.append((recipe, kind)) or (lacking if "no" in kind else numbers),
    )
    monkeypatch.setattr(memory.measure, "RESULTS", tmp_path)
    memory.main([])
    assert sorted(asked) == sorted((recipe, kind) for recipe in memory.RECIPES for kind in memory.KINDS)
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written["details"]["no_logits"]["ours"] == lacking
    assert written["claims"][4]["met"] is False and written["claims"][4]["ratio"] == 1.0


def test_claims_about_memory():
    numbers = {"peak": 100.0, "before": 40.0, "gradients": 20.0, "without": 40.0}
    found = {(kind, recipe): dict(numbers) for kind in memory.KINDS for recipe in memory.RECIPES}
    found["step", "ours"] |= {"peak": 70.0, "without": 10.0}
    found["no_logits", "reference"]["peak"] = 20.0
    found["no_logits", "ours"]["peak"] = 90.0
    found["frozen", "reference"]["peak"] = 50.0
    ratios = {claim.what.split(": ")[1]: claim for claim in memory.claims_of(found)}
    assert ratios["peak"].ratio == 0.7
    assert ratios["besides weights and gradients"].ratio == 0.25
    assert ratios["logits and loss of 6 questions"].ratio == 10 / 80
    assert ratios["logits and loss of 6 questions"].met is True
    assert ratios["embedding frozen against trained, reference"].ratio == 0.5
