"""HELM's client for an exported model: requests come from many threads, one worker answers them in batches.

HELM builds it from `model_deployments.yaml`, whose `args` are the constructor's. It speaks `vlm_vqa` as any user would.
"""

import pkgutil
import threading
import time
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from helm.clients.client import Client
from helm.common.hierarchical_logger import hlog
from helm.common.media_object import TEXT_TYPE
from helm.common.request import ErrorFlags, GeneratedOutput, Request, RequestResult
from PIL import Image

from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.helm.batching import Asked, BatchWorker
from vlm_vqa.evaluation.helm.run import ANSWERED, FAILED
from vlm_vqa.params import Params, load_params

_LOADING = threading.Lock()


class LoadedModel:
    """The one model of this process (`shared_model`) and the worker that owns it."""

    def __init__(self, export: str, params: Params, predictor: str):
        self.predictor = pkgutil.resolve_name(predictor)(export, max_new_tokens=params.evaluation.max_new_tokens)
        self.max_image_pixels = params.data.max_image_pixels
        self._answered = 0
        # As many as HELM has threads, so that batches are full; the model gets them in pieces that fit it.
        self._piece = params.evaluation.batch_size
        self.worker = BatchWorker(self._answer, batch_size=params.evaluation.helm_threads)

    def _answer(self, asked: Sequence[Asked], images: Sequence[Image.Image]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(asked), self._piece):
            piece = asked[start : start + self._piece]
            # Each image is encoded once, however many questions there are about it.
            distinct = dict(zip((one.image_key for one in piece), images[start:], strict=False))
            row_of = {key: row for row, key in enumerate(distinct)}
            features = self.predictor.encode(list(distinct.values()))
            rows = [row_of[one.image_key] for one in piece]
            given = self.predictor.answer_features([one.question for one in piece], features, rows)
            answers += [one.answer for one in given]
        self._answered += len(answers)
        hlog(f"{ANSWERED} {self._answered}")
        return answers


@cache
def load(export: str, params: str, predictor: str) -> LoadedModel | Exception:
    """Load a model, once: what failed to load fails for all, for HELM waits for every thread, and each would try again."""
    try:
        return LoadedModel(export, load_params(params), predictor)
    except Exception as error:  # noqa: BLE001 - raised by all
        return error


def shared_model(export: str, params: str, predictor: str) -> LoadedModel:
    """Return this process's model: HELM builds clients from its threads without a lock and so may build several."""
    with _LOADING:
        loaded = load(export, params, predictor)
    if isinstance(loaded, Exception):
        raise loaded
    return loaded


class VlmVqaClient(Client):
    """Answers HELM's `vqa` requests with an exported model.

    Every error ends the run at once: a model on this machine that failed will fail again, and HELM would otherwise ask
    for minutes. Nothing is cached: HELM's keys, the model's name and the image's path, stay when either is made anew.
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
        answer = model.worker.ask(Asked(image_path, question), image)
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
