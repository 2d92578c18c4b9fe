"""The benchmark of stored features: it runs through, and its error is the one that the format promises."""

import pytest
import torch

from benchmarks import features, measure
from vlm_vqa.data.feature_store import FeatureStore, Layout
from vlm_vqa.params import StoreDtype


def test_a_tiny_run_goes_through(shared_data, monkeypatch):
    written = {}
    monkeypatch.setattr(measure, "write", lambda name, claims, details, data: written.update({name: (claims, details)}))
    features.main(["--images", "8", "--rounds", "1"])
    claims, details = written["features"]
    assert [claim.target for claim in claims] == [0.5, 0.5, None, 0.503, 0.01]
    assert 0.5 < claims[3].ratio and claims[4].met
    assert set(details["images_per_second"]) == {
        "bfloat16 sequential", "bfloat16 random", "int8 sequential", "int8 random", "int8 float32",
    }  # fmt: skip


def test_the_plain_way_to_float32_is_the_stores(tmp_path):
    layout = Layout(1, features.TOKENS, features.WIDTH, StoreDtype.INT8)
    features.write(tmp_path / "features", layout)
    values = torch.randint(-127, 128, (features.TOKENS, features.WIDTH), dtype=torch.int8)
    plain = features.as_float32(bytearray(values.numpy().tobytes()))
    stored = FeatureStore(tmp_path / "features")[0].numpy()
    assert (plain == values.numpy()).all() and (plain.dtype, plain.shape) == (stored.dtype, stored.shape)


def test_errors_are_those_of_tokens():
    # Halfway between two int8 of a scale of 1: the first token is off by 0.5 in each of 3 values, the second is exact.
    tokens = torch.tensor([[[127.0, 2.5, 4.5, 6.5], [127.0, 1.0, 2.0, 3.0]]])
    found = features.compare_errors(tokens)["int8"]
    assert found["max"] == pytest.approx((3 * 0.25) ** 0.5 / tokens[0, 0].norm().item())
    assert found["median"] == 0.0
