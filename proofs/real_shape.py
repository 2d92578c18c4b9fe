"""The real model's shape on a CPU: training steps, save and export, and the memory they take against `vlm-vqa preflight`.

    python -m proofs.real_shape [--layers 26] [--questions 8] [--steps 4] [--export-only]

DINOv2-base and Gemma 2 2B with 257,153 tokens, both from random weights: the encoder sees the 75 pictures of the VQAv2
sample, real or drawn (see `benchmarks.vqav2`), and `VqaTrainer` takes optimizer steps on the same few of its questions under
launch `cpu`: bfloat16 weights with stochastic rounding, 8-bit AdamW, gradient checkpointing, the embedding frozen. The
tokenizer is one trained on the sample's texts; the embedding has Gemma's number of rows.

Peak memory is the process's resident set, read at the end of each phase and compared with what preflight predicts for its
moments: the steps, the checkpoint that ends training, and gathering the whole weights. The export's is held to its weights.

With 26 layers: 21 GiB of free memory, 20 GB of disk, a quarter of an hour on 2 cores with AVX512-bf16. It starts only where
memory and disk are there. With --export-only, for CPUs that multiply no bfloat16, the weights are those that a training
begins with: 12 GiB and some minutes, written to `real_shape_export.json`.
"""

import ctypes
import gc
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset as Records
from transformers import TrainerCallback

from benchmarks import extraction, measure, vqav2
from benchmarks.measure import Claim
from benchmarks.memory import read_peak, reset_peak
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.data.records import ImageRecord
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.devices import GIB, find_device
from vlm_vqa.estimate.memory import total
from vlm_vqa.estimate.predict import CPU_UTILISATION, changed
from vlm_vqa.estimate.questions import DatasetSize
from vlm_vqa.estimate.shapes import GEMMA_2_2B, GEMMA_VOCABULARY, model_of, tower_parameters, vision_of
from vlm_vqa.estimate.stage_costs import Machine, Stage, stage_costs
from vlm_vqa.inference.export import write_export
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.model.layout import TokenLayout
from vlm_vqa.model.vlm import (
    build_processor,
    freeze_embeddings,
    hash_weights,
    initial_model,
    save_trained,
    set_dropout,
    train_tokenizer,
    trained_state,
)
from vlm_vqa.params import Params, load_params
from vlm_vqa.training import launch
from vlm_vqa.training.dataset import Collator, QuestionDataset
from vlm_vqa.training.trainer import VqaTrainer, training_arguments

