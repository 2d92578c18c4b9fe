"""What each of the five stages needs: disk, memory, FLOPs, hours."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlm_vqa.errors import UserError
from vlm_vqa.estimate import memory
from vlm_vqa.estimate.batches import Pass, Passes, plan
from vlm_vqa.estimate.dataset_size import Texts
from vlm_vqa.estimate.devices import Device
from vlm_vqa.estimate.memory import GPU_BASE, HOST_BASE, NCCL_BASE, Item, Moment, Step, moment, times
from vlm_vqa.estimate.shapes import Model, VisionShape, model_of, vision_of
from vlm_vqa.model.extraction import MOST_THREADS
from vlm_vqa.model.flops import Cost, Work, cost, lora_token_cost, vision_flops
from vlm_vqa.params import Dtype, Mask, Optimizer, Params, Source, StoreDtype
from vlm_vqa.training.launch_file import Strategy, check_params, read_launch, strategy_of

CPU_UTILISATION = 0.75
"""Measured: 0.79 of the machine's rate in float32 with Gemma 2 2B's layers (benchmarks/results/training_step.json)."""
GPU_UTILISATION = 0.35
"""Assumed: no GPU was measured."""
_MEGABYTES = 1_000_000
_SHARD = 256 * 2**20
"""Bytes of features in a file; one to three are in a process's memory."""


@dataclass(frozen=True)
class LaunchShape:
    """What a launch file says."""

    strategy: Strategy
    processes: int
    machines: int
    on_cpu: bool

    @property
    def on_a_machine(self) -> int:
        """Processes of one machine."""
        return self.processes // self.machines


@dataclass(frozen=True)
class Machine:
    """What a run is to fit into, and what its hours are computed from."""

    device: Device
    host_memory: int
    """Bytes of each machine."""
    disk: int
    """Bytes free for the project's outputs, those that are there already among them."""
    utilisation: float
    bandwidth: float
    """Bytes a second of downloads."""
    links: bool = True
    """DVC's cache links outputs instead of copying them."""


@dataclass(frozen=True)
class Stage:
    """One stage's prediction."""

    name: str
    disk: tuple[Item, ...]
    host: tuple[Moment, ...]
    """Of one machine."""
    gpu: tuple[Moment, ...]
    """Of one rank; none on the CPU."""
    hours: float | None
    work: str
    """How the hours come about."""
    facts: dict[str, Any]

    @property
    def disk_bytes(self) -> int:
        return sum(item.bytes for item in self.disk)


def predict(params: Params, texts: Texts, machine: Machine, launches: Path) -> list[Stage]:
    """Return the prediction of every stage.

    Raises:
        UserError: a launch file or a shape is not known, or the launch cannot do what `params` ask for.
    """
    model, vision = model_of(params), vision_of(params.vision)
    training = launch_shape(params.train.launch, launches)
    check_params(params.train, training.strategy)
    extraction = launch_shape(params.vision.launch, launches)
    if not (extraction.on_cpu or machine.device.gpu):
        raise UserError(
            f"vision.launch {params.vision.launch} runs on GPUs, but --device is cpu. Set vision.launch: cpu."
        )
    return [
        _fetch(params, texts, machine),
        _extract(params, texts, vision, machine, extraction),
        _train(params, texts, model, vision, machine, training),
        _export(model, vision),
        _evaluate(params, texts, model, vision, machine),
    ]


def launch_shape(name: str, folder: Path) -> LaunchShape:
    """Read `launch/NAME.yaml`."""
    asked = read_launch(name, folder)
    strategy = strategy_of(asked, folder / f"{name}.yaml")
    return LaunchShape(strategy, asked["num_processes"], asked["num_machines"], asked["use_cpu"])


# --- fetch-vqav2 -----------------------------------------------------------------------------------------------------


def _fetch(params: Params, texts: Texts, machine: Machine) -> Stage:
    downloads = params.data.source in (Source.OFFICIAL, Source.HUB)
    transferred = texts.download if downloads else 0
    disk = [times("images", (texts.images, "images"), (texts.image_bytes, "bytes, mean of a file"))]
    if params.data.official is not None:
        kept = "kept" if params.data.official.keep_archives else "until the records are made"
        disk.append(Item("archives", transferred, f"6 archives, {kept}"))
    hours = transferred / machine.bandwidth / 3600
    work = f"{transferred:,} bytes / {machine.bandwidth / _MEGABYTES:g} MB/s"
    facts = {name: split._asdict() for name, split in texts.splits.items()} | {"basis": texts.basis}
    return Stage("fetch-vqav2", tuple(disk), (moment("all", _base(1)),), (), hours, work, facts)


