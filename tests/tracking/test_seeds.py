"""Several seeds by the commands of docs/reproducibility.md: real DVC and MLflow, and dvc.yaml with stages made of paper."""

import os
import re
import shutil
import statistics
import subprocess

import pytest
import yaml

from proofs.project import ROOT, Project
from tests.mlflow_store import artifacts, runs

STAGE = """
import sys
from pathlib import Path

import yaml

name, seed = sys.argv[1], yaml.safe_load(Path("params.yaml").read_text())["seed"]
stage = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][name]
for out in stage.get("outs", []) + stage.get("metrics", []) + stage.get("plots", []):
    path = Path(next(iter(out)) if isinstance(out, dict) else out)
    path = path if path.suffix else path / "file"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{name} {seed}")
if name in ("train", "helm-eval"):
    from vlm_vqa import tracking
    from vlm_vqa.params import load_params

    params, weights = load_params(), f"{seed:064d}"
if name == "train":
    with tracking.training_run(params, key=weights, tags={"data_hash": "d", "code_hash": "c"}) as run:
        run.log_metrics({"loss": 1.0}, 1)
        run.log_weights("models/trained", weights)
if name == "helm-eval":
    report = {"helm": {"bleu_1": 0.8 + seed / 20}, "vqa_accuracy": {"overall": 0.7 + seed / 40}}
    tracking.log_results(params, weights_hash=weights, report=report, files=["reports/evaluation.json"])
"""


def commands() -> str:
    """Return the commands below "Several seeds" of the page."""
    section = (ROOT / "docs/reproducibility.md").read_text(encoding="utf-8").partition("## Several seeds\n")[2]
    return re.search(r"```bash\n(.*?)```", section, flags=re.DOTALL)[1]


@pytest.mark.slow
def test_queued_and_temporary_seeds_are_children_of_one_parent_in_the_checkouts_store(
    tmp_path, vqav2_folder, empty_store
):
    """DVC deletes the copies in which it runs experiments: whatever is logged there must not be in them."""
    project = Project(tmp_path / "project", {"data.directory": str(vqav2_folder())})
    pipeline = yaml.safe_load((project.folder / "dvc.yaml").read_text())
    for name, stage in pipeline["stages"].items():
        stage["cmd"] = f"env PYTHONPATH=src:. python stage.py {name}"
    (project.folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    (project.folder / "stage.py").write_text(STAGE)
    shutil.copy(empty_store, project.folder / "mlflow.db")
    (project.folder / ".gitignore").write_text("/mlflow.db*\n/mlartifacts/\n__pycache__/\n")
    who = {f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    alone = who | {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
        "DVC_NO_ANALYTICS": "1",
    }

    def run(commands: str) -> None:
        done = project.command(f"set -e\n{commands}", **alone)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    run("dvc repro --quiet extract-features && git add . && git commit --quiet --message start")
    assert "seed=0,1,2" in commands()
    run("dvc exp run --temp --name aside -S seed=2\n" + commands().replace("seed=0,1,2", "seed=0,1"))

    baseline = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=project.folder, capture_output=True, text=True, check=True
    )
    found = runs(project.folder)
    (parent,) = [one for one in found if "mlflow.parentRunId" not in one.data.tags]
    children = [one for one in found if one is not parent]
    assert {one.data.tags["mlflow.parentRunId"] for one in children} == {parent.info.run_id}
    assert sorted(one.data.params["seed"] for one in children) == ["0", "1", "2"]
    assert [one.data.params["seed"] for one in children if one.data.tags["dvc_experiment"] == "aside"] == ["2"]
    assert len({one.data.tags["weights_hash"] for one in children}) == 3
    assert {one.info.status for one in found} == {"FINISHED"}
    assert parent.info.run_name.startswith(f"seeds of {baseline.stdout[:7]}: 3 runs, ")
    assert parent.data.metrics["seeds"] == 3
    for score in ("bleu_1", "vqa_accuracy"):
        values = [one.data.metrics[score] for one in children]
        assert parent.data.metrics[f"{score}_mean"] == pytest.approx(statistics.mean(values))
        assert parent.data.metrics[f"{score}_sd"] == pytest.approx(statistics.stdev(values))
    assert set(artifacts(project.folder, parent)) == {"summary.csv"}
    assert all("weights/file" in artifacts(project.folder, one) for one in children)
