"""How many questions and images there are and how long the texts are: from data/records, or what is known of the source.

Without a tokenizer a text's tokens are estimated: one for each word, digit and punctuation mark. On 29,761 real VQAv2
questions that is within 1 % (questions) and 5 % (answers) of a byte-level BPE of 30,000 tokens trained on them; Gemma's own
tokenizer could not be had offline.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from vlm_vqa.data.records import MANIFEST, load_questions
from vlm_vqa.errors import UserError, make_again
from vlm_vqa.params import Params, Source

RECORDS = Path("data/records")
TOKEN = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_")
SAMPLED_IMAGES = 2000
"""Images whose questions are laid out to see what a forward pass holds."""
_VQAV2_QUESTION = (5, 6, 6, 7, 7, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 11, 13)
_VQAV2_ANSWER = (2,) * 19 + (4,)
_EASY_QUESTION = (6, 6, 7, 7, 7, 7, 7, 7, 7, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 11)
_EASY_ANSWER = (2,)


class Counts(NamedTuple):
    """One split."""

    questions: int
    images: int


class Known(NamedTuple):
    """What is known of a source without its data."""

    splits: dict[str, Counts]
    least: int
    """Questions of an image, at least."""
    questions: Sequence[int]
    """Tokens of a question and its newline: middles of twentieths of all questions, in order."""
    answers: Sequence[int]
    """Tokens of an answer and its <eos>, alike."""
    image_bytes: int
    """Of an image's file, on average."""
    download: int
    """Bytes that fetch-vqav2 transfers."""
    basis: str


# COCO's two archives of train and val are 13.5 and 6.6 GB, VQAv2's four of texts together 43 MB.
VQAV2 = Known(
    {"train": Counts(443_757, 82_783), "val": Counts(214_354, 40_504)}, 3, _VQAV2_QUESTION, _VQAV2_ANSWER,
    20_100_000_000 // 123_287, 20_143_000_000,
    "VQAv2's known counts; text lengths of 29,761 of its questions, tokens estimated",
)  # fmt: skip
EASY = Known(
    {"train": Counts(38_575, 4_000), "val": Counts(9_673, 1_000)}, 2, _EASY_QUESTION, _EASY_ANSWER, 1_300, 0,
    "easy-VQA's known counts; its text lengths, tokens estimated",
)  # fmt: skip


# By identity: equal ones are the same one, and what is laid out of it is kept.
@dataclass(frozen=True, eq=False)
class Texts:
    """A sample of the training questions, and the counts of both splits."""

    splits: dict[str, Counts]
    image_ids: tuple[int, ...]
    """Of each sampled question."""
    questions: tuple[int, ...]
    """Tokens of each with its newline."""
    answers: tuple[int, ...]
    """Tokens of each answer with its <eos>."""
    instruction: int
    """Tokens of <bos>, instruction and newline."""
    image_bytes: int
    download: int
    basis: str

    @property
    def images(self) -> int:
        return sum(split.images for split in self.splits.values())


def tokens(text: str) -> int:
    """Estimate a text's tokens."""
    return len(TOKEN.findall(text))


def read_texts(params: Params, folder: Path = RECORDS) -> Texts:
    """Return what data/records holds if they are of `data.source`, else what is known of the source.

    Raises:
        UserError: the source is a folder of unknown content, and there are no records of it.
    """
    instruction = tokens(params.prompt.instruction) + 2
    manifest = _manifest(folder)
    if manifest.get("source") == params.data.source.value:
        return _from_records(manifest, folder, instruction)
    return _drawn(_known(params), instruction)


def _manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST}: not JSON ({error}). {make_again('fetch-vqav2')}") from error


def _known(params: Params) -> Known:
    if params.data.source is Source.EASY_VQA:
        return EASY
    # A folder under the official names is taken for the official files.
    if params.data.source is not Source.DIRECTORY or params.data.train.questions.startswith("v2_OpenEnded_mscoco"):
        return VQAV2
    raise UserError(
        f"data.source is directory, and how much {params.data.directory} holds is not known before it is read. Run "
        "`dvc repro fetch-vqav2` first."
    )


def _from_records(manifest: dict, folder: Path, instruction: int) -> Texts:
    splits = {name: Counts(split["questions"], split["images"]) for name, split in manifest["splits"].items()}
    rows = load_questions(folder, "train")
    sampled = set(sorted(set(rows["image_id"]))[:SAMPLED_IMAGES])
    columns = zip(rows["image_id"], rows["question"], rows["multiple_choice_answer"], strict=True)
    kept = [
        (image, tokens(question) + 1, tokens(answer) + 1) for image, question, answer in columns if image in sampled
    ]
    stored = sum(path.stat().st_size for path in folder.glob("images-*.parquet"))
    return Texts(
        splits, *zip(*kept, strict=True), instruction, stored // max(1, manifest["images"]), 0,
        f"{folder}: {splits['train'].questions:,} training questions, tokens estimated",
    )  # fmt: skip


def _drawn(known: Known, instruction: int) -> Texts:
    """Draw questions of a sample of images: the least number and a Poisson number more, lengths by their quantiles."""
    generator = torch.Generator().manual_seed(0)
    train = known.splits["train"]
    mean = train.questions / train.images - known.least
    counts = known.least + torch.poisson(torch.full((min(SAMPLED_IMAGES, train.images),), mean), generator=generator)
    image_ids = torch.repeat_interleave(torch.arange(len(counts)), counts.long())

    def draw(quantiles: Sequence[int]) -> tuple[int, ...]:
        places = torch.randint(len(quantiles), image_ids.shape, generator=generator)
        return tuple(torch.tensor(quantiles)[places].tolist())

    return Texts(
        known.splits, tuple(image_ids.tolist()), draw(known.questions), draw(known.answers), instruction,
        known.image_bytes, known.download, known.basis,
    )  # fmt: skip
