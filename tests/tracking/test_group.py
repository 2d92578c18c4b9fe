"""Experiments as children of one parent run: which it is, what it says of them, and that it never costs a run."""

import contextlib
import csv
import dataclasses
import io
import json
import logging
import math
import threading
import time

import pytest
from mlflow import MlflowClient

from tests.mlflow_store import artifacts, runs
from vlm_vqa import tracking
from vlm_vqa.tracking import group
from vlm_vqa.tracking.store import Store

BASELINE = "a1b2c3d4" * 5
HASHES = {"data_hash": "d" * 64, "code_hash": "c" * 64}


@pytest.fixture
def experiment(monkeypatch):
    """As in a stage that DVC runs for an experiment of the commit BASELINE."""
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", BASELINE)
    monkeypatch.setenv("DVC_EXP_NAME", "molal-coir")


def with_train(params, **changes):
    return dataclasses.replace(params, train=dataclasses.replace(params.train, **changes))


def weights(params) -> str:
    return params.hash()[:32] * 2


def start(params, **hashes) -> str:
    time.sleep(0.002)  # start times are in milliseconds
    with tracking.training_run(params, key=params.hash(), tags=HASHES | hashes) as run:
        run.set_tags({"weights_hash": weights(params)})
    return run.run_id


def score(params, bleu: float, accuracy: float | None = None) -> None:
    report = {"helm": {"bleu_1": bleu}} | ({"vqa_accuracy": {"overall": accuracy}} if accuracy is not None else {})
    tracking.log_results(params, weights_hash=weights(params), report=report)


def run_all(params, bleu: float, accuracy: float | None = None, **hashes) -> str:
    run_id = start(params, **hashes)
    score(params, bleu, accuracy)
    return run_id


def seeds(params, *numbers: int):
    return [dataclasses.replace(params, seed=number) for number in numbers]


def family(checkout):
    """Return the parent, which must be the only one, and the others by id."""
    found = runs(checkout)
    (parent,) = [run for run in found if group.PARENT in run.data.tags]
    return parent, {run.info.run_id: run for run in found if run is not parent}


def table(checkout, parent) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(artifacts(checkout, parent)["summary.csv"])))


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_plain_run_has_no_parent(checkout, params):
    run_all(params, 0.9)
    (run,) = runs(checkout)
    assert not {group.CHILD, group.PARENT, group.LINK} & set(run.data.tags)


def test_children_evaluated_in_any_order_have_a_mean_and_a_deviation(checkout, params, experiment, caplog):
    three = seeds(params, 0, 1, 2)
    ids = [start(one) for one in three]
    parent, children = family(checkout)
    assert parent.info.status == "FINISHED" and parent.info.run_name == "seeds of a1b2c3d"
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    for one, bleu, accuracy in zip(reversed(three), (0.9, 0.8, 0.4), (0.5, 0.7, 0.9), strict=True):
        score(one, bleu, accuracy)
    parent, children = family(checkout)
    assert set(children) == set(ids)
    assert parent.data.metrics == pytest.approx(
        {"bleu_1_mean": 0.7, "bleu_1_sd": 0.07**0.5, "vqa_accuracy_mean": 0.7, "vqa_accuracy_sd": 0.2, "seeds": 3}
    )
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "seeds of a1b2c3d: 3 runs, vqa_accuracy 0.7000 ± 0.2000, bleu_1 0.7000 ± 0.2646"
    header, row = artifacts(checkout, parent)["summary.csv"].splitlines()
    assert header == "seeds," + ",".join(
        f"{score}_{figure}" for score in ("vqa_accuracy", "bleu_1") for figure in ("mean", "sd", "min", "max")
    )
    assert [round(float(text), 6) for text in row.split(",")] == [3, 0.7, 0.2, 0.5, 0.9, 0.7, 0.264575, 0.4, 0.9]
    assert not warnings(caplog)


def test_of_one_seed_the_newest_run_counts(checkout, params, experiment):
    zero, one = seeds(params, 0, 1)
    run_all(zero, 0.1)
    run_all(one, 0.5)
    run_all(zero, 0.3)
    parent, children = family(checkout)
    assert len(children) == 3
    assert parent.data.metrics == pytest.approx({"bleu_1_mean": 0.4, "bleu_1_sd": 0.02**0.5, "seeds": 2})
    score(one, 0.7)  # evaluated again
    parent, _ = family(checkout)
    assert parent.data.metrics["bleu_1_mean"] == pytest.approx(0.5)