# --- extract-features ------------------------------------------------------------------------------------------------


def _extract(params: Params, texts: Texts, shape: VisionShape, machine: Machine, launch: LaunchShape) -> Stage:
    vision, processes = params.vision, (launch.on_a_machine, "processes")
    size = 4 if vision.compute_dtype is Dtype.FLOAT32 else 2
    image = vision.num_patches * vision.visual_embed_dim
    # Of the widest moment of a layer: its input, the hidden layer of its MLP before and after GELU, its output.
    copies = (2 + 2 * shape.mlp_ratio, "copies")
    encoder = [
        _encoder(params, shape),
        times("activations", (vision.batch_size, "images"), (image, "elements"), copies, (size, "bytes")),
    ]
    pixels = (3, "colours"), ((vision.num_patches - 1) * shape.patch_size**2, "pixels"), (4, "bytes")
    host = [
        _base(launch.on_a_machine),
        times("float32 weights", processes, (shape.parameters, "elements"), (4, "bytes")),
        times("pictures ahead", processes, (MOST_THREADS + 1, "batches"), (vision.batch_size, "images"), *pixels),
        times("shards", processes, (3, "at most"), (_SHARD, "bytes")),
    ]
    if launch.on_cpu:
        moments, gpu = moment("forward", host, [one.on(launch.on_a_machine) for one in encoder]), ()
    else:
        moments, gpu = moment("forward", host), (_on_gpu("forward", encoder, launch.processes),)
    flops = vision_flops(shape, vision.num_patches)
    facts = {"images": texts.images, "flop_an_image": flops, "flop": flops * texts.images}
    if launch.on_cpu and machine.device.gpu:
        hours, work = None, ""
        facts["note"] = "vision.launch runs on the host's CPU, whose rate is not known"
    else:
        hours, work = _hours(flops * texts.images, machine, vision.compute_dtype, launch.processes)
    disk = tuple(_features(params, texts))
    return Stage("extract-features", disk, (moments,), gpu, hours, work, facts | {"processes": launch.processes})


def _features(params: Params, texts: Texts) -> Iterator[Item]:
    vision = params.vision
    tokens = (texts.images, "images"), (vision.num_patches, "tokens")
    if vision.store_dtype is StoreDtype.INT8:
        yield times("features", *tokens, (vision.visual_embed_dim, "wide"), (1, "byte"))
        yield times("scales", *tokens, (4, "bytes"))
    else:
        size = getattr(torch, vision.store_dtype.value).itemsize
        yield times("features", *tokens, (vision.visual_embed_dim, "wide"), (size, "bytes"))


# --- train -----------------------------------------------------------------------------------------------------------


def _train(
    params: Params, texts: Texts, model: Model, vision: VisionShape, machine: Machine, launch: LaunchShape
) -> Stage:  # fmt: skip
    train = params.train
    step = Step(model, train, launch.strategy, launch.processes, gpu=not launch.on_cpu)
    passes = plan(params, launch.processes, texts)
    rank = memory.rank_moments(step, passes.sample)
    end = moment("whole weights", step.weights(), step.states(), step.gathered_parameter())
    start = moment("start", _initial(params, model))
    base = [_base(launch.on_a_machine), _encoder(params, vision).on(launch.on_a_machine)]
    if launch.on_cpu:
        host = tuple(_host_on_cpu(step, base, rank, start, end, launch, passes))
        gpu = ()
    else:
        host = tuple(_host_of_gpus(step, base, start, launch))
        gpu = tuple(_on_gpu(one.name, one.items, launch.processes) for one in [*rank, end])
    price = train_cost(model)
    flops = passes.epochs * price.flops(passes.epoch)
    again = passes.epochs * recomputed(model, passes.epoch) if train.gradient_checkpointing else 0
    hours, work = _hours(flops + again, machine, train.compute_dtype, launch.processes)
    facts = {
        "strategy": launch.strategy.value,
        "processes": launch.processes,
        "parameters": model.all,
        "trained": model.trained,
        **_facts_of(passes),
        "flop": flops,
        "flop_recomputed": again,
        "step_seconds": None if hours is None else hours * 3600 / passes.steps,
    }
    if launch.on_cpu and train.optimizer is Optimizer.ADAMW_BNB_8BIT:
        facts["note"] = "without the update of 8-bit states, 79 ms a million elements and thread on a CPU"
    return Stage("train", tuple(_train_disk(step, launch, passes)), host, gpu, hours, work, facts)


