"""VQAv2 as the benchmarks ask it: the real samples where they are, else questions, answers and pictures drawn like them.

The samples are no part of the project: `vqav2-text`, 29,761 questions of VQAv2's train split with ten answers each, and
`vqav2-sample`, 75 pictures with 109 questions, in the official layout, below the folder that VLM_VQA_SHARED_DATA names
(default ../shared/data). What is drawn has no meaning, but costs the same: words as many, as long and as often the same
ones, as many different answers of the ten, as many with marks, digits and number words; pictures of COCO's sizes and bytes.
The shares below, in thousandths, were counted in `vqav2-text` (VQA v2.0, visualqa.org, CC BY 4.0; a subsample with as many
yes/no, number and other questions).
"""

import bisect
import functools
import gzip
import io
import json
import os
import random
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import write_json

TEXT, SAMPLE = "vqav2-text", "vqav2-sample"
COUNTS = {TEXT: (29_761, 19_592), SAMPLE: (109, 75)}
"""Questions and images of the real ones, and so of the drawn ones."""
REAL, DRAWN = "real VQAv2", "drawn"
Rows = list[dict[str, Any]]

_QUESTION_WORDS = {3: 31, 4: 114, 5: 259, 6: 203, 7: 190, 8: 100, 9: 48, 10: 26, 11: 14, 12: 8, 13: 4, 15: 3}
_ANSWER_WORDS = {"agreed": {1: 860, 2: 101, 3: 34, 4: 5}, "other": {1: 636, 2: 222, 3: 98, 4: 29, 5: 9, 6: 6}}
"""Of questions of type other: the answer that most gave, and the rest."""
_AGREEING = {
    "yes/no": {10: 528, 9: 191, 8: 107, 7: 72, 6: 64, 5: 38},
    "number": {10: 358, 9: 134, 8: 83, 7: 74, 6: 78, 5: 78, 4: 67, 3: 63, 2: 56, 1: 9},
    "other": {10: 186, 9: 111, 8: 90, 7: 84, 6: 96, 5: 100, 4: 111, 3: 113, 2: 88, 1: 21},
}
"""How many of the ten gave the answer that most gave; the last is the least."""
_FREQUENCIES = {
    "question": {1: 106, 10: 482, 30: 615, 100: 729, 300: 842, 1000: 939, 3000: 986, 5501: 1000},
    "answer": {1: 40, 3: 88, 10: 189, 30: 291, 100: 445, 300: 623, 1000: 813, 3000: 944, 7800: 1000},
    "number": {1: 206, 2: 404, 3: 507, 6: 693, 10: 770, 30: 847, 100: 895, 300: 934, 1000: 979, 2650: 1000},
}
"""The share of the so many most frequent words among all that are said."""
_LETTERS = {1: 3, 10: 3, 30: 4, 100: 4.9, 300: 5.3, 1000: 6, 8000: 7}
"""A word's, on average, by its rank."""
_ODD_FORMS = {"{}": 926, "{}, {}": 23, "{}'s {}": 23, "{}-{}": 8, "{}/{}": 6, "{}.5": 6, "{}?": 2, "{} one": 6}
"""Of answers that are neither yes nor no and not the one that most gave; {} is a word."""
_REPEATED = 0.35
"""Chance that one who disagrees says what another one who disagrees has said."""
_PICTURE_SIZES = ((640, 480), (640, 427), (640, 480), (480, 640), (640, 480), (427, 640))
"""COCO's most frequent ones."""


# --- what there is ---------------------------------------------------------------------------------------------------


def find(name: str) -> Path | None:
    """Return the folder of a real sample, or None if it is not there."""
    folder = Path(os.environ.get("VLM_VQA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / name
    return folder if folder.is_dir() else None


def origin(name: str) -> str:
    """Say whether a sample is `REAL` or `DRAWN`."""
    return REAL if find(name) else DRAWN


def texts() -> tuple[Rows, Rows]:
    """Return the questions and the annotations of `vqav2-text`, or drawn ones; a damaged folder is a `UserError`."""
    folder = find(TEXT)
    return read(folder) if folder else draw(*COUNTS[TEXT])


@contextmanager
def sample() -> Generator[Path]:
    """Yield the folder `vqav2-sample`, or a temporary one of the same layout with drawn contents."""
    if (real := find(SAMPLE)) is not None:
        yield real
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / SAMPLE
        (folder / "images").mkdir(parents=True)
        questions, annotations = draw(*COUNTS[SAMPLE])
        write_json(folder / "questions.json", {"questions": questions})
        write_json(folder / "annotations.json", {"annotations": annotations})
        for number, image_id in enumerate(sorted({row["image_id"] for row in questions})):
            data = draw_picture(_PICTURE_SIZES[number % len(_PICTURE_SIZES)], seed=number)
            (folder / "images" / f"COCO_train2014_{image_id:012d}.jpg").write_bytes(data)
        yield folder


def read(folder: Path) -> tuple[Rows, Rows]:
    """Return the questions and the annotations of a folder; files may be gzipped."""
    found = []
    for kind in ("questions", "annotations"):
        path = next(iter(sorted(folder.glob(f"{kind}.json*"))), folder / f"{kind}.json")
        try:
            data = path.read_bytes()
            found.append(json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)[kind])
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}). Get a whole copy of {folder.name}, or name another folder in "
                "VLM_VQA_SHARED_DATA: without the samples their like is drawn."
            ) from error
    return found[0], found[1]


