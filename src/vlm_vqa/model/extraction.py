"""Images to features: threads decode the next images while the encoder looks at these.

Legend of shape suffixes: N images, C channels, H and W pixels.
"""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import torch
from torch import Tensor
from tqdm import tqdm

from vlm_vqa.data import records
from vlm_vqa.data.feature_store import FeatureStoreWriter
from vlm_vqa.data.ordered import in_order
from vlm_vqa.data.records import ImageRecord
from vlm_vqa.model.encoder import Encoder

MOST_THREADS = 8
"""That decode: each holds a batch of decoded images, and some of the work holds Python's lock."""


def extract(
    stream: Iterable[ImageRecord],
    encoder: Encoder,
    writer: FeatureStoreWriter,
    progress: tqdm,
    batch_size: int,
    max_pixels: int,
) -> None:
    """Add what `encoder` makes of the images to the store, in order; raises what `preprocessed` and the writer raise."""
    with closing(preprocessed(stream, encoder, batch_size, max_pixels)) as batches:
        for image_ids, pixels_NCHW in batches:
            writer.add(image_ids, encoder.encode_pixels(pixels_NCHW))
            progress.update(len(image_ids))


def preprocessed(
    stream: Iterable[ImageRecord], encoder: Encoder, batch_size: int, max_pixels: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Decode and preprocess images in threads, ahead of what is asked for.

    There is one thread a core that torch uses, `MOST_THREADS` at most, and one batch more under way or waiting than
    there are threads. Close the iterator when you leave it early: that ends the threads.

    Yields:
        Image ids and float32 [N, C, H, W] of each batch, in order; an error of a batch is raised in its turn.

    Raises:
        UserError: an image cannot be decoded or is larger than `max_pixels`.
    """

    def prepare(batch: list[ImageRecord]) -> tuple[list[int], Tensor]:
        images = [records.open_image(record.data, record.file_name, max_pixels) for record in batch]
        return [record.image_id for record in batch], encoder.preprocess(images)

    threads = min(MOST_THREADS, torch.get_num_threads())
    stream = iter(stream)
    batches = iter(lambda: list(itertools.islice(stream, batch_size)), [])
    # torch's number of threads is each thread's own: without this every decoding one would start a team.
    pool = ThreadPoolExecutor(threads, "decode", torch.set_num_threads, (1,))
    try:
        yield from in_order(pool, prepare, batches, window=threads + 1)
    finally:
        pool.shutdown(cancel_futures=True)
