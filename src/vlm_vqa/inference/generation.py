"""Greedy answers to batches of questions; questions of one image share its prefix where the mask allows it.

Shapes: Q questions, A of them that go on, I images, R rows, J questions of the fullest row, S tokens of a row (image tokens
included), K keys seen so far, T image tokens, E feature width, D hidden width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PaliGemmaForConditionalGeneration

from vlm_vqa.model.layout import PAD_SEGMENT, PREFIX_SEGMENT, QuestionTokens, TokenLayout, rows_of, visible
from vlm_vqa.model.vlm import language_of, text_hidden, text_logits
from vlm_vqa.params import Mask

DEPARTURES = 3  # ways to leave the greedy answer that `likeliest` follows


class Scored(NamedTuple):
    """An answer and what the model gives it."""

    tokens: list[int]  # with the `<eos>` that ends it, unless it was cut before
    log_probability: float  # the sum of its tokens', that of `<eos>` included


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
    tokens, logs = ([[] for _ in questions] for _ in range(2))
    for going, logits_AV, token_A in _greedy(model, layout, features, questions, images, max_new_tokens):
        # The greatest is that of the chosen token. Faster by far than logsumexp where there are 256,000.
        log_A = logits_AV.float().log_softmax(dim=-1).amax(dim=-1)
        for at, token, log in zip(going, token_A.tolist(), log_A.tolist(), strict=True):
            tokens[at].append(token)
            logs[at].append(log)
    return [Scored(*one) for one in zip(tokens, map(sum, logs), strict=True)]


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
    answers = [[] for _ in questions]
    for going, logits_AV, token_A in _greedy(model, layout, features, questions, images, max_new_tokens):
        logs_AV, own_A1 = logits_AV.float().log_softmax(dim=-1), token_A[:, None]
        others = logs_AV.scatter(1, own_A1, float("-inf")).topk(DEPARTURES)
        columns = (token_A, logs_AV.gather(1, own_A1)[:, 0], others.indices, others.values)
        for at, *step in zip(going, *(column.tolist() for column in columns), strict=True):
            answers[at].append(_Step(*step))
    return answers


def _greedy(
    model: PaliGemmaForConditionalGeneration,
    layout: TokenLayout,
    features: Tensor,
    questions: Sequence[QuestionTokens],
    images: Sequence[int],
    max_new_tokens: int,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield, step by step until all have ended, which questions go on, their logits [A, V] and likeliest tokens [A].

    The arguments are `generate`'s. A question that comes with an answer goes on after its tokens, `<eos>` not counted. One
    that has ended costs no further step, and a row's keys and values are dropped with the last of its questions.
    """
    device = features.device
    rows = rows_of(zip(images, questions, strict=True), layout.mask)
    batch = {name: value.to(device) for name, value in layout.collate(rows).items()}
    segments_RK, positions_RS = batch["segment_ids"], batch["position_ids"]
    cache = DynamicCache(config=language_of(model.config))
    allowed = visible(segments_RK, positions_RS, batch["bidirectional"])
    row_features = features[[row.image_id for row in rows]]
    hidden_RSD = text_hidden(model, row_features, batch["input_ids"], positions_RS, allowed, cache)

    row_A, number_A = torch.tensor(
        [(row, number) for row, one in enumerate(rows) for number in range(len(one.questions))], device=device
    ).T
    segment_A = torch.full_like(number_A, PREFIX_SEGMENT) if layout.mask is Mask.PREFIX_LM else number_A + 1
    # What follows a question is predicted where its last token stands.
    own_AS = segments_RK[row_A] == segment_A[:, None]
    last_A = torch.where(own_AS, torch.arange(own_AS.shape[1], device=device), 0).amax(dim=1)
    hidden_AD, position_A = hidden_RSD[row_A, last_A], positions_RS[row_A, last_A]
    going = list(range(len(questions)))
    for step in range(1, max_new_tokens + 1):
        logits_AV = text_logits(model, hidden_AD)
        token_A = logits_AV.argmax(dim=-1)
        yield going, logits_AV, token_A
        left = (token_A != layout.eos_id).nonzero()[:, 0]
        if step == max_new_tokens or not len(left):
            return
        going = [going[at] for at in left.tolist()]
        kept, row_A = row_A[left].unique(return_inverse=True)
        token_A, segment_A, position_A = token_A[left], segment_A[left], position_A[left] + 1
        if len(kept) < len(segments_RK):
            cache.batch_select_indices(kept)
            segments_RK = segments_RK[kept]
        # Each question's number among those of its row that go on; rows ascend.
        number_A = torch.arange(len(going), device=device) - torch.searchsorted(row_A, row_A)
        grid = len(kept), int(number_A.max()) + 1

        def laid_out(values_A: Tensor, fill: int, grid=grid, places=(row_A, number_A)) -> Tensor:
            return values_A.new_full(grid, fill).index_put(places, values_A)

        segment_RJ = laid_out(segment_A, PAD_SEGMENT)
        segments_RK = torch.cat([segments_RK, segment_RJ], dim=1)
        key, query = segments_RK[:, None], segment_RJ[:, :, None]
        allowed = (key == PREFIX_SEGMENT) | (key == query) & (key != PAD_SEGMENT)
        token_RJ, position_RJ = laid_out(token_A, layout.pad_id), laid_out(position_A, 1)
        hidden_AD = text_hidden(model, None, token_RJ, position_RJ, allowed, cache)[row_A, number_A]
