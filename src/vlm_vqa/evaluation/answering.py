"""Many questions to an exported model, divided among processes by image and kept, batch by batch, until the stage has ended.

What a batch holds depends on the questions alone, and processes take whole batches: answers and probabilities are the same
bytes for any number of processes. A batch's answers are kept under a hash of all that decides them.
"""

import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vlm_vqa import files
from vlm_vqa.data.feature_store import Features
from vlm_vqa.hashing import hash_json
from vlm_vqa.inference.predictor import Candidate, Predictor
from vlm_vqa.prefetch import ordered_map
from vlm_vqa.sealed import find_sealed, write_sealed
from vlm_vqa.workers import POLL_SECONDS, WorkerGroup, alone

BLANK, BLANK_SIZE = (128, 128, 128), (224, 224)
KEPT_ANSWERS = "VLM_VQA_KEPT_ANSWERS"
"""The variable that tells HELM's client where the evaluation keeps answers; whoever else runs HELM keeps none."""
IN_A_ROW = 32
"""Questions that share an image's prefix, at most: the square of a row's length is attention's memory."""

log = logging.getLogger(__name__)


class Ask(NamedTuple):
    """A question about an image of the features, or about a grey picture."""

    image_id: int | None
    question: str


Batch = list[list[Ask]]  # rows, each of one image


class KeptAnswers:
    """Answers of batches in FOLDER, by what was asked; each file is whole or not there."""

    def __init__(self, folder: Path, lock: IO[str] | None = None):
        self.folder, self._lock = folder, lock

    @classmethod
    def begin(cls, root: Path, decided_by: Any) -> "KeptAnswers":
        """Open what is kept in ROOT/KEY, a hash of `decided_by`, and remove other keys'; the main process calls it.

        UserError if another one, perhaps of a launch that was killed, is at work there.
        """
        lock = files.claim(root / "lock", f"{root}: another helm-eval is at work there. Wait for its end, or end it.")
        kept = cls(root / hash_json(decided_by)[:16], lock)
        for other in root.iterdir():
            if other.is_dir() and other != kept.folder:
                log.info("%s: removed; those answers are of another model, other data or parameters", other)
                shutil.rmtree(other)
        kept.folder.mkdir(exist_ok=True)
        if found := len(list(kept.folder.glob("*.json"))):
            log.info("%s: going on after %d batches", kept.folder, found)
        return kept

    def find(self, asked: Any) -> list[Candidate] | None:
        """Return the answers to what was asked, in its order, or None."""
        found = find_sealed(self._path(asked))
        return None if found is None else [Candidate(*one) for one in found["answers"]]

    def keep(self, asked: Any, answers: Sequence[Candidate]) -> None:
        write_sealed(self._path(asked), {"answers": [list(one) for one in answers]})

    def remove(self) -> None:
        """Forget all: the answers stand in the reports."""
        shutil.rmtree(self.folder.parent)

    def _path(self, asked: Any) -> Path:
        return self.folder / f"{hash_json(asked)[:32]}.json"


def plan_batches(asks: Iterable[Ask], predictor: Predictor, batch_size: int) -> list[Batch]:
    """Put questions into batches, the longest rows first; of equal questions about an image one is asked.

    A batch has at most `batch_size` questions, and at most as many tokens, padding included, as so many of the longest that
    the model takes would have alone; but one row at least.
    """
    of_image: dict[int | None, set[str]] = {}
    for ask in asks:
        of_image.setdefault(ask.image_id, set()).add(ask.question)
    tokens = {question: predictor.count_tokens(question) for question in set().union(*of_image.values())}
    most = min(IN_A_ROW, batch_size)
    rows: list[tuple[int, int, list[Ask]]] = []
    for image_id, questions in of_image.items():
        # Of one length together, where each is a row of its own.
        order = sorted(questions, key=lambda question: (tokens[question], question))
        for part in (order[start : start + most] for start in range(0, len(order), most)):
            shape = predictor.grid([tokens[question] for question in part])
            rows.append((*shape, [Ask(image_id, question) for question in part]))
    # The grey picture's apart: it is none of the records'.
    rows.sort(key=lambda row: (row[2][0].image_id is None, -row[1], row[2]))
    batches: list[Batch] = []
    count = height = widest = 0
    for high, wide, part in rows:
        count, height = count + len(part), height + high
        fits = count <= batch_size and height * widest <= batch_size * predictor.longest_row
        if not batches or not fits or (part[0].image_id is None) != (batches[-1][0][0].image_id is None):
            batches.append([])
            count, height, widest = len(part), high, wide
        batches[-1].append(part)
    return batches


