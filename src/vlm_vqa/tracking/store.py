"""MLflow's store: where it is, how it is opened, and one experiment in it. Everything here raises what MLflow raises."""

import base64
import contextlib
import fcntl
import json
import logging
import os
import platform
import shlex
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from importlib import import_module
from pathlib import Path
from typing import Any

from vlm_vqa.hashing import sha256_file
from vlm_vqa.params import Params
from vlm_vqa.secrets import without_secrets
from vlm_vqa.tracking.describe import param_text, run_name

log = logging.getLogger(__name__)

ARTIFACTS = "mlartifacts"  # the folder beside a local store
VIEW = "scores"
VIEW_COLUMNS = [
    # MLflow shows no column of a metric that no run has.
    *(
        f"metrics.`{name}{of}`"
        for of in ("", "_low", "_high", "_mean", "_sd")
        for name in ("bleu_1", "vqa_accuracy", "answer_accuracy")
    ),
    "metrics.`loss`",
    *(f"metrics.`{name}`" for name in ("questions_per_second", "peak_memory_gib")),
    *(f"params.`train.{name}`" for name in ("batch_size", "learning_rate", "num_train_epochs", "optimizer")),
]
BATCH = 100  # MLflow's limit on parameters in one request
SECONDS_TO_OPEN = 60.0  # MLflow retries a silent database for minutes
SECONDS_QUIET = 15.0  # a half-made store that nobody has written to for so long is not being made any more


def checkout_root(start: str | Path | None = None) -> Path:
    """The folder of the user's checkout that `start` (default: the working directory) belongs to.

    DVC runs queued and `--temp` experiments in copies under `<root>/.dvc/tmp/exps/` and deletes them afterwards: inside
    such a copy this is `<root>`, not the copy. The path decides: DVC_ROOT may be left over from another repository.
    """
    here = Path(start or ".").resolve()
    checkout = next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), here)
    exps = (folder for folder in checkout.parents if folder.parts[-3:] == (".dvc", "tmp", "exps"))
    return next((folder.parents[2] for folder in exps), checkout)


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or `sqlite:///<root>/mlflow.db`, which is what `mlflow ui` shows when typed in `root`.

    A relative place in the variable is taken from `root`: from a DVC experiment's copy it would vanish with the copy.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    place = sqlite_file(uri)
    if place is not None:
        return f"sqlite:///{root / place}"
    return uri if "://" in uri or uri.startswith(("file:", "databricks")) else str(root / uri)


def sqlite_file(uri: str) -> Path | None:
    # What stands behind "?" may be anything: MLflow's affair.
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") and "?" not in uri else None


