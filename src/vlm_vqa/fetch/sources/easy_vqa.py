"""Source `easy-vqa`: 4,000 + 1,000 drawn images with 48,248 questions (github.com/vzhou842/easy-VQA, MIT), from the
PyPI package `easy-vqa`, written out in VQAv2's own file layout."""

import importlib.metadata
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.contract import Source
from vlm_vqa.fetch.question_types import answer_type, question_type
from vlm_vqa.fetch.sources.official_layout import OFFICIAL, official_split
from vlm_vqa.hashing import hash_files

PACKAGE = "easy-vqa"
VERSION = "1.0"
# hash_files over data/{train,test}/questions.json and all images of that version.
DATA_HASH = "d9c0c884563e2a9445c694504c03e5996771197aee7d22118e760176e534ac78"

# Our split, the package's, and what is added to the package's image ids, which start at 0 in both.
_SPLITS = (("train", "train", 0), ("val", "test", 4000))
# No image has more than 21 questions; VQAv2 too makes question ids of the image's id times 1000.
_QUESTION_IDS_PER_IMAGE = 1000
NOTES = (
    "easy-VQA has one answer to a question; it is written 10 times, each with confidence yes.",
    "val is easy-VQA's test split; 4000 is added to its image ids, because both splits start at 0.",
    "question_id is image_id * 1000 + the question's place among the image's; question_type is the longest of VQAv2's "
    "leading phrases that fits; answer_type is yes/no, number or other as in VQAv2.",
    "Images are stored as JPEG (quality 95, no chroma subsampling) instead of PNG.",
)


def easy_vqa_source(folder: Path) -> Source:
    """Write easy-VQA into `folder` and return it as a source; raises as `write_official_layout` does."""
    write_official_layout(folder)
    origin = {"package": PACKAGE, "version": VERSION, "data_hash": DATA_HASH}
    splits = (official_split(folder, split, files) for split, files in OFFICIAL.items())
    return Source("easy-vqa", origin, tuple(splits), NOTES)


def write_official_layout(folder: str | Path) -> None:
    """Write easy-VQA into `folder` in VQAv2's official layout: questions, annotations and JPEGs of both splits. UserError
    if the package is missing, or its data are not those of version 1.0."""
    folder = Path(folder)
    data = _package_data()
    for split, package_split, offset in _SPLITS:
        files, images = OFFICIAL[split], folder / f"{split}2014"
        images.mkdir(parents=True, exist_ok=True)
        entries = json.loads((data / package_split / "questions.json").read_text(encoding="utf-8"))
        head = {"info": {"description": "easy-VQA 1.0 in VQAv2's layout"}, "data_subtype": images.name}
        for kind, found in _texts(entries, offset).items():
            (folder / getattr(files, kind)).write_text(json.dumps({**head, kind: found}), encoding="utf-8")
        image_ids = sorted({image_id for _, _, image_id in entries})
        for image_id in tqdm(image_ids, desc=f"easy-VQA {split}", unit="image"):
            with Image.open(data / package_split / "images" / f"{image_id}.png") as image:
                target = images / files.image_name.format(image_id=image_id + offset)
                image.convert("RGB").save(target, "JPEG", quality=95, subsampling=0)


def _package_data() -> Path:
    """Return the package's data folder, its content verified; the package itself is not run."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError(f"the package {PACKAGE} is not installed. Run `pip install {PACKAGE}=={VERSION}`.")
    data = Path(spec.origin).parent / "data"
    files = [data / split / "questions.json" for _, split, _ in _SPLITS]
    files += [path for _, split, _ in _SPLITS for path in (data / split / "images").glob("*.png")]
    found = hash_files((path for path in files if path.is_file()), data)
    if found != DATA_HASH:
        version = importlib.metadata.version(PACKAGE)
        mend = f"Run `pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}`; {version} is installed."
        raise UserError(f"{data}: easy-VQA's files have hash {found}, not {DATA_HASH}. {mend}")
    return data


def _texts(entries: list[list[Any]], offset: int) -> dict[str, list[dict[str, Any]]]:
    questions, annotations, places = [], [], Counter[int]()
    for question, answer, package_image_id in entries:
        image_id = package_image_id + offset
        ids = {"image_id": image_id, "question_id": image_id * _QUESTION_IDS_PER_IMAGE + places[image_id]}
        places[image_id] += 1
        kinds = {"question_type": question_type(question), "answer_type": answer_type(answer)}
        ten = [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]
        questions.append(ids | {"question": question})
        annotations.append(ids | kinds | {"multiple_choice_answer": answer, "answers": ten})
    return {"questions": questions, "annotations": annotations}
