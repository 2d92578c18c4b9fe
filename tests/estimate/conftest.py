"""Parameters of a preset with changes, as a value and as a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_vqa.estimate.predict import Asked, Prediction, changed, predict
from vlm_vqa.params import Params, load_params

ROOT = Path(__file__).parents[2]


@pytest.fixture
def preset() -> Callable[..., Params]:
    return lambda name, **changes: changed(load_params(ROOT / f"presets/{name}.yaml"), changes)


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Prediction]:
    """Return a function that predicts for parameters, with the repository's launches, no records and much room."""

    def predicted(params: Params, **options: Any) -> Prediction:
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(params.as_dict()))
        asked = Asked(**({"host_memory": 512, "disk": 2000} | options))
        return predict(path, asked, records=tmp_path / "none", launches=ROOT / "launch")

    return predicted