def prepare_client() -> None:
    """Before MLflow is imported: short waits, no usage statistics to a host that nobody here asked for, few lines."""
    # For an unreachable server, MLflow's default is 4 minutes a request; what the user has set stays.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow tells of making tables by a screenful of lines, urllib3 of each retry: our one warning says it all.
    for name in ("mlflow.store.db.utils", "mlflow.pyfunc", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Store:
    """One MLflow experiment. Every method raises on failure."""

    def __init__(self, params: Params, root: Path, *, wait: float = SECONDS_TO_OPEN):
        self.uri = tracking_uri(root)
        self.params = params
        self.largest = params.tracking.max_artifact_mib * 2**20
        self._database = sqlite_file(self.uri)
        prepare_client()
        # Imports take long on a slow disk, but end: they are no part of the limit.
        import_module("mlflow.store.tracking.sqlalchemy_store" if self._database else "mlflow")
        if self._database:
            _make_whole(self._database)
        self.client, self.experiment_id = _within(wait, self._open)

    def _open(self) -> tuple[Any, str]:
        from mlflow import MlflowClient, MlflowException

        database = self._database
        if database is not None:
            with _connected(database) as connection:
                connection.execute("BEGIN IMMEDIATE")  # fails at once where MLflow would retry for minutes
        client = MlflowClient(tracking_uri=self.uri)
        name = self.params.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            # MLflow's own default is the working directory: in a DVC experiment, a copy that is deleted.
            artifacts = (database.parent / ARTIFACTS).as_uri() if database is not None else None
            try:
                return client, client.create_experiment(name, artifacts, _experiment_tags())
            except MlflowException:
                # Two experiments of a DVC queue may start at once: the other one was faster.
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise ValueError(f"experiment {name!r} (tracking.experiment) is deleted there: restore or rename it")
        return client, experiment.experiment_id

    def search(self, condition: str, limit: int = 50) -> list[Any]:
        """Runs of this experiment, newest first."""
        newest = ["attributes.start_time DESC"]
        return list(self.client.search_runs([self.experiment_id], condition, max_results=limit, order_by=newest))

    def find(self, weights_hash: str, params_hash: str) -> Any | None:
        """The newest run that ended with these weights; not one that lost the store before its end."""
        ended = f"tags.weights_hash = '{weights_hash}' and attributes.status = 'FINISHED'"
        return next(iter(self.search(f"{ended} and tags.params_hash = '{params_hash}'", limit=1)), None)

    def unfinished(self, tags: Mapping[str, str]) -> Any | None:
        """The newest run with these tags that did not finish.

        One still marked as running counts only if it was this host's: on a shared server it may be alive elsewhere.
        """
        asked = [f"tags.{key} = '{text}'" for key, text in tags.items()]
        for run in self.search(" and ".join([*asked, "attributes.status != 'FINISHED'"])):
            if run.info.status != "RUNNING" or run.data.tags.get("machine.host") == platform.node():
                return run
        return None

    def create(self, tags: Mapping[str, str]) -> str:
        """A run with this store's parameters and `tags`; returns its id."""
        name = run_name(self.params, tags.get("dvc_experiment"))
        run_id = self.client.create_run(self.experiment_id, tags=dict(tags), run_name=name).info.run_id
        self.put_params(run_id, known={})
        if "data_hash" in tags:
            self._put_data(run_id, tags["data_hash"])
        return run_id

    def _put_data(self, run_id: str, data_hash: str) -> None:
        from mlflow import MlflowException
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = {key: value for key, value in self.params.flat().items() if key.startswith("data.")}
        name, digest = self.data_name(data_hash)
        data = Dataset(name, digest, "params.yaml", without_secrets(json.dumps(source)))
        inputs = [DatasetInput(data, [InputTag("mlflow.data.context", "training")])]
        try:
            self.client.log_inputs(run_id, inputs)
        except MlflowException:  # another of a queue's workers may have made this data set just now
            self.client.log_inputs(run_id, inputs)

    def data_name(self, data_hash: str) -> tuple[str, str]:
        """Name and digest of a data set in MLflow, which takes 36 characters of a digest."""
        return self.params.data.source.value, data_hash[:36]

    def put_params(self, run_id: str, known: Mapping[str, str], values: Mapping[str, Any] | None = None) -> None:
        """Logs what is not `known` yet of `values` (default: all): MLflow refuses another value for a logged one."""
        from mlflow.entities import Param

        values = self.params.flat() if values is None else values
        entries = [Param(key, param_text(value)) for key, value in values.items() if key not in known]
        for start in range(0, len(entries), BATCH):
            self.client.log_batch(run_id, params=entries[start : start + BATCH])

    def put_metrics(self, run_id: str, rows: Iterable[tuple[str, float, int, int]], **of: str) -> None:
        """Rows of (name, value, step, milliseconds since 1970); `of` a `model_id`, and a data set's name and digest."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, when, step, **of) for name, value, step, when in rows]
        for start in range(0, len(metrics), 10 * BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + 10 * BATCH])

    def put_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def put_files(self, run_id: str, path: str | Path, folder: str | None) -> None:
        """`path` (a file, or a folder with all below it) as artifacts under `folder`.

        A file above `tracking.max_artifact_mib` is not copied: `<name>.reference.json` with path, size and
        sha256 stands for it.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        for file in sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]:
            inner = file.relative_to(path).parent if path.is_dir() else Path(".")
            target = Path(folder or ".") / inner
            if (size := file.stat().st_size) <= self.largest:
                self.client.log_artifact(run_id, str(file), target.as_posix() if target.name else None)
                continue
            reference = {"path": os.path.relpath(file), "bytes": size, "sha256": sha256_file(file)}
            self.client.log_dict(run_id, reference, (target / f"{file.name}.reference.json").as_posix())

    def last_steps(self, run: Any) -> dict[str, int]:
        """The last step logged of each metric of `run`."""
        histories = {name: self.client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        return {name: max(metric.step for metric in history) for name, history in histories.items() if history}


def _experiment_tags() -> dict[str, str]:
    """What makes MLflow's pages show training runs, and a saved view with the columns worth comparing.

    By default the table of runs has no parameter and no score. A view is an experiment's tag; `view_url` opens this one.
    """
    state = base64.b64encode(zlib.compress(json.dumps({"selectedColumns": VIEW_COLUMNS}).encode())).decode()
    view = {"name": "Parameters and scores", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{state}"}
    return {"mlflow.experimentKind": "custom_model_development", f"mlflow.sharedViewState.{VIEW}": json.dumps(view)}


def view_url(uri: str, experiment_id: str) -> str:
    """Where a browser shows the runs and scores: on the server, or on `mlflow ui`, which reads MLFLOW_PORT, too."""
    server = uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT') or 5000}"
    where = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
    return f"{without_secrets(server)}/{where}"


def _make_whole(database: Path) -> None:
    """Leaves an MLflow store with all its tables at `database`, or raises what stands against it.

    MLflow makes the tables by some 70 migrations, and a store left in the middle of them never opens again. So they run
    in a file of another name, which becomes the store when it is whole: this process may be killed at any moment.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    making, lock = (database.with_name(f"{database.name}.{word}") for word in ("making", "lock"))
    if _is_whole(database) and not making.exists() and not lock.exists():
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # waits for another process; the system ends it with its holder
        for file in (making, *_beside(making)):
            file.unlink(missing_ok=True)
        if not database.exists():
            store = SqlAlchemyStore(f"sqlite:///{making}", (database.parent / ARTIFACTS).as_uri())
            store.engine.dispose()
            for file in _beside(database):
                file.unlink(missing_ok=True)
            if not database.exists():  # else `mlflow ui` was started meanwhile
                making.rename(database)
            making.unlink(missing_ok=True)
        # Perhaps `mlflow ui` is making it.
        while not (whole := _is_whole(database)) and time.time() - database.stat().st_mtime < SECONDS_QUIET:
            time.sleep(0.2)
        lock.unlink(missing_ok=True)
    if not whole:
        path, uri = shlex.quote(str(database)), shlex.quote(f"sqlite:///{database}")
        raise RuntimeError(
            f"its tables are half made, or another MLflow version's: copy the file, then `mlflow db upgrade {uri}`;"
            f" if that fails, `mv {path} {path}.half` makes room for a new one"
        )


def _is_whole(database: Path) -> bool:
    """Whether all migrations of the installed MLflow have run in `database`; False where there is no such file."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    if not database.exists():
        return False
    with _connected(database) as connection:
        made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
        versions = connection.execute("SELECT version_num FROM alembic_version").fetchall() if made else []
    return versions == [(_get_latest_schema_revision(),)]


def _connected(database: Path) -> Any:
    """For `with`: a connection to an existing file. It rolls back what a killed process was writing."""
    return contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", timeout=20, uri=True))


def _beside(database: Path) -> list[Path]:
    """What sqlite keeps beside a file, and what would spoil another one of its name."""
    return [database.with_name(database.name + end) for end in ("-journal", "-wal", "-shm")]


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """`function()`, or TimeoutError: database drivers have waits that no setting of MLflow's bounds.

    `function` then goes on until the process ends, and may be stopped anywhere by that.
    """
    outcome: futures.Future[Any] = futures.Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again by the waiting thread
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not futures.wait([outcome], seconds).done:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return outcome.result()
