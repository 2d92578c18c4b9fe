"""What does not fit, and which keys of params.yaml make it fit: every piece of advice has been computed like the original.

The gentlest changes come first; two or three are joined where one is not enough.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlm_vqa.errors import UserError
from vlm_vqa.estimate.dataset_size import Texts
from vlm_vqa.estimate.memory import GIB
from vlm_vqa.estimate.stage_costs import Machine, Stage, launch_shape, predict
from vlm_vqa.params import PROJECTIONS, Params, parse_params

MOST_JOINED = 3
MOST_OPTIONS = 4
"""Pieces of advice for what does not fit."""
Changes = dict[str, Any]
"""New values by the keys' full names."""


class Check(NamedTuple):
    """Whether something fits."""

    stage: str
    resource: str
    """`GPU memory`, `host memory` or `disk`."""
    moment: str
    """When most is needed."""
    needed: int
    available: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    def __str__(self) -> str:
        when = f" ({self.moment})" if self.moment else ""
        return f"{self.stage}: {self.resource} {self.needed / GIB:.1f} GiB{when} of {self.available / GIB:.1f}"


@dataclass(frozen=True)
class Option:
    """Changes under which everything that they are for fits."""

    changes: Changes
    needed: dict[str, int]
    """Bytes under them, by `stage: resource`."""
    note: str
    """What they cost or ask for."""


def checks(stages: Sequence[Stage], machine: Machine) -> list[Check]:
    """Compare every stage's greatest needs with what is there."""
    found = []
    for stage in stages:
        for resource, moments, available in (
            ("GPU memory", stage.gpu, machine.device.memory), ("host memory", stage.host, machine.host_memory),
        ):  # fmt: skip
            if moments:
                most = max(moments, key=lambda one: one.bytes)
                found.append(Check(stage.name, resource, most.name, most.bytes, available))
    copies = 1 if machine.links else 2
    found.append(Check("all stages", "disk", "", copies * sum(stage.disk_bytes for stage in stages), machine.disk))
    return found


def advise(
    params: Params, texts: Texts, machine: Machine, launches: Path, failed: Sequence[Check]
) -> list[Option]:  # fmt: skip
    """Return up to `MOST_OPTIONS` ways, of as few changes as possible, in which all that failed fits.

    Each was predicted anew and fits in every stage.
    """
    single = list(_candidates(params, launches, {(one.stage, one.resource) for one in failed}))
    found: list[Option] = []
    for count in range(1, MOST_JOINED + 1):
        for joined in itertools.combinations(single, count):
            keys = [key for changes, _ in joined for key in changes]
            if len(keys) == len(set(keys)):
                found += _tried(params, texts, machine, launches, joined, failed)
            if len(found) == MOST_OPTIONS:
                return found
        if found:
            return found
    return found


def _tried(
    params: Params, texts: Texts, machine: Machine, launches: Path, joined: Sequence[tuple[Changes, str]],
    failed: Sequence[Check],
) -> Iterator[Option]:  # fmt: skip
    """Yield the joined changes if all fits under them."""
    changes = {key: value for part, _ in joined for key, value in part.items()}
    try:
        after = checks(predict(changed(params, changes), texts, machine, launches), machine)
    except UserError:
        # Impossible together, or under this launch.
        return
    if all(one.fits for one in after):
        asked = {(one.stage, one.resource) for one in failed}
        needed = {f"{one.stage}: {one.resource}": one.needed for one in after if (one.stage, one.resource) in asked}
        yield Option(changes, needed, "; ".join(note for _, note in joined if note))


def changed(params: Params, changes: Mapping[str, Any]) -> Params:
    """Return `params` with new values by full names, validated.

    Raises:
        UserError: the combination is impossible.
    """
    values = params.as_dict()
    for name, value in changes.items():
        *sections, key = name.split(".")
        section = values
        for one in sections:
            section = section[one]
        section[key] = value
    return parse_params(values)


def _candidates(params: Params, launches: Path, failed: set[tuple[str, str]]) -> Iterator[tuple[Changes, str]]:
    """Yield single changes that can help what failed, the gentlest first, with what they cost."""
    train, data = params.train, params.data
    if ("all stages", "disk") in failed:
        if params.vision.store_dtype.value != "int8":
            yield {"vision.store_dtype": "int8"}, ""
        if data.official is not None and data.official.keep_archives:
            yield {"data.official.keep_archives": False}, ""
        if train.save_total_limit > 1:
            yield {"train.save_total_limit": 1}, ""
    if any(stage == "extract-features" for stage, _ in failed):
        yield from _halves("vision.batch_size", params.vision.batch_size)
    if any(stage == "helm-eval" for stage, _ in failed):
        yield from _halves("evaluation.batch_size", params.evaluation.batch_size)
    if any(stage == "train" for stage, _ in failed) or ("all stages", "disk") in failed:
        yield from _for_training(params, launches)


def _halves(key: str, size: int) -> Iterator[tuple[Changes, str]]:
    while size > 1:
        size //= 2
        yield {key: size}, ""


def _for_training(params: Params, launches: Path) -> Iterator[tuple[Changes, str]]:
    train = params.train
    if not train.gradient_checkpointing:
        yield {"train.gradient_checkpointing": True}, "about a third more time"
    batch, passes = train.batch_size, train.gradient_accumulation_steps
    while batch % 2 == 0:
        batch, passes = batch // 2, passes * 2
        yield {"train.batch_size": batch, "train.gradient_accumulation_steps": passes}, ""
    if train.optimizer.value != "adamw_bnb_8bit":
        yield {"train.optimizer": "adamw_bnb_8bit"}, ""
    if not train.freeze_embeddings:
        yield {"train.freeze_embeddings": True}, "the embedding and output head stay as they are"
    if train.weights_dtype.value == "float32":
        narrow = {"weights_dtype": "bfloat16", "rounding": "stochastic", "compute_dtype": "bfloat16"}
        yield {f"train.{key}": value for key, value in narrow.items()}, "updates are rounded by chance"
    yield from _other_launches(params, launches)
    if train.lora is None:
        lora = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": list(PROJECTIONS)}
        yield {"train.lora": lora, "train.freeze_embeddings": True}, "only adapters and the projector are trained"


def _other_launches(params: Params, launches: Path) -> Iterator[tuple[Changes, str]]:
    """Yield the other launches on the same kind of device, with as many questions a step, the fewest devices first."""
    train = params.train
    now = launch_shape(train.launch, launches)
    others = {path.stem: launch_shape(path.stem, launches) for path in sorted(launches.glob("*.yaml"))}
    for name, shape in sorted(others.items(), key=lambda one: one[1].processes):
        total = train.gradient_accumulation_steps * now.processes
        if name == train.launch or shape.on_cpu != now.on_cpu or total % shape.processes:
            continue
        devices = "processes" if shape.on_cpu else "GPUs"
        yield (
            {"train.launch": name, "train.gradient_accumulation_steps": total // shape.processes},
            f"{shape.strategy.value} on {shape.processes} {devices}"
            if shape.processes > 1
            else f"one of the {devices}",
        )
