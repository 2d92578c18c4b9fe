"""HELM's client for an exported model: requests come from many threads, one worker answers them in batches.

HELM builds it from `model_deployments.yaml`, whose `args` are the constructor's. It speaks `vlm_vqa` as any user would.
"""

import os
import pkgutil
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from helm.clients.client import Client
from helm.common.hierarchical_logger import hlog
from helm.common.media_object import TEXT_TYPE
from helm.common.request import ErrorFlags, GeneratedOutput, Request, RequestResult
from PIL import Image

from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.answering import KEPT_ANSWERS, KeptAnswers
from vlm_vqa.evaluation.helm.run import ANSWERED, FAILED
from vlm_vqa.hashing import sha256_bytes
from vlm_vqa.inference.predictor import Candidate
from vlm_vqa.launch_file import read_copies
from vlm_vqa.params import Params, load_params
from vlm_vqa.workers import named

_LOADING = threading.Lock()


class Asked(NamedTuple):
    """A question about an image; tuples sort by image first."""

    image_key: str
    question: str


class BatchWorker:
    """Gathers the requests of many threads and answers them on one thread of its own.

    A batch goes when it is full, or when no request has come for a while. If as many threads ask as a batch holds,
    every batch but the last is full; and since its rows are sorted, it is the same batch in every run, whatever order
    the threads came in: the answers do not depend on timing.
    """

    def __init__(
        self, answer: Callable[[Sequence[Asked], Sequence[Any]], list[str]], batch_size: int, patience: float = 0.25
    ):
        """Start the thread; it alone calls `answer`. `patience` is in seconds."""
        self._answer = answer
        self._batch_size = batch_size
        self._patience = patience
        self._requests: queue.SimpleQueue[tuple[Asked, Any, Future[str]]] = queue.SimpleQueue()
        # A daemon: a thread that waits for questions must not keep the process alive.
        threading.Thread(target=self._serve, name="answers", daemon=True).start()

    def ask(self, asked: Asked, image: Any) -> str:
        """Return the answer; blocks, and raises what answering its batch raised."""
        future: Future[str] = Future()
        self._requests.put((asked, image, future))
        return future.result()

    def _serve(self) -> None:
        while True:
            batch = sorted(self._gather(), key=lambda request: request[0])
            futures = [future for _, _, future in batch]
            try:
                answers = self._answer([asked for asked, _, _ in batch], [image for _, image, _ in batch])
                for future, answer in zip(futures, answers, strict=True):
                    future.set_result(answer)
            except BaseException as error:  # noqa: BLE001 - it belongs to those who wait, and the thread must go on
                for future in futures:
                    if not future.done():
                        future.set_exception(error)

    def _gather(self) -> list[tuple[Asked, Any, "Future[str]"]]:
        batch = [self._requests.get()]
        while len(batch) < self._batch_size:
            try:
                batch.append(self._requests.get(timeout=self._patience))
            except queue.Empty:
                break
        return batch


class LoadedModel:
    """The one model of this process (`shared_model`) and the worker that owns it."""

    def __init__(self, export: str, params: Params, predictor: str):
        asked = params.evaluation
        device = "cpu" if read_copies(named(asked.launch), key="evaluation.launch").on_cpu else "cuda"
        dtype = getattr(torch, asked.compute_dtype.value)
        load = pkgutil.resolve_name(predictor)
        self.predictor = load(export, device=device, max_new_tokens=asked.max_new_tokens, dtype=dtype)
        kept = os.environ.get(KEPT_ANSWERS)
        self._kept = KeptAnswers(Path(kept)) if kept else None
        self.max_image_pixels = params.data.max_image_pixels
        self._answered = 0
        # As many as HELM has threads, so that batches are full; the model gets them in pieces that fit it.
        self._piece = asked.batch_size
        self.worker = BatchWorker(self._answer, batch_size=asked.helm_threads)

    def _answer(self, asked: Sequence[Asked], images: Sequence[Image.Image]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(asked), self._piece):
            piece = asked[start : start + self._piece]
            given = self._kept.find(piece) if self._kept else None
            if given is None:
                given = self._answer_piece(piece, images[start:])
                if self._kept:
                    self._kept.keep(piece, given)
            answers += [one.answer for one in given]
        self._answered += len(answers)
        hlog(f"{ANSWERED} {self._answered}")
        return answers

    def _answer_piece(self, piece: Sequence[Asked], images: Sequence[Image.Image]) -> list[Candidate]:
        # Each image is encoded once, however many questions there are about it.
        distinct = dict(zip((one.image_key for one in piece), images, strict=False))
        row_of = {key: row for row, key in enumerate(distinct)}
        features = self.predictor.encode(list(distinct.values()))
        rows = [row_of[one.image_key] for one in piece]
        return self.predictor.answer_features([one.question for one in piece], features, rows)


