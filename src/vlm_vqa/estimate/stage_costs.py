"""What each of the five stages needs: bytes of disk and memory, FLOPs, hours."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vlm_vqa.errors import UserError
from vlm_vqa.estimate.devices import GIB, Device
from vlm_vqa.estimate.memory import Moments, Parts, Step, copies, total
from vlm_vqa.estimate.questions import DatasetSize, plan_batches, validation_work
from vlm_vqa.estimate.shapes import Model, Tower, model_of, tower_parameters, vision_of
from vlm_vqa.launch_file import LaunchFile, Strategy, check_params, read_launch
from vlm_vqa.model.flops import Work, class_tokens, cost, vision_flops, vision_linear_maps
from vlm_vqa.params import CHECKPOINT, Dtype, Keep, Mask, Optimizer, Params, StoreDtype, ValidateOn

BASE = {"Python and libraries": round(1.1 * GIB)}
"""Resident in a training process without any weights, with scratch; measured (torch 2.14.1, a CPU)."""


class Machine(NamedTuple):
    """What a run is to fit into, in bytes (a second); on the disk outputs count once if DVC's cache `links` them."""

    device: Device
    host_memory: int
    disk: int
    utilisation: float
    basis: str
    bandwidth: float
    links: bool = True

    def hours(self, flops: int, dtype: Dtype, processes: int) -> float | None:
        """Return the hours of so many FLOPs over all processes, of which a CPU's share its rate."""
        peak, devices = self.device.peak, processes if self.device.gpu else 1
        teraflops = peak.bfloat16 if dtype is Dtype.BFLOAT16 else peak.float32
        return None if teraflops is None else flops / (teraflops * 1e12 * self.utilisation * devices) / 3600


class Stage(NamedTuple):
    """One stage's prediction: host memory of one machine, GPU memory of one rank."""

    name: str
    disk: Parts
    host: Moments
    gpu: Moments
    hours: float | None
    facts: dict[str, Any]


def stage_costs(params: Params, size: DatasetSize, machine: Machine, launches: Path) -> list[Stage]:
    """Return the prediction of every stage; UserError if a launch or a shape is not known, or cannot do what is asked."""
    training, extraction = (read_launch(section.launch, launches) for section in (params.train, params.vision))
    asked = params.evaluation.launch or ("gpu" if machine.device.gpu else "cpu")
    answering = read_launch(asked, launches)
    check_params(params.train, training.strategy)
    for key, launch in (("vision", extraction), ("evaluation", answering)):
        if not (launch.on_cpu or machine.device.gpu):
            name = f"{key}.launch {launch.path.stem}"
            raise UserError(f"{name} runs on GPUs, --device is cpu. Set {key}.launch: cpu.")
    model, vision = model_of(params), vision_of(params)
    return [
        _fetch(params, size, machine),
        _extract(params, size, machine, vision, extraction),
        _train(params, size, machine, model, vision, training),
        _export(params, model, vision),
        _evaluate(params, size, machine, model, vision, answering),
    ]


def _fetch(params: Params, size: DatasetSize, machine: Machine) -> Stage:
    disk = {"images": size.images * size.image_bytes, "archives": size.download * (params.data.official is not None)}
    facts = {"training questions": size.train, "validation questions": size.val, "images": size.images}
    facts["basis"] = f"{size.basis}; tokens estimated"
    return Stage("fetch-vqav2", disk, {"all": BASE}, {}, size.download / machine.bandwidth / 3600, facts)


