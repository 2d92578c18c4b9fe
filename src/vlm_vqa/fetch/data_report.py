"""The page about the data, `data/records/report.html`: what is in there, what it looks like, what was changed or left out.

It is hashed with the records, so equal data give equal bytes: no time, no host, no file outside, pictures inside.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from typing import Any

from vlm_vqa.data.decoding import open_image
from vlm_vqa.fetch.contract import ANSWERS_PER_QUESTION
from vlm_vqa.fetch.statistics import ImageStatistics, QuestionStatistics, mean, quantile

_THUMBNAIL = (300, 220)
_TOP = 15
_COLOURS = ("#3b6fb6", "#e08a3c")
"""Of the two splits, in all charts."""
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2430; background: #f5f6f8; margin: 0 auto; padding: 2rem; max-width: 1080px }
h1 { margin: 0 0 .2rem } h2 { margin: 2.2rem 0 .6rem } h3 { margin: 0 0 .5rem; font-size: 1rem } p { margin: .3rem 0 }
.quiet { color: #667; font-size: .87rem } code { font-size: .84rem; overflow-wrap: anywhere }
section, figure { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 1rem 1.2rem; margin: 0 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 1rem }
.wide { grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)) }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 600 }
td, th { padding: .22rem .6rem .22rem 0; border-bottom: 1px solid #eef0f3; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.bars { width: 40% } .bar { height: .5rem; margin: .12rem 0; border-radius: 2px; min-width: 1px }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin: 0 .3rem 0 .8rem }
.note { background: #fff7e0; border-color: #ecd58a } svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #667 }
figure { padding: 0; overflow: hidden } figure img { width: 100%; height: 220px; object-fit: contain; background: #e9ecf0; display: block }
figcaption { padding: .7rem .9rem .9rem } figcaption b { display: block; margin: .15rem 0 } .tag { color: #667; font-size: .8rem }
"""  # noqa: E501

_Splits = Mapping[str, QuestionStatistics]


def render_report(manifest: Mapping[str, Any], splits: _Splits, images: ImageStatistics, max_pixels: int) -> str:
    """Return the page as HTML.

    Args:
        manifest: as `records.read_manifest` describes it, but for `files`.
        splits: what was counted, by split.
        images: what was counted over both splits, with the pictures of all examples.
        max_pixels: bound on the pictures, as for `decoding.open_image`.
    """
    body = [
        "<h1>The data of this run</h1>",
        f'<p class="quiet">source <b>{escape(manifest["source"])}</b> &middot; data hash '
        f"<code>{manifest['data_hash']}</code> &middot; every record has passed the data contract</p>",
        _notes(manifest["notes"]),
        f"<h2>Counts</h2><section>{_counts(splits)}</section>",
        f"<h2>Answers and questions</h2>{_legend(splits)}",
        f'<div class="grid wide">{"".join(_mixes(splits))}</div>',
        f'<h2>Distributions</h2>{_legend(splits)}<div class="grid">{"".join(_distributions(splits))}</div>',
        f"<h2>Images</h2><section>{_images(images, splits)}</section>",
        f'<h2>Examples</h2><p class="quiet">Drawn by their ids, of all answer types in turn; nobody chose them. The ten '
        f'humans\' answers are counted.</p><div class="grid">{"".join(_examples(splits, images, max_pixels))}</div>',
        f"<h2>Origin</h2><section>{_origin(manifest)}</section>",
    ]
    head = f'<meta charset="utf-8"><title>The data of this run</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    rows = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<h2>Changed on the way</h2><section class="note"><ul>{rows}</ul></section>'


