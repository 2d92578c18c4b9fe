"""A picture of real test questions with the model's answers, right and wrong ones."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_vqa.data.records import images_of, said_answers
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.baselines import most_common
from vlm_vqa.evaluation.helm.files import read_table
from vlm_vqa.training.answers_picture import ENOUGH, RIGHT, WRONG, Cell, draw_page, fold, small

_LINES = 9
"""Of a question, of an answer: more are cut."""


def draw_gallery(
    records_dir: str | Path = "data/records",
    predictions_path: str | Path = "reports/predictions.parquet",
    out_path: str | Path = "evaluation/helm/images/gallery.png",
    right: int = 8,
    wrong: int = 4,
    seed: int = 0,
) -> Path:
    """Draw questions with their images, the model's answer and the humans' most common one; return the file's path.

    The choice is random among right and among wrong answers and depends on the seed alone, so it flatters nobody. Their
    numbers are at most `right` and `wrong`, though: the picture does not show how often the model is right. UserError if
    there are no predictions, an image is not among the records, or `out_path` cannot be written.
    """
    out_path = Path(out_path)
    if out_path.suffix.lower() != ".png":
        raise UserError(f"{out_path}: the gallery is a PNG. Name a file that ends in .png.")
    if not 0 <= seed < 2**32:
        raise UserError(f"the gallery's seed is {seed}: take one from 0 to {2**32 - 1}.")
    chosen = _choose(Path(predictions_path), right, wrong, seed)
    pictures = {one.image_id: small(one) for one in images_of(records_dir, {row["image_id"] for row in chosen})}
    cells = []
    for row in chosen:
        good = row["score"] >= ENOUGH
        lines = fold(row["question"], _LINES, bold=True) + fold(_verdict(row), _LINES, RIGHT if good else WRONG)
        cells.append(Cell(pictures[row["image_id"]], lines, [good]))
    page = draw_page([], cells)
    try:
        out_path.parent.mkdir(parents=True, exist_ok=True)
        page.save(out_path)
    except OSError as error:
        raise UserError(f"{out_path}: cannot be written ({error.strerror}). Name another file.") from error
    return out_path


def _choose(path: Path, right: int, wrong: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of the predictions, right ones first, no image twice."""
    table = read_table(path)
    table = table.rename_columns(["score" if name == "answer_accuracy" else name for name in table.column_names])
    is_right, images = table["score"].to_numpy() >= ENOUGH, table["image_id"].to_numpy()
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
    return sorted(table.take(list(chosen.values())).to_pylist(), key=lambda row: row["score"] < ENOUGH)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["score"] >= ENOUGH:
        return f"right: {row['prediction']}"
    return f"wrong: {row['prediction']} (humans: {most_common(Counter(said_answers(row['answers'])))})"
