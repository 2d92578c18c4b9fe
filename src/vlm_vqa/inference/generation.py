"""Greedy answers to batches of questions; questions of one image share its prefix where the mask allows it.

Shapes: Q questions, I images, R rows, J questions of the fullest row, S tokens of a row (image tokens included), K keys seen
so far, T image tokens, E feature width, D hidden width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PaliGemmaForConditionalGeneration

from vlm_vqa.model.layout import PAD_SEGMENT, PREFIX_SEGMENT, QuestionTokens, Row, TokenLayout, rows_of, visible
from vlm_vqa.model.vlm import language_of, text_hidden, text_logits
from vlm_vqa.params import Mask

DEPARTURES = 3
"""Ways to leave the greedy answer that `likeliest` follows."""


class Scored(NamedTuple):
    """An answer and what the model gives it."""

    tokens: list[int]
    """With the `<eos>` that ends it, unless it was cut before."""
    log_probability: float
    """The sum of its tokens', that of `<eos>` included."""


@torch.inference_mode()
def generate(
    model: PaliGemmaForConditionalGeneration,
    layout: TokenLayout,
    features: Tensor,
    questions: Sequence[QuestionTokens],
    images: Sequence[int],
    max_new_tokens: int,
) -> list[Scored]:
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
        Q answers.
    """
    columns = []
    for logits_QV, token_Q in _greedy(model, layout, features, questions, images, max_new_tokens):
        # The greatest is that of the chosen token. Faster by far than logsumexp where there are 256,000.
        columns.append((token_Q, logits_QV.float().log_softmax(dim=-1).amax(dim=-1)))
    tokens, logs = (torch.stack(column, dim=1).tolist() for column in zip(*columns, strict=True))
    ends = [answer.index(layout.eos_id) + 1 if layout.eos_id in answer else len(answer) for answer in tokens]
    return [Scored(one[:end], sum(log[:end])) for one, log, end in zip(tokens, logs, ends, strict=True)]


@torch.inference_mode()
def likeliest(
    model: PaliGemmaForConditionalGeneration,
    layout: TokenLayout,
    features: Tensor,
    questions: Sequence[QuestionTokens],
    images: Sequence[int],
    max_new_tokens: int,
) -> list[list[Scored]]:
    """Answer every question as `generate` does, and say how likely that and other answers are.

    The others: of all tokens that might have stood in place of one of the greedy answer's (`<eos>` included), the
    `DEPARTURES` whose beginning, up to and with that token, is the likeliest; each goes on greedily from there. They differ
    from the greedy answer and from each other, and are the likeliest by this search, not by one of all answers.

    Args: as of `generate`. Under a mask that shares prefixes, a row holds up to `DEPARTURES` times as many questions.

    Returns:
        By question the greedy answer, and then the others, the likeliest first: one may be likelier than the greedy answer.
    """
    answers, ways = [], []
    for place, steps in enumerate(_scored(model, layout, features, questions, images, max_new_tokens)):
        tokens, logs = [step.token for step in steps], [step.log for step in steps]
        before = [0.0, *accumulate(logs)]
        answers.append([Scored(tokens, before[-1])])
        departures = [
            Scored([*tokens[:number], token], before[number] + log)
            for number, step in enumerate(steps)
            for token, log in zip(step.other_tokens, step.other_logs, strict=True)
        ]
        departures.sort(key=lambda way: -way.log_probability)
        ways += [(place, way) for way in departures[:DEPARTURES]]
    ended = [way.tokens[-1] == layout.eos_id or len(way.tokens) == max_new_tokens for _, way in ways]
    going = [at for at, is_ended in enumerate(ended) if not is_ended]
    begun = [QuestionTokens(questions[ways[at][0]].prompt, [*ways[at][1].tokens, layout.eos_id]) for at in going]
    about = [images[ways[at][0]] for at in going]
    rests = _scored(model, layout, features, begun, about, max_new_tokens - 1) if going else []
    for at, rest in zip(going, rests, strict=True):
        place, way = ways[at]
        rest = rest[: max_new_tokens - len(way.tokens)]
        log_probability = way.log_probability + sum(step.log for step in rest)
        ways[at] = place, Scored(way.tokens + [step.token for step in rest], log_probability)
    for place, way in sorted(ways, key=lambda one: -one[1].log_probability):
        answers[place].append(way)
    return answers


class _Step(NamedTuple):
    """A token of an answer, those that might have stood there, and the logarithms of their probabilities."""

    token: int
    log: float
    other_tokens: list[int]
    other_logs: list[float]


def _scored(model, layout, features, questions, images, max_new_tokens) -> list[list[_Step]]:
    """Answer greedily and return every question's steps, that of `<eos>` the last; the arguments are `generate`'s."""
    columns = []
    for logits_QV, token_Q in _greedy(model, layout, features, questions, images, max_new_tokens):
        logs_QV, own_Q1 = logits_QV.float().log_softmax(dim=-1), token_Q[:, None]
        others = logs_QV.scatter(1, own_Q1, float("-inf")).topk(DEPARTURES)
        columns.append((token_Q, logs_QV.gather(1, own_Q1)[:, 0], others.indices, others.values))
    by_question = zip(*(torch.stack(column, dim=1).tolist() for column in zip(*columns, strict=True)), strict=True)
    answers = [[_Step(*step) for step in zip(*one, strict=True)] for one in by_question]
    ends = [next((n for n, step in enumerate(steps, 1) if step.token == layout.eos_id), None) for steps in answers]
    return [steps[:end] for steps, end in zip(answers, ends, strict=True)]


def _greedy(
    model: PaliGemmaForConditionalGeneration,
    layout: TokenLayout,
    features: Tensor,
    questions: Sequence[QuestionTokens],
    images: Sequence[int],
    max_new_tokens: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each step's logits [Q, V] and likeliest tokens [Q] until all have ended; the arguments are `generate`'s.

    A question that comes with an answer goes on after its tokens, `<eos>` not counted.
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
    done_Q = torch.zeros(len(questions), dtype=torch.bool, device=device)
    for step in range(1, max_new_tokens + 1):
        logits_QV = text_logits(model, hidden_QD)
        token_Q = logits_QV.argmax(dim=-1)
        yield logits_QV, token_Q
        done_Q |= token_Q == layout.eos_id
        if done_Q.all() or step == max_new_tokens:
            return
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