def _facts_of(passes: Passes) -> dict[str, Any]:
    return {
        "steps": passes.steps,
        "questions_a_step": passes.questions_a_step,
        "questions_a_row": round(passes.questions_a_row, 2),
        "tokens": passes.epochs * passes.epoch.tokens,
        "supervised": passes.epochs * passes.epoch.supervised,
        "largest_pass_tokens": max(one.work.tokens for one in passes.sample),
    }


def _initial(params: Params, model: Model) -> Iterator[Item]:
    """What every process builds on its host before the launch divides it: float32, whole."""
    yield times("float32 weights", (model.saved, "elements"), (4, "bytes"))
    if params.language.model != "random":
        # The mean of all rows and their covariance start from a centred copy.
        yield times("grown embedding", (2, "copies"), (model.embedding, "elements"), (4, "bytes"))
    elif params.train.weights_dtype is Dtype.BFLOAT16:
        yield times("embedding in 16 bits", (model.embedding, "elements"), (2, "bytes"))


def _encoder(params: Params, vision: VisionShape) -> Item:
    """The vision tower, which every process loads to compare it with the stored features."""
    size = 4 if params.vision.compute_dtype is Dtype.FLOAT32 else 2
    return times("encoder", (vision.parameters, "elements"), (size, "bytes"))


def _host_on_cpu(
    step: Step, base: list[Item], rank: list[Moment], start: Moment, end: Moment, launch: LaunchShape, passes: Passes
) -> Iterator[Moment]:
    """Yield the moments of a machine whose processes train on its CPUs."""
    count = launch.on_a_machine
    writers = count if launch.strategy.sharded_weights else 1
    snapshot = [one.on(writers) for one in step.snapshot()]
    # A checkpoint is written while the next steps are computed; the last one of all has none after it.
    meanwhile = snapshot if passes.steps > step.train.save_steps else []
    yield moment(start.name, base, [one.on(count) for one in start.items])
    for one in rank:
        yield moment(one.name, base, [item.on(count) for item in one.items], meanwhile)
    yield moment("last checkpoint", base, [one.on(count) for one in (*step.weights(), step.states())], snapshot)
    yield moment(end.name, base, [one.on(count) for one in end.items], step.whole_weights())


def _host_of_gpus(step: Step, base: list[Item], start: Moment, launch: LaunchShape) -> Iterator[Moment]:
    """Yield the moments of a host whose GPUs train."""
    count = launch.on_a_machine
    writers = count if launch.strategy.sharded_weights else 1
    yield moment(start.name, base, [one.on(count) for one in start.items])
    yield moment("checkpoint", base, [one.on(writers) for one in step.snapshot()])
    yield moment("whole weights", base, step.whole_weights())


