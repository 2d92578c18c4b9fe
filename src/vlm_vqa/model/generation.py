"""Greedy answers to batches of questions; questions of one image share its prefix where the mask allows it.

Shapes: Q questions, I images, R rows, S tokens of a row (image tokens included), K keys seen so far, T image tokens,
E feature width, D hidden width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PaliGemmaForConditionalGeneration

from vlm_vqa.model.layout import PREFIX_SEGMENT, QuestionTokens, Row, TokenLayout, rows_of, visible
from vlm_vqa.model.vlm import text_hidden, text_logits
from vlm_vqa.params import Mask


@torch.inference_mode()
def generate(
    model: PaliGemmaForConditionalGeneration,
    layout: TokenLayout,
    features: Tensor,
    questions: Sequence[QuestionTokens],
    images: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Answer every question with the likeliest token at each step, stopping at `<eos>`.

    Consecutive questions of one image are read as one row. Prompts are padded on the right: with explicit positions and
    masks a padded or shared prompt gives what it gives alone, and an answer's keys simply follow in the cache.

    Args:
        model: in evaluation mode.
        features: [I, T, E].
        questions: Q tokenised questions without answers.
        images: which of the I images each question is about.

    Returns:
        Q lists of token ids, `<eos>` left out.
    """
    rows = rows_of(zip(images, questions, strict=True), layout.mask)
    batch = {name: value.to(features.device) for name, value in layout.collate(rows).items()}
    row_Q, segment_Q = _places(rows, layout, features.device)
    cache = DynamicCache(config=model.config.text_config)
    allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
    row_features = features[[row.image_id for row in rows]]
    hidden_RSD = text_hidden(model, row_features, batch["input_ids"], batch["position_ids"], allowed, cache)

    # From here every question goes on by itself: with its row's cache, of which it sees the prefix and its own tokens.
    cache.batch_select_indices(row_Q)
    segments_QS = batch["segment_ids"][row_Q]
    own_QS = segments_QS == segment_Q[:, None]
    seen_QK = own_QS | (segments_QS == PREFIX_SEGMENT)
    place_QS = torch.arange(own_QS.shape[1], device=features.device).expand_as(own_QS)
    last_Q = place_QS.masked_fill(~own_QS, -1).amax(dim=1)
    hidden_QD = hidden_RSD[row_Q, last_Q]
    position_Q1 = batch["position_ids"][row_Q, last_Q][:, None]
    steps: list[Tensor] = []
    done_Q = torch.zeros(len(questions), dtype=torch.bool, device=features.device)
    while True:
        token_Q = text_logits(model, hidden_QD).argmax(dim=-1)
        steps.append(token_Q)
        done_Q |= token_Q == layout.eos_id
        if done_Q.all() or len(steps) == max_new_tokens:
            return [_until(answer, layout.eos_id) for answer in torch.stack(steps, dim=1).tolist()]
        seen_QK = torch.nn.functional.pad(seen_QK, (0, 1), value=True)
        position_Q1 = position_Q1 + 1
        hidden_QD = text_hidden(model, None, token_Q[:, None], position_Q1, seen_QK[:, None], cache)[:, 0]


def _places(rows: Sequence[Row], layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row of each question and the segment that its tokens have there, int64 [Q] each."""
    places = [
        (row, PREFIX_SEGMENT if layout.mask is Mask.PREFIX_LM else number)
        for row, content in enumerate(rows)
        for number, _ in enumerate(content.questions, start=1)
    ]
    row_Q, segment_Q = torch.tensor(places, device=device).T
    return row_Q, segment_Q


def _until(token_ids: list[int], stop: int) -> list[int]:
    return token_ids[: token_ids.index(stop)] if stop in token_ids else token_ids
