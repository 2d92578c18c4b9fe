"""Does DVC's queue give runs that can be compared? Three learning rates and two seeds, six runs below one parent in MLflow.

`python -m proofs.queue` makes a copy of the project with 109 questions of VQAv2, queues six experiments, starts the queue,
and looks at what is left: in MLflow, in `vlm-vqa compare` and, where there is a Chromium, on the page of `mlflow ui`.
"""

import base64
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure, vqav2
from proofs.project import Project, own_sample, workplace
from vlm_vqa import cli
from vlm_vqa.errors import UserError
from vlm_vqa.tracking.store import view_url

RATES, SEEDS = ("1e-5", "1e-3", "4e-3"), (0, 1)
# Enough steps for the two higher rates to learn the few questions, which are train and val.
CHANGES = {"train.num_train_epochs": 30, "train.logging_steps": 20, "train.save_steps": 100_000}
PATIENCE, BROWSERS = 3600.0, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUEUE = f"dvc exp run --queue -S train.learning_rate={','.join(RATES)} -S seed={','.join(map(str, SEEDS))}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Queue, wait, look, and write `queue.json` and `queue.png`."""
    parser = measure.parser("queue", __doc__, "proofs")
    parser.add_argument("--folder", type=Path, help="make the copy there and keep it; default: a temporary folder")
    options = measure.parse(parser, arguments)
    with workplace(options.folder) as place:
        project = Project.at(place / "queue")
        if not (project.folder / "queued").exists():
            shutil.rmtree(project.folder, ignore_errors=True)
            project = Project(project.folder, {**own_sample(place), **CHANGES})
            fill_queue(project)
        empty_queue(project)
        runs = look(project)
        compared = compare(project, runs)
        picture = draw(project, measure.RESULTS / "queue.png")
    held = [run["low"] <= run["score"] <= run["high"] for run in runs]
    agreeing = [pair["agrees"] for pair in compared]
    claims = [
        measure.Claim("runs below one parent, each finished and evaluated", len(runs), len(runs), len(runs), 6),
        measure.Claim("runs whose score lies in its interval, both of them metrics", sum(held), 0, 6, 6),
        measure.Claim("pairs that vlm-vqa compare says right", sum(agreeing), 0, len(compared), len(compared)),
    ]
    details = {"runs": runs, "compared": compared, "picture": picture}
    measure.write("queue", claims, details, {"questions and pictures": vqav2.origin(vqav2.SAMPLE)})


def fill_queue(project: Project) -> None:
    """Make and commit the records and features, and queue all experiments."""
    (project.folder / ".gitignore").write_text("/mlflow.db*\n/mlartifacts/\n__pycache__/\n/queued\n")
    call(project, "dvc repro --quiet extract-features && git add . && git commit --quiet --message start")
    call(project, QUEUE)
    (project.folder / "queued").touch()


def empty_queue(project: Project) -> None:
    """Start the queue and wait until it is empty; UserError if an experiment failed."""
    call(project, "dvc queue start --jobs 1")
    try:
        until = time.monotonic() + PATIENCE
        while re.search(r"\b(Queued|Running)\b", status := call(project, "dvc queue status")):
            if time.monotonic() > until:
                raise UserError(f"the queue is not done after {PATIENCE:.0f} s:\n{status}")
            time.sleep(5)
        if status.count("Success") != len(RATES) * len(SEEDS):
            raise UserError(f"not every experiment succeeded; `dvc queue logs NAME` in {project.folder}:\n{status}")
    finally:
        project.command("dvc queue stop --kill", **own(project))