@cache
def load(export: str, params: str, predictor: str) -> Future[LoadedModel]:
    """Load a model, once: what failed to load fails for all, for HELM waits for every thread, and each would try again."""
    loaded: Future[LoadedModel] = Future()
    try:
        loaded.set_result(LoadedModel(export, load_params(params), predictor))
    except Exception as error:  # noqa: BLE001 - raised by all
        loaded.set_exception(error)
    return loaded


def shared_model(export: str, params: str, predictor: str) -> LoadedModel:
    """Return this process's model: HELM builds clients from its threads without a lock and so may build several."""
    with _LOADING:
        return load(export, params, predictor).result()


class VlmVqaClient(Client):
    """Answers HELM's `vqa` requests with an exported model.

    Every error ends the run at once: a model on this machine that failed will fail again, and HELM would otherwise ask
    for minutes. HELM's cache is not used: its keys, the model's name and the image's path, stay when either is made anew.
    What an evaluation that was ended has answered is found by the picture's bytes, where the evaluation keeps it.
    """

    def __init__(
        self,
        export: str = "models/export",
        params: str = "params.yaml",
        predictor: str = "vlm_vqa.inference.predictor:Predictor.from_export",
    ):
        """Remember what to load; the first request loads it.

        Args:
            export: folder of the exported model.
            params: the parameter file; `evaluation.*` and `data.max_image_pixels` count.
            predictor: where to find the callable (folder, max_new_tokens=) that loads the model, as module:name.
        """
        self._source = (export, params, predictor)

    def make_request(self, request: Request) -> RequestResult:
        """Answer one request; failures come back as a fatal result that HELM does not retry."""
        try:
            return self._answer(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
            message = str(error) if isinstance(error, UserError) else f"{error!r}\n{traceback.format_exc()}"
            return RequestResult(
                success=False,
                cached=False,
                completions=[],
                embedding=[],
                error=f"{FAILED} {message}",
                error_flags=ErrorFlags(is_retriable=False, is_fatal=True),
            )

    def _answer(self, request: Request) -> RequestResult:
        model = shared_model(*self._source)
        instruction, image_path, question = _read_prompt(request)
        if instruction != model.predictor.instruction:
            raise UserError(
                f"HELM asks with the instruction {instruction!r}, but the exported model was trained with "
                f"{model.predictor.instruction!r}. Set prompt.instruction to HELM's text and train again."
            )
        try:
            data = Path(image_path).read_bytes()
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            raise UserError(f"{image_path}: {reason}. Run the helm-eval stage again.") from error
        image = open_image(data, image_path, model.max_image_pixels)
        begun = time.time()
        answer = model.worker.ask(Asked(sha256_bytes(data), question), image)
        return RequestResult(
            success=True,
            cached=False,
            request_time=time.time() - begun,
            request_datetime=int(begun),
            completions=[GeneratedOutput(text=answer, logprob=0, tokens=[])],
            embedding=[],
        )


def _read_prompt(request: Request) -> tuple[str, str, str]:
    """Take instruction, image path and question out of a request of HELM's `vqa`.

    HELM's order is instruction, line break, image, question; the model's own layout puts the image first, which is done
    where the model is asked.
    """
    objects = request.multimodal_prompt.media_objects if request.multimodal_prompt else []
    kinds = ["text" if media.is_type(TEXT_TYPE) else "image" for media in objects]
    if kinds.count("image") != 1 or kinds[-1] != "text":
        raise UserError(f"HELM's request holds {kinds}, not instruction, one image and question. Use its `vqa` run.")
    at = kinds.index("image")
    before = "".join(media.text or "" for media in objects[:at])
    question = "".join(media.text or "" for media in objects[at + 1 :])
    return before.removesuffix("\n"), str(objects[at].location), question
