"""Stage 2: encode every image once with the frozen vision tower and store its features.

Reads data/records; writes data/features, and before that data/features.parts, from where a run that was ended goes on.
Started by `accelerate launch --config_file launch/NAME.yaml stages/extract_features.py`.
"""

import vlm_vqa  # noqa: F401 - first: from here on Ctrl-C ends without a traceback

# isort: split
import logging
import time
from pathlib import Path

import torch
from tqdm import tqdm

from vlm_vqa import cores, workers
from vlm_vqa.checks import check_here
from vlm_vqa.data import records
from vlm_vqa.data.feature_store import Layout
from vlm_vqa.features import extract, live
from vlm_vqa.features.writer import FeatureStoreWriter
from vlm_vqa.hashing import code_hash
from vlm_vqa.model import encoder
from vlm_vqa.model.encoder import Encoder, load_encoder
from vlm_vqa.params import Params, load_params
from vlm_vqa.pipeline import entrypoint
from vlm_vqa.workers import POLL_SECONDS, WorkerGroup

RECORDS = Path("data/records")
FEATURES = Path("data/features")

logger = logging.getLogger(__name__)


def main() -> None:
    params = load_params("params.yaml", whole=True)
    vision = params.vision
    running = workers.join(vision.launch)
    # The first process may tokenise for minutes: after they have met, the others wait for it without end.
    check_here(params, run=True)
    manifest = records.read_manifest(RECORDS)
    loaded = load_encoder(vision, running.device, params.model)
    layout = Layout(manifest["images"], loaded.num_tokens, loaded.width, vision.store_dtype)
    made_by = {
        "encoder_hash": loaded.hash,
        "processor": encoder.processor_settings(loaded.processor),
        "compute_dtype": vision.compute_dtype.value,
        "data_hash": manifest["data_hash"],
    }
    if not vision.store:
        if running.main:
            live.describe(FEATURES, layout, made_by | {"live": live.how_live(params)})
            logger.info("vision.store is false: the tower looks at %d pictures as they are needed", layout.images)
        return
    # What decides the last bits of features beside the encoder and the data; shards that other code has made are not used.
    on_gpu = running.device.type == "cuda"
    device = torch.cuda.get_device_name(running.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    computed_by = {"device": device, "torch": torch.__version__, "code": code_hash(__file__)}
    writer = FeatureStoreWriter(FEATURES, layout, made_by, computed_by | {"batch_size": vision.batch_size})
    if running.main:
        where = f"{running.size} x {running.device.type}, threads {running.threads}"
        logger.info("%d images with %s on %s", layout.images, params.model.checkpoint or vision.model, where)
        running.broadcast("missing", writer.begin())
    make(running.wait_for("missing"), running, loaded, writer, params)
    if running.main:
        writer.publish()


def make(missing: list[int], running: WorkerGroup, loaded: Encoder, writer: FeatureStoreWriter, params: Params) -> None:
    """Make shards together with the other processes; the main one shows the progress of all, and waits for all."""
    left = sum(len(writer.layout.places(number)) for number in missing)
    images = writer.layout.images
    crowd = cores.Crowd(running.threads)
    with tqdm(
        total=images, initial=images - left, unit=" images", desc="extract-features", disable=not running.main
    ) as progress:

        def show(more: int) -> None:
            progress.update(running.add("images", more) + images - left - progress.n)
            if running.main and (busy := crowd.notice(cores.waits())):
                logger.warning(busy)

        extract.extract(
            running.claim(missing),
            lambda places: records.iter_images(RECORDS, places.start, places.stop),
            loaded,
            writer,
            params.vision.batch_size,
            params.data.max_image_pixels,
            show,
        )
        running.add("finished", 1)
        while running.main and running.add("finished") < running.size:
            show(0)
            time.sleep(POLL_SECONDS)
        show(0)


if __name__ == "__main__":
    entrypoint.run("extract-features", main)
