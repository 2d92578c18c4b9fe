"""What `vlm-vqa compare` is told by a name: revisions, DVC's experiments, MLflow's runs, folders; and two of one name."""

import json
import os
import shutil
import subprocess

import pytest

from tests.evaluated import drawn, write_evaluated
from tests.tracking.conftest import checkout, empty_store, params  # noqa: F401 - fixtures
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.differences import compare_sides
from vlm_vqa.sides import side_of, working_tree
from vlm_vqa.tracking.evaluated import find_evaluated
from vlm_vqa.tracking.store import Store

OLD, NEW = drawn(0.9, 1), drawn(0.7, 2)


def git(*arguments: str) -> str:
    """Run git in the working directory."""
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(checkout, monkeypatch):  # noqa: F811
    """A checkout whose HEAD and the experiment `tidal-moor` were evaluated; its working tree is the experiment's child."""
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "a")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "a@b.c")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    git("init", "-q")
    (checkout / ".gitignore").write_text("/mlflow.db*\n/mlartifacts/\n/reports/predictions.parquet\n")
    for right, message, weights in ((OLD, "old", "a"), (NEW, "new", "b")):
        write_evaluated(checkout, right, weights, seed=len(message) if message == "new" else 0)
        git("add", ".")
        git("commit", "-qm", message)
    # As DVC keeps what an experiment has made of its baseline.
    git("update-ref", f"refs/exps/{git('rev-parse', 'HEAD~1')[:2]}/{git('rev-parse', 'HEAD~1')[2:]}/tidal-moor", "HEAD")
    git("reset", "-q", "--hard", "HEAD~1")
    write_evaluated(checkout, NEW, "c", seed=5)
    return checkout


def put_run(root, params) -> str:  # noqa: F811
    """Log what is in `root` as a stage would; return the run's id."""
    store = Store(params, root)
    run_id = store.create({"data_hash": "d" * 64, "weights_hash": "b" * 64, "evaluated": "true"})
    store.put_files(run_id, root / "reports", "reports")
    store.client.set_terminated(run_id, "FINISHED")
    return run_id


def test_a_revision_an_experiment_and_the_working_tree(repository):
    old, experiment, here = side_of("HEAD"), side_of("tidal-moor"), working_tree()
    assert (old.name, here.name) == (
        "git revision HEAD",
        "the working tree",
    ) and experiment.name == "experiment tidal-moor"
    assert side_of("exp:tidal-moor").scores == experiment.scores == here.scores != old.scores
    assert (old.params["seed"], experiment.params["seed"], here.params["seed"]) == ("0", "3", "5")
    # Git has none of DVC's outputs, and no cache is here.
    assert old.predictions is None and here.predictions is not None
    found = compare_sides(old, here)
    assert found.deciding().paired.verdict == "worse" and found.params == [("seed", "0", "5")]
    assert {row.group for row in found.rows} == {"overall", "other", "yes/no"}, "types are known from the other side"


def test_a_run_is_what_mlflow_has_of_it(repository, params):  # noqa: F811
    run_id = put_run(repository, params)
    run, here = side_of(run_id), working_tree()
    assert run.name == f"run {run_id}" and run.data_hash == "d" * 64 and run.predictions == here.predictions
    assert run.params["seed"] == str(params.seed)
    found = compare_sides(side_of("HEAD"), side_of(f"run:{run_id}"))
    assert found.deciding().paired.verdict == "worse"
    # What the file says and what MLflow was told are the same parameters.
    assert compare_sides(run, here).params == []
    assert find_evaluated("0" * 32) is None
    (repository / "mlflow.db").unlink()
    with pytest.raises(UserError, match="there is no run of that name here"):
        side_of(f"run:{run_id}")
    assert not (repository / "mlflow.db").exists(), "no store is made to look into it"


def test_a_folder_is_a_checkout_its_reports_or_a_copy_of_them(repository, tmp_path):
    shutil.copytree(repository / "reports", tmp_path / "copy")
    for name in (".", "reports", "copy", str(tmp_path / "copy")):
        assert side_of(f"folder:{name}").scores == working_tree().scores
    assert side_of("reports").params["seed"] == "5" and side_of("copy").params == {}


def test_a_name_of_two_things_is_said_with_its_kind(repository):
    git("branch", "reports")
    with pytest.raises(UserError, match="say which, by folder:reports or git:reports"):
        side_of("reports")
    assert side_of("git:reports").scores != side_of("folder:reports").scores
    git("update-ref", "refs/exps/ab/cdef/tidal-moor", "HEAD")
    with pytest.raises(UserError, match="2 experiments are called tidal-moor.*git:refs/exps/"):
        side_of("tidal-moor")
    assert side_of("git:refs/exps/ab/cdef/tidal-moor").scores == side_of("HEAD").scores


@pytest.mark.parametrize("name", ["nothing", "git:nothing", "folder:data", "run:" + "0" * 32, "exp:HEAD", "--all", ""])
def test_what_is_not_there_is_named(repository, name):
    with pytest.raises(UserError, match=r"there is no .* here\. `git fetch`"):
        side_of(name)


def test_what_was_not_evaluated_or_is_of_several_evaluations(repository):
    stale = (repository / "reports/predictions.parquet").read_bytes()
    write_evaluated(repository, OLD)
    (repository / "reports/predictions.parquet").write_bytes(stale)
    assert working_tree().predictions is None
    (repository / "reports/evaluation.json").write_text("{")
    with pytest.raises(UserError, match="the working tree: a file cannot be read"):
        working_tree()
    (repository / "reports/scores.parquet").unlink()
    with pytest.raises(UserError, match=r"the working tree has no reports/scores\.parquet"):
        working_tree()


def test_another_versions_parameters_are_read_as_they_stand(repository):
    (repository / "params.yaml").write_text("seed: 3\nnew: {key: [1, x]}\n")
    assert working_tree().params == {"seed": "3", "new.key": json.dumps([1, "x"])}
