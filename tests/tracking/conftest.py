"""A checkout with an empty MLflow store."""

import os
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from vlm_vqa.params import load_params

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A store with MLflow's tables: making them takes seconds, copying the file none."""
    root = tmp_path_factory.mktemp("store")
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    client.search_experiments()
    return root / "mlflow.db"


@pytest.fixture
def checkout(tmp_path, monkeypatch, empty_store):
    """A folder that looks like the project's, is the working directory, and has an empty store."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DVC_")) or name == "RANK":
            monkeypatch.delenv(name)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    shutil.copy(REPO / "presets/small.yaml", tmp_path / "params.yaml")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def params(checkout):
    return load_params("params.yaml")
