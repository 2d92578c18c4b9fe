"""The questions: how many there are and how long, from data/records or by what is known of the source, and their batches.

Without a tokenizer a text's tokens are estimated: one for each word, digit and punctuation mark. On 29,761 real VQAv2
questions that is within 1 % (questions) and 5 % (answers) of a byte-level BPE of 30,000 tokens trained on them. Batches come
from training's own sampler, on a sample of the questions.
"""

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from vlm_vqa.data.records import load_questions, manifest_for_a_look, said_answers
from vlm_vqa.errors import UserError
from vlm_vqa.model.flops import Work, rows_work
from vlm_vqa.model.layout import QuestionTokens, Row
from vlm_vqa.params import Mask, Params, PromptParams, Source
from vlm_vqa.training.sampler import GlobalBatchSampler, GlobalBatchShape

TOKEN = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_")
SAMPLED_IMAGES, WINDOWS = 2000, 40  # images whose questions are sampled; optimizer steps that are laid out of them
# Tokens of a question and its newline, of an answer and its <eos>: middles of twentieths of all, in order.
VQAV2_QUESTION = (5, 6, 6, 7, 7, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 11, 13)
EASY_QUESTION = (6, 6, 7, 7, 7, 7, 7, 7, 7, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 11)
VQAV2_DISTINCT = (1,) * 7 + (2,) * 6 + (3, 3, 4, 5, 6, 7, 9)  # answers of a question that differ, likewise
Sample = tuple[tuple[int, int, int], ...]  # questions' images, tokens with the newline, the answers' with <eos>


class DatasetSize(NamedTuple):
    """Questions of each split, images of both, bytes of a mean image file, bytes to download, and where that comes from.

    `branches` are the sample's questions once for each distinct answer, as validation reads them.
    """

    train: int
    val: int
    images: int
    image_bytes: int
    download: int
    basis: str
    sample: Sample
    branches: Sample


def tokens(text: str) -> int:
    return len(TOKEN.findall(text))


