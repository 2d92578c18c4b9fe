"""The whole evaluation of an exported model: HELM's run, VQA or answer accuracy, the baselines, and the report."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.data.records import load_questions, metric_of, read_manifest
from vlm_vqa.errors import UserError, make_again
from vlm_vqa.evaluation.baselines import QuestionOnlyBaseline, shuffled_images
from vlm_vqa.evaluation.bleu import mean_bleu_1, prepare_punkt
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
from vlm_vqa.evaluation.vqa_accuracy import METRICS, Accuracy, accuracy
from vlm_vqa.hashing import write_json
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.params import EvaluationParams, Params

RECORDS, FEATURES, EXPORT, REPORTS = map(Path, ("data/records", "data/features", "models/export", "reports"))
LEAST_AGREEMENT = 0.99
"""HELM sees pixels, accuracy is counted from stored features: fewer equal answers, but for one, are no rounding."""

_DIGITS = 6

log = logging.getLogger(__name__)

Row = Mapping[str, Any]


def evaluate(
    params: Params, load_predictor: Callable[..., Predictor] = Predictor.from_export
) -> tuple[dict[str, Any], list[Path]]:
    """Evaluate the exported model; return the report, and the files written into the reports: `evaluation.json`,
    `metrics.json` (a few of its figures, for DVC), `predictions.parquet`, `helm/` and `helm_predictions.parquet`.

    Args:
        params: `evaluation`, `prompt.instruction` and `seed` count.
        load_predictor: (folder, max_new_tokens=) -> the model that answers from features; HELM's client loads its own.

    UserError if something is missing or does not fit; as far as it can be known, before any inference.
    """
    environment = prepare_punkt(params.evaluation.punkt_tab, CONFIG / "nltk_data")
    validation = load_questions(RECORDS, "val").to_list()
    questions, at_helm = _choose(validation, params.evaluation)
    counted = ["question", "question_type", "answers"]
    prior = QuestionOnlyBaseline(load_questions(RECORDS, "train").select_columns(counted))
    others = shuffled_images((row["image_id"] for row in questions), params.seed)
    manifest = read_manifest(RECORDS)
    metric = metric_of(manifest)
    store = FeatureStore(FEATURES, {"data_hash": manifest["data_hash"]})

    helm = _ask_helm([questions[at] for at in at_helm], params.evaluation, environment)
    predictor = load_predictor(EXPORT, max_new_tokens=params.evaluation.max_new_tokens)
    size = params.evaluation.batch_size
    answers = answer_questions(predictor, store, questions, size, "questions")
    blind = {
        "prior": [prior.answer(row["question"], row["question_type"]) for row in questions],
        "shuffled_images": answer_questions(predictor, store, questions, size, "questions with other images", others),
    }
    agreement = _check_agreement(helm.predictions, [answers[at] for at in at_helm])
    scored = _accuracy(metric, questions, answers)
    report = {
        "helm": {name: round(helm.scores[name], _DIGITS) for name in SCORES} | {"instances": len(at_helm)},
        metric: {
            "overall": round(scored.overall, _DIGITS),
            "per_answer_type": {name: round(value, _DIGITS) for name, value in scored.per_answer_type.items()},
            "questions": len(questions),
        },
        "baselines": {name: _score_baseline(metric, questions, given, at_helm) for name, given in blind.items()},
        "model": {"mask": predictor.mask, "weights_hash": predictor.weights_hash} | predictor.selection,
        "helm_equals_stored_features": round(agreement, _DIGITS),
    }
    names = ("question_id", "image_id", "question", "question_type", "answer_type", "answers")
    table = {name: [row[name] for row in questions] for name in names} | {
        "prediction": answers,
        {"vqa_accuracy": "score"}.get(metric, metric): [scored.per_question[row["question_id"]] for row in questions],
        "shuffled_image_id": [others[row["image_id"]] for row in questions],
        "prediction_shuffled": blind["shuffled_images"],
        "prediction_prior": blind["prior"],
    }
    files = _write(metric, report, pa.table(table))
    files += write_extract(REPORTS / "helm", helm, [questions[at] for at in at_helm])
    return report, files


def answer_questions(
    predictor: Predictor,
    store: FeatureStore,
    questions: Sequence[Row],
    batch_size: int,
    what: str,
    image_of: Mapping[int, int] | None = None,
) -> list[str]:
    """Answer every question from stored features, in batches that keep an image's questions together.

    Args:
        questions: rows with `question_id`, `image_id`, `question`; answers come in their order.
        what: stands beside the progress bar.
        image_of: the image to show instead of a question's own, by image id.
    """
    order = sorted(range(len(questions)), key=lambda at: (questions[at]["image_id"], questions[at]["question_id"]))
    answers = [""] * len(questions)
    with tqdm(total=len(questions), desc=what, unit="answer", mininterval=1) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            own = [questions[at]["image_id"] for at in batch]
            shown = own if image_of is None else [image_of[image_id] for image_id in own]
            distinct, rows = np.unique(shown, return_inverse=True)
            asked = [questions[at]["question"] for at in batch]
            given = predictor.answer_features(asked, store.batch(distinct.tolist()), rows.tolist())
            for at, answer in zip(batch, given, strict=True):
                answers[at] = answer
            bar.update(len(batch))
    return answers


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
    ours = mean_bleu_1(results.predictions, [row["answers"] for row in questions])
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


def _accuracy(metric: str, questions: Sequence[Row], answers: Sequence[str]) -> Accuracy:
    ids = [row["question_id"] for row in questions]
    return accuracy(dict(zip(ids, answers, strict=True)), questions, METRICS[metric])


def _score_baseline(
    metric: str, questions: Sequence[Row], answers: Sequence[str], at_helm: Sequence[int]
) -> dict[str, float]:
    """Accuracy over all questions, BLEU-1 over HELM's instances: each as the model's own."""
    bleu = mean_bleu_1([answers[at] for at in at_helm], [questions[at]["answers"] for at in at_helm])
    return {metric: round(_accuracy(metric, questions, answers).overall, _DIGITS), "bleu_1": round(bleu, _DIGITS)}


def _write(metric: str, report: Mapping[str, Any], predictions: pa.Table) -> list[Path]:
    REPORTS.mkdir(exist_ok=True)
    # What DVC prints: few and short.
    name = metric.removeprefix("vqa_")
    metrics = {
        name: report[metric]["overall"],
        f"{name}_blind": report["baselines"]["prior"][metric],
        f"{name}_shuffled": report["baselines"]["shuffled_images"][metric],
        "bleu_1": report["helm"]["bleu_1"],
    }
    files = [REPORTS / name for name in ("evaluation.json", "metrics.json", "predictions.parquet")]
    write_json(files[0], report)
    write_json(files[1], metrics)
    write_table(predictions, files[2])
    return files
