"""The small run's training, several times over and in several ways: what proofs that compare accuracy share."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from proofs.project import with_changes
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.data.records import load_questions
from vlm_vqa.evaluation.answering import Ask, answer_asks
from vlm_vqa.evaluation.vqa_accuracy import score_answer
from vlm_vqa.hashing import write_json
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.vlm import VlmForTraining
from vlm_vqa.params import Params, parse_params
from vlm_vqa.training import launch
from vlm_vqa.training.dataset import Collator
from vlm_vqa.training.prepare import FEATURES, RECORDS, model_to_train, prepare
from vlm_vqa.training.trainer import VqaTrainer, training_arguments

Trainings = Mapping[str, Callable[[], dict[str, float]]]


def changed(params: Params, changes: dict[str, Any]) -> Params:
    """Return parameters with some changed, given by their full names, as a file with them would be read."""
    return parse_params(with_changes(params.as_dict(), changes))


def train_and_score(
    params: Params, start: Callable[[VlmForTraining], None] = lambda model: None, steps: int = -1
) -> dict[str, float]:
    """Train once; return the last step's accuracy on all validation questions, training seconds, steps and questions.

    Args:
        start: changes the weights of the model that `params` describe before the first step.
        steps: optimizer steps; by default, as many as `params` ask for.
    """
    encoder = load_encoder(params.vision, device="cpu")
    features = FeatureStore(FEATURES, {"encoder_hash": encoder.hash})
    data, layout, processor = prepare(params, encoder)
    model = model_to_train(params, encoder, processor)
    start(model)
    running = launch.start(params.train)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(params.train, params.seed, Path(folder), running)
        arguments.save_strategy, arguments.max_steps = "no", steps
        trainer = VqaTrainer(model, arguments, params.train, data, Collator(layout, features), [], running)
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
    facts = {
        "weights_hash": "",
        "mask": params.prompt.mask.value,
        "instruction": params.prompt.instruction,
        "num_patches": params.vision.num_patches,
        "text_length": params.prompt.text_length,
    }
    predictor = Predictor(model, processor, facts, params.evaluation.max_new_tokens)
    validation = load_questions(RECORDS, "val").to_list()
    asks = [Ask(row["image_id"], row["question"]) for row in validation]
    given = answer_asks(asks, predictor, features, params.evaluation.batch_size, "questions")
    scores = [score_answer(given[ask].answer, row["answers"]) for ask, row in zip(asks, validation, strict=True)]
    questions = min(len(data) * params.train.num_train_epochs, trainer.state.global_step * params.train.batch_size)
    accuracy = sum(scores) / len(scores)
    return {"accuracy": accuracy, "seconds": seconds, "steps": trainer.state.global_step, "questions": questions}


def run_all(name: str, trainings: Trainings) -> dict[str, dict[str, float]]:
    """Run what is not done yet; return what came of each. An interrupted comparison goes on from RESULTS/NAME.parts."""
    torch.set_num_threads(measure.cores())
    parts = measure.RESULTS / f"{name}.parts"
    done = json.loads(parts.read_text(encoding="utf-8")) if parts.exists() else {}
    for key, run in trainings.items():
        if key not in done:
            done[key] = run()
            write_json(parts, done)
        print(f"{key}: {done[key]}", flush=True)
    return done


def forget(name: str) -> None:
    """Let the next comparison of this name begin anew: this one's results are written."""
    (measure.RESULTS / f"{name}.parts").unlink(missing_ok=True)


def accuracies(done: Mapping[str, Mapping[str, float]], keys: Iterable[str]) -> list[float]:
    """Return the accuracies of some trainings, in order."""
    return [done[key]["accuracy"] for key in keys]


def table(rows: Mapping[str, list[float]], what: str) -> str:
    """Return means over seeds and their extremes as a table in Markdown."""
    lines = [f"| {what} | mean accuracy | lowest and highest seed |", "|---|---|---|"]
    lines += [f"| {name} | {sum(a) / len(a):.4f} | {min(a):.4f} .. {max(a):.4f} |" for name, a in rows.items()]
    return "\n".join(lines)
