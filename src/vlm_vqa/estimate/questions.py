"""The questions: how many there are and how long, from data/records or by what is known of the source, and their batches.

Without a tokenizer a text's tokens are estimated: one for each word, digit and punctuation mark. On 29,761 real VQAv2
questions that is within 1 % (questions) and 5 % (answers) of a byte-level BPE of 30,000 tokens trained on them; Gemma's own
tokenizer could not be had offline. Batches come from training's own sampler, on a sample of the questions.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vlm_vqa.data.records import MANIFEST, load_questions, read_manifest
from vlm_vqa.errors import UserError
from vlm_vqa.model.flops import Work, rows_work
from vlm_vqa.model.layout import QuestionTokens, Row
from vlm_vqa.params import Mask, Params, Source
from vlm_vqa.training.windows import WindowSampler, WindowShape

TOKEN = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_")
SAMPLED_IMAGES = 2000
"""Images whose questions are sampled."""
WINDOWS = 40
"""Optimizer steps that are laid out."""
# Tokens of a question and its newline, of an answer and its <eos>: middles of twentieths of all, in order.
VQAV2_QUESTION = (5, 6, 6, 7, 7, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 11, 13)
VQAV2_ANSWER = (2,) * 19 + (4,)
EASY_QUESTION = (6, 6, 7, 7, 7, 7, 7, 7, 7, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 11)


class Counts(NamedTuple):
    """One split."""

    questions: int
    images: int


# By identity: equal ones are the same one, and what is laid out of it is kept.
@dataclass(frozen=True, eq=False)
class DatasetSize:
    """The counts of both splits, and a sample of the training questions."""

    splits: dict[str, Counts]
    image_ids: Sequence[int]
    """Of each sampled question; then its tokens with its newline, and its answer's with <eos>."""
    questions: Sequence[int]
    answers: Sequence[int]
    instruction: int
    """Tokens of <bos>, instruction and newline."""
    image_bytes: int
    """Of an image's file, on average."""
    download: int
    """Bytes that fetch-vqav2 transfers."""
    basis: str

    @property
    def images(self) -> int:
        return sum(split.images for split in self.splits.values())


def tokens(text: str) -> int:
    """Estimate a text's tokens."""
    return len(TOKEN.findall(text))


