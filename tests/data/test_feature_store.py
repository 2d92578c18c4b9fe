"""The feature store: what is written comes back, and everything that is not what a run expects is refused by name."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_vqa.data.feature_store import FeatureStore, FeatureStoreWriter
from vlm_vqa.errors import UserError

T, D = 5, 8
IDS = [3, 7, 8, 20, 21, 400_000, 581_929]
MADE_BY = {"encoder_hash": "e" * 64, "data_hash": "d" * 64, "compute_dtype": "float32"}
EXPECTED = {**MADE_BY, "dtype": "float32", "num_tokens": T, "width": D}


def features_of(count: int = len(IDS), seed: int = 0) -> torch.Tensor:
    return torch.randn(count, T, D, generator=torch.Generator().manual_seed(seed))


def writer(folder, images=7, dtype=torch.float32):
    made_by = {**MADE_BY, "processor": {"resample": 3}}
    # Three images a shard: the seven make three shards, the last of them short.
    shard_bytes = 3 * T * D * dtype.itemsize
    return FeatureStoreWriter(
        folder, images=images, num_tokens=T, width=D, dtype=dtype, made_by=made_by, shard_bytes=shard_bytes
    )


def write(folder, dtype=torch.float32):
    features = features_of()
    with writer(folder, dtype=dtype) as store:
        store.add(IDS[:4], features[:4])
        store.add(IDS[4:], features[4:])
    return features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_comes_back_by_id(tmp_path, dtype):
    features = write(tmp_path, dtype).to(dtype)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    store = FeatureStore.open(tmp_path)
    assert (len(store), store.num_tokens, store.width, store.dtype) == (7, T, D, dtype)
    assert 20 in store and 22 not in store
    for image_id, wanted in zip(IDS, features, strict=True):
        assert torch.equal(store[image_id], wanted)
    order = [6, 0, 3, 3, 5]
    batch = store.batch([IDS[i] for i in order])
    assert batch.dtype is dtype and torch.equal(batch, features[order])
    batch.zero_()
    assert torch.equal(store[IDS[3]], features[3]), "a batch is a copy"


def test_bytes_are_a_function_of_the_features(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write(folder)
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["features-00000-of-00003.safetensors", "features-00001-of-00003.safetensors",
                     "features-00002-of-00003.safetensors", "manifest.json"]  # fmt: skip
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_pickled_store_maps_the_files_again(tmp_path):
    features = write(tmp_path)
    sent = pickle.dumps(FeatureStore.open(tmp_path, EXPECTED))
    assert len(sent) < 2000, "the features themselves do not travel"
    assert torch.equal(pickle.loads(sent)[21], features[4])


@pytest.mark.parametrize("key", sorted(EXPECTED))
def test_a_store_of_something_else_is_refused_by_name(tmp_path, key):
    write(tmp_path)
    FeatureStore.open(tmp_path, EXPECTED)
    other = {"num_tokens": 257, "width": 768, "dtype": "bfloat16", "compute_dtype": "bfloat16"}.get(key, "f" * 64)
    with pytest.raises(UserError, match=f"differs: {key} is .*, expected {other!r}.*dvc repro extract-features"):
        FeatureStore.open(tmp_path, {**EXPECTED, key: other})
    with pytest.raises(ValueError, match="cannot expect"):
        FeatureStore.open(tmp_path, {"colour": 1})


def test_an_unknown_image_is_named(tmp_path):
    write(tmp_path)
    store = FeatureStore.open(tmp_path)
    with pytest.raises(UserError, match="no features of image 4"):
        store.batch([3, 4])


def test_an_image_that_comes_twice_is_named(tmp_path):
    with pytest.raises(UserError, match="image 7 comes twice"), writer(tmp_path) as store:
        store.add([3, 7], features_of(2))
        store.add([8, 7], features_of(2))
    with pytest.raises(UserError, match="missing or unfinished"):
        FeatureStore.open(tmp_path)


def test_too_few_images_make_no_store(tmp_path):
    with pytest.raises(UserError, match="6 images came where the records count 7"), writer(tmp_path) as store:
        store.add(IDS[:6], features_of(6))
    with pytest.raises(UserError, match="missing or unfinished"):
        FeatureStore.open(tmp_path)


def test_an_interrupted_run_leaves_no_store_not_even_the_old_one(tmp_path):
    write(tmp_path)
    with pytest.raises(KeyboardInterrupt), writer(tmp_path) as store:
        store.add(IDS[:4], features_of(4))
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="missing or unfinished"):
        FeatureStore.open(tmp_path)
    write(tmp_path)
    assert len(FeatureStore.open(tmp_path)) == 7


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_features_that_do_not_fit_the_dtype_are_named(tmp_path, value):
    features = features_of(2)
    features[1, 2, 3] = value
    with pytest.raises(UserError, match="image 7: .*not finite as float16.*vision.store_dtype"):
        writer(tmp_path, dtype=torch.float16).add([3, 7], features)


def test_a_cut_shard_is_refused_before_it_is_mapped(tmp_path):
    write(tmp_path)
    shard = tmp_path / "features-00001-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40])
    with pytest.raises(UserError, match="features-00001-of-00003.safetensors: has .* bytes where"):
        FeatureStore.open(tmp_path)
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(UserError, match="features-00001-of-00003.safetensors: cannot be read"):
        FeatureStore.open(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="features-00001-of-00003.safetensors: cannot be read"):
        FeatureStore.open(tmp_path)


def test_a_shard_with_another_ones_images_is_refused(tmp_path):
    write(tmp_path)
    shard = tmp_path / "features-00001-of-00003.safetensors"
    tensors = load_file(shard)
    tensors = {"features": tensors["features"].clone(), "image_ids": torch.tensor([20, 3, 400_000])}
    save_file(tensors, shard)
    with pytest.raises(UserError, match="00001-of-00003.safetensors: image 3 is in the store twice"):
        FeatureStore.open(tmp_path)
    save_file({**tensors, "features": tensors["features"].reshape(3, D, T)}, shard)
    with pytest.raises(UserError, match="00001-of-00003.safetensors: its tensors are not those"):
        FeatureStore.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a manifest of features"), ("[]", "not a manifest of features"), ('{"schema_version": 0}', "version 0")],
)
def test_a_damaged_manifest_is_refused(tmp_path, text, message):
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=f"manifest.json: .*{message}"):
        FeatureStore.open(tmp_path)


def test_manifest_says_what_made_the_store(tmp_path):
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["processor"] == {"resample": 3}
    assert {key: manifest[key] for key in EXPECTED} == EXPECTED
    assert [shard["images"] for shard in manifest["shards"]] == [3, 3, 1] and manifest["images"] == 7


def test_features_are_mapped_not_read(tmp_path):
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux lists a process's maps")
    write(tmp_path)
    store = FeatureStore.open(tmp_path)
    maps = Path("/proc/self/maps").read_text()
    assert all(str(path) in maps for path in tmp_path.glob("*.safetensors")) and len(store) == 7
