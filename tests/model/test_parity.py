"""Our forward against Hugging Face's PaliGemma on the same weights: both masks, padded and not, cached and not."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_vqa.inference.generation import DEPARTURES, generate, likeliest
from vlm_vqa.model.layout import IGNORED, QuestionTokens, Row, visible
from vlm_vqa.model.vlm import text_hidden, text_logits
from vlm_vqa.params import Mask

MASKS = [mask.value for mask in Mask]
QUESTIONS = ["What color is the shape?", "Is there a dog?", "How many red dogs are there on the circle?"]
ANSWERS = ["red", "yes", "twelve"]


def pictures(count):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (40, 30, 3), dtype=np.uint8)) for _ in range(count)]


def stock_inputs(tiny, mask, questions, answers=None):
    """What a user of the stock classes would pass, padded on the right as for training."""
    layout = tiny.layout(mask)
    text = ["<image>" + f"{layout.instruction}\n{question}" for question in questions]
    tiny.processor.tokenizer.padding_side = "right" if answers else "left"
    inputs = tiny.processor(
        images=pictures(len(questions)), text=text, suffix=answers, return_tensors="pt", padding=True
    )
    if mask == "image-prefix":
        inputs["token_type_ids"] = (inputs["input_ids"] != tiny.processor.image_token_id).long()
    elif mask == "causal":
        del inputs["token_type_ids"]
    return inputs


def features(tiny, pixels):
    with torch.no_grad():
        return tiny.stock.model.vision_tower(pixels).last_hidden_state


def our_logits(tiny, mask, questions, answers, image_features):
    layout = tiny.layout(mask)
    rows = [Row(0, (layout.tokenize(q, a),)) for q, a in zip(questions, answers, strict=True)]
    batch = layout.collate(rows)
    allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
    with torch.no_grad():
        hidden = text_hidden(tiny.training, image_features, batch["input_ids"], batch["position_ids"], allowed)
        return batch, text_logits(tiny.training, hidden)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("count", [1, 3], ids=["unpadded", "padded"])
def test_logits_equal_the_stock_class(tiny, mask, count):
    tiny.training.eval()
    inputs = stock_inputs(tiny, mask, QUESTIONS[:count], ANSWERS[:count])
    labels = inputs.pop("labels")
    with torch.no_grad():
        stock = tiny.stock(**inputs).logits
    batch, ours = our_logits(tiny, mask, QUESTIONS[:count], ANSWERS[:count], features(tiny, inputs["pixel_values"]))
    # Ours does not read the final <eos>; every other token is the same.
    for row in range(count):
        length = int((batch["segment_ids"][row] >= 0).sum())
        assert torch.equal(batch["input_ids"][row, :length], inputs["input_ids"][row, :length])
        torch.testing.assert_close(ours[row, :length], stock[row, :length], rtol=1e-4, atol=1e-5)
        supervised = batch["labels"][row, :length] != IGNORED
        expected = labels[row, 1 : length + 1] if mask == "prefix-lm" else batch["labels"][row, :length]
        assert torch.equal(batch["labels"][row, :length][supervised], expected[supervised])


def test_the_masks_differ(tiny):
    """Otherwise the parity tests could not tell one mask from another."""
    pixels = stock_inputs(tiny, "prefix-lm", QUESTIONS[:1])["pixel_values"]
    logits = [our_logits(tiny, mask, QUESTIONS[:1], ANSWERS[:1], features(tiny, pixels))[1] for mask in MASKS]
    for one, other in itertools.combinations(logits, 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_generation_equals_the_stock_class(tiny, mask, use_cache):
    inputs = stock_inputs(tiny, mask, QUESTIONS)
    inputs.pop("labels")
    stock = tiny.stock.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache)
    layout = tiny.layout(mask)
    ours = generate(
        tiny.stock, layout, features(tiny, inputs["pixel_values"]), [layout.tokenize(q) for q in QUESTIONS], range(3), 6
    )
    for row, answer in enumerate(ours):
        continued = stock[row, inputs["input_ids"].shape[1] :].tolist()
        assert answer.tokens == continued[: len(answer.tokens)]
        assert len(answer.tokens) == 6 or answer.tokens[-1] == layout.eos_id
    assert len({tuple(answer.tokens) for answer in ours}) > 1, "all answers alike: the test would see nothing"


@pytest.mark.parametrize("mask", MASKS)
def test_a_batch_answers_as_one_by_one(tiny, mask):
    """Also where questions share an image: two stand together, one comes back to it later."""
    layout = tiny.layout(mask)
    image_features = torch.randn(2, tiny.num_patches, 24, generator=torch.Generator().manual_seed(0))
    tokens = [layout.tokenize(question) for question in [*QUESTIONS, QUESTIONS[0]]]
    images = [1, 1, 0, 1]
    together = generate(tiny.stock, layout, image_features, tokens, images, 6)
    alone = [
        generate(tiny.stock, layout, image_features[i : i + 1], [t], [0], 6)[0]
        for i, t in zip(images, tokens, strict=True)
    ]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    logs = [[answer.log_probability for answer in answers] for answers in (together, alone)]
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)
    assert together[0].tokens == together[3].tokens and len({tuple(answer.tokens) for answer in together}) > 1


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("most", [1, 2, 6])
def test_answers_are_as_likely_as_reading_them_says(tiny, mask, most):
    """The greedy answer and the likeliest departures from it, each scored by one pass over prompt and answer."""
    layout, images = tiny.layout(mask), [0, 0, 1]
    image_features = torch.randn(2, tiny.num_patches, 24, generator=torch.Generator().manual_seed(0))
    tokens = [layout.tokenize(question) for question in QUESTIONS]
    # Scaled, for a model of random weights finds everything alike.
    arguments = (tiny.stock, layout, 3 * image_features, tokens, images, most)

    def reading(question, image, answer):
        """Log-probabilities [len(answer) + 1, V] of what stands at each place of an answer, and after it."""
        batch = layout.collate([Row(0, (QuestionTokens(question.prompt, [*answer, layout.eos_id]),))])
        allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
        asked = (batch["input_ids"], batch["position_ids"], allowed)
        with torch.no_grad():
            hidden = text_hidden(tiny.stock, 3 * image_features[[image]], *asked)
            return text_logits(tiny.stock, hidden)[0, -len(answer) - 1 :].log_softmax(dim=-1)

    found, greedy = likeliest(*arguments), generate(*arguments)
    for question, image, answer, (first, *others) in zip(tokens, images, greedy, found, strict=True):
        assert first.tokens == answer.tokens and len(others) == DEPARTURES
        assert first.log_probability == pytest.approx(answer.log_probability, abs=1e-5)
        for one in (first, *others):
            logs = reading(question, image, one.tokens)[range(len(one.tokens)), one.tokens]
            assert one.log_probability == pytest.approx(logs.sum().item(), abs=1e-4)
            assert len(one.tokens) <= most and layout.eos_id not in one.tokens[:-1]
        logs = reading(question, image, first.tokens)
        beginnings = {}
        for place, token in enumerate(first.tokens):
            so_far = logs[range(place), first.tokens[:place]].sum()
            for other in set(range(logs.shape[1])) - {token}:
                beginnings[*first.tokens[:place], other] = (so_far + logs[place, other]).item()
        expected = sorted(beginnings, key=beginnings.get)[-DEPARTURES:]
        assert {next(b for b in expected if tuple(one.tokens[: len(b)]) == b) for one in others} == set(expected)
        for one in others:
            (start,) = [b for b in expected if tuple(one.tokens[: len(b)]) == b]
            rest = reading(question, image, one.tokens).argmax(dim=-1).tolist()
            assert one.tokens[len(start) :] == rest[len(start) : len(one.tokens)], "greedy from there on"
            assert one.tokens[-1] == layout.eos_id or len(one.tokens) == most
        assert sorted(others, key=lambda one: -one.log_probability) == others
