"""Packed rows: the loss and gradients of one row per question, no leaks between questions, and no padding computed."""

import copy
import dataclasses

import pytest
import torch
from transformers import PaliGemmaConfig

from tests.tiny_model import tiny_base
from vlm_vqa.model.adapters import add_adapters
from vlm_vqa.model.layout import Row, rows_of, visible
from vlm_vqa.model.vlm import (
    VlmForTraining,
    initial_model,
    recompute_layers,
    recompute_scores,
    set_attention,
    set_dropout,
    text_hidden,
    text_logits,
)
from vlm_vqa.params import PROJECTIONS, Attention, LoraParams, Mask

ASKED = [
    (0, "What color is the shape?", "red"),
    (0, "Is it?", "yes"),
    (0, "Is there a dog?", "no"),
    (1, "How many red dogs are there?", "twelve"),
    (1, "Is it?", "no"),
]
MASKS = [mask.value for mask in Mask]
SHARING = ["image-prefix", "causal"]


@pytest.fixture
def features(tiny):
    return torch.randn(2, tiny.num_patches, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny):
    tiny.training.train()
    yield tiny.training
    set_attention(tiny.training, Attention.EAGER)


def rows(tiny, asked=ASKED, mask="image-prefix"):
    layout = tiny.layout(mask)
    return rows_of([(image, layout.tokenize(question, answer)) for image, question, answer in asked], Mask(mask))


def run(tiny, model, features, rows, mask="image-prefix", items=None):
    """Return loss, logits and all gradients in one vector."""
    model.zero_grad(set_to_none=True)
    batch = tiny.layout(mask).collate(rows)
    output = model(features[[row.image_id for row in rows]], **batch, num_items_in_batch=items)
    output["loss"].backward()
    gradient = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])
    return output["loss"].item(), output["logits"].detach(), gradient


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("mask", SHARING)
def test_shared_rows_give_the_loss_and_gradients_of_one_row_per_question(tiny, model, features, mask):
    shared = rows(tiny, mask=mask)
    assert [len(row.questions) for row in shared] == [3, 2]
    alone = [Row(row.image_id, (tokens,)) for row in shared for tokens in row.questions]
    loss, logits, gradient = run(tiny, model, features, shared, mask)
    plain_loss, plain_logits, plain_gradient = run(tiny, model, features, alone, mask)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert relative(gradient, plain_gradient) < 1e-5
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_packing_gives_what_the_padded_grid_gives(tiny, model, features, mask):
    batch = tiny.layout(mask).collate(rows(tiny, mask=mask))
    images = features[[row.image_id for row in rows(tiny, mask=mask)]]
    allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
    with torch.no_grad():
        packed = model(images, **batch)["logits"]
        hidden = text_hidden(model, images, batch["input_ids"], batch["position_ids"], allowed)
        grid = text_logits(model, hidden)[batch["labels"] != -100]
    torch.testing.assert_close(packed, grid, rtol=1e-4, atol=1e-5)


def test_no_question_leaks_into_another(tiny, model, features):
    """Another question of the same length: not one bit of the others' logits moves."""
    changed = [*ASKED[:2], (0, "Is there a red?", "no"), *ASKED[3:]]
    lengths = [
        [len(tokens.prompt) for row in rows(tiny, asked) for tokens in row.questions] for asked in (ASKED, changed)
    ]
    assert lengths[0] == lengths[1], "the changed question must be of the same length"
    (_, before, _), (_, after, _) = (run(tiny, model, features, rows(tiny, asked)) for asked in (ASKED, changed))
    answers = [len(tokens.answer) for row in rows(tiny) for tokens in row.questions]
    own = slice(sum(answers[:2]), sum(answers[:3]))
    assert not torch.equal(before[own], after[own])
    others = torch.ones(len(before), dtype=torch.bool)
    others[own] = False
    assert torch.equal(before[others], after[others])


def test_the_order_of_questions_in_a_row_does_not_matter(tiny, model, features):
    loss, _, gradient = run(tiny, model, features, rows(tiny))
    other = rows(tiny, [*ASKED[2::-1], *ASKED[:2:-1]])
    other_loss, _, other_gradient = run(tiny, model, features, other)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert relative(gradient, other_gradient) < 1e-5


@pytest.mark.parametrize("mask", MASKS)
def test_the_layers_compute_real_tokens_only(tiny, model, features, mask):
    seen = []
    hook = model.model.language_model.layers[0].mlp.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape)
    )
    heads = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    batch = tiny.layout(mask).collate(rows(tiny, mask=mask))
    run(tiny, model, features, rows(tiny, mask=mask), mask)
    hook.remove(), heads.remove()
    tokens, supervised = (int((batch[name] != empty).sum()) for name, empty in (("segment_ids", -1), ("labels", -100)))
    assert tokens < batch["segment_ids"].numel(), "without padding there is nothing to see"
    assert seen == [(1, tokens, 32), (supervised, 32)]


