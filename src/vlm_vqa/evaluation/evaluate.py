"""The whole evaluation of an exported model: HELM's run, VQA or answer accuracy, the baselines, and the report."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from vlm_vqa import cores
from vlm_vqa.data import feature_store
from vlm_vqa.data.records import load_questions, metric_of, read_manifest
from vlm_vqa.errors import UserError, make_again
from vlm_vqa.evaluation.answering import KEPT_ANSWERS, Ask, KeptAnswers, answer_asks
from vlm_vqa.evaluation.baselines import QuestionOnlyBaseline, shuffled_images
from vlm_vqa.evaluation.bleu import bleu_1, prepare_punkt
from vlm_vqa.evaluation.helm.files import (
    SCORES,
    HelmResults,
    helm_order,
    pick_instances,
    read_results,
    write_extract,
    write_scenario,
    write_table,
)
from vlm_vqa.evaluation.helm.run import CONFIG, RESULTS, SCENARIO, run_helm
from vlm_vqa.evaluation.report import write_report
from vlm_vqa.evaluation.score_table import BLIND, MODEL, compared, rounded
from vlm_vqa.evaluation.vqa_accuracy import METRICS, score_people
from vlm_vqa.features.live import open_features
from vlm_vqa.hashing import code_hash, sha256_file, write_json
from vlm_vqa.inference.predictor import FACTS_FILE, Candidate, Predictor
from vlm_vqa.params import EvaluationParams, Params
from vlm_vqa.workers import WorkerGroup, alone

RECORDS, FEATURES, EXPORT, REPORTS = map(Path, ("data/records", "data/features", "models/export", "reports"))
LEAST_AGREEMENT = 0.99
"""HELM sees pixels, accuracy is counted from stored features: fewer equal answers, but for one, are no rounding."""

PROBABILITY_DIGITS = 6

KEPT = Path("data/answers.parts")  # until the stage has ended

log = logging.getLogger(__name__)

Row = Mapping[str, Any]


def evaluate(
    params: Params,
    load_predictor: Callable[..., Predictor] = Predictor.from_export,
    running: WorkerGroup | None = None,
) -> tuple[dict[str, Any], list[Path]]:
    """Evaluate the exported model; return the report, and the files written into the reports: `evaluation.json`, a few of
    its figures for DVC, `predictions.parquet`, what git keeps of it, HELM's, and what people read (`report.write_report`).

    Args:
        params: `evaluation`, `prompt.instruction` and `seed` count.
        load_predictor: (folder, device=, max_new_tokens=, dtype=) -> the model of the features; HELM's client has its own.
        running: by default this process alone. The others of a launch `take_part`, HELM's time included.

    UserError if something is missing or does not fit; as far as it can be known, before any inference.
    """
    running = running or alone()
    environment = prepare_punkt(params.evaluation.punkt_tab, CONFIG / "nltk_data")
    asked = _Asked(params)
    questions, at_helm, metric = asked.questions, asked.at_helm, metric_of(asked.manifest)
    counted = ["image_id", "question", "question_type", "answers"]
    training = load_questions(RECORDS, "train").select_columns(counted).to_list()
    prior = QuestionOnlyBaseline(training, score_of=METRICS[metric])
    instances = [questions[at] for at in at_helm]
    kept = _keep(params, asked, running)
    # What HELM's client learns of us.
    environment |= {KEPT_ANSWERS: str(kept.folder), cores.VARIABLE: str(running.threads.count)}
    helm = _ask_helm(instances, params.evaluation, environment)
    predictor, found = _answer_all(params, load_predictor, asked, running, kept)
    given = asked.given(found, prior)
    agreement = _check_agreement(helm.predictions, [given[MODEL][at] for at in at_helm])
    truths = [row["answers"] for row in questions]
    scores = {who: list(map(METRICS[metric], answers, truths)) for who, answers in given.items()}
    bleu = {who: [bleu_1(answers[at], truths[at]) for at in at_helm] for who, answers in given.items()}
    tables = compared({metric: (scores, questions), "bleu_1": (bleu, instances)})
    own = tables["intervals"][metric][MODEL]
    report = {
        "helm": {name: helm.scores[name] for name in SCORES} | {"instances": len(at_helm)},
        metric: {
            "overall": own["overall"]["mean"],
            "per_answer_type": {name: one["mean"] for name, one in own["per_answer_type"].items()},
            "questions": len(questions),
            "empty_answers": _count_empty(given[MODEL]),
        },
        "prior": _describe(prior, training, questions),
        "model": {"mask": predictor.mask, "weights_hash": predictor.weights_hash} | predictor.selection,
        "helm_equals_stored_features": agreement,
    }
    if metric == "vqa_accuracy":
        report["people"] = sum(map(score_people, truths)) / len(questions)
    report = rounded(report | tables)
    predictions = _predictions(asked, given, metric, scores[MODEL], found)
    at_question = dict(zip(at_helm, bleu[MODEL], strict=True))
    table = predictions.select(["question_id", "image_id", "question", "prediction"])
    table = table.append_column("accuracy", pa.array(scores[MODEL], pa.float64()))
    table = table.append_column("bleu_1", pa.array(map(at_question.get, range(len(questions))), pa.float64()))
    files = _write(metric, report, {"predictions": predictions, "scores": table})
    files += write_extract(REPORTS / "helm", helm, instances)
    files += write_report(REPORTS, report, predictions, RECORDS, _run(params, report["model"], asked.manifest))
    kept.remove()
    return report, files


def take_part(
    params: Params, running: WorkerGroup, load_predictor: Callable[..., Predictor] = Predictor.from_export
) -> None:
    """Answer beside the main process, which evaluates: it says where answers are kept once it has checked everything."""
    kept = KeptAnswers(Path(running.wait_for("kept")))
    _answer_all(params, load_predictor, _Asked(params), running, kept)


class _Asked:
    """What is asked: the same in all processes."""

    def __init__(self, params: Params):
        """UserError if records or features are missing, or not of each other."""
        self.manifest = read_manifest(RECORDS)
        self.questions, self.at_helm = _choose(load_questions(RECORDS, "val").to_list(), params.evaluation)
        self.others = shuffled_images((row["image_id"] for row in self.questions), params.seed)
        self.features = feature_store.read_manifest(FEATURES, {"data_hash": self.manifest["data_hash"]})
        self.own = [Ask(row["image_id"], row["question"]) for row in self.questions]
        self.borrowed = [Ask(self.others[row["image_id"]], row["question"]) for row in self.questions]
        self.blank = [Ask(None, row["question"]) for row in self.questions]

    def given(self, found: Mapping[Ask, Candidate], prior: QuestionOnlyBaseline) -> dict[str, list[str]]:
        """Return what model and baselines answer, in the questions' order."""
        return {
            MODEL: [found[ask].answer for ask in self.own],
            BLIND: [prior.answer(row["question"], row["question_type"]) for row in self.questions],
            "shuffled_images": [found[ask].answer for ask in self.borrowed],
            "blank_image": [found[ask].answer for ask in self.blank],
        }


