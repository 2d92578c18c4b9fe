"""Model FLOPs: the formula against torch's own count of what runs, and counts of batches against the mask itself."""

import copy
from dataclasses import astuple, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from vlm_vqa.model.adapters import add_adapters
from vlm_vqa.model.flops import Work, cost, linear_maps, model_cost, rows_work, vision_flops
from vlm_vqa.model.layout import PAD_SEGMENT, QuestionTokens, Row, visible
from vlm_vqa.model.vlm import freeze_embeddings
from vlm_vqa.params import LanguageConfig, LoraParams, Mask

MASKS = [mask.value for mask in Mask]
TEXTS = [("Is it red?", "yes"), ("How many dogs are there?", "two dogs"), ("What color is the shape?", "blue")]


def make_rows(layout):
    """Return rows of several lengths, with all questions in the first where they can share it."""
    first, second, third = (layout.tokenize(question, answer) for question, answer in TEXTS)
    shared = (first, second, third) if layout.mask is not Mask.PREFIX_LM else (first,)
    return [Row(0, shared), Row(1, (second,)), Row(2, (third,))]


def make_batch(tiny, layout, rows):
    features = torch.randn(len(rows), tiny.num_patches, tiny.encoder_config.hidden_size)
    return {"image_features": features, **layout.collate(rows)}


