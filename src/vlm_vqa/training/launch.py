"""The launch that was asked for is the launch that runs, or training stops in its first second.

accelerate falls back without a word: an FSDP config on CPU becomes DDP or two unrelated trainings, `--cpu` with two
processes becomes one. So every fact of the launch file is compared with what really started.
"""

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType

from vlm_vqa.errors import UserError


def read_launch(name: str, folder: str | Path = "launch") -> dict[str, Any]:
    """Read `launch/NAME.yaml`.

    Raises:
        UserError: there is no such launch; the existing ones are named.
    """
    path = Path(folder) / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in Path(folder).glob("*.yaml")))
        raise UserError(f"train.launch is {name!r}, but there is no {path}. Known launches: {known}.")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def start(name: str, folder: str | Path = "launch") -> dict[str, Any]:
    """Start accelerate's process state and check it against `launch/NAME.yaml`.

    Returns:
        The facts of the launch: distributed type, processes, backend, device, threads a process.

    Raises:
        UserError: what started is not what the file asks for, or it asks for several processes.
    """
    asked = read_launch(name, folder)
    if asked["num_processes"] * asked["num_machines"] > 1:
        raise UserError(
            f"train.launch is {name!r}, which asks for {asked['num_processes']} processes; training runs in one process so "
            "far (gathering sharded weights and their checkpoints is not built yet). Set train.launch: cpu."
        )
    state = PartialState(cpu=asked["use_cpu"])
    found = {
        "distributed_type": DistributedType(state.distributed_type).value,
        "num_processes": state.num_processes,
        "device": state.device.type,
    }
    wanted = {
        "distributed_type": asked["distributed_type"],
        "num_processes": asked["num_processes"],
        "device": "cpu" if asked["use_cpu"] else "cuda",
    }
    for fact, value in wanted.items():
        if found[fact] != value:
            raise UserError(
                f"launch/{name}.yaml asks for {fact} {value}, but {found[fact]} started. Run `accelerate launch "
                f"--config_file launch/{name}.yaml stages/train.py` on a machine that has what it asks for, or choose "
                "another train.launch."
            )
    if found["device"] == "cpu":
        # Without this accelerate leaves one thread to a process. The affinity counts what a container may really use.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // state.num_processes))
    return {**found, "backend": state.backend or "none", "threads": torch.get_num_threads()}
