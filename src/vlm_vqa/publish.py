"""What `vlm-vqa publish` does: the export, its card with the scores, and the reports, as one commit on the hub."""

import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from vlm_vqa.errors import UserError, make_again
from vlm_vqa.hf_hub import Repository, translate_errors
from vlm_vqa.inference.card import scored
from vlm_vqa.inference.export import CARD
from vlm_vqa.inference.predictor import FACTS_FILE
from vlm_vqa.params import load_params
from vlm_vqa.pipeline.repair import recorded, verify
from vlm_vqa.pipeline.unlock import project_of
from vlm_vqa.sealed import read_folder, write_folder
from vlm_vqa.yaml_file import read_yaml

EXPORT, REPORTS = Path("models/export"), ("evaluation.json", "metrics.json", "train.json", "train_curve.csv")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
"""Of an earlier export these must go: transformers would read them instead of the new ones."""


@contextmanager
def prepared(name: str) -> Generator[Path]:
    """Give a folder with all that is to be published as `owner/name`, sealed again, as its card has the scores now.

    UserError: the export is damaged, or is not the one that dvc.lock and the reports speak of.
    """
    facts = read_folder(EXPORT / FACTS_FILE, "the seal of an export", make_again("export"))
    _check_recorded()
    report = json.loads(Path("reports/evaluation.json").read_text(encoding="utf-8"))
    if report["model"]["weights_hash"] != facts["weights_hash"]:
        raise UserError("reports/evaluation.json is of other weights than models/export holds. Run `dvc repro`.")
    params = load_params("params.yaml")
    source = params.data.source.value if params.data.hub is None else params.data.hub.val.repository
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {file.relative_to(EXPORT): file for file in EXPORT.rglob("*") if file.is_file()}
        files |= {Path("reports", one): Path("reports", one) for one in REPORTS if Path("reports", one).is_file()}
        for place, file in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).symlink_to(file.resolve())
        text = (EXPORT / CARD).read_text(encoding="utf-8")
        for place in (CARD, FACTS_FILE):
            (folder / place).unlink()
        (folder / CARD).write_text(scored(text, report, source, name.partition("/")[2]), encoding="utf-8")
        write_folder(folder / FACTS_FILE, facts)
        yield folder


def _check_recorded() -> None:
    """UserError unless export and reports are those of dvc.lock, and the reports are of this export."""
    with recorded(project_of(Path()), ["export", "helm-eval"]) as outs:
        faults = verify(outs)
    if faults:
        raise UserError(f"{faults[0]}. `dvc repro` makes what dvc.lock records, or `dvc pull` brings it.")
    stages = read_yaml(Path("dvc.lock"))["stages"]
    hashes = {
        entry["md5"]
        for entry in (*stages["export"]["outs"], *stages["helm-eval"]["deps"])
        if entry["path"] == EXPORT.as_posix()
    }
    if len(hashes) != 1:
        raise UserError("dvc.lock: reports/evaluation.json is of another export than models/export. Run `dvc repro`.")


def push(folder: Path, name: str, public: bool) -> str:
    """Push what `prepared` gives as one commit to the hub's model `owner/name`, made if need be; return its address.

    The token is huggingface_hub's own affair. An existing repository stays as private as it is.
    """
    api = HfApi()
    with translate_errors(Repository("OWNER/NAME", name, "main", "main")):
        api.create_repo(name, private=not public, exist_ok=True)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        stale = [old for old in api.list_repo_files(name) if any(fnmatch(old, weights) for weights in WEIGHTS)]
        operations = (
            *(CommitOperationDelete(old) for old in stale if old not in files),
            *(CommitOperationAdd(place, os.fspath(path)) for place, path in files.items()),
        )
        return api.create_commit(name, operations, commit_message="An export, its card and its reports").commit_url
