"""Stage export: the trained model as a folder that plain transformers opens.

Reads models/trained, data/records and data/features; writes models/export.
"""

import vlm_vqa  # noqa: F401 - first: from here on Ctrl-C ends without a traceback

# isort: split
import itertools
import json
import logging
from pathlib import Path

import torch

from vlm_vqa import cores, tracking
from vlm_vqa.data import records
from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.feature_store import Features
from vlm_vqa.errors import UserError, make_again
from vlm_vqa.features.live import open_features
from vlm_vqa.inference.export import CARD, read_training, write_export
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.inference.processor import unlike_trained
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.vlm import WEIGHTS_FILE, StoredWeights, hash_weights, trained_state
from vlm_vqa.params import load_params
from vlm_vqa.pipeline import entrypoint

RECORDS, FEATURES = Path("data/records"), Path("data/features")
TRAINED, EXPORT = Path("models/trained"), Path("models/export")
CHECKED_IMAGES = 8
COMPUTED = {torch.float32: 0.0, torch.bfloat16: 0.05}
"""By how much of the largest feature another may be off, where a tower computes in this type."""


def main() -> None:
    params = load_params("params.yaml")
    torch.set_num_threads(cores.threads().count)
    encoder = load_encoder(params.vision, "cpu", params.model)
    training = read_training(TRAINED)
    manifest = records.read_manifest(RECORDS)
    results = json.loads(Path("reports/train.json").read_text(encoding="utf-8"))
    write_export(EXPORT, TRAINED, encoder, params, training, results, manifest)
    predictor = Predictor.from_export(EXPORT, device="cpu", dtype=getattr(torch, params.export.dtype))
    features = open_features(FEATURES, {"encoder_hash": encoder.hash}, RECORDS, encoder)
    difference = compare(predictor, features, params.data.max_image_pixels)
    logging.info("%s: features from its pixels differ from those trained on by at most %.1e", EXPORT, difference)
    if reason := unlike_trained(predictor.processor, predictor.layout):
        logging.warning("%s: only its card's code computes what was trained: %s", EXPORT, reason)
    tracking.log_results(params, weights_hash=training["weights_hash"], files=[EXPORT / CARD])


def compare(predictor: Predictor, features: Features, max_pixels: int) -> float:
    """Return how far the export's features, from pixels, are from the ones trained on.

    UserError: what plain transformers reads is not what was trained, up to the rounding of the types.
    """
    dtype = predictor.model.dtype
    if hash_weights(trained_state(predictor.model)) != hash_weights(StoredWeights(TRAINED / WEIGHTS_FILE, dtype)):
        raise UserError(f"{EXPORT}: it has other weights than {TRAINED}. {make_again('export')}")
    images = list(itertools.islice(records.iter_images(RECORDS), CHECKED_IMAGES))
    pixels = [open_image(image.data, image.file_name, max_pixels) for image in images]
    stored = features.batch([image.image_id for image in images]).float()
    difference = (predictor.encode(pixels).float() - stored).abs().max().item()
    # Stored coarsely, or computed so, a feature is off by its rounding; more means another encoder or processor.
    tolerance = (features.tolerance + COMPUTED[dtype]) * stored.abs().max()
    if not difference <= tolerance:
        raise UserError(
            f"{EXPORT}: its tower sees other features than {FEATURES} holds: they differ by {difference:.1e} where "
            f"{tolerance:.1e} is rounding. {make_again('extract-features train')}"
        )
    return difference


if __name__ == "__main__":
    entrypoint.run("export", main)