def _keep(params: Params, asked: _Asked, running: WorkerGroup) -> KeptAnswers:
    """Open what is kept of the answers that this model, these data, parameters, code and device give; tell all where."""
    device, export = running.device, EXPORT / FACTS_FILE
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    decided_by = {
        # It names every file of the export by hash; where there is none, nothing will be answered.
        "export": sha256_file(export) if export.is_file() else None,
        "records": asked.manifest,
        "features": asked.features,
        "params": params.as_dict()["evaluation"] | {"launch": None},
        "code": [code_hash(__file__), code_hash(Path(__file__).with_name("helm") / "client.py")],
        "computed_by": [name, torch.__version__],
    }
    kept = KeptAnswers.begin(KEPT, decided_by)
    running.broadcast("kept", str(kept.folder))
    return kept


def _answer_all(
    params: Params, load_predictor: Callable[..., Predictor], asked: _Asked, running: WorkerGroup, kept: KeptAnswers
) -> tuple[Predictor, dict[Ask, Candidate]]:
    """Answer everything from features, together with the other processes; return the model and, in the main one, answers."""
    how = params.evaluation
    dtype = getattr(torch, how.compute_dtype.value)
    predictor = load_predictor(EXPORT, device=str(running.device), max_new_tokens=how.max_new_tokens, dtype=dtype)
    every = [*asked.own, *asked.borrowed, *asked.blank]
    what = "questions, of their image, another and a grey one"
    features = open_features(FEATURES, {"data_hash": asked.manifest["data_hash"]}, RECORDS, predictor)
    return predictor, answer_asks(every, predictor, features, how.batch_size, what, running, kept)


def _predictions(
    asked: _Asked, given: Mapping[str, list[str]], metric: str, scores: list[float], found: Mapping[Ask, Candidate]
) -> pa.Table:
    names = ("question_id", "image_id", "question", "question_type", "answer_type", "answers")
    table = {name: [row[name] for row in asked.questions] for name in names} | {
        "prediction": given[MODEL],
        "probability": [round(found[ask].probability, PROBABILITY_DIGITS) for ask in asked.own],
        {"vqa_accuracy": "score"}.get(metric, metric): scores,
        "shuffled_image_id": [asked.others[row["image_id"]] for row in asked.questions],
        "prediction_shuffled": given["shuffled_images"],
        "prediction_blank": given["blank_image"],
        "prediction_prior": given[BLIND],
    }
    return pa.table(table)


