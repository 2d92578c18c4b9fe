"""The train stage on several processes: one that meets a number that is none, two machines, a machine that is lost."""

import json
import re
import socket
import subprocess
import time

import psutil
import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests import golden
from vlm_vqa.sealed import SWITCH
from vlm_vqa.training.watchdog import DEAD_SECONDS, TICK_SECONDS

pytestmark = pytest.mark.slow

BOUND = DEAD_SECONDS + 8 * TICK_SECONDS + 8
"""Seconds from a rank's death to the end of all, as the watchdog's docstring states it."""


def trained(project):
    return json.loads((project.folder / "models/trained/training.json").read_text())


def test_a_loss_that_is_no_number_is_named_by_rank_and_stops_all(prepared):
    prepared.set({"train.launch": "cpu-ddp", "train.batch_size": 8})
    (path,) = (prepared.folder / "data/features").glob("*.safetensors")
    whole = path.read_bytes()
    try:
        features = load_file(path)
        for values in features.values():
            # One image of 75: the first step has it on one of the processes, if at all.
            if values.is_floating_point():
                values[20] = float("nan")
        save_file(features, path)
        # With the checks on, the image is named before it is learnt from.
        done = prepared.stage("train", **{SWITCH: "off"})
    finally:
        path.write_bytes(whole)
    assert done.returncode != 0
    (message,) = set(re.findall(r"step \d+: loss is not a number \(.*?\); grad_norm is nan", done.stderr))
    assert re.search(r"\(rank [01]: nan\)", message), message
    assert "Lower train.learning_rate" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_machines(project, port):
    """Start the launch as two machines on this one, as the README says; return both launchers.

    The project's environment gives every process one thread: sums in another number of threads round otherwise.
    """
    command = (
        "accelerate launch --quiet --config_file launch/cpu-ddp-two.yaml --main_process_ip 127.0.0.1 "
        f"--main_process_port {port} --machine_rank %d stages/train.py"
    )
    return [
        subprocess.Popen(
            command % rank, shell=True, cwd=project.folder, env=project.environment(), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip


def test_two_machines_train_as_one_does_and_end_together(prepared):
    folder = prepared.folder
    prepared.set({"train.launch": "cpu-ddp", "train.batch_size": 8})
    done = prepared.stage("train")
    assert done.returncode == 0, done.stderr[-3000:]
    assert golden.foreign(done.stdout + done.stderr, "train") == []
    one = trained(prepared)["weights_hash"]

    asked = yaml.safe_load((folder / "launch/cpu-ddp.yaml").read_text())
    two = {**asked, "num_machines": 2, "same_network": True, "main_process_port": 29500}
    (folder / "launch/cpu-ddp-two.yaml").write_text(yaml.safe_dump(two))
    prepared.set({"train.launch": "cpu-ddp-two"})
    outcomes = [
        (process.communicate(timeout=120)[1], process.returncode) for process in start_machines(prepared, free_port())
    ]
    assert [code for _, code in outcomes] == [0, 0], outcomes
    assert "num_machines 2" in outcomes[0][0]
    assert trained(prepared)["weights_hash"] == one

    # Many epochs: the second machine is lost in the middle of them.
    prepared.set({"train.num_train_epochs": 500})
    machines = start_machines(prepared, free_port())
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/*/checkpoint-*/rank-1-of-2.json")):
        assert all(machine.poll() is None for machine in machines) and time.monotonic() < deadline
        time.sleep(0.05)
    everything = [psutil.Process(machine.pid).children(recursive=True) for machine in machines]
    for process in everything[1]:
        process.kill()
    killed = time.monotonic()
    errors = machines[0].communicate(timeout=BOUND + 5)[1]
    assert time.monotonic() - killed < BOUND and machines[0].returncode != 0
    assert re.search(r"rank 1 \(.*\) has died or is frozen: last seen in [A-Z]+ of step \d+", errors), errors[-3000:]
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in everything[0])