def own(project: Project) -> dict[str, str]:
    """Return what keeps the user's store, identity and index of DVC's out of it."""
    who = {f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    site = str(project.folder / ".git/site")
    return who | {
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
        "DVC_SITE_CACHE_DIR": site,
        "GIT_CONFIG_GLOBAL": os.devnull,
    }


def call(project: Project, command: str) -> str:
    """Run a command of the user's in the copy and return what it prints; UserError if it fails."""
    done = project.command(command, **own(project))
    if done.returncode:
        raise UserError(f"{command} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def store_of(project: Project) -> Any:
    """Return MLflow's client of the copy's store."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{project.folder / 'mlflow.db'}")


def look(project: Project) -> list[dict[str, Any]]:
    """Return the six runs below the one parent, best first: as MLflow sorts them by the score."""
    client = store_of(project)
    (experiment,) = [one for one in client.search_experiments() if one.name != "Default"]
    found = client.search_runs([experiment.experiment_id], order_by=["metrics.vqa_accuracy DESC"])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run not in parents]
    if len(parents) != 1 or {run.data.tags["mlflow.parentRunId"] for run in children} != {parents[0].info.run_id}:
        raise UserError(f"{len(parents)} runs have no parent in {project.folder / 'mlflow.db'} instead of one")
    return [
        {
            "run": run.info.run_id,
            "experiment": run.data.tags["dvc_experiment"],
            "train.learning_rate": run.data.params["train.learning_rate"],
            "seed": run.data.params["seed"],
            "score": run.data.metrics["vqa_accuracy"],
            "low": run.data.metrics["vqa_accuracy_low"],
            "high": run.data.metrics["vqa_accuracy_high"],
        }
        for run in children
        if run.info.status == "FINISHED" and run.data.tags.get("evaluated") == "true"
    ]


def compare(project: Project, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Call `vlm-vqa compare` on every pair, one by its run and one by its experiment; hold it against MLflow's figures."""
    pairs = []
    for old, new in itertools.combinations(runs, 2):
        words = ["compare", f"run:{old['run']}", f"exp:{new['experiment']}"]
        with contextlib.chdir(project.folder), contextlib.redirect_stdout(io.StringIO()) as output:
            cli.main(words)
        said = output.getvalue()
        told = re.search(r": ([+-][\d.]+) \(95 % interval (\S+) .. (\S+), p = (\S+)\)", said)
        change, low, high, p = map(float, told.groups()) if told else (0.0, 0.0, 0.0, 1.0)
        verdict = re.findall(r": (better|worse|no difference shown):", said)[0]
        surely = p <= 0.05 and not low <= 0 <= high
        expected = ("better" if change > 0 else "worse") if surely else "no difference shown"
        differ = {key for key in ("seed", "train.learning_rate") if old[key] != new[key]}
        named = set(
            re.findall(r"^\| (\S+)", said.partition("Parameters that differ")[2].partition("questions that")[0], re.M)
        )
        agrees = abs(change - (new["score"] - old["score"])) < 1e-4 and verdict == expected
        agrees = agrees and named - {"parameter"} == differ
        pairs.append({"A": old["run"], "B": new["run"], "change": change, "p": p, "verdict": verdict, "agrees": agrees})
    return pairs


def draw(project: Project, out: Path) -> dict[str, Any]:
    """Write a picture of the page that `mlflow ui` shows the runs on, sorted by the score; say which runs are on it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return {"made": False, "why": "no Chromium"}
    # A view of its own: sorted by the score, which takes runs out of their parent, with what the proof is about.
    columns = [f"metrics.`vqa_accuracy{of}`" for of in ("", "_low", "_high")]
    state = {"selectedColumns": [*columns, "params.`train.learning_rate`", "params.`seed`"], "orderByAsc": False}
    packed = base64.b64encode(zlib.compress(json.dumps(state | {"orderByKey": columns[0]}).encode())).decode()
    view = {"name": "By score", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
    store_of(project).set_experiment_tag("1", "mlflow.sharedViewState.proof", json.dumps(view))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["mlflow", "ui", "--port", str(port), "--backend-store-uri", "sqlite:///mlflow.db", "--workers", "1"]
    server = subprocess.Popen(
        command, cwd=project.folder, env=project.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        address = view_url(f"http://127.0.0.1:{port}", "1").replace(
            "viewStateShareKey=scores", "viewStateShareKey=proof"
        )
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=2100,700",
            "--virtual-time-budget=120000",
        ]
        profile = f"--user-data-dir={project.folder / '.git/browser'}"
        for what in (f"--screenshot={out}", "--dump-dom"):
            done = subprocess.run(
                [browser, *flags, profile, what, address], capture_output=True, text=True, timeout=300
            )
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    names = sorted(set(re.findall(r"(\w+-\w+): lr ", done.stdout)))
    return {"made": out.exists(), "experiments on it": names}


if __name__ == "__main__":
    main()
