"""What a stage tells MLflow. Never raising: whatever fails is told once, by one warning, and the work goes on."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_vqa.params import Params
from vlm_vqa.secrets import without_secrets
from vlm_vqa.tracking import group, registry
from vlm_vqa.tracking.describe import identity, numbers, reason, surroundings
from vlm_vqa.tracking.recreate import put_scores, recreate
from vlm_vqa.tracking.store import Store, checkout_root, tracking_uri, view_url

log = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIES = 60.0  # after a failed write of metrics; doubles each time


class TrainingRun:
    """The MLflow run of a training in progress; made by `training_run`. No method raises.

    Metrics that the store does not take are kept and sent again later, at the latest when the run ends.
    """

    def __init__(
        self, store: Store | None = None, run_id: str | None = None, recorded: Mapping[str, int] | None = None
    ):
        self.run_id = run_id
        self._store = store
        self._recorded = dict(recorded or {})  # last step of each metric before a resume
        self._unsent: list[tuple[str, float, int, int]] = []
        self._next_try = 0.0
        self._pause = SECONDS_BETWEEN_TRIES
        self._warned = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Numbers of one optimizer step; not repeated where an interrupted part of this run has recorded the step."""
        if self._store is None:
            return
        self._unsent += [row for row in numbers(metrics, step) if step > self._recorded.get(row[0], -1)]
        if time.monotonic() >= self._next_try:
            self._send()

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file, or a folder with all below it; above `tracking.max_artifact_mib` by reference."""
        self._attempt(lambda store, run_id: store.put_files(run_id, path, folder))

    def log_image(self, image: Any, file: str) -> None:
        """A picture of Pillow's as the artifact `file`; one of that name is replaced.

        Left out while the store takes no metrics: a training is not to wait for it twice.
        """
        if not self._unsent:
            self._attempt(lambda store, run_id: store.client.log_image(run_id, image, file))

    def log_weights(self, path: str | Path, weights_hash: str) -> None:
        """The trained weights, under `weights/`, and their hash as the tag by which later stages find this run."""
        self.set_tags({"weights_hash": weights_hash})
        self.log_artifact(path, "weights")

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._attempt(lambda store, run_id: store.put_tags(run_id, tags))

    def fail(self, reason: str) -> None:
        """Mark the run as failed where no exception can: this process is about to be ended."""
        self.set_tags({"failure": reason})
        self._end("FAILED")

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        done = kind is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        self._end("FINISHED" if done else "FAILED" if isinstance(error, Exception) else "KILLED")

    def _end(self, status: str) -> None:
        self._send()
        self._attempt(lambda store, run_id: store.client.set_terminated(run_id, status))

    def _send(self) -> None:
        if self._unsent and self._attempt(lambda store, run_id: store.put_metrics(run_id, self._unsent)):
            self._unsent = []
            self._pause = SECONDS_BETWEEN_TRIES
        elif self._unsent:
            self._next_try = time.monotonic() + self._pause
            self._pause *= 2

    def _attempt(self, action: Callable[[Store, str], None]) -> bool:
        if self._store is None or self.run_id is None:
            return False
        try:
            action(self._store, self.run_id)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong with the record, the training is worth more
            if not self._warned:
                _warn(self._store.uri, error)
            self._warned = True
            return False
        return True


def training_run(params: Params, *, key: str, tags: Mapping[str, str], source: str = "stages/train.py") -> TrainingRun:
    """The MLflow run for a training; a context manager. Never raises. On other ranks than 0 it records nothing.

    `key` names the checkpoints' folder: an unfinished run with the same key is continued, its parameters and recorded steps
    kept. `tags` are the hashes of data and code (`data_hash`, `code_hash`). The run ends as FAILED by an exception, as
    KILLED by Ctrl-C or a SystemExit such as SIGTERM's.
    """
    if os.environ.get("RANK", "0") != "0":
        return TrainingRun()
    root = checkout_root()
    try:
        store = Store(params, root)
        everything = identity(params) | surroundings() | dict(tags)
        everything |= {"checkpoint_key": key, "mlflow.source.name": source} | group.membership(store)
        run = store.unfinished({"checkpoint_key": key})
        run_id = run.info.run_id if run else store.create(everything)
        if run:
            store.client.update_run(run_id, status="RUNNING")
            store.put_params(run_id, known=run.data.params)
            store.put_tags(run_id, everything)
        log.info("%sMLflow run %s (%s)", "continuing " if run else "", run_id, without_secrets(store.uri))
        return TrainingRun(store, run_id, store.last_steps(run) if run else None)
    except Exception as error:  # noqa: BLE001
        _warn(tracking_uri(root), error)
        return TrainingRun()


def log_results(
    params: Params, *, weights_hash: str, files: Iterable[str | Path] = (), report: Mapping[str, Any] | None = None
) -> None:
    """Adds what a later stage made of the weights to the run that trained them. Never raises.

    The scores of an evaluation's `report` (see `evaluation_metrics`), and its `files` under their own folders; without
    one, an exported model's files, under `export/`, and the export as a version of the registered model.
    """
    root = checkout_root()
    try:
        store = Store(params, root)
        run = store.find(weights_hash, params.hash())
        run_id = run.info.run_id if run else recreate(store, weights_hash, Path("."))
        for path in files:
            store.put_files(run_id, path, os.path.relpath(Path(path).parent) if report else "export")
        if report:
            put_scores(store, run_id, report, Path("."))
        else:
            store.put_tags(run_id, {"exported": "true"})
            registry.register(store, run_id, Path("."), weights_hash)
        url = view_url(store.uri, store.experiment_id)
        log.info("recorded in MLflow; compare runs (`mlflow ui`; MLFLOW_PORT names another port) at %s", url)
    except Exception as error:  # noqa: BLE001
        _warn(tracking_uri(root), error)


def _warn(uri: str, error: Exception) -> None:
    log.warning(
        "MLflow at %s does not take this run (%s); going on without it. Nothing is lost: make the store reachable and"
        " writable (MLFLOW_TRACKING_URI names it), then `vlm-vqa track` records the run from its outputs.",
        without_secrets(uri),
        reason(error),
    )
