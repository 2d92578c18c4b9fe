"""The HF Trainer, set up from `params.yaml`: our batches, optimizers and checkpoints, under every launch."""

import csv
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import ProgressCallback as ProgressBar
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import TRAINER_STATE_NAME

from vlm_vqa.cores import Crowd, waits
from vlm_vqa.errors import UserError
from vlm_vqa.model.flops import model_cost
from vlm_vqa.model.vlm import (
    VlmForTraining,
    compile_layers,
    hash_weights,
    recompute_layers,
    recompute_scores,
    uncompiled,
)
from vlm_vqa.params import Attention, Dtype, Keep, Optimizer, TrainParams
from vlm_vqa.training import checkpoint_files, checkpoint_state
from vlm_vqa.training.answers_picture import AnswersPicture
from vlm_vqa.training.dataset import Collator, QuestionDataset
from vlm_vqa.training.launch import Launch, Strategy, check_prepared
from vlm_vqa.training.optimizer import InBackward, build_optimizer, describe_group, has_8bit_work, local, state_types
from vlm_vqa.training.rows import Rows, let_go, named_parameters, rows_held, send_rows, take_weights, trim, whole_rows
from vlm_vqa.training.sampler import GlobalBatchSampler, GlobalBatchShape
from vlm_vqa.training.throughput import COUNTS, CountingCollator, Meter
from vlm_vqa.training.validation import ANSWERS, COLUMNS, SCORE, Validation, best_step, is_over, validations
from vlm_vqa.training.watchdog import Phase, Watchdog

log = logging.getLogger(__name__)