ROOT = Path(__file__).parents[1]
PRESET = ROOT / "presets/vqav2-1gpu.yaml"
TOKENIZER = 4000
"""Tokens that are learnt from the sample's texts, at most."""
MOST_GIB = 22
SPARE_GIB = 1.0
"""Left to others beside the predicted peak."""
MIB = 2**20
ENDS = ("last checkpoint", "whole weights")
STEP_MOMENTS = ("loss", "backward, last layer", "backward, first layer", "update")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `real_shape.json`."""
    parser = measure.parser("real_shape", __doc__, "proofs", layers=GEMMA_2_2B.num_hidden_layers, questions=8, steps=4)
    parser.add_argument(
        "--export-only", action="store_true", help="no training: export the weights that one begins with"
    )
    parser.add_argument("--folder", type=Path, help="for features, checkpoint and weights; all are removed")
    options = measure.parse(parser, arguments)
    if options.questions % 2:
        raise UserError(f"--questions {options.questions} is odd, but a step has 2 passes. Make it even.")
    if options.folder and not options.folder.is_dir():
        raise UserError(f"--folder {options.folder}: no such folder. Make it, or leave the option out.")
    params = settings(options.layers, options.questions, options.steps)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        claims, details = run(params, Path(folder), options.export_only)
    # A model of fewer layers is for trying this out.
    results = measure.RESULTS if options.layers == GEMMA_2_2B.num_hidden_layers else Path(tempfile.mkdtemp())
    name = "real_shape_export" if options.export_only else "real_shape"
    measure.write(name, claims, details, {"questions and photographs": vqav2.origin(vqav2.SAMPLE)}, results)


def settings(layers: int, questions: int, steps: int) -> Params:
    """Return the preset for one GPU, on the CPU, for a few steps over the same questions."""
    return changed(
        load_params(PRESET),
        {
            "vision.launch": "cpu",
            "vision.compute_dtype": "float32",
            "vision.batch_size": 8,
            "language": {
                "model": "random",
                "revision": None,
                "vocab_size": GEMMA_VOCABULARY,
                "config": vars(replace(GEMMA_2_2B, num_hidden_layers=layers)),
            },
            "train.launch": "cpu",
            "evaluation.launch": "cpu",
            "train.answers": "majority",
            "train.batch_size": questions // 2,
            "train.gradient_accumulation_steps": 2,
            "train.lr_scheduler_type": "constant_with_warmup",
            "train.warmup_ratio": 0.0,
            "train.num_train_epochs": steps,
            "train.logging_steps": 1,
            "train.dataloader_workers": 0,
            "train.save_steps": 10**9,
        },
    )


def run(params: Params, folder: Path, export_only: bool) -> tuple[list[Claim], dict[str, Any]]:
    """Extract, train, save and export in `folder`; return claims and details."""
    records, pictures = read_sample()
    encoder = extraction.build_encoder(extraction.DINOV2_BASE, torch.float32)
    seconds: dict[str, float] = {}
    tokenizer = train_tokenizer([params.prompt.instruction, *records["question"], *records["answer"]], TOKENIZER)
    processor = build_processor(encoder.processor, tokenizer, params.vision.num_patches)
    processor.save_pretrained(folder / "trained")
    if export_only:
        weights_hash = timed(seconds, "save", partial(save_untrained, params, encoder, processor, folder / "trained"))
        trim()
        found = export(params, encoder, folder, weights_hash, seconds)
        return [export_claim(params, found)], {"weights": "random", "seconds": seconds, "peak_gib": found}
    features = timed(seconds, "features", partial(extract_features, params, encoder, pictures, folder / "features"))
    layout = TokenLayout(
        processor.tokenizer,
        mask=params.prompt.mask,
        instruction=params.prompt.instruction,
        num_patches=params.vision.num_patches,
        text_length=params.prompt.text_length,
        image_token_id=processor.image_token_id,
    )
    chosen = records.select(range(params.train.batch_size * 2)).rename_column("answer", "multiple_choice_answer")
    data = QuestionDataset(chosen, layout, params.prompt.too_long)
    predicted = prediction(params, data)
    check_room(predicted, folder)
    trainer = Measured(params, encoder, processor, data, Collator(layout, features), folder)
    found = {"before": trainer.before, **trainer.train(seconds)}
    found |= trainer.save(folder / "trained", seconds)
    losses, weights_hash = trainer.losses, trainer.weights_hash
    del trainer
    trim()
    found |= export(params, encoder, folder, weights_hash, seconds)
    return claims_of(params, found, predicted, losses), details_of(params, found, predicted, losses, seconds)


# --- the sample ------------------------------------------------------------------------------------------------------


def read_sample() -> tuple[Records, list[ImageRecord]]:
    """Return the questions of the VQAv2 sample with their majority answers, and its pictures."""
    with vqav2.sample() as folder:
        questions, annotations = vqav2.read(folder)
        paths = vqav2.pictures(folder)
        pictures = [ImageRecord(int(path.stem.rpartition("_")[2]), path.name, path.read_bytes()) for path in paths]
    answers = {one["question_id"]: one["multiple_choice_answer"] for one in annotations}
    rows = [
        {**{key: one[key] for key in ("question_id", "image_id", "question")}, "answer": answers[one["question_id"]]}
        for one in questions
    ]
    return Records.from_list(rows), pictures


def extract_features(params: Params, encoder: Encoder, pictures: list[ImageRecord], folder: Path) -> FeatureStore:
    """Write and open the features of all pictures, as the stage does, in the encoder's type."""
    extraction.store_in(folder, extraction.ahead, encoder, pictures, params.vision.batch_size)
    return FeatureStore(folder)


# --- what preflight says ---------------------------------------------------------------------------------------------


