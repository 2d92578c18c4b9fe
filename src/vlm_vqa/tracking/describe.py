"""What a run says of itself: its name, parameters as text, tags of machine and code, metrics of a report."""

import getpass
import itertools
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from vlm_vqa.cores import usable_cores
from vlm_vqa.hashing import sha256_bytes
from vlm_vqa.params import Params, flatten
from vlm_vqa.secrets import causes, without_secrets

log = logging.getLogger(__name__)

PACKAGES = "torch transformers accelerate deepspeed bitsandbytes dvc mlflow datasets crfm-helm".split()
LONGEST_PARAM = 500  # characters: what every MLflow server accepts; newer ones take 6,000


def run_name(params: Params, experiment: str | None = None) -> str:
    """The row's title in MLflow: DVC's experiment name, if any, and the parameters that are changed most."""
    train = params.train
    knobs = f"lr {train.learning_rate:g}, batch {train.batch_size}"
    if train.gradient_accumulation_steps > 1:
        knobs += f"x{train.gradient_accumulation_steps}"
    knobs += f", {train.num_train_epochs:g} epochs, {params.prompt.mask.value}"
    return f"{experiment}: {knobs}" if experiment else knobs


def param_text(value: Any) -> str:
    """A parameter as YAML writes it; cut and marked with its hash where MLflow would refuse it."""
    text = without_secrets(value if isinstance(value, str) else json.dumps(value))
    if len(text) <= LONGEST_PARAM:
        return text
    note = f" ... [{len(text)} characters, sha256 {sha256_bytes(text.encode())}]"
    return text[: LONGEST_PARAM - len(note)] + note


def identity(params: Params) -> dict[str, str]:
    """Tags that every run carries: what was run, and by which code."""
    tags = {"params_hash": params.hash(), "mlflow.user": _user(), "mlflow.source.type": "LOCAL"}
    if commit := _git("rev-parse", "HEAD"):
        tags |= {"git_commit": commit, "mlflow.source.git.commit": commit}
        tags["git_dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return tags


def surroundings() -> dict[str, str]:
    """Tags of a live run: library versions, machine, DVC's experiment."""
    tags = {f"version.{package}": version(package) for package in PACKAGES}
    tags |= {"version.python": platform.python_version(), "machine.host": platform.node(), "machine.cpu": _cpu()}
    tags["machine.cores"] = str(usable_cores().count)
    tags["machine.memory_gib"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}"
    # Imported here it would cost seconds; a process that trains has it already.
    if (torch := sys.modules.get("torch")) is not None:
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        tags["machine.gpus"] = ", ".join(gpus) or "none"
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_experiment"] = experiment
    return tags


def _user() -> str:
    with suppress(KeyError, OSError):  # a container's user without a name
        return getpass.getuser()
    return str(os.getuid())


def _git(*arguments: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    return ""


def _cpu() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name\s*:(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), flags=re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def numbers(metrics: Mapping[str, Any], step: int) -> list[tuple[str, float, int, int]]:
    """Rows for `Store.put_metrics`; values that are no numbers are left out."""
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
    accuracies = ("vqa_accuracy", "answer_accuracy")
    headlines = {"helm.bleu_1": "bleu_1"} | {f"{name}.overall": name for name in accuracies}
    for name, end in itertools.product(("bleu_1", *accuracies), ("low", "high")):
        headlines[f"intervals.{name}.model.overall.{end}"] = f"{name}_{end}"
    # Of the intervals by type of question there are hundreds.
    left_out = ("model.", "intervals.", "looks_at_image.")
    values = {
        headlines.get(name, f"score_{re.sub('[./ ]', '_', name)}"): value
        for name, value in flatten(report)
        if name in headlines or not name.startswith(left_out)
    }
    return {name: value for name, value, *_ in numbers(values, 0)}


def reason(error: BaseException) -> str:
    """One line. Clients wrap what the system said ("Connection refused") in pages of their own: dig it out."""
    for cause in causes(error):
        error = cause if isinstance(cause, OSError) and cause.strerror else error
    text = without_secrets(str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:500]
