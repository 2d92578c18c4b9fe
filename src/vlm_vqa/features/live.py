"""Features that are never stored: pictures are decoded where a batch is put together, and the tower looks at them there
where the batch is used. What is kept of `vision.store: false` is a manifest, so that later stages know what to do.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.feature_store import MANIFEST, SCHEMA_VERSION, Features, FeatureStore, Layout, read_manifest
from vlm_vqa.data.records import Images
from vlm_vqa.params import Params
from vlm_vqa.sealed import write_sealed


class Tower(Protocol):
    """What looks at pictures: an `Encoder`, or a `Predictor` with its own."""

    def preprocess(self, images: Iterable[Image.Image]) -> Tensor:
        """Bring images to what the tower reads: [N, C, H, W] float32 on the CPU."""

    def encode_pixels(self, pixels_NCHW: Tensor, /) -> Tensor:
        """Return features [N, T, D] on the tower's device."""


class LiveFeatures(Features):
    """Features made of the records' pictures whenever they are asked for, in the type in which they would be stored."""

    live = True

    def __init__(self, folder: str | Path, expected: dict[str, Any] | None, records: str | Path, tower: Tower):
        """`folder` has the manifest. UserError as `Features`."""
        super().__init__(folder, expected)
        self._images, self._tower = Images(records), tower

    def inputs(self, image_ids: Sequence[int]) -> dict[str, Tensor]:
        most = self.manifest["live"]["max_image_pixels"]
        decoded = (open_image(one.data, one.file_name, most) for one in map(self._images.__getitem__, image_ids))
        return {"pixels": self._tower.preprocess(decoded)}

    def of(self, inputs: dict[str, Tensor]) -> Tensor:
        # As many at once as extract-features would have looked at.
        parts = inputs["pixels"].split(self.manifest["live"]["batch_size"])
        return torch.cat([self._tower.encode_pixels(part).to(self.dtype) for part in parts])


def how_live(params: Params) -> dict[str, Any] | None:
    """Return what the manifest holds as `live`: None where features are stored."""
    at_once, most = params.vision.batch_size, params.data.max_image_pixels
    return None if params.vision.store else {"batch_size": at_once, "max_image_pixels": most}


def describe(folder: Path, layout: Layout, made_by: dict[str, Any]) -> None:
    """Write the manifest of features that are not stored; `made_by` as for a store, with `live` among it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    described = asdict(layout) | {"dtype": layout.dtype.value, "shards": []}
    del described["shard_bytes"]
    write_sealed(folder / MANIFEST, {**made_by, "schema_version": SCHEMA_VERSION, **described})


def open_features(folder: str | Path, expected: dict[str, Any], records: str | Path, tower: Tower) -> Features:
    """Open what `folder` describes; UserError as `Features`, or for a store that is not finished."""
    if read_manifest(folder, expected).get("live") is None:
        return FeatureStore(folder, expected)
    return LiveFeatures(folder, expected, records, tower)
