"""A picture of real test questions with the model's answers, right and wrong ones."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.records import images_of, said_answers
from vlm_vqa.errors import UserError, make_again
from vlm_vqa.evaluation.helm.files import read_table

_COLUMNS = 4
_COLOURS = {"right": "#1a7f37", "wrong": "#b42318"}
# Questions below this are wrong, from it on right; VQA's scores go in steps of 0.3.
_RIGHT = 0.5


def draw_gallery(
    records_dir: str | Path = "data/records",
    predictions_path: str | Path = "reports/predictions.parquet",
    out_path: str | Path = "evaluation/helm/images/gallery.png",
    right: int = 8,
    wrong: int = 4,
    seed: int = 0,
    max_image_pixels: int = 50_000_000,
) -> Path:
    """Draw questions with their images, the model's answer and the humans' most common one; return the file's path.

    The choice is random among right and among wrong answers and depends on the seed alone, so it flatters nobody. Their
    numbers are chosen, though: the picture does not show how often the model is right.

    Args:
        records_dir: the records that the predictions are about.
        predictions_path: what the helm-eval stage wrote.
        out_path: PNG to write.
        right, wrong: how many of each; fewer if there are not as many.
        seed: the same seed and predictions give the same picture.
        max_image_pixels: bound on an image's size.

    Raises:
        UserError: there are no predictions, an image is not among the records, or `out_path` cannot be written.
    """
    out_path = Path(out_path)
    if out_path.suffix.lower() != ".png":
        raise UserError(f"{out_path}: the gallery is a PNG. Name a file that ends in .png.")
    if not 0 <= seed < 2**32:
        raise UserError(f"the gallery's seed is {seed}: take one from 0 to {2**32 - 1}.")
    chosen = _choose(Path(predictions_path), right, wrong, seed)
    images = _images(Path(records_dir), {row["image_id"] for row in chosen}, max_image_pixels)
    # Its own figure and canvas: no display is needed and no global state is left behind.
    figure = Figure(figsize=(11, 3.1 * -(-len(chosen) // _COLUMNS)), dpi=100, layout="constrained")
    for place, row in enumerate(chosen, start=1):
        axes = figure.add_subplot(-(-len(chosen) // _COLUMNS), _COLUMNS, place)
        _draw(axes, row, images[row["image_id"]])
    try:
        out_path.parent.mkdir(parents=True, exist_ok=True)
        # Without the library's version in the file, equal pictures are equal files.
        figure.savefig(out_path, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"{out_path}: cannot be written ({error.strerror}). Name another file.") from error
    return out_path


def _choose(path: Path, right: int, wrong: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of the predictions, right ones first, no image twice."""
    table = read_table(path)
    table = table.rename_columns(["score" if name == "answer_accuracy" else name for name in table.column_names])
    is_right, images = table["score"].to_numpy() >= _RIGHT, table["image_id"].to_numpy()
    order = np.random.RandomState(seed).permutation(len(table))
    # Image id -> row; wrong answers are rare in a good model, so they have the first choice of images.
    chosen: dict[int, int] = {}
    for among, most in ((~is_right, wrong), (is_right, right)):
        full = len(chosen) + most
        for at in order[among[order]].tolist():
            if len(chosen) == full:
                break
            chosen.setdefault(int(images[at]), at)
    if not chosen:
        raise UserError(f"{path}: holds no prediction to draw. Run `dvc repro helm-eval` again.")
    return sorted(table.take(list(chosen.values())).to_pylist(), key=lambda row: row["score"] < _RIGHT)


def _images(records: Path, wanted: set[int], max_pixels: int) -> Mapping[int, Image.Image]:
    found = images_of(records, wanted)
    images = {record.image_id: open_image(record.data, record.file_name, max_pixels) for record in found}
    if missing := wanted - images.keys():
        raise UserError(
            f"{records}: has no image {min(missing)}, which a prediction is about. {make_again('fetch-vqav2 helm-eval')}"
        )
    return images


def _draw(axes: Any, row: Mapping[str, Any], image: Image.Image) -> None:
    verdict = "right" if row["score"] >= _RIGHT else "wrong"
    axes.imshow(image, interpolation="nearest" if max(image.size) < 200 else None)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=_COLOURS[verdict], linewidth=2)
    # A dollar sign would start a formula.
    axes.set_title("\n".join(textwrap.wrap(row["question"], 32)), fontsize=9, parse_math=False)
    humans = "" if verdict == "right" else f" (humans: {_most_common(row['answers'])})"
    answer = row["prediction"] + humans
    axes.set_xlabel(f"{verdict}: {answer}", fontsize=9, color=_COLOURS[verdict], parse_math=False)


def _most_common(answers: Sequence[str]) -> str:
    said = said_answers(answers)
    return max(sorted(set(said)), key=said.count)