def test_a_row_that_teaches_nothing_gives_no_gradient_but_takes_part(tiny, model, features):
    loss, _, gradient = run(tiny, model, features, [Row(1, ())], items=7)
    assert loss == 0 and not gradient.any()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "FSDP waits for every gradient"


@pytest.mark.parametrize("mask", MASKS)
def test_gradient_checkpointing_changes_nothing(tiny, model, features, mask):
    plain = run(tiny, model, features, rows(tiny, mask=mask), mask)
    model.gradient_checkpointing_enable()
    try:
        again = run(tiny, model, features, rows(tiny, mask=mask), mask)
    finally:
        model.gradient_checkpointing_disable()
    assert again[0] == plain[0]
    torch.testing.assert_close(again[2], plain[2])


def test_layers_that_are_recomputed_in_a_frame_see_the_same_dropout(tiny, features):
    """What FSDP2 trains with; equal to the bit."""
    found = []
    for framed in (False, True):
        model = tiny_base(tiny).train()
        set_dropout(model, 0.5)
        if framed:
            recompute_layers(model)
        torch.manual_seed(3)
        loss, _, gradient = run(tiny, model, features, rows(tiny))
        found.append((loss, gradient))
    (plain, gradient), (again, recomputed) = found
    assert again == plain and torch.equal(recomputed, gradient)


def with_adapters(tiny):
    model = tiny_base(tiny)
    add_adapters(model, LoraParams(rank=4, alpha=8.0, dropout=0.0, targets=PROJECTIONS))
    # peft's own begin with zeros, which hide half of the gradients.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def gemma(tiny):
    config = copy.deepcopy(tiny.training.config).to_dict()
    config["text_config"] = {**config["text_config"], "model_type": "gemma"}
    model = VlmForTraining._from_config(PaliGemmaConfig.from_dict(config), attn_implementation="eager")
    set_attention(model, Attention.EAGER)
    return model.train()


def checkpointed(tiny):
    model = tiny_base(tiny)
    model.gradient_checkpointing_enable()
    return model.train()


def one_layer(tiny):
    language = dataclasses.replace(tiny.language, config=dataclasses.replace(tiny.language.config, num_hidden_layers=1))
    return initial_model(language, tiny.encoder_config, tiny.processor, seed=2)


@pytest.mark.parametrize("build", [tiny_base, checkpointed, with_adapters, gemma, one_layer])
@pytest.mark.parametrize("mask", MASKS)
def test_the_last_layer_at_supervised_positions_gives_the_whole_ones_loss_and_gradients(tiny, features, mask, build):
    model, seen = build(tiny), []
    model.model.language_model.layers[-1].mlp.register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0][0]))
    )
    loss, logits, gradient = run(tiny, model, features, rows(tiny, mask=mask), mask)
    model.narrow_last_layer = False
    whole_loss, whole_logits, whole_gradient = run(tiny, model, features, rows(tiny, mask=mask), mask)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert relative(gradient, whole_gradient) < 1e-6
    torch.testing.assert_close(logits, whole_logits)
    assert set(seen[: len(seen) // 2]) == {len(logits)} and min(seen[len(seen) // 2 :]) > 5 * len(logits) / 2


@pytest.mark.parametrize("mask", MASKS)
def test_recomputed_scores_change_nothing(tiny, features, mask):
    """With dropout: what is dropped is dropped again."""
    plain, again, results = tiny_base(tiny), tiny_base(tiny), []
    recompute_scores(again)
    for model in (plain, again):
        set_dropout(model, 0.2)
        torch.manual_seed(3)
        results.append(run(tiny, model, features, rows(tiny, mask=mask), mask))
    assert results[0][0] == results[1][0] and torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("mask", MASKS)
def test_flex_attention_equals_eager(tiny, model, features, mask):
    """Forward only: torch has no backward of flex attention on CPUs; and what it compiles there for a second shape does not
    build (torch 2.14.1), so it runs as torch defines it."""
    model.eval()
    batch = tiny.layout(mask).collate(rows(tiny, mask=mask))
    images = features[[row.image_id for row in rows(tiny, mask=mask)]]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        eager = model(images, **batch)["logits"]
        set_attention(model, Attention.FLEX)
        flex = model(images, **batch)["logits"]
        nothing = model(images[:1], **tiny.layout(mask).collate([Row(1, ())]))
    torch.testing.assert_close(flex, eager, rtol=1e-4, atol=1e-5)
    assert not torch.equal(flex, eager), "the same bits: flex attention did not run"
    assert len(nothing["logits"]) == 0
