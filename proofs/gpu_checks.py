"""The checks of `python -m proofs.gpu`, each a function of the scale, run in a process that `proofs.gpu` watches.

    python -m proofs.gpu_checks NAME ... [--tiny] [--until SECONDS]

A check returns claims and details. They are printed as lines of JSON as soon as they are there, so that whatever a GPU does
next, what was measured stays.

Legend of shape suffixes: B rows, N packed tokens, H query heads, G query heads a key head, C head width.
"""

import argparse
import gc
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Dinov2Config, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks import extraction, generation, measure, recipes, vqav2
from benchmarks.measure import Claim
from benchmarks.memory import read_peak, reset_peak
from benchmarks.training_step import GEMMA_2B, GEMMA_VOCABULARY, model_flops, product_rate, products
from benchmarks.workload import TOKENIZER_LIMIT, Workload, draw_step
from proofs.gpu import CHECKS, MARK, NOT_RUN, TIME, TINY, environment
from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.memory import Step, total
from vlm_vqa.estimate.predict import changed
from vlm_vqa.estimate.questions import Batch
from vlm_vqa.estimate.shapes import Model
from vlm_vqa.launch_file import Strategy
from vlm_vqa.model.attention import IMPLEMENTATION, packed_mask
from vlm_vqa.model.flops import Work, rows_work
from vlm_vqa.model.layout import visible
from vlm_vqa.model.vlm import (
    VlmForTraining,
    freeze_embeddings,
    hash_weights,
    initial_model,
    set_attention,
    set_dropout,
)
from vlm_vqa.params import Attention, LanguageConfig, Mask, Params, StoreDtype, TooLong, load_params
from vlm_vqa.training import launch
from vlm_vqa.training.checkpoint_files import latest
from vlm_vqa.training.dataset import Collator, QuestionDataset
from vlm_vqa.training.optimizer import bnb, build_optimizer, round_stochastically, rounding_generator, state_types
from vlm_vqa.training.throughput import device_peak
from vlm_vqa.training.trainer import VqaTrainer, training_arguments

ROOT = Path(__file__).parents[1]
PRESET = ROOT / "presets/vqav2-1gpu.yaml"
GIB = 2**30
ROOM = 0.92
"""The share of a card's memory that a step may be predicted to take; the rest is the allocator's, and others'."""
DEPTHS = (26, 20, 16, 12, 8, 4, 2, 1)
KILLED_AT, STEPS, SAVE_STEPS = 3, 5, 2
WIDE = {"train.weights_dtype": "float32", "train.rounding": "nearest"}  # what the preset does in bfloat16
Result = tuple[list[Claim], dict[str, Any]]


class NotRun(Exception):
    """A check needs what is not here; the message says what."""


@dataclass(frozen=True, eq=False)
class Scale:
    """What the checks are of: the real model's shape, a middling one for what is about exactness, or tiny ones."""

    large: LanguageConfig
    medium: LanguageConfig
    vocabulary: int
    tower: Dinov2Config
    encoder: str
    patches: int
    text_length: int
    texts: int
    rounds: int
    images: int
    batch_size: int
    asked: int
    step: int = 60

    @property
    def tiny(self) -> bool:
        return self.encoder == "small"


FULL = Scale(
    large=GEMMA_2B,
    medium=LanguageConfig(512, 2048, 4, 8, 4, 64),
    vocabulary=GEMMA_VOCABULARY,
    tower=extraction.DINOV2_BASE,
    encoder="facebook/dinov2-base",
    patches=257,
    text_length=64,
    texts=6000,
    rounds=5,
    images=512,
    batch_size=64,
    asked=512,
)
SMALLEST = LanguageConfig(64, 128, 2, 4, 2, 16)
SMALL = Scale(
    large=SMALLEST,
    medium=SMALLEST,
    vocabulary=3000,
    tower=Dinov2Config(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=28),
    encoder="small",
    patches=65,
    text_length=64,
    texts=120,
    rounds=1,
    images=8,
    batch_size=4,
    asked=12,
    step=12,
)


# --- what several checks share ---------------------------------------------------------------------------------------


