"""A handful of changes that people make in params.yaml, each tried by the same formulas as the run itself."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlm_vqa.errors import UserError
from vlm_vqa.estimate.stage_costs import launch_of
from vlm_vqa.params import PROJECTIONS, Params, parse_params

LORA = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": list(PROJECTIONS)}
"""As presets/vqav2-lora.yaml has it."""


class Option(NamedTuple):
    """New values by full names under which everything fits, and then the bytes of what did not, by `stage: resource`."""

    changes: dict[str, Any]
    needed: dict[str, int]


def advise(
    params: Params, launches: Path, failed: set[str], tried: Callable[[Params], dict[str, int] | None]
) -> list[Option]:
    """Return single changes that make the `failed` stages fit, or else as many of them joined as it takes.

    Args:
        tried: returns the bytes of what did not fit, under changed parameters; None if something does not fit still.
    """
    flat = params.flat()
    single = [one for one in _candidates(params, failed) if any(flat.get(key) != value for key, value in one.items())]
    joined = [{key: value for one in single[:end] for key, value in one.items()} for end in range(2, len(single) + 1)]
    found: list[Option] = []
    for changes in [*single, *joined]:
        # Of joined ones, the first that do.
        if found and changes not in single:
            break
        try:
            changes = changes | _accumulation(params, changes, launches)
            needed = tried(changed(params, changes))
        except UserError:
            # Impossible together, or under this launch.
            continue
        if needed is not None:
            found.append(Option(changes, needed))
    return found


def _candidates(params: Params, failed: set[str]) -> Iterator[dict[str, Any]]:
    """Yield changes that can help the failed stages, the gentlest first."""
    train, official = params.train, params.data.official
    if "all stages" in failed:
        yield {"vision.store_dtype": "int8"}
        if official is not None:
            yield {"data.official.keep_archives": False}
    for stage, section in (("extract-features", "vision"), ("helm-eval", "evaluation")):
        if stage in failed:
            yield {f"{section}.batch_size": max(1, getattr(params, section).batch_size // 4)}
    if "train" in failed:
        yield {"train.gradient_checkpointing": True}
        yield from ({"train.batch_size": train.batch_size // part} for part in (2, 8) if train.batch_size % part == 0)
        yield {"train.optimizer": "adamw_bnb_8bit"}
        yield from ({"train.launch": name} for name in ("cpu", "gpu", "fsdp2"))
        yield {"train.lora": LORA, "train.freeze_embeddings": True}


def _accumulation(params: Params, changes: dict[str, Any], launches: Path) -> dict[str, int]:
    """Return the accumulation under which an optimizer step keeps its questions, where a change asks for another.

    Raises:
        UserError: there is none, or the launch is for other devices.
    """
    train = params.train
    before, after = (launch_of(name, launches) for name in (train.launch, changes.get("train.launch", train.launch)))
    rows = changes.get("train.batch_size", train.batch_size) * after.processes
    questions = train.batch_size * train.gradient_accumulation_steps * before.processes
    if questions % rows or before.on_cpu != after.on_cpu:
        raise UserError("another step, or another kind of device")
    steps = questions // rows
    return {} if steps == train.gradient_accumulation_steps else {"train.gradient_accumulation_steps": steps}


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