def prediction(params: Params, data: QuestionDataset) -> Stage:
    """Return what preflight predicts for the train stage with these very questions."""
    tokens = [data.tokens(place, 0) for place in range(len(data))]
    sample = tuple((image, len(one.prompt), len(one.answer)) for image, one in zip(data.image_ids, tokens, strict=True))
    size = DatasetSize(len(data), len(data), 2 * len(set(data.image_ids)), 0, 0, "these questions", sample, sample)
    device = find_device("cpu", on_cpu=True, launch="cpu")
    machine = Machine(device, device.memory, shutil.disk_usage("/").free, *CPU_UTILISATION, bandwidth=1e6)
    stages = stage_costs(params, size, machine, ROOT / "launch")
    return next(stage for stage in stages if stage.name == "train")


def check_room(predicted: Stage, folder: Path) -> None:
    """Refuse to start where others would have to make room."""
    needed = max(map(total, predicted.host.values())) / GIB + SPARE_GIB
    free = (psutil.virtual_memory().available + psutil.Process().memory_info().rss) / GIB
    if free < needed:
        raise UserError(f"{free:.1f} GiB of memory are free, {needed:.1f} are needed. Wait, or take fewer --layers.")
    disk = 1.1 * total(predicted.disk) / GIB
    if (left := shutil.disk_usage(folder).free / GIB) < disk:
        raise UserError(f"{folder}: {left:.1f} GiB of disk are free, {disk:.1f} are needed. Name another --folder.")


def new_model(params: Params, encoder: Encoder, processor):
    """Return the model that a training begins with, with as many rows in its embedding as Gemma's has."""
    model = initial_model(params.language, encoder.model.config, processor, params.seed)
    model.resize_token_embeddings(model_of(params).vocabulary, mean_resizing=False)
    return model


def save_untrained(params: Params, encoder: Encoder, processor, folder: Path) -> str:
    """Write the weights that a training begins with as the train stage does; return their hash."""
    model = new_model(params, encoder, processor)
    weights = trained_state(model)
    save_trained(model.config, weights, folder)
    return hash_weights(weights)


# --- training --------------------------------------------------------------------------------------------------------


