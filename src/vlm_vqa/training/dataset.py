"""From stored questions and features to the Trainer's batches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset as Records
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.errors import UserError
from vlm_vqa.model.layout import QuestionTokens, Row, TokenLayout
from vlm_vqa.params import TooLong
from vlm_vqa.training.launch import on_main_process
from vlm_vqa.training.windows import PlannedRow

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
            zip(*columns, strict=True),
            total=len(records),
            desc="tokenising",
            unit="question",
            disable=not on_main_process(),
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

    @property
    def text_lengths(self) -> list[int]:
        """Tokens that each question and its answer add to a row."""
        return [len(tokens.read) for tokens in self.tokens]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, planned: PlannedRow) -> Row:
        return Row(planned.image_id, tuple(self.tokens[question] for question in planned.questions))


@dataclass(frozen=True)
class Collator:
    """Turns rows into the model's inputs."""

    layout: TokenLayout
    features: FeatureStore

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return what `VlmForTraining.forward` takes; `image_features` is [B, T, E] in the store's type."""
        images = self.features.batch([row.image_id for row in rows])
        return {"image_features": images, **self.layout.collate(rows)}
