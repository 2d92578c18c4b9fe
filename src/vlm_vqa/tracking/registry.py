"""Exports as versions of one registered model: what `models:/NAME/VERSION` means here, in MLflow and in `vlm-vqa ask`.

A version is known by its export's seal, so one export is one version. An export of up to `tracking.max_artifact_mib` is
copied into the store; a larger one stays where it is, in the checkout, and the version names the place and the seal.
"""

import io
import logging
import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import hash_json
from vlm_vqa.params import Params
from vlm_vqa.sealed import find_sealed
from vlm_vqa.secrets import without_secrets
from vlm_vqa.tracking.evaluated import NO_STORE, asking, open_client
from vlm_vqa.tracking.store import Store, checkout_root, tracking_uri

log = logging.getLogger(__name__)

EXPORT = Path("models/export")
FACTS_FILE = "vlm_vqa.json"  # inference.predictor's, which would bring torch
COPIED = "export"  # the artifact's name
CHAMPION = "champion"  # the alias that `vlm-vqa promote` moves
MOST = 10_000  # versions in one answer of MLflow
SEAL, PLACE = "export_seal", "export_folder"  # tags of a version; the second where the export is not copied
PACKAGES = ("torch", "torchvision", "transformers", "pillow", "pandas", "mlflow")
CODE = Path(__file__).with_name("pyfunc_model.py")


def local_folder(name: str) -> Path:
    """The export's folder of `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `models:/NAME/latest`.

    Raises UserError: there is no such version, or its export is not where it was.
    """
    client = open_client()
    if client is None:
        raise UserError(f"{name}: {NO_STORE}")
    from mlflow.artifacts import download_artifacts
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    with asking(f"{name}: "):
        tags = client.get_model_version(*get_model_name_and_version(client, name)).tags
        if SEAL not in tags:
            raise UserError(f"{name}: not an export of this project. `mlflow ui` lists models and versions.")
        if PLACE not in tags:
            uri = tracking_uri(checkout_root())
            found = download_artifacts(name, tracking_uri=uri, registry_uri=uri)
            return sealed_folder(Path(found, "artifacts", COPIED), tags[SEAL])
    return sealed_folder(Path(tags[PLACE]), tags[SEAL], tags.get("git_commit", ""), tags.get("dvc_experiment", ""))


def sealed_folder(folder: Path, seal: str, commit: str = "", experiment: str = "") -> Path:
    """`folder`, if the export in it has this seal; UserError if it was moved, or another one has taken its place.

    Whether its files are those that were sealed is found by who loads them.
    """
    facts = find_sealed(folder / FACTS_FILE)
    if facts is not None and hash_json(facts) == seal:
        return folder
    state = "another export is there now" if facts else "no whole export is there"
    way = (
        f"dvc exp apply {experiment}" if experiment else f"git checkout {commit} && dvc pull" if commit else "dvc pull"
    )
    raise UserError(f"{folder}: {state}; this model version is the one with seal {seal[:12]}. `{way}` brings it back.")


def register(store: Store, run_id: str, folder: Path, weights_hash: str) -> bool:
    """Make the export of these weights in `folder`, a checkout or DVC's copy of one, a version of the registered model.

    It is linked to the run that trained it, to its data and, by the evaluation, to its scores. Returns whether it had to be
    made: without a whole export of these weights, or with a version of it, there is nothing to do.
    """
    facts, made = _exported(store, folder)
    if made or facts.get("weights_hash") != weights_hash:
        return False
    from mlflow.entities import LoggedModelOutput

    run, export = store.client.get_run(run_id), folder / EXPORT
    kept = ("params_hash", "data_hash", "code_hash", "git_commit", "dvc_experiment")
    tags = {key: run.data.tags[key] for key in kept if key in run.data.tags}
    tags |= {"weights_hash": weights_hash, "mask": facts["mask"], SEAL: hash_json(facts)}
    if sum(file.stat().st_size for file in export.rglob("*") if file.is_file()) > store.largest:
        tags[PLACE] = str(checkout_root(folder) / EXPORT)
    name, client = model_name(store.params), store.client
    model = client.create_logged_model(store.experiment_id, name, run_id, tags, model_type="vqa")
    model_id = model.model_id
    with tempfile.TemporaryDirectory() as scratch:
        _save(Path(scratch) / "model", export, tags)
        client.log_model_artifacts(model_id, f"{scratch}/model")
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model_id, facts["step"])])
    if not client.search_registered_models(f"name = '{name}'", max_results=1):
        client.create_registered_model(name, description="Each version is an export, of the run that it names.")
    # MLflow's search for versions leaves their model_id out.
    tags["model_id"] = model_id
    # Its `models:/ID` would be looked for in the store of the working directory.
    version = client.create_model_version(name, model.artifact_location, run_id, tags, model_id=model_id).version
    log.info("registered %s as models:/%s/%s", export, name, version)
    return True