def answer_asks(
    asks: Iterable[Ask],
    predictor: Predictor,
    store: Features,
    batch_size: int,
    what: str,
    running: WorkerGroup | None = None,
    kept: KeptAnswers | None = None,
) -> dict[Ask, Candidate]:
    """Answer together with the other processes; the main one returns all answers, the others nothing.

    Args:
        asks: the same in all processes.
        what: stands beside the progress bar.
        running: by default this process alone; several need `kept`, by which they find each other's answers.
    """
    running = running or alone()
    batches = plan_batches(asks, predictor, batch_size)
    found: dict[int, list[Candidate]] = {}
    total = sum(len(part) for batch in batches for part in batch)

    def prepare(number: int) -> tuple[int, list[Candidate] | None, dict[str, Tensor]]:
        """Find what is kept of a batch, or else read its pictures, while the one before is answered, or their features."""
        answers = kept.find(asked_in(batches[number])) if kept else None
        return number, answers, inputs_of(batches[number], store) if answers is None else {}

    with (
        tqdm(total=total, desc=what, unit="answer", mininterval=1, disable=not running.main) as bar,
        ThreadPoolExecutor(1, "pictures", torch.set_num_threads, (1,)) as pool,
    ):
        begun, claimed = time.monotonic(), running.claim(range(len(batches)))
        # Stored features are there at once: a thread more would only be in the way of others.
        prepared = ordered_map(pool, prepare, claimed, window=2) if store.live else map(prepare, claimed)
        for number, answers, inputs in prepared:
            asked = asked_in(batches[number])
            if answers is None:
                answers = answer_batch(batches[number], inputs, predictor, store)
                running.add("milliseconds", round(1000 * (time.monotonic() - begun)))
                running.add("answered", len(asked))
                if kept:
                    kept.keep(asked, answers)
            found[number] = answers
            bar.update(running.add("done", len(asked)) - bar.n)
            begun = time.monotonic()
        running.add("finished", 1)
        while running.main and running.add("finished") < running.size:
            time.sleep(POLL_SECONDS)
            bar.update(running.add("done") - bar.n)
    if not running.main:
        return {}
    answered, milliseconds = running.add("answered"), running.add("milliseconds")
    rate = 1000 * answered / max(milliseconds, 1)
    log.info("%d answers by %d process(es), %.1f a second and process", answered, running.size, rate)
    answers: dict[Ask, Candidate] = {}
    for number, batch in enumerate(batches):
        # What is not found here another process has kept.
        answers |= zip(asked_in(batch), found.get(number) or kept.find(asked_in(batch)), strict=True)  # ty: ignore
    return answers


def asked_in(batch: Batch) -> list[Ask]:
    """Return a batch's questions in the order of its answers."""
    return [ask for part in batch for ask in part]


def inputs_of(batch: Batch, store: Features) -> dict[str, Tensor]:
    """Return what the features of a batch's images are made of, row by row; nothing of the grey picture's."""
    shown = [part[0].image_id for part in batch]
    return {} if None in shown else store.inputs(shown)  # ty: ignore[invalid-argument-type] - none is None


def answer_batch(batch: Batch, inputs: dict[str, Tensor], predictor: Predictor, store: Features) -> list[Candidate]:
    """Answer the questions of a batch, which are about images of the records or all about the grey picture."""
    features = store.of(inputs) if inputs else predictor.encode([Image.new("RGB", BLANK_SIZE, BLANK)])[[0] * len(batch)]
    rows = [row for row, part in enumerate(batch) for _ in part]
    return predictor.answer_features([ask.question for ask in asked_in(batch)], features, rows)
