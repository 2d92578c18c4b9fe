"""Stage train: fine-tune Gemma 2 and the projector on stored image features.

Reads data/records and data/features; writes models/trained and, under reports/, train.json, train_curve.csv and validation.
Started by `accelerate launch --config_file launch/NAME.yaml stages/train.py`.
"""

import vlm_vqa  # noqa: F401 - first: from here on Ctrl-C ends without a traceback

# isort: split
import shutil
from pathlib import Path

from vlm_vqa import sealed, tracking
from vlm_vqa.checks import check_machine, check_records
from vlm_vqa.data.held_out import validation_questions
from vlm_vqa.data.records import images_of, read_manifest
from vlm_vqa.evaluation.baselines import shuffled_images
from vlm_vqa.evaluation.vqa_accuracy import METRICS
from vlm_vqa.features.live import how_live, open_features
from vlm_vqa.hashing import code_hash, hash_json, write_json
from vlm_vqa.model.adapters import ADAPTER, merge_adapters, projector_of, save_adapter
from vlm_vqa.model.checkpoint import start_hash
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.vlm import TRAINING_FILE, hash_weights, save_trained
from vlm_vqa.params import Params, Start, load_params
from vlm_vqa.pipeline import entrypoint
from vlm_vqa.training import checkpoint_files, launch
from vlm_vqa.training.answers_picture import AnswersPicture
from vlm_vqa.training.dataset import Collator, QuestionDataset
from vlm_vqa.training.prepare import FEATURES, RECORDS, build_once, model_to_train, prepare
from vlm_vqa.training.throughput import peak_memory_gib
from vlm_vqa.training.trainer import CURVE_COLUMNS, ProgressCallback, VqaTrainer, training_arguments, write_curve
from vlm_vqa.training.validation import COLUMNS, SCORE, Validation, validations
from vlm_vqa.training.watchdog import Watchdog, connect

TRAINED, REPORTS = Path("models/trained"), Path("reports")


def main() -> None:
    params = load_params("params.yaml", whole=True)
    check_machine(params)
    running = launch.start(params.train)
    processes = running.processes
    with Watchdog(connect(processes), running.process, processes, params.train.stall_seconds) as watchdog:
        train(params, running, watchdog)


def train(params: Params, running: launch.Launch, watchdog: Watchdog) -> None:
    """Train on this process; rank 0 writes the shared outputs."""
    manifest = read_manifest(RECORDS)
    encoder = load_encoder(params.vision, "cpu" if params.vision.store else running.device, params.model)
    expected = {"encoder_hash": encoder.hash, "data_hash": manifest["data_hash"], "live": how_live(params)}
    features = open_features(FEATURES, expected, RECORDS, encoder)
    processes = running.processes
    made_of = {
        "training_params_hash": params.training_hash(),
        "data_hash": manifest["data_hash"],
        "encoder_hash": encoder.hash,
        "code_hash": code_hash(__file__),
    }
    if params.model.start is Start.CHECKPOINT:
        made_of["start_hash"] = start_hash(params.model)
    key = hash_json(made_of | {"training_params_hash": params.recipe_hash(processes)})[:16]
    folder = checkpoint_files.ROOT / key

    data, layout, processor = prepare(params, encoder)
    check_records(params, RECORDS, layout=layout)
    collator = Collator(layout, features)
    validation, picture = None, None
    if params.validation.questions:
        held, trained = validation_questions(params, RECORDS)
        others = shuffled_images(held["image_id"], params.seed)
        validation = Validation(params, layout, collator, held, trained, others, METRICS, running.process, processes)
        if running.main:
            images = images_of(RECORDS, (row["image_id"] for row in validation.shown))
            picture = AnswersPicture(validation.shown, METRICS[validation.metric], validation.describe(), images)
    model = build_once(lambda: model_to_train(params, encoder, processor), running)
    projector = projector_of(model) if running.main else {}

    lost = {f"dropped_{name}": str(one["dropped"]) for name, one in manifest["splits"].items() if one.get("dropped")}
    with tracking.training_run(params, key=key, tags=made_of | lost) as run:
        watchdog.on_end = run.fail
        arguments = training_arguments(params.train, params.seed, folder, running)
        callbacks = [ProgressCallback(run, picture)]
        trainer = VqaTrainer(model, arguments, params.train, data, collator, callbacks, running, watchdog, validation)
        result = trainer.run()
        weights = trainer.whole_weights(use_up=True)
        if not running.main:
            return
        report(trainer, data, picture)
        lora = params.train.lora
        merged = weights if lora is None else merge_adapters(weights, lora)
        made_of["weights_hash"] = hash_weights(merged)
        # What stands there may be a hard link into DVC's cache: remove it, never write through it.
        shutil.rmtree(TRAINED, ignore_errors=True)
        save_trained(model.config, merged, TRAINED)
        if lora is not None:
            save_adapter(TRAINED / ADAPTER, weights, projector, params, made_of["weights_hash"])
        processor.save_pretrained(TRAINED)
        sealed.write_folder(TRAINED / TRAINING_FILE, made_of, [REPORTS / "train.json"])
        rate = {"train_questions_per_second": result.metrics["train_samples_per_second"]}
        rate |= {"train_minutes": result.metrics["train_runtime"] / 60, "train_loss": result.training_loss}
        run.log_metrics(rate | {"peak_memory_gib": peak_memory_gib(arguments.device)}, trainer.state.global_step)
        run.log_weights(TRAINED, made_of["weights_hash"])
        for name, place in (("train.json", ""), ("train_curve.csv", ""), ("validation", "/validation")):
            run.log_artifact(REPORTS / name, f"reports{place}")
    checkpoint_files.remove_all(folder)


def report(trainer: VqaTrainer, data: QuestionDataset, picture: AnswersPicture | None) -> None:
    """Write what DVC tracks: only figures that a second run repeats exactly."""
    REPORTS.mkdir(exist_ok=True)
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    last_tenth = losses[-max(len(losses) // 10, 1) :]
    report = {
        "first_logged_loss": losses[0],
        "last_logged_loss": losses[-1],
        "mean_loss_of_last_tenth": sum(last_tenth) / len(last_tenth),
        "steps": trainer.state.global_step,
        "kept_step": trainer.kept_step,
        "kept_because": trainer.kept_because,
        "questions": len(data),
        "dropped_questions": data.dropped,
    }
    # What stands there may be a hard link into DVC's cache: remove it, never write through it.
    (REPORTS / "train.json").unlink(missing_ok=True)
    shutil.rmtree(REPORTS / "validation", ignore_errors=True)
    (REPORTS / "validation").mkdir()
    if picture is not None:
        kept = next(one for one in reversed(validations(history)) if one["step"] <= trainer.kept_step)
        report["validation"] = {name: kept[name] for name in COLUMNS if name in kept}
        write_curve(history, REPORTS / "validation" / "curve.csv", SCORE, COLUMNS)
        picture.draw(history).save(REPORTS / "validation" / "answers.png")
    write_json(REPORTS / "train.json", report)
    write_curve(history, REPORTS / "train_curve.csv", "loss", CURVE_COLUMNS)


if __name__ == "__main__":
    entrypoint.run("train", main)