def _counts(splits: _Splits) -> str:
    """The table of what there is, and of what is odd about it."""
    humans = ANSWERS_PER_QUESTION
    rows: dict[str, Any] = {
        "questions": lambda one: f"{one.questions:,}",
        "images with questions": lambda one: f"{len(one.of_image):,}",
        "questions an image, mean": lambda one: f"{one.questions / len(one.of_image):.2f}",
        "different main answers": lambda one: f"{len(one.main_answers):,}",
        "different question types": lambda one: f"{len(one.question_types):,}",
        "questions without a main answer": lambda one: _some(one.empty_answers, one.questions),
        "blank answers among the humans'": lambda one: _some(one.blank_humans, one.questions * humans),
        "humans who agree on the main answer, mean": lambda one: f"{mean(one.agreement):.2f} of {humans}",
        "all humans agree": lambda one: _some(one.agreement[humans], one.questions),
        "no answer given more than twice": lambda one: _some(one.agreement[1] + one.agreement[2], one.questions),
        "asked in the same words of the same image before": lambda one: _some(one.asked_again, one.questions),
        "files left out, having no question": lambda one: f"{one.files_without_questions:,}",
    }
    head = "<th></th>" + "".join(f'<th class="number">{escape(split)}</th>' for split in splits)
    lines = [
        f"<tr><td>{escape(name)}</td>{''.join(_number(value(one)) for one in splits.values())}</tr>"
        for name, value in rows.items()
    ]
    dropped = '<p class="quiet">No question is dropped: a single one that breaks the contract stops the run.</p>'
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>{dropped}"


def _mixes(splits: _Splits) -> Iterable[str]:
    for title, name in (
        ("Answer types", "answer_types"),
        ("How sure the humans were", "confidences"),
        ("Most common main answers", "main_answers"),
        ("Most common question types", "question_types"),
    ):
        yield _top(title, [getattr(one, name) for one in splits.values()])


def _distributions(splits: _Splits) -> Iterable[str]:
    for title, name, last in (
        ("Words in a question", "question_words", 16),
        ("Words in the main answer", "answer_words", 6),
        ("Questions about an image", "", 16),
        ("Humans who agree on the main answer", "agreement", ANSWERS_PER_QUESTION),
        ("Different answers among the ten", "distinct_answers", ANSWERS_PER_QUESTION),
    ):
        counts = [getattr(one, name) if name else Counter(one.of_image.values()) for one in splits.values()]
        yield _columns(title, counts, last)


def _images(images: ImageStatistics, splits: _Splits) -> str:
    sizes = sorted(images.sizes, key=lambda size: (size[0] * size[1], size))
    pixels = Counter[int]()
    for (width, height), count in images.sizes.items():
        pixels[width * height] += count
    # Equal counts in the order of the sizes, whatever came first.
    common = sorted(images.sizes, key=lambda size: (-images.sizes[size], size))[:5]
    rows = {
        "images of both splits": f"{images.images:,}",
        "bytes": f"{images.bytes / 1e6:,.1f} MB, {images.bytes / images.images / 1e3:.1f} kB an image",
        "smallest and largest": f"{_size(sizes[0])}, {_size(sizes[-1])}",
        "median": f"{quantile(pixels, 0.5) / 1e6:.3g} megapixels",
        "most common sizes": "; ".join(f"{_size(size)}: {_some(images.sizes[size], images.images)}" for size in common),
        "the bytes of an earlier image under another id": _some(images.twins, images.images),
    }
    lines = (f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in rows.items())
    return f"<table>{''.join(lines)}</table>"


def _examples(splits: _Splits, images: ImageStatistics, max_pixels: int) -> Iterable[str]:
    for split, one in splits.items():
        for row in one.examples():
            picture = _thumbnail(images.pictures[row["image_id"]], str(row["image_id"]), max_pixels)
            tallied = Counter(row["answers"])
            ranked = sorted(tallied, key=lambda answer: (-tallied[answer], answer))
            answers = ", ".join(f"{answer or '(blank)'} ({tallied[answer]})" for answer in ranked)
            tags = f"{split} · {row['answer_type']} · {row['question_type']} · question {row['question_id']}"
            yield (
                f'<figure><img alt="image {row["image_id"]}" src="{picture}"><figcaption>'
                f'<span class="tag">{escape(tags)}</span><b>{escape(row["question"])}</b>{escape(answers)}'
                "</figcaption></figure>"
            )


