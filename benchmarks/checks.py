"""What it costs that stored bytes are checked when they are read, at the sizes of VQAv2.

    python -m benchmarks.checks [--images 2000] [--rounds 5]

Records of photographs, the VQAv2 sample's 75 again and again, real or drawn (see `benchmarks.vqav2`), and a feature store of
257 tokens of 768 in bfloat16, in a temporary folder. Every round, from files that the page cache holds:

    records    all images are read from Parquet, with the checks of blocks and without
    decoding   the same photographs become pixels of the encoder's size, in one thread: what extract-features does anyhow
    features   every image of the store is asked for once, alone, in random order, with the checks and without
    folder     a file of 1 GiB is read by SHA-256, as an export is before it is opened

About two minutes; 2 GB of disk.
"""

import os
import random
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import measure, vqav2
from benchmarks.features import SMALL, read_images, write
from benchmarks.measure import Claim
from vlm_vqa.data import records
from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.feature_store import Layout
from vlm_vqa.hashing import sha256_file
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.params import StoreDtype
from vlm_vqa.sealed import SWITCH, fingerprint, write_sealed

VQAV2_IMAGES = 123_287
MOST = 0.02
"""Of a stage's time, for its checks."""
MAX_PIXELS = 50_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `checks.json`."""
    options = measure.parse(measure.parser("checks", __doc__, images=2000, rounds=5), arguments)
    encoder = load_encoder(SMALL, "cpu")
    with tempfile.TemporaryDirectory() as place, vqav2.sample() as sample:
        photographs = [path.read_bytes() for path in vqav2.pictures(sample)]
        many = [photographs[at % len(photographs)] for at in range(options.images)]
        stored, features, large = Path(place) / "records", Path(place) / "features", Path(place) / "large"
        write_records(stored, many)
        write(features, Layout(options.images, 257, 768, StoreDtype.BFLOAT16))
        large.write_bytes(os.urandom(2**20) * 1024)
        order = random.Random(0).sample(range(options.images), options.images)
        candidates = {"folder": lambda: sha256_file(large)}
        for name, read in (
            ("records", lambda: read_records(stored)),
            ("features", lambda: read_images(features, order)),
        ):
            candidates[f"{name} checked"] = read
            candidates[f"{name} unchecked"] = lambda read=read: without_checks(read)
        candidates["decoding"] = lambda: [
            encoder.preprocess([open_image(data, "photograph", MAX_PIXELS)]) for data in photographs
        ]
        timings = measure.alternate(candidates, options.rounds)
    per_image = {name: timings[name].median / options.images for name in timings if name.endswith("checked")}
    per_image["decoding"] = timings["decoding"].median / len(photographs)
    costs = {name: per_image[f"{name} checked"] - per_image[f"{name} unchecked"] for name in ("records", "features")}
    share = costs["records"] / per_image["decoding"]
    claims = [
        Claim(
            "checks: of records, over decoding the same photographs in one thread",
            share,
            share,
            share,
            MOST,
            at_most=True,
        ),
        *(
            measure.claim(
                f"checks: {name} read with them over without", timings[f"{name} checked"], timings[f"{name} unchecked"]
            )
            for name in costs
        ),
    ]
    details = {
        "images": options.images,
        "seconds_an_image": per_image,
        "seconds_of_checks_for_all_images_of_vqav2": {name: VQAV2_IMAGES * cost for name, cost in costs.items()},
        "sha256_bytes_per_second": large_rate(timings["folder"]),
    }
    measure.write("checks", claims, details, {"photographs": vqav2.origin(vqav2.SAMPLE), "features": "random"})


def large_rate(timing: measure.Timing) -> float:
    """Return bytes a second of the file of 1 GiB."""
    return 2**30 / timing.median


def write_records(folder: Path, images: Sequence[bytes]) -> None:
    """Write images as the fetch stage stores them, in groups of a hundred."""
    folder.mkdir()
    path = folder / records.image_shard(0, 1)
    schema = records.image_features().arrow_schema
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, len(images), 100):
            rows = [
                {
                    "image_id": at,
                    "file_name": str(at),
                    "width": 1,
                    "height": 1,
                    "sha256": "",
                    "image": {"bytes": images[at], "path": None},
                }
                for at in range(start, min(start + 100, len(images)))
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    manifest = {"schema_version": records.SCHEMA_VERSION, "files": {path.name: fingerprint(path)}}
    write_sealed(folder / records.MANIFEST, manifest)


def read_records(folder: Path) -> None:
    """Read every image's bytes."""
    for _ in records.iter_images(folder):
        pass


def without_checks(read) -> None:
    """Call a reader while the checks of blocks are off."""
    with switched_off():
        read()


@contextmanager
def switched_off() -> Generator[None]:
    """Set the environment variable that ends the checks."""
    os.environ[SWITCH] = "off"
    try:
        yield
    finally:
        del os.environ[SWITCH]


if __name__ == "__main__":
    main()
