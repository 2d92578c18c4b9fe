"""From stored questions and features to the Trainer's batches."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset as Records
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset
from tqdm import tqdm

from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.errors import UserError
from vlm_vqa.model.layout import QuestionTokens, TokenLayout, rows_of
from vlm_vqa.params import TooLong

log = logging.getLogger(__name__)


class QuestionDataset(Dataset):
    """Tokenised training questions with their majority answers.

    Attributes:
        image_ids: one for each question.
        dropped: records left out because they do not fit `prompt.text_length`.
    """

    def __init__(self, records: Records, layout: TokenLayout, too_long: TooLong):
        """Tokenise all records.

        Raises:
            UserError: a record is too long (with `too_long: error`), or none is left; the question id is named.
        """
        self.image_ids: list[int] = []
        self.tokens: list[QuestionTokens] = []
        self.dropped = 0
        columns = (records[name] for name in ("question_id", "image_id", "question", "multiple_choice_answer"))
        for question_id, image_id, question, answer in tqdm(
            zip(*columns, strict=True), total=len(records), desc="tokenising", unit="question"
        ):
            try:
                tokens = layout.tokenize(question, answer)
            except UserError as error:
                if too_long is TooLong.ERROR:
                    raise UserError(f"question_id {question_id}: {error}") from error
                self.dropped += 1
                continue
            self.image_ids.append(image_id)
            self.tokens.append(tokens)
        if self.dropped:
            log.warning("dropped %d of %d records that do not fit prompt.text_length", self.dropped, len(records))
        if not self.tokens:
            raise UserError("no training record fits prompt.text_length; raise it.")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[int, QuestionTokens]:
        return self.image_ids[index], self.tokens[index]


class ImageOrderSampler(BatchSampler):
    """Batches of exactly `batch_size` questions in which the questions of an image stand together.

    Images come in an order drawn from seed and epoch, and so do the questions within an image; the sequence is then cut
    every `batch_size` questions. Every question comes once an epoch; an image is split only where a batch ends.
    """

    def __init__(self, image_ids: Sequence[int], batch_size: int, seed: int):
        self.image_ids = torch.tensor(image_ids, dtype=torch.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; called by the Trainer at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.image_ids) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        _, image_of_question = torch.unique(self.image_ids, return_inverse=True)
        rank_of_image = torch.randperm(int(image_of_question.max()) + 1, generator=generator)
        within = torch.randperm(len(self.image_ids), generator=generator)
        # A stable sort by image keeps the random order of the questions within each image.
        order = within[torch.argsort(rank_of_image[image_of_question[within]], stable=True)]
        yield from (batch.tolist() for batch in order.split(self.batch_size))


@dataclass(frozen=True)
class Collator:
    """Turns tokenised questions into the model's inputs: rows share an image where the mask allows it."""

    layout: TokenLayout
    features: FeatureStore

    def __call__(self, questions: Sequence[tuple[int, QuestionTokens]]) -> dict[str, Tensor]:
        """Return what `VlmForTraining.forward` takes; `image_features` is float32 [B, T, E]."""
        rows = rows_of(questions, self.layout.mask)
        images = self.features.batch([row.image_id for row in rows])
        return {"image_features": images.float(), **self.layout.collate(rows)}