class Measured(TrainerCallback):
    """The trainer of the train stage, measured."""

    def __init__(
        self, params: Params, encoder: Encoder, processor, data: QuestionDataset, collator: Collator, folder: Path
    ):
        running = launch.start(params.train, ROOT / "launch")
        self.before = reset_peak() / 1024
        model = new_model(params, encoder, processor)
        set_dropout(model, params.train.dropout)
        freeze_embeddings(model)
        self.config = model.config
        arguments = training_arguments(params.train, params.seed, folder / "checkpoints", running)
        self.trainer = VqaTrainer(model, arguments, params.train, data, collator, [self], running)
        self.peaks: dict[str, float] = {}
        self.step_seconds: list[float] = []
        self.weights_hash = ""

    def on_train_begin(self, args, state, control, **_):
        self.peaks["start"] = read_peak() / 1024
        trim()
        reset_peak()

    def on_step_begin(self, args, state, control, **_):
        self._begun = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.step_seconds.append(time.perf_counter() - self._begun)
        self.peaks["steps"] = read_peak() / 1024
        if state.global_step == state.max_steps:
            # What follows is the checkpoint that ends training.
            reset_peak()

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    def train(self, seconds: dict[str, float]) -> dict[str, float]:
        """Take all steps and return the peaks of the start, the steps and the last checkpoint, in GiB."""
        timed(seconds, "train", self.trainer.run)
        seconds["step"] = sorted(self.step_seconds)[len(self.step_seconds) // 2]
        assert self.trainer.facts["share_of_weights"] == 1.0
        return self.peaks | {"last checkpoint": read_peak() / 1024}

    def save(self, folder: Path, seconds: dict[str, float]) -> dict[str, float]:
        """Gather and write the weights as the train stage does; return the peak in GiB."""
        reset_peak()
        weights = timed(seconds, "whole weights", self.trainer.whole_weights)
        self.weights_hash = timed(seconds, "hash", lambda: hash_weights(weights))
        timed(seconds, "save", lambda: save_trained(self.config, weights, folder))
        return {"whole weights": read_peak() / 1024}


def export(
    params: Params, encoder: Encoder, folder: Path, weights_hash: str, seconds: dict[str, float]
) -> dict[str, float]:
    """Write an export and read it back as the stage does, and return the peak in GiB, mapped files included."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    results, data = {"kept_step": 0, "kept_because": "the last step"}, {"source": "sample", "notes": [], "splits": {}}
    of = (folder / "trained", encoder, params, {"weights_hash": weights_hash}, results, data)
    reset_peak()
    timed(seconds, "export", lambda: write_export(folder / "export", *of))
    predictor = timed(seconds, "read back", lambda: Predictor.from_export(folder / "export", device="cpu"))
    assert hash_weights(trained_state(predictor.model)) == weights_hash, "what was exported is not what was saved"
    return {"export": read_peak() / 1024}


def trim() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def timed(seconds: dict[str, float], name: str, function: Any) -> Any:
    """Call and note how long it takes."""
    begun = time.perf_counter()
    result = function()
    seconds[name] = time.perf_counter() - begun
    print(f"  {name}: {seconds[name]:.1f} s, peak {read_peak() / 1024:.2f} GiB", flush=True)
    return result


# --- what came out ---------------------------------------------------------------------------------------------------


def predicted_peaks(predicted: Stage) -> dict[str, float]:
    """Return preflight's peaks of the measured phases, in GiB."""
    moments = {name: total(parts) / GIB for name, parts in predicted.host.items()}
    steps = max(moments[name] for name in STEP_MOMENTS)
    return {"start": moments["start"], "steps": steps, **{name: moments[name] for name in ENDS}}


def claim_of(params: Params, what: str, value: float, **options: Any) -> Claim:
    """Return the claim of a figure that was measured once."""
    name = f"real shape, {model_of(params).language.num_hidden_layers} layers: {what}"
    return Claim(name, value, value, value, **options)


def export_claim(params: Params, found: dict[str, float]) -> Claim:
    """Hold the export's peak to the weights that it writes."""
    weights = 4 * (model_of(params).saved + tower_parameters(vision_of(params))) / GIB
    note = f"{found['export']:.2f} GiB of {weights:.2f} GiB"
    what = "peak of the export over its weights"
    return claim_of(params, what, found["export"] / weights, target=1.3, at_most=True, note=note)


def claims_of(params: Params, found: dict[str, float], predicted: Stage, losses: list[float]) -> list[Claim]:
    """Turn what was measured into claims."""
    once = partial(claim_of, params)
    peaks = predicted_peaks(predicted)
    claims = [
        once("peak of training and saving, GiB", max(found[name] for name in peaks), target=MOST_GIB, at_most=True)
    ]
    for name, expected in peaks.items():
        note = f"{found[name]:.2f} GiB, preflight {expected:.2f}"
        off = abs(found[name] / expected - 1)
        claims.append(once(f"memory off preflight's, {name}", off, target=0.1, at_most=True, note=note))
    falls = losses[-1] / losses[0] if all(map(math.isfinite, losses)) else math.inf
    claims.append(export_claim(params, found))
    note = f"{losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps over the same questions"
    return [*claims, once("last loss over first", falls, target=0.95, at_most=True, note=note)]


def details_of(
    params: Params, found: dict[str, float], predicted: Stage, losses: list[float], seconds: dict[str, float]
) -> dict[str, Any]:
    """Return what a reader of the claims wants to know."""
    kept = (
        "batch_size",
        "gradient_accumulation_steps",
        "optimizer",
        "weights_dtype",
        "rounding",
        "compute_dtype",
        "gradient_checkpointing",
        "freeze_embeddings",
        "learning_rate",
        "questions_per_row",
    )
    train = params.as_dict()["train"]
    return {
        "train": {key: train[key] for key in kept},
        "weights": "random; the encoder's too",
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "predicted_step_seconds": round(predicted.facts["step_seconds"], 1),
        "peak_gib": {name: round(value, 3) for name, value in found.items()},
        "export": "with the files' pages, which the kernel takes back when memory is short",
        "predicted_gib": {name: round(total(parts) / GIB, 3) for name, parts in predicted.host.items()},
        "losses": losses,
        "facts": predicted.facts,
    }


if __name__ == "__main__":
    main()
