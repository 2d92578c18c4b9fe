"""Greedy answers to batches of questions, each with its image features.

Shapes: B questions, S prompt tokens (image tokens included), K keys seen so far, T image tokens, E feature width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PaliGemmaForConditionalGeneration

from vlm_vqa.model.layout import QuestionTokens, Row, TokenLayout, visible
from vlm_vqa.model.vlm import text_hidden, text_logits


@torch.inference_mode()
def generate(
    model: PaliGemmaForConditionalGeneration,
    layout: TokenLayout,
    features: Tensor,
    questions: Sequence[QuestionTokens],
    max_new_tokens: int,
) -> list[list[int]]:
    """Answer every question with the likeliest token at each step, stopping at `<eos>`.

    Prompts are padded on the right: with explicit positions and masks a padded prompt gives what it gives alone, and the
    answer's keys simply follow the padding in the cache.

    Args:
        model: in evaluation mode.
        features: [B, T, E], one image for each question.
        questions: B tokenised questions without answers.

    Returns:
        B lists of token ids, `<eos>` left out.
    """
    batch = {
        name: value.to(features.device)
        for name, value in layout.collate([Row(0, (question,)) for question in questions]).items()
    }
    cache = DynamicCache(config=model.config.text_config)
    seen_BS = batch["segment_ids"] >= 0
    length_B = seen_BS.sum(dim=1)
    allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
    hidden_BSD = text_hidden(model, features, batch["input_ids"], batch["position_ids"], allowed, cache)
    last_BD = hidden_BSD[torch.arange(len(questions), device=features.device), length_B - 1]
    position_B1 = length_B[:, None]
    steps: list[Tensor] = []
    done_B = torch.zeros(len(questions), dtype=torch.bool, device=features.device)
    for step in range(max_new_tokens):
        token_B = text_logits(model, last_BD).argmax(dim=-1)
        steps.append(token_B)
        done_B |= token_B == layout.eos_id
        if done_B.all() or step == max_new_tokens - 1:
            break
        seen_BS = torch.nn.functional.pad(seen_BS, (0, 1), value=True)
        position_B1 = position_B1 + 1
        last_BD = text_hidden(model, None, token_B[:, None], position_B1, seen_BS[:, None], cache)[:, 0]
    return [_until(answer, layout.eos_id) for answer in torch.stack(steps, dim=1).tolist()]


def _until(token_ids: list[int], stop: int) -> list[int]:
    return token_ids[: token_ids.index(stop)] if stop in token_ids else token_ids