def _train_disk(step: Step, launch: LaunchShape, passes: Passes) -> Iterator[Item]:
    yield times("models/trained", (step.model.saved, "elements"), (4, "bytes"))
    if launch.strategy.deepspeed:
        of_a_rank = step.states().bytes * launch.processes + 6 * step.model.all
        formula = "weights, masters and states, all ranks"
    else:
        of_a_rank = sum(one.bytes for one in step.snapshot()) * (launch.processes if step.share > 1 else 1)
        formula = "weights and states, all ranks"
    # One is written before the oldest goes.
    written = min(step.train.save_total_limit + 1, -(-passes.steps // step.train.save_steps))
    yield times("checkpoints", (written, "checkpoints"), (of_a_rank, formula))


def train_cost(model: Model) -> Cost:
    """Return what loss and gradients cost, with adapters where there are any."""
    frozen = model.freeze_embeddings or model.lora is not None
    found = cost(model.language, model.vocabulary, model.feature_width, frozen_embeddings=frozen)
    if model.lora is None:
        return found
    return replace(found, token=lora_token_cost(model.language, model.lora))


def recomputed(model: Model, work: Work) -> int:
    """Return the FLOPs of the layers' forward pass, which activation checkpointing computes once more."""
    forward = cost(model.language, model.vocabulary, model.feature_width)
    return forward.token * work.tokens // 3 + forward.pair * work.pairs // 3


# --- export and helm-eval --------------------------------------------------------------------------------------------


def _export(model: Model, vision: VisionShape) -> Stage:
    whole = (model.saved + vision.parameters, "elements"), (4, "bytes")
    host = (
        moment("join", _base(1), times("model", *whole), times("encoder", (vision.parameters, "elements"), (4, "bytes"))),
        moment("check", _base(1), times("model", *whole), times("the exported model", *whole),
               times("encoder", (vision.parameters, "elements"), (4, "bytes"))),
    )  # fmt: skip
    return Stage("export", (times("models/export", *whole),), host, (), None, "reads and writes once", {})


def _evaluate(params: Params, texts: Texts, model: Model, vision: VisionShape, machine: Machine) -> Stage:
    evaluation, total = params.evaluation, texts.splits["val"].questions
    questions = min(evaluation.vqa_questions or total, total)
    # Questions are answered in batches of images, as training reads them in passes of one step each.
    shared = params.prompt.mask is Mask.IMAGE_PREFIX
    reading = replace(
        params.train,
        batch_size=evaluation.batch_size,
        gradient_accumulation_steps=1,
        questions_per_row=evaluation.batch_size if shared else 1,
    )
    read = plan(replace(params, train=reading), 1, texts)
    largest = max(read.sample, key=lambda one: one.rows * one.width)
    held = list(_answering(model, vision, largest, evaluation.batch_size))
    on_gpu = machine.device.gpu
    host = (moment("answering", _base(1), held[:1] if on_gpu else held),)
    gpu = (_on_gpu("answering", held, 1),) if on_gpu else ()
    # Read with the right images and with shuffled ones; HELM's instances come from pixels, a row each.
    share = 2 * questions / texts.splits["train"].questions
    forward = cost(model.language, model.vocabulary, model.feature_width)
    work = Work(*(round(share * getattr(read.epoch, name)) for name in Work.__dataclass_fields__))
    answered = (forward.token * work.tokens + forward.pair * work.pairs + forward.supervised * work.supervised) // 3
    instance = vision_flops(vision, params.vision.num_patches) + forward.token // 3 * largest.width
    flops = answered + evaluation.helm_instances * instance
    hours, how = _hours(flops, machine, Dtype.FLOAT32, 1)
    facts = {
        "questions": questions,
        "helm_instances": evaluation.helm_instances,
        "flop": flops,
        "note": "a lower bound: single tokens are bound by memory, and HELM's own metrics take a minute",
    }
    disk = times("HELM's pictures and reports", (evaluation.helm_instances, "instances"), (texts.image_bytes, "bytes"))
    return Stage("helm-eval", (disk,), host, gpu, hours, how, facts)


def _answering(model: Model, vision: VisionShape, largest: Pass, questions: int) -> Iterator[Item]:
    """Yield what answering a batch holds, the model first: all in float32, on a padded grid."""
    shape, grid = model.language, largest.rows * largest.width
    layers, keys = shape.num_hidden_layers, shape.num_key_value_heads * shape.head_dim
    pairs = grid * largest.width * shape.num_attention_heads
    yield times("float32 model", (model.saved + vision.parameters, "elements"), (4, "bytes"))
    yield times("keys and values", (2 * layers, "tensors"), (grid, "tokens"), (keys, "wide"), (4, "bytes"))
    yield times("a layer's MLP", (3, "copies"), (grid, "tokens"), (shape.intermediate_size, "wide"), (4, "bytes"))
    yield times("attention scores", (3, "copies"), (pairs, "scores"), (4, "bytes"))
    yield times("logits", (3, "copies"), (questions, "questions"), (model.vocabulary, "tokens"), (4, "bytes"))


# --- shared ----------------------------------------------------------------------------------------------------------


def _base(processes: int) -> Item:
    return times("Python and libraries", (processes, "processes"), (HOST_BASE, "bytes, measured"))


def _on_gpu(name: str, items: list[Item] | tuple[Item, ...], processes: int) -> Moment:
    """Add what a GPU needs beside tensors."""
    base = GPU_BASE + NCCL_BASE * (processes > 1)
    lost = round(memory.FRAGMENTATION * sum(item.bytes for item in items))
    what = "CUDA and NCCL" if processes > 1 else "CUDA"
    return moment(
        name, list(items), Item(what, base, "assumed"),
        Item("fragmentation", lost, f"{memory.FRAGMENTATION:.0%} of the above, assumed"),
    )  # fmt: skip


def _hours(flops: int, machine: Machine, dtype: Dtype, processes: int) -> tuple[float | None, str]:
    """Return the hours of so many FLOPs over all processes, and the formula; a CPU's processes share its rate."""
    rate, count = machine.device.rate(dtype), processes if machine.device.gpu else 1
    if rate is None:
        return None, ""
    hours = flops / (rate * machine.utilisation * count) / 3600
    of_all = f" x {count} devices" if count > 1 else ""
    return hours, f"{flops:.3g} FLOP / ({rate:.3g} FLOP/s {dtype.value} x {machine.utilisation:g} utilisation{of_all})"
