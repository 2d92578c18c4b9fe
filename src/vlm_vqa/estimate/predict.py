"""`vlm-vqa preflight`: a prediction, whether it fits, and a handful of changes of params.yaml under which it would."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from vlm_vqa.checks import LAUNCHES, RECORDS, check_here
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.devices import GIB, find_device
from vlm_vqa.estimate.memory import total
from vlm_vqa.estimate.questions import read_size
from vlm_vqa.estimate.stage_costs import Machine, Stage, stage_costs
from vlm_vqa.launch_file import read_launch
from vlm_vqa.params import PROJECTIONS, Params, Punkt, load_params, parse_params

OUTPUTS = ("data/records", "data/features", "models/trained", "models/export", "checkpoints")
"""What the stages write; those that are there take no further room."""
CPU_UTILISATION = 0.75, "benchmarks/results/training_step.json: 0.78"
GPU_UTILISATION = 0.35, "assumed: no GPU was measured"


class Asked(NamedTuple):
    """The command's options, this machine by default: price of a device and hour, memory and disk in GiB, MB/s."""

    device: str | None = None
    price: float | None = None
    host_memory: float | None = None
    disk: float | None = None
    utilisation: float | None = None
    bandwidth: float = 20.0


class Check(NamedTuple):
    """Whether something fits, in bytes: a stage's GPU memory, host memory or disk at the moment when most is needed."""

    stage: str
    resource: str
    moment: str
    needed: int
    available: int
    fits: bool


class Prediction(NamedTuple):
    """All there is to say; `options`: changes under which all fits, with bytes of what did not; `lacks`: of the device."""

    params: Params
    name: str
    machine: Machine
    devices: int
    price: float | None
    stages: list[Stage]
    checks: list[Check]
    options: list[tuple[dict[str, Any], dict[str, int]]]
    lacks: list[str]

    @property
    def fits(self) -> bool:
        return not self.lacks and all(one.fits for one in self.checks)

    def cost(self, hours: float | None) -> float | None:
        """Return what so many hours cost: all devices are paid for while a stage runs."""
        return None if self.price is None or hours is None else hours * self.devices * self.price


def predict(path: Path, asked: Asked, records: Path = RECORDS, launches: Path = LAUNCHES) -> Prediction:
    """Predict what a run of the parameter file `path` needs; UserError if something is not known or makes no sense."""
    params = load_params(path)
    # What nltk has on this machine does not matter to a prediction, and takes seconds to find out.
    check_here(replace(params, evaluation=replace(params.evaluation, punkt_tab=Punkt.BUNDLED)), launches, records)
    launch, size = read_launch(params.train.launch, launches), read_size(params, records)
    machine = _machine(asked, launch.on_cpu, params.train.launch)
    stages = stage_costs(params, size, machine, launches)
    checks = _checks(stages, machine)
    failed = {one[:2] for one in checks if not one.fits}

    def tried(changes: dict[str, Any]) -> dict[str, int]:
        """Return the bytes of what failed, under changes; nothing if something does not fit still."""
        try:
            after = _checks(stage_costs(changed(params, changes), size, machine, launches), machine)
        except UserError:
            # Impossible together, or under this launch.
            return {}
        fits = all(one.fits for one in after)
        return {f"{one.stage}: {one.resource}": one.needed for one in after if fits and one[:2] in failed}

    options = []
    for changes in _candidates(params, launches) if failed else ():
        # Several are for where none of them alone is enough.
        if not any(less.items() <= changes.items() for less, _ in options) and (needed := tried(changes)):
            options.append((changes, needed))
    keys = ["train.compute_dtype", "train.weights_dtype", "evaluation.compute_dtype"]
    keys = keys if read_launch(params.vision.launch, launches).on_cpu else ["vision.compute_dtype", *keys]
    lacks = list(machine.device.lacks([key for key in keys if params.flat()[key] == "bfloat16"]))
    return Prediction(params, str(path), machine, launch.processes, asked.price, stages, checks, options, lacks)


def _machine(asked: Asked, on_cpu: bool, launch: str) -> Machine:
    for name, value in asked._asdict().items():
        most = 1 if name == "utilisation" else sys.float_info.max
        if isinstance(value, int | float) and not 0 < value <= most:
            rule = "at most 1" if value > 1 and most == 1 else "a number above 0"
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {rule}.")
    found = find_device(asked.device, on_cpu=on_cpu, launch=launch)
    share, basis = GPU_UTILISATION if found.gpu else CPU_UTILISATION
    share, basis = (asked.utilisation, "--utilisation") if asked.utilisation else (share, basis)
    memory = round(asked.host_memory * GIB) if asked.host_memory else psutil.virtual_memory().total
    there = sum(path.stat().st_size for name in OUTPUTS for path in Path(name).rglob("*") if path.is_file())
    disk = round(asked.disk * GIB) if asked.disk else shutil.disk_usage(".").free + there
    config = Path(".dvc/config")
    links = config.is_file() and ("hardlink" in (text := config.read_text(encoding="utf-8")) or "symlink" in text)
    return Machine(found, memory, disk, share, basis, asked.bandwidth * 1e6, links)


def _checks(stages: list[Stage], machine: Machine) -> list[Check]:
    """Compare every stage's greatest needs with what is there."""
    found, room = [], {"GPU memory": machine.device.memory, "host memory": machine.host_memory}
    for stage in stages:
        for resource, moments in (("GPU memory", stage.gpu), ("host memory", stage.host)):
            if moments:
                most = max(moments, key=lambda name: total(moments[name]))
                found.append((stage.name, resource, most, total(moments[most]), room[resource]))
    disk = (1 if machine.links else 2) * sum(total(stage.disk) for stage in stages)
    return [Check(*one, fits=one[3] <= one[4]) for one in [*found, ("all stages", "disk", "", disk, machine.disk)]]


def _candidates(params: Params, launches: Path) -> Iterator[dict[str, Any]]:
    """Yield changes, the gentlest first and the last of several keys; an optimizer step keeps its questions."""
    train, accumulation = params.train, "train.gradient_accumulation_steps"
    passes = train.gradient_accumulation_steps
    sizes = {"vision": params.vision.batch_size, "evaluation": params.evaluation.batch_size}
    single: list[dict[str, Any]] = [{f"{name}.batch_size": max(1, size // 4)} for name, size in sizes.items()]
    single += [{"vision.store_dtype": "int8"}, {"train.gradient_checkpointing": True}]
    for part in (part for part in (2, 8) if train.batch_size % part == 0):
        single.append({"train.batch_size": train.batch_size // part, accumulation: passes * part})
    single.append({"train.optimizer": "adamw_bnb_8bit"})
    yield from single
    yield {"vision.store": False}
    now = read_launch(train.launch, launches)
    for name in ("cpu",) if now.on_cpu else ("gpu", "fsdp2"):
        each, rest = divmod(passes * now.processes, read_launch(name, launches).processes)
        if not rest:
            yield {"train.launch": name, accumulation: each}
    adapters = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": list(PROJECTIONS)}
    lora, flat = {"train.lora": adapters, "train.freeze_embeddings": True}, params.flat()
    gentle = {key: value for key, value in reduce(dict.__or__, single).items() if flat[key] != value}
    yield from (lora, gentle, gentle | lora)


def changed(params: Params, changes: Mapping[str, Any]) -> Params:
    """Return `params` with new values by full names, validated; UserError if the combination is impossible."""
    values = params.as_dict()
    for name, value in changes.items():
        *sections, key = name.split(".")
        reduce(dict.__getitem__, sections, values)[key] = value
    return parse_params(values)
