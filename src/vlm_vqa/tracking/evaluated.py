"""What MLflow holds of an evaluated model: a run's parameters, tags and reports."""

import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_vqa.errors import UserError
from vlm_vqa.secrets import without_secrets
from vlm_vqa.tracking.describe import reason
from vlm_vqa.tracking.store import checkout_root, prepare_client, sqlite_file, tracking_uri

NO_STORE = "there is no MLflow store here. `dvc repro` or `vlm-vqa track` makes one; MLFLOW_TRACKING_URI names another."
REPORTS = ("evaluation.json", "scores.parquet", "predictions.parquet")


@dataclass(frozen=True)
class Evaluated:
    """One run."""

    run_id: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    files: Mapping[str, bytes]
    """Its reports, by their place in the project; one that was too large to be copied is not among them."""


def find_evaluated(run_id: str) -> Evaluated | None:
    """Return a run with its reports, or None where the store, if there is one, has no such run; UserError if it fails."""
    client = open_client()
    if client is None:
        return None
    from mlflow import MlflowException

    with asking():
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        there = [file.path for file in client.list_artifacts(run_id, "reports")]
        with tempfile.TemporaryDirectory() as scratch:
            wanted = [f"reports/{name}" for name in REPORTS if f"reports/{name}" in there]
            files = {place: Path(client.download_artifacts(run_id, place, scratch)).read_bytes() for place in wanted}
    return Evaluated(run_id, run.info.status, run.data.params, run.data.tags, files)


def open_client() -> Any | None:
    """Return MLflow's client of this checkout's store, None where there is none: none is made to look into it."""
    uri = tracking_uri(checkout_root())
    if (database := sqlite_file(uri)) and not database.exists():
        return None
    prepare_client()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@contextmanager
def asking(what: str = "") -> Generator[None]:
    """Turn what MLflow raises into a UserError that says what to do, after `what` was asked for."""
    from mlflow import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        uri = without_secrets(tracking_uri(checkout_root()))
        raise UserError(
            f"{what}MLflow at {uri} fails ({reason(error)}): make it reachable, or name another by MLFLOW_TRACKING_URI."
        ) from error
