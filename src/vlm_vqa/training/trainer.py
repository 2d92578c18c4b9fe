"""The HF Trainer, set up from `params.yaml`."""

import csv
import logging
import math
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from vlm_vqa.errors import UserError
from vlm_vqa.model.vlm import VlmForTraining, load_trained, save_trained
from vlm_vqa.params import Attention, Dtype, TrainParams
from vlm_vqa.training import checkpoints
from vlm_vqa.training.dataset import Collator, QuestionDataset
from vlm_vqa.training.optimizer import optimizer_class
from vlm_vqa.training.windows import WindowSampler, WindowShape

log = logging.getLogger(__name__)

CURVE_COLUMNS = ("step", "epoch", "loss", "grad_norm", "learning_rate")


def training_arguments(train: TrainParams, seed: int, output_dir: Path, *, use_cpu: bool) -> TrainingArguments:
    """Translate `params.train`; names that transformers has changed keep their meaning.

    Raises:
        UserError: flex attention on a CPU, where torch has no backward pass of it.
    """
    if use_cpu and train.attention is Attention.FLEX:
        raise UserError("train.attention is flex_attention, which torch cannot train with on a CPU; set it to eager.")
    return TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=use_cpu,
        seed=seed,
        data_seed=seed,
        bf16=train.compute_dtype is Dtype.BFLOAT16,
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
        activation_checkpointing=train.gradient_checkpointing,
        logging_steps=train.logging_steps,
        logging_first_step=True,
        save_strategy=SaveStrategy.STEPS,
        save_steps=train.save_steps,
        save_total_limit=train.save_total_limit,
        # The batches are ready-made tensors, and MLflow is spoken to by our own callback.
        remove_unused_columns=False,
        report_to="none",
        # The default writes the average of earlier losses where a loss is not a number.
        logging_nan_inf_filter=False,
        disable_tqdm=False,
    )


class VqaTrainer(Trainer):
    """The Trainer with our batches: rows that share an image, in an order of seed and epoch."""

    def __init__(self, model: VlmForTraining, args: TrainingArguments, train: TrainParams, data: QuestionDataset,
                 collator: Collator, callbacks: list[TrainerCallback]):  # fmt: skip
        self.train_settings = train
        super().__init__(
            model=model,
            args=args,
            train_dataset=data,
            data_collator=collator,
            optimizer_cls_and_kwargs=optimizer_class(train, model),
            callbacks=callbacks,
        )
        assert self.model_accepts_loss_kwargs, "the loss must be divided by the step's tokens, not by its batches"
        precision = "bf16" if train.compute_dtype is Dtype.BFLOAT16 else "no"
        assert self.accelerator.mixed_precision == precision, "accelerate computes in another type than was asked for"
        assert all(weight.dtype == torch.float32 for weight in model.parameters()), "the masters must be float32"

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's forward passes, in the order of steps.

        The sampler divides windows among processes itself, so accelerate must not: it would wrap the sampler once more, and
        after a resume, which wraps it too, nobody would tell it which epoch it is.
        """
        args, data, workers = self.args, self.train_dataset, self.train_settings.dataloader_workers
        shape = WindowShape(
            questions=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            questions_per_row=self.train_settings.questions_per_row,
            passes=args.gradient_accumulation_steps,
            processes=args.world_size,
            process=args.process_index,
        )
        prefix = self.data_collator.layout.num_patches + len(self.data_collator.layout.prefix)
        sampler = WindowSampler(data.image_ids, data.text_lengths, prefix, shape, args.data_seed)
        if (idle := sampler.idle_share()) > 0.01:
            log.warning(
                "%.0f%% of the forward passes have nothing to do: the questions of a step make fewer rows than it has "
                "passes. Lower train.gradient_accumulation_steps and raise train.batch_size by the same factor.", 100 * idle
            )  # fmt: skip
        loader = DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            # The Trainer takes a whole step's passes at once: those of the next step are to be ready by then.
            prefetch_factor=-(-2 * shape.passes // workers) if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        return prepare_data_loader(
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            non_blocking=True,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_trained(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_trained(self.model, resume_from_checkpoint, f"Delete the folder {resume_from_checkpoint}.")

    def _save_checkpoint(self, model, trial) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            checkpoints.seal(checkpoint)
        except RuntimeError as error:
            # torch's writer drops the system's reason; it fails so on a full disk.
            if "inline_container" not in str(error):
                raise
            free = shutil.disk_usage(self.args.output_dir).free / 2**20
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise UserError(
                f"{checkpoint}: could not be written with {free:.1f} MiB left: the disk is full. Free some space, then run "
                "`dvc repro` again: training goes on from the checkpoint before it."
            ) from error


class ProgressCallback(TrainerCallback):
    """Sends every logged step to `log_metrics`, with throughput and memory, and stops at a loss that is not a number."""

    def __init__(self, log_metrics: Callable[[dict[str, float], int], None], questions_per_step: int):
        self.log_metrics = log_metrics
        self.questions_per_step = questions_per_step
        self.last: tuple[float, int] | None = None

    def on_step_begin(self, args, state, control, **_):
        if self.last is None:
            self.last = (time.perf_counter(), state.global_step)

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name, 0))):
                raise UserError(
                    f"step {state.global_step}: {name} is {logs[name]}. Lower train.learning_rate or train.max_grad_norm; "
                    f"the checkpoints before this step are in {args.output_dir}."
                )
        now, (before, step) = time.perf_counter(), self.last
        self.last = (now, state.global_step)
        speed = (state.global_step - step) * self.questions_per_step / max(now - before, 1e-9)
        extra = {"questions_per_second": speed, "peak_memory_gib": peak_memory_gib()}
        figures = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
        self.log_metrics({**figures, **extra}, state.global_step)


def peak_memory_gib() -> float:
    """Return the most memory this process has held: of the GPU where there is one, else resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts KiB here.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Write the logged steps as CSV: step, epoch, loss, grad_norm, learning_rate. Wall-clock figures stay out of it."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CURVE_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(entry for entry in history if "loss" in entry)
