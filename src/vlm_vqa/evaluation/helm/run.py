"""Run HELM itself: its own programs in child processes, with our client behind them."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

import vlm_vqa
from vlm_vqa import cores
from vlm_vqa.errors import GO_ON, UserError
from vlm_vqa.pipeline import orphans

# What the client writes into HELM's log for us to read.
ANSWERED = "vlm-vqa client answered"
FAILED = "vlm-vqa client failed:"

# Relative, as the pictures of HELM's page must be, which it shows only from a folder of this name.
OUTPUT = Path("benchmark_output")
SCENARIO = OUTPUT / "scenarios" / "vqa"  # filled by `write_scenario`
SUITE = "vlm-vqa"
RESULTS = OUTPUT / "runs" / SUITE
CONFIG = Path("evaluation/helm")  # deployments, metadata, run entries and schema

log = logging.getLogger(__name__)


def run_helm(instances: int, threads: int, environment: Mapping[str, str]) -> None:
    """Run HELM's `vqa` over the scenario folder of so many instances, and summarise it; earlier results must be gone.

    UserError if the client refused, as an unreadable image or another instruction; RuntimeError if HELM failed otherwise.
    """
    common = ["--suite", SUITE, "--output-path", str(OUTPUT), "--local-path", str(CONFIG)]
    run = ["helm.benchmark.run", *common, "--conf-paths", str(CONFIG / "run_entries.conf")]
    run += ["-m", str(instances), "-n", str(threads), "--exit-on-error", "--disable-cache"]
    summarise = ["helm.benchmark.presentation.summarize", *common, "--schema-path", str(CONFIG / "schema.yaml")]
    with tqdm(total=instances, desc="HELM: questions", unit="question", mininterval=1) as bar:
        _run_child(run, OUTPUT / "helm-run.log", environment, bar)
    log.info("HELM has scored %d answers; now its web view", instances)
    _run_child(summarise, OUTPUT / "helm-summarize.log", environment)
    log.info("look at HELM's page, pictures included, with: make helm-web")


def _run_child(
    arguments: Sequence[str], log_path: Path, environment: Mapping[str, str], bar: tqdm | None = None
) -> None:
    """Run `python -m ARGUMENTS`, its output going to `log_path`; the child never outlives this call."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    # This very package and the folder that holds `evaluation/`, before what else is on the path.
    paths = [str(Path(vlm_vqa.__file__).parents[1]), str(Path.cwd()), os.environ.get("PYTHONPATH")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**os.environ, **own, cores.VARIABLE: str(cores.threads().count), **environment},
        # A group of its own: Ctrl-C reaches us alone, and we end it with all that it has started.
        start_new_session=True,
        # Where this process is killed, nobody is left to end it.
        preexec_fn=orphans.die_with_parent,
    )
    assert child.stdout is not None, "it is a pipe"
    try:
        # Line by line, so that it can be watched.
        with open(log_path, "w", encoding="utf-8", buffering=1) as file:
            for line in child.stdout:
                file.write(line)
                if bar is not None and (found := re.search(rf"{ANSWERED} (\d+)", line)):
                    answered = int(found[1])
                    bar.update(answered - bar.n)
                    # Not bar.n, which stands still where TQDM_DISABLE is set.
                    if answered == bar.total:
                        _keep_to_one_core(child.pid)
        code = child.wait()
    finally:
        # It writes nothing that a run after it would read.
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if code != 0:
        _explain(log_path, arguments[0], code)


def _keep_to_one_core(pid: int) -> None:
    """Keep the main thread of `pid`, and the threads that it starts from now on, on one of its cores.

    HELM computes its metrics in as many threads as have asked. nltk lets go of the GIL around each of some hundred small
    regular expressions a text, so on several cores the threads do little but wake each other: HELM's log of the small run
    names 121 s for the metrics of 1,000 instances on 2 cores, and 35 s on one. The GIL leaves no work for a second core.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    # It only saves time: a child that has just ended, or a sandbox that forbids it, must not end the evaluation.
    with contextlib.suppress(OSError):
        cores = sorted(os.sched_getaffinity(pid))
        # Not always the first one: evaluations that run side by side should not meet on it.
        os.sched_setaffinity(pid, {cores[pid % len(cores)]})


def _explain(log_path: Path, program: str, code: int) -> None:
    """Raise what the log says: the client's own words where there are any, else its last lines; or which signal it was."""
    if code < 0:
        raise UserError(f"{program} was ended by {signal.Signals(-code).name}. {GO_ON}")
    lines = log_path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if FAILED in line and "Request(" not in line:
            raise UserError(f"{line.split(FAILED, 1)[1].strip()} (HELM's whole log: {log_path})")
    end = "\n".join(lines[-15:])
    raise RuntimeError(f"{program} ended with code {code}. Its log is {log_path}; the end of it:\n{end}")
