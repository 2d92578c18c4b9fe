"""The experiments that DVC makes from one commit: children of one parent run, which shows the spread of their scores.

A recipe is what made a run, but for the seed: parameters, data, code. What fails here is mended by the next evaluation.
"""

import contextlib
import csv
import io
import logging
import os
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

from vlm_vqa.secrets import without_secrets
from vlm_vqa.tracking.describe import identity, numbers, reason
from vlm_vqa.tracking.store import Store

log = logging.getLogger(__name__)

CHILD, PARENT, LINK = "dvc_baseline", "parent_of_dvc_baseline", "mlflow.parentRunId"  # tags: commit, commit, run id
HASHES = ("data_hash", "code_hash")
SCORES = ("vqa_accuracy", "answer_accuracy", "bleu_1", "validation_score")
MOST = 5000  # runs in one answer of MLflow
TRIES = 4

Recipe = frozenset[tuple[str, str]]
Scores = Mapping[Recipe, Mapping[str, Mapping[str, float]]]  # by recipe, seed and name


def membership(store: Store) -> dict[str, str]:
    """Tags of a run that DVC makes as an experiment, its parent's id among them; none in a plain `dvc repro`."""
    baseline = os.environ.get("DVC_EXP_BASELINE_REV")
    return _update(store, baseline) if baseline else {}


def update(store: Store, run_id: str) -> None:
    """Writes the parent's figures again after `run_id` was evaluated; nothing where that has no parent."""
    if baseline := store.client.get_run(run_id).data.tags.get(CHILD):
        _update(store, baseline)


def _update(store: Store, baseline: str) -> dict[str, str]:
    """Brings the parent of `baseline` up to date; returns its children's tags. Never raises."""
    tags, written = {CHILD: baseline}, None
    try:
        for tries_left in reversed(range(TRIES)):
            children = store.search(f"tags.{CHILD} = '{baseline}'", MOST)
            found = parent, scores = _parent(store, baseline, children), _scores(store, children)
            tags[LINK] = parent
            # Another worker may write at the same time what it had read before: who writes looks once more.
            if not scores or found == written:
                break
            try:
                _write(store, baseline, parent, scores)
                written = found
            except Exception:  # another worker may just have removed this parent
                if not tries_left:
                    raise
    except Exception as error:  # noqa: BLE001
        uri, why = without_secrets(store.uri), reason(error)
        log.warning("MLflow at %s does not take these runs' parent (%s); the next evaluation tries again", uri, why)
    return tags


def _parent(store: Store, baseline: str, children: list[Any]) -> str:
    """Finds or makes the one parent and links all children to it; returns its id."""
    if not store.search(f"tags.{PARENT} = '{baseline}'", 1):
        tags = {key: text for key, text in identity(store.params).items() if key.startswith("mlflow.")}
        tags |= {PARENT: baseline, "mlflow.source.name": "dvc exp run", "mlflow.source.git.commit": baseline}
        made = store.client.create_run(store.experiment_id, tags=tags, run_name=f"seeds of {baseline[:7]}")
        store.client.set_terminated(made.info.run_id, "FINISHED")
    # Two workers may start at once and make one each: both choose the same.
    first, *others = sorted(
        store.search(f"tags.{PARENT} = '{baseline}'", MOST), key=lambda run: (run.info.start_time, run.info.run_id)
    )
    for run in children:
        if run.data.tags.get(LINK) != first.info.run_id:
            store.put_tags(run.info.run_id, {LINK: first.info.run_id})
    for run in others:
        with contextlib.suppress(Exception):  # the other worker has removed it
            store.client.delete_run(run.info.run_id)
    return first.info.run_id


def _scores(store: Store, children: list[Any]) -> Scores:
    """The scores of the children's recipes in the order of the runs; of two runs with one seed the newest counts.

    Runs of the same recipes count wherever they stand: DVC runs nothing for what dvc.lock or its run cache has.
    """
    found = {run.info.run_id: run for run in children if "evaluated" in run.data.tags}
    recipes = {_recipe(run) for run in found.values()}
    for made_of in {tuple(run.data.tags.get(name, "") for name in HASHES) for run in found.values()}:
        same = [f"tags.{name} = '{text}'" for name, text in zip(HASHES, made_of, strict=True)]
        alike = store.search(" and ".join(["tags.evaluated = 'true'", *same]), MOST)
        found |= {run.info.run_id: run for run in alike if _recipe(run) in recipes}
    scores: dict[Recipe, dict[str, dict[str, float]]] = {}
    for run in sorted(found.values(), key=lambda run: run.info.start_time):
        values = {name: run.data.metrics[name] for name in SCORES if name in run.data.metrics}
        scores.setdefault(_recipe(run), {})[run.data.params.get("seed", "")] = values
    return scores


def _recipe(run: Any) -> Recipe:
    made_of = run.data.params | {name: run.data.tags[name] for name in HASHES if name in run.data.tags}
    return frozenset((key, text) for key, text in made_of.items() if key != "seed" and not key.startswith("tracking."))


def _figures(seeds: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """`{"seeds": 3, "bleu_1_mean": 0.9, ...}` of one recipe; sd is that of a sample (n - 1), empty for one seed."""
    figures: dict[str, Any] = {"seeds": len(seeds)}
    for name in SCORES:
        if values := [scores[name] for scores in seeds.values() if name in scores]:
            figures |= {f"{name}_mean": mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else ""}
            figures |= {f"{name}_min": min(values), f"{name}_max": max(values)}
    return figures


def _write(store: Store, baseline: str, parent: str, scores: Scores) -> None:
    """The parent's table and name, and its metrics where the runs differ in nothing but the seed."""
    differing = sorted({key for recipe in scores for key, _ in recipe - frozenset.intersection(*scores)})
    rows = [{key: dict(recipe).get(key, "") for key in differing} | _figures(scores[recipe]) for recipe in scores]
    text = io.StringIO()
    table = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    store.client.log_text(parent, text.getvalue(), "summary.csv")
    runs = sum(map(len, scores.values()))
    name = f"{baseline[:7]}: {runs} run{'s' if runs > 1 else ''}"
    name = f"{len(scores)} recipes of {name}" if len(scores) > 1 else f"seeds of {name}"
    # MLflow forgets no metric: of several recipes those of one are not a number any more.
    metrics = dict.fromkeys(store.client.get_run(parent).data.metrics, float("nan"))
    if len(scores) == 1 and runs > 1:
        metrics = {key: value for key, value in rows[0].items() if not key.endswith(("_min", "_max"))}
        means = {score: metrics[f"{score}_mean"] for score in SCORES if metrics.get(f"{score}_sd", "") != ""}
        name += "".join(f", {score} {value:.4f} ± {metrics[f'{score}_sd']:.4f}" for score, value in means.items())
    store.put_metrics(parent, numbers(metrics, 0))
    store.client.update_run(parent, status="FINISHED", name=name)
