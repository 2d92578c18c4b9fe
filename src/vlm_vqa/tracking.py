"""MLflow: the one module that knows it.

A training run is one row in MLflow: parameters, curves, throughput, memory, then BLEU and accuracy from the later
stages. Runs and weights find each other by content (tags `weights_hash` and `params_hash`), so no run id has to be
stored in any output.

Tracking must never cost a training run: whatever fails here is told once, by one warning, and the work goes on. Only
`recreate_run`, whose whole purpose is the record, raises.
"""

import base64
import contextlib
import csv
import fcntl
import getpass
import json
import logging
import os
import platform
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any

from vlm_vqa.cores import usable_cores
from vlm_vqa.errors import UserError
from vlm_vqa.hashing import sha256_bytes, sha256_file
from vlm_vqa.params import Params, load_params
from vlm_vqa.secrets import without_secrets

log = logging.getLogger(__name__)

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "dvc",
    "mlflow",
    "datasets",
    "crfm-helm",
)
TRAINING_FILE = Path("models/trained/training.json")
REPORTS = Path("reports")
TRAIN_CURVE = REPORTS / "train_curve.csv"
EVALUATION_REPORT = REPORTS / "evaluation.json"

ARTIFACTS = "mlartifacts"  # the folder beside a local store
LONGEST_PARAM = 500  # characters: what every MLflow server accepts; newer ones take 6,000
VIEW = "scores"
VIEW_COLUMNS = [
    *(f"metrics.`{name}`" for name in ("bleu_1", "vqa_accuracy", "loss", "questions_per_second", "peak_memory_gib")),
    *(f"params.`train.{name}`" for name in ("batch_size", "learning_rate", "num_train_epochs", "optimizer")),
]
BATCH = 100  # MLflow's limit on parameters in one request
SECONDS_TO_OPEN = 60.0  # without a sign of life: MLflow retries a silent database for minutes
SECONDS_QUIET = 15.0  # a half-made store that nobody has written to for so long is not being made any more
SECONDS_BETWEEN_TRIES = 60.0  # after a failed write of metrics; doubles each time


# --- where the store is ----------------------------------------------------------------------------------------------


def checkout_root(start: str | Path | None = None) -> Path:
    """The folder of the user's checkout that `start` (default: the working directory) belongs to.

    DVC runs queued and `--temp` experiments in copies under `<root>/.dvc/tmp/exps/` and deletes them afterwards: inside
    such a copy this is `<root>`, not the copy. The path decides, not DVC_ROOT: outside an experiment that variable may
    be left over from another repository.
    """
    here = Path(start or ".").resolve()
    checkout = next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), here)
    for folder in checkout.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return checkout


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or `sqlite:///<root>/mlflow.db`, which is what `mlflow ui` shows when typed in `root`.

    A relative place in the variable is taken from `root`: from a DVC experiment's copy it would vanish with the copy.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    place = _sqlite_file(uri)
    if place is not None:
        return f"sqlite:///{root / place}"
    return uri if "://" in uri or uri.startswith(("file:", "databricks")) else str(root / uri)


def _sqlite_file(uri: str) -> Path | None:
    local = uri.startswith("sqlite:///") and "?" not in uri  # what stands behind "?" may be anything: MLflow's affair
    return Path(uri.removeprefix("sqlite:///")) if local else None


# --- the store, raising what MLflow raises ---------------------------------------------------------------------------