def pictures(folder: Path) -> list[Path]:
    """Return the picture files of a sample; none is a `UserError`."""
    paths = sorted((folder / "images").glob("*.jpg"))
    if not paths:
        raise UserError(f"{folder / 'images'}: no pictures there. Get a whole copy of {folder.name}.")
    return paths


# --- what is drawn ---------------------------------------------------------------------------------------------------


def draw(count: int, images: int, seed: int = 0) -> tuple[Rows, Rows]:
    """Draw so many questions about so many images and their annotations, in the official layout."""
    say = _Speaker(seed)
    questions, annotations = [], []
    for number in range(count):
        image_id = 1 + number % images
        ids = {"image_id": image_id, "question_id": 1000 * image_id + number // images}
        kind = tuple(_AGREEING)[number % len(_AGREEING)]
        answers = say.answers(kind)
        say.chance.shuffle(answers)
        questions.append({**ids, "question": say.question()})
        annotations.append(
            {
                **ids,
                "question_type": f"type {int(66 ** say.chance.random())}",
                "answer_type": kind,
                "multiple_choice_answer": max(answers, key=answers.count),
                "answers": [
                    {"answer": text, "answer_confidence": "yes", "answer_id": at} for at, text in enumerate(answers, 1)
                ],
            }
        )
    return questions, annotations


class _Speaker:
    """Draws texts with the shares above."""

    def __init__(self, seed: int):
        self.chance = random.Random(seed)

    def pick(self, shares: Mapping[Any, int]) -> Any:
        return self.chance.choices(tuple(shares), tuple(shares.values()))[0]

    def rank(self, kind: str) -> int:
        """Draw a word by its place in the order of frequency, from 1."""
        return 1 + bisect.bisect_left(_shares(kind), 1000 * self.chance.random())

    def question(self) -> str:
        words = [_word(self.rank("question")) for _ in range(self.pick(_QUESTION_WORDS))]
        return f"{' '.join(words).capitalize()}?"

    def answers(self, kind: str) -> list[str]:
        """Return ten, the most frequent first."""
        agreeing = self.pick(_AGREEING[kind])
        yes_or_no = self.chance.choice(("yes", "no"))
        main = {"yes/no": yes_or_no, "number": str(self.rank("number")), "other": self._words("agreed")}[kind]
        rest: list[str] = []
        while len(rest) < 10 - agreeing:
            again = rest and self.chance.random() < _REPEATED
            text = self.chance.choice(rest) if again else self._other(kind, main)
            if text != main and rest.count(text) + 1 <= agreeing:
                rest.append(text)
        return [main] * agreeing + rest

    def _other(self, kind: str, main: str) -> str:
        """Return what one who disagrees may say."""
        if kind == "yes/no" and self.chance.random() < 0.88:
            return "no" if main == "yes" else "yes"
        if kind == "number" and self.chance.random() < 0.77:
            return str(self.rank("number"))
        form = self.pick(_ODD_FORMS)
        return self._words("other") if form == "{}" else form.format(self._words("agreed"), self._words("agreed"))

    def _words(self, who: str) -> str:
        return " ".join(_word(self.rank("answer")) for _ in range(self.pick(_ANSWER_WORDS[who])))


@functools.cache
def _shares(kind: str) -> list[float]:
    """Return the share of the 1, 2, ... most frequent words, drawn through the known ones over the logarithm."""
    ranks, shares = zip(*_FREQUENCIES[kind].items(), strict=True)
    return np.interp(np.log(np.arange(1, ranks[-1] + 1)), np.log(ranks), shares).tolist()


@functools.cache
def _word(rank: int) -> str:
    """Make up the word of a rank: consonants and vowels in turn."""
    chance = random.Random(rank)
    usual = np.interp(np.log(rank), np.log(list(_LETTERS)), list(_LETTERS.values()))
    letters = round(usual + chance.choice((-1, 0, 0, 1)))
    return "".join(chance.choice("aeiou" if at % 2 else "bcdfghklmnprstvwz") for at in range(letters))


def draw_picture(size: tuple[int, int], seed: int) -> bytes:
    """Draw a JPEG of (width, height): random colours at four scales, strong ones coarse and weak ones fine."""
    chance = np.random.default_rng(seed)
    total = np.full((size[1], size[0], 3), 128, np.float32)
    for scale, strength in ((4, 0.9), (16, 0.4), (64, 0.2), (max(size), 0.07)):
        width, height = (scale * edge // max(size) for edge in size)
        noise = Image.fromarray(chance.integers(0, 256, (height, width, 3), np.uint8))
        total += np.float32(strength) * (np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32) - 128)
    buffer = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
