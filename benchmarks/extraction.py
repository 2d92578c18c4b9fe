"""How fast extract-features is with DINOv2-base, against the encoder's matrix products alone and against no overlap.

    python -m benchmarks.extraction [--images 24] [--batch-size 8] [--rounds 3]

Three things in turn, every round:

    in turn   decode and preprocess a batch, forward, store in a temporary folder: one after the other
    ahead     the stage's own `extract`: the same, but threads, on a GPU processes, decode and preprocess ahead
    products  the matrix products of these forwards and nothing else: what the encoder cannot go below

Photographs of 640 pixels, real or drawn (see `benchmarks.vqav2`); random weights of DINOv2-base's shape. bfloat16 follows
float32 where its products are the faster ones. On a GPU give more images and the stage's batch: `--images 2048 --batch-size
64`.

About 4 minutes on 2 cores with some other load; 2 GiB of memory.
"""

import argparse
import io
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from benchmarks import measure, vqav2
from benchmarks.measure import Claim
from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.feature_store import FeatureStore, Layout
from vlm_vqa.data.records import ImageRecord
from vlm_vqa.errors import UserError
from vlm_vqa.features import extract
from vlm_vqa.features.writer import FeatureStoreWriter, Shard
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.model.flops import vision_flops, vision_linear_maps
from vlm_vqa.params import StoreDtype