class _Store:
    """One MLflow experiment. Every method raises on failure."""

    def __init__(self, params: Params, root: Path, *, wait: float = SECONDS_TO_OPEN):
        self.uri = tracking_uri(root)
        self.root = root
        self.params = params
        self._largest = params.tracking.max_artifact_mib * 2**20
        self._database = _sqlite_file(self.uri)
        _bound_mlflow()
        # Imports take long on a slow disk, but end: they are no part of the limit.
        import_module("mlflow.store.tracking.sqlalchemy_store" if self._database else "mlflow")
        self.client, self.experiment_id = _within(wait, self._open, lambda: _last_write(self._database))

    def _open(self) -> tuple[Any, str]:
        from mlflow import MlflowClient

        # MLflow tells of making tables by a screenful of lines, urllib3 of each retry: our one warning says it all.
        for name in ("mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)
        database = self._database
        if database is not None:
            _make_whole(database)
            with _connected(database) as connection:
                connection.execute("BEGIN IMMEDIATE")  # fails at once where MLflow would retry for minutes
        client = MlflowClient(tracking_uri=self.uri)
        name = self.params.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            # MLflow's own default is the working directory: in a DVC experiment, a copy that is deleted.
            artifacts = (database.parent / ARTIFACTS).as_uri() if database is not None else None
            return client, self._create_experiment(client, name, artifacts)
        if experiment.lifecycle_stage != "active":
            raise ValueError(f"experiment {name!r} (tracking.experiment) is deleted there: restore or rename it")
        return client, experiment.experiment_id

    @staticmethod
    def _create_experiment(client: Any, name: str, artifacts: str | None) -> str:
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=_experiment_tags())
        except Exception:
            # Two experiments of a DVC queue may start at once: the other one was faster.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
            return experiment.experiment_id

    def search(self, condition: str, limit: int = 50) -> list[Any]:
        """Runs of this experiment, newest first."""
        return list(
            self.client.search_runs(
                [self.experiment_id], condition, order_by=["attributes.start_time DESC"], max_results=limit
            )
        )

    def find(self, weights_hash: str, params_hash: str) -> Any | None:
        runs = self.search(f"tags.weights_hash = '{weights_hash}' and tags.params_hash = '{params_hash}'", limit=1)
        return runs[0] if runs else None

    def unfinished(self, key: str) -> Any | None:
        """The newest run of `key` that did not finish.

        One still marked as running counts only if it was this host's: on a shared server it may be alive elsewhere.
        """
        for run in self.search(f"tags.checkpoint_key = '{key}' and attributes.status != 'FINISHED'"):
            if run.info.status != "RUNNING" or run.data.tags.get("machine.host") == platform.node():
                return run
        return None

    def create(self, tags: Mapping[str, str]) -> str:
        """A run with this store's parameters and `tags`; returns its id."""
        name = run_name(self.params, tags.get("dvc_experiment"))
        run_id = self.client.create_run(self.experiment_id, tags=dict(tags), run_name=name).info.run_id
        self.put_params(run_id, known={})
        return run_id

    def put_params(self, run_id: str, known: Mapping[str, str]) -> None:
        """Logs the parameters that are not `known` yet: MLflow refuses another value for a logged one."""
        from mlflow.entities import Param

        values = {key: _param_text(value) for key, value in self.params.flat().items() if key not in known}
        entries = [Param(key, value) for key, value in values.items()]
        for start in range(0, len(entries), BATCH):
            self.client.log_batch(run_id, params=entries[start : start + BATCH])

    def put_metrics(self, run_id: str, rows: Iterable[tuple[str, float, int, int]]) -> None:
        """Rows of (name, value, step, milliseconds since 1970)."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, when, step) for name, value, step, when in rows]
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
            target = (Path(folder or ".") / inner).as_posix()
            target = None if target == "." else target
            if file.stat().st_size <= self._largest:
                self.client.log_artifact(run_id, str(file), target)
            else:
                self._put_reference(run_id, file, target)

    def _put_reference(self, run_id: str, file: Path, target: str | None) -> None:
        here = Path(".").resolve()
        where = file.resolve().relative_to(here) if file.resolve().is_relative_to(here) else file
        reference = {"path": where.as_posix(), "bytes": file.stat().st_size, "sha256": sha256_file(file)}
        with tempfile.TemporaryDirectory() as scratch:
            note = Path(scratch) / f"{file.name}.reference.json"
            note.write_text(json.dumps(reference, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            self.client.log_artifact(run_id, str(note), target)

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
    """Where a browser shows the runs with parameters and scores: on the server, or on `mlflow ui` of a local store."""
    # `mlflow ui` reads the variable, too.
    server = uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT') or 5000}"
    where = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
    return f"{without_secrets(server)}/{where}"


def _bound_mlflow() -> None:
    """Bound the wait for an unreachable server (MLflow's default: 4 minutes a request), unless the user has set it."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # usage statistics to a host that nobody here asked for


def _make_whole(database: Path) -> None:
    """Leaves an MLflow store with all its tables at `database`, or raises what stands against it.

    MLflow makes the tables by some 70 migrations, and a store left in the middle of them never opens again. So they run
    in a file of another name, which becomes the store when it is whole: this process may be killed, or this thread
    frozen by the process's end, at any moment.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    making, lock = (database.with_name(f"{database.name}.{word}") for word in ("making", "lock"))
    if _is_whole(database) and not making.exists() and not lock.exists():
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for another process or thread; the system ends it with its holder
        _remove(making)
        while not _settled(database):
            store = SqlAlchemyStore(f"sqlite:///{making}", (database.parent / ARTIFACTS).as_uri())
            store.engine.dispose()
            if not database.exists():  # else `mlflow ui` was started meanwhile
                making.rename(database)
            _remove(making)
        lock.unlink(missing_ok=True)  # now that the store is whole, who waits for this lock has nothing left to do


def _settled(database: Path) -> bool:
    """Whether `database` is whole, once nobody else is making it; if not, it is removed where no record is in it."""
    while not _is_whole(database):
        if time.time() - _last_write(database) < SECONDS_QUIET:
            time.sleep(0.2)
            continue
        if database.exists() and _holds_records(database):
            path, uri = shlex.quote(str(database)), shlex.quote(f"sqlite:///{database}")
            raise RuntimeError(
                "its tables are half made, or another MLflow version's, and hold records: copy the file, then"
                f" `mlflow db upgrade {uri}`; if that fails, `mv {path} {path}.half` makes room for a new one"
            )
        _remove(database)
        return False
    return True


def _is_whole(database: Path) -> bool:
    """Whether all migrations of the installed MLflow have run in `database`; False where there is no such file."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    if not database.exists():
        return False
    with _connected(database) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return False
        versions = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    return versions == [(_get_latest_schema_revision(),)]


def _holds_records(database: Path) -> bool:
    """Whether there is a row besides MLflow's own: schema's version, default workspace, default experiment."""
    own = ("alembic_version", "workspaces", "experiments")
    with _connected(database) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {table: connection.execute(f'SELECT 1 FROM "{table}" LIMIT 2').fetchall() for table in tables}
    return any(len(found) > (table in own) for table, found in rows.items())


def _connected(database: Path) -> Any:
    """For `with`: a connection to an existing file. It rolls back what a killed process was writing."""
    return contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", timeout=20, uri=True))


def _files(database: Path) -> list[Path]:
    """`database` and what sqlite keeps beside it, which would spoil another file of this name."""
    return [database.with_name(database.name + end) for end in ("", "-journal", "-wal", "-shm")]


def _remove(database: Path) -> None:
    for file in _files(database):
        file.unlink(missing_ok=True)


def _last_write(database: Path | None) -> float:
    """When `database`, or the file that it is being made in, was last written to; seconds since 1970, 0 for never."""
    times = [0.0]
    for file in _files(database) + _files(database.with_name(f"{database.name}.making")) if database else []:
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)


