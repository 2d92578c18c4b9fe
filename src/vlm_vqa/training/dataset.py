"""From stored questions and features to the Trainer's batches."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vlm_vqa.data.feature_store import Features
from vlm_vqa.data.records import said_answers
from vlm_vqa.errors import UserError
from vlm_vqa.model.layout import QuestionTokens, Row, TokenLayout, TooManyTokens
from vlm_vqa.params import Answers, TooLong
from vlm_vqa.training.launch import on_main_process
from vlm_vqa.training.sampler import PlannedRow

if TYPE_CHECKING:
    from datasets import Dataset as Records

log = logging.getLogger(__name__)

IMAGES = "images"
"""Key of what a batch's features are made of."""


class QuestionDataset(Dataset):
    """Tokenised training questions with the answers that may be taught: the main one, or all that people gave.

    Of several answers one is drawn anew each epoch, by seed, epoch and question alone, so every process and every resumed
    run draws the same.

    Attributes:
        image_ids: one for each question.
        layout: what has tokenised them.
        dropped: records left out because they do not fit `prompt.text_length`.
    """

    def __init__(
        self,
        records: "Records",
        layout: TokenLayout,
        too_long: TooLong,
        answers: Answers = Answers.MAJORITY,
        seed: int = 0,
    ):
        """Tokenise all records; UserError if none fits, or one does not with `too_long: error`: it names the longest."""
        self.seed, self.layout = seed, layout
        self.image_ids: list[int] = []
        self._prompts: list[list[int]] = []
        self._answers: list[tuple[list[int], ...]] = []
        self._drawn: tuple[int, list[int]] | None = None
        taught = "multiple_choice_answer" if answers is Answers.MAJORITY else "answers"
        tokenize, refused = cache(layout.tokenize), list[tuple[int, int, TooManyTokens]]()
        columns = (records[name] for name in ("question_id", "image_id", "question", taught))
        bar = {"desc": "tokenising", "unit": "question", "disable": not on_main_process()}
        for question_id, image_id, question, given in tqdm(zip(*columns, strict=True), total=len(records), **bar):
            try:
                tokens = _tokenize(tokenize, question, [given] if isinstance(given, str) else given, too_long)
            except TooManyTokens as error:
                refused.append((error.needed, -question_id, error))
                continue
            self.image_ids.append(image_id)
            self._prompts.append(tokens[0].prompt)
            self._answers.append(tuple(each.answer for each in tokens))
        self.dropped = len(refused)
        if refused and too_long is TooLong.ERROR:
            _, minus_id, error = max(refused)
            others = f" It is the longest of {len(refused)} such." if len(refused) > 1 else ""
            raise UserError(f"question_id {-minus_id}: {error}{others}") from error
        if self.dropped:
            log.warning("dropped %d of %d records that do not fit prompt.text_length", self.dropped, len(records))
        if not self._prompts:
            raise UserError("no training record fits prompt.text_length; raise it.")

    def text_lengths(self, epoch: int) -> list[int]:
        """Return how many tokens each question and its answer of this epoch add to a row."""
        return [len(self.tokens(question, epoch).read) for question in range(len(self))]

    def tokens(self, question: int, epoch: int) -> QuestionTokens:
        answers = self._answers[question]
        return QuestionTokens(self._prompts[question], answers[self._draw(epoch)[question] if len(answers) > 1 else 0])

    def _draw(self, epoch: int) -> list[int]:
        """Return which of its answers each question has in this epoch."""
        if self._drawn is None or self._drawn[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            shares = torch.rand(len(self), generator=generator, dtype=torch.float64)
            counts = torch.tensor([len(answers) for answers in self._answers])
            self._drawn = (epoch, (shares * counts).long().tolist())
        return self._drawn[1]

    def head(self, count: int) -> None:
        self.image_ids, self._drawn = self.image_ids[:count], None
        self._prompts, self._answers = self._prompts[:count], self._answers[:count]

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, planned: PlannedRow) -> Row:  # ty: ignore[lost-keyword-for-regular-parameter] - loaders pass it by place
        return Row(planned.image_id, tuple(self.tokens(question, planned.epoch) for question in planned.questions))


def _tokenize(tokenize: Callable, question: str, answers: Sequence[str], too_long: TooLong) -> list[QuestionTokens]:
    """Return a question with each of its answers that says something.

    TooManyTokens, of the longest, if one does not fit, with `TooLong.ERROR`, or none does, with `TooLong.DROP`.
    """
    # Fetch refuses a question without any answer.
    said = said_answers(answers) or answers[:1]
    found, refused = {}, list[TooManyTokens]()
    for answer in dict.fromkeys(said):
        try:
            found[answer] = tokenize(question, answer)
        except TooManyTokens as error:
            refused.append(error)
    if refused and (too_long is TooLong.ERROR or not found):
        raise max(refused, key=lambda error: error.needed)
    return [found[answer] for answer in said if answer in found]


@dataclass(frozen=True)
class Collator:
    layout: TokenLayout
    features: Features

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return rows as tensors, and as `images` what their features are made of; a data loader's workers call it."""
        return {IMAGES: self.features.inputs([row.image_id for row in rows]), **self.layout.collate(rows)}

    def ready(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what `VlmForTraining.forward` takes of a batch that lies on the model's device by now."""
        rest = {name: value for name, value in batch.items() if name != IMAGES}
        return {"image_features": self.features.of(batch[IMAGES]), **rest}
