"""Several seeds by one command, as docs/reproducibility.md writes it: real DVC, real stages, tiny data."""

import os
import re
import statistics
import subprocess

import pytest

from proofs.project import ROOT, Project
from tests.mlflow_store import artifacts, runs


def commands() -> str:
    """Return the commands below "Several seeds" of the page."""
    section = (ROOT / "docs/reproducibility.md").read_text(encoding="utf-8").partition("## Several seeds\n")[2]
    return re.search(r"```bash\n(.*?)```", section, flags=re.DOTALL)[1]


@pytest.mark.slow
def test_queued_seeds_are_children_of_one_parent_with_mean_and_deviation(tmp_path, vqav2_folder):
    # Enough steps that some answers are right.
    longer = {"train.num_train_epochs": 20, "train.save_steps": 1000}
    project = Project(tmp_path / "project", {"data.directory": str(vqav2_folder()), **longer})
    (project.folder / ".gitignore").write_text("/checkpoints/\n/mlflow.db*\n/mlartifacts/\n__pycache__/\n")
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
    run(commands().replace("seed=0,1,2", "seed=0,1"))

    baseline = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=project.folder, capture_output=True, text=True, check=True
    )
    found = runs(project.folder)
    (parent,) = [one for one in found if "mlflow.parentRunId" not in one.data.tags]
    children = [one for one in found if one is not parent]
    assert {one.data.tags["mlflow.parentRunId"] for one in children} == {parent.info.run_id}
    assert sorted(one.data.params["seed"] for one in children) == ["0", "1"]
    assert len({one.data.tags["weights_hash"] for one in children}) == 2
    assert {one.info.status for one in found} == {"FINISHED"}
    assert parent.info.run_name.startswith(f"seeds of {baseline.stdout[:7]}: 2 runs, ")
    assert parent.data.metrics["seeds"] == 2
    for score in ("bleu_1", "vqa_accuracy"):
        values = [one.data.metrics[score] for one in children]
        assert parent.data.metrics[f"{score}_mean"] == pytest.approx(statistics.mean(values))
        assert parent.data.metrics[f"{score}_sd"] == pytest.approx(statistics.stdev(values))
    shared = dict(children[0].data.params.items() & children[1].data.params.items())
    hashes = {name: children[0].data.tags[name] for name in ("data_hash", "code_hash")}
    assert parent.data.params == {key: text for key, text in shared.items() if not key.startswith("tracking.")} | hashes
    assert set(artifacts(project.folder, parent)) == {"summary.csv", "summary.md"}
