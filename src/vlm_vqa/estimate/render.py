"""The prediction as text for people and as JSON for machines."""

from collections.abc import Iterator
from typing import Any

from vlm_vqa.estimate.devices import GIB
from vlm_vqa.estimate.memory import Parts, total
from vlm_vqa.estimate.predict import Prediction
from vlm_vqa.estimate.stage_costs import Stage


def as_json(prediction: Prediction) -> dict[str, Any]:
    """Return the prediction as plain values; sizes in bytes."""
    found, machine = prediction, prediction.machine
    device = {"device": machine.device.name, "device_memory": machine.device.memory}
    return {
        "params": found.name,
        "params_hash": found.params.hash(),
        "machine": machine._asdict() | device,
        "stages": [s._asdict() | {"disk_bytes": total(s.disk), "cost": found.cost(s.hours)} for s in found.stages],
        "checks": [one._asdict() | {"fits": one.fits} for one in found.checks],
        "options": [one._asdict() for one in found.options],
        "lacks": found.lacks,
        "fits": found.fits,
    }


def as_text(prediction: Prediction, details: bool = False) -> str:
    """Return what a terminal shows: the verdict, a table of stages, and with `details` the parts of every figure."""
    lines, machine = [*_verdict(prediction), "", *_table(prediction), ""], prediction.machine
    if not details:
        lines.append(f"utilisation {machine.utilisation:g} ({machine.basis}); more by --details")
        return "\n".join(lines)
    lines += [
        f"device         {machine.device.name}, {machine.device.memory / GIB:.1f} GiB  ({machine.device.basis})",
        f"host memory    {machine.host_memory / GIB:.1f} GiB a machine",
        f"disk           {machine.disk / GIB:.1f} GiB{'' if machine.links else '; copied into the cache of DVC: all twice'}",
        f"utilisation    {machine.utilisation:g} of the device's peak  ({machine.basis})",
    ]
    return "\n".join([*lines, *(line for stage in prediction.stages for line in ("", *_details(stage)))])


def _verdict(prediction: Prediction) -> Iterator[str]:
    machine, failed = prediction.machine, [one for one in prediction.checks if not one.fits]
    verdict = "fits" if prediction.fits else "cannot run" if prediction.lacks else "does not fit"
    gpu = f"{prediction.devices} x {machine.device.name} of {machine.device.memory / GIB:.1f} GiB, "
    yield (
        f"VERDICT: {prediction.name} {verdict}: {gpu if machine.device.gpu else ''}"
        f"{machine.host_memory / GIB:.1f} GiB of host memory, {machine.disk / GIB:.1f} GiB of disk"
    )
    yield from prediction.lacks
    yield from (f"does not fit: {one}" for one in failed)
    if failed and not prediction.options:
        yield "no change of params.yaml that preflight tries makes it fit: name a larger --device, --host-memory or --disk."
    for number, option in enumerate(prediction.options, start=1):
        changes = ", ".join(f"{key}: {_value(value)}" for key, value in option.changes.items())
        sizes = ", ".join(f"{what} {size / GIB:.1f} GiB" for what, size in option.needed.items())
        yield f"it would fit ({number}) with {changes}  [{sizes}]"


def _table(prediction: Prediction) -> Iterator[str]:
    def line(name: str, disk: int, host: str, gpu: str, hours: float | None) -> str:
        cost = prediction.cost(hours)
        times = "".join(f"{'-' if one is None else f'{one:.2f}':>{width}}" for one, width in ((hours, 9), (cost, 10)))
        return f"{name:<18}{_gib(disk):>11}{host:>11}{gpu:>13}{times}"

    yield f"{'':<18}{'disk':>11}{'host':>11}{'GPU, a rank':>13}{'hours':>9}{'cost':>10}"
    for stage in prediction.stages:
        host, gpu = (_gib(max(map(total, one.values()))) if one else "-" for one in (stage.host, stage.gpu))
        yield line(stage.name, total(stage.disk), host, gpu, stage.hours)
    hours = sum(stage.hours or 0 for stage in prediction.stages)
    yield line("all", sum(total(stage.disk) for stage in prediction.stages), "", "", hours)


def _details(stage: Stage) -> Iterator[str]:
    yield stage.name
    for name, value in stage.facts.items():
        yield f"  {name.replace('_', ' ')}: {_fact(value)}"
    yield from _parts("disk", stage.disk)
    for where, moments in (("host memory of a machine", stage.host), ("GPU memory of a rank", stage.gpu)):
        most = max(moments, key=lambda name: total(moments[name]), default=None)
        for name, parts in moments.items():
            lines = list(_parts(f"{where}, {name}", parts))
            yield from lines if name == most else [lines[0].rstrip(":")]


def _parts(title: str, parts: Parts) -> Iterator[str]:
    yield f"  {_gib(total(parts)):>10}  {title}:"
    yield from (f"    {_gib(size):>10}  {what}" for what, size in parts.items() if size)


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