def _extract(params: Params, size: DatasetSize, machine: Machine, shape: Tower, launch: LaunchFile) -> Stage:
    vision, images = params.vision, size.images
    tokens, pixels = images * vision.num_patches, (vision.num_patches - class_tokens(shape)) * shape.patch_size**2
    encoder, weights = _looking(params, shape), {"float32 weights": 4 * tower_parameters(shape)}
    if not vision.store:
        facts = {"note": "nothing is stored: train and helm-eval look at the pictures themselves"}
        return Stage("extract-features", {}, {"load": copies(launch.on_a_machine, BASE | weights)}, {}, 0.0, facts)
    # Batches of pictures are `extract.MOST_AT_ONCE` and one; files of features are of 256 MiB, up to three in memory.
    ahead = {"pictures ahead": 9 * vision.batch_size * 3 * pixels * 4, "shards": 3 * GIB // 4}
    host = BASE | weights | ahead | (encoder if launch.on_cpu else {})
    gpu = {} if launch.on_cpu else _on_gpu({"forward": encoder}, launch.processes)
    flops = images * vision_flops(shape, vision.num_patches)
    facts: dict[str, Any] = {"flop": flops, "processes": launch.processes}
    hours = machine.hours(flops, vision.compute_dtype, launch.processes)
    if launch.on_cpu and machine.device.gpu:
        hours, facts["note"] = None, "vision.launch runs on the host's CPU, whose rate is not known"
    stored = {StoreDtype.INT8: 1, StoreDtype.FLOAT32: 4}.get(vision.store_dtype, 2)
    disk = {"features": tokens * vision.visual_embed_dim * stored, "scales": 4 * tokens * (stored == 1)}
    return Stage("extract-features", disk, {"forward": copies(launch.on_a_machine, host)}, gpu, hours, facts)


def _looking(params: Params, shape: Tower) -> Parts:
    """Return what a tower takes that looks at `vision.batch_size` pictures."""
    vision, each = params.vision, 4 if params.vision.compute_dtype is Dtype.FLOAT32 else 2
    # Of the widest moment of a layer: its input, the hidden layer of its MLP before and after GELU, its output.
    wide = vision.batch_size * vision.num_patches * 2 * sum(vision_linear_maps(shape)[-1])
    return {"encoder": tower_parameters(shape) * each, "activations": wide * each}


def _flops_of_looking(params: Params, shape: Tower, work: Work) -> int:
    """Return what a live tower computes for `work`; nothing where features are stored."""
    tokens = params.vision.num_patches
    return 0 if params.vision.store else work.image_tokens // tokens * vision_flops(shape, tokens)


def _train(
    params: Params, size: DatasetSize, machine: Machine, model: Model, vision: Tower, launch: LaunchFile
) -> Stage:
    train, validation = params.train, params.validation
    # The dev part is not trained on.
    held = validation.questions if validation.from_ is ValidateOn.TRAIN else 0
    batches = plan_batches(params, launch.processes, size._replace(train=max(size.train - held, 1)))
    step = Step(model, train, launch.strategy, launch.processes, not launch.on_cpu)
    work, rank = batches.work, step.moments(batches.sample)
    tower = _looking(params, vision)
    if not params.vision.store:
        rank = {name: parts | {"encoder": tower["encoder"]} for name, parts in rank.items()}
        rank["looking at pictures"] = step.weights() | step.states() | tower
    # Stored features are compared with what the tower's weights say.
    host = _train_host(params, step, launch, tower["encoder"], batches.steps, rank)
    gpu = {} if launch.on_cpu else _on_gpu(rank, launch.processes)
    # Activation checkpointing computes the layers' forward pass once more, or the attention of it.
    layers = cost(model.language, 0, 0)
    layers = layers if train.gradient_checkpointing else replace(layers, token=0, supervised=0)
    again = layers.flops(work) // 3 * (train.gradient_checkpointing or train.attention_checkpointing)
    sizes = model.language, model.vocabulary, model.features
    flops = cost(*sizes, frozen_embeddings=model.freeze_embeddings, lora=model.lora).flops(work)
    seen = _flops_of_looking(params, vision, work)

    def hours_of(computed: int, looking: int) -> float | None:
        step_hours = machine.hours(computed, train.compute_dtype, launch.processes)
        tower_hours = machine.hours(looking, params.vision.compute_dtype, launch.processes)
        return None if step_hours is None or tower_hours is None else step_hours + tower_hours

    hours = hours_of(flops + again, seen)
    facts: dict[str, Any] = {"strategy": launch.strategy.value, "processes": launch.processes, "steps": batches.steps}
    facts |= {"questions_a_step": batches.questions_a_step, "questions_a_row": round(batches.questions_a_row, 2)}
    facts |= {"parameters": model.all, "trained": model.trained, "tokens": work.tokens}
    if train.projector_steps:
        facts["steps_of_the_projector_alone"] = min(train.projector_steps, batches.steps)
    facts |= {"flop": flops, "flop_recomputed": again} | ({"flop_of_the_tower": seen} if seen else {})
    facts |= {} if hours is None else {"step_seconds": hours * 3600 / batches.steps}
    validations = -(-batches.steps // validation.every_steps) + 1 if validation.questions else 0
    if validations:
        forward = replace(cost(model.language, model.vocabulary, model.features), image_token=0)
        measured = validation_work(params, size)
        measuring = validations * (forward.flops(measured) // 3)
        facts |= {"validations": validations, "flop_of_validation": measuring}
        looking = validations * _flops_of_looking(params, vision, measured)
        hours = hours_of(flops + again + measuring, seen + looking)
    if launch.on_cpu and train.optimizer is Optimizer.ADAMW_BNB_8BIT:
        facts["note"] = "without the update of 8-bit states, 79 ms a million elements and thread on a CPU"
    # One checkpoint is written before the oldest goes, and the best one stays beside; all ranks' weights and states.
    best = validation.keep is Keep.BEST
    written = min(train.save_total_limit + 1 + best, -(-batches.steps // train.save_steps) + best * validations)
    held = step.share * total(step.snapshot() or step.states()) + 6 * model.all * launch.strategy.deepspeed
    disk = {"models/trained": 4 * (model.saved + model.adapter), "checkpoints": written * held}
    return Stage("train", disk, host, gpu, hours, facts)


def _train_host(params: Params, step: Step, launch: LaunchFile, encoder: int, steps: int, rank: Moments) -> Moments:
    """Return the moments of one machine: of its ranks too where they train on its CPUs."""
    count, model = launch.on_a_machine, step.model
    base = copies(count, BASE | {"encoder": encoder})
    # Process 0 builds it, but for DeepSpeed's, and sends it on: FSDP2's processes come to hold rows alone, a CPU's copies of
    # DDP's each the whole. The mean of an embedding's rows and their covariance are of a centred copy.
    built = count if launch.strategy.deepspeed else 1
    held = count if launch.on_cpu and launch.strategy is not Strategy.FSDP2 else built
    start = copies(held, {"float32 weights": 4 * model.saved})
    if params.language.model not in ("random", CHECKPOINT):
        start |= copies(built, {"grown embedding": 4 * model.embedding})
    elif step.weight == 2:
        start |= copies(built, {"embedding in 16 bits": 2 * model.embedding})
    found = {"start": base | start}
    snapshot = copies(count if launch.strategy.sharded_weights else 1, step.snapshot())
    if not launch.on_cpu:
        return found | {"checkpoint": base | snapshot, "whole weights": base | step.whole_weights()}
    # A checkpoint is copied and written while the next steps are computed; the last one has none after it.
    validation = params.validation
    often = validation.questions and validation.keep is Keep.BEST
    saves = min(params.train.save_steps, validation.every_steps) if often else params.train.save_steps
    meanwhile = snapshot if steps > saves else {}
    # All but DeepSpeed's are let go as they are gathered.
    kept = rank.pop("whole weights")
    end = base | copies(count, kept if launch.strategy.deepspeed else {}) | step.whole_weights()
    found |= {name: base | copies(count, parts) | meanwhile for name, parts in rank.items()}
    resumed = base | copies(count, step.weights() | step.states())
    return found | {"going on from a checkpoint": resumed, "whole weights": end}


def _export(params: Params, model: Model, vision: Tower) -> Stage:
    weights, tower = model.saved + tower_parameters(vision), {"encoder": 4 * tower_parameters(vision)}
    stored = (2 if params.export.dtype is Dtype.BFLOAT16 else 4) * weights
    # Of a stored float32 tensor the file's own pages are written on; one of 16 bits is made of it.
    read = {"a weight read back": model.embedding * (4 if stored == 4 * weights else 6)}
    host = {"write": BASE | tower | {"weights": stored}, "check": BASE | tower | {"the exported model": stored} | read}
    return Stage("export", {"models/export": stored + 4 * model.adapter}, host, {}, None, {})


def _evaluate(
    params: Params, size: DatasetSize, machine: Machine, model: Model, vision: Tower, launch: LaunchFile
) -> Stage:
    shape, evaluation = model.language, params.evaluation
    questions = min(evaluation.vqa_questions or size.val, size.val)
    # Questions are answered in batches of images, as training reads them in passes of one step each.
    shared = 1 if params.prompt.mask is Mask.PREFIX_LM else evaluation.batch_size
    reading = {"batch_size": evaluation.batch_size, "gradient_accumulation_steps": 1, "questions_per_row": shared}
    read = plan_batches(replace(params, train=replace(params.train, num_train_epochs=1, **reading)), 1, size)
    # Read with the right images and with shuffled ones; HELM's instances come from pixels, a row each.
    forward = cost(shape, model.vocabulary, model.features, everywhere=True)
    work = Work(*(round(2 * questions / size.train * getattr(read.work, name)) for name in Work.__dataclass_fields__))
    largest = max(read.sample, key=lambda one: one.rows * one.width)
    instance = vision_flops(vision, params.vision.num_patches) + forward.token // 3 * largest.width
    flops = replace(forward, image_token=0).flops(work) // 3 + evaluation.helm_instances * instance
    flops += _flops_of_looking(params, vision, work)
    note = "a lower bound: single tokens are bound by memory, and HELM's own metrics take a minute"
    # All in one type, on a padded grid, most in three copies.
    dtype = evaluation.compute_dtype
    each = 2 if dtype is Dtype.BFLOAT16 else 4
    weights = {f"{dtype.value} model": each * (model.saved + tower_parameters(vision))}
    grid = largest.rows * largest.width
    held = weights | {
        "keys and values": each * grid * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim,
        "a layer's MLP": 3 * each * grid * shape.intermediate_size,
        "attention scores": 3 * each * grid * largest.width * shape.num_attention_heads,
        "logits": 3 * 4 * evaluation.batch_size * model.vocabulary,
    }
    # HELM's program has the main process's model meanwhile.
    count = launch.processes
    host, gpu = (held, {}) if launch.on_cpu else (weights, _on_gpu({"answering": held}, count))
    disk = {"HELM's pictures and reports": evaluation.helm_instances * size.image_bytes}
    hours = machine.hours(flops, dtype, count)
    if launch.on_cpu and machine.device.gpu:
        hours, note = None, "evaluation.launch runs on the host's CPU, whose rate is not known"
    facts = {"questions": questions, "flop": flops, "processes": count, "note": note}
    return Stage("helm-eval", disk, {"answering": copies(count, BASE | host)}, gpu, hours, facts)


def _on_gpu(moments: Moments, processes: int) -> Moments:
    """Add what a GPU needs beside tensors: workspaces, buffers, and what its allocator loses. Assumed: none was measured."""
    base = {"CUDA and NCCL": GIB} if processes > 1 else {"CUDA": GIB // 2}
    return {name: parts | base | {"fragmentation": round(0.05 * total(parts))} for name, parts in moments.items()}