def _within(seconds: float, function: Callable[[], Any], sign_of_life: Callable[[], Any] = lambda: None) -> Any:
    """`function()`, or TimeoutError where `sign_of_life()` stays the same for `seconds`.

    Database drivers have waits that no setting of MLflow's bounds. `function` then goes on until the process ends, and
    may be stopped anywhere by that.
    """
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = function()
        except BaseException as error:  # noqa: BLE001 - raised again by the waiting thread
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    sign, start = sign_of_life(), time.monotonic()
    while thread.is_alive() and time.monotonic() - start < seconds:
        thread.join(min(seconds, 0.5))
        if sign != (sign := sign_of_life()):
            start = time.monotonic()
    if "error" in outcome:
        raise outcome["error"]
    if "value" not in outcome:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return outcome["value"]


# --- what a run says -------------------------------------------------------------------------------------------------


def run_name(params: Params, experiment: str | None = None) -> str:
    """The row's title in MLflow: DVC's experiment name, if any, and the parameters that are changed most."""
    train = params.train
    knobs = f"lr {train.learning_rate:g}, batch {train.batch_size}"
    if train.gradient_accumulation_steps > 1:
        knobs += f"x{train.gradient_accumulation_steps}"
    knobs += f", {train.num_train_epochs:g} epochs, {params.prompt.mask.value}"
    return f"{experiment}: {knobs}" if experiment else knobs


