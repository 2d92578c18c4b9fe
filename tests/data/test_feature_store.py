"""The feature store: what is written comes back, and everything that is not what a run expects is refused by name."""

import collections
import dataclasses
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_vqa.data.feature_store import FeatureStore, Layout
from vlm_vqa.errors import UserError
from vlm_vqa.features.writer import FeatureStoreWriter, Shard
from vlm_vqa.params import StoreDtype
from vlm_vqa.sealed import SWITCH, read_sealed, write_sealed

T, D = 5, 8
IDS = [3, 7, 8, 20, 21, 400_000, 581_929]
MADE_BY = {"encoder_hash": "e" * 64, "data_hash": "d" * 64, "compute_dtype": "float32"}
EXPECTED = {**MADE_BY, "dtype": "float32", "num_tokens": T, "width": D}
FLOATS = [StoreDtype.FLOAT32, StoreDtype.BFLOAT16, StoreDtype.FLOAT16]
NAMES = [f"features-0000{number}-of-00003.safetensors" for number in range(3)]


def features_of(count: int = len(IDS), seed: int = 0) -> torch.Tensor:
    return torch.randn(count, T, D, generator=torch.Generator().manual_seed(seed))


def layout(dtype=StoreDtype.FLOAT32):
    """Three images a shard: the seven make three shards, the last of them short."""
    one = Layout(7, T, D, dtype)
    return dataclasses.replace(one, shard_bytes=3 * one.image_bytes)


def writer(folder, dtype=StoreDtype.FLOAT32, **computed_by):
    return FeatureStoreWriter(folder, layout(dtype), {**MADE_BY, "processor": {"resample": 3}}, computed_by)


def shard(number, features, dtype=StoreDtype.FLOAT32):
    made, places = Shard(layout(dtype), number), layout(dtype).places(number)
    for place in places:
        made.add([IDS[place]], features[place : place + 1])
    return made


def write(folder, dtype=StoreDtype.FLOAT32):
    features = features_of()
    store = writer(folder, dtype)
    for number in store.begin():
        store.write(shard(number, features, dtype))
    store.publish()
    return features


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "features"


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_was_written_comes_back_by_id(folder, dtype):
    features = write(folder, dtype).to(getattr(torch, dtype.value))
    assert sorted(path.name for path in folder.glob("*.safetensors")) == NAMES
    store = FeatureStore(folder)
    assert (len(store), store.num_tokens, store.width, store.dtype) == (7, T, D, features.dtype)
    assert 20 in store and 22 not in store
    for image_id, wanted in zip(IDS, features, strict=True):
        assert torch.equal(store[image_id], wanted)
    order = [6, 0, 3, 3, 5]
    batch = store.batch([IDS[i] for i in order])
    assert batch.dtype is features.dtype and torch.equal(batch, features[order])
    batch.zero_()
    assert torch.equal(store[IDS[3]], features[3]), "a batch is a copy"


def test_int8_is_off_by_half_a_scale_at_most(folder):
    features = features_of()
    features[1, 2] = 0.0
    features[2] *= 1e-4
    features[3, 0, 0] = 5000.0
    store = writer(folder, StoreDtype.INT8)
    for number in store.begin():
        store.write(shard(number, features, StoreDtype.INT8))
    store.publish()
    store = FeatureStore(folder, {"dtype": "int8"})
    found = store.batch(IDS)
    assert store.dtype is found.dtype is torch.float32
    largest = features.abs().amax(-1, keepdim=True)
    # A token of its own scale each: the outlier of one token costs no other one anything.
    assert ((found - features).abs() <= largest / 254 * 1.0001).all()
    assert torch.equal(found[1, 2], torch.zeros(D))
    torch.testing.assert_close(found.abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=0)
    stored = load_file(folder / NAMES[0])
    assert stored["features"].dtype is torch.int8 and stored["scales"].dtype is torch.float32
    assert stored["features"].min() == -127, "symmetric: -128 is not used"
    assert torch.equal(found[:3], stored["features"] * stored["scales"][..., None])
    assert torch.equal(store[20], found[3])


