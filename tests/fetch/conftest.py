"""What the tests of `data` share: parameters for a folder in official layout."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_vqa.params import DataParams, Source, SplitFiles


@pytest.fixture
def directory_params() -> Callable[..., DataParams]:
    """Return a function that gives the parameters to fetch a folder, with fields changed by name."""

    def params(folder: str | Path, **changes) -> DataParams:
        train, val = (
            SplitFiles(
                f"v2_OpenEnded_mscoco_{split}2014_questions.json",
                f"v2_mscoco_{split}2014_annotations.json",
                f"{split}2014",
                f"COCO_{split}2014_{{image_id:012d}}.jpg",
            )
            for split in ("train", "val")
        )
        fields = {
            "source": Source.DIRECTORY,
            "train": train,
            "val": val,
            "allow_split_overlap": False,
            "official": None,
            "hub": None,
            "max_image_pixels": 50_000_000,
        }
        return DataParams(directory=str(folder), **{**fields, **changes})

    return params
