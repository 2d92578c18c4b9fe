"""What each of the five stages needs: disk, memory, FLOPs, hours."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vlm_vqa.errors import UserError
from vlm_vqa.estimate.devices import GIB, Device
from vlm_vqa.estimate.memory import Moments, Parts, Step, copies, total
from vlm_vqa.estimate.questions import Batch, Batches, DatasetSize, plan_batches
from vlm_vqa.estimate.shapes import Model, VisionShape, model_of, vision_of
from vlm_vqa.model.flops import Work, cost, lora_token_cost, vision_flops
from vlm_vqa.params import Dtype, Mask, Optimizer, Params, Source, StoreDtype
from vlm_vqa.training.launch_file import Strategy, check_params, read_launch, strategy_of

HOST_BASE = round(1.1 * GIB)
"""Resident in a training process without any weights: Python, libraries and scratch; measured (torch 2.14.1, a CPU)."""
GPU_BASE = NCCL_BASE = GIB // 2
"""CUDA's context and cuBLAS's workspaces; NCCL's buffers. Assumed: there was no GPU to measure."""
FRAGMENTATION = 0.05
"""Of what is allocated, lost between blocks of torch's allocator. Assumed."""
SHARD = 256 * 2**20
"""Bytes of features in a file; one to three are in a process's memory."""
BATCHES_AHEAD = 9
"""Of pictures, decoded at most: `model.extraction.MOST_THREADS` and one."""


class Launch(NamedTuple):
    """What a launch file says."""

    strategy: Strategy
    processes: int
    on_a_machine: int
    on_cpu: bool


class Machine(NamedTuple):
    """What a run is to fit into, in bytes, and what its hours are computed from."""

    device: Device
    host_memory: int
    """Of each machine."""
    disk: int
    """Free for the project's outputs, those that are there already among them."""
    utilisation: float
    basis: str
    """Of the utilisation."""
    bandwidth: float
    """Bytes a second of downloads."""
    links: bool = True
    """DVC's cache links outputs instead of copying them."""

    def hours(self, flops: int, dtype: Dtype, processes: int) -> float | None:
        """Return the hours of so many FLOPs over all processes; a CPU's processes share its rate."""
        rate, devices = self.device.rate(dtype), processes if self.device.gpu else 1
        return None if rate is None else flops / (rate * self.utilisation * devices) / 3600


class Stage(NamedTuple):
    """One stage's prediction."""

    name: str
    disk: Parts
    host: Moments
    """Of one machine."""
    gpu: Moments
    """Of one rank; none on the CPU."""
    hours: float | None
    facts: dict[str, Any]


class Run(NamedTuple):
    """What all stages share."""

    params: Params
    size: DatasetSize
    machine: Machine
    model: Model
    vision: VisionShape


def stage_costs(params: Params, size: DatasetSize, machine: Machine, launches: Path) -> list[Stage]:
    """Return the prediction of every stage.

    Raises:
        UserError: a launch file or a shape is not known, or the launch cannot do what `params` ask for.
    """
    run = Run(params, size, machine, model_of(params), vision_of(params.vision))
    training, extraction = (launch_of(section.launch, launches) for section in (params.train, params.vision))
    check_params(params.train, training.strategy)
    if not (extraction.on_cpu or machine.device.gpu):
        asked = f"vision.launch {params.vision.launch} runs on GPUs, but --device is cpu."
        raise UserError(f"{asked} Set vision.launch: cpu.")
    return [_fetch(run), _extract(run, extraction), _train(run, training), _export(run), _evaluate(run)]


