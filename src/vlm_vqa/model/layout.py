"""The token layout and the masks: the one place that training, generation, export and HELM share.

A sequence is: image tokens, one `<bos>`, instruction, newline, question, newline, answer, `<eos>`. As text this is exactly
what `PaliGemmaProcessor` builds for the prompt `{instruction}\\n{question}`; the newline after the instruction is HELM's.

Who sees whom under each mask is a table in docs/architecture.md. Under `image-prefix` and `causal` nothing before a question
depends on it, so questions of one image can share a row: each restarts its positions after the prefix and sees the prefix
and itself. Under `prefix-lm` the image sees the question, and a row holds one question. Positions count from 1, as in
PaliGemma.

Shapes: B rows, T image tokens, S tokens of a row (image tokens included), D width.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vlm_vqa.errors import UserError
from vlm_vqa.params import Mask

IGNORED = -100  # label of a position that is not supervised, as in torch's cross entropy
PREFIX_SEGMENT = 0
PAD_SEGMENT = -1


class TooManyTokens(UserError):
    """A question, with its answer or alone, that does not fit; `needed` is the `text_length` that would hold it."""

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed


class QuestionTokens(NamedTuple):
    prompt: list[int]  # question and newline
    answer: list[int]  # answer and `<eos>`; empty when the answer is asked for

    @property
    def read(self) -> list[int]:
        """What the question adds to a row: `<eos>` is only ever predicted, never read."""
        return self.prompt + self.answer[:-1]


@dataclass(frozen=True)
class Row:
    """One sequence: an image and the questions that share it."""

    image_id: int
    questions: tuple[QuestionTokens, ...]  # none of them: a row that teaches nothing


class TokenLayout:
    """Turns questions and answers into rows and batches.

    Args:
        tokenizer: a Hugging Face tokenizer with a `tokenizers` backend and `<bos>`, `<eos>`, `<pad>`.
        mask: which mask the model is trained with.
        instruction: what stands before every question.
        num_patches: T, tokens of an image.
        text_length: most tokens after the image tokens.
        image_token_id: placeholder at image positions.
    """

    def __init__(
        self, tokenizer, *, mask: Mask, instruction: str, num_patches: int, text_length: int, image_token_id: int
    ):
        self.mask, self.instruction = mask, instruction
        self.num_patches, self.text_length = num_patches, text_length
        self.image_token_id, self.pad_id = image_token_id, tokenizer.pad_token_id
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._plain = plain_text_tokenizer(tokenizer)
        self._newline = self._encode("\n")
        self.prefix = [self.bos_id, *self._encode(clean(instruction)), *self._newline]

    def tokenize(self, question: str, answer: str | None = None) -> QuestionTokens:
        """Tokenise one question; special-token strings inside it are plain text.

        TooManyTokens if the record needs more than `text_length` text tokens, UserError if it has an empty answer.
        """
        prompt = self._encode(clean(question)) + self._newline
        tokens = QuestionTokens(prompt, [] if answer is None else self._encode(clean(answer)) + [self.eos_id])
        if answer is not None and len(tokens.answer) == 1:
            raise UserError(f"question {question!r} has an empty answer; mend the annotations file.")
        length = self.text_tokens(tokens)
        if length <= self.text_length:
            return tokens
        if answer is None:
            raise TooManyTokens(
                f"the question {shorten(question, 80)!r} has {len(prompt)} tokens, and {self.text_length - len(self.prefix)}"
                " fit beside the instruction. Ask in fewer or more usual words, or train with a larger prompt.text_length.",
                length,
            )
        raise TooManyTokens(
            f"question {shorten(question, 80)!r} with answer {shorten(answer, 80)!r} takes {length} text tokens; "
            f"prompt.text_length is {self.text_length}. Set it to {length}, or set prompt.too_long: drop to leave "
            "such records out.",
            length,
        )

    def text_tokens(self, tokens: QuestionTokens) -> int:
        """Count what `text_length` bounds: `<bos>`, instruction, question, answer, `<eos>` and the two newlines."""
        return len(self.prefix) + len(tokens.prompt) + len(tokens.answer)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return an answer's tokens as the text that the stock tokenizer makes of them, blanks around it removed."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Lay rows out in a grid as wide as the longest of them, and say how to pack it.

        Returns:
            The grid: `input_ids`, `position_ids`, `segment_ids` (0 prefix, 1.. a question that shares it, -1 padding) and
            `labels`, int64 [B, S], and `bidirectional`, bool [B, S]. `labels[b, s]` is the token that position s is to
            predict, so no further shift is needed; it is `IGNORED` but from a question's newline to its last answer token.

            The packing, int64: the places b * S + s that hold a token, `prefix_places` [B, P] (image and, where it can be
            shared, `<bos>` and instruction) and `rest_places` [X]; and `supervised`, which of these B P + X are supervised.
        """
        if self.mask is Mask.PREFIX_LM and any(len(row.questions) > 1 for row in rows):
            raise ValueError("prefix-lm rows hold one question: the image sees it")
        columns = [self._columns(row) for row in rows]
        width = max(len(column["input_ids"]) for column in columns)
        padding = {"input_ids": self.pad_id, "position_ids": 1, "segment_ids": PAD_SEGMENT, "labels": IGNORED}
        padding["bidirectional"] = False
        grid = {
            name: torch.tensor([column[name] + [fill] * (width - len(column[name])) for column in columns])
            for name, fill in padding.items()
        }
        prefix = self.num_patches + (0 if self.mask is Mask.PREFIX_LM else len(self.prefix))
        all_places = torch.arange(len(rows) * width).view(len(rows), width)
        prefix_places = all_places[:, :prefix].contiguous()
        rest_places = all_places[:, prefix:][grid["segment_ids"][:, prefix:] != PAD_SEGMENT]
        packed_labels = grid["labels"].flatten()[torch.cat([prefix_places.flatten(), rest_places])]
        supervised = (packed_labels != IGNORED).nonzero()[:, 0]
        return grid | {"prefix_places": prefix_places, "rest_places": rest_places, "supervised": supervised}

    def _columns(self, row: Row) -> dict[str, list]:
        input_ids = [self.image_token_id] * self.num_patches + self.prefix
        start = len(input_ids)
        segments, positions, labels = [PREFIX_SEGMENT] * start, list(range(1, start + 1)), [IGNORED] * start
        prefix_lm = self.mask is Mask.PREFIX_LM
        bidirectional = [self.mask is not Mask.CAUSAL] * self.num_patches + [prefix_lm] * len(self.prefix)
        for number, tokens in enumerate(row.questions, start=1):
            prompt, answer, read = tokens.prompt, tokens.answer, tokens.read
            input_ids += read
            # Under prefix-lm the prefix sees the question: both are one segment.
            segments += [PREFIX_SEGMENT if prefix_lm else number] * len(read)
            positions += range(start + 1, start + 1 + len(read))
            bidirectional += [prefix_lm] * len(prompt) + [False] * (len(read) - len(prompt))
            labels += [IGNORED] * (len(prompt) - 1) + (answer or [IGNORED])
        columns = {"input_ids": input_ids, "segment_ids": segments, "position_ids": positions, "labels": labels}
        return columns | {"bidirectional": bidirectional}

    def _encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids


