"""The work of one optimizer step: VQAv2's questions, as many an image as VQAv2 has, and features of random numbers.

The questions and majority answers are real or drawn ones, see `benchmarks.vqav2`. The real ones are a subsample with 1.5
an image, so they are dealt to images anew. Gemma's own tokenizer cannot be had offline: ours is trained on these texts.

Shapes: I images of the step, T image tokens, E image feature width.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BitImageProcessor, PaliGemmaProcessor

from benchmarks import vqav2
from vlm_vqa.errors import UserError
from vlm_vqa.model.layout import QuestionTokens, Row, TokenLayout, rows_of
from vlm_vqa.model.vlm import build_processor, train_tokenizer
from vlm_vqa.params import HELM_INSTRUCTION, Mask
from vlm_vqa.training.sampler import GlobalBatchSampler, GlobalBatchShape

TRAIN_QUESTIONS, TRAIN_IMAGES = 443_757, 82_783
"""Of VQAv2's train split: 5.36 questions an image."""
LEAST_QUESTIONS = 3
"""Of an image of VQAv2."""
TOKENIZER_LIMIT = 30_000
"""Most tokens of our tokenizer, so that with PaliGemma's own 1,153 it stays below a vocabulary of 32,000."""


@dataclass(frozen=True)
class Workload:
    """The questions of one optimizer step, in the order of training, and their images."""

    processor: PaliGemmaProcessor
    layout: TokenLayout
    questions: list[tuple[int, QuestionTokens]]
    """(image, tokens); image counts from 0 and indexes `features`."""
    features: Tensor
    """float32 [I, T, E]"""
    facts: dict[str, Any] = field(default_factory=dict)
    """What a reader of the results wants to know about these questions."""
    micro_batch: int = 6
    """Questions of the reference's; ten are a step of its recipe."""

    @property
    def rows(self) -> list[Row]:
        """The questions of an image in one row."""
        return rows_of(self.questions, Mask.IMAGE_PREFIX)

    @property
    def supervised(self) -> int:
        """Supervised tokens of the step."""
        return sum(len(tokens.answer) for _, tokens in self.questions)


def read_questions() -> list[tuple[str, str]]:
    """Return (question, majority answer) pairs of VQAv2's train split, or drawn ones, in the order of the file."""
    questions, annotations = vqav2.texts()
    answers = {one["question_id"]: one["multiple_choice_answer"] for one in annotations}
    return [(one["question"], answers[one["question_id"]]) for one in questions]


def data() -> dict[str, str]:
    """Say which questions a workload is of."""
    return {"questions": vqav2.origin(vqav2.TEXT), "image features": "random"}


def questions_per_image(images: int, generator: torch.Generator) -> Tensor:
    """Draw how many questions each image has: 3 + Poisson(2.36), VQAv2's least and mean; int64 [images]."""
    mean = TRAIN_QUESTIONS / TRAIN_IMAGES - LEAST_QUESTIONS
    return LEAST_QUESTIONS + torch.poisson(torch.full((images,), mean), generator=generator).long()


def deal(count: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Shuffle `count` questions and deal them to images; return the order of questions, and the image of each in it."""
    order = torch.randperm(count, generator=generator).tolist()
    counts = questions_per_image(count // LEAST_QUESTIONS + 1, generator)
    return order, torch.repeat_interleave(torch.arange(len(counts)), counts).tolist()[:count]


def draw_step(
    pairs: Sequence[tuple[str, str]],
    *,
    step_questions: int = 60,
    num_patches: int = 257,
    feature_width: int = 768,
    text_length: int = 64,
    seed: int = 0,
) -> Workload:
    """Take one optimizer step out of an epoch over `pairs`.

    The questions are shuffled, dealt to images, and divided into steps as training does it. Of all steps it is the first
    one with the median number of rows. Questions that need more than `text_length` text tokens are left out.

    Args:
        pairs: (question, answer).
    """
    tokenizer = train_tokenizer([HELM_INSTRUCTION, *(text for pair in pairs for text in pair)], TOKENIZER_LIMIT)
    size = len(tokenizer)
    processor = build_processor(BitImageProcessor(), tokenizer, num_patches)
    layout = TokenLayout(
        processor.tokenizer,
        mask=Mask.IMAGE_PREFIX,
        instruction=HELM_INSTRUCTION,
        num_patches=num_patches,
        text_length=text_length,
        image_token_id=processor.image_token_id,
    )
    tokenized = list(_that_fit(pairs, layout))
    steps = list(_steps(tokenized, layout, step_questions, seed))
    median = statistics.median_low(map(len, steps))
    chosen = next(step for step in steps if len(step) == median)
    questions = [(number, tokenized[place]) for number, group in enumerate(chosen) for place in group]
    features = torch.randn(median, num_patches, feature_width, generator=torch.Generator().manual_seed(seed))
    facts = {
        "questions": step_questions,
        "images": median,
        "tokenizer": f"byte-level BPE trained on these texts, {size} tokens; Gemma's own is not available offline",
        "instruction_tokens": len(layout.prefix),
        "records": len(pairs),
        "records_dropped_as_too_long": len(pairs) - len(tokenized),
    }
    return Workload(processor, layout, questions, features, facts)


def _that_fit(pairs: Sequence[tuple[str, str]], layout: TokenLayout) -> Iterator[QuestionTokens]:
    for question, answer in pairs:
        try:
            yield layout.tokenize(question, answer)
        except UserError:
            continue


def _steps(
    tokenized: list[QuestionTokens], layout: TokenLayout, size: int, seed: int
) -> Iterator[list[tuple[int, ...]]]:
    """Yield the whole steps of an epoch, rows of question places: shuffled questions, dealt to images."""
    shuffled, images = deal(len(tokenized), torch.Generator().manual_seed(seed))
    shape = GlobalBatchShape(questions=size, questions_per_row=size, micro_batches=1)
    lengths = [len(tokenized[place].read) for place in shuffled]
    sampler = GlobalBatchSampler(images, lambda epoch: lengths, layout.num_patches + len(layout.prefix), shape, seed)
    for batch in sampler.global_batches():
        if sum(map(len, batch)) == size:
            yield [tuple(shuffled[place] for place in group) for group in batch]
