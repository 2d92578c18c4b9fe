"""Images to features: threads decode the next images while the encoder looks at these, and another writes the last shard.

Legend of shape suffixes: N images, C channels, H and W pixels.
"""

import itertools
import operator
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import torch
from torch import Tensor

from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.records import ImageRecord
from vlm_vqa.features.writer import FeatureStoreWriter, Shard
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.prefetch import ordered_map

MOST_THREADS = 8  # that decode: each holds a batch of images' pixels, and some of the work holds Python's lock


Batch = tuple[int, list[ImageRecord]]  # a shard's number and some of its images
Prepared = tuple[int, list[int], Tensor]  # the same with their ids, and what the model reads: float32 [N, C, H, W]


def extract(
    numbers: Iterable[int],
    images_of: Callable[[range], Iterable[ImageRecord]],
    encoder: Encoder,
    writer: FeatureStoreWriter,
    batch_size: int,
    max_pixels: int,
    on_images: Callable[[int], object],
) -> None:
    """Make the shards `numbers`; the next is asked for when its first image is to be decoded. `images_of` gives the
    images at some places of the data's order; `on_images` is told how many more were looked at. A batch never reaches
    beyond a shard, so it depends on the data and `batch_size` alone. UserError as for `preprocessed` and `Shard.add`."""

    def batches() -> Iterator[Batch]:
        for number in numbers:
            images = iter(images_of(writer.layout.places(number)))
            while batch := list(itertools.islice(images, batch_size)):
                yield number, batch

    def shards(prepared: Iterable[Prepared]) -> Iterator[Shard]:
        for number, parts in itertools.groupby(prepared, operator.itemgetter(0)):
            shard = Shard(writer.layout, number)
            for _, image_ids, pixels_NCHW in parts:
                shard.add(image_ids, encoder.encode_pixels(pixels_NCHW))
                on_images(len(image_ids))
            yield shard

    with closing(preprocessed(batches(), encoder, max_pixels)) as prepared, ThreadPoolExecutor(1, "write") as pool:
        for _ in ordered_map(pool, writer.write, shards(prepared), window=2):
            pass


def preprocessed(batches: Iterable[Batch], encoder: Encoder, max_pixels: int) -> Generator[Prepared]:
    """Decode and preprocess images in threads, ahead of what is asked for: one thread a core that torch uses,
    `MOST_THREADS` at most, each with one decoded image at a time, and one batch more under way or waiting than there are
    threads. Close the iterator when you leave it early: that ends the threads. UserError, in its batch's turn, if an
    image cannot be decoded or is larger than `max_pixels`."""

    def prepare(batch: Batch) -> Prepared:
        shard, images = batch
        decoded = (open_image(image.data, image.file_name, max_pixels) for image in images)
        pixels_NCHW = encoder.preprocess(decoded)
        pixels_NCHW = pixels_NCHW.pin_memory() if encoder.model.device.type == "cuda" else pixels_NCHW
        return shard, [image.image_id for image in images], pixels_NCHW

    threads = min(MOST_THREADS, torch.get_num_threads())
    # torch's number of threads is each thread's own: without this every decoding one would start a team.
    pool = ThreadPoolExecutor(threads, "decode", torch.set_num_threads, (1,))
    try:
        yield from ordered_map(pool, prepare, batches, window=threads + 1)
    finally:
        pool.shutdown(cancel_futures=True)