@pytest.mark.parametrize("dtype", list(StoreDtype))
def test_disk_is_predicted_closely_and_never_too_low(folder, dtype):
    write(folder, dtype)
    for number, name in enumerate(NAMES):
        predicted, taken = layout(dtype).disk_bytes(number), (folder / name).stat().st_size
        assert taken <= predicted <= taken + 512
    base = {"images": 1, "num_tokens": 257, "width": 768}
    half = Layout(**base, dtype=StoreDtype.INT8).image_bytes / Layout(**base, dtype=StoreDtype.BFLOAT16).image_bytes
    assert 0.5 < half < 0.503


@pytest.mark.parametrize("dtype", list(StoreDtype))
def test_bytes_are_a_function_of_the_features(tmp_path, dtype):
    folders = [tmp_path / "one", tmp_path / "two"]
    features = write(folders[0], dtype)
    # Two processes, the later shards first, and one shard in batches.
    first, second = writer(folders[1], dtype), writer(folders[1], dtype)
    assert first.begin() == [0, 1, 2]
    second.write(shard(2, features, dtype))
    first.write(shard(1, features, dtype))
    together = Shard(layout(dtype), 0)
    together.add(IDS[:3], features[:3])
    second.write(together)
    first.publish()
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == [*NAMES, "manifest.json"]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def begun(folder):
    """A run that was killed after two of three shards, while it wrote the third."""
    features, store = features_of(), writer(folder, batch_size=4)
    store.begin()
    for number in (0, 2):
        store.write(shard(number, features))
    (parts,) = (path for path in folder.with_name("features.parts").iterdir() if path.is_dir())
    (parts / f"{NAMES[1]}.part").write_bytes(b"torn")
    store._lock_file.close()
    return features, parts


def test_a_killed_run_goes_on_with_the_missing_shard(folder, caplog):
    features, parts = begun(folder)
    with pytest.raises(UserError, match="manifest.json: cannot be read"):
        FeatureStore(folder)
    # What DVC does before it runs the stage again.
    shutil.rmtree(folder)
    caplog.set_level(logging.INFO)
    store = writer(folder, batch_size=4)
    assert store.begin() == [1] and "going on after 2 of 3 shards" in caplog.text
    assert not list(parts.glob("*.part"))
    store.write(shard(1, features))
    store.publish()
    assert torch.equal(FeatureStore(folder).batch(IDS), features)
    assert not parts.parent.exists()


@pytest.mark.parametrize("end", ["a bit", "cut", "no seal", "half a seal"])
def test_a_torn_shard_is_made_again(folder, caplog, end):
    _, parts = begun(folder)
    part = parts / NAMES[2]
    whole, seal = part.read_bytes(), part.with_suffix(".json")
    if end == "a bit":
        part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif end == "cut":
        part.write_bytes(whole[:-40])
    elif end == "no seal":
        seal.unlink()
    else:
        seal.write_text(seal.read_text()[:20])
    caplog.set_level(logging.INFO)
    assert writer(folder, batch_size=4).begin() == [1, 2]
    assert f"{NAMES[2]}: not whole" in caplog.text and not part.exists()


def test_shards_of_another_run_are_removed_with_a_word(folder, caplog):
    _, parts = begun(folder)
    caplog.set_level(logging.INFO)
    assert writer(folder, batch_size=8).begin() == [0, 1, 2]
    assert not parts.exists() and str(parts) in caplog.text


def test_a_second_run_at_the_same_time_is_refused(folder):
    first = writer(folder)
    first.begin()
    with pytest.raises(UserError, match="another extract-features is writing there"):
        writer(folder).begin()


def test_too_little_room_is_said_before_the_start(folder, monkeypatch):
    _, parts = begun(folder)
    usage = collections.namedtuple("usage", "total used free")
    needed = layout().disk_bytes(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, needed))
    store = writer(folder, batch_size=4)
    assert store.begin() == [1], "what is there already takes no more"
    store._lock_file.close()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, needed - 1))
    with pytest.raises(UserError, match=r"features.parts.*0.0 MiB more are needed.*int8.*dvc repro"):
        writer(folder, batch_size=4).begin()


