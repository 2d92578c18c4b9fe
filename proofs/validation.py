"""Is what is measured while training what generation scores, under every launch, and is the best step kept whatever happens?

    python -m proofs.validation [--kills 10] [--folder FOLDER]

Needs the outputs of `make repro`. First: the trained weights are measured on the whole validation split under each launch of
this machine's kind, before a first step, and compared with one process and with reports/predictions.parquet, which is what
generation answered with the same weights: question by question, and how many answers score only when they are normalised.

Then the small run is trained, to see which share of the time is validation.

Last: 200 questions of the embedded data are trained on for many epochs, by one process and by FSDP2, once undisturbed and
once killed, one process or all of them, at random moments. The kept step and every byte of the result must be the same; and
on the validation split the kept step must score at least what the last one does. With --folder all this is kept.
"""

import argparse
import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from benchmarks import measure
from benchmarks.measure import Claim
from proofs import strategies, tree
from proofs.project import Project, clear, outcome, workplace
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.data.held_out import validation_questions
from vlm_vqa.data.records import images_of, iter_images, load_questions
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.baselines import shuffled_images
from vlm_vqa.evaluation.vqa_accuracy import METRICS
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.vlm import WEIGHTS_FILE, initial_model
from vlm_vqa.params import Params, ValidateOn, ValidationParams, load_params
from vlm_vqa.tracking.run import TrainingRun
from vlm_vqa.training import launch
from vlm_vqa.training.answers_picture import AnswersPicture
from vlm_vqa.training.dataset import Collator
from vlm_vqa.training.prepare import FEATURES, RECORDS, model_to_train, prepare
from vlm_vqa.training.rows import named_parameters
from vlm_vqa.training.trainer import ProgressCallback, VqaTrainer, training_arguments
from vlm_vqa.training.validation import COLUMNS, Part, Validation, validations

TRAINED = Path("models/trained")
PREDICTIONS = Path("reports/predictions.parquet")
LAUNCHES = ("cpu", "cpu-ddp", "cpu-fsdp2", "cpu-zero2", "cpu-zero3")
EQUAL = 1e-6
MOST = 0.05
QUESTIONS, DEV, HELD = 200, 150, 2000
OVERFITS = {
    "data.source": "table",
    "data.table": {"train": "train.csv", "val": "val.csv", "images": "images"},
    "train.batch_size": 20,
    "train.num_train_epochs": 60,
    "train.learning_rate": 2e-3,
    "train.save_steps": 40,
    "train.logging_steps": 10,
    "language.config.hidden_size": 64,
    "language.config.intermediate_size": 128,
    "language.config.num_hidden_layers": 2,
    "prompt.text_length": 64,
    "validation": {
        "from": "train", "questions": DEV, "train_questions": 50, "every_steps": 25, "keep": "best", "patience": None,
    },
}  # fmt: skip
KILLED = {"cpu": {}, "cpu-fsdp2": {"train.batch_size": 10}}
PATIENCE = 900.0


# --- every launch, and generation ---------------------------------------------------------------------------------------


