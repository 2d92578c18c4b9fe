"""Image features on disk: the format of `data/features`, written once and read by memory map.

`features-NNNNN-of-NNNNN.safetensors` hold two tensors each: `features` [images, T, D] and `image_ids` int64 [images].
`manifest.json` says what made them and is written last, so a store that was not finished does not open.

Legend of shape suffixes: N images, T tokens an image, D width.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import write_json

SCHEMA_VERSION = 1
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
# A shard is gathered in memory before it is written.
_SHARD_BYTES = 256 * 2**20
_REMAKE = "Run `dvc repro extract-features` to make the features again."


class FeatureStoreWriter:
    """Writes a feature store shard by shard; the memory it takes is one shard's.

    Use it as a context manager: leaving the block completes the store, an exception leaves one that does not open.
    An earlier store in the folder is removed first.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        images: int,
        num_tokens: int,
        width: int,
        dtype: torch.dtype,
        made_by: dict[str, Any],
        shard_bytes: int = _SHARD_BYTES,
    ):
        """
        Args:
            folder: is made where missing.
            images: how many will be added.
            num_tokens, width: T and D of each.
            dtype: torch.float32, bfloat16 or float16; features are rounded to it.
            made_by: goes into the manifest as it is; holds `encoder_hash`, `data_hash` and `compute_dtype`.
            shard_bytes: about how large a file becomes.
        """
        self._folder = Path(folder)
        self._shape = (num_tokens, width)
        self._dtype = dtype
        self._made_by = made_by
        self._images = images
        image_bytes = num_tokens * width * dtype.itemsize
        self._per_shard = max(1, min(images, shard_bytes // image_bytes))
        self._shards = -(-images // self._per_shard)
        self._seen: set[int] = set()
        self._written: list[dict[str, Any]] = []
        self._ids: list[int] = []
        self._buffer = torch.empty(self._per_shard, *self._shape, dtype=dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        # The manifest goes first: it is what makes a store out of the files.
        (self._folder / MANIFEST).unlink(missing_ok=True)
        for old in self._folder.glob("features-*.safetensors"):
            old.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._finish()

    def add(self, image_ids: Sequence[int], features_NTD: Tensor) -> None:
        """Add features [N, T, D] of any floating type and device, in the order in which they are to lie.

        Raises:
            UserError: an image was added before, or its features are not finite in the store's dtype.
        """
        if features_NTD.shape != (len(image_ids), *self._shape):
            raise ValueError(
                f"features of shape {tuple(features_NTD.shape)} for {len(image_ids)} images of {self._shape}"
            )
        features_NTD = features_NTD.detach().to("cpu", self._dtype)
        finite_N = torch.isfinite(features_NTD).flatten(1).all(1)
        for image_id, features_TD, finite in zip(image_ids, features_NTD, finite_N.tolist(), strict=True):
            if image_id in self._seen:
                raise UserError(f"image {image_id} comes twice. Run `dvc repro fetch-vqav2` to make the records again.")
            if not finite:
                raise UserError(
                    f"image {image_id}: its features are not finite as {_name(self._dtype)}. Set "
                    "vision.store_dtype and vision.compute_dtype to float32 or bfloat16."
                )
            self._seen.add(image_id)
            self._buffer[len(self._ids)].copy_(features_TD)
            self._ids.append(image_id)
            if len(self._ids) == self._per_shard:
                self._write_shard()

    def _write_shard(self) -> None:
        path = self._folder / f"features-{len(self._written):05d}-of-{self._shards:05d}.safetensors"
        tensors = {"features": self._buffer[: len(self._ids)], "image_ids": torch.tensor(self._ids, dtype=torch.int64)}
        save_file(tensors, path)
        path.chmod(0o644)  # safetensors makes files that only their owner can read
        self._written.append({"file": path.name, "images": len(self._ids), "bytes": path.stat().st_size})
        self._ids.clear()

    def _finish(self) -> None:
        if self._ids:
            self._write_shard()
        if len(self._seen) != self._images:
            raise UserError(
                f"{self._folder}: {len(self._seen)} images came where the records count {self._images}. "
                "Run `dvc repro fetch-vqav2` to make the records again."
            )
        manifest = {
            **self._made_by,
            "schema_version": SCHEMA_VERSION,
            "images": self._images,
            "num_tokens": self._shape[0],
            "width": self._shape[1],
            "dtype": _name(self._dtype),
            "shards": self._written,
        }
        write_json(self._folder / MANIFEST, manifest)


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
        self.dtype: torch.dtype = getattr(torch, self.manifest["dtype"])
        self._shards: list[Tensor] = []
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

    def __getitem__(self, image_id: int) -> Tensor:
        """[T, D] in the store's dtype, a copy.

        Raises:
            UserError: there is no such image.
        """
        return self.batch([image_id])[0]

    def batch(self, image_ids: Sequence[int]) -> Tensor:
        """[N, T, D] in the store's dtype, in the order asked for; an id may be asked for more than once.

        Raises:
            UserError: there is no such image.
        """
        features_NTD = torch.empty(len(image_ids), self.num_tokens, self.width, dtype=self.dtype)
        for target_TD, image_id in zip(features_NTD, image_ids, strict=True):
            try:
                shard, row = self._places[int(image_id)]
            except KeyError:
                raise UserError(f"{self._folder}: has no features of image {image_id}. {_REMAKE}") from None
            target_TD.copy_(self._shards[shard][row])
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
                features, image_ids = file.get_tensor("features"), file.get_tensor("image_ids")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}). {_REMAKE}") from error
        shape = (entry["images"], self.num_tokens, self.width)
        if features.shape != shape or features.dtype != self.dtype or image_ids.shape != shape[:1]:
            raise UserError(f"{path}: its tensors are not those that the manifest names. {_REMAKE}")
        for row, image_id in enumerate(image_ids.tolist()):
            if image_id in self._places:
                raise UserError(f"{path}: image {image_id} is in the store twice. {_REMAKE}")
            self._places[image_id] = (len(self._shards), row)
        self._shards.append(features)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); the store is missing or unfinished. {_REMAKE}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of features ({error!r}). {_REMAKE}") from error
    if version != SCHEMA_VERSION:
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
        raise UserError(f"{folder}: these features do not belong to this run. {details}. {_REMAKE}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
