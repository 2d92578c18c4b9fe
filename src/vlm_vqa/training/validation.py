"""Loss and score of questions while training, without generation and without gathering weights.

Every distinct answer that people gave to a question becomes a branch of its image's row, and the question scores what the
branch scores of which each token is the likeliest: that of greedy decoding, but where an answer equals a reference only when
both are normalised, or is spelled with other tokens (docs/training.md#validation). Rows are divided among the processes of a
launch; each runs equally many forward passes, as FSDP and ZeRO-3 want it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule

from vlm_vqa.data.records import said_answers
from vlm_vqa.errors import UserError
from vlm_vqa.model.layout import QuestionTokens, Row, TokenLayout, TooManyTokens
from vlm_vqa.params import HELM_MAX_TOKENS, Mask, Params, TooLong, ValidateOn
from vlm_vqa.training.dataset import Collator

if TYPE_CHECKING:
    from datasets import Dataset as Records

log = logging.getLogger(__name__)

LOSS, SCORE, ANSWERS = "validation_loss", "validation_score", "validation_answers"
"""Names in the Trainer's log: figures of a validation, and what was said to the questions that are shown."""
COLUMNS = (LOSS, SCORE, "validation_blind_score", "train_part_loss", "train_part_score")
SHOWN = 12

Score = Callable[[str, Sequence[str]], float]  # scores an answer, 0 to 1, beside those of people
Forward = Callable[[Sequence[Row]], tuple[Tensor, Tensor]]
"""Turns rows into the logits [M, V] and labels [M] of their supervised positions, row by row."""


class Branch(NamedTuple):
    """A question with one of its distinct answers."""

    question: int  # its place in the part
    tokens: QuestionTokens
    score: float  # what greedy decoding would score that wrote this answer
    main: bool  # it is the answer that is taught, whose loss counts


