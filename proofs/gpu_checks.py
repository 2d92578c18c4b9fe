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
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Dinov2Config, PaliGemmaForConditionalGeneration, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks import extraction, generation, measure, recipes, vqav2
from benchmarks.measure import Claim
from benchmarks.memory import read_peak, reset_peak
from benchmarks.training_step import GEMMA_2B, GEMMA_VOCABULARY, model_flops, product_rate, products
from benchmarks.workload import TOKENIZER_LIMIT, Workload, draw_step
from proofs.gpu import ALL_GPUS, CHECKS, MARK, NOT_RUN, TIME, TINY, environment
from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.memory import Step, total
from vlm_vqa.estimate.predict import changed
from vlm_vqa.estimate.questions import Batch
from vlm_vqa.estimate.shapes import Model
from vlm_vqa.evaluation.answering import Ask, answer_asks
from vlm_vqa.launch_file import Strategy
from vlm_vqa.model.attention import IMPLEMENTATION, packed_mask
from vlm_vqa.model.flops import Work, rows_work
from vlm_vqa.model.layout import visible
from vlm_vqa.model.vlm import (
    VlmForTraining,
    compile_layers,
    freeze_embeddings,
    hash_weights,
    initial_model,
    save_tensors,
    set_attention,
    set_dropout,
    trained_state,
    uncompiled,
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
FILLING = (30, 12)
"""Questions of the reference's micro-batch that may fill a card: the largest that leaves room for all layers is taken."""
COMPILER = "inductor" if torch.cuda.is_available() else "eager"
"""All of it takes minutes on a CPU; there its first part alone."""
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
    answered_at_once: tuple[int, ...] = (64, 256, 1024)
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
    rounds=3,
    images=2048,
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
    answered_at_once=(4, 16),
    step=12,
)


# --- what several checks share ---------------------------------------------------------------------------------------


@cache
def pairs(count: int) -> list[tuple[str, str]]:
    """Return drawn (question, answer) pairs."""
    questions, annotations = vqav2.draw(count, 2 * count // 3)
    return [(one["question"], of["multiple_choice_answer"]) for one, of in zip(questions, annotations, strict=True)]


@cache
def workload(scale: Scale, steps: int = 1) -> Workload:
    """Return the questions of an optimizer step: 60, as the reference recipe has it, or several times as many."""
    sizes = {"num_patches": scale.patches, "feature_width": scale.tower.hidden_size}
    return draw_step(pairs(scale.texts), text_length=scale.text_length, step_questions=steps * scale.step, **sizes)


def filling(scale: Scale, shape: LanguageConfig) -> Workload | None:
    """Return four steps' questions in micro-batches that the card has much to do with; None where they find no room."""
    for questions in FILLING:
        work = replace(workload(scale, 1 if scale.tiny else 4), micro_batch=questions)
        if fits(scale, shape, work):
            return work
    return None


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
            "train.compile": False,
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
    return torch.cat([one.flatten().float() for one in found])


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
    for layers in DEPTHS:
        shape = replace(scale.large, num_hidden_layers=layers)
        if layers <= scale.large.num_hidden_layers and fits(scale, shape, workload(scale)):
            return shape
    raise NotRun("this card's memory holds no layer of this width")


def fits(scale: Scale, shape: LanguageConfig, work: Workload) -> bool:
    """Whether the card has room for both recipes' micro-batches."""
    rows, width = work.micro_batch, scale.patches + scale.text_length
    tokens, pairs = rows * width, rows * width**2
    # It computes its last layer and the logits at all positions.
    stock = Batch(Work(tokens, rows * scale.patches, tokens, pairs, pairs), rows, 0, width)
    params = everything(scale, shape.num_hidden_layers)
    needed = max(predicted(scale, shape, params, batches) for batches in ([stock], batches_of(work)))
    return needed <= ROOM * (math.inf if scale.tiny else torch.cuda.mem_get_info()[1])


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
    states = [one.to(torch.bfloat16) for one in drawn]
    wanted = _forward_backward(partial(_reference, seen_NN=seen_NN, **options), [one.double() for one in states], given)
    calls: dict[str, Callable[[], Any]] = {}
    for kind in Attention:
        mask, _ = packed_mask(IMPLEMENTATION[kind], *places, *grid, last, closed_prefix=True, dtype=torch.bfloat16)
        call = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION[kind]]
        attend = lambda *of, call=call, mask=mask: call(module, *of, mask, **options)[0]  # noqa: E731
        if kind is Attention.FLEX and not backward:
            # torch has no backward pass of it on a CPU.
            results = [attend(*states)]
        else:
            results = _forward_backward(attend, states, given)
            calls[kind.value] = partial(_forward_backward, attend, states, given)
        parts = ("output", "query's", "key's", "value's")
        errors[kind.value] = {part: distance(one, of) for part, one, of in zip(parts, results, wanted, strict=False)}
    timings = measure.alternate(calls, scale.rounds)
    eager, flex = (errors[kind.value] for kind in (Attention.EAGER, Attention.FLEX))
    note = f"{max(flex.values()):.1e} against {max(eager.values()):.1e} from float64"
    worst = max(flex[part] / eager[part] for part in flex)
    claims = [
        once("flex attention: error over that of plain torch, bfloat16", worst, target=2, at_most=True, note=note)
    ]
    if backward:
        pair = (timings[kind.value] for kind in (Attention.EAGER, Attention.FLEX))
        claims.append(measure.claim("GPU: flex attention: times faster than plain torch, bfloat16", *pair))
    return claims, {"tokens": tokens, "distance_from_float64": errors, "backward": backward,
                    "seconds": {name: one.seconds for name, one in timings.items()}}  # fmt: skip


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
    """Notes rates; after step `killed_at`, with its checkpoints whole, the process kills itself; after `ends_at` it ends."""

    def __init__(self, killed_at: int | None, ends_at: int | None):
        self.killed_at, self.ends_at, self.speeds = killed_at, ends_at, []
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
        control.should_training_stop |= state.global_step == self.ends_at


