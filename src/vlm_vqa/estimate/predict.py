"""`vlm-vqa preflight`: from a parameter file and options to a prediction."""

import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from vlm_vqa.checks import LAUNCHES, RECORDS, check_here
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.advice import Option, advise
from vlm_vqa.estimate.devices import GIB, find_device
from vlm_vqa.estimate.memory import total
from vlm_vqa.estimate.questions import DatasetSize, read_size
from vlm_vqa.estimate.stage_costs import Machine, Stage, launch_of, stage_costs
from vlm_vqa.params import Params, load_params

OUTPUTS = ("data/records", "data/features", "models/trained", "models/export", "checkpoints")
"""What the stages write; those that are there take no further room."""
CPU_UTILISATION = 0.75, "benchmarks/results/training_step.json: 0.79"
GPU_UTILISATION = 0.35, "assumed: no GPU was measured"


class Check(NamedTuple):
    """Whether something fits, in bytes; `resource` is `GPU memory`, `host memory` or `disk`, `moment` when most is needed."""

    stage: str
    resource: str
    moment: str
    needed: int
    available: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    def __str__(self) -> str:
        when = f" ({self.moment})" if self.moment else ""
        return f"{self.stage}: {self.resource} {self.needed / GIB:.1f} GiB{when} of {self.available / GIB:.1f}"


class Prediction(NamedTuple):
    """All that `vlm-vqa preflight` has to say."""

    params: Params
    name: str
    machine: Machine
    devices: int
    """That are paid for: the train launch's."""
    price: float | None
    """Of a device and hour."""
    stages: list[Stage]
    checks: list[Check]
    options: list[Option]
    lacks: list[str]
    """What the device cannot do at all, and what to do instead."""

    @property
    def fits(self) -> bool:
        return not self.lacks and all(one.fits for one in self.checks)

    def cost(self, hours: float | None) -> float | None:
        """Return what so many hours cost: all devices are paid for while a stage runs."""
        return None if self.price is None or hours is None else hours * self.devices * self.price


def predict(
    path: Path,
    *,
    device: str | None = None,
    price: float | None = None,
    host_memory: float | None = None,
    disk: float | None = None,
    utilisation: float | None = None,
    bandwidth: float = 20.0,
    records: Path = RECORDS,
    launches: Path = LAUNCHES,
) -> Prediction:
    """Predict what a run of the parameter file `path` needs.

    Args:
        device: as `find_device` takes it; price: of a device and hour, in any currency.
        host_memory, disk: GiB; this machine's by default. utilisation: 0 to 1. bandwidth: MB/s.

    Raises:
        UserError: a file, device or shape is not known, or an option makes no sense.
    """
    options = {"price": price, "host-memory": host_memory, "disk": disk, "bandwidth": bandwidth}
    for name, value in (options | {"utilisation": utilisation}).items():
        if value is not None and not 0 < value < (float("inf") if name != "utilisation" else 1.0000001):
            raise UserError(f"--{name} is {value}; it must be a number above 0.")
    params = load_params(path)
    check_here(params, launches, records)
    launch = launch_of(params.train.launch, launches)
    found = find_device(device, on_cpu=launch.on_cpu, launch=params.train.launch)
    share, basis = GPU_UTILISATION if found.gpu else CPU_UTILISATION
    if utilisation is not None:
        share, basis = utilisation, "--utilisation"
    memory = psutil.virtual_memory().total if host_memory is None else round(host_memory * GIB)
    room = _room() if disk is None else round(disk * GIB)
    machine = Machine(found, memory, room, share, basis, bandwidth * 1e6, _cache_links())
    size = read_size(params, records)
    stages = stage_costs(params, size, machine, launches)
    checks = _checks(stages, machine)
    failed = [one for one in checks if not one.fits]
    tried = partial(_tried, size=size, machine=machine, launches=launches, failed=failed)
    advice = advise(params, launches, {one.stage for one in failed}, tried) if failed else []
    on_device = ["train.compute_dtype", "train.weights_dtype"]
    if not launch_of(params.vision.launch, launches).on_cpu:
        on_device.insert(0, "vision.compute_dtype")
    lacks = list(found.lacks([key for key in on_device if params.flat()[key] == "bfloat16"]))
    return Prediction(params, str(path), machine, launch.processes, price, stages, checks, advice, lacks)


def _checks(stages: list[Stage], machine: Machine) -> list[Check]:
    """Compare every stage's greatest needs with what is there."""
    found = []
    for stage in stages:
        for resource, moments in (("GPU memory", stage.gpu), ("host memory", stage.host)):
            if moments:
                most = max(moments, key=lambda name: total(moments[name]))
                available = machine.device.memory if resource == "GPU memory" else machine.host_memory
                found.append(Check(stage.name, resource, most, total(moments[most]), available))
    needed = (1 if machine.links else 2) * sum(total(stage.disk) for stage in stages)
    return [*found, Check("all stages", "disk", "", needed, machine.disk)]


def _tried(
    params: Params, size: DatasetSize, machine: Machine, launches: Path, failed: list[Check]
) -> dict[str, int] | None:
    """Return the bytes of what `failed` before, under other parameters; None if something does not fit."""
    checks = _checks(stage_costs(params, size, machine, launches), machine)
    if not all(one.fits for one in checks):
        return None
    asked = {one[:2] for one in failed}
    return {f"{one.stage}: {one.resource}": one.needed for one in checks if one[:2] in asked}


def _room() -> int:
    """Return the bytes that the outputs may take here."""
    held = sum(path.stat().st_size for name in OUTPUTS for path in Path(name).rglob("*") if path.is_file())
    return shutil.disk_usage(".").free + held


def _cache_links(config: Path = Path(".dvc/config")) -> bool:
    """Whether DVC's cache links outputs, by its settings here; by default it copies where it cannot reflink."""
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return "hardlink" in text or "symlink" in text
