"""Which questions validate while training, and which are trained on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_vqa.data.records import load_questions, picture_ids
from vlm_vqa.errors import UserError
from vlm_vqa.params import Params, ValidateOn

if TYPE_CHECKING:
    from datasets import Dataset as Records


def divide(records: "Records", params: Params, folder: Any) -> "tuple[Records, Records]":
    """Divide all training questions, `records` of a `folder`, into those that are trained on and the dev part, which has
    images of its own: pictures of equal bytes go the same way. UserError if that would leave nothing to train on."""
    settings = params.validation
    if not settings.questions or settings.from_ is ValidateOn.VAL:
        return records, records.select([])
    chosen = _dev_part(picture_ids(folder, "train", records["image_id"]), params)
    return records.select(np.flatnonzero(~chosen)), records.select(np.flatnonzero(chosen))


def validation_questions(params: Params, folder: Any) -> "tuple[Records, Records]":
    """Return the questions that validate, and those of the trained ones beside them; UserError if there are not so many."""
    settings, trained = params.validation, load_questions(folder, "train")
    if settings.from_ is ValidateOn.VAL:
        held = load_questions(folder, "val")
        held = held.select(_take(held["image_id"], params, "questions", "val"))
    else:
        trained, held = divide(trained, params, folder)
    return held, trained.select(_take(trained["image_id"], params, "train_questions", "trained"))


def check_enough(params: Params, train: np.ndarray, val: np.ndarray) -> None:
    """Refuse to validate on more questions than there are, as the functions above do of records, by a UserError with the
    key; `train` and `val`, int64 [questions], are the pictures that a split's questions are about."""
    settings = params.validation
    if settings.from_ is ValidateOn.VAL:
        _take(val, params, "questions", "val")
    elif settings.questions:
        train = train[~_dev_part(train, params)]
    _take(train, params, "train_questions", "trained")


def _dev_part(pictures: np.ndarray, params: Params) -> np.ndarray:
    chosen = _of_some_images(pictures, wanted := params.validation.questions, params.seed)
    if chosen.all():
        all_of_them = f"the images of so many are all that the {len(pictures)} training questions have: none is left"
        mend = "Lower it, or set validation.from: val."
        raise UserError(f"validation.questions is {wanted}, and {all_of_them} to train on. {mend}")
    return chosen


def _take(image_ids: Sequence[int] | np.ndarray, params: Params, key: str, what: str) -> np.ndarray:
    count = getattr(params.validation, key)
    if count > len(image_ids):
        raise UserError(f"validation.{key} is {count}, but there are {len(image_ids)} {what} questions. Lower it.")
    chosen = _of_some_images(np.asarray(image_ids, dtype=np.int64), count, params.seed)
    return np.flatnonzero(chosen if count else [])


def _of_some_images(pictures: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Mark, bool [questions], all questions of the first images in random order that have `count` of them and are at
    least two; `pictures`, int64 [questions], is what each is about. No image is taken in part: sharing rows costs less."""
    distinct, place, sizes = np.unique(pictures, return_inverse=True, return_counts=True)
    order = np.random.RandomState(seed).permutation(len(distinct))
    needed = max(int(np.searchsorted(np.cumsum(sizes[order]), count)) + 1, 2)
    return np.isin(place, order[:needed])
