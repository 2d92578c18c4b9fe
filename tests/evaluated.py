"""What an evaluation leaves, made up: reports of a model that is right where it is told to be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from proofs.project import ROOT, with_changes
from tests.evaluation.conftest import question_rows
from vlm_vqa.evaluation.helm.files import write_table
from vlm_vqa.evaluation.vqa_accuracy import METRICS

WRONG = "<script>alert('no')</script> | `x`"
IMAGES = 150
"""With two questions each, of which one has markup in it."""


def drawn(share: float, seed: int = 0, images: int = IMAGES) -> np.ndarray:
    """Draw which questions are right."""
    return np.random.default_rng(seed).random(2 * images) < share


def write_evaluated(root: Path, right: np.ndarray, weights: str = "w", metric: str = "vqa_accuracy", **changes) -> None:
    """Write params.yaml, with `changes` by full names ("__" for "."), and reports/ as helm-eval would."""
    rows = question_rows(len(right) // 2, 500)
    answers = {
        "prediction": [row["answers"][0] if good else WRONG for row, good in zip(rows, right, strict=True)],
        "prediction_shuffled": ["red"] * len(rows),
        "prediction_blank": ["blue"] * len(rows),
        "prediction_prior": ["yes" if row["answer_type"] == "yes/no" else "red" for row in rows],
    }
    names = ("question_id", "image_id", "question", "question_type", "answer_type", "answers")
    predictions = {name: [row[name] for row in rows] for name in names} | answers
    scores = [METRICS[metric](said, row["answers"]) for said, row in zip(answers["prediction"], rows, strict=True)]
    # HELM has asked every other one.
    bleu = [float(good) if at % 2 == 0 else None for at, good in enumerate(right)]
    table = {name: predictions[name] for name in ("question_id", "image_id", "question", "prediction")}
    reports = root / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    write_table(pa.table(predictions), reports / "predictions.parquet")
    bleu_1 = {"bleu_1": pa.array(bleu, pa.float64())}
    write_table(pa.table(table | {"accuracy": scores} | bleu_1), reports / "scores.parquet")
    report = {
        metric: {"overall": float(np.mean(scores)), "questions": len(rows)},
        "helm": {"bleu_1": float(right[::2].mean()), "instances": len(right[::2])},
        "model": {"weights_hash": weights * 64, "mask": "causal"},
    }
    (reports / "evaluation.json").write_text(json.dumps(report))
    values = yaml.safe_load((ROOT / "presets/small.yaml").read_text())
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    (root / "params.yaml").write_text(yaml.safe_dump(with_changes(values, changes), sort_keys=False))
    if not (root / "evaluation/helm/nltk_data").exists():
        shutil.copytree(ROOT / "evaluation/helm/nltk_data", root / "evaluation/helm/nltk_data")