def clean(text: str) -> str:
    """Collapse white space: a newline inside a question would end it, and no annotation means one."""
    return " ".join(text.split())


def plain_text_tokenizer(tokenizer) -> Tokenizer:
    """Return the tokenizer's model without its added tokens, so that no text is ever read as a special token.

    `PaliGemmaProcessor` would otherwise read `<image>` or `<loc0001>` typed inside a question as tokens of its own.
    """
    plain = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | plain))


def visible(segment_ids: Tensor, position_ids: Tensor, bidirectional: Tensor) -> Tensor:
    """Return who sees whom: bool [B, S, S], true where the query (dim 1) sees the key (dim 2).

    The arguments are as `TokenLayout.collate` gives them. Padding is seen by nobody; a padded query sees the prefix, so that
    its softmax stays finite (its output is never used).
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    same_row = (key == PREFIX_SEGMENT) | (key == query) & (key != PAD_SEGMENT)
    earlier = position_ids[:, None, :] <= position_ids[:, :, None]
    block = bidirectional[:, :, None] & bidirectional[:, None, :]
    # A pad's position is 1, where it would see the first image token only: enough to be finite.
    return same_row & (earlier | block)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn bool [B, Q, K] into what eager attention adds to its scores: [B, 1, Q, K], 0 or the type's lowest value."""
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed[:, None], zero, torch.finfo(dtype).min)


def rows_of(questions: Iterable[tuple[int, QuestionTokens]], mask: Mask) -> list[Row]:
    """Put consecutive questions, (image id, tokens), of one image into one row where the mask allows it."""
    rows: list[Row] = []
    for image_id, tokens in questions:
        if mask is not Mask.PREFIX_LM and rows and rows[-1].image_id == image_id:
            rows[-1] = Row(image_id, (*rows[-1].questions, tokens))
        else:
            rows.append(Row(image_id, (tokens,)))
    return rows