class Part:
    """Some questions as branches in rows, and how a model's outputs on them become figures."""

    def __init__(
        self, records: "Records", layout: TokenLayout, too_long: TooLong, score_of: Score, a_row: int, a_batch: int
    ):
        """Tokenise the questions with all their answers, each of which `score_of` scores beside those of its question.

        At most `a_row` branches share a row, and `a_batch` a forward pass. UserError if a main answer does not fit, with
        `TooLong.ERROR`.
        """
        self.questions, self.score_of, self.a_batch, self.left_out = records.to_list(), score_of, a_batch, 0
        self.branches: list[Branch] = []
        by_image: dict[int, list[int]] = {}
        for number, row in enumerate(self.questions):
            for branch in self._branches(number, row, layout, too_long):
                by_image.setdefault(row["image_id"], []).append(len(self.branches))
                self.branches.append(branch)
        if self.left_out:
            log.warning("%d answers of the validation questions do not fit prompt.text_length", self.left_out)
        self._rows: list[tuple[int, list[int]]] = []
        for image_id, numbers in by_image.items():
            self._rows += [(image_id, numbers[at : at + a_row]) for at in range(0, len(numbers), a_row)]
        self._rows.sort(key=lambda row: -sum(len(self.branches[one].tokens.read) for one in row[1]))

    def _branches(
        self, number: int, row: Mapping[str, Any], layout: TokenLayout, too_long: TooLong
    ) -> Iterator[Branch]:
        main, seen = row["multiple_choice_answer"], set()
        for answer in dict.fromkeys([main, *said_answers(row["answers"])]):
            try:
                tokens = layout.tokenize(row["question"], answer)
            except TooManyTokens as error:
                if answer == main and too_long is TooLong.ERROR:
                    raise UserError(f"question_id {row['question_id']}: {error}") from error
                self.left_out += 1
                continue
            if tuple(tokens.answer) not in seen:
                seen.add(tuple(tokens.answer))
                written = layout.decode(tokens.answer[:-1][:HELM_MAX_TOKENS])
                yield Branch(number, tokens, self.score_of(written, row["answers"]), answer == main)

    def batches(self, process: int, processes: int) -> Iterator[tuple[list[Row], list[int]]]:
        """Yield this process's forward passes: rows, and the places of their branches; every process has equally many."""
        batches: list[list[tuple[int, list[int]]]] = [[]]
        for row in self._rows:
            if batches[-1] and sum(len(numbers) for _, numbers in [*batches[-1], row]) > self.a_batch:
                batches.append([])
            batches[-1].append(row)
        for at in range(process, -(-len(batches) // processes) * processes, processes):
            # A row without questions is computed like any other and says nothing.
            rows = batches[at] if at < len(batches) else [(self._rows[0][0], [])]
            filled = [Row(image_id, tuple(self.branches[one].tokens for one in numbers)) for image_id, numbers in rows]
            yield filled, [one for _, numbers in rows for one in numbers]

    def scores(self, right: Tensor) -> list[float]:
        """Return every question's score, 0 to 1; `right`, float64 [branches], is 1 where greedy decoding writes that."""
        scores = [0.0] * len(self.questions)
        for branch, hit in zip(self.branches, right.tolist(), strict=True):
            scores[branch.question] = max(scores[branch.question], branch.score * hit)
        return scores


class Validation:
    """The fixed questions of a training, measured whenever asked."""

    def __init__(
        self,
        params: Params,
        layout: TokenLayout,
        collator: Collator,
        held: "Records",
        trained: "Records",
        other_image: Mapping[int, int],
        metrics: Mapping[str, Score],
        process: int = 0,
        processes: int = 1,
    ):
        """Tokenise the questions.

        Args:
            held, trained: as `validation_questions` gives them.
            other_image: shown instead of a held question's own to measure the blind score, by image id.
            metrics: `vqa_accuracy`, which scores questions of ten answers each, and `answer_accuracy`.
        """
        settings, train = params.validation, params.train
        self.settings, self.layout, self.collator = settings, layout, collator
        self.process, self.processes = process, processes
        ten = all(len(answers) == 10 for answers in held["answers"])
        self.metric = "vqa_accuracy" if ten else "answer_accuracy"
        a_row = 1 if layout.mask is Mask.PREFIX_LM else train.questions_per_row
        how = (layout, params.prompt.too_long, metrics[self.metric], a_row, train.batch_size)
        self.held, self.trained = Part(held, *how), Part(trained, *how) if len(trained) else None
        self.other_image = other_image
        order = np.random.RandomState(params.seed).permutation(len(held))
        one_each = {self.held.questions[at]["image_id"]: self.held.questions[at] for at in order}
        self.shown = list(one_each.values())[:SHOWN]  # questions whose answers are kept, each about another image

    def describe(self) -> str:
        of = "a dev part of the training images" if self.settings.from_ is ValidateOn.TRAIN else "the validation split"
        return f"{self.metric} of {len(self.held.questions)} questions of {of}"

    @torch.no_grad()
    def measure(self, model: nn.Module, device: torch.device, beat: Callable[[], None]) -> dict[str, Any]:
        """Return the figures of `COLUMNS` and, as `ANSWERS`, what is said to the questions that are shown.

        All processes must call it, and get the same. `model` is as the launch has wrapped it, and left in training mode;
        `beat` is called before each forward pass.
        """

        def forward(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
            beat()
            inputs = self.collator.ready(send_to_device(self.collator(rows), device))
            places = torch.cat([inputs["prefix_places"].flatten(), inputs["rest_places"]])
            return model(**inputs)["logits"], inputs["labels"].flatten()[places[inputs["supervised"]]]

        model.eval()
        figures = dict(zip(COLUMNS[:2], self._part(self.held, forward, device), strict=True))
        figures[COLUMNS[2]] = self._part(self.held, forward, device, self.other_image)[1]
        if self.trained is not None:
            figures |= zip(COLUMNS[3:], self._part(self.trained, forward, device), strict=True)
        said = self._answers(forward, device)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Without a backward pass after it, FSDP2 would leave the outermost weights gathered.
                module.reshard()
        model.train()
        return figures | {ANSWERS: said}

    def _part(
        self, part: Part, forward: Forward, device: torch.device, other: Mapping[int, int] | None = None
    ) -> tuple[float, float]:
        found = torch.zeros(2, len(part.branches), dtype=torch.float64)
        for rows, numbers in part.batches(self.process, self.processes):
            rows = [Row(other[row.image_id], row.questions) for row in rows] if other else rows
            logits, labels = forward(rows)
            lengths = torch.tensor([len(part.branches[one].tokens.answer) for one in numbers], dtype=torch.long)
            owner = torch.repeat_interleave(torch.arange(len(numbers)), lengths)
            place = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]
            wrong = (logits.argmax(-1) != labels).cpu() & (place < HELM_MAX_TOKENS)
            lost = nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().cpu()
            sums = torch.zeros(2, len(numbers), dtype=torch.float64).index_add(1, owner, torch.stack([wrong, lost]))
            found[0, numbers], found[1, numbers] = (sums[0] == 0).double(), sums[1]
        if self.processes > 1:
            found = found.to(device)
            distributed.all_reduce(found)
        right, losses = found.cpu()
        scores, main = part.scores(right), [at for at, branch in enumerate(part.branches) if branch.main]
        # Of a token of the main answers, in nats.
        loss = losses[main].sum().item() / max(sum(len(part.branches[at].tokens.answer) for at in main), 1)
        return loss, sum(scores) / len(scores)

    def _answers(self, forward: Forward, device: torch.device) -> list[str]:
        """Decode greedily, each step a whole forward pass of the answers so far: slow, and the same under every launch."""
        prompts = [self.layout.tokenize(row["question"]).prompt for row in self.shown]
        said: list[list[int]] = [[] for _ in prompts]
        unfinished, eos = list(range(len(prompts))), self.layout.eos_id
        for _ in range(HELM_MAX_TOKENS):
            asked = ((self.shown[at]["image_id"], QuestionTokens(prompts[at], [*said[at], eos])) for at in unfinished)
            logits, _ = forward([Row(image_id, (tokens,)) for image_id, tokens in asked])
            lasts = torch.tensor([len(said[at]) + 1 for at in unfinished]).cumsum(0) - 1
            following = logits[lasts.to(logits.device)].argmax(-1)
            if self.processes > 1:
                # So that all go on with the same ones, however each rounds.
                distributed.broadcast(following, 0)
            for at, token in zip(unfinished, following.tolist(), strict=True):
                said[at].append(token)
            if not (unfinished := [at for at in unfinished if said[at][-1] != eos]):
                break
        return [self.layout.decode([token for token in tokens if token != eos]) for tokens in said]


def validations(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the entries of the Trainer's log that hold a validation's figures."""
    return [entry for entry in history if SCORE in entry]


def best_step(history: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the step with the highest validation score, of such the one with the lowest loss; None before the first."""
    found = [entry for entry in validations(history) if entry["step"]]
    return max(found, key=lambda entry: (entry[SCORE], -entry[LOSS], -entry["step"]))["step"] if found else None


def is_over(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Tell whether the last `patience` validations had no higher score than one before them."""
    scores = [entry[SCORE] for entry in validations(history) if entry["step"]]
    return patience is not None and bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= patience