def test_three_learning_rates_and_two_seeds_are_three_rows_of_one_parent(checkout, params, experiment):
    rates = [0.001, 0.002, 0.003]
    for number, rate in enumerate(rates):
        for seed in (0, 1):
            (one,) = seeds(with_train(params, learning_rate=rate), seed)
            run_all(one, 0.1 * number + 0.02 * seed)
    parent, children = family(checkout)
    assert len(children) == 6 and {run.data.tags[group.LINK] for run in children.values()} == {parent.info.run_id}
    assert parent.info.run_name == "3 recipes of a1b2c3d: 6 runs"
    # After the first two, which differed in the seed alone, it had figures: nothing of one recipe may stay.
    assert set(parent.data.metrics) == {"seeds", "bleu_1_mean", "bleu_1_sd"}
    assert all(map(math.isnan, parent.data.metrics.values()))
    rows = table(checkout, parent)
    assert list(rows[0]) == [
        "train.learning_rate",
        "seeds",
        *(f"bleu_1_{name}" for name in ("mean", "sd", "min", "max")),
    ]
    assert [(row["train.learning_rate"], row["seeds"]) for row in rows] == [(str(rate), "2") for rate in rates]
    assert [float(row["bleu_1_mean"]) for row in rows] == pytest.approx([0.01, 0.11, 0.21])
    assert [float(row["bleu_1_sd"]) for row in rows] == pytest.approx([0.02 / 2**0.5] * 3)


def test_runs_of_different_recipes_have_no_mean(checkout, params, experiment):
    run_all(params, 0.1)
    first, _ = family(checkout)
    run_all(with_train(params, learning_rate=0.1), 0.3)
    parent, _ = family(checkout)
    assert parent.info.run_id == first.info.run_id, "nothing had to be taken back"
    assert parent.data.metrics == {} and parent.info.run_name == "2 recipes of a1b2c3d: 2 runs"
    assert [row["bleu_1_mean"] for row in table(checkout, parent)] == ["0.1", "0.3"]


def test_a_recipe_is_data_and_code_too_but_not_the_tracking(checkout, params, experiment):
    zero, one, two = seeds(params, 0, 1, 2)
    run_all(zero, 0.1)
    run_all(dataclasses.replace(one, tracking=dataclasses.replace(one.tracking, max_artifact_mib=7)), 0.2)
    parent, _ = family(checkout)
    assert parent.data.metrics["seeds"] == 2
    run_all(two, 0.3, code_hash="e" * 64)
    parent, _ = family(checkout)
    assert all(map(math.isnan, parent.data.metrics.values()))
    assert [(row["code_hash"][0], row["seeds"]) for row in table(checkout, parent)] == [("c", "2"), ("e", "1")]


def test_what_dvc_does_not_run_again_counts(checkout, params, monkeypatch):
    """`dvc exp run -S seed=0,1` after `dvc repro` with seed 0: DVC has the results of seed 0, and no stage runs."""
    zero, one = seeds(params, 0, 1)
    plain = run_all(zero, 0.2)
    run_all(seeds(with_train(params, learning_rate=0.1), 2)[0], 0.0)  # of a recipe that no child has
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", BASELINE)
    run_all(one, 0.4)
    parent, others = family(checkout)
    assert parent.data.metrics == pytest.approx({"bleu_1_mean": 0.3, "bleu_1_sd": 0.02**0.5, "seeds": 2})
    assert group.LINK not in others[plain].data.tags, "it stays where it was"


def test_another_baseline_has_another_parent(checkout, params, experiment, monkeypatch):
    zero, one = seeds(params, 0, 1)
    start(zero)
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "f" * 40)
    start(one)
    found = runs(checkout)
    assert {run.data.tags[group.PARENT] for run in found if group.PARENT in run.data.tags} == {BASELINE, "f" * 40}
    assert len({run.data.tags[group.LINK] for run in found if group.LINK in run.data.tags}) == 2


def test_a_run_that_failed_is_a_child_and_does_not_count(checkout, params, experiment):
    zero, one = seeds(params, 0, 1)
    with pytest.raises(ValueError, match="x"), tracking.training_run(zero, key="k", tags=HASHES):
        raise ValueError("x")
    run_all(one, 0.5)
    parent, children = family(checkout)
    assert len(children) == 2 and parent.info.run_name == "seeds of a1b2c3d: 1 run"
    figures = ("bleu_1_mean", "bleu_1_sd", "bleu_1_min", "bleu_1_max")
    assert table(checkout, parent) == [{"seeds": "1", **dict(zip(figures, ("0.5", "", "0.5", "0.5"), strict=True))}]


def test_what_track_records_reaches_the_parent(checkout, params, experiment, monkeypatch):
    zero, one = seeds(params, 0, 1)
    run_all(one, 0.5)
    start(zero)
    monkeypatch.delenv("DVC_EXP_BASELINE_REV")  # `vlm-vqa track` is no stage
    for name, content in {
        "models/trained/training.json": json.dumps({"weights_hash": weights(zero), **HASHES}),
        "dvc.lock": "stages: {}",
        "reports/train_curve.csv": "step,loss\n10,2.0\n",
        "reports/validation/curve.csv": "step,validation_score\n10,0.5\n",
        "reports/evaluation.json": json.dumps({"helm": {"bleu_1": 0.7}}),
    }.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(content)
    tracking.recreate_run(checkout)
    parent, _ = family(checkout)
    assert parent.data.metrics["bleu_1_mean"] == pytest.approx(0.6)
    # In an experiment whose training came out of DVC's run cache, the run is made from the outputs.
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", BASELINE)
    (two,) = seeds(params, 2)
    (checkout / "models/trained/training.json").write_text(json.dumps({"weights_hash": weights(two), **HASHES}))
    score(two, 0.9)
    parent, children = family(checkout)
    assert len(children) == 3 and parent.data.metrics["bleu_1_mean"] == pytest.approx(0.7)
    assert {run.data.tags[group.LINK] for run in children.values()} == {parent.info.run_id}


