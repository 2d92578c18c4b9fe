"""Which questions make a global batch, which of them share a row, and which rows a micro-batch.

A global batch is what one optimizer step takes: exactly batch_size x gradient_accumulation_steps x processes questions.
Images are gathered over all of it, so sharing does not depend on a small batch_size; its rows, sorted by length, are then
divided into the micro-batches of all processes, of about equal size.
"""

import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import BatchSampler

LOOKAHEAD = 64  # images looked through for one that fits before an image is cut at a global batch's end


class PlannedRow(NamedTuple):
    """One sequence to be: an image, and questions about it by their place in the data."""

    image_id: int
    questions: tuple[int, ...]
    epoch: int = 0  # decides which of its answers a question has


@dataclass(frozen=True)
class GlobalBatchShape:
    """The size of an optimizer step and who computes which part of it."""

    questions: int  # questions of a global batch, over all processes
    questions_per_row: int
    """Most questions that share a row; those of an image beyond it come in another row and another step."""
    micro_batches: int  # micro-batches of each process: the gradient accumulation steps
    processes: int = 1
    process: int = 0  # this process's number


class GlobalBatchSampler(BatchSampler):
    """Micro-batches of planned rows: global batch after global batch, `micro_batches` each, those of one process.

    The order depends on seed and epoch only; every question comes once an epoch. Where rows are shared, images come in
    random order, and one is cut only where none of the next ones fits into the rest of a global batch. Where they are not,
    questions come in random order.
    """

    def __init__(
        self,
        image_ids: Sequence[int],
        text_lengths: Callable[[int], Sequence[int]],
        prefix_length: int,
        shape: GlobalBatchShape,
        seed: int,
    ):
        """`text_lengths` gives every question's tokens after the prefix, in an epoch; a prefix comes once a row."""
        self.image_ids, self.prefix_length, self.shape, self.seed = list(image_ids), prefix_length, shape, seed
        self._lengths_of = text_lengths
        self.set_epoch(0)
        # What accelerate and the Trainer ask of any batch sampler: batches have no fixed number of rows.
        self.batch_size, self.drop_last = None, False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; called by the Trainer at the start of each epoch."""
        self.epoch = epoch
        self.text_lengths = self._lengths_of(epoch)

    def __len__(self) -> int:
        return -(-len(self.image_ids) // self.shape.questions) * self.shape.micro_batches

    def __iter__(self) -> Iterator[list[PlannedRow]]:  # ty: ignore[incompatible-method-override] - torch says int
        for batch in self.global_batches():
            rows = [PlannedRow(self.image_ids[group[0]], group, self.epoch) for group in batch]
            rows.sort(key=self._length, reverse=True)
            sizes = divide([self._length(row) for row in rows], self.shape.micro_batches * self.shape.processes)
            ends = itertools.accumulate(sizes)
            # Every process must take part in every micro-batch: with nothing left to learn, by a row that teaches nothing.
            idle = PlannedRow(rows[-1].image_id, (), self.epoch)
            parts = [rows[end - size : end] or [idle] for size, end in zip(sizes, ends, strict=True)]
            # One of each process in turn, so that they keep step.
            yield from parts[self.shape.process :: self.shape.processes]

    def global_batches(self) -> Iterator[list[tuple[int, ...]]]:
        """Yield each global batch as groups of questions, those of an image together where they may share a row."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.image_ids), generator=generator).tolist()
        if self.shape.questions_per_row == 1:
            size = self.shape.questions
            for start in range(0, len(shuffled), size):
                yield [(question,) for question in shuffled[start : start + size]]
            return
        by_image: dict[int, list[int]] = {}
        for question in shuffled:
            by_image.setdefault(self.image_ids[question], []).append(question)
        groups: list[tuple[int, ...]] = []
        for questions in by_image.values():
            # Equal parts: 7 at most 6 a row are 4 and 3, not 6 and 1.
            parts = -(-len(questions) // self.shape.questions_per_row)
            groups += [tuple(questions[part::parts]) for part in range(parts)]
        order = torch.randperm(len(groups), generator=generator).tolist()
        yield from fill([groups[at] for at in order], self.shape.questions)

    def _length(self, row: PlannedRow) -> int:
        return self.prefix_length + sum(self.text_lengths[question] for question in row.questions)


def fill(groups: Sequence[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield global batches of exactly `size` questions, the last with what is left, cutting as few groups as it can.

    Groups are taken in order; one that does not fit, or would leave a rest that no group fills, waits for the
    next one. Only where none of the next `LOOKAHEAD` groups fits is the first of them cut.
    """
    waiting = deque(groups)
    least = min(map(len, groups), default=0)
    while waiting:
        rest, batch, passed = size, list[tuple[int, ...]](), list[tuple[int, ...]]()
        while rest and waiting and len(passed) < LOOKAHEAD:
            group = waiting.popleft()
            fits = rest - len(group) == 0 or rest - len(group) >= least
            (batch if fits else passed).append(group)
            rest -= len(group) * fits
        waiting.extendleft(reversed(passed))
        while rest and waiting:
            group = waiting.popleft()
            batch.append(group[:rest])
            if group[rest:]:
                waiting.appendleft(group[rest:])
            rest -= len(batch[-1])
        yield batch


def divide(lengths: Sequence[int], parts: int) -> list[int]:
    """Cut rows, the longest first, into `parts` runs whose largest (rows times its longest row) is smallest.

    Return how many rows each part holds; the last ones may be 0 where there are fewer rows than parts.
    """
    capacities = range(lengths[0], lengths[0] * len(lengths))
    enough = bisect_left(capacities, True, key=lambda capacity: len(_fill_parts(lengths, capacity)) <= parts)
    sizes = _fill_parts(lengths, capacities.start + enough)
    # Fewer may do; a part without rows would still cost a row.
    while len(sizes) < min(parts, len(lengths)):
        fullest = sizes.index(max(sizes))
        sizes[fullest : fullest + 1] = [sizes[fullest] - sizes[fullest] // 2, sizes[fullest] // 2]
    return sizes + [0] * (parts - len(sizes))


def _fill_parts(lengths: Sequence[int], capacity: int) -> list[int]:
    """Return the sizes of the runs that arise when each takes rows until another would exceed `capacity`."""
    sizes, longest = list[int](), 0
    for length in lengths:
        if sizes and (sizes[-1] + 1) * longest <= capacity:
            sizes[-1] += 1
        else:
            sizes.append(1)
            longest = length
    return sizes