def run(tiny, batch, *, frozen=False):
    """Return the model's configuration and torch's count of each product in loss and gradients."""
    model = copy.deepcopy(tiny.training)
    if frozen:
        freeze_embeddings(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()
    counts = {operation.__name__: flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    return model.config, counts


def computed_pairs(batch, layout):
    """Count the pairs of the grids that attention computes: prefixes by themselves, the rest of a row on all of it; and of
    these what the last layer does, none of a prefix by itself."""
    rows, width = batch["input_ids"].shape
    prefix = batch["prefix_places"].shape[1] if layout.mask is not Mask.PREFIX_LM else 0
    return rows * (prefix**2 + (width - prefix) * width), rows * (width - prefix) * width


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_the_formula_is_what_torch_counts(tiny, mask, frozen):
    """Linear maps, projector and head to the FLOP; attention but for pairs of its grid that do not see each other."""
    layout = tiny.layout(mask)
    rows = make_rows(layout)
    batch = make_batch(tiny, layout, rows)
    config, counted = run(tiny, batch, frozen=frozen)
    price, work = model_cost(config, frozen_embeddings=frozen), rows_work(layout, rows)
    assert counted["mm"] + counted["addmm"] == price.flops(replace(work, pairs=0, supervised_pairs=0))
    grids, last_grids = computed_pairs(batch, layout)
    assert counted["bmm"] == price.pair * grids + price.supervised_pair * last_grids
    assert grids > work.pairs and last_grids > work.supervised_pairs


def test_the_whole_formula_is_torchs_count_where_all_see_all(tiny):
    """A row of prefix-lm whose answer is <eos> alone: it is predicted, not read, so nothing is causal."""
    layout = tiny.layout("prefix-lm")
    rows = [Row(0, (QuestionTokens(layout.tokenize("Is it red?").prompt, [layout.eos_id]),))]
    batch = make_batch(tiny, layout, rows)
    config, counted = run(tiny, batch)
    price, work = model_cost(config, frozen_embeddings=False), rows_work(layout, rows)
    # But in the last layer, whose grid has places of queries that are not asked.
    beside = price.supervised_pair * (computed_pairs(batch, layout)[1] - work.supervised_pairs)
    assert price.flops(work) == sum(counted.values()) - beside


@pytest.mark.parametrize(
    "lora", [None, LoraParams(rank=3, alpha=1.0, dropout=0.0, targets=("q_proj", "v_proj", "up_proj"))]
)
def test_adapters_and_a_last_layer_of_all_positions_are_what_torch_counts(tiny, lora):
    layout = tiny.layout("image-prefix")
    rows, model = make_rows(layout), copy.deepcopy(tiny.training)
    model.narrow_last_layer = False
    if lora is not None:
        add_adapters(model, lora)
    with FlopCounterMode(display=False) as counter:
        model(**make_batch(tiny, layout, rows))["loss"].backward()
    counted = {operation.__name__: flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    shape, work = model.config.text_config, rows_work(layout, rows)
    price = cost(shape, shape.vocab_size, 24, frozen_embeddings=lora is not None, lora=lora, everywhere=True)
    # The first adapters of a layer have no gradient while the second are zero, but it is computed.
    assert counted["mm"] + counted["addmm"] == price.flops(replace(work, pairs=0))


@pytest.mark.parametrize("mask", MASKS)
def test_rows_count_as_their_batch_and_its_mask(tiny, mask):
    layout = tiny.layout(mask)
    rows = make_rows(layout)
    batch = make_batch(tiny, layout, rows)
    work = rows_work(layout, rows)
    real = batch["segment_ids"] != PAD_SEGMENT
    assert not real.all(), "without padding the test shows less"
    seen = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
    assert work.pairs == seen[real].sum() and work.supervised_pairs == seen[batch["labels"] >= 0].sum()
    assert work.tokens == batch["prefix_places"].numel() + batch["rest_places"].numel() == real.sum()
    assert work.image_tokens == 3 * tiny.num_patches
    assert work.supervised == (batch["labels"] >= 0).sum()


@pytest.mark.parametrize("mask", MASKS)
def test_rows_that_teach_nothing_need_nothing(tiny, mask):
    layout = tiny.layout(mask)
    rows, idle = make_rows(layout), Row(3, ())
    assert rows_work(layout, [*rows, idle]) == rows_work(layout, rows)
    assert rows_work(layout, [idle]) == Work(0, 0, 0, 0, 0)


def test_cost_is_linear_in_layers_and_frozen_embeddings_spare_one_product():
    shape = LanguageConfig(16, 32, 3, 4, 2, 8)
    one, two = (cost(replace(shape, num_hidden_layers=layers), 100, 12, everywhere=True) for layers in (3, 6))
    assert (two.token, two.pair) == (2 * one.token, 2 * one.pair)
    assert (two.image_token, two.supervised) == (one.image_token, one.supervised)
    frozen = cost(shape, 100, 12, frozen_embeddings=True, everywhere=True)
    assert frozen == replace(one, supervised=one.supervised - 2 * 16 * 100)
    # Twice that of every parameter for the forward pass, twice as much again for the backward pass.
    assert one.token == 6 * 3 * (16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 32)
    assert len(linear_maps(shape)) == 7
    # What is not asked of every token is asked of the supervised ones.
    last = cost(shape, 100, 12)
    asked = 6 * (16 * 32 + 32 * 16 + 3 * 16 * 32)
    assert (one.token - last.token, last.supervised - one.supervised) == (asked, asked)
    assert (last.pair, last.supervised_pair) == (2 * one.pair // 3, one.pair // 3)


def test_work_is_paid_by_the_unit():
    price = cost(LanguageConfig(16, 32, 3, 4, 2, 8), 100, 12)
    units = [Work(*(int(place == at) for place in range(5))) for at in range(5)]
    assert [price.flops(unit) for unit in units] == list(astuple(price))
    assert price.flops(Work(5, 6, 7, 8, 9)) == sum(
        number * each for number, each in zip((5, 6, 7, 8, 9), astuple(price), strict=True)
    )


TOWER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@pytest.mark.parametrize(
    ("tower", "tokens"),
    [
        (Dinov2Model(Dinov2Config(**TOWER)), 5),
        (SiglipVisionModel(SiglipVisionConfig(**TOWER, intermediate_size=40, vision_use_head=False)), 4),
    ],
    ids=["dinov2", "siglip"],
)
def test_a_towers_forward_pass_is_what_torch_counts(tower, tokens):
    tower.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert tower(torch.randn(1, 3, 28, 28)).last_hidden_state.shape[1] == tokens
    assert counter.get_total_flops() == vision_flops(tower.config, tokens)