def read_size(params: Params, records: Path) -> DatasetSize:
    """Return what `records` hold if they are of `data.source`, else what is known of the source.

    Raises:
        UserError: the source is a folder of unknown content, and there are no records of it.
    """
    data, instruction = params.data, tokens(params.prompt.instruction) + 2
    if (records / MANIFEST).is_file() and (manifest := read_manifest(records)).get("source") == data.source.value:
        return _from_records(manifest, records, instruction)
    if data.source is Source.EASY_VQA:
        splits = {"train": Counts(38_575, 4_000), "val": Counts(9_673, 1_000)}
        basis = "easy-VQA's known counts; its text lengths, tokens estimated"
        return DatasetSize(splits, *_drawn(splits["train"], 2, EASY_QUESTION, (2,)), instruction, 1_300, 0, basis)
    # A folder under the official names is taken for the official files.
    if data.source is Source.DIRECTORY and not data.train.questions.startswith("v2_OpenEnded_mscoco"):
        unknown = f"data.source is directory, and how much {data.directory} holds is not known before it is read."
        raise UserError(f"{unknown} Run `dvc repro fetch-vqav2` first.")
    splits = {"train": Counts(443_757, 82_783), "val": Counts(214_354, 40_504)}
    basis = "VQAv2's known counts; text lengths of 29,761 of its questions, tokens estimated"
    drawn = _drawn(splits["train"], 3, VQAV2_QUESTION, VQAV2_ANSWER)
    # COCO's two archives of train and val are 13.5 and 6.6 GB, VQAv2's four of texts together 43 MB.
    return DatasetSize(splits, *drawn, instruction, 20_100_000_000 // 123_287, 20_143_000_000, basis)


def _from_records(manifest: dict, folder: Path, instruction: int) -> DatasetSize:
    splits = {name: Counts(split["questions"], split["images"]) for name, split in manifest["splits"].items()}
    rows = load_questions(folder, "train").select_columns(["image_id", "question", "multiple_choice_answer"])
    image_ids = rows.data["image_id"].to_numpy()
    rows = rows.select(np.flatnonzero(np.isin(image_ids, np.unique(image_ids)[:SAMPLED_IMAGES])))
    questions, answers = ([tokens(text) + 1 for text in rows[key]] for key in ("question", "multiple_choice_answer"))
    stored = sum(path.stat().st_size for path in folder.glob("images-*.parquet")) // max(1, manifest["images"])
    basis = f"{folder}: {splits['train'].questions:,} training questions, tokens estimated"
    return DatasetSize(splits, list(rows["image_id"]), questions, answers, instruction, stored, 0, basis)


def _drawn(train: Counts, least: int, *quantiles: Sequence[int]) -> list[list[int]]:
    """Draw a sample: images' questions, the `least` number and a Poisson number more, and lengths by their quantiles."""
    generator = torch.Generator().manual_seed(0)
    more = torch.full((min(SAMPLED_IMAGES, train.images),), train.questions / train.images - least)
    counts = least + torch.poisson(more, generator=generator).long()
    ids = torch.repeat_interleave(torch.arange(len(counts)), counts)
    draws = [torch.tensor(one)[torch.randint(len(one), ids.shape, generator=generator)] for one in quantiles]
    return [one.tolist() for one in (ids, *draws)]


class Batch(NamedTuple):
    """What a forward pass of one process holds: rows, a prefix that attends to itself alone (0 under prefix-lm), width."""

    work: Work
    rows: int
    prefix: int
    width: int

    @property
    def pairs(self) -> int:
        """(query, key) pairs that eager attention computes, seen or not."""
        return self.rows * (self.prefix**2 + (self.width - self.prefix) * self.width)


class Batches(NamedTuple):
    """A sample of the batches of all processes, and what they add up to."""

    sample: list[Batch]
    work: Work
    """Of the whole training, over all processes."""
    steps: int
    questions_a_step: int
    questions_a_row: float


class _Lengths(NamedTuple):
    """What `rows_work` asks of a layout."""

    mask: Mask
    num_patches: int
    prefix: tuple[int, ...]


def plan_batches(params: Params, processes: int, size: DatasetSize) -> Batches:
    """Lay out a sample of optimizer steps under `params` and `processes`."""
    train = params.train
    passes = train.gradient_accumulation_steps * processes
    # One process with all the passes divides a window as several do.
    window = WindowShape(train.batch_size * passes, train.questions_per_row, passes)
    layout = _Lengths(params.prompt.mask, params.vision.num_patches, (0,) * size.instruction)
    return _plan(window, layout, size, train.num_train_epochs)


@lru_cache(maxsize=64)
def _plan(window: WindowShape, layout: _Lengths, size: DatasetSize, epochs: int) -> Batches:
    questions = [QuestionTokens([0] * one, [0] * two) for one, two in zip(size.questions, size.answers, strict=True)]
    lengths, prefix = [len(one.read) for one in questions], layout.num_patches + len(layout.prefix)
    closed = prefix if layout.mask is Mask.IMAGE_PREFIX else 0
    sampler = WindowSampler(size.image_ids, lambda epoch: lengths, prefix, window, seed=0)
    sample, taught = [], []
    for batch in itertools.islice(sampler, WINDOWS * window.passes):
        rows = [Row(row.image_id, tuple(questions[place] for place in row.questions)) for row in batch]
        width = prefix + max(sum(len(one.read) for one in row.questions) for row in rows)
        sample.append(Batch(rows_work(layout, rows), len(rows), closed, width))
        taught += [len(row.questions) for row in rows if row.questions]
    total, seen = size.splits["train"].questions, sum(taught)
    summed = [sum(getattr(one.work, name) for one in sample) for name in Work.__dataclass_fields__]
    work = Work(*(epochs * round(part * total / seen) for part in summed))
    steps = -(-total // window.questions) * epochs
    return Batches(sample, work, steps, window.questions, seen / len(taught))
