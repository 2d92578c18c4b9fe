"""Writes a feature store. Until all shards are there they lie beside it, where DVC does not remove them before it runs the
stage again.

Legend of shape suffixes: N images, T tokens an image, D width.
"""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm_vqa import files
from vlm_vqa.data.feature_store import MANIFEST, SCHEMA_VERSION, Layout, as_array, checksum_of
from vlm_vqa.errors import UserError, make_again
from vlm_vqa.hashing import hash_json, sha256_file
from vlm_vqa.params import StoreDtype
from vlm_vqa.sealed import PART, aside, read_sealed, write_sealed

_RECORDS = make_again("fetch-vqav2")

logger = logging.getLogger(__name__)


class Shard:
    """A shard of a store in memory, filled from its first image to its last."""

    def __init__(self, layout: Layout, number: int):
        self.number, self.dtype, count = number, layout.dtype, len(layout.places(number))
        self.image_ids: list[int] = []
        self.tensors = {name: torch.empty(count, *shape, dtype=kind) for name, (kind, shape) in layout.tensors.items()}

    def add(self, image_ids: Sequence[int], features_NTD: Tensor) -> None:
        """Add features [N, T, D] of any floating type and device, rounded to the store's type. UserError if an image does
        not come after those before it, or its features are not finite in the store's type."""
        if self.dtype is StoreDtype.INT8:
            features_NTD = features_NTD.detach().float()
            scales_NT = features_NTD.abs().amax(-1) / 127
            # A token of zeros has the scale 0.
            divisors_NT1 = scales_NT.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
            stored = {"features": (features_NTD / divisors_NT1).round().to(torch.int8), "scales": scales_NT}
        else:
            stored = {"features": features_NTD.detach().to(getattr(torch, self.dtype.value))}
        place = slice(len(self.image_ids), len(self.image_ids) + len(image_ids))
        for name, values in stored.items():
            room = self.tensors[name][place]
            assert room.shape == values.shape, f"{name}: no room for {tuple(values.shape)} in {tuple(room.shape)}"
            room.copy_(values)
        # NaN and infinity are those of the token's scale.
        finite_N = torch.isfinite(stored.get("scales", stored["features"])).flatten(1).all(1).tolist()
        for image_id, finite in zip(image_ids, finite_N, strict=True):
            if self.image_ids and image_id <= self.image_ids[-1]:
                raise UserError(f"image {image_id} follows image {self.image_ids[-1]}; ids must ascend. {_RECORDS}")
            if not finite:
                mend = "Set vision.store_dtype and vision.compute_dtype to float32 or bfloat16."
                raise UserError(f"image {image_id}: its features are not finite as {self.dtype.value}. {mend}")
            self.image_ids.append(image_id)