def test_the_store_takes_no_second_copy_and_nothing_is_written_through_links(folder, tmp_path):
    """As DVC leaves outputs: links into its cache. A rerun replaces the links."""
    features, _ = begun(folder)
    store = writer(folder, batch_size=4)
    for number in store.begin():
        store.write(shard(number, features))
    part = store._parts / NAMES[0]
    before = part.stat().st_ino
    store.publish()
    assert (folder / NAMES[0]).stat().st_ino == before, "a second name, not a copy"
    cache = tmp_path / "cache"
    cache.mkdir()
    kept = {}
    for number, path in enumerate(sorted(folder.iterdir())):
        kept[path.name] = path.read_bytes()
        if number % 2:
            os.link(path, cache / path.name)
        else:
            path.rename(cache / path.name)
            path.symlink_to(cache / path.name)
        (cache / path.name).chmod(0o444)
    assert torch.equal(FeatureStore(folder).batch(IDS), features)
    write(folder, StoreDtype.BFLOAT16)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == kept
    assert FeatureStore(folder).dtype is torch.bfloat16


def test_where_no_link_is_possible_the_store_is_a_copy(folder, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    features = write(folder)
    assert torch.equal(FeatureStore(folder).batch(IDS), features)


def test_a_pickled_store_maps_the_files_again(folder):
    features = write(folder)
    sent = pickle.dumps(FeatureStore(folder, EXPECTED))
    assert len(sent) < 2000, "the features themselves do not travel"
    assert torch.equal(pickle.loads(sent)[21], features[4])


@pytest.mark.parametrize("key", sorted(EXPECTED))
def test_a_store_of_something_else_is_refused_by_name(folder, key):
    write(folder)
    FeatureStore(folder, EXPECTED)
    other = {"num_tokens": 257, "width": 768, "dtype": "bfloat16", "compute_dtype": "bfloat16"}.get(key, "f" * 64)
    with pytest.raises(UserError, match=f"differs: {key} is .*, expected {other!r}.*dvc repro extract-features"):
        FeatureStore(folder, {**EXPECTED, key: other})


def test_an_unknown_image_is_named(folder):
    write(folder)
    store = FeatureStore(folder)
    with pytest.raises(UserError, match="no features of image 4"):
        store.batch([3, 4])


def test_an_image_that_comes_twice_is_named(folder):
    made = Shard(layout(), 0)
    made.add([3, 7], features_of(2))
    with pytest.raises(UserError, match="image 7 follows image 7.*fetch-vqav2"):
        made.add([7], features_of(1))
    store = writer(folder)
    store.begin()
    for number, image_ids in enumerate([[3, 7, 8], [8, 9, 10], [11]]):
        made = Shard(layout(), number)
        made.add(image_ids, features_of(len(image_ids)))
        store.write(made)
    store.publish()
    with pytest.raises(UserError, match="00001-of-00003.safetensors: image 8 is in the store twice"):
        FeatureStore(folder)


def test_a_shard_of_too_few_images_is_not_written(folder):
    store = writer(folder)
    store.begin()
    made = Shard(layout(), 1)
    made.add(IDS[3:5], features_of(2))
    with pytest.raises(UserError, match="shard 1: 2 images came where the records count 3"):
        store.write(made)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (StoreDtype.FLOAT16, float("nan")),
        (StoreDtype.FLOAT16, 1e6),
        (StoreDtype.INT8, float("nan")),
        (StoreDtype.INT8, float("-inf")),
    ],
)
def test_features_that_do_not_fit_the_dtype_are_named(dtype, value):
    features = features_of(2)
    features[1, 2, 3] = value
    with pytest.raises(UserError, match=f"image 7: .*not finite as {dtype.value}.*vision.store_dtype"):
        Shard(layout(dtype), 0).add([3, 7], features)