def _choose(validation: Sequence[Row], evaluation: EvaluationParams) -> tuple[list[Row], list[int]]:
    """Choose the questions to answer, in file order, and the places of HELM's instances among them, in HELM's order.

    `evaluation.vqa_questions` takes the first of HELM's own permutation, so that HELM's instances are among them.
    """
    picked = pick_instances(len(validation), evaluation.helm_instances)
    most = evaluation.vqa_questions
    if most is None or most >= len(validation):
        return list(validation), picked
    chosen = sorted(helm_order(len(validation))[:most].tolist())
    place = {position: at for at, position in enumerate(chosen)}
    return [validation[position] for position in chosen], [place[position] for position in picked]


def _ask_helm(questions: Sequence[Row], evaluation: EvaluationParams, environment: Mapping[str, str]) -> HelmResults:
    for folder in (SCENARIO, RESULTS):
        shutil.rmtree(folder, ignore_errors=True)
    write_scenario(SCENARIO, questions, RECORDS)
    run_helm(len(questions), evaluation.helm_threads, environment)
    results = read_results(RESULTS, questions)
    # The baselines' BLEU is ours: it must be HELM's measure.
    found = [bleu_1(said, row["answers"]) for said, row in zip(results.predictions, questions, strict=True)]
    ours = sum(found) / len(found)
    if abs(ours - results.scores["bleu_1"]) > 1e-6:
        raise UserError(
            f"HELM's bleu_1 is {results.scores['bleu_1']:.6f}, ours of the same answers {ours:.6f}. The installed HELM "
            "or nltk is not the pinned one: install the versions in constraints.txt."
        )
    return results


def _check_agreement(from_pixels: Sequence[str], from_features: Sequence[str]) -> float:
    """Return the share of equal answers, refusing less than rounding can explain; of few answers one may differ."""
    count = sum(one == other for one, other in zip(from_pixels, from_features, strict=True))
    equal = count / len(from_pixels)
    if equal < LEAST_AGREEMENT and count < len(from_pixels) - 1:
        raise UserError(
            f"only {equal:.1%} of HELM's answers, given from pixels, equal those from stored features. The features "
            "are not those of the exported model's encoder, or vision.store_dtype is too coarse. "
            f"{make_again('extract-features')} Or set vision.store_dtype and vision.compute_dtype to float32."
        )
    log.info("%.2f%% of HELM's answers equal those from stored features", 100 * equal)
    return equal


def _count_empty(answers: Sequence[str]) -> int:
    empty = sum(not answer for answer in answers)
    if empty:
        log.warning("%d of %d answers are empty: the model ends before it says anything", empty, len(answers))
    return empty


def _describe(prior: QuestionOnlyBaseline, training: Sequence[Row], questions: Sequence[Row]) -> dict[str, Any]:
    """Return how the baseline answers, and which share of the reported questions it was counted on."""
    counted = {(row["image_id"], row["question"]) for row in training}
    seen = sum((row["image_id"], row["question"]) in counted for row in questions) / len(questions)
    if seen:
        log.warning(
            "%.1f%% of the reported questions are training's too: all scores flatter, the baseline's most", 100 * seen
        )
    return {"way": prior.way, "cross_validated": prior.cross_validated, "counted_on_reported_questions": seen}


def _run(params: Params, model: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "weights": model["weights_hash"],
        "step": model["step"],
        "which is": model["step_is"],
        "selected on": model["selected_on"],
        "mask": model["mask"],
        "parameters of the training": params.training_hash(),
        "seed": params.seed,
        "data source": manifest.get("source"),
        "data": manifest["data_hash"],
    }


def _write(metric: str, report: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> list[Path]:
    REPORTS.mkdir(exist_ok=True)
    # What DVC prints: few and short.
    name = metric.removeprefix("vqa_")
    metrics = {
        name: report[metric]["overall"],
        f"{name}_blind": report["baselines"][BLIND][metric],
        f"{name}_shuffled": report["baselines"]["shuffled_images"][metric],
        "bleu_1": report["helm"]["bleu_1"],
    }
    metrics = {name: round(value, 6) for name, value in metrics.items()}
    files = [REPORTS / name for name in ("evaluation.json", "metrics.json", *(f"{name}.parquet" for name in tables))]
    write_json(files[0], report)
    write_json(files[1], metrics)
    for file, table in zip(files[2:], tables.values(), strict=True):
        write_table(table, file)
    return files
