"""The MLflow module: what a run records, how it is found again, and that no failure of it reaches the training."""

import base64
import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.cli import cli as mlflow_cli
from mlflow.store.db import utils
from PIL import Image
from sqlalchemy import Engine, event

from tests.mlflow_store import artifacts, runs
from vlm_vqa import tracking
from vlm_vqa.errors import UserError
from vlm_vqa.tracking import describe, recreate, store

REPO = Path(__file__).parents[2]
HASHES = {"data_hash": "d" * 64, "code_hash": "c" * 64}
EVALUATION = {
    "helm": {"bleu_1": 0.9, "bleu_4": 0.0, "instances": 1000},
    "vqa_accuracy": {"overall": 0.8, "per_answer_type": {"yes/no": 0.85, "number": 0.5}, "questions": 9673},
    "baselines": {
        "prior": {"vqa_accuracy": 0.67, "bleu_1": 0.66},
        "shuffled_images": {"vqa_accuracy": 0.59, "bleu_1": 0.58},
    },
    "model": {"mask": "image-prefix", "step": 40, "step_is": "the last step", "selected_on": "nothing"},
}


def history(root: Path, run, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def test_a_run_has_parameters_curves_hashes_versions_and_files(checkout, params, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "molal-coir")
    (checkout / "note.txt").write_text("hello")
    with tracking.training_run(params, key="k1", tags=HASHES) as run:
        run.log_metrics({"loss": 2.0, "learning_rate": 1e-3, "text": "left out", "flag": True}, step=1)
        run.log_metrics({"loss": 1.0}, step=2)
        run.log_artifact("note.txt", "training")
    (found,) = runs(checkout)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.learning_rate"] == "0.001"
    assert found.data.params["vision.revision"] == "null"
    assert set(found.data.params) == set(params.flat())
    assert history(checkout, found, "loss") == [(1, 2.0), (2, 1.0)]
    assert set(found.data.metrics) == {"loss", "learning_rate"}
    tags = found.data.tags
    assert tags["params_hash"] == params.hash() and tags["data_hash"] == HASHES["data_hash"]
    assert tags["checkpoint_key"] == "k1" and tags["dvc_experiment"] == "molal-coir"
    assert all(tags[f"version.{name}"] for name in describe.PACKAGES)
    assert int(tags["machine.cores"]) >= 1 and tags["machine.cpu"]
    train = params.train
    shape = f"batch {train.batch_size}, {train.num_train_epochs} epochs, image-prefix"
    assert found.info.run_name == f"molal-coir: lr {train.learning_rate:g}, {shape}"
    assert artifacts(checkout, found) == {"training/note.txt": "hello"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_the_status_tells_how_it_ended(checkout, params, error, status):
    with pytest.raises(type(error)):
        with tracking.training_run(params, key="k", tags=HASHES):
            raise error
    assert runs(checkout)[0].info.status == status


def test_an_interrupted_run_is_continued_without_repeating_steps(checkout, params):
    with pytest.raises(KeyboardInterrupt):
        with tracking.training_run(params, key="k1", tags=HASHES) as first:
            for step in (10, 20, 30):
                first.log_metrics({"loss": 1 / step}, step)
            raise KeyboardInterrupt
    # From the checkpoint at step 20; where the run is tracked and how large artifacts may be is no part of the key.
    other = dataclasses.replace(params, tracking=dataclasses.replace(params.tracking, max_artifact_mib=7))
    with tracking.training_run(other, key="k1", tags=HASHES) as second:
        for step in (30, 40):
            second.log_metrics({"loss": 1 / step}, step)
    (run,) = runs(checkout)
    assert run.info.status == "FINISHED" and second.run_id == first.run_id
    assert [step for step, _ in history(checkout, run, "loss")] == [10, 20, 30, 40]


def test_a_finished_run_or_another_key_is_not_continued(checkout, params):
    for key in ("k1", "k1", "k2"):
        with tracking.training_run(params, key=key, tags=HASHES):
            pass
    assert len(runs(checkout)) == 3


def test_a_run_that_another_host_has_in_progress_is_not_continued(checkout, params):
    run = tracking.training_run(params, key="k", tags=HASHES)
    run.set_tags({"machine.host": "elsewhere"})
    with tracking.training_run(params, key="k", tags=HASHES):
        pass
    assert [found.info.status for found in runs(checkout)] == ["FINISHED", "RUNNING"]


def test_only_the_first_rank_records(checkout, params, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with tracking.training_run(params, key="k", tags=HASHES) as run:
        run.log_metrics({"loss": 1.0}, 1)
    assert runs(checkout) == []


def test_a_long_parameter_is_cut_and_marked(checkout, params):
    prompt = dataclasses.replace(params.prompt, instruction="x" * 9000)
    with tracking.training_run(dataclasses.replace(params, prompt=prompt), key="k", tags=HASHES):
        pass
    text = runs(checkout)[0].data.params["prompt.instruction"]
    assert len(text) == describe.LONGEST_PARAM and "9000 characters, sha256" in text


def test_large_weights_are_kept_by_reference(checkout, params):
    weights = checkout / "models" / "trained"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"\0" * (2**20 + 1))
    params = dataclasses.replace(params, tracking=dataclasses.replace(params.tracking, max_artifact_mib=1))
    with tracking.training_run(params, key="k", tags=HASHES) as run:
        run.log_weights("models/trained", "w" * 64)
    (found,) = runs(checkout)
    files = artifacts(checkout, found)
    assert set(files) == {"weights/config.json", "weights/model.safetensors.reference.json"}
    reference = json.loads(files["weights/model.safetensors.reference.json"])
    assert reference["path"] == "models/trained/model.safetensors" and reference["bytes"] == 2**20 + 1
    assert found.data.tags["weights_hash"] == "w" * 64


def test_evaluation_goes_to_the_newest_run_of_the_same_weights_and_params(checkout, params):
    other = dataclasses.replace(params, seed=1)
    made = []
    for which in (params, params, other):
        with tracking.training_run(which, key=f"k{len(made)}", tags=HASHES) as run:
            run.set_tags({"weights_hash": "w" * 64})
        made.append(run.run_id)
        time.sleep(0.01)  # start times are in milliseconds
    (checkout / "README.md").write_text("card")
    tracking.log_results(params, weights_hash="w" * 64, files=["README.md"])
    tracking.log_results(params, weights_hash="w" * 64, report=EVALUATION)
    scored = [run for run in runs(checkout) if "bleu_1" in run.data.metrics]
    assert [run.info.run_id for run in scored] == [made[1]]
    assert scored[0].data.metrics["score_vqa_accuracy_per_answer_type_yes_no"] == 0.85
    assert artifacts(checkout, scored[0]) == {"export/README.md": "card"}


def test_evaluation_metrics_are_flat():
    assert describe.evaluation_metrics(EVALUATION) == {
        "bleu_1": 0.9,
        "vqa_accuracy": 0.8,
        "score_helm_bleu_4": 0.0,
        "score_helm_instances": 1000,
        "score_vqa_accuracy_per_answer_type_yes_no": 0.85,
        "score_vqa_accuracy_per_answer_type_number": 0.5,
        "score_vqa_accuracy_questions": 9673,
        "score_baselines_prior_vqa_accuracy": 0.67,
        "score_baselines_prior_bleu_1": 0.66,
        "score_baselines_shuffled_images_vqa_accuracy": 0.59,
        "score_baselines_shuffled_images_bleu_1": 0.58,
    }


def test_a_new_experiment_has_a_view_with_parameters_and_scores(checkout, params):
    with tracking.training_run(params, key="k", tags=HASHES) as run:
        run.log_metrics({"loss": 1.0, "questions_per_second": 900.0, "peak_memory_gib": 1.5}, 1)
        run.log_metrics(describe.evaluation_metrics(EVALUATION), 1)
    (found,) = runs(checkout)
    client = MlflowClient(tracking_uri=f"sqlite:///{checkout / 'mlflow.db'}")
    tags = client.get_experiment(found.info.experiment_id).tags
    state = json.loads(tags["mlflow.sharedViewState.scores"])["state"].removeprefix("deflate;")
    columns = json.loads(zlib.decompress(base64.b64decode(state)))["selectedColumns"]
    known = [f"metrics.`{name}`" for name in found.data.metrics] + [f"params.`{name}`" for name in found.data.params]
    # A run has one of the two accuracies, an older one no interval, a parent has means and deviations; the view is for all.
    others = [
        name + of for of in ("_low", "_high", "_mean", "_sd") for name in ("bleu_1", "vqa_accuracy", "answer_accuracy")
    ]
    assert columns and [column for column in columns if column not in known] == [
        f"metrics.`{name}`" for name in ("answer_accuracy", *others)
    ]
    assert "viewStateShareKey=scores" in store.view_url("sqlite:///x", "1")
    assert store.view_url("http://me:sesame@host:5000", "1").startswith("http://host:5000/#/experiments/1/")


def test_the_link_names_the_port_that_mlflow_ui_takes(checkout, monkeypatch):
    assert store.view_url("sqlite:///x", "1").startswith("http://127.0.0.1:5000/#/")
    monkeypatch.setenv("MLFLOW_PORT", "5055")
    assert store.view_url("sqlite:///x", "1").startswith("http://127.0.0.1:5055/#/")
    assert store.view_url("http://host:5000", "1").startswith("http://host:5000/#/")
    port = next(option for option in mlflow_cli.commands["server"].params if option.name == "port")
    assert port.envvar == "MLFLOW_PORT"


# --- where the store is -----------------------------------------------------------------------------------------------


def test_a_copy_made_by_dvc_belongs_to_the_checkout_it_was_made_from(checkout):
    for copy in (".dvc/tmp/exps/tmpab12", ".dvc/tmp/exps/standalone/tmpab12"):
        inside = checkout / copy
        inside.mkdir(parents=True)
        (inside / "dvc.yaml").touch()
        assert tracking.checkout_root(inside) == checkout
    (checkout / "stages").mkdir()
    assert tracking.checkout_root(checkout / "stages") == checkout


@pytest.mark.parametrize(
    ("variable", "uri"),
    [
        ("", "sqlite:////repo/mlflow.db"),
        ("sqlite:///team.db", "sqlite:////repo/team.db"),
        ("sqlite:////srv/team.db", "sqlite:////srv/team.db"),
        ("./mlruns", "/repo/mlruns"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_the_store_does_not_depend_on_the_copy(monkeypatch, variable, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    assert tracking.tracking_uri(Path("/repo")) == uri


# --- a local store is whole, or not there -----------------------------------------------------------------------------


def in_child(function) -> int:
    """Runs `function` in a forked process and returns its exit code, negative if a signal ended it."""
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            function()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_after(part: str, function) -> None:
    """Runs `function` in a child that is killed right after the first statement of SQL with this part."""

    def after(connection, cursor, statement, *_):
        if part in statement:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        event.listen(Engine, "after_cursor_execute", after)
        function()

    assert in_child(killed) == -signal.SIGKILL


def record(params, key="k") -> None:
    with tracking.training_run(params, key=key, tags=HASHES):
        pass


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("mlflow")}


@pytest.fixture
def quick(monkeypatch, empty_store):
    """MLflow's migrations replaced by writes at will; returns a list of functions to be called one after the other."""
    steps = []

    def initialize(engine):
        with sqlite3.connect(engine.url.database) as connection:
            connection.execute("CREATE TABLE issues (id INTEGER)")
        for step in steps:
            step(Path(engine.url.database))
        with sqlite3.connect(empty_store) as source, sqlite3.connect(engine.url.database) as target:
            source.backup(target)
            target.execute("DELETE FROM experiments")  # MLflow makes its first one after the tables

    monkeypatch.setattr(utils, "_initialize_tables", initialize)
    return steps


def test_killed_while_the_store_is_made_and_opened_again(checkout, params):
    (checkout / "mlflow.db").unlink()
    for part in ("sqlite_master", "_alembic_tmp_metrics", "CREATE TABLE issues"):
        killed_after(part, lambda: record(params))
        assert names(checkout) >= {"mlflow.db.making", "mlflow.db.lock"} and "mlflow.db" not in names(checkout)
    record(params)
    assert len(runs(checkout)) == 1
    assert names(checkout) == {"mlflow.db"}


@pytest.mark.parametrize("moment", ["rename", "unlink"])
def test_killed_around_the_renaming(checkout, params, quick, moment):
    """Before and after the moment at which the store is there."""
    (checkout / "mlflow.db").unlink()

    def killed():
        real = getattr(Path, moment)

        def instead(path, *arguments, **keywords):
            # The lock is removed last, when the store is whole.
            if moment == "rename" or path.suffix == ".lock":
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, *arguments, **keywords)

        setattr(Path, moment, instead)
        record(params)

    assert in_child(killed) == -signal.SIGKILL
    assert ("mlflow.db" in names(checkout)) == (moment == "unlink")
    record(params)
    assert len(runs(checkout)) == 1 and names(checkout) == {"mlflow.db"}


def test_a_slow_store_is_waited_for_however_long_its_making_takes(checkout, params, quick):
    (checkout / "mlflow.db").unlink()
    quick.append(lambda path: time.sleep(3))
    store.Store(params, checkout, wait=1.5)
    record(params)
    assert len(runs(checkout)) == 1 and names(checkout) == {"mlflow.db"}


def test_two_that_start_at_once_make_one_store(checkout, params, quick):
    (checkout / "mlflow.db").unlink()

    def slowly(path):
        with (checkout / "made.txt").open("a") as file:
            file.write("x")
        time.sleep(1)

    quick.append(slowly)
    processes = [threading.Thread(target=in_child, args=[lambda key=key: record(params, key)]) for key in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (checkout / "made.txt").read_text() == "x"
    assert len(runs(checkout)) == 3 and names(checkout) == {"mlflow.db"}


@pytest.fixture(scope="session")
def half_store(tmp_path_factory):
    """What `mlflow ui` leaves when it is killed in the middle of its migrations: some tables, no record."""
    folder = tmp_path_factory.mktemp("half")
    engine = utils.create_sqlalchemy_engine(f"sqlite:///{folder / 'mlflow.db'}")
    killed_after("CREATE TABLE issues", lambda: utils._initialize_tables(engine))
    engine.dispose()
    for name in names(folder):
        shutil.copy(folder / name, folder / f"lost{name.removeprefix('mlflow')}")
    with pytest.raises(Exception, match="already exists"):  # as MLflow itself says for ever
        utils._upgrade_db(utils.create_sqlalchemy_engine(f"sqlite:///{folder / 'lost.db'}"))
    return folder


def put(folder: Path, checkout: Path, age: float) -> None:
    for name in names(folder):
        shutil.copy(folder / name, checkout / name)
        os.utime(checkout / name, (time.time() - age,) * 2)


def test_a_half_store_of_others_is_left_and_named_with_what_to_do(checkout, params, half_store, quick, caplog):
    put(half_store, checkout, age=3600)
    record(params)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"`mlflow db upgrade sqlite:///{checkout}/mlflow.db`" in message and "vlm-vqa track" in message
    subprocess.run(re.search(r"`(mv .*?)`", message).group(1), shell=True, check=True)
    record(params)
    assert len(runs(checkout)) == 1 and names(checkout) >= {"mlflow.db", "mlflow.db.half"}


def test_the_journal_of_a_store_that_was_moved_away_does_not_spoil_the_new_one(checkout, params, quick):
    store = checkout / "mlflow.db"

    store.unlink()

    def killed():
        with sqlite3.connect(store) as connection:
            connection.execute("PRAGMA cache_size = 1")  # so that pages and their journal reach the disk
            connection.execute("CREATE TABLE one (text)")
            connection.executemany("INSERT INTO one VALUES (?)", [["x" * 3000]] * 100)
            connection.commit()
            connection.execute("UPDATE one SET text = upper(text)")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    assert names(checkout) == {"mlflow.db", "mlflow.db-journal"}
    store.rename(checkout / "moved.db")
    os.utime(checkout / "mlflow.db-journal", (time.time() - 3600,) * 2)
    record(params)
    with sqlite3.connect(store) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert len(runs(checkout)) == 1 and names(checkout) == {"mlflow.db"}


def test_a_store_that_others_are_making_is_waited_for(checkout, params, quick, empty_store):
    quick.append(lambda path: pytest.fail("another one was made"))
    (checkout / "mlflow.db").write_bytes(b"")

    def whole():
        time.sleep(1)
        with sqlite3.connect(empty_store) as source, sqlite3.connect(checkout / "mlflow.db") as target:
            source.backup(target)

    other = threading.Thread(target=whole)
    inode = (checkout / "mlflow.db").stat().st_ino
    other.start()
    record(params)
    other.join()
    assert len(runs(checkout)) == 1 and (checkout / "mlflow.db").stat().st_ino == inode


def test_a_half_store_with_records_is_left_and_named_with_what_to_do(checkout, params, quick, caplog):
    store = checkout / "mlflow.db"
    record(params)
    with sqlite3.connect(store) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '867495a8f9d4'")
    before = store.read_bytes()
    os.utime(store, (time.time() - 3600,) * 2)
    train(params)
    assert store.read_bytes() == before
    first, second = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert first == second  # one by the training, one by the evaluation, which is another process in a real run
    assert f"`mlflow db upgrade sqlite:///{store}`" in first and "vlm-vqa track" in first
    subprocess.run(re.search(r"`(mv .*?)`", first).group(1), shell=True, check=True)
    assert (checkout / "mlflow.db.half").read_bytes() == before
    record(params)
    assert len(runs(checkout)) == 1 and names(checkout) == {"mlflow.db", "mlflow.db.half"}


# --- failures ---------------------------------------------------------------------------------------------------------


def train(params) -> None:
    with tracking.training_run(params, key="k", tags=HASHES) as run:
        for step in range(3):
            run.log_metrics({"loss": 1.0}, step)
        run.log_weights("params.yaml", "w" * 64)
    tracking.log_results(params, weights_hash="w" * 64, report=EVALUATION)


def test_an_unreachable_server_costs_one_warning_a_stage_and_little_time(checkout, params, monkeypatch, caplog):
    # A port that nobody listens on; the password must not be shown.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:sesame@127.0.0.1:9")
    started = time.monotonic()
    train(params)
    assert time.monotonic() - started < 30
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == 2  # one by the training, one by the evaluation, which is another process in a real run
    assert all("http://127.0.0.1:9" in message and "vlm-vqa track" in message for message in messages)
    assert "sesame" not in caplog.text


def test_an_unwritable_store_costs_one_warning(checkout, params, caplog):
    (checkout / "mlflow.db").unlink()
    (checkout / "mlflow.db").mkdir()  # root may write to read-only files, not to a folder
    started = time.monotonic()
    with tracking.training_run(params, key="k", tags=HASHES) as run:
        run.log_metrics({"loss": 1.0}, 1)
    assert time.monotonic() - started < 10
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(checkout / "mlflow.db") in message and "unable to open database file" in message


def test_a_store_that_does_not_answer_is_waited_for_no_longer_than_told(checkout, params, monkeypatch):
    monkeypatch.setattr(store.Store, "_open", lambda store: time.sleep(30))
    with pytest.raises(TimeoutError):
        store.Store(params, checkout, wait=0.1)


def test_metrics_that_a_server_missed_for_a_while_arrive_in_the_end(checkout, params, caplog, monkeypatch):
    with tracking.training_run(params, key="k", tags=HASHES) as run:
        run.log_metrics({"loss": 3.0}, 1)
        with monkeypatch.context() as away:
            away.setattr(store.Store, "put_metrics", lambda *_: (_ for _ in ()).throw(ConnectionError("away")))
            run.log_metrics({"loss": 2.0}, 2)
            run.log_metrics({"loss": 1.0}, 3)
    assert history(checkout, runs(checkout)[0], "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_a_picture_replaces_the_one_before_and_is_left_out_while_the_store_fails(checkout, params, monkeypatch):
    def kept():
        (path,) = (checkout / store.ARTIFACTS).rglob("answers.png")
        assert path.parts[-2:] == ("validation", "answers.png")
        with Image.open(path) as image:
            return image.getpixel((0, 0))

    with tracking.training_run(params, key="k", tags=HASHES) as run:
        for colour in ((1, 2, 3), (4, 5, 6)):
            run.log_image(Image.new("RGB", (9, 9), colour), "validation/answers.png")
            assert kept() == colour
        with monkeypatch.context() as away:
            away.setattr(store.Store, "put_metrics", lambda *_: (_ for _ in ()).throw(ConnectionError("away")))
            away.setattr(MlflowClient, "log_image", lambda *_: pytest.fail("tried"))
            run.log_metrics({"loss": 2.0}, 2)
            run.log_image(Image.new("RGB", (9, 9)), "validation/answers.png")
        monkeypatch.setattr(MlflowClient, "log_image", lambda *_: (_ for _ in ()).throw(OSError("full")))
        run._send()
        run.log_image(Image.new("RGB", (9, 9)), "validation/answers.png")
    assert kept() == (4, 5, 6) and runs(checkout)[0].info.status == "FINISHED"


def test_sigterm_marks_the_run_as_killed(checkout):
    script = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "from vlm_vqa import tracking; from vlm_vqa.params import load_params\n"
        "with tracking.training_run(load_params(), key='k', tags={}):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO / "src")}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert runs(checkout)[0].info.status == "KILLED"


# --- from outputs alone -----------------------------------------------------------------------------------------------


@pytest.fixture
def outputs(checkout, params):
    """What `dvc pull` brings."""
    training = {"weights_hash": "w" * 64, **HASHES}
    # dvc.lock notes the values that a stage was run with.
    lock = {"stages": {"train": {"params": {"params.yaml": {"train": params.as_dict()["train"]}}}}}
    for name, text in {
        "models/trained/training.json": json.dumps(training),
        "dvc.lock": json.dumps(lock),
        "reports/train.json": json.dumps({"train_loss": 0.3, "steps": 20}),
        "reports/train_curve.csv": "step,loss,learning_rate\n10,2.0,0.001\n20,1.0,\n",
        "reports/validation/curve.csv": "step,validation_score,train_part_loss\n0,0.0,nan\n20,0.5,nan\n",
        "reports/evaluation.json": json.dumps(EVALUATION),
        "reports/predictions.parquet": "rows",
    }.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    return checkout


def test_track_makes_the_run_once(outputs):
    run_id, made = tracking.recreate_run(outputs)
    assert made
    assert tracking.recreate_run(outputs) == (run_id, False)
    (run,) = runs(outputs)
    assert run.data.tags["recreated"] == "true" and run.data.tags["data_hash"] == HASHES["data_hash"]
    assert "machine.cpu" not in run.data.tags  # it was trained who knows where
    assert history(outputs, run, "loss") == [(10, 2.0), (20, 1.0)]
    assert history(outputs, run, "learning_rate") == [(10, 0.001)]
    assert history(outputs, run, "validation_score") == [(0, 0.0), (20, 0.5)]
    assert "train_part_loss" not in run.data.metrics
    assert run.data.metrics["bleu_1"] == 0.9 and run.data.metrics["vqa_accuracy"] == 0.8
    assert "reports/predictions.parquet" in artifacts(outputs, run)
    assert "weights/training.json" in artifacts(outputs, run)


def test_evaluation_of_weights_without_a_run_makes_one(outputs, params):
    tracking.log_results(params, weights_hash="w" * 64, report=EVALUATION, files=["reports/evaluation.json"])
    (run,) = runs(outputs)
    assert run.data.tags["recreated"] == "true" and run.data.metrics["bleu_1"] == 0.9
    assert history(outputs, run, "loss") == [(10, 2.0), (20, 1.0)]
    assert json.loads(artifacts(outputs, run)["reports/evaluation.json"]) == EVALUATION


def test_track_refuses_outputs_of_other_parameters(outputs):
    text = (outputs / "params.yaml").read_text()
    (outputs / "params.yaml").write_text(text.replace("learning_rate: 1.0e-3", "learning_rate: 2.0e-3"))
    (outputs / "dvc.lock").write_text(
        json.dumps({"stages": {"train": {"params": {"params.yaml": {"train.learning_rate": 1e-3}}}}})
    )
    with pytest.raises(UserError, match=r"train\.learning_rate differ.*git checkout params\.yaml"):
        tracking.recreate_run(outputs)
    # Parameters that a later stage alone uses may have changed since the training: dvc.lock decides.
    (outputs / "dvc.lock").write_text(
        json.dumps({"stages": {"train": {"params": {"params.yaml": {"train.learning_rate": 2e-3}}}}})
    )
    assert tracking.recreate_run(outputs)[1]


@pytest.mark.parametrize(
    ("written", "changed"), [("1e-3", []), (".001", []), ("1.0e-3", []), ("2e-3", ["train.learning_rate"])]
)
def test_a_number_in_another_spelling_is_not_another_number(outputs, written, changed):
    """DVC writes 0.001 into dvc.lock, and 1e-05 for 1e-5, which YAML 1.1 takes for two texts."""
    text = (outputs / "params.yaml").read_text()
    assert "learning_rate: 1.0e-3" in text
    (outputs / "params.yaml").write_text(
        text.replace("learning_rate: 1.0e-3", f"learning_rate: {written}").replace(
            "weight_decay: 1.0e-4", "weight_decay: 1e-5"
        )
    )
    lock = "stages: {train: {params: {params.yaml: {train.learning_rate: 0.001, train.weight_decay: 1e-05}}}}"
    (outputs / "dvc.lock").write_text(lock)
    assert recreate.changed_params(outputs) == changed


def test_track_adds_the_scores_that_a_run_lacks(outputs, params):
    with tracking.training_run(params, key="k", tags=HASHES) as run:
        run.set_tags({"weights_hash": "w" * 64})
    assert tracking.recreate_run(outputs) == (run.run_id, True)
    assert tracking.recreate_run(outputs) == (run.run_id, False)
    (found,) = runs(outputs)
    assert found.data.metrics["bleu_1"] == 0.9 and "recreated" not in found.data.tags


@pytest.mark.parametrize("last", [{}, {"weights_hash": "w" * 64}], ids=["in the middle", "while it uploads"])
def test_track_completes_the_run_that_lost_its_store(outputs, params, last):
    lost = tracking.training_run(params, key="k", tags=HASHES)
    lost.set_tags({"mine": "kept"} | last)
    lost.log_metrics({"loss": 2.0, "questions_per_second": 9.0}, 10)  # the server dies: no end, no later step
    assert tracking.recreate_run(outputs) == (lost.run_id, True)
    assert tracking.recreate_run(outputs) == (lost.run_id, False)
    (found,) = runs(outputs)
    assert found.info.status == "FINISHED" and found.data.tags["mine"] == "kept"
    assert found.data.tags["completed"] == "vlm-vqa track" and "recreated" not in found.data.tags
    assert history(outputs, found, "loss") == [(10, 2.0), (20, 1.0)] and found.data.metrics["bleu_1"] == 0.9
    assert found.data.metrics["questions_per_second"] == 9.0


def test_track_leaves_another_trainings_run_alone(outputs, params, monkeypatch):
    other = tracking.training_run(params, key="k", tags=HASHES | {"code_hash": "other"})
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    alive = tracking.training_run(params, key="l", tags=HASHES)
    monkeypatch.undo()
    run_id, made = tracking.recreate_run(outputs)
    assert made and run_id not in (other.run_id, alive.run_id) and len(runs(outputs)) == 3


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("models/trained/training.json", Path.unlink),
        ("models/trained/training.json", lambda path: path.write_text("{")),
        ("reports/evaluation.json", lambda path: path.write_text("{")),
        ("reports/train_curve.csv", Path.unlink),
        ("reports/validation/curve.csv", Path.unlink),
    ],
)
def test_track_names_the_file_it_cannot_read(outputs, name, damage):
    damage(outputs / name)
    with pytest.raises(UserError, match=f"{name} is.*(dvc repro|vlm-vqa repair)"):
        tracking.recreate_run(outputs)
    assert runs(outputs) == []


def test_track_needs_no_validation_where_none_was_made(outputs):
    shutil.rmtree(outputs / "reports/validation")
    text, left = re.subn(r"^validation:\n(  .*\n)+", "", (outputs / "params.yaml").read_text(), flags=re.MULTILINE)
    assert left == 1
    (outputs / "params.yaml").write_text(text)
    assert tracking.recreate_run(outputs)[1]


def test_track_fails_where_the_store_does(outputs, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9.*vlm-vqa track"):
        tracking.recreate_run(outputs)
