"""What is in the MLflow store of a checkout."""

from pathlib import Path

from mlflow import MlflowClient


def runs(root: Path):
    """All runs in the checkout's default store, newest first."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    return client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["start_time DESC"])


def artifacts(root: Path, run) -> dict[str, str]:
    """Name and text of each artifact of `run`."""
    folder = root / "mlartifacts" / run.info.run_id / "artifacts"
    return {f.relative_to(folder).as_posix(): f.read_text() for f in folder.rglob("*") if f.is_file()}
