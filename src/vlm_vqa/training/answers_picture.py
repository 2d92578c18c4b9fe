"""A picture of what was said to a few validation questions at each validation: learning at a glance.

Drawn with Pillow, which takes all text literally, measures it in pixels, and draws a box for what the font has no glyph of.
The same history makes the same bytes.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.records import ImageRecord
from vlm_vqa.training.validation import ANSWERS, COLUMNS, SCORE, Score, validations

# Pixels: a cell's width, its picture's height, and so on.
WIDTH, PICTURE, GAP, LINE, STRIP = 290, 160, 18, 19, 10
GRID = 4
PAGE = GRID * (WIDTH + GAP) + GAP
ANSWERS_SHOWN, SCORES_SHOWN, QUESTION_LINES, TRUTH_LINES = 7, 7, 3, 2
BLACK, GREY, RIGHT, WRONG = "black", "#57606a", "#1a7f37", "#b42318"
# Right from here on; VQA's scores go in steps of 0.3.
ENOUGH = 0.5


class Line(NamedTuple):
    text: str
    colour: str
    bold: bool


class AnswersPicture:
    """The questions that are shown and their pictures, drawn with the answers whenever asked."""

    def __init__(self, questions: Sequence[Mapping[str, Any]], score: Score, what: str, images: Iterable[ImageRecord]):
        """Decode the `images` that `questions`, rows of the records, are about, and keep them as small as they are drawn.

        `score` is of an answer given those of people, 0 to 1; `what` says of it in the title. UserError if an image cannot
        be decoded.
        """
        self.questions, self.score, self.what = questions, score, what
        self.pictures = {image.image_id: small(image) for image in images}

    def draw(self, history: Sequence[Mapping[str, Any]]) -> Image.Image:
        """Return the picture of all validations in the Trainer's log, RGB: `GRID` cells in a row.

        A cell is a question's image, a strip of green and red blocks for what was right and wrong, and lines of text.
        """
        said, title = [entry for entry in history if ANSWERS in entry], self._title(validations(history))
        answers = [{entry["step"]: entry[ANSWERS][at] for entry in said} for at in range(len(self.questions))]
        cells = list(map(self._cell, self.questions, answers))
        longest = [max(len(lines) for lines, _ in cells[at : at + GRID]) for at in range(0, len(cells), GRID)]
        heights = (PICTURE + STRIP + LINE * lines + 2 * GAP for lines in longest)
        tops = list(itertools.accumulate(heights, initial=2 * GAP + LINE * len(title)))
        page = Image.new("RGB", (PAGE, tops[-1]), "white")
        pen = ImageDraw.Draw(page)
        _write(pen, GAP, GAP, title)
        for at, (row, (lines, right)) in enumerate(zip(self.questions, cells, strict=True)):
            left, top, picture = GAP + at % GRID * (WIDTH + GAP), tops[at // GRID], self.pictures[row["image_id"]]
            page.paste(picture, (left, top + (PICTURE - picture.height) // 2))
            for number, good in enumerate(right):
                start, end = (left + place * WIDTH // len(right) for place in (number, number + 1))
                block = (start, top + PICTURE + 3, max(end - 2, start), top + PICTURE + STRIP)
                pen.rectangle(block, fill=RIGHT if good else WRONG)
            _write(pen, left, top + PICTURE + STRIP + 3, lines)
        return page

    def _title(self, measured: Sequence[Mapping[str, Any]]) -> list[Line]:
        about = f"What is said to {len(self.questions)} fixed questions after so many steps: green right, red wrong"
        of = f"By step: {self.what} (in brackets: with another image)"
        shown = _some(measured, SCORES_SHOWN)
        scores = " · ".join(f"{entry['step']}: {entry[SCORE]:.3f} ({entry[COLUMNS[2]]:.3f})" for entry in shown)
        wide = PAGE - 2 * GAP
        return fold(about, 1, bold=True, width=wide) + fold(of, 1, width=wide) + fold(scores, 1, width=wide)

    def _cell(self, row: Mapping[str, Any], said: Mapping[int, str]) -> tuple[list[Line], list[bool]]:
        right = {answer: self.score(answer, row["answers"]) >= ENOUGH for answer in said.values()}
        lines = fold(row["question"], QUESTION_LINES, bold=True)
        lines += fold(f"truth: {row['multiple_choice_answer']}", TRUTH_LINES)
        runs = [(answer, list(steps)) for answer, steps in itertools.groupby(said, said.__getitem__)]
        for answer, (first, *more) in _some(runs, ANSWERS_SHOWN):
            when = f"{first}-{more[-1]}" if more else f"{first}"
            mark, colour = ("✓", RIGHT) if right[answer] else ("✗", WRONG)
            lines += fold(f"{mark} {when}: {answer.strip() or '(nothing)'}", 1, colour)
        if (more := len(runs) - ANSWERS_SHOWN) > 0:
            lines += fold(f"answers left out: {more}", 1, GREY)
        return lines, [right[answer] for answer in said.values()]


def fold(text: str, most: int, colour: str = BLACK, bold: bool = False, width: int = WIDTH) -> list[Line]:
    """Break a text into at most so many lines, between words where that is possible; cut what is over."""
    rest, lines, length = " ".join(text[:1000].split()), [], _font(bold).getlength

    def fitting(room: float) -> int:
        return bisect_right(range(len(rest) + 1), room, key=lambda count: length(rest[:count])) - 1

    while rest:
        fits = fitting(width)
        if fits < len(rest) and len(lines) == most - 1:
            return [*lines, Line(rest[: fitting(width - length("…"))] + "…", colour, bold)]
        space = rest.rfind(" ", 0, fits + 1)
        fits = space if fits < len(rest) and space > 0 else fits
        lines.append(Line(rest[:fits], colour, bold))
        rest = rest[fits:].lstrip()
    return lines


def _write(pen: ImageDraw.ImageDraw, left: int, top: int, lines: Sequence[Line]) -> None:
    for at, (text, colour, bold) in enumerate(lines):
        pen.text((left, top + LINE * at), text, fill=colour, font=_font(bold))


def _some(items: Sequence[Any], most: int) -> Sequence[Any]:
    """Return the first, the last and evenly chosen ones between them, `most` in all."""
    if len(items) <= most:
        return items
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def small(record: ImageRecord) -> Image.Image:
    """Return a record's picture as it is drawn; UserError if it cannot be decoded."""
    # It was opened within data.max_image_pixels when its features were made.
    image = open_image(record.data, record.file_name, max_pixels=2**62)
    scale = min(WIDTH / image.width, PICTURE / image.height)
    size = [max(round(side * scale), 1) for side in image.size]
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


@cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    """Return a font that comes with matplotlib, whose import would take longer than all pictures of a training."""
    found = find_spec("matplotlib")
    assert found is not None and found.origin is not None, "it is among the requirements"
    path = Path(found.origin).parent / "mpl-data/fonts/ttf" / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
    # The other layout depends on what else is installed.
    return ImageFont.truetype(path, 13, layout_engine=ImageFont.Layout.BASIC)
