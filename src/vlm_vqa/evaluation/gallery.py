"""A picture of real test questions with the model's answers, right and wrong ones."""

import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.records import images_of, said_answers
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.baselines import most_common
from vlm_vqa.evaluation.helm.files import read_table

_COLUMNS = 4
_RIGHT_COLOUR, _WRONG_COLOUR = "#1a7f37", "#b42318"
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
    numbers are at most `right` and `wrong`, though: the picture does not show how often the model is right.

    Raises:
        UserError: there are no predictions, an image is not among the records, or `out_path` cannot be written.
    """
    out_path = Path(out_path)
    if out_path.suffix.lower() != ".png":
        raise UserError(f"{out_path}: the gallery is a PNG. Name a file that ends in .png.")
    if not 0 <= seed < 2**32:
        raise UserError(f"the gallery's seed is {seed}: take one from 0 to {2**32 - 1}.")
    chosen = _choose(Path(predictions_path), right, wrong, seed)
    images = {
        record.image_id: open_image(record.data, record.file_name, max_image_pixels)
        for record in images_of(records_dir, {row["image_id"] for row in chosen})
    }
    rows = -(-len(chosen) // _COLUMNS)
    texts = [(_wrapped(row["question"]), _wrapped(_verdict(row))) for row in chosen]
    # A grid of pictures of 2.6 inches, with room between them for the longest question and answer.
    above, below = (0.1 + 0.17 * max(text.count("\n") + 1 for text in column) for column in zip(*texts, strict=True))
    height = rows * (2.6 + above + below)
    # Its own figure and canvas: no display is needed and no global state is left behind.
    figure = Figure(figsize=(11, height), dpi=100)
    figure.subplots_adjust(0.01, below / height, 0.99, 1 - above / height, wspace=0.04, hspace=(above + below) / 2.6)
    for place, (row, text) in enumerate(zip(chosen, texts, strict=True), start=1):
        _draw(figure.add_subplot(rows, _COLUMNS, place), row, *text, images[row["image_id"]])
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


def _draw(axes: Any, row: Mapping[str, Any], title: str, caption: str, image: Image.Image) -> None:
    colour = _RIGHT_COLOUR if row["score"] >= _RIGHT else _WRONG_COLOUR
    axes.imshow(image, interpolation="nearest" if max(image.size) < 200 else None)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=colour, linewidth=2)
    # A dollar sign would start a formula.
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_xlabel(caption, fontsize=9, color=colour, parse_math=False)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["score"] >= _RIGHT:
        return f"right: {row['prediction']}"
    return f"wrong: {row['prediction']} (humans: {most_common(Counter(said_answers(row['answers'])))})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 36)
