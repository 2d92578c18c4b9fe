"""Image features on disk: the format of `data/features`, written once and read by memory map.

`features-NNNNN-of-NNNNN.safetensors` hold `image_ids` int64 [images], ascending, and `features` [images, T, D] in the
store's type. With `int8` there are also `scales` float32 [images, T]: a feature is its int8 times its token's scale, which
is the token's largest magnitude / 127, so it is off by at most half a scale. `checksums` int64 [images] are compared
whenever an image's features are read. `manifest.json` says what made them and is sealed and written last, so a store that
was not finished does not open.

Until all shards are there they lie beside the store, where DVC does not remove them before it runs the stage again.

Legend of shape suffixes: N images, T tokens an image, D width.
"""

import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_vqa import files
from vlm_vqa.errors import UserError, make_again
from vlm_vqa.hashing import hash_json, sha256_file
from vlm_vqa.params import StoreDtype
from vlm_vqa.sealed import checks_blocks, checksum, damaged, flush, read_sealed, write_sealed

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
# What `FeatureStore.open` can be told to expect, with what error messages call it.
EXPECTABLE = {
    "encoder_hash": "the encoder (weights, config or processor settings)",
    "data_hash": "the data",
    "compute_dtype": "vision.compute_dtype",
    "dtype": "vision.store_dtype",
    "num_tokens": "vision.num_patches",
    "width": "vision.visual_embed_dim",
}
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "int8": 1e-2, "bfloat16": 1e-1}
"""How far features in a type may be from those of the same encoder in float32, in parts of the largest magnitude."""
_SHARD_BYTES = 256 * 2**20
_HEADER_BYTES = 512
"""More than safetensors' header of a shard takes."""
_HASHING_THREADS = 8
_REMAKE = make_again("extract-features")
_RECORDS = make_again("fetch-vqav2")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How a store is cut into shards: a function of the data and the format, whoever writes it."""

    images: int
    num_tokens: int
    width: int
    dtype: StoreDtype
    shard_bytes: int = _SHARD_BYTES
    """About how large a file becomes; one to three shards are in a writing process's memory."""

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of what a shard holds of an image, by name."""
        shape = (self.num_tokens, self.width)
        if self.dtype is StoreDtype.INT8:
            return {"features": (torch.int8, shape), "scales": (torch.float32, shape[:1])}
        return {"features": (getattr(torch, self.dtype.value), shape)}

    @property
    def image_bytes(self) -> int:
        """Bytes of an image's features, without its id."""
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.tensors.values())

    @property
    def per_shard(self) -> int:
        """Images in every shard but the last."""
        return max(1, min(self.images, self.shard_bytes // self.image_bytes))

    @property
    def shards(self) -> int:
        return -(-self.images // self.per_shard)

    def places(self, number: int) -> range:
        """Return the places, in the data's order, of the images of a shard."""
        return range(number * self.per_shard, min((number + 1) * self.per_shard, self.images))

    def name(self, number: int) -> str:
        """Return the name of a shard's file."""
        return f"features-{number:05d}-of-{self.shards:05d}.safetensors"

    def disk_bytes(self, number: int) -> int:
        """Return the most bytes that a shard's file takes."""
        return len(self.places(number)) * (self.image_bytes + 16) + _HEADER_BYTES

    def shard(self, number: int) -> "Shard":
        """Return a shard to be filled."""
        count = len(self.places(number))
        tensors = {name: torch.empty(count, *shape, dtype=dtype) for name, (dtype, shape) in self.tensors.items()}
        return Shard(number, self.dtype, tensors)


@dataclass
class Shard:
    """A shard in memory, filled from its first image to its last."""

    number: int
    dtype: StoreDtype
    tensors: dict[str, Tensor]
    """What its file will hold, by name."""
    image_ids: list[int] = field(default_factory=list)

    def add(self, image_ids: Sequence[int], features_NTD: Tensor) -> None:
        """Add features [N, T, D] of any floating type and device, rounded to the store's type.

        Raises:
            UserError: an image does not come after those before it, or its features are not finite in the store's type.
        """
        stored = _stored(features_NTD.detach(), self.dtype)
        place = slice(len(self.image_ids), len(self.image_ids) + len(image_ids))
        for name, values in stored.items():
            room = self.tensors[name][place]
            if room.shape != values.shape:
                raise ValueError(f"{name} of shape {tuple(values.shape)} where there is room for {tuple(room.shape)}")
            room.copy_(values)
        # NaN and infinity are those of the token's scale.
        finite_N = torch.isfinite(stored.get("scales", stored["features"])).flatten(1).all(1).tolist()
        for image_id, finite in zip(image_ids, finite_N, strict=True):
            if self.image_ids and image_id <= self.image_ids[-1]:
                raise UserError(f"image {image_id} follows image {self.image_ids[-1]}; ids must ascend. {_RECORDS}")
            if not finite:
                raise UserError(
                    f"image {image_id}: its features are not finite as {self.dtype.value}. Set "
                    "vision.store_dtype and vision.compute_dtype to float32 or bfloat16."
                )
            self.image_ids.append(image_id)

    def index(self) -> dict[str, Tensor]:
        """Return what its file holds beside the features: ids and checksums of its images, int64 [images]."""
        arrays = {name: _as_array(tensor) for name, tensor in self.tensors.items()}
        sums = [_checksum(arrays, row, image_id) for row, image_id in enumerate(self.image_ids)]
        return {
            "image_ids": torch.tensor(self.image_ids),
            "checksums": torch.from_numpy(np.array(sums, np.uint64).view(np.int64)),
        }


def _checksum(tensors: Mapping[str, np.ndarray], row: int, image_id: int) -> int:
    """Return the checksum of all that a shard holds of an image, its id included."""
    value = image_id % 2**64
    for name in sorted(tensors):
        value = checksum(tensors[name][row].data, seed=value)
    return value


def _stored(features_NTD: Tensor, dtype: StoreDtype) -> dict[str, Tensor]:
    """Bring features to what a shard holds of them, by name."""
    if dtype is not StoreDtype.INT8:
        return {"features": features_NTD.to(getattr(torch, dtype.value))}
    features_NTD = features_NTD.float()
    scales_NT = features_NTD.abs().amax(-1) / 127
    # A token of zeros has the scale 0.
    divisors_NT1 = scales_NT.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return {"features": (features_NTD / divisors_NT1).round().to(torch.int8), "scales": scales_NT}


class FeatureStoreWriter:
    """Makes a store of shards that come from any number of processes, in any order, over any number of runs.

    Finished shards are sealed (size and SHA-256) and lie in `FOLDER.parts/KEY`, where KEY names all that decides their
    bytes. One process calls `begin`, then all of them `write`, then that one `publish`.
    """

    def __init__(
        self, folder: str | Path, layout: Layout, made_by: dict[str, Any], computed_by: dict[str, Any] | None = None
    ):
        """
        Args:
            folder: where the store is to be.
            made_by: goes into the manifest as it is; holds `encoder_hash`, `data_hash` and `compute_dtype`.
            computed_by: what else decides the bytes: another value makes no use of the shards of an earlier run.
        """
        self.layout = layout
        self._folder = Path(folder)
        self._made_by = made_by
        described = asdict(layout) | {"dtype": layout.dtype.value}
        self._root = self._folder.with_name(f"{self._folder.name}.parts")
        self._parts = self._root / hash_json([SCHEMA_VERSION, described, made_by, computed_by])[:16]

    def begin(self) -> list[int]:
        """Remove the store that is there and what is left of other runs; return the shards that are still to be written.

        Raises:
            UserError: the disk has too little room, or another process is at work on this store.
        """
        for folder in (self._parts, self._folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        # The manifest goes first: it is what makes a store out of the files. They may be links into DVC's cache.
        (self._folder / MANIFEST).unlink(missing_ok=True)
        for old in self._folder.glob("features-*.safetensors"):
            old.unlink()
        for other in self._root.iterdir():
            if other.is_dir() and other != self._parts:
                logger.info("%s: removed; it was begun with another encoder, other data or parameters", other)
                shutil.rmtree(other)
        for torn in self._parts.glob("*.tmp"):
            torn.unlink()
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            whole = list(pool.map(self._is_whole, range(self.layout.shards)))
        missing = [number for number, done in enumerate(whole) if not done]
        if any(whole):
            logger.info("%s: going on after %d of %d shards", self._parts, sum(whole), self.layout.shards)
        self._check_disk(missing)
        return missing

    def write(self, shard: Shard) -> None:
        """Write a shard and seal it; may be called in any process or thread.

        Raises:
            UserError: it does not have all of its images.
        """
        expected, found = len(self.layout.places(shard.number)), len(shard.image_ids)
        if found != expected:
            raise UserError(f"shard {shard.number}: {found} images came where the records count {expected}. {_RECORDS}")
        part = self._parts / self.layout.name(shard.number)
        torn = part.with_suffix(f".{os.getpid()}.tmp")
        save_file({**shard.tensors, **shard.index()}, torn)
        torn.chmod(0o644)  # safetensors makes files that only their owner can read
        seal = {
            "bytes": torn.stat().st_size,
            "sha256": sha256_file(torn),
            "first": shard.image_ids[0],
            "last": shard.image_ids[-1],
        }
        flush(torn)
        torn.replace(part)
        write_sealed(part.with_suffix(".json"), seal)

    def publish(self) -> None:
        """Make the store of all shards, then remove them beside it.

        Raises:
            UserError: an image is in two shards.
        """
        seals = [self._seal(number) for number in range(self.layout.shards)]
        for one, other in itertools.pairwise(seals):
            if other["first"] <= one["last"]:
                raise UserError(f"image {other['first']} follows image {one['last']}; ids must ascend. {_RECORDS}")
        names = [self.layout.name(number) for number in range(self.layout.shards)]
        for name in names:
            _link(self._parts / name, self._folder / name)
        manifest = {
            **self._made_by,
            "schema_version": SCHEMA_VERSION,
            "images": self.layout.images,
            "num_tokens": self.layout.num_tokens,
            "width": self.layout.width,
            "dtype": self.layout.dtype.value,
            "shards": [
                {
                    "file": name,
                    "images": len(self.layout.places(number)),
                    "bytes": seals[number]["bytes"],
                    "sha256": seals[number]["sha256"],
                }
                for number, name in enumerate(names)
            ],
        }
        write_sealed(self._folder / MANIFEST, manifest)
        shutil.rmtree(self._root)

    def _lock(self) -> None:
        """Keep others out for as long as this process runs: a killed launch may have left one at work."""
        busy = f"{self._root}: another extract-features is writing there. Wait for its end, or end it."
        self._lock_file = files.claim(self._root / "lock", busy)

    def _seal(self, number: int) -> dict[str, Any]:
        return read_sealed((self._parts / self.layout.name(number)).with_suffix(".json"), "a shard's seal", _REMAKE)

    def _is_whole(self, number: int) -> bool:
        """Whether a shard is there as it was sealed; what is left of one that is not goes."""
        part = self._parts / self.layout.name(number)
        try:
            seal = self._seal(number)
            if part.stat().st_size == seal["bytes"] and sha256_file(part) == seal["sha256"]:
                return True
        except (OSError, UserError):
            pass
        if part.exists():
            logger.info("%s: not whole; it is made again", part)
        for left in (part, part.with_suffix(".json")):
            left.unlink(missing_ok=True)
        return False

    def _check_disk(self, missing: Sequence[int]) -> None:
        """Refuse to begin what the disk cannot take; a disk that cannot be written raises its own error."""
        needed = {self._parts: sum(map(self.layout.disk_bytes, missing))}
        logger.info("%d of %d shards to write, %s", len(missing), self.layout.shards, _size(needed[self._parts]))
        if self._folder.stat().st_dev != self._parts.stat().st_dev:
            # There are no links from one file system to another: it takes whole copies.
            needed[self._folder] = sum(map(self.layout.disk_bytes, range(self.layout.shards)))
        for folder, wanted in needed.items():
            tempfile.TemporaryFile(dir=folder).close()
            free = shutil.disk_usage(folder).free
            if wanted > free:
                raise UserError(
                    f"{folder}: the disk is full before the features are written: {_size(wanted)} more are needed, "
                    f"{_size(free)} are free. Free some space, or set vision.store_dtype to int8 (half of 16 bits), then "
                    "run `dvc repro` again."
                )


def _link(part: Path, target: Path) -> None:
    """Let a file have a second name, or a copy where the file system has no such thing; `target` does not exist."""
    try:
        target.hardlink_to(part)
    except OSError:
        shutil.copyfile(part, target)


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


class FeatureStore:
    """Features of images by image id, read from disk only where they are asked for.

    It can be pickled to worker processes: each maps the files anew and the memory is shared.
    """

    def __init__(self, folder: str | Path, expected: dict[str, Any] | None = None):
        """See `open`."""
        self._folder, self._expected = Path(folder), expected
        self.manifest = _read_manifest(self._folder)
        _check_expected(self._folder, self.manifest, expected or {})
        self.num_tokens: int = self.manifest["num_tokens"]
        self.width: int = self.manifest["width"]
        self.layout = Layout(self.manifest["images"], self.num_tokens, self.width, StoreDtype(self.manifest["dtype"]))
        # Each shard's tensors, by name, and the checksums of its images.
        self._shards: list[dict[str, np.ndarray]] = []
        self._checksums: list[np.ndarray] = []
        self._checked = checks_blocks()
        # Where an image lies: shard and row.
        self._places: dict[int, tuple[int, int]] = {}
        for entry in self.manifest["shards"]:
            self._map_shard(entry)
        if len(self._places) != self.manifest["images"]:
            raise UserError(
                f"{self._folder}: holds {len(self._places)} different images where its manifest says "
                f"{self.manifest['images']}. {_REMAKE}"
            )

    @classmethod
    def open(cls, folder: str | Path, expected: dict[str, Any] | None = None) -> "FeatureStore":
        """Map a finished store.

        Args:
            folder: where the writer put it.
            expected: some of the keys of `EXPECTABLE`; dtypes by name, such as "float32".

        Raises:
            UserError: it is missing, unfinished, damaged, or not what is expected; the message names what differs.
        """
        return cls(folder, expected)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._places

    @property
    def dtype(self) -> torch.dtype:
        """The type of the features that are returned: the stored one, and float32 where that is int8."""
        stored = self.layout.tensors["features"][0]
        return torch.float32 if stored is torch.int8 else stored

    @property
    def tolerance(self) -> float:
        """How far features may be from the same encoder's in float32, in parts of the largest magnitude of all."""
        return max(TOLERANCE[self.layout.dtype.value], TOLERANCE[self.manifest.get("compute_dtype", "float32")])

    def __getitem__(self, image_id: int) -> Tensor:
        """[T, D] as `batch`.

        Raises:
            UserError: there is no such image.
        """
        return self.batch([image_id])[0]

    def batch(self, image_ids: Sequence[int]) -> Tensor:
        """[N, T, D] in `dtype`, a copy, in the order asked for; an id may be asked for more than once.

        Raises:
            UserError: there is no such image, or its features are not those that were written.
        """
        features_NTD = torch.empty(len(image_ids), self.num_tokens, self.width, dtype=self.dtype)
        # numpy copies where torch would start a team of threads for every image, and wait for it on a busy machine.
        target_NTD = _as_array(features_NTD)
        for target_TD, image_id in zip(target_NTD, image_ids, strict=True):
            try:
                shard, row = self._places[int(image_id)]
            except KeyError:
                raise UserError(f"{self._folder}: has no features of image {image_id}. {_REMAKE}") from None
            tensors = self._shards[shard]
            if self._checked and _checksum(tensors, row, int(image_id)) != int(self._checksums[shard][row]) % 2**64:
                raise self._damaged(shard, row)
            target_TD[:] = tensors["features"][row]
            if "scales" in tensors:
                target_TD *= tensors["scales"][row][:, None]
        return features_NTD

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self._folder, self._expected)

    def _map_shard(self, entry: dict[str, Any]) -> None:
        """Map one file. Sizes are compared first: reading a map beyond the end of its file kills the process."""
        path = self._folder / entry["file"]
        try:
            found = path.stat().st_size
            if found != entry["bytes"]:
                raise UserError(f"{path}: has {found} bytes where {entry['bytes']} were written. {_REMAKE}")
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}). {_REMAKE}") from error
        image_ids, checksums = (tensors.pop(name, torch.empty(0)) for name in ("image_ids", "checksums"))
        wanted = {name: (kind, (entry["images"], *shape)) for name, (kind, shape) in self.layout.tensors.items()}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if found != wanted or {image_ids.shape, checksums.shape} != {(entry["images"],)}:
            raise UserError(f"{path}: its tensors are not those that the manifest names. {_REMAKE}")
        for row, image_id in enumerate(image_ids.tolist()):
            if image_id in self._places:
                raise UserError(f"{path}: image {image_id} is in the store twice. {_REMAKE}")
            self._places[image_id] = (len(self._shards), row)
        self._shards.append({name: _as_array(tensor) for name, tensor in tensors.items()})
        self._checksums.append(checksums.numpy())

    def _damaged(self, shard: int, row: int) -> UserError:
        path = self._folder / self.manifest["shards"][shard]["file"]
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
            start = json.loads(file.read(header))["features"]["data_offsets"][0]
        return damaged(path, 8 + header + start + row * self._shards[shard]["features"][row].nbytes, _REMAKE)


def _as_array(tensor: Tensor) -> np.ndarray:
    """View a tensor as numpy does; bfloat16, which numpy does not know, as its bits."""
    return tensor.view(torch.int16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_sealed(path, "a manifest of features", _REMAKE)
    if (version := manifest["schema_version"]) != SCHEMA_VERSION:
        raise UserError(f"{path}: features of version {version}; this code reads version {SCHEMA_VERSION}. {_REMAKE}")
    return manifest


def _check_expected(folder: Path, manifest: dict[str, Any], expected: dict[str, Any]) -> None:
    if unknown := expected.keys() - EXPECTABLE.keys():
        raise ValueError(f"cannot expect {sorted(unknown)} of a feature store")
    differing = [key for key in EXPECTABLE if key in expected and manifest.get(key) != expected[key]]
    if differing:
        details = "; ".join(
            f"{EXPECTABLE[key]} differs: {key} is {manifest.get(key)!r}, expected {expected[key]!r}"
            for key in differing
        )
        raise UserError(
            f"{folder}: these features do not belong to this run. {details}. Run `dvc repro extract-features`."
        )