class FeatureStoreWriter:
    """Makes a store of shards that come from any number of processes, in any order, over any number of runs. Finished
    shards are sealed (size and SHA-256) and lie in `FOLDER.parts/KEY`, where KEY names all that decides their bytes. One
    process calls `begin`, then all of them `write`, then that one `publish`."""

    def __init__(
        self, folder: str | Path, layout: Layout, made_by: dict[str, Any], computed_by: dict[str, Any] | None = None
    ):
        """`made_by` goes into the manifest as it is, and holds `encoder_hash`, `data_hash` and `compute_dtype`.
        `computed_by` is what else decides the bytes: another value makes no use of the shards of an earlier run."""
        self.layout, self._folder, self._made_by = layout, Path(folder), made_by
        described = asdict(layout) | {"dtype": layout.dtype.value}
        self._root = self._folder.with_name(f"{self._folder.name}.parts")
        self._parts = self._root / hash_json([SCHEMA_VERSION, described, made_by, computed_by])[:16]

    def begin(self) -> list[int]:
        """Remove the store that is there and what is left of other runs; return the shards that are still to be written.
        UserError if the disk has too little room, or another process is at work on this store."""
        for folder in (self._parts, self._folder):
            folder.mkdir(parents=True, exist_ok=True)
        # For as long as this process runs: a killed launch may have left one at work.
        busy = f"{self._root}: another extract-features is writing there. Wait for its end, or end it."
        self._lock_file = files.claim(self._root / "lock", busy)
        # The manifest goes first: it is what makes a store out of the files. They may be links into DVC's cache.
        (self._folder / MANIFEST).unlink(missing_ok=True)
        for old in self._folder.glob("features-*.safetensors"):
            old.unlink()
        for other in self._root.iterdir():
            if other.is_dir() and other != self._parts:
                logger.info("%s: removed; it was begun with another encoder, other data or parameters", other)
                shutil.rmtree(other)
        for unfinished in self._parts.glob(f"*{PART}"):
            unfinished.unlink()
        with ThreadPoolExecutor(8, "hash") as pool:
            whole = list(pool.map(self._is_whole, range(self.layout.shards)))
        missing = [number for number, done in enumerate(whole) if not done]
        if any(whole):
            logger.info("%s: going on after %d of %d shards", self._parts, sum(whole), self.layout.shards)
        needed = {self._parts: sum(map(self.layout.disk_bytes, missing))}
        size = needed[self._parts] / 2**20
        logger.info("%d of %d shards to write, %.1f MiB", len(missing), self.layout.shards, size)
        if self._folder.stat().st_dev != self._parts.stat().st_dev:
            # There are no links from one file system to another: it takes whole copies.
            needed[self._folder] = sum(map(self.layout.disk_bytes, range(self.layout.shards)))
        for folder, wanted in needed.items():
            tempfile.TemporaryFile(dir=folder).close()
            free = shutil.disk_usage(folder).free
            if wanted > free:
                raise UserError(
                    f"{folder}: the disk is full before the features are written: {wanted / 2**20:,.1f} MiB more are "
                    f"needed, {free / 2**20:,.1f} are free. Free some space, or set vision.store_dtype to int8 (half of 16 "
                    "bits), then run `dvc repro` again."
                )
        return missing

    def write(self, shard: Shard) -> None:
        """Write a shard and seal it, in any process or thread; one without all of its images is a `UserError`."""
        expected, found = len(self.layout.places(shard.number)), len(shard.image_ids)
        if found != expected:
            raise UserError(f"shard {shard.number}: {found} images came where the records count {expected}. {_RECORDS}")
        arrays = {name: as_array(tensor) for name, tensor in shard.tensors.items()}
        sums = [checksum_of(arrays, row, image_id) for row, image_id in enumerate(shard.image_ids)]
        checksums = torch.from_numpy(np.array(sums, np.uint64).view(np.int64))
        path = self._parts / self.layout.name(shard.number)
        with aside(path) as part:
            save_file(shard.tensors | {"image_ids": torch.tensor(shard.image_ids), "checksums": checksums}, part)
            part.chmod(0o644)  # safetensors makes files that only their owner can read
            seal = {"file": path.name, "images": found, "bytes": part.stat().st_size, "sha256": sha256_file(part)}
        write_sealed(path.with_suffix(".json"), seal)

    def publish(self) -> None:
        """Make the store of all shards, then remove them beside it."""
        shards = [self._seal(number) for number in range(self.layout.shards)]
        for name in (shard["file"] for shard in shards):
            try:
                (self._folder / name).hardlink_to(self._parts / name)
            except OSError:  # where links are not supported
                shutil.copyfile(self._parts / name, self._folder / name)
        described = asdict(self.layout) | {"dtype": self.layout.dtype.value, "shards": shards}
        del described["shard_bytes"]
        write_sealed(self._folder / MANIFEST, {**self._made_by, "schema_version": SCHEMA_VERSION, **described})
        shutil.rmtree(self._root)

    def _seal(self, number: int) -> dict[str, Any]:
        path = (self._parts / self.layout.name(number)).with_suffix(".json")
        return read_sealed(path, "a shard's seal", make_again("extract-features"))

    def _is_whole(self, number: int) -> bool:
        """Whether a shard is there as it was sealed; what is left of one that is not goes."""
        part = self._parts / self.layout.name(number)
        with suppress(OSError, UserError):
            if sha256_file(part) == self._seal(number)["sha256"]:
                return True
        if part.exists():
            logger.info("%s: not whole; it is made again", part)
        for left in (part, part.with_suffix(".json")):
            left.unlink(missing_ok=True)
        return False
