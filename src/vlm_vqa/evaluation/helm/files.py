"""HELM's files: the scenario folder that its `vqa` run reads, and what to keep of the results that it writes."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vlm_vqa.data.records import images_of, said_answers
from vlm_vqa.errors import UserError, make_again
from vlm_vqa.hashing import hash_json, write_json
from vlm_vqa.sealed import SEAL

SCORES = ("bleu_1", "bleu_4", "exact_match", "quasi_exact_match", "quasi_prefix_exact_match", "f1_score", "rouge_l")
"""What the report holds of HELM's scores. Its cider is left out: here it is 0.0 whatever the answers."""
# What else of the statistics says something and is the same in every run; run times are not.
_COUNTS = ("num_instances", "num_references", "num_completions", "num_train_instances", "num_train_trials")
_VALID = "valid"


@dataclass(frozen=True)
class HelmResults:
    """Results of one run, instances in the order of the scenario's questions."""

    scores: dict[str, float]  # means by name, for `SCORES` and a few counts
    predictions: list[str]
    per_instance: list[dict[str, float]]  # scores of each instance by name, for `SCORES`
    run_spec: dict[str, Any]


def pick_instances(count: int, most: int) -> list[int]:
    """Return the positions of the questions that HELM's `-m most` would pick from `count`, in its order."""
    return helm_order(count)[:most].tolist() if count > most else list(range(count))


def helm_order(count: int) -> np.ndarray:
    """Return HELM's own permutation of `count` questions, [count] int: its picks are the first of it."""
    # `np.random.choice(count, most, replace=False)` after `np.random.seed(0)` is this permutation, cut.
    return np.random.RandomState(0).permutation(count)


def write_scenario(folder: Path, questions: Sequence[Mapping[str, Any]], records: Path) -> None:
    """Write VQAv2's layout as HELM's `vqa` scenario expects it below `folder`, which must not exist.

    Given no more questions than it may take, HELM takes them all and keeps their order. Images are the bytes of the
    records under the name that HELM asks for, so a PNG may be called .jpg; readers look at the content. UserError if an
    image of a question is not among the records.
    """
    # Existing files keep HELM from downloading.
    for split, rows in (("train", []), (_VALID, questions)):
        (folder / split / "images").mkdir(parents=True)
        write_json(folder / split / "questions.json", {"questions": [_question(row) for row in rows]})
        write_json(folder / split / "answers.json", {"annotations": [_annotation(row) for row in rows]})
    wanted = {row["image_id"] for row in questions}
    for image in tqdm(images_of(records, wanted), "images", len(wanted), unit="image", mininterval=1):
        (folder / _VALID / "images" / f"COCO_val2014_{image.image_id:012d}.jpg").write_bytes(image.data)


def read_results(suite: Path, questions: Sequence[Mapping[str, Any]]) -> HelmResults:
    """Read what HELM wrote about the questions of `write_scenario` into `suite`, its folder runs/SUITE.

    UserError if results are missing, or not about these questions.
    """
    found = sorted(suite.glob("*/scenario_state.json"))
    if len(found) != 1:
        raise UserError(f"{suite}: {len(found)} finished HELM runs instead of one. Run the helm-eval stage again.")
    run = found[0].parent
    states = json.loads(found[0].read_text())["request_states"]
    asked = [state["instance"]["input"]["multimedia_content"]["media_objects"][-1]["text"] for state in states]
    if asked != [row["question"] for row in questions]:
        raise UserError(f"{run}: HELM answered other questions than it was given. Run the helm-eval stage again.")
    per_instance = _per_instance_scores(json.loads((run / "per_instance_stats.json").read_text()))
    return HelmResults(
        scores=_mean_scores(json.loads((run / "stats.json").read_text()), len(questions)),
        # HELM scores the answer without outer blanks.
        predictions=[state["result"]["completions"][0]["text"].strip() for state in states],
        per_instance=[per_instance[state["instance"]["id"]] for state in states],
        run_spec=json.loads((run / "run_spec.json").read_text()),
    )


def write_extract(folder: Path, results: HelmResults, questions: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write what is the same in every run of the same model: scores and run specification into `folder`, and
    `<folder>_predictions.parquet`, a row an instance: question, answers, prediction and a column for each score."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        _question(row) | {"answers": list(row["answers"]), "prediction": prediction} | scores
        for row, prediction, scores in zip(questions, results.predictions, results.per_instance, strict=True)
    ]
    predictions = folder.with_name(f"{folder.name}_predictions.parquet")
    write_table(pa.Table.from_pylist(rows), predictions)
    contents = {"stats.json": results.scores, "run_spec.json": results.run_spec}
    for name, content in contents.items():
        write_json(folder / name, content)
    return [*(folder / name for name in contents), predictions]


def write_table(table: pa.Table, path: Path) -> None:
    """Write Parquet, equal tables as equal bytes, with a hash of the content for `read_table`. What stands there may be a
    hard link into DVC's cache: it is removed, never written through."""
    path.unlink(missing_ok=True)
    pq.write_table(table.replace_schema_metadata({SEAL: hash_json(table.to_pydict())}), path)


def read_table(path: Path | io.BytesIO, name: str = "") -> pa.Table:
    """Read what `write_table` wrote; UserError, with the path or the name given, if it is missing or damaged."""
    name = name or str(path)
    try:
        table = pq.read_table(path)
        intact = table.schema.metadata[SEAL.encode()].decode() == hash_json(table.to_pydict())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: cannot be read ({error}). {make_again('helm-eval')}") from error
    if not intact:
        raise UserError(f"{name}: damaged: its content is not what was sealed. {make_again('helm-eval')}")
    return table


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("question_id", "image_id", "question")}


def _annotation(row: Mapping[str, Any]) -> dict[str, Any]:
    # HELM's cider fails on a blank reference.
    said = enumerate(said_answers(row["answers"]), start=1)
    answers = [{"answer": answer, "answer_id": number} for number, answer in said]
    return {key: row[key] for key in ("question_id", "image_id", "question_type", "answer_type")} | {"answers": answers}


def _is_plain(name: Mapping[str, Any]) -> bool:
    """Tell a statistic from its copies: HELM repeats each as worst case over perturbations, of which there are none."""
    return name.get("split") == _VALID and "perturbation" not in name and "sub_split" not in name


def _mean_scores(stats: Iterable[Mapping[str, Any]], instances: int) -> dict[str, float]:
    """Return means by name; a name that occurs twice must say the same twice."""
    means: dict[str, float] = {}
    for stat in stats:
        name = stat["name"]["name"]
        if name not in SCORES + _COUNTS or not _is_plain(stat["name"]) or stat["count"] == 0:
            continue
        if means.setdefault(name, stat["mean"]) != stat["mean"]:
            raise UserError(f"HELM's stats.json has two values of {name}: {means[name]} and {stat['mean']}.")
    absent = [name for name in (*SCORES, "num_instances") if name not in means]
    if absent:
        raise UserError(f"HELM's stats.json has no {absent[0]}. The run specification is not `vqa` of HELM 0.5.16.")
    if means["num_instances"] != instances:
        raise UserError(f"HELM scored {means['num_instances']:.0f} instances instead of {instances}.")
    return means


def _per_instance_scores(entries: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {}
    for entry in entries:
        of_instance = scores.setdefault(entry["instance_id"], {})
        for stat in entry["stats"]:
            if stat["name"]["name"] in SCORES and _is_plain(stat["name"]):
                of_instance[stat["name"]["name"]] = stat["mean"]
    return scores
