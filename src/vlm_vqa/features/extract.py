"""Images to features: threads or processes decode the next images while the encoder looks at these, and a thread writes the
last shard.

Legend of shape suffixes: N images, C channels, H and W pixels.
"""

import itertools
import logging
import multiprocessing
import operator
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path

import torch
import torch.multiprocessing
from torch import Tensor

from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.records import ImageRecord
from vlm_vqa.errors import UserError
from vlm_vqa.features.writer import FeatureStoreWriter, Shard
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.pipeline import orphans
from vlm_vqa.prefetch import ordered_map

MOST_AT_ONCE = 8
"""Threads or processes that decode: each holds a batch of images' pixels."""
SHARED_MEMORY, ENOUGH_SHARED_MEMORY = Path("/dev/shm"), 2**30
"""Where tensors lie that go from process to process, and the bytes that nine batches of 64 at 224 x 224 take three times."""

log = logging.getLogger(__name__)

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
    """Decode and preprocess images ahead of what is asked for: one thread or process (see `in_processes`) a core that torch
    uses, `MOST_AT_ONCE` at most, each with one decoded image at a time, and one batch more under way or waiting than there
    are of them. Close the iterator when you leave it early: that ends them. UserError, in its batch's turn, if an image
    cannot be decoded or is larger than `max_pixels`, or if a process was ended."""

    def prepare(batch: Batch) -> Prepared:
        shard, images = batch
        decoded = (open_image(image.data, image.file_name, max_pixels) for image in images)
        return shard, [image.image_id for image in images], encoder.preprocess(decoded)

    on_gpu, at_once = encoder.model.device.type == "cuda", min(MOST_AT_ONCE, torch.get_num_threads())
    pool: Executor
    decode: Callable[[Batch], Prepared] = prepare
    if in_processes(encoder):
        # Forked, as data loaders' workers are: each has what `prepare` needs, and none touches the GPU.
        pool = ProcessPoolExecutor(at_once, multiprocessing.get_context("fork"), _begin_process, (prepare,))
        decode = _prepare_in_process
    else:
        # torch's number of threads is each thread's own: without this every decoding one would start a team.
        pool = ThreadPoolExecutor(at_once, "decode", torch.set_num_threads, (1,))
    try:
        for shard, image_ids, pixels_NCHW in ordered_map(pool, decode, batches, window=at_once + 1):
            yield shard, image_ids, pixels_NCHW.pin_memory() if on_gpu else pixels_NCHW
    except BrokenProcessPool as error:
        raise UserError(
            "A process that decodes pictures was ended from outside, perhaps for want of memory (or of /dev/shm: "
            "docker run --shm-size). Make vision.batch_size smaller; run again, and finished shards are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def in_processes(encoder: Encoder) -> bool:
    """Whether images are decoded in processes: an encoder on a GPU is faster than all threads together, which wait for
    Python's lock. Where shared memory is small, as in a container without --shm-size, threads must do."""
    if encoder.model.device.type != "cuda":
        return False
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if free < ENOUGH_SHARED_MEMORY:
        log.warning("%s has %d MiB free: pictures are decoded by threads, slower", SHARED_MEMORY, free >> 20)
    return free >= ENOUGH_SHARED_MEMORY


_prepare: Callable[[Batch], Prepared]
"""What a decoding process does with a batch."""


def _begin_process(prepare: Callable[[Batch], Prepared]) -> None:
    global _prepare
    _prepare = prepare
    orphans.die_with_parent()
    stage = multiprocessing.parent_process()
    if stage is None or os.getppid() != stage.pid:
        os._exit(1)  # it was killed before this
    # It ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _prepare_in_process(batch: Batch) -> Prepared:
    return _prepare(batch)
