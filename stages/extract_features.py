"""Stage 2: look at every image once with the frozen DINOv2 and store what it saw.

Reads data/records; writes data/features.
"""

import logging
from pathlib import Path

import torch
from tqdm import tqdm

from vlm_vqa import stage
from vlm_vqa.data import records
from vlm_vqa.data.feature_store import FeatureStoreWriter
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.extraction import extract
from vlm_vqa.params import load_params

RECORDS = Path("data/records")
FEATURES = Path("data/features")

logger = logging.getLogger(__name__)


def main() -> None:
    params = load_params("params.yaml")
    vision = params.vision
    data_hash = records.read_manifest(RECORDS)["data_hash"]
    images = records.count_images(RECORDS)
    encoder = load_encoder(vision)
    made_by = {
        "encoder_hash": encoder.hash,
        "processor": encoder.processor_settings,
        "compute_dtype": vision.compute_dtype.value,
        "data_hash": data_hash,
    }
    logger.info("%d images with %s on %s", images, vision.model, encoder.model.device)
    with (
        FeatureStoreWriter(
            FEATURES,
            images=images,
            num_tokens=encoder.num_tokens,
            width=encoder.width,
            dtype=getattr(torch, vision.store_dtype.value),
            made_by=made_by,
        ) as writer,
        tqdm(total=images, unit=" images", desc="extract-features") as progress,
    ):
        stream = records.iter_images(RECORDS)
        extract(stream, encoder, writer, progress, vision.batch_size, params.data.max_image_pixels)


if __name__ == "__main__":
    stage.run("extract-features", main)
