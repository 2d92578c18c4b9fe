"""The project whose first two stages have run, made once for all modules that train."""

import shutil

import pytest

from proofs.project import Project, sample_params


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory, shared_data):
    """Return the folder `data` of a project on the real sample whose first two stages have run."""
    project = Project(tmp_path_factory.mktemp("sample"), sample_params(shared_data))
    for name in ("fetch-vqav2", "extract-features"):
        done = project.stage(name)
        assert done.returncode == 0, done.stderr
    return project.folder / "data"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, shared_data, sample_data):
    """A module's own project on the real sample, with its data."""
    project = Project(tmp_path_factory.mktemp("prepared"), sample_params(shared_data))
    shutil.copytree(sample_data, project.folder / "data", dirs_exist_ok=True)
    return project
