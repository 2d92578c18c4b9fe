"""The alias `champion`, in a real store: it moves when a model is shown to be better, and else says why it stays."""

import dataclasses

import pytest
from mlflow import MlflowClient

from tests.evaluated import drawn, write_evaluated
from tests.tracking.conftest import checkout, empty_store, params  # noqa: F401 - fixtures
from vlm_vqa.cli import main
from vlm_vqa.errors import UserError
from vlm_vqa.params import Gate
from vlm_vqa.promote import promote
from vlm_vqa.tracking.store import Store

WORSE, GOOD, BETTER = drawn(0.7, 1), drawn(0.8, 2), drawn(0.95, 3)


@pytest.fixture
def store(checkout, params):  # noqa: F811
    """A store with an empty registered model."""
    store = Store(params, checkout)
    store.client.create_registered_model("vlm-vqa")
    return store


def register(store, checkout, right, weights, data="d", status="FINISHED", reports=True) -> str:  # noqa: F811
    """Log an evaluated run and register its export; return the run's id."""
    tags = {"data_hash": data * 64, "weights_hash": weights * 64, "mask": "causal"}
    run_id = store.create(tags | {"evaluated": "true"})
    write_evaluated(checkout, right, weights)
    if reports:
        store.put_files(run_id, checkout / "reports", "reports")
    store.client.set_terminated(run_id, status) if status != "RUNNING" else None
    store.client.create_model_version("vlm-vqa", str(checkout), run_id, tags)
    return run_id


def champion(checkout) -> str | None:  # noqa: F811
    """Return the version that has the alias."""
    client = MlflowClient(tracking_uri=f"sqlite:///{checkout / 'mlflow.db'}")
    version = client.get_registered_model("vlm-vqa").aliases.get("champion")
    return None if version is None else str(version)


def test_the_first_is_made_and_a_better_one_follows(store, checkout, params, capsys):  # noqa: F811
    register(store, checkout, GOOD, "a")
    better = register(store, checkout, BETTER, "b")
    assert main(["promote", "1"]) == 0
    assert "version 1 of vlm-vqa is the champion now. the first champion" in capsys.readouterr().out
    assert main(["promote", better]) == 0
    assert f"vqa_accuracy of run {better} against run" in capsys.readouterr().out and champion(checkout) == "2"
    tags = store.client.get_model_version("vlm-vqa", "2").tags
    assert tags["champion.over"] == "1" and ": better: +0." in tags["champion.figures"]
    # It stays with whom it is.
    assert main(["promote", "1"]) == 1 and "worse: -0." in (said := capsys.readouterr().out)
    assert "Version 2 stays the champion" in said and champion(checkout) == "2"
    assert main(["promote", "2"]) == 0 and "is the champion already" in capsys.readouterr().out


def test_one_not_shown_to_be_better_follows_within_a_margin_for_a_reason(store, checkout, params):  # noqa: F811
    register(store, checkout, GOOD, "a")
    register(store, checkout, GOOD, "b")
    register(store, checkout, WORSE, "c")
    promote(params, "1", None, None)
    assert promote(params, "2", None, None)[1] is False and champion(checkout) == "1"
    for margin, reason in ((0.01, None), (0.01, "  "), (None, "smaller"), (0.0, "smaller"), (1.5, "smaller")):
        with pytest.raises(UserError, match="--margin"):
            promote(params, "2", margin, reason)
    assert promote(params, "2", 0.01, "half the size")[1] and champion(checkout) == "2"
    tags = store.client.get_model_version("vlm-vqa", "2").tags
    assert (tags["champion.margin"], tags["champion.reason"]) == ("0.01", "half the size")
    said, done = promote(params, "3", 0.01, "half the size")
    assert not done and "nor surely less than 0.01 worse" in said and champion(checkout) == "2"


def test_the_score_is_the_gates(store, checkout, params):  # noqa: F811
    mixed = GOOD.copy()
    mixed[1::2] = False  # HELM is asked the others
    register(store, checkout, mixed, "a")
    mixed = mixed.copy()
    mixed[1::2] = True
    register(store, checkout, mixed, "b")
    promote(params, "1", None, None)
    bleu = dataclasses.replace(params, evaluation=dataclasses.replace(params.evaluation, gate=Gate.BLEU_1))
    assert "bleu_1 of run" in (said := promote(bleu, "2", None, None))[0] and not said[1]
    assert promote(params, "2", None, None)[1]


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ({"data": "e"}, "version 2 is of other data than the champion, version 1"),
        ({"right": BETTER[2:]}, "they answered other questions"),
        ({"status": "RUNNING"}, "its run .* is not finished but RUNNING"),
        ({"status": "FAILED"}, "its run .* is not finished but FAILED"),
        ({"reports": False}, "its run .* has no report"),
    ],
)
def test_what_cannot_be_compared_is_refused(store, checkout, params, of, message):  # noqa: F811
    register(store, checkout, GOOD, "a")
    promote(params, "1", None, None)
    register(store, checkout, **{"right": BETTER, "weights": "b"} | of)
    with pytest.raises(UserError, match=message):
        promote(params, "2", 0.5, "I insist")
    assert champion(checkout) == "1"


def test_a_report_of_another_export_says_nothing_of_this_one(store, checkout, params):  # noqa: F811
    run_id = register(store, checkout, GOOD, "a")
    for key, value in (("weights_hash", "z"), ("mask", "prefix-lm")):
        tags = {"data_hash": "d", "weights_hash": "a" * 64, "mask": "causal"} | {key: value}
        version = store.client.create_model_version("vlm-vqa", str(checkout), run_id, tags).version
        with pytest.raises(UserError, match=f"the report of its run is of another {key}"):
            promote(params, str(version), None, None)
    with pytest.raises(UserError, match="it made several: name version [123] or [123] or [123]"):
        promote(params, run_id, None, None)
    assert champion(checkout) is None


def test_unknown_versions_and_stores_are_named(store, checkout, params):  # noqa: F811
    for name in ("7", "0" * 32, "x'; drop"):
        with pytest.raises(UserError, match=f"^{name}: no one version of the model vlm-vqa"):
            promote(params, name, None, None)
    (checkout / "mlflow.db").unlink()
    with pytest.raises(UserError, match="there is no MLflow store here"):
        promote(params, "1", None, None)
