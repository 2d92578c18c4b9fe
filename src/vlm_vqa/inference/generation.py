"""Greedy answers to batches of questions; questions of one image share its prefix where the mask allows it.

Shapes: Q questions, I images, R rows, J questions of the fullest row, S tokens of a row (image tokens included), K keys seen
so far, T image tokens, E feature width, D hidden width.
"""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor
from transformers import DynamicCache, PaliGemmaForConditionalGeneration

from vlm_vqa.model.layout import PAD_SEGMENT, PREFIX_SEGMENT, QuestionTokens, Row, TokenLayout, rows_of, visible
from vlm_vqa.model.vlm import language_of, text_hidden, text_logits
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

    Consecutive questions of one image are read as one row, and so are their answers: each step appends a token for every
    question to its row, so keys and values of a prefix are kept once. Rows are padded on the right: with explicit positions
    and masks a padded or shared prompt gives what it gives alone.

    Args:
        model: in evaluation mode.
        features: [I, T, E].
        questions: Q tokenised questions without answers.
        images: which of the I images each question is about.

    Returns:
        Q lists of token ids, `<eos>` left out.
    """
    device = features.device
    rows = rows_of(zip(images, questions, strict=True), layout.mask)
    batch = {name: value.to(device) for name, value in layout.collate(rows).items()}
    segments_RK, positions_RS = batch["segment_ids"], batch["position_ids"]
    row_Q, number_Q, segment_RJ = _places(rows, layout.mask, device)
    cache = DynamicCache(config=language_of(model.config))
    allowed = visible(segments_RK, positions_RS, batch["bidirectional"])
    row_features = features[[row.image_id for row in rows]]
    hidden_RSD = text_hidden(model, row_features, batch["input_ids"], positions_RS, allowed, cache)

    # What follows a question is predicted where its last token stands.
    own_RJS = (segments_RK[:, None] == segment_RJ[:, :, None]) & (segment_RJ != PAD_SEGMENT)[:, :, None]
    last_RJ = torch.where(own_RJS, torch.arange(own_RJS.shape[2], device=device), 0).amax(dim=2)
    hidden_QD = hidden_RSD[row_Q, last_RJ[row_Q, number_Q]]
    position_RJ = positions_RS.gather(1, last_RJ)
    token_RJ = torch.full_like(segment_RJ, layout.pad_id)
    steps: list[Tensor] = []
    done_Q = torch.zeros(len(questions), dtype=torch.bool, device=device)
    while True:
        token_Q = text_logits(model, hidden_QD).argmax(dim=-1)
        steps.append(token_Q)
        done_Q |= token_Q == layout.eos_id
        if done_Q.all() or len(steps) == max_new_tokens:
            answers = torch.stack(steps, dim=1).tolist()
            return [list(takewhile(lambda token: token != layout.eos_id, answer)) for answer in answers]
        token_RJ[row_Q, number_Q] = token_Q
        position_RJ = position_RJ + 1
        segments_RK = torch.cat([segments_RK, segment_RJ], dim=1)
        key, query = segments_RK[:, None], segment_RJ[:, :, None]
        allowed = (key == PREFIX_SEGMENT) | (key == query) & (key != PAD_SEGMENT)
        hidden_QD = text_hidden(model, None, token_RJ, position_RJ, allowed, cache)[row_Q, number_Q]


def _places(rows: Sequence[Row], mask: Mask, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return each question's row and number in it, int64 [Q], and the segments of its tokens, int64 [R, J]."""
    counts = torch.tensor([len(row.questions) for row in rows])
    segment_RJ = torch.arange(1, int(counts.max()) + 1).expand(len(rows), -1).clone()
    segment_RJ[segment_RJ > counts[:, None]] = PAD_SEGMENT
    row_Q, number_Q = (segment_RJ != PAD_SEGMENT).nonzero(as_tuple=True)
    if mask is Mask.PREFIX_LM:
        segment_RJ[:] = PREFIX_SEGMENT
    return row_Q.to(device), number_Q.to(device), segment_RJ.to(device)
