"""The export over OpenAI's protocol: the handler of `transformers serve`, and before it a front that reads every request.

docs/serving.md says what the stock server alone would do, and no switch of it changes. So the front takes picture and
question out of a request, makes the model's inputs by the layout that training used, and hands the handler these and a
length; nothing else of a request gets there.
"""

import asyncio
import base64
import hmac
import json
import os
import socket
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import BatchFeature
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.utils import GenerationState
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.model.layout import Row, clean

MODEL = "vlm-vqa"  # the one model's name in requests
KEY = "VLM_VQA_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost")
BODY_BYTES, READ_SECONDS = 16 * 2**20, 60
AT_ONCE = 128
"""Connections; more are answered with 503. With `BODY_BYTES` it bounds memory."""
GRACE_SECONDS = 10  # how long SIGTERM waits for answers that have begun
_LONGEST = 10_000  # characters of a question: megabytes take seconds to tokenise
_READ = {"model", "messages", "stream", "max_tokens", "max_completion_tokens"}
_IDLE = {"seed", "top_p", "user", "metadata", "store", "stream_options"}  # what changes no greedy answer
_ONLY = {"temperature": 0, "n": 1, "stop": [], "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False}


class _Inputs:
    """Stands where the handler expects a processor: the inputs that it would make are made already."""

    def __init__(self, predictor: Predictor):
        self.tokenizer, self._layout = predictor.processor.tokenizer, predictor.layout

    def apply_chat_template(self, messages: list[dict], **_: Any) -> BatchFeature:
        """Return the inputs, which `Front.chat` has put where the picture's address would be."""
        return messages[0]["content"][0]["url"]

    def decode(self, token_ids: torch.Tensor, **_: Any) -> str:
        """Return an answer's text, as everywhere here."""
        return self._layout.decode(token_ids.tolist())


class Front:
    """What a request passes before the stock handler, with the `key` that it must bring, if any."""

    def __init__(self, predictor: Predictor, max_pixels: int, key: str | None):
        self.predictor, self.max_pixels, self.key = predictor, max_pixels, key
        # The stock attention: ours knows rows only, for which it is always given a mask.
        predictor.model.model.language_model.set_attn_implementation("eager")
        self.longest_answer: int = predictor.model.generation_config.max_new_tokens
        manager = ModelManager(model_timeout=-1)
        manager.force_model = MODEL
        manager.loaded_models[f"{MODEL}@main"] = TimedModel(predictor.model, -1, processor=_Inputs(predictor))  # ty: ignore[invalid-argument-type]
        self._stock = ChatCompletionHandler(manager, GenerationState())
        # One picture at a time is held decoded, however many wait.
        self._decoder = ThreadPoolExecutor(1)

    async def chat(self, request: Request) -> Response:
        """Answer one question about one picture: POST /v1/chat/completions."""
        self._check_key(request)
        body = parse(await read(request))
        if body.get("model") != MODEL:
            raise HTTPException(404, f"model: there is none called {body.get('model')!r} here, only {MODEL!r}.")
        question, picture = asked(body, self.predictor.instruction)
        most = max_tokens(body, self.longest_answer)
        inputs = await asyncio.get_running_loop().run_in_executor(self._decoder, self.inputs, question, picture)
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": inputs}}]}
        body = {"model": MODEL, "messages": [message], "max_tokens": most, "stream": body.get("stream") is True}
        return await self._stock.handle_request(body, f"chatcmpl-{uuid.uuid4().hex}")

    async def models(self, request: Request) -> Response:
        """Name the model: GET /v1/models."""
        self._check_key(request)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": MODEL}
        return JSONResponse({"object": "list", "data": [model | {"weights_hash": self.predictor.weights_hash}]})

    async def health(self, _: Request) -> Response:
        """Say that the model is loaded: GET /health."""
        return JSONResponse({"status": "ok"})

    def inputs(self, question: str, picture: bytes) -> BatchFeature:
        """Return what the stock model computes the trained function of.

        `input_ids`, `attention_mask` and `token_type_ids` are int64 [1, S], `pixel_values` [1, 3, H, W].

        UserError: the picture cannot be decoded or is too large, or the question is too long.
        """
        layout = self.predictor.layout
        grid = layout.collate([Row(0, (layout.tokenize(question),))])
        image = open_image(picture, "image_url", self.max_pixels, bound="--max-image-pixels")
        return BatchFeature(
            {
                "input_ids": grid["input_ids"],
                "attention_mask": torch.ones_like(grid["input_ids"]),
                # In PaliGemma 0 marks the one block that sees all of itself; all else is causal.
                "token_type_ids": (~grid["bidirectional"]).long(),
                "pixel_values": self.predictor.preprocess([image]),
            }
        )

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self.key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            raise HTTPException(
                401, f"The key is missing or wrong: send the server's {KEY} as `Authorization: Bearer`."
            )


async def read(request: Request) -> bytes:
    """Return a request's body. A larger one is read to its end and forgotten: its sender would not hear a refusal before."""
    data, size = bytearray(), 0
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= BODY_BYTES:
                    data += chunk
    except TimeoutError as error:
        raise HTTPException(408, f"The request was not complete after {READ_SECONDS} s.") from error
    if size > BODY_BYTES:
        raise HTTPException(413, f"The request has {size:,} bytes; {BODY_BYTES:,} are read. Make the picture smaller.")
    return bytes(data)


def parse(data: bytes) -> dict[str, Any]:
    """Return a request's fields; UserError names one that would be ignored, or that this server could not keep."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError("The request is not JSON.") from error
    if not isinstance(body, dict):
        raise UserError("The request is not a JSON object.")
    for name, value in body.items():
        if name in _ONLY and value not in (None, _ONLY[name]):
            raise UserError(f"{name}: answers are greedy, one each; only {json.dumps(_ONLY[name])} is served.")
        if name not in _READ | _IDLE | set(_ONLY) and value is not None:
            raise UserError(f"{name[:50]}: is not served here. Leave it out.")
    return body


def asked(body: dict[str, Any], instruction: str) -> tuple[str, bytes]:
    """Return question and picture of a request. The model's instruction may stand before the question; it is read anyway.

    UserError: there is not exactly one of each, or the picture is not in the request itself.
    """
    own = lambda text: clean(text) in ("", clean(instruction))  # noqa: E731
    match body.get("messages"):
        case [{"role": "user", "content": content}]:
            pass
        case [{"role": "system" | "developer", "content": str(text)}, {"role": "user", "content": content}] if own(
            text
        ):
            pass
        case _:
            raise UserError(
                "messages: one message of a user is answered, without turns before it. A system message may only be the "
                f"instruction that the model was trained with, {instruction!r}."
            )
    texts, pictures = [], []
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                pictures.append(url)
            case _:
                raise UserError("messages: a part of the content is neither text nor image_url, or lacks it.")
    if len(pictures) != 1:
        raise UserError(f"messages: {len(pictures)} pictures; ask about one, as a part of type image_url.")
    question = f"{clean(' '.join(texts))} ".removeprefix(f"{clean(instruction)} ").strip()
    if not question or len(question) > _LONGEST or any("\ud800" <= letter <= "\udfff" for letter in question):
        raise UserError(f"messages: the question is empty, longer than {_LONGEST:,} characters or not valid UTF-8.")
    head, _, data = pictures[0].partition(",")
    if not (head.startswith("data:") and head.endswith(";base64")):
        raise UserError("image_url: only data:image/TYPE;base64,DATA is read. Nothing is fetched, no file is opened.")
    try:
        return question, base64.b64decode(data, validate=True)
    except ValueError as error:
        raise UserError("image_url: its base64 is cut short or damaged.") from error


def max_tokens(body: dict[str, Any], longest: int) -> int:
    """Return how many tokens an answer may have: as many as are asked for, and as the export names."""
    value = body.get("max_completion_tokens") or body.get("max_tokens") or longest
    if type(value) is not int or value < 1:
        raise UserError("max_tokens: not a whole number from 1.")
    return min(value, longest)


async def refuse(_: Request, error: Exception) -> Response:
    """Return an error in OpenAI's shape. What failed here stands in the log alone."""
    status = getattr(error, "status_code", 400 if isinstance(error, UserError | ClientDisconnect) else 500)
    what = getattr(error, "detail", str(error)) if status < 500 else "The server failed; its log says how."
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": what, "type": kind, "param": None, "code": None}}, status)


def build_app(front: Front, hosts: Sequence[str] = LOOPBACK) -> Starlette:
    """Return the server. It may be called by `hosts`: on loopback no page of a browser reaches it by a name of its own."""
    routes = [
        Route("/v1/chat/completions", front.chat, methods=["POST"]),
        Route("/v1/models", front.models),
        Route("/health", front.health),
    ]
    handlers: Any = dict.fromkeys((UserError, HTTPException, ClientDisconnect, Exception), refuse)
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    return Starlette(routes=routes, exception_handlers=handlers, middleware=middleware)


def serve(folder: Path, host: str, port: int, max_pixels: int) -> None:
    """Serve an export until SIGTERM or Ctrl-C, and print the address; with `KEY` in the environment, to who sends it.

    UserError: there is no whole export, the port cannot be used, or other machines would be served without a key.
    """
    key = os.environ.get(KEY) or None
    if host not in LOOPBACK and key is None:
        raise UserError(f"--host {host} serves other machines: set {KEY} to a key that they must send.")
    # The stock handler warns of every request.
    set_verbosity_error()
    disable_progress_bar()
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: cannot be used ({error}). Name others.") from error
    with listening:
        front = Front(Predictor.from_export(folder), max_pixels, key)
        app = build_app(front, LOOPBACK if host in LOOPBACK else ["*"])
        limits: Any = {"limit_concurrency": AT_ONCE, "timeout_graceful_shutdown": GRACE_SECONDS}
        print(f"http://{host}:{listening.getsockname()[1]}/v1 (model {MODEL}; Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", **limits)).run(sockets=[listening])