LONGER_EDGE = 640
MAX_PIXELS = 10**6
PROBED_TOKENS = 64
"""Few, since emulated bfloat16 products run below 1 GFLOP/s."""
DINOV2_BASE = Dinov2Config(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=518, patch_size=14)
Way = Callable[[Encoder, Sequence[ImageRecord], FeatureStoreWriter, int], None]
FORMULA = (
    "per image, 2 x multiply-adds, T = 257 tokens, P = 256 patches, D = 768, 12 layers: patches 2 P (3 x 14 x 14) D + "
    "12 layers x (queries, keys, values, output 4 x 2 T D D + scores and weighted values 2 x 2 T T D + MLP 2 x 2 T D 4D)"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `extract.json`."""
    parser = measure.parser("extraction", __doc__, images=24, batch_size=8, rounds=3)
    options = measure.parse(parser, arguments)
    if options.images % options.batch_size:
        raise UserError(f"--images {options.images} is no multiple of --batch-size {options.batch_size}. Make it one.")
    photographs = read_photographs()
    images = repeated(photographs, options.images)
    rates = probe_rates()
    claims: list[Claim] = []
    details: dict[str, Any] = {
        "photographs": f"{len(photographs)} different ones of {LONGER_EDGE} px, over and over",
        "images": len(images),
        "batch_size": options.batch_size,
        "flop_formula": FORMULA,
        "probe_flop_per_second": {name(dtype): rate for dtype, rate in rates.items()},
    }
    for dtype, rate in rates.items():
        if rate < rates[torch.float32]:
            details[name(dtype)] = "skipped: its matrix products are slower than float32's here"
            continue
        found, details[name(dtype)] = compare(build_encoder(DINOV2_BASE, dtype), images, options)
        claims += found
    measure.write("extraction", claims, details, {"photographs": vqav2.origin(vqav2.SAMPLE)})


def name(dtype: torch.dtype) -> str:
    """Return for instance "float32"."""
    return str(dtype).removeprefix("torch.")


def read_photographs() -> list[bytes]:
    """Read the jpegs of the sample whose longer edge has COCO's 640 pixels (others were resized); none is a `UserError`."""
    with vqav2.sample() as folder:
        read = [path.read_bytes() for path in vqav2.pictures(folder)]
    found = [data for data in read if max(Image.open(io.BytesIO(data)).size) == LONGER_EDGE]
    if not found:
        raise UserError(f"{folder}: no photographs of {LONGER_EDGE} pixels there. Get a whole copy of it.")
    return found


def repeated(photographs: Sequence[bytes], count: int) -> list[ImageRecord]:
    """Return `count` records with ids from 0; photographs come again and again."""
    stream = itertools.islice(itertools.cycle(photographs), count)
    return [ImageRecord(image_id, f"{image_id}.jpg", data) for image_id, data in enumerate(stream)]


def probe_rates() -> dict[torch.dtype, float]:
    """Return FLOP/s of an MLP product of few tokens, float32 first."""
    width = DINOV2_BASE.hidden_size
    return {
        dtype: measure.matmul_rate(PROBED_TOKENS, width, 4 * width, dtype) for dtype in (torch.float32, torch.bfloat16)
    }


def build_encoder(config: Dinov2Config, dtype: torch.dtype) -> Encoder:
    """Return an encoder with random weights and facebook/dinov2-base's preprocessing, on the benchmarks' device."""
    torch.manual_seed(0)
    processor = BitImageProcessor(
        size={"shortest_edge": 256},
        resample=Image.Resampling.BICUBIC,
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    assert isinstance(config.patch_size, int)
    model = Dinov2Model(config).eval().requires_grad_(False).to(measure.device(), dtype)
    return Encoder(model=model, processor=processor, hash="random", num_tokens=1 + (224 // config.patch_size) ** 2)


def compare(
    encoder: Encoder, images: Sequence[ImageRecord], options: argparse.Namespace
) -> tuple[list[Claim], dict[str, Any]]:
    """Time the three in turn; `images` in whole batches, so that the products are those of the forward."""
    batch_size = options.batch_size
    check_equal(encoder, images[:batch_size], batch_size)
    batches = len(images) // batch_size
    config = encoder.model.config
    one_batch = products(config, encoder.num_tokens, batch_size, encoder.model.dtype)
    one_batch()
    candidates: dict[str, Callable[[], object]] = {
        "in turn": lambda: store(in_turn, encoder, images, batch_size),
        "ahead": lambda: store(ahead, encoder, images, batch_size),
        "products": lambda: [one_batch() for _ in range(batches)],
    }
    # The check and the first products were the warm-up.
    timings = measure.alternate(candidates, options.rounds, warm_up=0)
    kind = name(encoder.model.dtype)
    claims = [
        measure.claim(
            f"extraction: images/s over the encoder's floor, {kind}", timings["products"], timings["ahead"], target=0.6
        ),
        measure.claim(f"extraction: decoding ahead against in turn, {kind}", timings["in turn"], timings["ahead"]),
    ]
    work = vision_flops(config, encoder.num_tokens)
    details = {
        "attention": config._attn_implementation,
        "flop_per_image": work,
        "products_flop_per_second": work * len(images) / timings["products"].median,
        "images_per_second": {what: len(images) / timing.median for what, timing in timings.items()},
        "seconds": {what: timing.seconds for what, timing in timings.items()},
    }
    return claims, details


def ahead(encoder: Encoder, images: Sequence[ImageRecord], writer: FeatureStoreWriter, batch_size: int) -> None:
    """As the stage does it."""
    layout = writer.layout
    take = lambda places: images[places.start : places.stop]  # noqa: E731
    extract.extract(range(layout.shards), take, encoder, writer, batch_size, MAX_PIXELS, lambda more: None)


def in_turn(encoder: Encoder, images: Sequence[ImageRecord], writer: FeatureStoreWriter, batch_size: int) -> None:
    """As the stage did it: nothing overlaps."""
    for number in range(writer.layout.shards):
        shard, places = Shard(writer.layout, number), writer.layout.places(number)
        for start in range(places.start, places.stop, batch_size):
            batch = images[start : min(start + batch_size, places.stop)]
            opened = [open_image(record.data, record.file_name, MAX_PIXELS) for record in batch]
            shard.add([record.image_id for record in batch], encoder.encode(opened))
        writer.write(shard)


def store(way: Way, encoder: Encoder, images: Sequence[ImageRecord], batch_size: int) -> None:
    """Extract into a temporary store."""
    with tempfile.TemporaryDirectory() as folder:
        store_in(f"{folder}/features", way, encoder, images, batch_size)


def store_in(
    folder: str | Path,
    way: Way,
    encoder: Encoder,
    images: Sequence[ImageRecord],
    batch_size: int,
    dtype: StoreDtype | None = None,
) -> None:
    """Extract into the store `folder`, by default in the compute dtype."""
    dtype = dtype or StoreDtype(name(encoder.model.dtype))
    layout = Layout(len(images), encoder.num_tokens, encoder.width, dtype)
    writer = FeatureStoreWriter(folder, layout, made_by={})
    writer.begin()
    way(encoder, images, writer, batch_size)
    writer.publish()


def check_equal(encoder: Encoder, images: Sequence[ImageRecord], batch_size: int) -> None:
    """Raise AssertionError unless both ways store the same bits."""
    stored = []
    for way in (ahead, in_turn):
        with tempfile.TemporaryDirectory() as folder:
            store_in(f"{folder}/features", way, encoder, images, batch_size)
            stored.append(FeatureStore(f"{folder}/features").batch(range(len(images))))
    assert torch.equal(*stored), "decoding ahead changed the features"


def products(config: Any, num_tokens: int, batch_size: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return what computes all matrix products of a batch's forward, at its very shapes, on random numbers."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=measure.device()).to(dtype)

    heads, width = config.num_attention_heads, config.hidden_size
    maps = [(random(batch_size * num_tokens, one), random(other, one)) for one, other in vision_linear_maps(config)]
    patch = config.num_channels * config.patch_size**2
    patches = random(batch_size * (num_tokens - 1), patch), random(width, patch)
    queries, keys, values = (random(batch_size, heads, num_tokens, width // heads) for _ in range(3))

    def run() -> None:
        torch.nn.functional.linear(*patches)
        for _ in range(config.num_hidden_layers):
            for tokens, weight in maps:
                torch.nn.functional.linear(tokens, weight)
            (queries @ keys.transpose(-1, -2)) @ values

    return run


if __name__ == "__main__":
    main()
