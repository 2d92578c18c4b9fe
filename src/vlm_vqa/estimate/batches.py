"""The forward passes that training makes of its questions: the sampler of training itself, on a sample of them.

Shapes: B rows, P tokens of a prefix that attends to itself alone (0 under prefix-lm), S tokens of the longest row.
"""

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache

from vlm_vqa.estimate.dataset_size import Texts
from vlm_vqa.model.flops import Work, rows_work
from vlm_vqa.model.layout import QuestionTokens, Row
from vlm_vqa.params import Mask, Params
from vlm_vqa.training.windows import WindowSampler, WindowShape

WINDOWS = 40
"""Optimizer steps that are laid out."""


@dataclass(frozen=True)
class Pass:
    """What a forward pass of one process holds."""

    work: Work
    rows: int
    prefix: int
    width: int

    @property
    def pairs(self) -> int:
        """(query, key) pairs that eager attention computes, seen or not: B P P + B (S - P) S."""
        return self.rows * (self.prefix**2 + (self.width - self.prefix) * self.width)


@dataclass(frozen=True)
class Passes:
    """A sample of training's passes, and what an epoch is made of."""

    sample: tuple[Pass, ...]
    """Those of all processes."""
    steps: int
    """Optimizer steps of the whole training."""
    epoch: Work
    """Of one epoch, over all processes."""
    epochs: int
    questions_a_row: float
    questions_a_step: int


@dataclass(frozen=True)
class _Lengths:
    """What `rows_work` asks of a layout."""

    mask: Mask
    num_patches: int
    prefix: tuple[int, ...]


def plan(params: Params, processes: int, texts: Texts) -> Passes:
    """Lay out a sample of optimizer steps under `params` and `processes`."""
    train = params.train
    shape = WindowShape(
        train.batch_size * train.gradient_accumulation_steps * processes, train.questions_per_row,
        train.gradient_accumulation_steps, processes,
    )  # fmt: skip
    layout = _Lengths(params.prompt.mask, params.vision.num_patches, (0,) * texts.instruction)
    return _plan(shape, layout, texts, train.num_train_epochs)


@lru_cache(maxsize=64)
def _plan(shape: WindowShape, layout: _Lengths, texts: Texts, epochs: int) -> Passes:
    questions = [
        QuestionTokens([0] * prompt, [0] * answer)
        for prompt, answer in zip(texts.questions, texts.answers, strict=True)
    ]
    lengths = [len(one.read) for one in questions]
    prefix = layout.num_patches + len(layout.prefix)
    # One process with all the passes divides a window as several do.
    whole = replace(shape, passes=shape.passes * shape.processes, processes=1)
    sampler = WindowSampler(texts.image_ids, lambda epoch: lengths, prefix, whole, seed=0)
    batches = itertools.islice(sampler, WINDOWS * whole.passes)
    sample, seen, rows = [], 0, 0
    for batch in batches:
        laid = [Row(row.image_id, tuple(questions[place] for place in row.questions)) for row in batch]
        sample.append(_pass(laid, layout))
        seen += sum(len(row.questions) for row in laid)
        rows += sum(bool(row.questions) for row in laid)
    total = texts.splits["train"].questions
    summed = [sum(getattr(one.work, name) for one in sample) for name in Work.__dataclass_fields__]
    return Passes(
        tuple(sample), -(-total // shape.questions) * epochs, Work(*(round(part * total / seen) for part in summed)),
        epochs, seen / rows, shape.questions,
    )  # fmt: skip


def _pass(rows: list[Row], layout: _Lengths) -> Pass:
    prefix = layout.num_patches + len(layout.prefix)
    width = prefix + max(sum(len(tokens.read) for tokens in row.questions) for row in rows)
    closed = prefix if layout.mask is Mask.IMAGE_PREFIX else 0
    return Pass(rows_work(layout, rows), len(rows), closed, width)
