"""The extraction benchmark: it runs through, counts the FLOPs that torch counts, and notices features that differ."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from benchmarks import extraction, measure
from vlm_vqa.model.flops import vision_flops

TINY = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)


@pytest.fixture
def written(monkeypatch):
    """What a tiny run writes, by name; bfloat16 counts as slow."""
    found = {}
    monkeypatch.setattr(measure, "write", lambda name, claims, details, data: found.update({name: (claims, details)}))
    monkeypatch.setattr(extraction, "DINOV2_BASE", TINY)
    monkeypatch.setattr(extraction, "probe_rates", lambda: {torch.float32: 2.0, torch.bfloat16: 1.0})
    return found


def test_a_tiny_run_goes_through(shared_data, written):
    extraction.main(["--images", "4", "--batch-size", "2", "--rounds", "1"])
    claims, details = written["extraction"]
    assert [(claim.target, claim.ratio > 0) for claim in claims] == [(0.6, True), (None, True)]
    assert details["photographs"].startswith("9 different ones of 640 px")
    assert set(details["float32"]["images_per_second"]) == {"in turn", "ahead", "products"}
    assert "slower than float32" in details["bfloat16"]


def test_flops_are_those_that_torch_counts():
    model = Dinov2Model(TINY).eval()
    # torch counts the fused attention of CPUs as nothing.
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(torch.zeros(3, 3, 224, 224))
    run = extraction.products(TINY, 257, 3, torch.float32)
    with FlopCounterMode(display=False) as products:
        run()
    expected = 3 * vision_flops(TINY, 257)
    assert forward.get_total_flops() == products.get_total_flops() == expected


def test_different_features_are_noticed(shared_data, monkeypatch):
    encoder = extraction.build_encoder(TINY, torch.float32)
    images = extraction.repeated(extraction.read_photographs(), 2)
    extraction.check_equal(encoder, images, 2)
    swapped = [images[0], images[1]._replace(data=images[0].data)]
    in_turn = extraction.in_turn
    monkeypatch.setattr(extraction, "in_turn", lambda encoder, _, *rest: in_turn(encoder, swapped, *rest))
    with pytest.raises(AssertionError, match="changed the features"):
        extraction.check_equal(encoder, images, 2)
