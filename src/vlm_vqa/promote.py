"""What `vlm-vqa promote` does: the registered model's alias `champion` moves to a version that is shown to be better."""

from typing import Any

from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.difference_page import headline
from vlm_vqa.evaluation.differences import Paired, Side, compare_sides
from vlm_vqa.params import Params
from vlm_vqa.sides import side_of_run
from vlm_vqa.tracking.evaluated import NO_STORE, asking, find_evaluated, open_client
from vlm_vqa.tracking.registry import CHAMPION, champion_of, crown, find_version, model_name

HASHES = ("data_hash", "weights_hash")


def promote(params: Params, name: str, margin: float | None, reason: str | None) -> tuple[str, bool]:
    """Make a version the champion if the paired test says better, or not worse than today's by `margin`, for a `reason`.

    `name` is its number, or the id of the run that made it. Return what there is to say, and whether it is the champion now.
    UserError: there is no such version, or what is known of it or of the champion does not allow to compare them.
    """
    if (margin is None) != (reason is None or not reason.strip()):
        raise UserError("--margin needs a --reason, which is kept with the figures, and a --reason a --margin.")
    if margin is not None and not 0 < margin < 1:
        raise UserError(f"--margin {margin:g} is not between 0 and 1: scores are fractions, 0.01 is one point.")
    model, client = model_name(params), open_client()
    if client is None:
        raise UserError(NO_STORE)
    with asking():
        new, old = find_version(client, model, name), champion_of(client, model)
    side = _evaluated(model, new)
    if old is None:
        why = {"over": "none", "figures": f"the first {CHAMPION}: nothing to compare with"}
    elif old.version == new.version:
        return f"version {new.version} of {model} is the {CHAMPION} already.", True
    else:
        if old.tags["data_hash"] != new.tags["data_hash"]:
            raise UserError(
                f"version {new.version} is of other data than the {CHAMPION}, version {old.version} (data_hash "
                f"{new.tags['data_hash'][:12]} and {old.tags['data_hash'][:12]}): evaluate both on the same data first."
            )
        found = compare_sides(_evaluated(model, old), side)
        gate = params.evaluation.gate
        said, paired = headline(found, gate), found.deciding(gate).paired
        if not _may_follow(paired, margin):
            bound = "" if margin is None else f" nor surely less than {margin:g} worse"
            return (
                f"{said} Version {old.version} stays the {CHAMPION}: the other is not shown to be better{bound}.",
                False,
            )
        why = {"over": str(old.version), "figures": said}
    if margin is not None and reason is not None:
        why |= {"margin": f"{margin:g}", "reason": reason.strip()}
    with asking():
        crown(client, model, new, why)
    return f"version {new.version} of {model} is the {CHAMPION} now. {why['figures']}", True


def _may_follow(paired: Paired, margin: float | None) -> bool:
    return paired.verdict == "better" or (margin is not None and paired.difference.low > -margin)


def _evaluated(model: str, version: Any) -> Side:
    """Return a version's scores; UserError unless a finished run has those of exactly this export."""
    of = f"version {version.version} of {model}"
    run = find_evaluated(version.run_id)
    if run is None:
        raise UserError(f"{of}: its run {version.run_id} is not in MLflow any more. `vlm-vqa track` records it again.")
    if run.status != "FINISHED":
        raise UserError(f"{of}: its run {run.run_id} is not finished but {run.status}. `dvc repro` goes on with it.")
    if "reports/evaluation.json" not in run.files:
        raise UserError(f"{of}: its run {run.run_id} has no report. `dvc repro helm-eval` evaluates it.")
    if lacking := [key for key in HASHES if not version.tags.get(key)]:
        raise UserError(f"{of}: MLflow has no {lacking[0]} of it. `dvc repro` registers one with it.")
    side = side_of_run(run)
    for key in ("weights_hash", "mask"):
        if (there := side.report["model"].get(key)) != version.tags.get(key):
            raise UserError(
                f"{of}: the report of its run is of another {key} ({there}). `dvc repro helm-eval` evaluates it."
            )
    return side