def _param_text(value: Any) -> str:
    """A parameter as YAML writes it; cut and marked with its hash where MLflow would refuse it."""
    text = without_secrets(value if isinstance(value, str) else json.dumps(value))
    if len(text) <= LONGEST_PARAM:
        return text
    note = f" ... [{len(text)} characters, sha256 {sha256_bytes(text.encode())}]"
    return text[: LONGEST_PARAM - len(note)] + note


def _identity(params: Params) -> dict[str, str]:
    """Tags that every run carries: what was run, and by which code."""
    tags = {"params_hash": params.hash(), "mlflow.user": _user(), "mlflow.source.type": "LOCAL"}
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags |= {"git_commit": commit, "mlflow.source.git.commit": commit}
        tags["git_dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return tags


def _surroundings() -> dict[str, str]:
    """Tags of a live run: library versions, machine, DVC's experiment."""
    tags = {f"version.{package}": _version(package) for package in PACKAGES}
    tags |= {"version.python": platform.python_version(), "machine.host": platform.node(), "machine.cpu": _cpu()}
    tags["machine.cores"] = str(usable_cores().count)
    tags["machine.memory_gib"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}"
    torch = sys.modules.get("torch")  # imported here it would cost seconds; a process that trains has it already
    if torch is not None:
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        tags["machine.gpus"] = ", ".join(gpus) or "none"
    experiment = os.environ.get("DVC_EXP_NAME")
    return tags | ({"dvc_experiment": experiment} if experiment else {})


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _numbers(metrics: Mapping[str, Any], step: int) -> list[tuple[str, float, int, int]]:
    """Rows for `_Store.put_metrics`; values that are no numbers are left out."""
    now = time.time_ns() // 10**6
    return [
        (name, float(value), step, now)
        for name, value in metrics.items()
        if isinstance(value, Real) and not isinstance(value, bool)
    ]


def evaluation_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """`reports/evaluation.json` as flat metric names.

    MLflow draws one chart a metric, in the names' order, and groups ("a/b") before all others. The prefix keeps what is
    not a headline behind the training's curves.

    >>> evaluation_metrics({"helm": {"bleu_1": 0.9, "f1_score": 0.8}, "vqa_accuracy": {"overall": 0.7}})
    {'bleu_1': 0.9, 'score_helm_f1_score': 0.8, 'vqa_accuracy': 0.7}
    >>> evaluation_metrics({"vqa_accuracy": {"per_answer_type": {"yes/no": 0.6}}})
    {'score_vqa_accuracy_per_answer_type_yes_no': 0.6}
    """
    headlines = {("helm", "bleu_1"): "bleu_1", ("vqa_accuracy", "overall"): "vqa_accuracy"}
    metrics = {}
    for path, value in _leaves(report):
        if isinstance(value, Real) and not isinstance(value, bool):
            name = "_".join(path).replace("/", "_").replace(" ", "_")
            metrics[headlines.get(path, f"score_{name}")] = value
    return metrics


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


# --- never raising ---------------------------------------------------------------------------------------------------


class TrainingRun:
    """The MLflow run of a training in progress; made by `training_run`. No method raises.

    Metrics that the store does not take are kept and sent again later, at the latest when the run ends.
    """

    def __init__(
        self, store: _Store | None = None, run_id: str | None = None, recorded: Mapping[str, int] | None = None
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
        self._unsent += [row for row in _numbers(metrics, step) if step > self._recorded.get(row[0], -1)]
        if time.monotonic() >= self._next_try:
            self._send()

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file, or a folder with all below it; above `tracking.max_artifact_mib` by reference."""
        self._attempt(lambda store, run_id: store.put_files(run_id, path, folder))

    def log_weights(self, path: str | Path, weights_hash: str) -> None:
        """The trained weights, under `weights/`, and their hash as the tag by which later stages find this run."""
        self.set_tags({"weights_hash": weights_hash})
        self.log_artifact(path, "weights")

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._attempt(lambda store, run_id: store.put_tags(run_id, tags))

    def fail(self, reason: str) -> None:
        """Mark the run as failed where no exception can: this process is about to be ended."""
        self._send()
        self.set_tags({"failure": reason})
        self._attempt(lambda store, run_id: store.client.set_terminated(run_id, "FAILED"))

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            status = "FINISHED"
        else:
            status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._send()
        self._attempt(lambda store, run_id: store.client.set_terminated(run_id, status))

    def _send(self) -> None:
        if self._unsent and self._attempt(lambda store, run_id: store.put_metrics(run_id, self._unsent)):
            self._unsent = []
            self._pause = SECONDS_BETWEEN_TRIES
        elif self._unsent:
            self._next_try = time.monotonic() + self._pause
            self._pause *= 2

    def _attempt(self, action: Callable[[_Store, str], None]) -> bool:
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
    """The MLflow run for a training; a context manager. Never raises.

    `key` names the checkpoints' folder: an unfinished run with the same key is continued instead of a new one begun,
    its parameters and recorded steps kept. `tags` are the hashes of data and code (`data_hash`, `code_hash`). The run
    ends as FAILED by an exception, as KILLED by Ctrl-C or a SystemExit such as SIGTERM's. On other ranks than 0 it
    records nothing.
    """
    if os.environ.get("RANK", "0") != "0":
        return TrainingRun()
    root = checkout_root()
    try:
        store = _Store(params, root)
        everything = _identity(params) | _surroundings() | dict(tags)
        everything |= {"checkpoint_key": key, "mlflow.source.name": source}
        run = store.unfinished(key)
        if run is None:
            run_id = store.create(everything)
            log.info("MLflow run %s (%s)", run_id, without_secrets(store.uri))
            return TrainingRun(store, run_id)
        run_id = run.info.run_id
        store.client.update_run(run_id, status="RUNNING")
        store.put_params(run_id, known=run.data.params)
        store.put_tags(run_id, everything)
        log.info("continuing MLflow run %s (%s)", run_id, without_secrets(store.uri))
        return TrainingRun(store, run_id, store.last_steps(run))
    except Exception as error:  # noqa: BLE001
        _warn(tracking_uri(root), error)
        return TrainingRun()


def log_export(params: Params, *, weights_hash: str, files: Iterable[str | Path] = ()) -> None:
    """Adds the exported model's files (`export/`) to the run that trained it. Never raises."""
    _add(params, weights_hash, {}, {"exported": "true"}, files, "export")


def log_evaluation(
    params: Params, *, weights_hash: str, report: Mapping[str, Any], files: Iterable[str | Path] = ()
) -> None:
    """Adds the scores of `report` (see `evaluation_metrics`) and `files` (under their own folders) to the run that
    trained the model. Never raises."""
    _add(params, weights_hash, evaluation_metrics(report), {"evaluated": "true"}, files, None)


def _add(
    params: Params,
    weights_hash: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    files: Iterable[str | Path],
    folder: str | None,
) -> None:
    root = checkout_root()
    try:
        store = _Store(params, root)
        run = store.find(weights_hash, params.hash())
        run_id = run.info.run_id if run else _recreate(store, weights_hash, Path("."))
        store.put_metrics(run_id, _numbers(metrics, 0))
        store.put_tags(run_id, tags)
        for path in files:
            store.put_files(run_id, path, folder or os.path.relpath(Path(path).parent))
        url = view_url(store.uri, store.experiment_id)
        log.info("recorded in MLflow; compare runs (`mlflow ui`; MLFLOW_PORT names another port) at %s", url)
    except Exception as error:  # noqa: BLE001
        _warn(tracking_uri(root), error)


def _warn(uri: str, error: Exception) -> None:
    log.warning(
        "MLflow at %s does not take this run (%s); going on without it. Nothing is lost: make the store reachable and"
        " writable (MLFLOW_TRACKING_URI names it), then `vlm-vqa track` records the run from its outputs.",
        without_secrets(uri),
        _reason(error),
    )


def _reason(error: BaseException) -> str:
    """One line. Clients wrap what the system said ("Connection refused") in pages of their own: dig it out."""
    cause: BaseException | None = error
    while cause is not None:
        error = cause if isinstance(cause, OSError) and cause.strerror else error
        cause = cause.__cause__ or cause.__context__
    text = without_secrets(str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:500]


# --- from outputs alone ----------------------------------------------------------------------------------------------


def recreate_run(folder: str | Path = ".") -> tuple[str, bool]:
    """Records the model in `folder`'s outputs as an MLflow run, where no stage ran here or tracking had failed.

    Returns the run's id and whether anything had to be recorded: an existing run of the same weights and parameters is
    given the scores it lacks, and else left as it is. Raises UserError where outputs are missing or damaged, belong to
    other parameters, or the store fails.
    """
    folder = Path(folder)
    params = load_params(folder / "params.yaml")
    training = _read_json(folder / TRAINING_FILE)
    _check_current(folder)
    scores = _read_json(folder / EVALUATION_REPORT) if (folder / EVALUATION_REPORT).exists() else None
    uri = tracking_uri(checkout_root(folder))
    try:
        store = _Store(params, checkout_root(folder))
        run = store.find(training["weights_hash"], params.hash())
        run_id = run.info.run_id if run else _recreate(store, training["weights_hash"], folder)
        lacks_scores = scores is not None and not (run and "evaluated" in run.data.tags)
        if lacks_scores:
            store.put_metrics(run_id, _numbers(evaluation_metrics(scores), 0))
            store.put_files(run_id, folder / REPORTS, REPORTS.name)
            store.put_tags(run_id, {"evaluated": "true"})
        return run_id, run is None or lacks_scores
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {without_secrets(uri)} does not take the run ({_reason(error)}): make the store"
            " reachable and writable, or name another by MLFLOW_TRACKING_URI, then run `vlm-vqa track` again"
        ) from error


def _recreate(store: _Store, weights_hash: str, folder: Path) -> str:
    """A run with the training's parameters, hashes, curve, weights and reports, as far as the outputs tell them."""
    training, curve = _read_json(folder / TRAINING_FILE), _curve(folder / TRAIN_CURVE)
    hashes = {name: training[name] for name in ("data_hash", "code_hash") if name in training}
    tags = _identity(store.params) | hashes | {"weights_hash": weights_hash, "recreated": "true"}
    tags["mlflow.source.name"] = "vlm-vqa track"
    tags["mlflow.note.content"] = "Recorded from the outputs: throughput, memory and machine are not known."
    run_id = store.create(tags)
    store.put_metrics(run_id, curve)
    store.put_files(run_id, folder / REPORTS, REPORTS.name)
    store.put_files(run_id, (folder / TRAINING_FILE).parent, "weights")
    store.client.set_terminated(run_id, "FINISHED")
    return run_id


def _curve(path: Path) -> list[tuple[str, float, int, int]]:
    """The rows of `train_curve.csv`: a column `step` and one column a metric; empty cells are left out."""
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            table = list(csv.DictReader(lines))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `git checkout {path}` or `dvc repro` brings it") from None
    rows = []
    for line in table:
        values = {name: float(text) for name, text in line.items() if name != "step" and text not in ("", None)}
        rows += _numbers(values, int(line["step"]))
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `dvc pull` or `dvc repro` brings it") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): `vlm-vqa repair` brings it back") from error


def _check_current(folder: Path) -> None:
    """Refuses to record outputs under parameters that did not make them."""
    changed = _changed_params(folder)
    if changed:
        raise UserError(
            f"{folder / 'params.yaml'} is not what made these outputs ({', '.join(changed)} differ from dvc.lock):"
            " `git checkout params.yaml` records them, `dvc repro` makes new ones"
        )


def _changed_params(folder: Path) -> list[str]:
    """Keys of `params.yaml` whose value differs from the one that `dvc.lock` notes for a stage."""
    from ruamel.yaml import YAML

    # As DVC reads both: to another parser 1e-5 here and 1e-05 there are two texts.
    read = YAML(typ="safe", pure=True).load
    lock = folder / "dvc.lock"
    if not lock.is_file():
        return ["all parameters"]
    stages = (read(lock) or {}).get("stages", {})
    now = read(folder / "params.yaml")
    changed = set()
    for stage in stages.values():
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            current = now
            for part in key.split("."):
                current = current.get(part) if isinstance(current, Mapping) else None
            if current != value:
                changed.add(key)
    return sorted(changed)
