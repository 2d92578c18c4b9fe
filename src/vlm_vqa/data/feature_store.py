"""Image features on disk: the format of `data/features`, written once and read by memory map.

With `vision.store: false` there is the manifest alone: `vlm_vqa.features.live` makes features anew from the pictures.

`features-NNNNN-of-NNNNN.safetensors` hold `image_ids` int64 [images], ascending, and `features` [images, T, D] in the
store's type. With `int8` there are also `scales` float32 [images, T]: a feature is its int8 times its token's scale, which
is the token's largest magnitude / 127, so it is off by at most half a scale. `checksums` int64 [images] are compared
whenever an image's features are read. `manifest.json` says what made them and is sealed and written last, so a store that
was not finished does not open.

Legend of shape suffixes: N images, T tokens an image, D width.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm_vqa.errors import UserError, make_again
from vlm_vqa.params import StoreDtype
from vlm_vqa.sealed import checks_blocks, checksum, damaged, read_sealed

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
# What `FeatureStore` can be told to expect, with what error messages call it.
EXPECTABLE = {
    "encoder_hash": "the encoder (weights, config or processor settings)",
    "data_hash": "the data",
    "compute_dtype": "vision.compute_dtype",
    "dtype": "vision.store_dtype",
    "num_tokens": "vision.num_patches",
    "width": "vision.visual_embed_dim",
    "live": "vision.store (null in the manifest where features are stored), or how they are made",
}
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "int8": 1e-2, "bfloat16": 1e-1}
"""How far features in a type may be from those of the same encoder in float32, in parts of the largest magnitude."""
_SHARD_BYTES = 256 * 2**20
_REMAKE = make_again("extract-features")


@dataclass(frozen=True)
class Layout:
    """How a store is cut into shards: a function of the data and the format, whoever writes it."""

    images: int
    num_tokens: int
    width: int
    dtype: StoreDtype
    shard_bytes: int = _SHARD_BYTES  # of a file, about; a writing process holds one to three in memory

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of what a shard holds of an image, by name."""
        shape = (self.num_tokens, self.width)
        if self.dtype is StoreDtype.INT8:
            return {"features": (torch.int8, shape), "scales": (torch.float32, shape[:1])}
        return {"features": (getattr(torch, self.dtype.value), shape)}

    @property
    def image_bytes(self) -> int:
        """Bytes of an image's features."""
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
        # The header of a shard takes less than 512.
        return len(self.places(number)) * (self.image_bytes + 16) + 512


def checksum_of(tensors: Mapping[str, np.ndarray], row: int, image_id: int) -> int:
    """Return the checksum of all that a shard holds of an image, its id included."""
    value = image_id % 2**64
    for name in sorted(tensors):
        value = checksum(tensors[name][row].data, seed=value)
    return value