def work(name: str, folder: Path) -> None:
    """Measure the trained weights as process of a launch; process 0 writes the figures and the questions' scores."""
    params = load_params()
    questions = len(load_questions(RECORDS, "val", ["question_id"]))
    trainer = trainer_of(params, name, folder, questions)
    scores: list[list[float]] = []
    plain = Part.scores

    def noted(self: Part, right: torch.Tensor) -> list[float]:
        scores.append(plain(self, right))
        return scores[-1]

    Part.scores = noted
    trainer.run()
    if trainer.launch.main:
        figures = validations(trainer.state.log_history)[0]
        ids = [row["question_id"] for row in trainer.validation.held.questions] if trainer.validation else []
        content = {name: figures[name] for name in COLUMNS} | {"scores": dict(zip(ids, scores[0], strict=True))}
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def trainer_of(params: Params, name: str, folder: Path, questions: int) -> VqaTrainer:
    """Return a Trainer of one step that begins with the trained weights."""
    settings = ValidationParams(from_=ValidateOn.VAL, questions=questions, train_questions=100, every_steps=10**6)
    params = dataclasses.replace(params, validation=settings)
    train = dataclasses.replace(params.train, launch=name, batch_size=64 // strategies.LAUNCHES[name])
    running = launch.start(train, folder)
    encoder = load_encoder(params.vision, device="cpu")
    data, layout, processor = prepare(params, encoder)
    data.head(64)
    train = dataclasses.replace(train, num_train_epochs=1)
    model = initial_model(params.language, encoder.model.config, processor, params.seed)
    weights = load_file(TRAINED / WEIGHTS_FILE)
    with torch.no_grad():
        for key, parameter in named_parameters(model).items():
            parameter.copy_(weights[key])
    collator = Collator(layout, FeatureStore(FEATURES, {"encoder_hash": encoder.hash}))
    held, trained = validation_questions(params, RECORDS)
    others = shuffled_images(held["image_id"], params.seed)
    measured = Validation(params, layout, collator, held, trained, others, METRICS, running.process, running.processes)
    arguments = training_arguments(train, params.seed, folder / f"run-{name}", running)
    return VqaTrainer(model, arguments, train, data, collator, [], running, validation=measured)


def start(name: str, folder: Path) -> dict[str, Any]:
    """Run `work` under a launch and return what it wrote."""
    command = [
        "accelerate",
        "launch",
        "--quiet",
        "--config_file",
        str(folder / f"{name}.yaml"),
        "-m",
        "proofs.validation",
    ]
    here = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (here / "src", here)))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, "--worker", name, "--folder", str(folder)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise UserError(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def every_launch(folder: Path) -> tuple[list[Claim], dict[str, Any]]:
    """Measure under each launch and compare with one process and with generation."""
    strategies.launch_files(folder)
    found = {}
    for name in LAUNCHES:
        found[name] = start(name, folder)
        print(f"{name}: " + ", ".join(f"{key} {found[name][key]:.9f}" for key in COLUMNS), flush=True)
    scores = {name: figures.pop("scores") for name, figures in found.items()}
    one = found["cpu"]
    off = max(abs(figures[key] - one[key]) for figures in found.values() for key in COLUMNS)
    table = pq.read_table(PREDICTIONS).to_pylist()
    score_of = METRICS["vqa_accuracy" if "score" in table[0] else "answer_accuracy"]
    unequal = normalised = 0
    for row in table:
        generated = score_of(row["prediction"], row["answers"])
        literal = row["prediction"] in row["answers"]
        normalised += bool(generated) and not literal
        unequal += abs(scores["cpu"][str(row["question_id"])] - (generated if literal else 0.0)) > 1e-9
    print(f"{len(table)} questions: {unequal} score otherwise than generated; {normalised} more only when normalised")
    claims = [
        Claim("largest difference of a figure between launches", off, off, off, EQUAL, True),
        Claim("questions whose score is not generation's", float(unequal), float(unequal), float(unequal), 0.0, True),
    ]
    return claims, {"launches": found, "questions": len(table), "unequal": unequal, "only_normalised": normalised}


# --- what it costs ------------------------------------------------------------------------------------------------------


def cost(folder: Path) -> Claim:
    """Train as params.yaml says and return the share of the time that validation takes, drawing included."""
    params = load_params()
    running = launch.start(params.train)
    encoder = load_encoder(params.vision, device="cpu")
    data, layout, processor = prepare(params, encoder)
    collator = Collator(layout, FeatureStore(FEATURES, {"encoder_hash": encoder.hash}))
    held, trained = validation_questions(params, RECORDS)
    others = shuffled_images(held["image_id"], params.seed)
    measured = Validation(params, layout, collator, held, trained, others, METRICS)
    images = images_of(RECORDS, (row["image_id"] for row in measured.shown))
    picture = AnswersPicture(measured.shown, METRICS[measured.metric], measured.describe(), images)
    seconds: list[float] = []

    def timed(function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args)
            seconds.append(time.perf_counter() - begun)
            return result

        return call

    measured.measure, picture.draw = timed(measured.measure), timed(picture.draw)
    callbacks = [ProgressCallback(TrainingRun(), picture)]
    arguments = training_arguments(params.train, params.seed, folder / "cost", running)
    model = model_to_train(params, encoder, processor)
    trainer = VqaTrainer(model, arguments, params.train, data, collator, callbacks, running, validation=measured)
    begun = time.perf_counter()
    trainer.run()
    share = sum(seconds) / (time.perf_counter() - begun)
    return Claim("share of the small run's training that validation takes", share, share, share, MOST, True)


# --- the best step, killed ----------------------------------------------------------------------------------------------


def overfit(folder: Path, kills: int) -> tuple[list[Claim], dict[str, Any]]:
    """Train on few questions under each launch, undisturbed and killed."""
    claims, details = [], {}
    for name, changes in KILLED.items():
        project = prepared(folder, name, changes)
        rng = random.Random(name)
        seconds = train(project)
        expected, report = outcome(project), kept(project)
        held = {"kept": held_score(project)}
        ends, log = disturbed(project, rng, kills, seconds, expected)
        project.set({"validation.keep": "last"})
        clear(project)
        train(project)
        held["last"] = held_score(project)
        print(f"{name}: step {report['kept_step']} of {report['steps']} kept; held {held}; as undisturbed: {ends}")
        same, gain = sum(ends) / len(ends), held["kept"] - held["last"]
        share = report["kept_step"] / report["steps"]
        claims.append(Claim(f"killed trainings that keep the same bytes, {name}", same, same, same, 1.0))
        claims.append(Claim(f"held score of the kept step minus the last one's, {name}", gain, gain, gain, 0.0))
        claims.append(Claim(f"kept step over the last, {name}", share, share, share, 0.9, True))
        details[name] = {"report": report, "held": held, "kills": log, "curve": curve(project)}
    return claims, details


def prepared(folder: Path, name: str, changes: dict[str, Any]) -> Project:
    """Return a project whose features are there, on few questions of the embedded data, in tables of its own."""
    place = folder / f"overfit-{name}"
    if (place / "data/features/manifest.json").exists():
        return Project.at(place)
    shutil.rmtree(place, ignore_errors=True)
    project = Project(place, {**OVERFITS, **changes, "train.launch": name, "data.directory": "own"})
    (place / "own/images").mkdir(parents=True)
    wanted = set()
    for split, most in (("train", QUESTIONS + DEV), ("val", HELD)):
        rows = load_questions(RECORDS, split).select(range(most)).to_list()
        wanted |= {row["image_id"] for row in rows}
        with open(place / f"own/{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "question", "answer"])
            writer.writerows((f"{row['image_id']}.png", row["question"], row["answers"][0]) for row in rows)
    for image in iter_images(RECORDS):
        if image.image_id in wanted:
            (place / f"own/images/{image.image_id}.png").write_bytes(image.data)
    for stage in ("fetch-vqav2", "extract-features"):
        done = project.stage(stage)
        if done.returncode:
            raise UserError(f"{stage} failed:\n{done.stderr[-3000:]}")
    return project


def call(project: Project) -> tree.Call:
    environment = project.environment(MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    return tree.Call(project.stage_command("train"), project.folder, environment, project.folder / "terminal.txt")


def train(project: Project) -> float:
    """Train to the end; return the seconds."""
    with call(project) as running:
        wrong = running.end(PATIENCE)
        if wrong or running.shell.returncode:
            raise UserError(f"the training failed: {wrong or running.text()[-3000:]}")
        return running.seconds()


def disturbed(
    project: Project, rng: random.Random, kills: int, seconds: float, expected: dict[str, str]
) -> tuple[list[bool], list[dict[str, Any]]]:
    """Kill so often, and begin anew what has ended; return which ends were as the undisturbed one."""
    clear(project)
    ends, log, code = list[bool](), list[dict[str, Any]](), None
    while len(log) < kills or code != 0:
        with call(project) as running:
            running.wait(lambda: False, rng.uniform(0.15, 1.0) * seconds if len(log) < kills else PATIENCE)
            if running.shell.poll() is None:
                everyone, living = rng.random() < 0.3, sorted(running.victims(), key=lambda one: one.pid)
                victim = None if everyone or not living else rng.choice(living)
                log.append({"seconds": round(running.seconds(), 1), "victim": tree.name(victim) if victim else "all"})
                print(f"  {len(log)}/{kills} {log[-1]}", flush=True)
                running.signal(signal.SIGKILL, victim)
            running.end(PATIENCE)
        code = running.shell.returncode
        if code == 0:
            ends.append(outcome(project) == expected)
            clear(project)
    return ends, log


def kept(project: Project) -> dict[str, Any]:
    """Return what the training reports."""
    return json.loads((project.folder / "reports/train.json").read_text(encoding="utf-8"))


def curve(project: Project) -> list[dict[str, str]]:
    """Return the validations' figures."""
    with open(project.folder / "reports/validation/curve.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def held_score(project: Project) -> float:
    """Return the score of the trained weights on the whole validation split."""
    with chdir(project.folder):
        return validations(_measured(load_params()))[0][COLUMNS[1]]


def _measured(params: Params) -> list[dict[str, Any]]:
    questions = len(load_questions(RECORDS, "val", ["question_id"]))
    shutil.rmtree("held", ignore_errors=True)
    Path("held").mkdir()
    shutil.copy("launch/cpu.yaml", "held/cpu.yaml")
    trainer = trainer_of(params, "cpu", Path("held"), questions)
    trainer.run()
    trainer.lock.close()
    return trainer.state.log_history


def main(arguments: Sequence[str] | None = None) -> None:
    """Prove both and write `validation.json`; a process of a launch does its part."""
    parser = measure.parser("validation", __doc__, "proofs")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="keep all here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = measure.parse(parser, arguments)
    if options.worker:
        work(options.worker, options.folder)
        return
    with workplace(options.folder) as folder:
        claims, launches = every_launch(folder)
        claims.append(cost(folder))
        more, killed = overfit(folder, options.kills)
    data = {"questions and pictures": load_params().data.source.value}
    measure.write("validation", [*claims, *more], {"launches": launches, "killed": killed}, data)


if __name__ == "__main__":
    sys.exit(main())