def test_a_cut_shard_is_refused_before_it_is_mapped(folder):
    write(folder)
    path = folder / NAMES[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match="features-00001-of-00003.safetensors: has .* bytes where"):
        FeatureStore(folder)
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(UserError, match="features-00001-of-00003.safetensors: cannot be read"):
        FeatureStore(folder)
    path.unlink()
    with pytest.raises(UserError, match="features-00001-of-00003.safetensors: cannot be read"):
        FeatureStore(folder)


def test_a_shard_with_another_ones_images_is_refused(folder):
    write(folder)
    path = folder / NAMES[1]
    tensors = load_file(path)
    tensors = {"features": tensors["features"].clone(), "image_ids": torch.tensor([20, 3, 400_000])}
    tensors["checksums"] = torch.zeros(3, dtype=torch.int64)
    save_file(tensors, path)
    with pytest.raises(UserError, match="00001-of-00003.safetensors: image 3 is in the store twice"):
        FeatureStore(folder)
    save_file({**tensors, "features": tensors["features"].reshape(3, D, T)}, path)
    with pytest.raises(UserError, match="00001-of-00003.safetensors: its tensors are not those"):
        FeatureStore(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a manifest of features"),
        ("[]", "not a manifest of features"),
        ('{"schema_version": 1}', "it has no seal"),
    ],
)
def test_a_damaged_manifest_is_refused(folder, text, message):
    write(folder)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=f"manifest.json: .*{message}"):
        FeatureStore(folder)


def test_manifest_says_what_made_the_store(folder):
    write(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["processor"] == {"resample": 3}
    assert {key: manifest[key] for key in EXPECTED} == EXPECTED
    assert [entry["images"] for entry in manifest["shards"]] == [3, 3, 1] and manifest["images"] == 7


@pytest.mark.parametrize(
    ("stored", "computed", "tolerance"),
    [("float32", "float32", 1e-4), ("int8", "float32", 1e-2), ("float32", "bfloat16", 0.1), ("int8", "bfloat16", 0.1)],
)
def test_tolerance_is_that_of_the_coarser_of_both_types(folder, stored, computed, tolerance):
    write(folder, StoreDtype(stored))
    manifest = read_sealed(folder / "manifest.json", "", "")
    write_sealed(folder / "manifest.json", {**manifest, "compute_dtype": computed})
    assert FeatureStore(folder).tolerance == tolerance


def test_features_are_mapped_not_read(folder):
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux lists a process's maps")
    write(folder)
    store = FeatureStore(folder)
    maps = Path("/proc/self/maps").read_text()
    assert all(str(path) in maps for path in folder.glob("*.safetensors")) and len(store) == 7


@pytest.mark.parametrize("dtype", list(StoreDtype))
def test_a_flipped_bit_is_named_when_its_image_is_read(folder, dtype, monkeypatch):
    write(folder, dtype)
    path, ids = folder / NAMES[1], IDS[3:6]
    whole = path.read_bytes()
    begins = 8 + int.from_bytes(whole[:8], "little")
    healthy = FeatureStore(folder).batch(IDS)
    for place in range(begins, len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        with pytest.raises(UserError, match="damaged at byte|no features of image|in the store twice") as error:
            FeatureStore(folder).batch(ids)
        assert str(folder) in str(error.value) and "vlm-vqa repair extract-features" in str(error.value)
        if "twice" not in str(error.value):
            assert torch.equal(FeatureStore(folder).batch(IDS[:3]), healthy[:3])
    monkeypatch.setenv(SWITCH, "off")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    FeatureStore(folder).batch(ids)


def test_the_damaged_image_is_named(folder):
    write(folder)
    path = folder / NAMES[1]
    bits = bytearray(path.read_bytes())
    begins = 8 + int.from_bytes(bits[:8], "little")
    start = begins + json.loads(bits[8:begins])["features"]["data_offsets"][0]
    row = FeatureStore(folder).layout.image_bytes
    bits[start + row] ^= 1
    path.write_bytes(bits)
    with pytest.raises(UserError, match=f"{path.name}: damaged at byte {start + row:,} .* of image {IDS[4]}"):
        FeatureStore(folder).batch(IDS[3:6])
