"""Features that are not stored: the same as stored ones would be, by whichever stage and worker they are made."""

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Gemma2Config, PaliGemmaConfig

from tests.stages.test_extract_features import noise, run_folder, set_vision, write_records  # noqa: F401 - a fixture
from vlm_vqa.data.feature_store import FeatureStore, read_manifest
from vlm_vqa.errors import UserError
from vlm_vqa.features.live import LiveFeatures, how_live, open_features
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.flops import Work, model_cost, vision_flops
from vlm_vqa.model.layout import Row
from vlm_vqa.model.vlm import initial_model
from vlm_vqa.params import load_params
from vlm_vqa.training.dataset import Collator

FEATURES, RECORDS = Path("data/features"), Path("data/records")


@pytest.fixture
def both(run_folder, request):  # noqa: F811
    """(stored features, live ones) of 11 pictures, of the encoder of this package, and its parameters of the second."""
    import stages.extract_features as stage

    write_records(noise(11))
    set_vision(run_folder, store_dtype=getattr(request, "param", "float32"))
    stage.main()
    stored = FeatureStore(FEATURES)
    # Mapped files stay when their names go.
    set_vision(run_folder, store=False)
    stage.main()
    params = load_params("params.yaml")
    encoder = load_encoder(params.vision, "cpu")
    expected = {"encoder_hash": encoder.hash, "data_hash": "d" * 64, "live": how_live(params)}
    return stored, open_features(FEATURES, expected, RECORDS, encoder), params, encoder


@pytest.mark.parametrize("both", ["float32", "bfloat16"], indirect=True)
def test_they_are_what_would_be_stored(both):
    stored, live, _, _ = both
    assert isinstance(live, LiveFeatures) and live.live and not stored.live
    assert [path.name for path in FEATURES.iterdir()] == ["manifest.json"]
    assert (live.num_tokens, live.width, live.dtype) == (stored.num_tokens, stored.width, stored.dtype)
    # In other batches than the stage's, by twos and repeatedly: as near as the order of sums lets them be.
    ids = [91, 1, 31, 31, 101, 11, 1]
    found, wanted = live.batch(ids), stored.batch(ids)
    assert found.dtype is wanted.dtype and found.shape == wanted.shape
    off = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    assert off < (1e-6 if live.dtype is torch.float32 else 4e-3)
    assert not torch.equal(found[0], found[1])


def test_more_pictures_than_vision_batch_size_are_looked_at_in_turns(both, monkeypatch):
    _, live, params, encoder = both
    seen, encode = [], type(encoder).encode_pixels
    monkeypatch.setattr(type(encoder), "encode_pixels", lambda self, p: seen.append(len(p)) or encode(self, p))
    assert len(live.batch([1, 11, 21, 31, 41, 51])) == 6
    assert seen == [params.vision.batch_size, 6 - params.vision.batch_size] == [4, 2]


def test_workers_decode_and_gradients_are_those_of_stored_features(both, tiny):
    """Loss and gradients of a step, pictures decoded by two worker processes, within 1e-6 of those of stored features."""
    stored, live, _, encoder = both
    layout = copy.copy(tiny.layout("image-prefix"))
    layout.num_patches = live.num_tokens
    model = initial_model(tiny.language, encoder.model.config, tiny.processor, seed=1)
    rows = [Row(image, (layout.tokenize("Is it?", "yes"), layout.tokenize("Is it?", "no"))) for image in (91, 1, 31)]

    def step(features, workers):
        collator = Collator(layout, features)
        (batch,) = DataLoader(rows, batch_size=3, num_workers=workers, collate_fn=collator)
        model.zero_grad()
        loss = model(**collator.ready(batch))["loss"]
        loss.backward()
        return loss.item(), torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    (loss, gradients), (other, others) = step(stored, 0), step(live, 2)
    assert other == pytest.approx(loss, rel=1e-6)
    assert (others - gradients).norm() / gradients.norm() < 1e-6
    assert gradients.norm() > 0.1


def test_what_the_tower_computes_counts(both):
    _, live, _, encoder = both
    text = Gemma2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = PaliGemmaConfig(text_config=text.to_dict(), vision_config=encoder.model.config.to_dict())
    without = model_cost(config, frozen_embeddings=False)
    counted = model_cost(config, frozen_embeddings=False, live_tokens=live.num_tokens)
    image = Work(tokens=0, image_tokens=live.num_tokens, supervised=0, pairs=0, supervised_pairs=0)
    assert counted.flops(image) - without.flops(image) == pytest.approx(
        vision_flops(encoder.model.config, live.num_tokens), rel=1e-3
    )


def test_a_stage_that_was_not_run_again_is_named(both, run_folder):  # noqa: F811
    _, live, params, encoder = both
    set_vision(run_folder, batch_size=5, store=False)
    changed = {"live": how_live(load_params("params.yaml"))}
    for expected in ({"live": None}, changed):
        with pytest.raises(UserError, match="vision.store.*dvc repro extract-features"):
            open_features(FEATURES, expected, RECORDS, encoder)
    with pytest.raises(UserError, match="no image 2 of the questions"):
        live.batch([2])
    assert read_manifest(FEATURES, {"live": how_live(params)})["shards"] == []


def test_a_stage_that_stores_again_replaces_the_manifest(both, run_folder):  # noqa: F811
    import stages.extract_features as stage

    stored, *_ = both
    set_vision(run_folder, store=True)
    stage.main()
    assert torch.equal(FeatureStore(FEATURES, {"live": None}).batch([1, 31]), stored.batch([1, 31]))
