"""A run made again from a training's outputs and reports alone, as after `dvc pull`; its whole purpose, so it raises."""

import csv
import json
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from vlm_vqa.errors import UserError
from vlm_vqa.params import load_params
from vlm_vqa.secrets import without_secrets
from vlm_vqa.tracking import group, registry
from vlm_vqa.tracking.describe import evaluation_metrics, identity, numbers, reason
from vlm_vqa.tracking.store import Store, checkout_root, tracking_uri

TRAINING_FILE = Path("models/trained/training.json")
REPORTS = Path("reports")
TRAIN_CURVE = REPORTS / "train_curve.csv"
VALIDATION_CURVE = REPORTS / "validation" / "curve.csv"
EVALUATION_REPORT = REPORTS / "evaluation.json"


def recreate_run(folder: str | Path = ".") -> tuple[str, bool]:
    """Records the model in `folder`'s outputs as an MLflow run, where no stage ran here or tracking had failed.

    Returns the run's id and whether anything had to be recorded: an existing run is given the scores it lacks. Raises
    UserError where outputs are missing or damaged, belong to other parameters, or the store fails.
    """
    folder = Path(folder)
    params = load_params(folder / "params.yaml")
    training = _read_json(folder / TRAINING_FILE)
    if changed := changed_params(folder):
        raise UserError(
            f"{folder / 'params.yaml'} is not what made these outputs ({', '.join(changed)} differ from dvc.lock):"
            " `git checkout params.yaml` records them, `dvc repro` makes new ones"
        )
    scores = _read_json(folder / EVALUATION_REPORT) if (folder / EVALUATION_REPORT).exists() else None
    uri = tracking_uri(checkout_root(folder))
    try:
        store = Store(params, checkout_root(folder))
        run = store.find(training["weights_hash"], params.hash())
        run_id = run.info.run_id if run else recreate(store, training["weights_hash"], folder)
        registered = registry.register(store, run_id, folder, training["weights_hash"])
        lacks_scores = scores is not None and (registered or not (run and "evaluated" in run.data.tags))
        if lacks_scores:
            store.put_files(run_id, folder / REPORTS, REPORTS.name)
            put_scores(store, run_id, scores, folder)
        return run_id, run is None or registered or lacks_scores
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {without_secrets(uri)} does not take the run ({reason(error)}): make the store"
            " reachable and writable, or name another by MLFLOW_TRACKING_URI, then run `vlm-vqa track` again"
        ) from error


def put_scores(store: Store, run_id: str, report: Mapping[str, Any], folder: Path) -> None:
    """Adds an evaluation's scores to a run, to the registered export and to the figures of the run's parent, if any."""
    store.put_metrics(run_id, numbers(evaluation_metrics(report), 0), **registry.subject(store, folder))
    store.put_tags(run_id, {"evaluated": "true"})
    group.update(store, run_id)


def recreate(store: Store, weights_hash: str, folder: Path) -> str:
    """A run with the training's parameters, hashes, curves, weights and reports, as far as the outputs tell them.

    A run of the same training that lost the store before its end is completed; where there is none, one is made.
    """
    training, curve = _read_json(folder / TRAINING_FILE), _curve(folder / TRAIN_CURVE, "git checkout")
    if store.params.validation.questions:
        curve += _curve(folder / VALIDATION_CURVE, "dvc pull")
    hashes = {name: training[name] for name in ("data_hash", "code_hash") if name in training}
    if len(hashes) == 2 and (lost := store.unfinished({"params_hash": store.params.hash(), **hashes})):
        run_id, recorded = lost.info.run_id, store.last_steps(lost)
        curve = [row for row in curve if row[2] > recorded.get(row[0], -1)]
        store.put_params(run_id, known=lost.data.params)
        tags = {"completed": "vlm-vqa track"}
    else:
        tags = identity(store.params) | hashes | {"recreated": "true"} | group.membership(store)
        tags["mlflow.source.name"] = "vlm-vqa track"
        tags["mlflow.note.content"] = "Recorded from the outputs: throughput, memory and machine are not known."
        run_id = store.create(tags)
    store.put_metrics(run_id, curve)
    store.put_files(run_id, folder / REPORTS, REPORTS.name)
    store.put_files(run_id, (folder / TRAINING_FILE).parent, "weights")
    # Last: by this hash a run is taken for a whole one.
    store.put_tags(run_id, {**tags, "weights_hash": weights_hash})
    store.client.set_terminated(run_id, "FINISHED")
    return run_id


def _curve(path: Path, brings: str) -> list[tuple[str, float, int, int]]:
    """The rows of a curve: a column `step` and one column a metric; empty cells and `nan` are left out."""
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            table = list(csv.DictReader(lines))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `{brings} {path}` or `dvc repro` brings it") from None
    rows = []
    for line in table:
        step = int(line.pop("step"))
        rows += numbers({name: float(text) for name, text in line.items() if text not in ("", "nan", None)}, step)
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `dvc pull` or `dvc repro` brings it") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): `vlm-vqa repair` brings it back") from error


def changed_params(folder: Path) -> list[str]:
    """Keys of `params.yaml` whose value differs from the one that `dvc.lock` notes for a stage."""
    from ruamel.yaml import YAML

    # As DVC reads both: to another parser 1e-5 here and 1e-05 there are two texts.
    read = YAML(typ="safe", pure=True).load
    lock = folder / "dvc.lock"
    if not lock.is_file():
        return ["all parameters"]

    now, changed = read(folder / "params.yaml"), set()
    for stage in (read(lock) or {}).get("stages", {}).values():
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            found = reduce(lambda at, name: at.get(name) if isinstance(at, dict) else None, key.split("."), now)
            if found != value:
                changed.add(key)
    return sorted(changed)