def subject(store: Store, folder: Path) -> dict[str, str]:
    """What `Store.put_metrics` is told of the model that scores are of, and of their data; empty if it is not registered."""
    _, version = _exported(store, folder)
    if version is None:
        return {}
    name, digest = store.data_name(version.tags.get("data_hash", ""))
    return {"model_id": version.tags["model_id"], "dataset_name": name, "dataset_digest": digest}


def find_version(client: Any, model: str, name: str) -> Any:
    """The version of a registered model by its number or by its run; UserError if there is none, or several."""
    versions = client.search_model_versions(f"name = '{model}'", max_results=MOST)
    found = [version for version in versions if name in (str(version.version), version.run_id)]
    if len(found) == 1:
        return found[0]
    several = " or ".join(str(version.version) for version in found)
    remedy = (
        f"it made several: name version {several}" if found else "`mlflow ui` lists models, versions and their runs"
    )
    raise UserError(f"{name}: no one version of the model {model} in MLflow; {remedy}.")


def champion_of(client: Any, model: str) -> Any | None:
    """The version that has the alias `champion`, None where none has it."""
    aliases = client.get_registered_model(model).aliases
    return client.get_model_version(model, aliases[CHAMPION]) if CHAMPION in aliases else None


def crown(client: Any, model: str, version: Any, why: Mapping[str, str]) -> None:
    """Gives a version the alias `champion`, and first the tags that say why: who finds the alias finds them."""
    for key, text in why.items():
        client.set_model_version_tag(model, version.version, f"{CHAMPION}.{key}", without_secrets(text))
    client.set_registered_model_alias(model, CHAMPION, version.version)


def _exported(store: Store, folder: Path) -> tuple[dict[str, Any], Any]:
    """The facts sealed in the export of `folder`, and its registered version; empty and None where there are none."""
    facts = find_sealed(folder / EXPORT / FACTS_FILE)
    if facts is None:
        return {}, None
    condition = f"name = '{model_name(store.params)}' and tags.{SEAL} = '{hash_json(facts)}'"
    return facts, next(iter(store.client.search_model_versions(condition, max_results=1)), None)


def model_name(params: Params) -> str:
    """The experiment's name without what MLflow refuses in the name of a model."""
    return re.sub(r"[^\w-]+", "-", params.tracking.experiment)


def _save(target: Path, export: Path, tags: dict[str, str]) -> None:
    """Write MLflow's folder of a model: code, signature and example, and the export where `tags` name no place of it."""
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, Schema
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    config = {"seal": tags[SEAL], "commit": tags.get("git_commit", ""), "experiment": tags.get("dvc_experiment", "")}
    save_model(
        target,
        python_model=str(CODE),
        artifacts=None if PLACE in tags else {COPIED: export.resolve().as_uri()},
        model_config=config | ({"folder": tags[PLACE]} if PLACE in tags else {}),
        signature=ModelSignature(
            Schema([ColSpec("binary", "image"), ColSpec("string", "question")]), Schema([ColSpec("string", "answer")])
        ),
        input_example=pd.DataFrame({"image": [picture.getvalue()], "question": ["What color is the picture?"]}),
        pip_requirements=[f"{name}=={version_of(name).partition('+')[0]}" for name in PACKAGES],
    )