def _origin(manifest: Mapping[str, Any]) -> str:
    rows = [("source", manifest["source"]), *_flatten(manifest["origin"], "")]
    for split, content in manifest["splits"].items():
        rows += [
            (f"{split} {kind}", f"{file['name']}, sha256 {file['sha256']}") for kind, file in content["inputs"].items()
        ]
    rows.append(("images in both splits allowed", "yes" if manifest["allow_split_overlap"] else "no"))
    lines = (f"<tr><td>{escape(key)}</td><td><code>{escape(str(value))}</code></td></tr>" for key, value in rows)
    return f"<table>{''.join(lines)}</table>"


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}: ")
        else:
            yield f"{prefix}{key}", value


def _top(title: str, counts: Sequence[Counter[str]]) -> str:
    """A table of the most common values over all splits, with bars of their shares in each."""
    together = sum(counts, Counter[str]())
    names = sorted(together, key=lambda name: (-together[name], name))
    most = max(count[name] / count.total() for count in counts for name in names[:_TOP])
    lines = []
    for name in names[:_TOP]:
        shares = [count[name] / count.total() for count in counts]
        bars = "".join(
            f'<div class="bar" style="width:{100 * share / most:.2f}%;background:{colour}"></div>'
            for share, colour in zip(shares, _COLOURS, strict=True)
        )
        numbers = "".join(_number(f"{100 * share:.2f} %") for share in shares)
        lines.append(f'<tr><td>{escape(name) or "(blank)"}</td>{numbers}<td class="bars">{bars}</td></tr>')
    rest = f'<p class="quiet">and {len(names) - _TOP:,} more</p>' if len(names) > _TOP else ""
    return f"<section><h3>{escape(title)}</h3><table>{''.join(lines)}</table>{rest}</section>"


def _columns(title: str, counts: Sequence[Counter[int]], last: int) -> str:
    """A chart of the shares of the values up to `last`, which stands for more too; a column a split."""
    values = range(0 if any(count[0] for count in counts) else 1, last + 1)
    shares = [[_share(count, value, last) for value in values] for count in counts]
    most, step = max(map(max, shares)), 300 / len(values)
    width = 0.8 * step / len(counts)
    parts = []
    for number, (row, colour) in enumerate(zip(shares, _COLOURS, strict=True)):
        for place, (value, share) in enumerate(zip(values, row, strict=True)):
            height, left = 110 * share / most, place * step + 0.1 * step + number * width
            parts.append(
                f'<rect x="{left:.1f}" y="{120 - height:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}">'
                f"<title>{value}: {100 * share:.2f} %</title></rect>"
            )
    for place, value in enumerate(values):
        label = f"{value}{'+' if value == last and any(max(count) > last for count in counts) else ''}"
        parts.append(f'<text x="{(place + 0.5) * step:.1f}" y="134" text-anchor="middle">{label}</text>')
    middle = " / ".join(f"{mean(count):.2f}" for count in counts)
    longest = max(max(count) for count in counts)
    caption = f'<p class="quiet">mean {middle}, greatest {longest}, highest column {100 * most:.1f} %</p>'
    return f'<section><h3>{escape(title)}</h3><svg viewBox="0 0 300 138">{"".join(parts)}</svg>{caption}</section>'


def _share(count: Counter[int], value: int, last: int) -> float:
    """Share of `value`; that of `last` holds all above it too."""
    found = sum(number for one, number in count.items() if one >= last) if value == last else count[value]
    return found / count.total()


def _legend(splits: _Splits) -> str:
    keys = (
        f'<span class="key" style="background:{colour}"></span>{escape(split)}'
        for split, colour in zip(splits, _COLOURS, strict=True)
    )
    return f'<p class="quiet">shares in {"".join(keys)}</p>'


def _number(text: str) -> str:
    return f'<td class="number">{escape(text)}</td>'


def _some(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.2f} %)"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _thumbnail(data: bytes, name: str, max_pixels: int) -> str:
    """Return a picture as a data URL: what the model sees, made small."""
    image = open_image(data, name, max_pixels)
    image.thumbnail(_THUMBNAIL)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