def train(
    scale: Scale,
    params: Params,
    folder: Path,
    steps: int,
    killed_at: int | None = None,
    ends_at: int | None = None,
    files: Path = ROOT / "launch",
) -> tuple[VqaTrainer, Watch]:
    """Train under the launch that `params` names, going on from a checkpoint in `folder` where there is one."""
    running = launch.start(params.train, files)
    work, train = workload(scale), params.train
    each = train.batch_size * train.gradient_accumulation_steps * running.processes
    texts = (pairs(scale.texts) * -(-steps * each // scale.texts))[: steps * each]
    columns = {"question_id": range(len(texts)), "image_id": [number // 5 for number in range(len(texts))]}
    columns |= dict(zip(("question", "multiple_choice_answer"), map(list, zip(*texts, strict=True)), strict=True))
    data = QuestionDataset(Questions(columns), work.layout, TooLong.DROP)  # ty: ignore[invalid-argument-type] - columns by name
    shape = _shape(scale, "features", scale.large, None, alone=0)
    features: Any = generation.Features(shape, sorted(set(data.image_ids)))
    model = _model(scale, params)
    set_dropout(model, train.dropout)
    set_attention(model, train.attention)
    if train.freeze_embeddings:
        freeze_embeddings(model)
    watch = Watch(killed_at, ends_at)
    arguments = training_arguments(train, params.seed, folder, running)
    arguments.max_steps, arguments.disable_tqdm = steps, True
    if train.save_steps > steps:
        arguments.save_strategy = "no"
    trainer = VqaTrainer(model, arguments, train, data, Collator(work.layout, features), [watch], running)
    trainer.run()
    return trainer, watch


def _model(scale: Scale, params: Params) -> VlmForTraining:
    with measure.device():
        model = initial_model(params.language, scale.tower, workload(scale).processor, params.seed)
        assert params.language.vocab_size is not None
        model.resize_token_embeddings(params.language.vocab_size, mean_resizing=False)
    # As in a published checkpoint: DeepSpeed, asked for bfloat16, rounds the weights that it starts from.
    return model.to(torch.bfloat16).to(torch.float32)


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
        killed = _launched(scale, ROOT / "launch" / f"{params.train.launch}.yaml", "--killed", Path(scratch) / "killed")
        for name in ("unbroken", "killed", "unbroken again"):
            folder = Path(scratch) / name
            if name == "killed":
                _check_killed(killed, folder)
            trainer, _ = train(scale, params, folder, STEPS)
            hashes[name] = hash_weights(trainer.whole_weights())
            losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            trainer.note_states()
            facts = trainer.facts
            del trainer
            if name == "killed" and hashes["killed"] == hashes["unbroken"]:
                break
    device = measure.device().type
    assert facts["device"] == device and facts["num_processes"] == 1, facts
    note = ""
    if again := hashes.get("unbroken again"):
        same = "are equal" if again == hashes["unbroken"] else "differ, too: the card adds in another order each time"
        note = f"two unbroken trainings {same}"
    worst = max(abs(a / b - 1) for a, b in zip(losses["killed"], losses["unbroken"], strict=True))
    claims = [
        once("killed and resumed: weights equal to the bit", float(hashes["killed"] == hashes["unbroken"]), target=1,
             note=note),
        once("killed and resumed: largest relative difference of a loss", worst, target=1e-3, at_most=True),
    ]  # fmt: skip
    return claims, {"launch": facts, "weights": hashes, "losses": losses}


def _check_killed(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait for a training that kills itself, and check what it has left."""
    _, errors = process.communicate()
    last = latest(folder)
    assert process.returncode != 0 and last is not None, f"it was not killed: {errors[-2000:]}"
    assert last.name == f"checkpoint-{SAVE_STEPS}", last


def _launched(scale: Scale, config: Path, *options: object, **variables: str) -> subprocess.Popen[str]:
    """Start this program by `accelerate launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    command += ["-m", "proofs.gpu_checks", *map(str, options), *([TINY] if scale.tiny else [])]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment() | variables, **pipes)


WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"train.optimizer": "adamw_torch", "train.compute_dtype": "float32"}, 1e-4),
    "as the presets": ({"train.gradient_checkpointing": True}, 0.1),
    "compiled": ({"train.gradient_checkpointing": True, "train.compile": True}, 0.1),
}
"""Ways to train under a launch, and how far its weights may be from one process's, over how far those went."""


def ways_of(file: Path) -> list[str]:
    """Return the names of the ways of a launch: DeepSpeed trains no compiled layers, and on CPUs that is the tests'."""
    return [way for way in WAYS if way != "compiled" or file.stem in ("fsdp2", "ddp")]


def launches(scale: Scale) -> Result:
    """FSDP2, DDP and DeepSpeed on all GPUs, each stopped and gone on from its own checkpoint, against one process."""
    on_cpu = measure.device().type == "cpu"
    gpus = os.environ[ALL_GPUS]
    count = 2 if on_cpu else max(one for one in (1, 2, 3, 4, 6, 12) if one <= len(gpus.split(",")))
    # accelerate refuses DDP of one process; what CPUs do is the tests'.
    others = [*["ddp"] * (count > 1), *["zero2", "zero3"] * bool(find_spec("deepspeed"))]
    kinds = ["fsdp2", *([] if on_cpu else others)]
    claims, facts = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = [_launch_file(folder, ("cpu-" if on_cpu else "") + kind, count) for kind in kinds]
        running = [_launched(scale, file, "--launched", file, CUDA_VISIBLE_DEVICES=gpus) for file in files]
        every = max((ways_of(file) for file in files), key=len)
        single = {way: _trained(scale, launch_settings(scale, way), folder / f"one, {way}") for way in every}
        for kind, file, process in zip(kinds, files, running, strict=True):
            _, errors = process.communicate()
            assert process.returncode == 0, f"{kind}: {errors[-3000:]}"
            found = json.loads(file.with_suffix(".json").read_text())
            for way in ways_of(file):
                bound, ours = WAYS[way][1], single[way]
                other = load_file(_weights_of(file, way), device=str(measure.device()))
                start = trained_state(_model(scale, launch_settings(scale, way)))
                went, off = (_apart(ours.weights, one) for one in (start, other))
                losses = [abs(a / b - 1) for a, b in zip(found[way]["losses"], ours.losses, strict=True)]
                what = f"{kind}, {count} process{'es' * (count > 1)}, {way}"
                claims.append(
                    once(f"{what}: weights' distance from one process's", off / went, target=bound, at_most=True)
                )
                claims.append(
                    once(f"{what}: largest relative difference of a loss", max(losses), target=0.01, at_most=True)
                )
            facts[kind] = {way: one["facts"] for way, one in found.items()}
    return claims, {"facts": facts, "steps": STEPS, "saved_after": SAVE_STEPS, "stopped_after": KILLED_AT}


def _launch_file(folder: Path, name: str, count: int) -> Path:
    """Write a launch file of the project's for as many processes."""
    asked = (ROOT / "launch" / f"{name}.yaml").read_text(encoding="utf-8")
    file = folder / f"{name}.yaml"
    file.write_text(re.sub(r"num_processes: \d+", f"num_processes: {count}", asked), encoding="utf-8")
    return file


def launch_settings(scale: Scale, way: str, name: str | None = None, processes: int = 1) -> Params:
    """Return how a launch of so many processes trains, by default this one: 24 questions a step."""
    shape = {"language.config": asdict(scale.medium), "language.vocab_size": medium_vocabulary(scale)}
    sizes = {
        "train.batch_size": 12 // processes,
        "train.gradient_accumulation_steps": 2,
        "train.save_steps": SAVE_STEPS,
    }
    changes = {**WIDE, "train.freeze_embeddings": False, **shape, **sizes, **WAYS[way][0]}
    return settings(scale, 1, changes | ({"train.launch": name} if name else {}))


class Trained(NamedTuple):
    weights: dict[str, Tensor]  # of the launch's first process
    losses: list[float]
    facts: dict[str, Any]


def _trained(scale: Scale, params: Params, folder: Path, files: Path = ROOT / "launch") -> Trained:
    """Train for some steps, end, and train again from what is left in `folder`."""
    first, _ = train(scale, params, folder, STEPS, ends_at=KILLED_AT, files=files)
    if first.launch.main:
        first.lock.close()
    del first
    trainer, watch = train(scale, params, folder, STEPS, files=files)
    assert len(watch.speeds) == STEPS - SAVE_STEPS, "it did not go on from its checkpoint"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(dict(trainer.whole_weights()), losses, trainer.facts)


def train_launched(scale: Scale, file: Path) -> None:
    """Train all ways in a process of a launch; the first one writes weights and what else is compared."""
    found = {}
    for way in ways_of(file):
        params = launch_settings(scale, way, file.stem, int(os.environ["WORLD_SIZE"]))
        made = _trained(scale, params, file.with_suffix("") / way, file.parent)
        found[way] = {"losses": made.losses, "facts": made.facts}
        if launch.on_main_process():
            save_tensors(made.weights, _weights_of(file, way))
            file.with_suffix(".json").write_text(json.dumps(found))


def _weights_of(file: Path, way: str) -> Path:
    return file.with_name(f"{file.stem}, {way}.safetensors")


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference of two states."""
    assert one.keys() == other.keys()
    squares = [(one[name].double().cpu() - other[name].double().cpu()).square().sum().item() for name in one]
    return math.sqrt(sum(squares))


def preset(scale: Scale) -> Result:
    """Training by `VqaTrainer` with the preset for one GPU: bfloat16 weights, 8-bit AdamW, checkpointing; as it stands, with
    an eighth of a step's questions at once, and not compiled."""
    if bnb is None:
        raise NotRun("bitsandbytes is not installed")
    if not scale.tiny and torch.cuda.mem_get_info()[1] < 20 * GIB:
        raise NotRun("the preset is for cards of 24 GB")
    sizes = {"train.batch_size": 8} if scale.tiny else {}
    common = {**sizes, "train.save_steps": 10**6, "train.compile": measure.device().type == "cuda"}
    at_once = settings(scale, scale.large.num_hidden_layers, common).train.batch_size
    ways = {
        "": {},
        ", 8 passes a step": {"train.batch_size": at_once // 8, "train.gradient_accumulation_steps": 8},
        ", not compiled": {"train.compile": False},
    }
    claims, details = [], {}
    for way, changes in ways.items():
        name, params = f"preset vqav2-1gpu{way}", settings(scale, scale.large.num_hidden_layers, common | changes)
        with tempfile.TemporaryDirectory() as folder:
            trainer, watch = train(scale, params, Path(folder), STEPS)
        peak, batches = read_peak() / 1024, [Batch(*one) for one in _passes(trainer)]
        claims += _speeds(name, watch.speeds)
        claims += _memory(scale, name, peak, predicted(scale, scale.large, params, batches) / GIB)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        details[name] = {"losses": losses, "facts": trainer.facts, "speeds": watch.speeds}
        # Or the next one's memory would hold this model, too.
        del trainer, watch
        gc.collect()
    return claims, details


def _speeds(what: str, speeds: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Claim the rates of all steps but two: there the optimizer's states are made, and rows of new sizes compiled."""
    claims = []
    for name in ("questions_per_second", "tokens_per_second", "flops_utilisation"):
        if found := [one[name] for one in speeds[2:] if name in one]:
            middle, kind = sorted(found)[len(found) // 2], name.replace("_", " ").replace(" per second", "/s")
            claims.append(Claim(f"GPU: {what}, {kind}", middle, min(found), max(found)))
    return claims


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
    """An optimizer step, shared rows against the stock recipe, as it is and with micro-batches that fill the card: 8-bit
    AdamW, bfloat16 by autocast."""
    shape = deepest(scale)
    params, model = everything(scale, shape.num_hidden_layers), build(scale, shape, scale.vocabulary)
    optimizer = build_optimizer(params.train, model, set(), seed=0)
    stock = recipes.stock_model(model)
    named, claims, details = layers_of(shape), [], {"shape": asdict(shape) | {"vocabulary": scale.vocabulary}}
    for name, work in (("", workload(scale)), (", full card", filling(scale, shape))):
        if work is not None:
            made = model, stock, optimizer
            more, details[f"step{name}"] = _steps(scale, shape, f"{named}{name}", work, made, params)
            claims += more
    left_out = scale.large.num_hidden_layers - shape.num_hidden_layers
    return claims, details | {"layers_left_out": left_out, "optimizer": params.train.optimizer.value}


def _steps(
    scale: Scale,
    shape: LanguageConfig,
    named: str,
    work: Workload,
    made: tuple[VlmForTraining, PaliGemmaForConditionalGeneration, torch.optim.Optimizer],
    params: Params,
) -> Result:
    """Time a step of `work` by the stock recipe and by ours; and by ours compiled where it fills the card."""
    model, stock, optimizer = made
    ours = recipes.ours(model, work, dtype=torch.bfloat16)
    ways = {"stock": recipes.reference(stock, work, dtype=torch.bfloat16), "ours": ours}
    runs: dict[str, Callable[[], float]] = {name: recipe.run for name, recipe in ways.items()}
    losses, peaks, claims = {name: run() for name, run in runs.items()}, {}, []
    full = work.micro_batch != workload(scale).micro_batch
    if full:
        runs |= {"ours": partial(_uncompiled, ours), "compiled": ours.run}
        losses["compiled"], seconds, off = _compile(model, ours)
        claims = [
            once(f"{named}: seconds to compile", seconds),
            once(f"{named}: gradients, compiled, distance from not", off, target=0.05, at_most=True),
        ]
    # Makes the optimizer's states.
    optimizer.step()
    calls = {name: partial(_whole_step, run, optimizer) for name, run in runs.items()}
    for name, call in calls.items():
        reset_peak()
        call()
        peaks[name] = read_peak() / 1024
    timings = measure.alternate(calls, scale.rounds, warm_up=0)
    counts = products(shape, scale.vocabulary, ours.batches[0].positions, work.supervised // len(ours.batches))
    positions = {name: (recipe.positions, len(recipe.batches)) for name, recipe in ways.items()}
    # The largest products take room.
    del ours, ways, runs, calls
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    machine = product_rate(counts, torch.bfloat16, 0.01 if scale.tiny else 0.1)
    claims += _claims(scale, shape, named, work, timings, machine)
    for name in peaks:
        if name == "stock":
            claims.append(once(f"{named}: peak of memory, {name}, GiB", peaks[name]))
        else:
            as_run = replace(params, train=replace(params.train, compile=name == "compiled"))
            expected = predicted(scale, shape, as_run, batches_of(work)) / GIB
            claims += _memory(scale, f"{named}: {name}", peaks[name], expected)
            off = abs(losses[name] / losses["stock"] - 1)
            claims.append(once(f"{named}: loss, {name}, from the stock recipe's", off, target=0.02, at_most=True))
    return claims, {
        "workload": work.facts,
        "positions_and_micro_batches": positions,
        "product_flop_per_second": machine,
        "losses": losses,
        "seconds": {name: one.seconds for name, one in timings.items()},
    }


def _claims(
    scale: Scale,
    shape: LanguageConfig,
    named: str,
    work: Workload,
    timings: Mapping[str, measure.Timing],
    machine: float,
) -> list[Claim]:
    """Claim how fast each way is; `machine` is the products' rate in FLOP/s."""
    flops, real = (
        model_flops(shape, scale.vocabulary, work, work.rows),
        sum(one.work.tokens for one in batches_of(work)),
    )
    stock, ours, *compiled = timings.values()
    target = 5.0 if compiled and not scale.tiny else None
    claims = [measure.claim(f"GPU: {named}: step, shared rows over the stock recipe", stock, ours, target=target)]
    claims += [measure.claim(f"GPU: {named}: step, compiled over not", ours, one) for one in compiled]
    for name, timing in timings.items():
        claims.append(measured(f"{named}: questions/s, {name}", timing, len(work.questions)))
        if timing is not stock:
            claims.append(measured(f"{named}: tokens/s, {name}", timing, real))
            what = f"{named}: MFU, {name}: model FLOP/s over measured products"
            claims.append(measured(what, timing, flops / machine))
    return claims


def _compile(model: VlmForTraining, recipe: recipes.Recipe) -> tuple[float, float, float]:
    """Compile a model whose gradients are there; return the loss then, the seconds that it took, and how far its gradients
    are from those, in parts of their norm."""
    # In 16 bits, and not on the card: all gradients at once take as much as the weights.
    before = [one.grad.to("cpu", torch.bfloat16) for one in model.parameters() if one.grad is not None]
    compile_layers(model, COMPILER)
    begun = time.perf_counter()
    loss = recipe.run()
    seconds = time.perf_counter() - begun
    now = [one.grad for one in model.parameters() if one.grad is not None]
    off = [(one - other.to(one)).norm().item() for one, other in zip(now, before, strict=True)]
    return loss, seconds, math.hypot(*off) / math.hypot(*(one.norm().item() for one in now))


def _uncompiled(recipe: recipes.Recipe) -> float:
    with uncompiled():
        return recipe.run()


def _whole_step(run: Callable[[], float], optimizer: torch.optim.Optimizer) -> None:
    run()
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
    """Answers a second in bfloat16, by how many questions are read at once, and what reading them takes of it; and how many
    answers differ from float32's."""
    language, texts = deepest(scale), [question for question, _ in pairs(scale.texts)]
    shape, named = _shape(scale, "2B", language, scale.vocabulary, alone=0), layers_of(language)
    asked = generation.whole_images(generation.asked_of_images(texts), scale.asked)
    stored: Any = generation.Features(shape, sorted({row["image_id"] for row in asked}))
    asks = [Ask(row["image_id"], row["question"]) for row in asked]
    with measure.device():
        model, processor = generation.build_model(shape, texts)
    given, peaks, claims = {}, {}, []
    first, *others = scale.answered_at_once
    ways = [(torch.float32, first), (torch.bfloat16, first), *((torch.bfloat16, at_once) for at_once in others)]
    for dtype, at_once in ways:
        predictor = generation.answerer_of(shape, model.to(dtype), processor, Mask.IMAGE_PREFIX)
        name = f"{str(dtype).removeprefix('torch.')}, {at_once} at once"

        def ask(predictor=predictor, name=name, at_once=at_once) -> None:
            found = answer_asks(asks, predictor, stored, at_once, name)
            given[name] = [found[one].answer for one in asks]

        reset_peak()
        # float32 is there to compare answers with.
        timing = measure.alternate({name: ask}, scale.rounds if dtype is torch.bfloat16 else 1)[name]
        peaks[name] = read_peak() / 1024
        claims.append(measured(f"{named}: answers/s, {name}", timing, len(asked)))
    reading, share = generation.prefill(asks, predictor, stored, at_once)
    claims += [
        once(f"{named}: reading's share of the time, {at_once} at once", reading / timing.median),
        once(f"{named}: reading's FLOP/s over measured products, {at_once} at once", share),
    ]
    wide, *narrow = given.values()
    for what, one, other in (("bfloat16 and float32", wide, narrow[0]), ("numbers at once", narrow[0], narrow[-1])):
        differing = sum(a != b for a, b in zip(one, other, strict=True))
        claims.append(once(f"{named}: share of answers that differ between {what}", differing / len(asked)))
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
    parser.add_argument("--launched", type=Path, help="train under this launch file, in a process of it")
    options = parser.parse_args(arguments)
    scale = SMALL if options.tiny else FULL
    if options.killed:
        train(scale, resume_settings(scale), options.killed, STEPS, KILLED_AT)
        raise UserError("the training came to its end")
    if options.launched:
        train_launched(scale, options.launched)
    for name in options.names:
        if not options.tiny and time.time() + CHECKS[name].seconds > options.until:
            tell(begin=name)
            tell(end=name, status=f"{NOT_RUN}: {TIME}", seconds=0, claims=[], details={})
        elif not run_one(name, scale):
            return


if __name__ == "__main__":
    main()
