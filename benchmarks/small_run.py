"""The small run, from a clone of what is committed to its scores: what README and documents say of it.

`python -m benchmarks.small_run` clones the commit at HEAD into a temporary folder, runs the five stages of
presets/small.yaml there one by one and notes each one's seconds, the largest process and the scores. Whatever lies in
reports/ here plays no part: scores move with the CPU, and the documents speak of the machine that the result names.

What the stages spend on hashes and checksums of what is stored, when it is written and when it is read, is counted within
the run: two runs differ by more than that. The clone's code is lengthened for it by `COUNTING`; a thread's time counts in
full, also where others work meanwhile.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from benchmarks import measure
from vlm_vqa.errors import UserError

ROOT = Path(__file__).parents[1]
LEAST_ACCURACY = 0.99
MOST_CHECKING = 0.03
"""Of the stages' time."""
COUNTED = "VLM_VQA_COUNTED"
"""A variable with the file into which every process writes its seconds at its end."""
COUNTING = {
    "hashing": f"""
import atexit, functools, os, threading, time
_spent, _now = [], threading.local()
def counted(function):
    @functools.wraps(function)
    def timed(*given, **options):
        if getattr(_now, "counts", False):
            return function(*given, **options)
        _now.counts, begun = True, time.perf_counter()
        try:
            return function(*given, **options)
        finally:
            _now.counts = False
            _spent.append(time.perf_counter() - begun)
    return timed
@atexit.register
def _tell():
    with open(os.environ["{COUNTED}"], "a") as file:
        file.write(f"{{sum(_spent)}}\\n")
sha256_file = counted(sha256_file)
""",
    "sealed": """
from vlm_vqa.hashing import counted
checksum, fingerprint, read_sealed = counted(checksum), counted(fingerprint), counted(read_sealed)
_CheckedFile._fetch_range = counted(_CheckedFile._fetch_range)
""",
}
"""What is added to modules of the package; reading the checked blocks is counted with their checksums."""


def run_stages(project: Path) -> dict[str, float]:
    """Run every stage of the project in turn; return the seconds of each."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A tracking store of its own: this run is a measurement, not an experiment.
    environment = {**os.environ, "PATH": programs, "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    # With `make repro`'s instructions, as it is compared with that.
    asked = subprocess.run(["make", "--silent", "same-bits"], cwd=project, check=True, capture_output=True, text=True)
    environment |= dict(one.split("=") for one in asked.stdout.split())
    seconds = {}
    for stage in yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"]:
        start = time.perf_counter()
        done = subprocess.run(["dvc", "repro", "--single-item", stage], cwd=project, env=environment, check=False)
        if done.returncode != 0:
            raise UserError(f"stage {stage} failed; its own message above says why.")
        seconds[stage] = time.perf_counter() - start
    return seconds


def scores(project: Path) -> dict[str, Any]:
    """Return what the stages have reported."""
    report = json.loads((project / "reports/evaluation.json").read_text(encoding="utf-8"))
    given = pq.read_table(project / "reports/predictions.parquet", columns=["score"])["score"].to_pylist()
    return {
        "this model": [report["vqa_accuracy"]["overall"], report["helm"]["bleu_1"]],
        **{name: [one["vqa_accuracy"], one["bleu_1"]] for name, one in report["baselines"].items()},
        "by answer type": {
            who: {group: [one[key] for key in ("mean", "low", "high")] for group, one in _groups(found).items()}
            for who, found in report["intervals"]["vqa_accuracy"].items()
        },
        "questions": len(given),
        "wrong": sum(score == 0 for score in given),
        "helm_instances": report["helm"]["instances"],
        "weights_hash": report["model"]["weights_hash"],
    }


def _groups(found: dict[str, Any]) -> dict[str, Any]:
    return {"all": found["overall"]} | found["per_answer_type"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages in a clone and write `small_run.json`."""
    measure.parse(measure.parser("small_run", __doc__), arguments)
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        subprocess.run(["git", "clone", "--quiet", ROOT, project], check=True)
        shutil.copy(project / "presets/small.yaml", project / "params.yaml")
        for module, more in COUNTING.items():
            with open(project / f"src/vlm_vqa/{module}.py", "a", encoding="utf-8") as file:
                file.write(more)
        os.environ[COUNTED] = f"{folder}/counted"
        seconds = run_stages(project)
        checking = [float(line) for line in Path(folder, "counted").read_text().splitlines()]
        found = scores(project)
    # Of all processes that have ended: the largest one.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    accuracy = found["this model"][0]
    share = sum(checking) / sum(seconds.values())
    claims = [
        measure.Claim("VQA accuracy of the small run", accuracy, accuracy, accuracy, target=LEAST_ACCURACY),
        measure.Claim("small run: share of its time for checks", share, share, share, MOST_CHECKING, at_most=True),
    ]
    details = {"scores": found, "seconds": seconds, "peak_gib": peak, "seconds_of_checks_by_process": checking}
    measure.write("small_run", claims, details, {"questions and pictures": "easy-vqa"})


if __name__ == "__main__":
    main()
