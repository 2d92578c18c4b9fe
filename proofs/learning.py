"""Does packed training learn as well as one row per question? The small run both ways, over several seeds.

`python -m proofs.learning` needs what the first two stages write (`make repro`). Both ways see the same number of
questions in the same number of optimizer steps: packed, questions of an image in one row and in one step; plain, one row
per question, drawn in random order (`train.questions_per_row: 1`). Accuracy is counted on all validation questions.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import measure
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.data.records import load_questions
from vlm_vqa.evaluation.evaluate import answer_questions
from vlm_vqa.evaluation.vqa_accuracy import accuracy
from vlm_vqa.hashing import write_json
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.vlm import initial_model
from vlm_vqa.params import Params, load_params
from vlm_vqa.training import launch
from vlm_vqa.training.dataset import Collator
from vlm_vqa.training.prepare import FEATURES, RECORDS, prepare
from vlm_vqa.training.trainer import VqaTrainer, training_arguments

WAYS = ("packed", "one row per question")
PARTS = measure.RESULTS / "learning.parts"
"""Finished trainings, so that an interrupted comparison goes on."""


def train_and_score(params: Params, epochs: int, per_row: int, seed: int) -> dict[str, float]:
    """Train once and return accuracy, training seconds and questions seen."""
    train = dataclasses.replace(params.train, questions_per_row=per_row, num_train_epochs=epochs, dataloader_workers=0)
    params = dataclasses.replace(params, train=train, seed=seed)
    encoder = load_encoder(params.vision, device="cpu")
    features = FeatureStore(FEATURES, {"encoder_hash": encoder.hash})
    data, layout, processor = prepare(params, encoder)
    model = initial_model(params.language, encoder.model.config, processor, seed)
    running = launch.start(train)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(train, seed, Path(folder), running)
        arguments.save_strategy = "no"
        trainer = VqaTrainer(model, arguments, train, data, Collator(layout, features), [], running)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    facts = {
        "weights_hash": "",
        "mask": params.prompt.mask.value,
        "instruction": params.prompt.instruction,
        "num_patches": params.vision.num_patches,
        "text_length": params.prompt.text_length,
    }
    predictor = Predictor(model, processor, facts, params.evaluation.max_new_tokens)
    validation = load_questions(RECORDS, "val").to_list()
    given = answer_questions(predictor, features, validation, params.evaluation.batch_size, "questions")
    scored = accuracy({row["question_id"]: answer for row, answer in zip(validation, given, strict=True)}, validation)
    return {
        "accuracy": scored.overall,
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "questions": len(data) * epochs,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all, or what is left, and write `learning.json`."""
    params = load_params()
    parser = measure.parser("learning", __doc__, "proofs", seeds=3, epochs=params.train.num_train_epochs)
    options = measure.parse(parser, arguments)
    seeds, epochs = options.seeds, options.epochs
    torch.set_num_threads(measure.cores())
    done = json.loads(PARTS.read_text()) if PARTS.exists() else {}
    for seed in range(seeds):
        for way, per_row in zip(WAYS, (params.train.questions_per_row, 1), strict=True):
            key = f"{way}, seed {seed}, {epochs} epochs"
            if key not in done:
                done[key] = train_and_score(params, epochs, per_row, seed)
                write_json(PARTS, done)
            print(f"{key}: {done[key]}", flush=True)
    accuracy = {
        way: [done[f"{way}, seed {seed}, {epochs} epochs"]["accuracy"] for seed in range(seeds)] for way in WAYS
    }
    packed, plain = accuracy.values()
    ratios = [one / other for one, other in zip(packed, plain, strict=True)]
    within_a_point = 1 - 0.01 / statistics.mean(plain)
    claim = measure.Claim(
        f"accuracy of packed training over that of one row per question, {seeds} seeds, {epochs} epochs",
        statistics.mean(packed) / statistics.mean(plain),
        min(ratios),
        max(ratios),
        target=within_a_point,
    )
    measure.write(
        "learning",
        [claim],
        {"runs": done, "mean_accuracy": {k: statistics.mean(v) for k, v in accuracy.items()}},
        {"questions and pictures": params.data.source.value},
    )
    PARTS.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