def read_manifest(folder: str | Path, expected: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what describes features; `expected` has some of the keys of `EXPECTABLE`, dtypes by name, such as "float32".
    UserError if it is missing, damaged, or not what is expected; the message names what differs."""
    path = Path(folder) / MANIFEST
    manifest = read_sealed(path, "a manifest of features", _REMAKE)
    if (version := manifest["schema_version"]) != SCHEMA_VERSION:
        raise UserError(f"{path}: features of version {version}; this code reads {SCHEMA_VERSION}. {_REMAKE}")
    found = [
        f"{EXPECTABLE[key]} differs: {key} is {manifest.get(key)!r}, expected {value!r}. "
        for key, value in (expected or {}).items()
        if manifest.get(key) != value
    ]
    if found:
        what = "these features do not belong to this run"
        raise UserError(f"{folder}: {what}. {''.join(found)}Run `dvc repro extract-features`.")
    return manifest


class Features(ABC):
    """Features of images by image id, as a manifest describes them: stored, or made anew of the pictures."""

    live = False
    """Whether a tower looks at the pictures wherever features are made."""

    def __init__(self, folder: str | Path, expected: dict[str, Any] | None = None):
        """UserError as `read_manifest`."""
        self._folder, self._expected = Path(folder), expected
        self.manifest = read_manifest(folder, expected)
        self.num_tokens: int = self.manifest["num_tokens"]
        self.width: int = self.manifest["width"]
        self.layout = Layout(self.manifest["images"], self.num_tokens, self.width, StoreDtype(self.manifest["dtype"]))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the features that are returned: the stored one, and float32 where that is int8."""
        stored = self.layout.tensors["features"][0]
        return torch.float32 if stored is torch.int8 else stored

    @property
    def tolerance(self) -> float:
        """How far features may be from the same encoder's in float32, in parts of the largest magnitude of all."""
        return max(TOLERANCE[self.layout.dtype.value], TOLERANCE[self.manifest.get("compute_dtype", "float32")])

    @abstractmethod
    def inputs(self, image_ids: Sequence[int]) -> dict[str, Tensor]:
        """Return what features are made of, first dimension N, on the CPU, in the order asked for; an id may be asked for
        more than once. A data loader's workers call it. UserError if there is no such image, or it is damaged."""

    @abstractmethod
    def of(self, inputs: dict[str, Tensor]) -> Tensor:
        """Make features [N, T, D] in `dtype` of `inputs`, which may have been moved to the model's device since."""

    def batch(self, image_ids: Sequence[int]) -> Tensor:
        """[N, T, D] in `dtype`, a copy; UserError as `inputs`."""
        return self.of(self.inputs(image_ids))

    def __getitem__(self, image_id: int) -> Tensor:
        """[T, D], and errors, as `batch`."""
        return self.batch([image_id])[0]


class FeatureStore(Features):
    """Stored ones, read from disk only where they are asked for. It can be pickled to worker processes: each maps the files
    anew and the memory is shared."""

    def __init__(self, folder: str | Path, expected: dict[str, Any] | None = None):
        """Map a finished store; UserError as `Features`, or if it is unfinished."""
        super().__init__(folder, expected)
        # Each shard's tensors, by name, and the checksums of its images.
        self._shards: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
        self._checked = checks_blocks()
        # Where an image lies: shard and row.
        self._places: dict[int, tuple[int, int]] = {}
        for entry in self.manifest["shards"]:
            self._map_shard(entry)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._places

    def inputs(self, image_ids: Sequence[int]) -> dict[str, Tensor]:
        found = {
            name: torch.empty(len(image_ids), *shape, dtype=dtype)
            for name, (dtype, shape) in self.layout.tensors.items()
        }
        # numpy copies where torch would start a team of threads for every image, and wait for it on a busy machine.
        targets = {name: as_array(tensor) for name, tensor in found.items()}
        for at, image_id in enumerate(map(int, image_ids)):
            try:
                shard, row = self._places[image_id]
            except KeyError:
                raise UserError(f"{self._folder}: has no features of image {image_id}. {_REMAKE}") from None
            tensors, checksums = self._shards[shard]
            if self._checked and checksum_of(tensors, row, image_id) != int(checksums[row]) % 2**64:
                raise self._damaged(shard, row, image_id)
            for name, target in targets.items():
                target[at] = tensors[name][row]
        return found

    def of(self, inputs: dict[str, Tensor]) -> Tensor:
        if "scales" not in inputs:
            return inputs["features"]
        return inputs["features"].to(self.dtype) * inputs["scales"][..., None]

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
        self._shards.append(({name: as_array(tensor) for name, tensor in tensors.items()}, checksums.numpy()))

    def _damaged(self, shard: int, row: int, image_id: int) -> UserError:
        path = self._folder / self.manifest["shards"][shard]["file"]
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
            start = json.loads(file.read(header))["features"]["data_offsets"][0]
        offset = 8 + header + start + row * self._shards[shard][0]["features"][row].nbytes
        return damaged(path, offset, f"It is in the features of image {image_id}. {_REMAKE}")


def as_array(tensor: Tensor) -> np.ndarray:
    """View a tensor as numpy does; bfloat16, which numpy does not know, as its bits."""
    return tensor.view(torch.int16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
