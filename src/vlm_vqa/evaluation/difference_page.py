"""A comparison as text or Markdown, and as one HTML page with pictures inside and nothing from outside.

Texts of the data, questions and answers, are escaped: in Markdown here, in the page by Jinja2.
"""

import html
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from vlm_vqa.data import page
from vlm_vqa.data.records import images_of, manifest_for_a_look
from vlm_vqa.evaluation.differences import Differences, Flip, Row
from vlm_vqa.params import Gate

SHOWN_AS_TEXT, SHOWN_ON_PAGE = 10, 24  # flipped questions, of each way; drawn by a seed where there are more


def as_text(found: Differences) -> str:
    """Return Markdown whose texts are as they were said, control characters apart: for a terminal."""
    return _written(found, _printable)


def as_markdown(found: Differences, gate: Gate = Gate.ACCURACY) -> str:
    """Return Markdown that shows the data's texts literally: for a file or a pull request, whose `gate` names the score."""
    return _written(found, lambda text: _escaped(_printable(text)), gate)


def as_html(found: Differences, records: Path = Path("data/records")) -> str:
    """Return the page; with the questions' pictures where `records` are of both sides' data."""
    flips = {title: _drawn(some, SHOWN_ON_PAGE) for title, some in _titled(found).items()}
    shown = {flip.image_id for some in flips.values() for flip in some}
    why_not, pictures = _why_no_pictures(found, records), {}
    if shown and not why_not:
        found_there = images_of(records, shown)
        pictures = {one.image_id: page.thumbnail(one.data, one.file_name, max_pixels=2**62) for one in found_there}
    template = page.environment(Path(__file__).parent).get_template("difference_page.html.j2")
    words = {"headline": headline(found), "cells": _cells, "columns": COLUMNS, "count": _count}
    return template.render(found=found, flips=flips, pictures=pictures, why_not=why_not, **words)


def headline(found: Differences, gate: Gate = Gate.ACCURACY) -> str:
    """Return the verdict on the second side, in a sentence."""
    row = found.deciding(gate)
    return f"{row.score} of {found.sides[1].name} against {found.sides[0].name}: {row.paired.line}."


def _titled(found: Differences) -> dict[str, list[Flip]]:
    return {
        f"{len(found.mended):,} questions that only B answers rightly": found.mended,
        f"{len(found.broken):,} questions that only A answers rightly": found.broken,
    }


def _drawn(flips: Sequence[Flip], most: int) -> list[Flip]:
    """Draw some by a seed, so that nobody has chosen them; in the order of their ids."""
    return sorted(random.Random(0).sample(flips, min(most, len(flips))), key=lambda flip: flip.question_id)


def _cells(row: Row) -> list[str]:
    paired, change = row.paired, row.paired.difference
    figures = [f"{row.before:.4f}", f"{row.after:.4f}", f"{change.mean:+.4f}", "-", "-", "-"]
    if paired.better + paired.worse:
        figures[3:] = f"{change.low:+.4f} .. {change.high:+.4f}", f"{paired.p:.2g}", "-"
    if change.error > 0:
        figures[-1] = f"{paired.smallest:.4f}"
    return [row.score, row.who, row.group, *figures, paired.verdict]


COLUMNS = ("score", "of", "questions", "A", "B", "B - A", "95 % interval", "p", "shown from", "verdict on B")


def _written(found: Differences, said: Callable[[str], str], gate: Gate = Gate.ACCURACY) -> str:
    old, new = (said(side.name) for side in found.sides)
    lines = [f"A: {old}", "", f"B: {new}", "", f"**{said(headline(found, gate))}**", ""]
    lines += _table(COLUMNS, [[said(cell) for cell in _cells(row)] for row in found.rows])
    lines += [*(f"- {said(note)}" for note in found.notes), "", f"Parameters that differ: {_count(found.params)}", ""]
    lines += _table(("parameter", "A", "B"), [[said(cell) for cell in row] for row in found.params or ()])
    for title, flips in _titled(found).items():
        drawn = _drawn(flips, SHOWN_AS_TEXT)
        lines += [f"{title}{f', {len(drawn)} of them drawn' if len(drawn) < len(flips) else ''}", ""]
        texts = [(str(flip.question_id), flip.question, flip.said, flip.before, flip.after) for flip in drawn]
        lines += _table(("question", "", "people", "A", "B"), [[said(text) for text in row] for row in texts])
    return "\n".join(lines).rstrip() + "\n"


def _count(params: Sequence[object] | None) -> str:
    return "not known, for nothing says those of both" if params is None else str(len(params) or "none")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, readable as plain text too, and an empty one; none without rows."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    padded = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)
    ]
    marks = "|".join("-" * (width + 2) for width in widths)
    return [f"| {padded[0]} |", f"|{marks}|", *(f"| {line} |" for line in padded[1:]), ""]


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _escaped(text: str) -> str:
    return "".join(f"\\{sign}" if sign in "\\`*_[]|~#@!" else sign for sign in html.escape(text, quote=False))


def _why_no_pictures(found: Differences, records: Path) -> str:
    """Return why there are none; empty where there are."""
    manifest = manifest_for_a_look(records)
    if manifest is None:
        return f"{records} is not here"
    unlike = [side.name for side in found.sides if side.data_hash != manifest["data_hash"]]
    return f"{records} is not known to be the data of {' and '.join(unlike)}" if unlike else ""