@cache
def pairs(count: int) -> list[tuple[str, str]]:
    """Return drawn (question, answer) pairs."""
    questions, annotations = vqav2.draw(count, 2 * count // 3)
    return [(one["question"], of["multiple_choice_answer"]) for one, of in zip(questions, annotations, strict=True)]


@cache
def workload(scale: Scale) -> Workload:
    """Return the questions of an optimizer step: 60, as the reference recipe has it."""
    sizes = {"num_patches": scale.patches, "feature_width": scale.tower.hidden_size, "step_questions": scale.step}
    return draw_step(pairs(scale.texts), text_length=scale.text_length, **sizes)


def build(scale: Scale, shape: LanguageConfig, vocabulary: int) -> VlmForTraining:
    """Return a model with random float32 weights, drawn where it will be: on a host that takes minutes."""
    with measure.device():
        return recipes.build_model(shape, vocabulary, workload(scale))


def medium_vocabulary(scale: Scale) -> int:
    return len(workload(scale).processor.tokenizer)


def settings(scale: Scale, layers: int, changes: Mapping[str, Any]) -> Params:
    """Return the preset for one GPU at this scale; without bitsandbytes in 32 bits."""
    return changed(
        load_params(PRESET),
        {
            "vision.model": scale.encoder,
            "vision.revision": None if scale.tiny else load_params(PRESET).vision.revision,
            "vision.num_patches": scale.patches,
            "vision.visual_embed_dim": scale.tower.hidden_size,
            "language": {
                "model": "random",
                "revision": None,
                "vocab_size": scale.vocabulary,
                "config": asdict(replace(scale.large, num_hidden_layers=layers)),
            },
            "train.launch": measure.device().type.replace("cuda", "gpu"),
            "vision.launch": measure.device().type.replace("cuda", "gpu"),
            "prompt.text_length": scale.text_length,
            "train.answers": "majority",
            "train.dataloader_workers": 0,
            "train.logging_steps": 1,
            "train.lr_scheduler_type": "constant_with_warmup",
            "train.warmup_ratio": 0.0,
            **({} if bnb else {"train.optimizer": "adamw_torch", **WIDE}),
            **changes,
        },
    )


def once(what: str, value: float, **options: Any) -> Claim:
    return Claim(f"GPU: {what}", value, value, value, **options)


def measured(what: str, timing: measure.Timing, amount: float, **options: Any) -> Claim:
    """Claim a rate: `amount` over the seconds of each round."""
    rates = [amount / one for one in timing.seconds]
    return Claim(f"GPU: {what}", amount / timing.median, min(rates), max(rates), **options)


def distance(one: Tensor, other: Tensor) -> float:
    """Return how far `one` is from `other`, in parts of the norm of `other`."""
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def gradients(model: nn.Module) -> Tensor:
    """Return all gradients as one vector."""
    found = [one.grad for one in model.parameters() if one.grad is not None]
    return torch.cat([(one.full_tensor() if isinstance(one, DTensor) else one).flatten().float() for one in found])


def batches_of(work: Workload) -> list[Batch]:
    """Return our micro-batches as the estimate reads them."""
    found = []
    for rows in recipes.pack(work):
        width = max(recipes.row_tokens(work.layout, row) for row in rows)
        prefix = work.layout.num_patches + len(work.layout.prefix)
        found.append(Batch(rows_work(work.layout, rows), len(rows), prefix, width))
    return found


def predicted(scale: Scale, shape: LanguageConfig, params: Params, batches: Sequence[Batch]) -> int:
    """Return the bytes that the estimate predicts for a step."""
    frozen = params.train.freeze_embeddings
    model = Model(shape, scale.vocabulary, scale.tower.hidden_size, frozen, None)
    moments = Step(model, params.train, Strategy.SINGLE, 1, gpu=True).moments(batches)
    return max(total(parts) for name, parts in moments.items() if name != "whole weights")


def everything(scale: Scale, layers: int) -> Params:
    """Return settings that train all weights, in float32 by bfloat16 products, as the reference recipe does."""
    sizes = {"train.batch_size": 30, "train.gradient_accumulation_steps": 2, "train.gradient_checkpointing": False}
    return settings(scale, layers, {**WIDE, **sizes, "train.freeze_embeddings": False})


def deepest(scale: Scale) -> LanguageConfig:
    """Return the large shape with as many layers as leave room for both recipes' steps.

    Raises:
        NotRun: not even one layer does.
    """
    rows, width = recipes.MICRO_BATCH, scale.patches + scale.text_length
    tokens, pairs = rows * width, rows * width**2
    # It computes its last layer and the logits at all positions.
    stock = Batch(Work(tokens, rows * scale.patches, tokens, pairs, pairs), rows, 0, width)
    memory = math.inf if scale.tiny else torch.cuda.mem_get_info()[1]
    for layers in DEPTHS:
        if layers > scale.large.num_hidden_layers:
            continue
        shape = replace(scale.large, num_hidden_layers=layers)
        params = everything(scale, layers)
        needed = max(
            predicted(scale, shape, params, [stock]), predicted(scale, shape, params, batches_of(workload(scale)))
        )
        if needed <= ROOM * memory:
            return shape
    raise NotRun(f"{memory / GIB:.0f} GiB hold no layer of this width")


def layers_of(shape: LanguageConfig) -> str:
    return f"2B shape, {shape.num_hidden_layers} layers" if shape.hidden_size == GEMMA_2B.hidden_size else "tiny shape"


# --- exactness -------------------------------------------------------------------------------------------------------


def rates(scale: Scale) -> Result:
    """Matrix products alone: the rates that everything else is compared with."""
    seconds, size = (0.02, 256) if scale.tiny else (0.5, 8192)
    found = {
        str(dtype).removeprefix("torch."): measure.matmul_rate(size, size, size, dtype, seconds)
        for dtype in (torch.bfloat16, torch.float32)
    }
    peak = device_peak(measure.device(), torch.bfloat16)
    claims = [once(f"TFLOP/s of {size} x {size} products, {name}", rate / 1e12) for name, rate in found.items()]
    if peak:
        claims.append(once("bfloat16 products over the data sheet's rate", found["bfloat16"] / peak))
    return claims, {"flop_per_second": found, "data_sheet": peak}


def rounding(scale: Scale) -> Result:
    """Stochastic rounding: to one of two neighbours, without bias, the same again from the same seed."""
    source = torch.randn(1 << 12 if scale.tiny else 1 << 16, device=measure.device())
    repeats, beside, added = 64, 0, torch.zeros_like(source, dtype=torch.float64)
    for step in range(repeats):
        random, again = (rounding_generator(0, step, 0, source) for _ in range(2))
        one, other = (torch.empty_like(source, dtype=torch.bfloat16) for _ in range(2))
        round_stochastically(one, source, random)
        round_stochastically(other, source, again)
        assert torch.equal(one, other), "another result from the same seed"
        # A bfloat16 has 8 bits of precision: neighbours are within 2 ** -7 of what lies between them.
        beside += int(((one.float() - source).abs() > source.abs() * 2**-7).sum())
        added += one.double()
    error = added / repeats - source.double()
    # Of a number between neighbours that are d apart, the deviation is at most d / 2.
    bias = (error.sum() / (source.double().abs() * 2**-8).pow(2).sum().div(repeats).sqrt()).abs().item()
    claims = [
        once("stochastic rounding: values that went to no neighbour", beside, target=0, at_most=True),
        once("stochastic rounding: bias, in standard errors", bias, target=5, at_most=True),
    ]
    return claims, {"values": len(source), "repeats": repeats}


def eight_bit(scale: Scale) -> Result:
    """8-bit AdamW: states in 8 bits on the card, updates near those of 32 bits, percentile clipping."""
    if bnb is None:
        raise NotRun("bitsandbytes is not installed")
    found: dict[str, Tensor] = {}
    kinds: dict[str, list[str]] = {}
    held: dict[str, float] = {}
    for optimizer, clipping in (("adamw_torch", 100), ("adamw_bnb_8bit", 100), ("adamw_bnb_8bit", 95)):
        name = f"{optimizer}, {clipping}"
        own = {"train.optimizer": optimizer, "train.percentile_clipping": clipping, "train.learning_rate": 1e-3}
        params = settings(scale, 1, {**WIDE, **own, "train.projector_learning_rate": None})
        torch.manual_seed(0)
        linear = nn.Linear(256, 64 if scale.tiny else 4096, device=measure.device())
        made = build_optimizer(params.train, linear, set(), seed=0)
        start = linear.weight.detach().clone()
        for _ in range(20):
            linear.weight.grad, linear.bias.grad = torch.randn_like(linear.weight), torch.randn_like(linear.bias)
            made.step()
        found[name], kinds[name] = linear.weight.detach() - start, state_types(made)
        states = [value for value in made.state[linear.weight].values() if isinstance(value, Tensor)]
        held[name] = sum(one.nbytes for one in states if one.numel() > 256) / linear.weight.numel()
        assert {one.device.type for one in states if one.numel() > 1} == {measure.device().type}, "states on the host"
        assert torch.isfinite(linear.weight).all()
    wide_name, narrow, clipped = found
    assert "uint8" in kinds[narrow], kinds
    assert not torch.equal(found[narrow], found[clipped]), "percentile clipping changes nothing"
    # Two bytes and two scales of 256 values.
    most = once("8-bit AdamW: bytes of states a weight", held[narrow], target=2.05, at_most=True)
    far = once("8-bit AdamW: update's distance from 32 bits", distance(found[narrow], found[wide_name]), target=0.1,
               at_most=True)  # fmt: skip
    return [most, far], {"states": kinds, "bytes_a_weight": held}


def autocast(scale: Scale) -> Result:
    """bfloat16 by autocast against float32: the same loss and gradients but for rounding."""
    model, work = build(scale, scale.medium, medium_vocabulary(scale)), workload(scale)
    plain, cast = (recipes.ours(model, work, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    loss, wide = plain.run(), gradients(model)
    other, narrow = cast.run(), gradients(model)
    claims = [
        once("bfloat16 autocast: loss, relative to float32's", abs(other / loss - 1), target=0.01, at_most=True),
        once(
            "bfloat16 autocast: gradients' distance from float32's", distance(narrow, wide), target=0.05, at_most=True
        ),
    ]
    return claims, {"shape": asdict(scale.medium), "loss": {"float32": loss, "bfloat16": other}}


def attention(scale: Scale) -> Result:
    """Flex attention forward and backward, and ours in plain torch, against a float64 reference; and how fast each is."""
    work, shape, device = workload(scale), scale.large, measure.device()
    batch = {name: value.to(device) for name, value in work.layout.collate(recipes.pack(work)[0]).items()}
    grid = (batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
    places = batch["prefix_places"], batch["rest_places"]
    places_N = torch.cat([places[0].flatten(), places[1]])
    tokens, options = len(places_N), {"scaling": shape.head_dim**-0.5, "softcap": 50.0}
    heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    torch.manual_seed(0)
    drawn = [torch.randn(1, count, tokens, shape.head_dim, device=device) for count in heads]
    given = torch.randn(1, tokens, heads[0], shape.head_dim, device=device)
    seen_NN = _sees(places_N, visible(*grid), grid[0].shape[1])
    module = nn.Identity()
    backward = device.type == "cuda"
    last = torch.tensor([tokens - 1], device=device)  # the mask of these queries alone is not looked at
    errors: dict[str, dict[str, float]] = {}
    seconds: dict[str, measure.Timing] = {}
    refused: dict[str, str] = {}
    for dtype in (torch.bfloat16, torch.float32):
        states = [one.to(dtype) for one in drawn]
        wanted = _forward_backward(
            partial(_reference, seen_NN=seen_NN, **options), [one.double() for one in states], given
        )
        calls: dict[str, Callable[[], Any]] = {}
        for kind in Attention:
            name = f"{kind.value}, {str(dtype).removeprefix('torch.')}"
            mask, _ = packed_mask(IMPLEMENTATION[kind], *places, *grid, last, closed_prefix=True, dtype=dtype)
            call = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION[kind]]
            attend = lambda *of, call=call, mask=mask: call(module, *of, mask, **options)[0]  # noqa: E731
            if kind is Attention.FLEX and not backward:
                # torch has no backward pass of it on a CPU.
                results = [attend(*states)]
            else:
                try:
                    results = _forward_backward(attend, states, given)
                except Exception as error:
                    # Heads this wide may be more than a card's kernels hold in float32, which training does not use.
                    if dtype is torch.bfloat16 or kind is Attention.EAGER:
                        raise
                    refused[name] = " ".join(str(error).split())[:300]
                    continue
                calls[name] = partial(_forward_backward, attend, states, given)
            parts = ("output", "query's", "key's", "value's")
            errors[name] = {part: distance(one, of) for part, one, of in zip(parts, results, wanted, strict=False)}
        seconds |= measure.alternate(calls, scale.rounds)
    claims = []
    for name in ("bfloat16", "float32"):
        if f"{Attention.FLEX.value}, {name}" in refused:
            continue
        eager, flex = (errors[f"{kind.value}, {name}"] for kind in (Attention.EAGER, Attention.FLEX))
        worst = max(flex[part] / eager[part] for part in flex)
        note = f"{max(flex.values()):.1e} against {max(eager.values()):.1e} from float64"
        what = f"flex attention: error over that of plain torch, {name}"
        claims.append(once(what, worst, target=2, at_most=True, note=note))
    if backward:
        pair = (seconds[f"{kind.value}, bfloat16"] for kind in (Attention.EAGER, Attention.FLEX))
        claims.append(measure.claim("GPU: flex attention: times faster than plain torch, bfloat16", *pair))
    return claims, {"tokens": tokens, "distance_from_float64": errors, "backward": backward, "refused": refused,
                    "seconds": {name: one.seconds for name, one in seconds.items()}}  # fmt: skip


def _sees(places_N: Tensor, visible_BSS: Tensor, width: int) -> Tensor:
    """Return bool [N, N]: which packed token sees which."""
    row_N, place_N = places_N // width, places_N % width
    same_NN = row_N[:, None] == row_N[None]
    return same_NN & visible_BSS.flatten(0, 1)[places_N][:, place_N]


def _reference(query: Tensor, key: Tensor, value: Tensor, *, seen_NN: Tensor, scaling: float, softcap: float) -> Tensor:
    """Attend in the states' own type, the plainest way."""
    key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for one in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap)
    return (scores.masked_fill(~seen_NN, float("-inf")).softmax(dim=-1) @ value).transpose(1, 2)


def _forward_backward(attend: Callable[..., Tensor], states: Sequence[Tensor], given: Tensor) -> list[Tensor]:
    """Return the output and the gradients of queries, keys and values for the gradient `given`."""
    leaves = [one.detach().clone().requires_grad_() for one in states]
    output = attend(*leaves)
    output.backward(given.to(output.dtype))
    return [output.detach(), *(one.grad for one in leaves if one.grad is not None)]


def processes(scale: Scale) -> Result:
    """One process of a launch of several: nccl (gloo on a CPU) and FSDP2, whose steps are those of a model that is whole."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device = measure.device()
    with changed_environment(alone):
        launch._join(device.type, 60)
        try:
            total = torch.ones(4, device=device)
            distributed.all_reduce(total)
            told = [{"on": "the host"}]
            distributed.broadcast_object_list(told)
            backend = distributed.get_backend()
            far, kinds = _sharded(scale, device)
        finally:
            distributed.destroy_process_group()
    claims = [once("FSDP2 with one process: weights' distance from a whole model's after 3 steps", far, target=1e-5,
                   at_most=True)]  # fmt: skip
    return claims, {"backend": str(backend), "sum": total.tolist(), "states": kinds}


def _sharded(scale: Scale, device: torch.device) -> tuple[float, list[str]]:
    found, kinds = [], []
    for sharded in (False, True):
        model = build(scale, scale.medium, medium_vocabulary(scale))
        if sharded:
            mesh = init_device_mesh(device.type, (1,))
            for layer in model.model.language_model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert all(isinstance(one, DTensor) for one in model.parameters())
        start = [one.detach().clone() for one in model.parameters()]
        # The first gradients are scaled to nothing by lower ones.
        clipping = {"train.percentile_clipping": 99} if bnb else {}
        params = settings(scale, 1, {**WIDE, **clipping, "train.freeze_embeddings": False})
        optimizer = build_optimizer(params.train, model, set(), seed=0)
        recipe = recipes.ours(model, workload(scale))
        for _ in range(3):
            recipe.run()
            optimizer.step()
        kinds = state_types(optimizer)
        moved = [now.detach() - then for now, then in zip(model.parameters(), start, strict=True)]
        found.append(torch.cat([(one.full_tensor() if isinstance(one, DTensor) else one).flatten() for one in moved]))
    return distance(found[1], found[0]), kinds


@contextmanager
def changed_environment(values: Mapping[str, str]) -> Generator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def sharing(scale: Scale) -> Result:
    """Generation: the questions of an image share its prefix, and each is answered as alone; in float32."""
    alone = 4 if scale.tiny else 24
    shape = _shape(scale, "medium", scale.medium, None, alone=alone)
    texts = [question for question, _ in pairs(scale.texts)]
    asked = generation.whole_images(generation.asked_of_images(texts), shape.whole_set)
    features = generation.Features(shape, sorted({row["image_id"] for row in asked}))
    with measure.device():
        model, processor = generation.build_model(shape, texts)
    claims, details = [], {}
    for mask in Mask:
        predictor = generation.answerer_of(shape, model, processor, mask)
        # Answers that differ from those of a question alone are an error of their own.
        seconds, facts = generation.time_ways(shape, predictor, features, asked, generation.as_helm, scale.rounds)
        claims.append(measure.claim(f"GPU: answers, mask {mask.value}: times faster than one at a time", *seconds))
        details[mask.value] = facts
    return claims, details


def _shape(scale: Scale, name: str, language: LanguageConfig, vocabulary: int | None, alone: int) -> generation.Shape:
    ways = {"whole_set": scale.asked, "helm": 0, "alone": alone, "helm_threads": scale.batch_size}
    width = scale.tower.hidden_size
    return generation.Shape(name, scale.patches, width, language, TOKENIZER_LIMIT, vocabulary, **ways)


# --- training as it is run -------------------------------------------------------------------------------------------


class Questions(dict):
    """Columns of records by name, as `datasets` gives them."""

    def __len__(self) -> int:
        return len(self["question"])


class Watch(TrainerCallback):
    """Notes rates; after step `killed_at`, with its checkpoints whole, the process kills itself."""

    def __init__(self, killed_at: int | None):
        self.killed_at, self.speeds = killed_at, []
        self.trainer: VqaTrainer

    def on_train_begin(self, args, state, control, **_):
        # What building took is none of the steps'.
        reset_peak()

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.speeds.append(self.trainer.meter.read())

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.killed_at:
            self.trainer.writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    scale: Scale, params: Params, folder: Path, steps: int, killed_at: int | None = None
) -> tuple[VqaTrainer, Watch]:
    """Train under the launch that `params` names, going on from a checkpoint in `folder` where there is one."""
    running = launch.start(params.train, ROOT / "launch")
    work, train = workload(scale), params.train
    each = train.batch_size * train.gradient_accumulation_steps
    texts = (pairs(scale.texts) * -(-steps * each // scale.texts))[: steps * each]
    columns = {"question_id": range(len(texts)), "image_id": [number // 5 for number in range(len(texts))]}
    columns |= dict(zip(("question", "multiple_choice_answer"), map(list, zip(*texts, strict=True)), strict=True))
    data = QuestionDataset(Questions(columns), work.layout, TooLong.DROP)  # ty: ignore[invalid-argument-type] - columns by name
    shape = _shape(scale, "features", scale.large, None, alone=0)
    features: Any = generation.Features(shape, sorted(set(data.image_ids)))
    with measure.device():
        model = initial_model(params.language, scale.tower, work.processor, params.seed)
        assert params.language.vocab_size is not None
        model.resize_token_embeddings(params.language.vocab_size, mean_resizing=False)
    set_dropout(model, train.dropout)
    set_attention(model, train.attention)
    if train.freeze_embeddings:
        freeze_embeddings(model)
    watch = Watch(killed_at)
    arguments = training_arguments(train, params.seed, folder, running)
    arguments.max_steps, arguments.disable_tqdm = steps, True
    if train.save_steps > steps:
        arguments.save_strategy = "no"
    trainer = VqaTrainer(model, arguments, train, data, Collator(work.layout, features), [watch], running)
    trainer.run()
    return trainer, watch


def resume_settings(scale: Scale) -> Params:
    """Return what a resumed run could lose something of: dropout, bfloat16 weights, 8-bit states, rounding."""
    shape = {"language.config": asdict(scale.medium), "language.vocab_size": medium_vocabulary(scale)}
    sizes = {"train.batch_size": 6, "train.gradient_accumulation_steps": 2, "train.dropout": 0.1}
    return settings(scale, 1, {**shape, **sizes, "train.save_steps": SAVE_STEPS, "train.freeze_embeddings": False})


def resume(scale: Scale) -> Result:
    """The launch's facts; and a training that is killed and goes on ends in the very weights of one that is not."""
    params = resume_settings(scale)
    hashes, losses, facts = {}, {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("unbroken", "unbroken again", "killed"):
            folder = Path(scratch) / name
            if name == "killed":
                _kill_one(scale, folder)
            trainer, _ = train(scale, params, folder, STEPS)
            hashes[name] = hash_weights(trainer.whole_weights())
            losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            trainer.note_states()
            facts = trainer.facts
            del trainer
    device = measure.device().type
    assert facts["device"] == device and facts["num_processes"] == 1, facts
    if hashes["unbroken"] != hashes["unbroken again"]:
        note = "two unbroken trainings differ, too: the card adds in another order each time"
    else:
        note = "two unbroken trainings are equal"
    worst = max(abs(a / b - 1) for a, b in zip(losses["killed"], losses["unbroken"], strict=True))
    claims = [
        once("killed and resumed: weights equal to the bit", float(hashes["killed"] == hashes["unbroken"]), target=1,
             note=note),
        once("killed and resumed: largest relative difference of a loss", worst, target=1e-3, at_most=True),
    ]  # fmt: skip
    return claims, {"launch": facts, "weights": hashes, "losses": losses}


def _kill_one(scale: Scale, folder: Path) -> None:
    """Start a training by `accelerate launch`, which kills itself, and check what it has left."""
    config = ROOT / "launch" / f"{resume_settings(scale).train.launch}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    command += ["-m", "proofs.gpu_checks", "--killed", str(folder), *(["--tiny"] if scale.tiny else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    last = latest(folder)
    assert done.returncode != 0 and last is not None, f"it was not killed: {done.stderr[-2000:]}"
    assert last.name == f"checkpoint-{SAVE_STEPS}", last


def preset(scale: Scale) -> Result:
    """Training by `VqaTrainer` with the preset for one GPU: bfloat16 weights, 8-bit AdamW, checkpointing."""
    if bnb is None:
        raise NotRun("bitsandbytes is not installed")
    sizes = {"train.batch_size": 4, "train.gradient_accumulation_steps": 2} if scale.tiny else {}
    params = settings(scale, scale.large.num_hidden_layers, {**sizes, "train.save_steps": 10**6})
    if not scale.tiny and torch.cuda.mem_get_info()[1] < 20 * GIB:
        raise NotRun("the preset is for cards of 24 GB")
    steps = 3 if scale.tiny else 5
    with tempfile.TemporaryDirectory() as folder:
        trainer, watch = train(scale, params, Path(folder), steps)
    peak = read_peak() / 1024
    # The first step makes the optimizer's states.
    speeds = watch.speeds[1:]
    claims = []
    for name in ("questions_per_second", "tokens_per_second", "flops_utilisation"):
        if found := [one[name] for one in speeds if name in one]:
            middle, what = sorted(found)[len(found) // 2], name.replace("_", " ").replace(" per second", "/s")
            claims.append(Claim(f"GPU: preset vqav2-1gpu, {what}", middle, min(found), max(found)))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    per_pass = [Batch(*one) for one in _passes(trainer)]
    expected = predicted(scale, scale.large, params, per_pass) / GIB
    claims += _memory(scale, "preset vqav2-1gpu", peak, expected)
    return claims, {"losses": losses, "facts": trainer.facts, "speeds": watch.speeds}


def _passes(trainer: VqaTrainer) -> Iterator[tuple]:
    """Yield the fields of `Batch` of the first step's micro-batches."""
    layout = trainer.data_collator.layout
    batches: Any = trainer.get_train_dataloader().batch_sampler
    loader = iter(batches)
    for _ in range(trainer.args.gradient_accumulation_steps):
        rows = [trainer.train_dataset[planned] for planned in next(loader)]
        width = max(recipes.row_tokens(layout, row) for row in rows)
        yield rows_work(layout, rows), len(rows), layout.num_patches + len(layout.prefix), width


def _memory(scale: Scale, what: str, peak: float, expected: float) -> list[Claim]:
    if measure.device().type == "cpu":
        return []
    note = f"{peak:.1f} GiB, estimated {expected:.1f}"
    return [
        once(f"{what}: peak of memory, GiB", peak),
        once(f"{what}: memory off the estimate's", abs(peak / expected - 1), target=0.1, at_most=True, note=note),
    ]


# --- speed -----------------------------------------------------------------------------------------------------------


def step(scale: Scale) -> Result:
    """An optimizer step, shared rows against the stock recipe: 8-bit AdamW, bfloat16 by autocast."""
    shape, work = deepest(scale), workload(scale)
    params, model = everything(scale, shape.num_hidden_layers), build(scale, shape, scale.vocabulary)
    optimizer = build_optimizer(params.train, model, set(), seed=0)
    ways = {"stock": recipes.reference(recipes.stock_model(model), work, dtype=torch.bfloat16)}
    ways["ours"] = recipes.ours(model, work, dtype=torch.bfloat16)
    losses, peaks, calls = {}, {}, {}
    for name, recipe in ways.items():
        losses[name] = recipe.run()
    # Makes the optimizer's states.
    optimizer.step()
    for name, recipe in ways.items():
        reset_peak()
        _whole_step(recipe, optimizer)
        peaks[name] = read_peak() / 1024
        calls[name] = partial(_whole_step, recipe, optimizer)
    timings = measure.alternate(calls, scale.rounds, warm_up=0)
    named, real = layers_of(shape), sum(one.work.tokens for one in batches_of(work))
    counts = products(
        shape, scale.vocabulary, ways["ours"].batches[0].positions, work.supervised // len(ways["ours"].batches)
    )
    positions = {name: recipe.positions for name, recipe in ways.items()}
    # The largest products take room.
    del model, optimizer, recipe
    ways.clear()
    calls.clear()
    gc.collect()
    machine = product_rate(counts, torch.bfloat16, 0.01 if scale.tiny else 0.1)
    flops, asked = model_flops(shape, scale.vocabulary, work, work.rows), len(work.questions)
    claims = [measure.claim(f"GPU: {named}: step, shared rows over the stock recipe", timings["stock"], timings["ours"],
                            target=None if scale.tiny else 5.0)]  # fmt: skip
    claims += [measured(f"{named}: questions/s, {name}", timings[name], asked) for name in timings]
    claims += [
        measured(f"{named}: tokens/s, ours", timings["ours"], real),
        measured(f"{named}: MFU, ours: model FLOP/s over measured products", timings["ours"], flops / machine),
        once(f"{named}: peak of memory, stock, GiB", peaks["stock"]),
        *_memory(scale, f"{named}: ours", peaks["ours"], predicted(scale, shape, params, batches_of(work)) / GIB),
    ]
    off = abs(losses["ours"] / losses["stock"] - 1)
    claims.append(once(f"{named}: loss of the two recipes, relative difference", off, target=0.02, at_most=True))
    return claims, {
        "shape": asdict(shape) | {"vocabulary": scale.vocabulary},
        "layers_left_out": scale.large.num_hidden_layers - shape.num_hidden_layers,
        "optimizer": params.train.optimizer.value,
        "workload": work.facts,
        "positions": positions,
        "product_flop_per_second": machine,
        "losses": losses,
        "seconds": {name: one.seconds for name, one in timings.items()},
    }


def _whole_step(recipe: recipes.Recipe, optimizer: torch.optim.Optimizer) -> None:
    recipe.run()
    optimizer.step()


def flex_step(scale: Scale) -> Result:
    """Loss and gradients of a step with flex attention, against plain torch."""
    if measure.device().type == "cpu":
        raise NotRun("needs CUDA: torch has no backward pass of flex attention on a CPU")
    shape, work = deepest(scale), workload(scale)
    model = build(scale, shape, scale.vocabulary)
    recipe = recipes.ours(model, work, dtype=torch.bfloat16)

    def run(kind: Attention) -> None:
        set_attention(model, kind)
        losses[kind] = recipe.run()

    losses: dict[Attention, float] = {}
    timings = measure.alternate({kind.value: partial(run, kind) for kind in Attention}, scale.rounds)
    eager, flex = (timings[kind.value] for kind in (Attention.EAGER, Attention.FLEX))
    off = abs(losses[Attention.FLEX] / losses[Attention.EAGER] - 1)
    claims = [
        measure.claim(f"GPU: {layers_of(shape)}: gradients, flex attention over plain torch", eager, flex),
        once(f"{layers_of(shape)}: loss with flex attention, relative difference", off, target=0.01, at_most=True),
    ]
    return claims, {"seconds": {name: one.seconds for name, one in timings.items()}}


def features(scale: Scale) -> Result:
    """Features from the store, 16 bits and int8, against a live encoder: of one step's images alone, and with the step."""
    shape, work, device = deepest(scale), workload(scale), measure.device()
    encoder = extraction.build_encoder(scale.tower, torch.bfloat16 if device.type == "cuda" else torch.float32)
    photographs = [vqav2.draw_picture((640, 480), seed=number) for number in range(4)]
    records = extraction.repeated(photographs, scale.images)
    model = build(scale, shape, scale.vocabulary)
    recipe = recipes.ours(model, work, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        extraction.store_in(f"{folder}/store", extraction.ahead, encoder, records, scale.batch_size)
        measure.synchronize()
        extracted = scale.images / (time.perf_counter() - begun)
        eight = f"{folder}/int8"
        extraction.store_in(eight, extraction.ahead, encoder, records, scale.batch_size, StoreDtype.INT8)
        stores = {"stored": FeatureStore(f"{folder}/store"), "int8": FeatureStore(eight)}
        ids = list(range(min(len(work.features), scale.images)))
        begun = time.perf_counter()
        pixels = encoder.preprocess(open_image(records[one].data, "picture", extraction.MAX_PIXELS) for one in ids)
        decoded = len(ids) / (time.perf_counter() - begun)

        def stored(which: str) -> Tensor:
            store = stores[which]
            return store.of(send_to_device(store.inputs(ids), device)).float()

        def live() -> Tensor:
            return encoder.encode_pixels(pixels).float()

        def with_step(source: Callable[[], Tensor]) -> None:
            source()
            recipe.run()

        off = {which: distance(live().cpu(), stored(which).cpu()) for which in stores}
        calls: dict[str, Callable[[], Tensor]] = {which: partial(stored, which) for which in stores} | {"live": live}
        timings = measure.alternate(calls, scale.rounds)
        steps = measure.alternate({name: partial(with_step, call) for name, call in calls.items()}, scale.rounds)
    named = layers_of(shape)
    claims = [
        measured("images/s, features from the store to the device", timings["stored"], len(ids)),
        measured("images/s, int8 features from the store to the device", timings["int8"], len(ids)),
        measured("images/s, live encoder from pixels", timings["live"], len(ids)),
        once("images/s that one thread decodes", decoded),
        once("images/s, extract-features", extracted),
        measure.claim("GPU: features: stored over live, of the images alone", timings["live"], timings["stored"]),
        measure.claim(f"GPU: {named}: step with stored features over live ones", steps["live"], steps["stored"]),
        measure.claim("GPU: features: int8 over 16 bits, of the images alone", timings["stored"], timings["int8"]),
        once("features: stored ones' distance from live ones'", off["stored"], target=0.02, at_most=True),
        once("features: int8 ones' distance from live ones'", off["int8"], target=0.02, at_most=True),
    ]
    seconds = {name: one.seconds for name, one in timings.items()}
    return claims, {"images": len(ids), "seconds": seconds, "step_seconds": {n: t.seconds for n, t in steps.items()}}


def answers(scale: Scale) -> Result:
    """Answers a second in float32 and bfloat16, and how many differ between the two."""
    language = deepest(scale)
    shape = _shape(scale, "2B", language, scale.vocabulary, alone=0)
    texts = [question for question, _ in pairs(scale.texts)]
    asked = generation.whole_images(generation.asked_of_images(texts), scale.asked)
    stored = generation.Features(shape, sorted({row["image_id"] for row in asked}))
    with measure.device():
        model, processor = generation.build_model(shape, texts)
    claims, given, peaks = [], {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        predictor = generation.answerer_of(shape, model.to(dtype), processor, Mask.IMAGE_PREFIX)

        def ask(predictor=predictor, name=name) -> None:
            given[name] = generation.as_helm(shape, predictor, stored, asked)

        reset_peak()
        timing = measure.alternate({name: ask}, scale.rounds)[name]
        peaks[name] = read_peak() / 1024
        claims.append(measured(f"{layers_of(language)}: answers/s, {name}", timing, len(asked)))
    differing = sum(one != other for one, other in zip(*given.values(), strict=True))
    claims.append(once(f"{layers_of(language)}: share of answers that differ between the two", differing / len(asked)))
    return claims, {"questions": len(asked), "new_tokens": generation.NEW_TOKENS, "peak_gib": peaks}


# --- one after another -----------------------------------------------------------------------------------------------


def tell(**content: Any) -> None:
    """Tell `proofs.gpu`, in a line of its own."""
    print(MARK + json.dumps(content), flush=True)


def run_one(name: str, scale: Scale) -> bool:
    """Run a check, whatever becomes of it, and tell; whether the next one may run in this process."""
    tell(begin=name)
    begun, status, claims, details = time.perf_counter(), "passed", [], {}
    try:
        claims, details = globals()[name](scale)
    except NotRun as reason:
        status = f"{NOT_RUN}: {reason}"
    except Exception as error:  # noqa: BLE001 - which one it is stands in the results
        traceback.print_exc()
        status = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
    seconds = round(time.perf_counter() - begun, 1)
    tell(end=name, status=status, seconds=seconds, claims=[asdict(one) for one in claims], details=details)
    gc.collect()
    if torch.cuda.is_available() and not status.startswith("failed"):
        torch.cuda.empty_cache()
    # After an error of CUDA's nothing works any more, and a traceback holds memory.
    return not status.startswith("failed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the checks that are named, in order, each if its time is left."""
    parser = argparse.ArgumentParser(prog="python -m proofs.gpu_checks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*CHECKS, []])
    parser.add_argument(TINY, action="store_true")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds since 1970")
    parser.add_argument("--killed", type=Path, help="train into this folder until it kills itself")
    options = parser.parse_args(arguments)
    scale = SMALL if options.tiny else FULL
    if options.killed:
        train(scale, resume_settings(scale), options.killed, STEPS, KILLED_AT)
        raise UserError("the training came to its end")
    for name in options.names:
        if not options.tiny and time.time() + CHECKS[name].seconds > options.until:
            tell(begin=name)
            tell(end=name, status=f"{NOT_RUN}: {TIME}", seconds=0, claims=[], details={})
        elif not run_one(name, scale):
            return


if __name__ == "__main__":
    main()