def launch_of(name: str, folder: Path) -> Launch:
    """Read `launch/NAME.yaml`."""
    asked = read_launch(name, folder)
    processes, strategy = asked["num_processes"], strategy_of(asked, folder / f"{name}.yaml")
    return Launch(strategy, processes, processes // asked["num_machines"], asked["use_cpu"])


def _fetch(run: Run) -> Stage:
    data, size = run.params.data, run.size
    download = size.download if data.source in (Source.OFFICIAL, Source.HUB) else 0
    disk = {"images": size.images * size.image_bytes}
    if data.official is not None:
        disk["archives" if data.official.keep_archives else "archives, until the records are made"] = download
    facts = {name: split._asdict() for name, split in size.splits.items()}
    facts |= {"basis": size.basis, "download": download}
    return Stage("fetch-vqav2", disk, {"all": _base(1)}, {}, download / run.machine.bandwidth / 3600, facts)


def _extract(run: Run, launch: Launch) -> Stage:
    vision, shape, images = run.params.vision, run.vision, run.size.images
    tokens, pixels = images * vision.num_patches, (vision.num_patches - 1) * shape.patch_size**2
    # Of the widest moment of a layer: its input, the hidden layer of its MLP before and after GELU, its output.
    wide = vision.batch_size * vision.num_patches * vision.visual_embed_dim * (2 + 2 * shape.mlp_ratio)
    encoder = {"encoder": _encoder(run), "activations": wide * (_encoder(run) // shape.parameters)}
    ahead = BATCHES_AHEAD * vision.batch_size * 3 * pixels * 4
    own = {"float32 weights": 4 * shape.parameters, "pictures ahead": ahead, "shards": 3 * SHARD}
    host = _base(launch.on_a_machine) | copies(launch.on_a_machine, own | (encoder if launch.on_cpu else {}))
    gpu = {} if launch.on_cpu else _on_gpu({"forward": encoder}, launch.processes)
    flops = vision_flops(shape, vision.num_patches)
    facts = {"images": images, "flop_an_image": flops, "flop": flops * images, "processes": launch.processes}
    hours = run.machine.hours(flops * images, vision.compute_dtype, launch.processes)
    if launch.on_cpu and run.machine.device.gpu:
        hours, facts["note"] = None, "vision.launch runs on the host's CPU, whose rate is not known"
    stored = {StoreDtype.INT8: 1, StoreDtype.FLOAT32: 4}.get(vision.store_dtype, 2)
    disk = {"features": tokens * vision.visual_embed_dim * stored}
    if vision.store_dtype is StoreDtype.INT8:
        disk["scales"] = tokens * 4
    return Stage("extract-features", disk, {"forward": host}, gpu, hours, facts)


def _train(run: Run, launch: Launch) -> Stage:
    train, model = run.params.train, run.model
    step = Step(model, train, launch.strategy, launch.processes, not launch.on_cpu)
    batches = plan_batches(run.params, launch.processes, run.size)
    rank = step.moments(batches.sample)
    gpu = {} if launch.on_cpu else _on_gpu(rank, launch.processes)
    flops, again = _train_flops(run, batches)
    hours = run.machine.hours(flops + again, train.compute_dtype, launch.processes)
    work, largest = batches.work, max(one.work.tokens for one in batches.sample)
    facts = {"strategy": launch.strategy.value, "processes": launch.processes}
    facts |= {"parameters": model.all, "trained": model.trained, "steps": batches.steps}
    facts |= {"questions_a_step": batches.questions_a_step, "questions_a_row": round(batches.questions_a_row, 2)}
    facts |= {"tokens": work.tokens, "supervised": work.supervised, "largest_pass_tokens": largest}
    facts |= {"flop": flops, "flop_recomputed": again}
    facts |= {"step_seconds": None if hours is None else hours * 3600 / batches.steps}
    if launch.on_cpu and train.optimizer is Optimizer.ADAMW_BNB_8BIT:
        facts["note"] = "without the update of 8-bit states, 79 ms a million elements and thread on a CPU"
    # One checkpoint is written before the oldest goes; all ranks' weights and states.
    written = min(train.save_total_limit + 1, -(-batches.steps // train.save_steps))
    whole = step.share * total(step.snapshot() or step.states()) + 6 * model.all * launch.strategy.deepspeed
    disk = {"models/trained": 4 * model.saved, "checkpoints": written * whole}
    return Stage("train", disk, _train_host(run, step, launch, batches, rank), gpu, hours, facts)


def _train_host(run: Run, step: Step, launch: Launch, batches: Batches, rank: Moments) -> Moments:
    """Return the moments of one machine: of its ranks too where they train on its CPUs."""
    count, model, train = launch.on_a_machine, run.model, run.params.train
    base = _base(count) | {"encoder": count * _encoder(run)}
    # What every process builds before the launch divides it: float32, whole.
    start = {"float32 weights": 4 * model.saved}
    if run.params.language.model != "random":
        # The mean of all rows and their covariance start from a centred copy.
        start["grown embedding"] = 2 * 4 * model.embedding
    elif train.weights_dtype is Dtype.BFLOAT16:
        start["embedding in 16 bits"] = 2 * model.embedding
    snapshot = copies(count if launch.strategy.sharded_weights else 1, step.snapshot())
    found = {"start": base | copies(count, start)}
    if not launch.on_cpu:
        return found | {"checkpoint": base | snapshot, "whole weights": base | step.whole_weights()}
    # A checkpoint is written while the next steps are computed; the last one of all has none after it.
    meanwhile = snapshot if batches.steps > train.save_steps else {}
    end = base | copies(count, rank.pop("whole weights")) | step.whole_weights()
    found |= {name: base | copies(count, parts) | meanwhile for name, parts in rank.items()}
    last = base | copies(count, step.weights() | step.states()) | snapshot
    return found | {"last checkpoint": last, "whole weights": end}


def _train_flops(run: Run, batches: Batches) -> tuple[int, int]:
    """Return the FLOPs of loss and gradients, and of the forward pass that activation checkpointing computes once more."""
    model, work = run.model, batches.work
    whole = cost(model.language, model.vocabulary, model.features, frozen_embeddings=model.freeze_embeddings)
    token = whole.token if model.lora is None else lora_token_cost(model.language, model.lora)
    again = (whole.token * work.tokens // 3 + whole.pair * work.pairs // 3) * run.params.train.gradient_checkpointing
    return replace(whole, token=token).flops(work), again


def _export(run: Run) -> Stage:
    whole = 4 * (run.model.saved + run.vision.parameters)
    join = _base(1) | {"model": whole, "encoder": 4 * run.vision.parameters}
    host = {"join": join, "check": join | {"the exported model": whole}}
    return Stage("export", {"models/export": whole}, host, {}, None, {})


def _evaluate(run: Run) -> Stage:
    params, model, evaluation = run.params, run.model, run.params.evaluation
    known, gpu = run.size.splits["val"].questions, run.machine.device.gpu
    questions = min(evaluation.vqa_questions or known, known)
    # Questions are answered in batches of images, as training reads them in passes of one step each.
    shared = evaluation.batch_size if params.prompt.mask is Mask.IMAGE_PREFIX else 1
    reading = {"batch_size": evaluation.batch_size, "gradient_accumulation_steps": 1, "questions_per_row": shared}
    train = replace(params.train, num_train_epochs=1, **reading)
    read = plan_batches(replace(params, train=train), 1, run.size)
    largest = max(read.sample, key=lambda one: one.rows * one.width)
    # Read with the right images and with shuffled ones; HELM's instances come from pixels, a row each.
    share = 2 * questions / run.size.splits["train"].questions
    forward = cost(model.language, model.vocabulary, model.features)
    work = Work(*(round(share * getattr(read.work, name)) for name in Work.__dataclass_fields__))
    answered = (forward.token * work.tokens + forward.pair * work.pairs + forward.supervised * work.supervised) // 3
    instance = vision_flops(run.vision, params.vision.num_patches) + forward.token // 3 * largest.width
    flops = answered + evaluation.helm_instances * instance
    facts = {"questions": questions, "helm_instances": evaluation.helm_instances, "flop": flops}
    facts["note"] = "a lower bound: single tokens are bound by memory, and HELM's own metrics take a minute"
    model_held = {"float32 model": 4 * (model.saved + run.vision.parameters)}
    held = model_held | _answering(run, largest)
    host = {"answering": _base(1) | (model_held if gpu else held)}
    on_gpu = _on_gpu({"answering": held}, 1) if gpu else {}
    disk = {"HELM's pictures and reports": evaluation.helm_instances * run.size.image_bytes}
    return Stage("helm-eval", disk, host, on_gpu, run.machine.hours(flops, Dtype.FLOAT32, 1), facts)


def _answering(run: Run, largest: Batch) -> Parts:
    """Return what answering a batch holds beside the model: all in float32, on a padded grid, most in three copies."""
    shape, grid = run.model.language, largest.rows * largest.width
    keys = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    return {
        "keys and values": 4 * grid * keys,
        "a layer's MLP": 3 * 4 * grid * shape.intermediate_size,
        "attention scores": 3 * 4 * grid * largest.width * shape.num_attention_heads,
        "logits": 3 * 4 * run.params.evaluation.batch_size * run.model.vocabulary,
    }


def _encoder(run: Run) -> int:
    """Return the bytes of the vision tower as extraction computes it; training compares it with the stored features."""
    return run.vision.parameters * (4 if run.params.vision.compute_dtype is Dtype.FLOAT32 else 2)


def _base(processes: int) -> Parts:
    return {"Python and libraries": processes * HOST_BASE}


def _on_gpu(moments: Moments, processes: int) -> Moments:
    """Add what a GPU needs beside tensors."""
    base = {"CUDA and NCCL": GPU_BASE + NCCL_BASE} if processes > 1 else {"CUDA": GPU_BASE}
    lost = {name: {"fragmentation": round(FRAGMENTATION * total(parts))} for name, parts in moments.items()}
    return {name: parts | base | lost[name] for name, parts in moments.items()}
