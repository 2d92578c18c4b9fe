"""Whoever opens an export in plain transformers computes the trained function, and a wrong mask is seen by its logits."""

import numpy as np
import pytest
from PIL import Image

from proofs.consumers import CARD, EXACT, OTHER_MASK, STOCK, Consumer, claim, compare, consume, ours
from tests.tiny_model import write_trained
from vlm_vqa.inference.export import read_training, write_export
from vlm_vqa.inference.processor import export_processor
from vlm_vqa.params import Dtype, Mask

QUESTIONS = ("What color is the shape?", "Is there a dog?", "How many red dogs are there on the circle?")
RESULTS, DATA = {"kept_step": 1, "kept_because": "the last step"}, {"source": "drawn", "notes": [], "splits": {}}


@pytest.fixture
def exported(tiny, tmp_path):
    """Return a function that exports with a mask: the folder, and three questions about pictures of their own."""

    def make(mask):
        folder, encoder, params = write_trained(tiny, tmp_path / "trained", mask)
        write_export(tmp_path / "export", folder, encoder, params, read_training(folder), RESULTS, DATA)
        cases = [(tmp_path / f"{number}.png", question) for number, question in enumerate(QUESTIONS)]
        for number, (path, _) in enumerate(cases):
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 30, 3), np.uint8)).save(path)
        return tmp_path / "export", cases

    return make


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "prefix-lm"])
def test_every_stock_consumer_computes_the_trained_function(exported, mask):
    """In one process, for it takes seconds to start; the proof has one for each."""
    folder, cases = exported(mask)
    consumers = [one for one in STOCK if one.dtype is Dtype.FLOAT32]
    answers, shown = consume(Consumer("all", "\n".join(str(one.use) for one in consumers)), folder, cases)
    expected, right = ours(folder, cases)
    assert len(set(expected)) > 1, "all answers alike: the test would see nothing"
    for at, consumer in enumerate(consumers):
        rows = slice(3 * at, 3 * at + 3)
        assert (shown["logits"][rows] - right["logits"]).abs().max() < consumer.tolerance, consumer.name
        assert consumer.tolerance > EXACT or answers[rows] == expected, consumer.name


@pytest.mark.slow
def test_a_wrong_mask_is_seen_by_the_logits(tiny, exported):
    folder, cases = exported("causal")
    right, plain = ours(folder, cases), next(one for one in STOCK if one.name == "chat template")
    # The stock processor that marks the prompt as one block, as every PaliGemma comes with.
    processor = export_processor(tiny.processor, Mask.PREFIX_LM, tiny.layout("causal").instruction, tiny.encoder_config)
    processor.save_pretrained(folder)
    for broken in (plain, *CARD):
        found = compare(broken, folder, cases, right)
        assert found.difference is not None and found.difference > 100 * EXACT
        assert claim("causal", broken, found, len(cases)).met is False
        assert claim("causal", OTHER_MASK, found, len(cases)).met
