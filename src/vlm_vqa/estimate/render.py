"""The prediction as text for people and as JSON for machines."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_vqa.estimate.advice import Check, Option
from vlm_vqa.estimate.memory import GIB, Item, Moment
from vlm_vqa.estimate.stage_costs import Machine, Stage
from vlm_vqa.params import Params


@dataclass(frozen=True)
class Prediction:
    """All that `vlm-vqa preflight` has to say."""

    params: Params
    name: str
    """The parameter file."""
    machine: Machine
    basis: dict[str, str]
    """Where machine figures come from, by name."""
    devices: int
    """That are paid for: the train launch's."""
    price: float | None
    """Of a device and hour."""
    stages: list[Stage]
    checks: list[Check]
    options: list[Option]
    lacks: Sequence[str] = ()
    """What the device cannot do at all, and what to do instead."""

    @property
    def fits(self) -> bool:
        return not self.lacks and all(one.fits for one in self.checks)

    def cost(self, stage: Stage) -> float | None:
        """Return what a stage costs: all devices are paid for while it runs."""
        if self.price is None or stage.hours is None:
            return None
        return stage.hours * self.devices * self.price


def as_json(prediction: Prediction) -> dict[str, Any]:
    """Return the prediction as plain values; sizes in bytes."""
    machine = prediction.machine
    return {
        "params": prediction.name,
        "params_hash": prediction.params.hash(),
        "machine": {
            "device": machine.device.name, "device_memory": machine.device.memory, "host_memory": machine.host_memory,
            "disk": machine.disk, "utilisation": machine.utilisation, "bandwidth": machine.bandwidth,
            "basis": prediction.basis,
        },
        "stages": [_stage_json(stage, prediction.cost(stage)) for stage in prediction.stages],
        "checks": [one._asdict() | {"fits": one.fits} for one in prediction.checks],
        "options": [{"changes": one.changes, "needed": one.needed, "note": one.note} for one in prediction.options],
        "lacks": list(prediction.lacks),
        "fits": prediction.fits,
    }  # fmt: skip


def _stage_json(stage: Stage, cost: float | None) -> dict[str, Any]:
    return {
        "name": stage.name, "disk": _items_json(stage.disk), "disk_bytes": stage.disk_bytes,
        "host": [_moment_json(one) for one in stage.host], "gpu": [_moment_json(one) for one in stage.gpu],
        "hours": stage.hours, "work": stage.work, "cost": cost, "facts": stage.facts,
    }  # fmt: skip


def _moment_json(moment: Moment) -> dict[str, Any]:
    return {"name": moment.name, "bytes": moment.bytes, "items": _items_json(moment.items)}


def _items_json(items: Iterable[Item]) -> list[dict[str, Any]]:
    return [item._asdict() for item in items]


def as_text(prediction: Prediction, details: bool = False) -> str:
    """Return what a terminal shows: the verdict, a table of stages, and with `details` each part's formula and basis."""
    lines = [*_verdict(prediction), "", *_table(prediction), ""]
    if details:
        lines += _machine(prediction)
        for stage in prediction.stages:
            lines += ["", *_details(stage)]
    else:
        lines.append(
            f"utilisation {prediction.machine.utilisation:g} ({prediction.basis['utilisation']}); more by --details"
        )
    return "\n".join(lines)


def _machine(prediction: Prediction) -> Iterator[str]:
    machine, basis = prediction.machine, prediction.basis
    yield f"device         {machine.device.name}, {machine.device.memory / GIB:.1f} GiB  ({basis['device']})"
    yield f"host memory    {machine.host_memory / GIB:.1f} GiB a machine  ({basis['host_memory']})"
    yield f"disk           {machine.disk / GIB:.1f} GiB  ({basis['disk']})"
    yield f"utilisation    {machine.utilisation:g} of the device's peak  ({basis['utilisation']})"


def _table(prediction: Prediction) -> Iterator[str]:
    yield f"{'':<18}{'disk':>11}{'host':>11}{'GPU, a rank':>13}{'hours':>9}{'cost':>10}"
    for stage in prediction.stages:
        host, gpu = (_gib(max(one.bytes for one in moments)) if moments else "-" for moments in (stage.host, stage.gpu))
        cost = prediction.cost(stage)
        yield (
            f"{stage.name:<18}{_gib(stage.disk_bytes):>11}{host:>11}{gpu:>13}"
            f"{'-' if stage.hours is None else f'{stage.hours:.2f}':>9}{'-' if cost is None else f'{cost:.2f}':>10}"
        )
    hours = sum(stage.hours or 0 for stage in prediction.stages)
    cost = "-" if prediction.price is None else f"{hours * prediction.devices * prediction.price:.2f}"
    yield f"{'all':<18}{_gib(sum(s.disk_bytes for s in prediction.stages)):>11}{'':>24}{hours:>9.2f}{cost:>10}"


def _details(stage: Stage) -> Iterator[str]:
    yield stage.name
    for name, value in stage.facts.items():
        yield f"  {name.replace('_', ' ')}: {_fact(value)}"
    if stage.hours is not None:
        yield f"  hours: {stage.work} = {stage.hours:.2f} h"
    yield from _items("disk", stage.disk)
    for where, moments in (("host memory of a machine", stage.host), ("GPU memory of a rank", stage.gpu)):
        most = max(moments, key=lambda one: one.bytes, default=None)
        for one in moments:
            if one is most:
                yield from _items(f"{where}, {one.name}", one.items)
            else:
                yield f"  {_gib(one.bytes):>10}  {where}, {one.name}"


def _items(title: str, items: Sequence[Item]) -> Iterator[str]:
    yield f"  {_gib(sum(item.bytes for item in items)):>10}  {title}:"
    for item in items:
        yield f"    {_gib(item.bytes):>10}  {item.what} = {item.formula}"


def _verdict(prediction: Prediction) -> Iterator[str]:
    failed = [one for one in prediction.checks if not one.fits]
    machine, verdict = prediction.machine, "cannot run" if prediction.lacks else "does not fit"
    gpu = f"{prediction.devices} x {machine.device.name} of {machine.device.memory / GIB:.1f} GiB, "
    yield (
        f"VERDICT: {prediction.name} {'fits' if prediction.fits else verdict}: {gpu if machine.device.gpu else ''}"
        f"{machine.host_memory / GIB:.1f} GiB of host memory, {machine.disk / GIB:.1f} GiB of disk"
    )
    yield from prediction.lacks
    for one in failed:
        yield f"does not fit: {one}"
    if failed and not prediction.options:
        yield "no change of params.yaml that preflight knows makes it fit: name a larger --device, --host-memory or --disk."
    for number, option in enumerate(prediction.options, start=1):
        changes = ", ".join(f"{key}: {_value(value)}" for key, value in option.changes.items())
        sizes = ", ".join(f"{what} {size / GIB:.1f} GiB" for what, size in option.needed.items())
        yield f"it would fit ({number}) with {changes}  [{sizes}]{f'  {option.note}' if option.note else ''}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{number:,} {name}" for name, number in value.items())
    if isinstance(value, int):
        return f"{value:,}" if value < 10**13 else f"{value:.4g}"
    return f"{value:.3g}" if isinstance(value, float) else "not known" if value is None else str(value)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"
