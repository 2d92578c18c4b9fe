"""How fast single images are read from the feature store, and what int8 costs.

    python -m benchmarks.features [--images 3200] [--rounds 5]

Two stores of DINOv2-base's shape, 257 tokens of 768, in a temporary folder: bfloat16 (1.3 GB of random numbers) and int8.
Every round, from files that the page cache holds:

    sequential   plain reads of the store's files from end to end, an image's bytes at a time into one buffer
    float32      the same, and what was read of int8 becomes float32, four times the bytes, as the store returns it
    random       the store is opened and every image asked for once, alone, in random order

int8's error is that of each token of the VQAv2 sample's 75 photographs, real or drawn (see `benchmarks.vqav2`), as the small
pretrained encoder sees them, relative to the token's length; bfloat16's stands beside it.

About a minute; 2 GB of disk, below 3 GB of memory.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import measure, vqav2
from benchmarks.measure import Claim
from vlm_vqa.data.feature_store import FeatureStore, Layout
from vlm_vqa.features.writer import FeatureStoreWriter, Shard
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.params import Dtype, StoreDtype, VisionParams

TOKENS, WIDTH = 257, 768
DTYPES = (StoreDtype.BFLOAT16, StoreDtype.INT8)
SMALL = VisionParams(
    launch="cpu",
    model="small",
    revision=None,
    num_patches=65,
    visual_embed_dim=128,
    batch_size=64,
    compute_dtype=Dtype.FLOAT32,
    store_dtype=StoreDtype.FLOAT32,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `features.json`."""
    options = measure.parse(measure.parser("features", __doc__, images=3200, rounds=5), arguments)
    with tempfile.TemporaryDirectory() as place:
        stores = {dtype: Path(place) / dtype.value for dtype in DTYPES}
        sizes = {dtype: write(folder, Layout(options.images, TOKENS, WIDTH, dtype)) for dtype, folder in stores.items()}
        claims, details = compare_reads(stores, options.images, options.rounds)
    ratio = sizes[StoreDtype.INT8] / sizes[StoreDtype.BFLOAT16]
    claims.append(
        Claim("features: int8's bytes over bfloat16's, files of 257 x 768", ratio, ratio, ratio, 0.503, at_most=True)
    )
    errors, of = compare_errors(see_photographs()), vqav2.origin(vqav2.SAMPLE)
    kind = of.split()[0]
    typical, worst = errors["int8"]["median"], errors["int8"]["max"]
    claims.append(
        Claim(
            f"features: int8's relative error of a token, {kind} photographs",
            typical,
            typical,
            worst,
            0.01,
            at_most=True,
        )
    )
    bytes_of = {dtype.value: size for dtype, size in sizes.items()}
    measure.write(
        "features",
        claims,
        {"images": options.images, "bytes": bytes_of, "relative_error_of_a_token": errors, **details},
        {"photographs": of, "features that are read": "random"},
    )


def write(folder: Path, layout: Layout) -> int:
    """Write a store of random numbers as the stage does; return the bytes of its shards."""
    writer = FeatureStoreWriter(folder, layout, made_by={})
    noise_NTD = torch.randn(64, layout.num_tokens, layout.width, generator=torch.Generator().manual_seed(0))
    for number in writer.begin():
        shard, places = Shard(layout, number), layout.places(number)
        for start in range(places.start, places.stop, len(noise_NTD)):
            image_ids = range(start, min(start + len(noise_NTD), places.stop))
            shard.add(image_ids, noise_NTD[: len(image_ids)])
        writer.write(shard)
    writer.publish()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def compare_reads(stores: dict[StoreDtype, Path], images: int, rounds: int) -> tuple[list[Claim], dict[str, Any]]:
    """Time all reads in turn."""
    order = random.Random(0).sample(range(images), images)
    candidates: dict[str, Callable[[], object]] = {}
    for dtype, folder in stores.items():
        size = TOKENS * WIDTH * Layout(images, TOKENS, WIDTH, dtype).tensors["features"][0].itemsize
        candidates[f"{dtype.value} sequential"] = lambda folder=folder, size=size: read_files(folder, size)
        candidates[f"{dtype.value} random"] = lambda folder=folder: read_images(folder, order)
    candidates["int8 float32"] = lambda: read_files(stores[StoreDtype.INT8], TOKENS * WIDTH, as_float32)
    timings = measure.alternate(candidates, rounds)
    claims = [
        measure.claim(
            f"features: random single images over sequential reads, {what}", timings[slow], timings[fast], **more
        )
        for what, slow, fast, more in (
            ("bfloat16", "bfloat16 sequential", "bfloat16 random", {"target": 0.5}),
            ("int8, both to float32", "int8 float32", "int8 random", {"target": 0.5}),
            (
                "int8 to float32 over bytes",
                "int8 sequential",
                "int8 random",
                {"note": "writes 4 bytes for 1 that is read"},
            ),
        )
    ]
    rates = {what: images / timing.median for what, timing in timings.items()}
    return claims, {"images_per_second": rates, "seconds": {what: timing.seconds for what, timing in timings.items()}}


def read_files(folder: Path, size: int, look: Callable[[bytearray], object] = len) -> None:
    """Read all files from end to end, `size` bytes at a time, and do something with each of them."""
    buffer = bytearray(size)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                look(buffer)


def as_float32(buffer: bytearray) -> np.ndarray:
    """Turn an image's int8 into float32 as plainly as possible; scales that are 1 cost what others do."""
    features_TD = np.empty((TOKENS, WIDTH), np.float32)
    features_TD[:] = np.frombuffer(buffer, np.int8).reshape(TOKENS, WIDTH)
    features_TD *= np.ones((TOKENS, 1), np.float32)
    return features_TD


def read_images(folder: Path, order: Sequence[int]) -> None:
    """Read every image once, as anybody does."""
    store = FeatureStore(folder)
    for image_id in order:
        store[image_id]


def see_photographs() -> Tensor:
    """Return the small encoder's features [N, T, D] of the sample's photographs."""
    encoder = load_encoder(SMALL, "cpu")
    with vqav2.sample() as folder:
        return encoder.encode([Image.open(path) for path in vqav2.pictures(folder)])


def compare_errors(features_NTD: Tensor) -> dict[str, dict[str, float]]:
    """Return, for each type, the median and the largest relative error of a token that has gone through a store."""
    count, tokens, width = features_NTD.shape
    found = {}
    for dtype in DTYPES:
        layout = Layout(count, tokens, width, dtype)
        with tempfile.TemporaryDirectory() as place:
            writer = FeatureStoreWriter(Path(place) / "features", layout, made_by={})
            (number,) = writer.begin()
            shard = Shard(layout, number)
            shard.add(range(count), features_NTD)
            writer.write(shard)
            writer.publish()
            stored_NTD = FeatureStore(Path(place) / "features").batch(range(count)).float()
        errors_NT = (stored_NTD - features_NTD).norm(dim=-1) / features_NTD.norm(dim=-1)
        found[dtype.value] = {"median": errors_NT.median().item(), "max": errors_NT.max().item()}
    return found


if __name__ == "__main__":
    main()
