"""Fixtures that several areas share: a tiny data set in VQAv2's official layout, and the real sample."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_model import tiny  # noqa: F401 - a fixture for all areas
from vlm_vqa.fetch.sources.official_layout import OFFICIAL
from vlm_vqa.params import DataParams, Source

REPO = Path(__file__).parents[1]
# A user's own server, store or launcher must neither hear of the tests nor change what they see.
for _name in [name for name in os.environ if name.startswith(("MLFLOW_", "DVC_", "ACCELERATE_", "FSDP_"))]:
    del os.environ[_name]
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 40)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cheap tests first: what is broken shows before the slow ones start. Two workers share them by file."""
    slow = {item: item.get_closest_marker("slow") is not None for item in items}
    items.sort(key=slow.__getitem__)
    for item in items:
        # A slow test alone, so that the last ones are not all left to one worker.
        item.add_marker(pytest.mark.xdist_group(item.nodeid if slow[item] else str(item.path)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data that is not part of the project, or skip."""
    folder = Path(os.environ.get("VLM_VQA_SHARED_DATA", REPO.parent / "shared" / "data"))
    if not (folder / "vqav2-sample").is_dir():
        pytest.skip(f"the real VQAv2 sample is not in {folder}; name its folder in VLM_VQA_SHARED_DATA")
    return folder


@pytest.fixture
def vqav2_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a tiny data set under VQAv2's official names and returns its folder."""

    return lambda name="vqav2", **sizes: write_vqav2(tmp_path / name, **sizes)


def write_vqav2(folder: Path, train_images: int = 4, val_images: int = 2, size: tuple[int, int] = (32, 24)) -> Path:
    """Write a tiny data set under VQAv2's official names; return its folder."""
    # Not in ascending order of ids, like the official files.
    _write_split(folder, "train", [9 + 16 * index for index in reversed(range(train_images))], size)
    _write_split(folder, "val", [1042 + 31 * index for index in reversed(range(val_images))], size)
    return folder


def _write_split(folder: Path, split: str, image_ids: list[int], size: tuple[int, int]) -> None:
    """Write one image of a plain colour and three questions about it for every id."""
    images = folder / f"{split}2014"
    images.mkdir(parents=True)
    questions, annotations = [], []
    for image_id in image_ids:
        colour = random.Random(image_id).choice(sorted(COLOURS))
        # The comment makes equal pictures different files: equal ones may not stand in both splits.
        path = images / f"COCO_{split}2014_{image_id:012d}.jpg"
        Image.new("RGB", size, COLOURS[colour]).save(path, quality=95, comment=str(image_id))
        for place, (question, question_type, answer_type, answer) in enumerate(
            (
                ("What color is the picture?", "what color is the", "other", colour),
                ("Is the picture red?", "is the", "yes/no", "yes" if colour == "red" else "no"),
                ("How many colors are there?", "how many", "number", "1"),
            )
        ):
            ids = {"question_id": image_id * 1000 + place, "image_id": image_id}
            questions.append({**ids, "question": question})
            # Nine agree, one does not, as people do.
            answers = [
                {"answer": answer if number < 10 else "maybe", "answer_confidence": "yes", "answer_id": number}
                for number in range(1, 11)
            ]
            kinds = {"question_type": question_type, "answer_type": answer_type, "multiple_choice_answer": answer}
            annotations.append({**ids, **kinds, "answers": answers})
    _write_json(folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json", {"questions": questions})
    _write_json(folder / f"v2_mscoco_{split}2014_annotations.json", {"annotations": annotations})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def directory_params() -> Callable[..., DataParams]:
    """Return a function that gives the parameters to fetch a folder, with fields changed by name."""

    def params(folder: str | Path, **changes) -> DataParams:
        fields = {
            **OFFICIAL,
            "source": Source.DIRECTORY,
            "allow_split_overlap": False,
            "official": None,
            "hub": None,
            "max_image_pixels": 50_000_000,
        }
        return DataParams(directory=str(folder), **{**fields, **changes})

    return params


@pytest.fixture
def clean_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what git has of parameters and launches, and nothing that a run of the user's has written."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("presets", "launch", "evaluation", "dvc.yaml"):
        (folder / name).symlink_to(REPO / name)
    monkeypatch.chdir(folder)
    return folder