def test_a_parent_that_fails_costs_a_warning_and_is_mended(checkout, params, experiment, monkeypatch, caplog):
    zero, one = seeds(params, 0, 1)

    def fails(*_):
        raise ConnectionError("away")

    with monkeypatch.context() as away:
        away.setattr(group, "_parent", fails)
        run_all(zero, 0.1)
    (run,) = runs(checkout)
    assert run.info.status == "FINISHED" and run.data.metrics["bleu_1"] == 0.1
    assert (
        len(warnings(caplog)) == 2
    )  # one by the training, one by the evaluation, which is another process in a real run
    assert all("parent (away)" in message for message in warnings(caplog))
    run_all(one, 0.3)
    parent, children = family(checkout)
    assert parent.data.metrics["bleu_1_mean"] == pytest.approx(0.2)
    assert {run.data.tags[group.LINK] for run in children.values()} == {parent.info.run_id}
    assert len(warnings(caplog)) == 2


def test_a_parent_that_was_deleted_is_made_again(checkout, params, experiment):
    run_all(seeds(params, 0)[0], 0.1)
    MlflowClient(tracking_uri=f"sqlite:///{checkout / 'mlflow.db'}").delete_run(family(checkout)[0].info.run_id)
    run_all(seeds(params, 1)[0], 0.3)
    parent, children = family(checkout)
    assert parent.data.metrics["seeds"] == 2
    assert {run.data.tags[group.LINK] for run in children.values()} == {parent.info.run_id}


def test_workers_that_start_at_once_have_one_parent(checkout, params, experiment, monkeypatch):
    """Each looks for the parent before any has made one."""
    several = seeds(params, 0, 1, 2)
    together, waited, search = threading.Barrier(len(several), timeout=60), set(), Store.search

    def search_with_others(store, condition, *more):
        found = search(store, condition, *more)
        if group.PARENT in condition and (me := threading.get_ident()) not in waited:
            waited.add(me)
            assert found == []
            together.wait()
        return found

    with monkeypatch.context() as slowed:
        slowed.setattr(Store, "search", search_with_others)
        threads = [threading.Thread(target=start, args=[one]) for one in several]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(waited) == len(several)
    for one in several:
        score(one, 0.1 * one.seed)
    parent, children = family(checkout)
    assert {run.data.tags[group.LINK] for run in children.values()} == {parent.info.run_id}
    assert parent.data.metrics == pytest.approx({"bleu_1_mean": 0.1, "bleu_1_sd": 0.1, "seeds": 3})


@contextlib.contextmanager
def reads_before_and_writes_after(monkeypatch, params, bleu: float):
    """A worker that scores `params`, is caught by what is done in this context, and then goes on."""
    read, others, write = threading.Event(), threading.Event(), group._write

    def write_last(*arguments):
        if threading.current_thread() is late and not read.is_set():
            read.set()
            assert others.wait(60)
        write(*arguments)

    monkeypatch.setattr(group, "_write", write_last)
    late = threading.Thread(target=score, args=[params, bleu])
    late.start()
    assert read.wait(60)
    yield
    others.set()
    late.join()


def test_a_worker_that_writes_late_does_not_hide_what_others_wrote(checkout, params, experiment, monkeypatch):
    """It has read the scores of two seeds, and writes their figures after others have written those of three."""
    zero, one, two = seeds(params, 0, 1, 2)
    run_all(zero, 0.0)
    for each in (one, two):
        start(each)
    with reads_before_and_writes_after(monkeypatch, one, 0.1):
        score(two, 0.2)
    parent, _ = family(checkout)
    assert parent.data.metrics == pytest.approx({"bleu_1_mean": 0.1, "bleu_1_sd": 0.1, "seeds": 3})


def test_a_worker_that_writes_late_of_fewer_recipes_is_corrected(checkout, params, experiment, monkeypatch, caplog):
    """Another learning rate was evaluated between its reading and its writing."""
    zero, one = seeds(params, 0, 1)
    (other,) = seeds(with_train(params, learning_rate=0.1), 0)
    for each in (zero, one, other):
        start(each)
    score(zero, 0.1)
    score(one, 0.2)
    with reads_before_and_writes_after(monkeypatch, one, 0.3):
        score(other, 0.4)
    parent, _ = family(checkout)
    assert all(map(math.isnan, parent.data.metrics.values()))
    assert parent.info.run_name == "2 recipes of a1b2c3d: 3 runs"
    assert [float(row["bleu_1_max"]) for row in table(checkout, parent)] == pytest.approx([0.3, 0.4])
    assert not warnings(caplog)