def read_size(params: Params, records: Path) -> DatasetSize:
    """Return what `records` hold if they are of `data.source`, else what is known of it; UserError where nothing is."""
    data = params.data
    manifest = manifest_for_a_look(records)
    if manifest is not None and manifest.get("source") == data.source.value:
        return _from_records(manifest, records)
    if data.source is Source.EASY_VQA:
        samples = _drawn(4_000, 38_575, 2, EASY_QUESTION, (2,), (1,))
        return DatasetSize(38_575, 9_673, 5_000, 1_300, 0, "easy-VQA's known counts and lengths of texts", *samples)
    # A folder under the official names is taken for the official files.
    if data.source is Source.DIRECTORY and not data.train.questions.startswith("v2_OpenEnded_mscoco"):
        unknown = f"data.source is directory, and how much {data.directory} holds is not known before it is read."
        raise UserError(f"{unknown} Run `dvc repro fetch-vqav2` first.")
    samples = _drawn(82_783, 443_757, 3, VQAV2_QUESTION, (2,) * 19 + (4,), VQAV2_DISTINCT)
    basis = "VQAv2's known counts, and lengths of 29,761 of its questions"
    # COCO's two archives of train and val are 13.5 and 6.6 GB, VQAv2's four of texts together 43 MB.
    download = 0 if data.source is Source.DIRECTORY else 20_143_000_000
    return DatasetSize(443_757, 214_354, 123_287, 20_100_000_000 // 123_287, download, basis, *samples)


def _from_records(manifest: dict, folder: Path) -> DatasetSize:
    rows = load_questions(folder, "train", ["image_id", "question", "multiple_choice_answer", "answers"])
    ids = rows.data["image_id"].to_numpy()
    rows = rows.select(np.flatnonzero(np.isin(ids, np.unique(ids)[:SAMPLED_IMAGES])))
    sample, branches = [], []
    for row in rows.to_list():
        # Its answers that differ, the main one first.
        answers = dict.fromkeys([row["multiple_choice_answer"], *said_answers(row["answers"])])
        found = [(row["image_id"], tokens(row["question"]) + 1, tokens(answer) + 1) for answer in answers]
        sample.append(found[0])
        branches += found
    train, val = (manifest["splits"][name]["questions"] for name in ("train", "val"))
    each = sum(path.stat().st_size for path in folder.glob("images-*.parquet")) // max(1, manifest["images"])
    return DatasetSize(train, val, manifest["images"], each, 0, str(folder), tuple(sample), tuple(branches))


def _drawn(images: int, questions: int, least: int, *quantiles: Sequence[int]) -> tuple[Sample, Sample]:
    """Draw a sample and its branches: images' questions, the `least` number and a Poisson number more, lengths of questions
    and answers and the number of distinct answers by their quantiles."""
    generator = torch.Generator().manual_seed(0)
    more = torch.full((min(SAMPLED_IMAGES, images),), questions / images - least)
    counts = least + torch.poisson(more, generator=generator).long()
    ids = torch.repeat_interleave(torch.arange(len(counts)), counts)
    draws = [torch.tensor(one)[torch.randint(len(one), ids.shape, generator=generator)] for one in quantiles]
    *columns, distinct = (one.tolist() for one in (ids, *draws))
    sample = tuple(zip(*columns, strict=True))
    return sample, tuple(one for one, answers in zip(sample, distinct, strict=True) for _ in range(answers))


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
    """A sample of the batches of all processes, the work of the whole training, its optimizer steps and their questions."""

    sample: list[Batch]
    work: Work
    steps: int
    questions_a_step: int
    questions_a_row: float


def plan_batches(params: Params, processes: int, size: DatasetSize) -> Batches:
    """Lay out a sample of optimizer steps under `params` and `processes`."""
    train = params.train
    micro_batches = train.gradient_accumulation_steps * processes
    # One process with all the micro_batches divides a global batch as several do.
    shape = GlobalBatchShape(train.batch_size * micro_batches, train.questions_per_row, micro_batches)
    sample, means, row = _laid_out(shape, params.prompt, params.vision.num_patches, size.sample)
    work = Work(*(train.num_train_epochs * round(part * size.train) for part in means))
    return Batches(sample, work, -(-size.train // shape.questions) * train.num_train_epochs, shape.questions, row)


def validation_work(params: Params, size: DatasetSize) -> Work:
    """Return the work of one validation: its questions with every distinct answer, with their own images and with others."""
    train, settings = params.train, params.validation
    shape = GlobalBatchShape(train.batch_size, train.questions_per_row, 1)
    _, means, _ = _laid_out(shape, params.prompt, params.vision.num_patches, size.branches)
    questions = 2 * settings.questions + settings.train_questions
    return Work(*(round(part * questions * len(size.branches) / len(size.sample)) for part in means))


@lru_cache(maxsize=64)
def _laid_out(
    shape: GlobalBatchShape, prompt: PromptParams, num_patches: int, sample: Sample
) -> tuple[list[Batch], list[float], float]:
    """Return batches, the mean work of a question, and the questions of a row."""
    # <bos>, the instruction, a newline.
    instruction = tokens(prompt.instruction) + 2
    # What `rows_work` asks of a `TokenLayout`.
    layout: Any = SimpleNamespace(mask=prompt.mask, num_patches=num_patches, prefix=range(instruction))
    questions = [QuestionTokens([0] * one, [0] * two) for _, one, two in sample]
    lengths, prefix = [len(one.read) for one in questions], num_patches + instruction
    sampler = GlobalBatchSampler([image for image, *_ in sample], lambda epoch: lengths, prefix, shape, seed=0)
    batches, taught = [], []
    for batch in itertools.islice(sampler, WINDOWS * shape.micro_batches):
        rows = [Row(row.image_id, tuple(questions[place] for place in row.questions)) for row in batch]
        width = prefix + max(sum(len(one.read) for one in row.questions) for row in rows)
        batches.append(Batch(rows_work(layout, rows), len(rows), prefix * (prompt.mask is not Mask.PREFIX_LM), width))
        taught += [len(row.questions) for row in rows if row.questions]
    work = [sum(getattr(one.work, name) for one in batches) / sum(taught) for name in Work.__dataclass_fields__]
    return batches, work, sum(taught) / len(taught)