CURVE_COLUMNS = ("epoch", "loss", "grad_norm", "learning_rate")
RECOMPUTE = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""What transformers calls it: the second is deprecated where there is the first, and all that 5.17 knows."""
SMALL_WEIGHTS = 100_000
"""Elements up to which ZeRO-3 on GPUs keeps a parameter whole: fetching it would cost more than it saves."""


def training_arguments(train: TrainParams, seed: int, output_dir: Path, launch: Launch) -> TrainingArguments:
    """Translate `params.train`; UserError if it asks for flex attention on a CPU, where torch has no backward pass of it."""
    use_cpu = launch.device == "cpu"
    if use_cpu and train.attention is Attention.FLEX:
        raise UserError("train.attention is flex_attention, which torch cannot train with on a CPU; set it to eager.")
    # Under FSDP2 the Trainer's own would gather the weights once more; see `create_optimizer`.
    recompute: Any = {RECOMPUTE: train.gradient_checkpointing and launch.strategy is not Strategy.FSDP2}
    return TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=use_cpu,
        accelerator_config={
            # `launch.start` has made the process group; left alone, the Trainer would make another one, of another type.
            "use_configured_state": True,
            # Left alone, FSDP2 would keep whole gradients on every process until a step's last micro-batch.
            "gradient_accumulation_kwargs": {"sync_each_batch": launch.strategy is Strategy.FSDP2},
        },
        seed=seed,
        data_seed=seed,
        bf16=train.compute_dtype is Dtype.BFLOAT16 and train.weights_dtype is Dtype.FLOAT32,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        num_train_epochs=train.num_train_epochs,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        optim=train.optimizer.value,
        lr_scheduler_type=train.lr_scheduler_type.value,
        # warmup_ratio is gone; a number below 1 here is the ratio.
        warmup_steps=train.warmup_ratio,
        max_grad_norm=train.max_grad_norm,
        **recompute,
        # Every weight has a gradient in every pass, also of a row that teaches nothing.
        ddp_find_unused_parameters=False,
        logging_steps=train.logging_steps,
        logging_first_step=True,
        save_steps=train.save_steps,
        save_total_limit=train.save_total_limit,
        # The batches are ready-made tensors, and MLflow is spoken to by our own callback.
        remove_unused_columns=False,
        report_to="none",
        # The default writes the average of earlier losses where a loss is not a number.
        logging_nan_inf_filter=False,
        disable_tqdm=not launch.main,
    )


class VqaTrainer(Trainer):
    """The Trainer with our batches: rows that share an image, in an order of seed and epoch."""

    # Of the Trainer's own attributes, what ours hold.
    model: VlmForTraining
    model_wrapped: Any
    train_dataset: QuestionDataset
    data_collator: Collator
    lr_scheduler: Any

    def __init__(
        self,
        model: VlmForTraining,
        args: TrainingArguments,
        train: TrainParams,
        data: QuestionDataset,
        collator: Collator,
        callbacks: Sequence[TrainerCallback],
        launch: Launch,
        watchdog: Watchdog | None = None,
        validation: Validation | None = None,
    ):
        """`watchdog` watches over the processes of a launch; one process needs none."""
        self.train_settings, self.validation, self.launch = train, validation, launch
        self.keep = Keep.LAST if validation is None else validation.settings.keep
        self.watchdog = watchdog or Watchdog(None, 0, 1, train.stall_seconds)
        computed = torch.bfloat16 if train.compute_dtype is Dtype.BFLOAT16 else torch.float32
        self.meter = Meter(args.device, computed)
        frozen, live = not model.lm_head.weight.requires_grad, collator.features.live
        live_tokens = collator.features.num_tokens if live else 0
        self.cost = model_cost(model.config, frozen_embeddings=frozen, live_tokens=live_tokens)
        self.facts: dict[str, Any] = dict(launch.facts)
        assert args.output_dir is not None and args.save_total_limit is not None, "as training_arguments has them"
        self.folder = Path(args.output_dir)
        self.writer = checkpoint_files.Writer(self.folder, launch.process, launch.processes, args.save_total_limit)
        self.opened: checkpoint_state.Checkpoint | None = None
        self.pass_losses: list[Tensor] = []
        self.in_backward: InBackward | None = None
        if train.weights_dtype is Dtype.BFLOAT16:
            model.to(torch.bfloat16)
            # Else 0.4 GiB would stay of 8 of Gemma 2 2B's layers.
            trim()
        if train.attention_checkpointing:
            recompute_scores(model)
        if train.compile:
            compile_layers(model)
        frozen = {name: one for name, one in named_parameters(model).items() if not one.requires_grad}
        self.frozen = hash_weights(frozen) if launch.main else ""
        if launch.strategy.deepspeed:
            checkpoint_state.leave_out_frozen(model)
        # FSDP2 divides shapes; each process then gets its rows.
        self.sent = take_weights(model) if launch.strategy is Strategy.FSDP2 else {}
        args.eval_on_start = validation is not None
        super().__init__(model=model, args=args, train_dataset=data, data_collator=collator, callbacks=list(callbacks))
        for callback in callbacks:
            callback.trainer = self  # ty: ignore[missing-attribute] - for those of ours
        assert self.model_accepts_loss_kwargs, "the loss must be divided by the step's tokens, not by its batches"
        weights = getattr(torch, train.weights_dtype.value)
        assert all(weight.dtype == weights for weight in model.parameters()), f"the weights must be {weights}"
        self._set_precision()

    def _set_precision(self) -> None:
        """Fill in what accelerate's FSDP2 and DeepSpeed would decide by themselves."""
        train = self.train_settings
        state: Any = self.accelerator.state
        if self.launch.strategy is Strategy.FSDP2:
            # The launch file's is Gemma 2's; PaliGemma's first version has a Gemma.
            layer = next(iter(self.model.model.language_model.layers))
            state.fsdp_plugin.transformer_cls_names_to_wrap = [type(layer).__name__]
            if self.args.bf16:
                # Gradients are added up in float32, as under DDP.
                state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
                )
        if self.launch.strategy.deepspeed:
            config = state.deepspeed_plugin.deepspeed_config
            # What stands in no file is left out by DeepSpeed without a word, clipping among it.
            config["gradient_clipping"] = train.max_grad_norm
            config["gradient_accumulation_steps"] = train.gradient_accumulation_steps
            config["train_micro_batch_size_per_gpu"] = train.batch_size
            config["train_batch_size"] = train.batch_size * train.gradient_accumulation_steps * self.launch.processes
            config["bf16"] = {"enabled": self.args.bf16}
            config["communication_data_type"] = "fp32"
            persistent = 0 if self.launch.device == "cpu" else SMALL_WEIGHTS
            config["zero_optimization"]["stage3_param_persistence_threshold"] = persistent
        precision = "bf16" if self.args.bf16 else "no"
        assert self.accelerator.mixed_precision == precision, "accelerate computes in another type than was asked for"

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of `params.train`; the Trainer's own knows neither clipping nor rounding."""
        if self.optimizer is None:
            model = model or self.model
            if self.launch.strategy is Strategy.FSDP2:
                # accelerate's own finds no layers that are divided, and would draw dropout anew.
                if self.train_settings.gradient_checkpointing:
                    recompute_layers(self.model)
                # accelerate would divide it after this, when all is there; what is divided already it leaves as it is.
                fsdp2_prepare_model(self.accelerator, self.model)
                assert all(isinstance(one, DTensor) for one in self.model.parameters()), "each process is to hold rows"
                send_rows(self.model, self.sent, self.args.device)
            decayed = set(self.get_decay_parameter_names(model))
            self.optimizer = build_optimizer(self.train_settings, model, decayed, self.args.seed)
            self.trained = [[*group["params"]] for group in self.optimizer.param_groups]
            if self.train_settings.projector_steps and self.launch.strategy.deepspeed:
                # Its steps happen within its backward pass, on pieces of its own.
                for group in self.optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.register_hook(partial(self._zero_if_waiting, group["from_step"]))
                # A gradient of zeros would count a step of AdamW's all the same.
                self.optimizer.register_step_pre_hook(lambda *_: self._drop_gradients())
        return self.optimizer

    def _zero_if_waiting(self, first: int, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.state.global_step + 1 < first else None

    def _drop_gradients(self) -> None:
        """Drop the gradients of what waits until the projector has been trained: no norm knows them, no state begins."""
        for group in self.inner_optimizer.param_groups:
            for parameter in group["params"] if self.state.global_step + 1 < group["from_step"] else ():
                parameter.grad = None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Let what waits for the projector follow the same schedule, warm-up included, over the steps that are left."""
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        if wait := self.train_settings.projector_steps:
            left, stand_in = max(0, num_training_steps - wait), torch.optim.SGD([torch.zeros(1)])
            kind, warmup = self.args.lr_scheduler_type, self.args.get_warmup_steps(left)
            (at_once, *_), (late,) = scheduler.lr_lambdas, get_scheduler(kind, stand_in, warmup, left).lr_lambdas
            rates = {1: at_once, 1 + wait: lambda step: 0.0 if step < wait else late(step - wait)}
            firsts = [group["from_step"] for group in self.inner_optimizer.param_groups]
            self.lr_scheduler = LambdaLR(scheduler.optimizer, [rates[first] for first in firsts])
        return self.lr_scheduler

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that updates weights, without accelerate's and DeepSpeed's frames."""
        optimizer: Any = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def _prepare_for_training(self, *args: Any, **options: Any) -> tuple[nn.Module, DataLoader]:
        model, loader = super()._prepare_for_training(*args, **options)
        if self.launch.strategy is Strategy.FSDP2:
            # accelerate finds them by their address, which is 0 for all of which a process has no rows.
            for group, parameters in zip(self.inner_optimizer.param_groups, self.trained, strict=True):
                group["params"] = parameters
        self.facts |= check_prepared(self.launch, model, self.inner_optimizer)
        if self.train_settings.optimizer_in_backward:
            self.in_backward = InBackward(self.inner_optimizer, lambda: self.state.global_step + 1)
            self.facts["updates"] = "in the backward pass"
        if self.launch.processes > 1 and self.opened is None:
            # All have built the same model from the same seed; dropout must not be the same everywhere.
            torch.manual_seed(self.args.seed + self.launch.process)
        return model, loader

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's micro-batches, in the order of steps.

        The sampler divides global batches among processes itself, so accelerate must not: it would wrap the sampler once
        more, and after a resume, which wraps it too, nobody would tell it which epoch it is.
        """
        args, data, workers = self.args, self.train_dataset, self.train_settings.dataloader_workers
        shape = GlobalBatchShape(
            questions=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            questions_per_row=self.train_settings.questions_per_row,
            micro_batches=args.gradient_accumulation_steps,
            processes=args.world_size,
            process=args.process_index,
        )
        prefix = self.data_collator.layout.num_patches + len(self.data_collator.layout.prefix)
        sampler = GlobalBatchSampler(data.image_ids, data.text_lengths, prefix, shape, args.data_seed)  # ty: ignore[invalid-argument-type] - data_seed is set
        loader = DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=CountingCollator(self.data_collator, self.data_collator.layout, self.cost),
            num_workers=workers,
            # The Trainer takes a whole step's micro-batches at once: those of the next step are to be ready by then.
            prefetch_factor=-(-2 * shape.micro_batches // workers) if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        place = self.accelerator.device
        return prepare_data_loader(loader, place, 1, 0, put_on_device=True, non_blocking=True)

    # --- one step ----------------------------------------------------------------------------------------------------

    def heartbeat(self, phase: Phase) -> None:
        self.watchdog.heartbeat(phase, self.state.global_step + 1)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Take a step's batches from the loader, and measure how long that takes."""
        self.heartbeat(Phase.LOADING)
        self.meter.begin_step()
        return super().get_batch_samples(self.meter.timed(epoch_iterator), num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        self.heartbeat(Phase.COUNTING)
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self.heartbeat(Phase.COMPUTING)
        self.meter.batch(inputs.pop(COUNTS))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.launch.strategy.deepspeed:
            self._drop_gradients()
        self.pass_losses.append(loss)
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # On the device, outside autocast: a live tower computes in vision.compute_dtype.
        return self.data_collator.ready(super()._prepare_inputs(inputs))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Return the gradient's norm over all processes, after making sure that it is a number.

        It is the one moment of a step at which the host waits for the device, and it comes before weights are touched
        (under DeepSpeed and with train.optimizer_in_backward after, within the same step).
        """
        self.heartbeat(Phase.UPDATING)
        grad_norm = grad_norm if self.in_backward is None else self.in_backward.take_norm()
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss = torch.stack(self.pass_losses).sum()
        self.pass_losses.clear()
        values = torch.stack([loss.double(), torch.as_tensor(norm, device=loss.device).double()]).tolist()
        if not all(map(math.isfinite, values)):
            raise self._not_a_number(*values)
        return values[1]

    def note_states(self) -> None:
        """Note the types of the optimizer's states after a step; UserError if 8 bits were asked for, and there are none."""
        kinds, asked = state_types(self.inner_optimizer), self.train_settings.optimizer
        self.facts["optimizer_states"] = "+".join(kinds)
        if asked is Optimizer.ADAMW_BNB_8BIT and "uint8" not in kinds and has_8bit_work(self.inner_optimizer):
            raise UserError(
                f"train.optimizer is {asked.value}, but the states are {', '.join(kinds)}. Install "
                "the pinned bitsandbytes (`make setup`) or choose another train.optimizer."
            )

    def _not_a_number(self, loss: float, norm: float) -> UserError:
        """Return what stops all processes at a step that is not a number, naming those whose own loss it was."""
        losses = {self.launch.process: loss}
        # The norm is the same everywhere, so all are here; a loss that spoils no gradient stops its process alone.
        if self.launch.processes > 1 and not math.isfinite(norm):
            everyones: list[float] = [0.0] * self.launch.processes
            distributed.all_gather_object(everyones, loss)
            losses = dict(enumerate(everyones))
        bad = [f"rank {rank}: {value}" for rank, value in losses.items() if not math.isfinite(value)]
        step = self.state.global_step + 1
        what = f"loss is not a number ({', '.join(bad)})" if bad else "the loss is a number, the gradient is not"
        return UserError(
            f"step {step}: {what}; grad_norm is {norm}. Lower train.learning_rate or train.max_grad_norm; the checkpoints "
            f"before this step are in {self.args.output_dir}."
        )

    # --- validation --------------------------------------------------------------------------------------------------

    @property
    def kept_step(self) -> int:
        """The step whose weights are the result, as of now."""
        best = best_step(self.state.log_history) if self.keep is Keep.BEST else None
        return self.state.global_step if best is None else best

    @property
    def kept_because(self) -> str:
        """Why these weights are the result, for people."""
        if self.validation is None or self.keep is Keep.LAST:
            return "the last step"
        scores = {entry["step"]: entry[SCORE] for entry in validations(self.state.log_history)}
        return f"the best of {len(scores) - 1} validations, by {self.validation.describe()}"

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        step, validation = self.state.global_step, self.validation
        if validation is not None and self._validated != step:
            due = step % validation.settings.every_steps == 0 or step == self.state.max_steps
            self.control.should_evaluate = due
        super()._maybe_log_save_evaluate(*args, **options)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Measure the validation questions, log the figures, and decide what is saved and whether training ends."""
        step, validation, control = self.state.global_step, self.validation, self.control
        control.should_evaluate = False
        if validation is None or self._validated == step or (skip_scheduler and step):
            # What asks to skip the scheduler is a training's beginning, a resumed one's too.
            return {}
        # Its questions have shapes of their own, which compiling would cost more than it saves.
        with self.meter.paused(), uncompiled() if self.train_settings.compile else nullcontext():
            figures = validation.measure(self.model_wrapped, self.args.device, lambda: self.heartbeat(Phase.VALIDATING))
        self.state.log_history.append({"step": step, ANSWERS: figures.pop(ANSWERS)})
        self.log(figures)
        if is_over(self.state.log_history, validation.settings.patience):
            # Without a checkpoint here, none can be gone on from that is past the end.
            control.should_training_stop, control.should_save = True, False
            if self.launch.main:
                best = best_step(self.state.log_history)
                log.info("ending after step %d: no validation since step %s was better", step, best)
        elif self.keep is Keep.BEST and self.kept_step == step:
            control.should_save = step > 0
        return figures

    @property
    def _validated(self) -> int | None:
        """The last step that was validated, also before a resume."""
        return next((one["step"] for one in reversed(validations(self.state.log_history))), None)

    def _return_to_best(self) -> None:
        """Put the best step's weights back, from its checkpoint, where they are the result."""
        if (step := self.kept_step) == self.state.global_step:
            return
        if self.launch.processes > 1:
            distributed.barrier()
        best = checkpoint_files.folder_of(self.folder, step)
        self._verify(best)
        if self.launch.main:
            log.info("keeping the weights of step %d, the best by %s", step, SCORE)
        if self.launch.strategy.deepspeed:
            with checkpoint_files.nothing_but_tensors(best):
                deepspeed_load_checkpoint(self.model_wrapped, str(best))
        else:
            checkpoint_state.Checkpoint(best, self.launch.process, self.launch.processes).load_weights(self.model)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def run(self) -> Any:
        """Train, from the newest whole checkpoint if there is one, and wait for the last one to be written.

        UserError if a checkpoint is damaged, of another model, holds code, or does not fit this launch.
        """
        last = self._newest_checkpoint()
        if self.launch.main:
            log.info("going on from %s" if last else "from the start", *filter(None, [last]))
        with checkpoint_files.nothing_but_tensors(last):
            result = self.train(resume_from_checkpoint=str(last) if last else None)
        self.writer.wait()
        self._return_to_best()
        return result

    def _newest_checkpoint(self) -> Path | None:
        """Let process 0 choose a checkpoint, and verify this process's share of its files."""
        folder, launch = self.folder, self.launch
        if launch.main:
            self.lock = checkpoint_files.claim(folder)
        choice = [checkpoint_files.latest(folder) if launch.main else None]
        if launch.processes > 1:
            distributed.broadcast_object_list(choice)
        (last,) = choice
        if last is None:
            return None
        if not last.is_dir():
            where = "The machines of a launch must share the project's folder."
            raise UserError(f"{last}: process {launch.process} does not see it. {where}")
        world = self._verify(last)
        if (best := checkpoint_files.best_of(last)) not in (None, last):
            self._verify(best)
        kind = checkpoint_files.read_seal(last, 0, world)["kind"]
        if kind != self.kind or (self.launch.strategy.deepspeed and world != launch.processes):
            raise UserError(
                f"{last} was written by {world} processes as {kind}; {launch.processes} processes with "
                f"{launch.strategy.value} (train.launch {launch.name}) cannot go on from it. Use "
                f"the launch that it was written with, or delete the folder {folder} to start again."
            )
        return last

    def _verify(self, checkpoint: Path) -> int:
        """Verify this process's share of a checkpoint's files; return how many processes have written it."""
        world = checkpoint_files.world_of(checkpoint)
        assert world is not None, "it was whole when it was chosen"
        for writer in range(self.launch.process, world, self.launch.processes):
            checkpoint_files.verify(checkpoint, writer, world)
        return world

    @property
    def kind(self) -> str:
        """How this launch writes checkpoints: rows of parameters, or DeepSpeed's own files."""
        return self.launch.strategy.value if self.launch.strategy.deepspeed else "rows"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.heartbeat(Phase.SAVING)
        self.store_flos()
        step, launch = self.state.global_step, self.launch
        state = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
        texts = {TRAINER_STATE_NAME: state} if launch.main else {}
        facts: dict[str, Any] = {"kind": self.kind, "best": self.kept_step if self.keep is Keep.BEST else None}
        facts["frozen"] = self.frozen
        facts["logging"] = {"loss": self._tr_loss.item(), "since": self._globalstep_last_logged}
        with self.meter.paused():
            others = self._save_deepspeed(step) if launch.strategy.deepspeed else []
            tensors, more = checkpoint_state.save_random_state(self.lr_scheduler)
            if not launch.strategy.deepspeed:
                # What the last step has left is not changed any more.
                held, goes_on = (self.model, self.inner_optimizer), not self.control.should_training_stop
                rows, described = checkpoint_state.save_state(*held, rank=launch.process, copy=goes_on)
                tensors, more = rows | tensors, described | more
            self.writer.save(step, tensors, facts | more, texts, others)

    def _save_deepspeed(self, step: int) -> list[str]:
        """Let DeepSpeed write its own files; return those that process 0 is to seal."""
        self.writer.wait()
        checkpoint = checkpoint_files.folder_of(self.folder, step)
        self.model_wrapped.save_checkpoint(str(checkpoint), exclude_frozen_parameters=True)
        distributed.barrier()
        if not self.launch.main:
            return []
        # The other processes are writing their own parts beside them.
        files = (path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith("rank-"))
        return [path.relative_to(checkpoint).as_posix() for path in files]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: weights come back with the optimizer's states, when all are where they will be."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self.opened = checkpoint_state.Checkpoint(Path(checkpoint), self.launch.process, self.launch.processes)
        if self.launch.main and self.opened.facts[0]["frozen"] != self.frozen:
            raise UserError(
                f"{checkpoint}: it stands on other weights than those that are not trained now. Give the training what it "
                f"began with (model, language), or delete the folder {self.folder} to start again."
            )
        self.lr_scheduler.load_state_dict(self.opened.facts[0]["scheduler"])
        if not self.launch.strategy.deepspeed:  # which has read its own files already
            self.opened.load_state(self.model, self.inner_optimizer, restart=self.train_settings.restart_optimizer)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.opened is None:
            return
        self.opened.load_random_state(self.args.seed + self.launch.process)
        kept = self.opened.facts[self.launch.process if self.opened.same_world else 0]["logging"]
        self._tr_loss += kept["loss"]
        self._globalstep_last_logged = kept["since"]

    # --- the end -----------------------------------------------------------------------------------------------------

    def whole_weights(self, use_up: bool = False) -> dict[str, Tensor]:
        """Return the trained weights, whole, float32, on the CPU: on process 0; nothing on the others.

        All processes must call it. It is the weights that the optimizer updates, not copies of less precision; adapters and
        what they stand on are by peft's names, see `vlm_vqa.model.adapters.merge_adapters`. With `use_up` what trained them
        is let go, each weight as it is copied, so that they do not stand beside it: the trainer is good for nothing more.
        """
        self.heartbeat(Phase.WAITING)
        parameters, process = named_parameters(self.model), self.launch.process
        held = [{name: rows_held(one) for name, one in parameters.items()}] * self.launch.processes
        if self.launch.strategy is Strategy.FSDP2:
            distributed.all_gather_object(held, held[0])
        # DeepSpeed's are pieces of larger ones, which it keeps.
        if use_up := use_up and not self.launch.strategy.deepspeed:
            self.inner_optimizer.state.clear()
            self.model.zero_grad()
        weights = {}
        for name, parameter in parameters.items():
            value = self._whole(parameter, [rows[name] for rows in held])
            if use_up and value.data_ptr() != local(parameter.detach()).data_ptr():
                let_go(parameter)
            if process == 0:
                weights[name] = value
        return weights

    def _whole(self, parameter: Tensor, holders: Sequence[Rows]) -> Tensor:
        """Return a parameter, whole, float32, on the CPU: itself if it is that; on other processes than 0 anything."""
        if isinstance(parameter, DTensor):
            return whole_rows(parameter, holders, self.launch.process)
        value: Tensor | None = parameter.detach()
        if self.launch.strategy.deepspeed:
            from deepspeed.runtime.zero import GatheredParameters
            from deepspeed.utils import safe_get_full_fp32_param

            if (value := safe_get_full_fp32_param(parameter)) is None:
                # One that is not trained has no master copy.
                with GatheredParameters([parameter]):
                    value = parameter.detach().clone()
        return value.to("cpu", torch.float32) if self.launch.main else torch.empty(0)


class ProgressCallback(TrainerCallback):
    """Tells what runs and how fast, and passes on what the checkpoints' thread could not do."""

    def __init__(self, run: Any, picture: AnswersPicture | None = None):
        """`run` is a `tracking.TrainingRun`, `picture` what it is shown of each validation."""
        self.run = run
        self.picture = picture
        self.trainer: VqaTrainer

    def on_train_begin(self, args, state, control, **_):
        trainer = self.trainer
        groups = [describe_group(group, state.max_steps) for group in trainer.inner_optimizer.param_groups]
        if trainer.launch.main:
            facts = ", ".join(f"{name} {value}" for name, value in trainer.facts.items())
            log.info("launch %s: %s; %d questions", trainer.launch.name, facts, len(trainer.train_dataset))
            for group in groups:
                log.info("%s", group)
        self.run.set_tags({f"launch_{name}": value for name, value in trainer.facts.items()})
        self.run.set_tags({"optimizer_groups": "; ".join(groups)})
        self.crowd = Crowd(trainer.launch.threads)
        self._look_around()

    def on_step_end(self, args, state, control, **_):
        trainer = self.trainer
        trainer.writer.check()
        self._look_around()
        # Once more when the first states of what waited for the projector are there.
        if "optimizer_states" not in trainer.facts or state.global_step == trainer.train_settings.projector_steps + 1:
            trainer.note_states()
            self.run.set_tags({"launch_optimizer_states": trainer.facts["optimizer_states"]})
            if trainer.launch.main:
                log.info("optimizer states: %s", trainer.facts["optimizer_states"])

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            figures = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            speed = self.trainer.meter.read()
            self._show(speed)
            self.run.log_metrics({**figures, **speed}, state.global_step)
        elif logs and SCORE in logs:
            self.run.log_metrics({name: logs[name] for name in COLUMNS if name in logs}, state.global_step)
            if self.picture is not None:
                self.run.log_image(self.picture.draw(state.log_history), "validation/answers.png")

    def _look_around(self) -> None:
        if self.trainer.launch.main and (busy := self.crowd.notice(waits())):
            log.warning(busy)

    def _show(self, speed: dict[str, float]) -> None:
        used = f", MFU {speed['flops_utilisation']:.0%}" if "flops_utilisation" in speed else ""
        said = f"{speed['questions_per_second']:,.0f} questions/s, {speed['tokens_per_second']:,.0f} tokens/s{used}, "
        said += f"waiting for data {speed['loading_share']:.0%}, {speed['peak_memory_gib']:.1f} GiB"
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressBar) and callback.training_bar is not None:
                callback.training_bar.set_postfix_str(said, refresh=False)


def write_curve(history: Sequence[Mapping[str, Any]], path: Path, key: str, columns: Sequence[str]) -> None:
    """Write the logged entries that have `key` as CSV. Wall-clock figures stay out of it.

    What was not measured is `nan`: `dvc plots` draws an empty cell as 0, and no curve at all where a column lacks.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("step", *columns), "nan", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(entry for entry in history if key in entry)
