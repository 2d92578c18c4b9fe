"""Exports as versions of one registered model: what `models:/NAME/VERSION` means here, in MLflow and in `vlm-vqa ask`.

A version is known by its export's seal, so one export is one version. An export of up to `tracking.max_artifact_mib` is
copied into the store; a larger one stays where it is, in the checkout, and the version names the place and the seal.
"""

import logging
import re
import shutil
import tempfile
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import hash_json
from vlm_vqa.sealed import find_sealed
from vlm_vqa.secrets import without_secrets
from vlm_vqa.tracking.describe import reason
from vlm_vqa.tracking.store import Store, checkout_root, prepare_client, sqlite_file, tracking_uri

EXPORT = Path("models/export")
FACTS_FILE = "vlm_vqa.json"  # inference.predictor's, which would bring torch
COPIED = "export"  # the artifact's name
SEAL, PLACE = "export_seal", "export_folder"  # tags of a version; the second where the export is not copied
PACKAGES = ("torch", "torchvision", "transformers", "pillow", "pandas", "mlflow")
CODE = Path(__file__).with_name("pyfunc_model.py")


def local_folder(name: str) -> Path:
    """The export's folder of `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `models:/NAME/latest`.

    Raises UserError: there is no such version, or its export is not where it was.
    """
    uri = tracking_uri(checkout_root())
    remedy = "`mlflow ui` lists the models and their versions; MLFLOW_TRACKING_URI names another store"
    if (database := sqlite_file(uri)) and not database.exists():
        raise UserError(f"{name}: there is no MLflow store {database}. `dvc repro` or `vlm-vqa track` makes one.")
    try:
        prepare_client()
        from mlflow import MlflowClient
        from mlflow.artifacts import download_artifacts
        from mlflow.store.artifact.utils.models import get_model_name_and_version

        client = MlflowClient(tracking_uri=uri)
        tags = client.get_model_version(*get_model_name_and_version(client, name)).tags
        if SEAL in tags and PLACE not in tags:
            return sealed_folder(
                Path(download_artifacts(name, tracking_uri=uri, registry_uri=uri), "artifacts", COPIED), tags[SEAL]
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: MLflow at {without_secrets(uri)} gives no such model ({reason(error)}): {remedy}.") from error
    if SEAL not in tags:
        raise UserError(f"{name}: not an export of this project. {remedy}.")
    return sealed_folder(Path(tags[PLACE]), tags[SEAL], tags.get("git_commit", ""), tags.get("dvc_experiment", ""))


def sealed_folder(folder: Path, seal: str, commit: str = "", experiment: str = "") -> Path:
    """`folder`, if the export in it has this seal; UserError if it was moved, or another one has taken its place.

    Whether its files are those that were sealed is found by who loads them.
    """
    facts = find_sealed(folder / FACTS_FILE)
    if facts is not None and hash_json(facts) == seal:
        return folder
    state = "another export is there now" if facts else "no whole export is there"
    brings = f"`dvc exp apply {experiment}`" if experiment else f"`git checkout {commit or 'COMMIT'}`, then `dvc pull {EXPORT}`,"
    raise UserError(f"{folder}: {state}; this model version is the one with seal {seal[:12]}. {brings} brings it back.")
