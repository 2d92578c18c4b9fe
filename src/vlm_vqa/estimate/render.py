"""The prediction as text for people and as JSON for machines."""

import json
from collections.abc import Iterator
from typing import Any

from vlm_vqa.estimate.devices import GIB
from vlm_vqa.estimate.memory import Parts, total
from vlm_vqa.estimate.predict import Prediction
from vlm_vqa.estimate.stage_costs import Stage


def as_json(found: Prediction) -> dict[str, Any]:
    """Return the prediction as plain values; sizes in bytes."""
    machine = found.machine._asdict() | {"device": found.machine.device._asdict()}
    stages = [one._asdict() | {"disk_bytes": total(one.disk), "cost": found.cost(one.hours)} for one in found.stages]
    plain = {"params": found.name, "params_hash": found.params.hash(), "machine": machine, "stages": stages}
    plain["checks"] = [one._asdict() for one in found.checks]
    plain["options"] = [{"changes": changes, "needed": needed} for changes, needed in found.options]
    return plain | {"lacks": found.lacks, "fits": found.fits}


def as_text(prediction: Prediction, details: bool = False) -> str:
    """Return what a terminal shows: the verdict, a table of stages, and with `details` the parts of every figure."""
    machine, basis = prediction.machine, "" if details else "; more by --details"
    lines = [*_verdict(prediction), "", *_table(prediction), ""]
    lines.append(f"utilisation {machine.utilisation:g} ({machine.basis}){basis}")
    facts, every = prediction.stages[2].facts, prediction.params.validation.every_steps
    if "validations" in facts:
        share = facts["flop_of_validation"] / (facts["flop"] + facts["flop_recomputed"])
        times = f"{facts['validations']} times by validation.every_steps {every}"
        lines.append(f"validation adds {share:.1%} to training's FLOPs: {times}")
    if details:
        lines.append(f"{machine.device.name}, {machine.device.memory / GIB:.1f} GiB ({machine.device.basis})")
        lines += [] if machine.links else ["DVC's cache copies every output (cache.type): on the disk all count twice"]
        lines += [line for stage in prediction.stages for line in ("", *_details(stage))]
    return "\n".join(lines)


def _verdict(prediction: Prediction) -> Iterator[str]:
    machine, failed = prediction.machine, [one for one in prediction.checks if not one.fits]
    verdict = "fits" if prediction.fits else "cannot run" if prediction.lacks else "does not fit"
    gpu = f"{prediction.devices} x {machine.device.name} of {machine.device.memory / GIB:.1f} GiB, "
    room = f"{machine.host_memory / GIB:.1f} GiB of host memory, {machine.disk / GIB:.1f} GiB of disk"
    yield f"VERDICT: {prediction.name} {verdict}: {gpu if machine.device.gpu else ''}{room}"
    yield from prediction.lacks
    for one in failed:
        needed = f"{one.needed / GIB:.1f} GiB{one.moment and f' ({one.moment})'} of {one.available / GIB:.1f}"
        yield f"does not fit: {one.stage}: {one.resource} {needed}"
    if failed and not prediction.options:
        yield "no change of params.yaml that preflight tries makes it fit: name a larger --device, --host-memory or --disk."
    for number, (changes, needed) in enumerate(prediction.options, start=1):
        keys = json.dumps(changes)[1:-1].replace('"', "")
        sizes = ", ".join(f"{what} {size / GIB:.1f} GiB" for what, size in needed.items())
        yield f"it would fit ({number}) with {keys}  [{sizes}]"


def _table(prediction: Prediction) -> Iterator[str]:
    yield f"{'':<18}{'disk':>11}{'host':>11}{'GPU, a rank':>13}{'hours':>9}{'cost':>10}"
    hours = sum(stage.hours or 0 for stage in prediction.stages)
    disk = {"": sum(total(stage.disk) for stage in prediction.stages)}
    for name, parts, host, gpu, spent, _ in (*prediction.stages, Stage("all", disk, {}, {}, hours, {})):
        most = (_gib(max(map(total, one.values()))) if one else "-" * (name != "all") for one in (host, gpu))
        times = ("-" if one is None else f"{one:.2f}" for one in (spent, prediction.cost(spent)))
        yield "{:<18}{:>11}{:>11}{:>13}{:>9}{:>10}".format(name, _gib(total(parts)), *most, *times)


def _details(stage: Stage) -> Iterator[str]:
    yield stage.name
    for name, value in stage.facts.items():
        exact = isinstance(value, int) and value < 10**13
        shown = value if isinstance(value, str) else f"{value:,}" if exact else f"{value:.3g}"
        yield f"  {name.replace('_', ' ')}: {shown}"
    yield from _parts("disk", stage.disk)
    for where, moments in (("host memory of a machine", stage.host), ("GPU memory of a rank", stage.gpu)):
        most = max(moments, key=lambda name: total(moments[name]), default=None)
        for name, parts in moments.items():
            yield from _parts(f"{where}, {name}", parts, only_total=name != most)


def _parts(title: str, parts: Parts, only_total: bool = False) -> Iterator[str]:
    yield f"  {_gib(total(parts)):>10}  {title}{'' if only_total else ':'}"
    yield from (f"    {_gib(size):>10}  {what}" for what, size in parts.items() if size and not only_total)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"
