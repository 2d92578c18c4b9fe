"""The page about the data, `data/records/report.html`: numbers for `data_report.html.j2`, which escapes every text of the
data. It is hashed with the records, so equal data give equal bytes: no time, no host, pictures inside."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

from vlm_vqa.data import page
from vlm_vqa.fetch.statistics import Images, Texts, mean, total
from vlm_vqa.params import flatten

ALIKE_SHOWN = 12  # pairs of pictures that look alike
_ROWS = 15  # of a table of the most common values
_COLOURS = ("#3b6fb6", "#e08a3c")
"""Of the two splits, in all charts."""


def render_report(manifest: Mapping[str, Any], splits: Mapping[str, Texts], images: Images, max_pixels: int) -> str:
    """Return the page as HTML, of the records' manifest and of what was counted by split and of the images."""
    pages = page.environment(Path(__file__).parent)
    pages.filters |= {"thousands": "{:,}".format, "counted": _counted, "flatten": flatten}
    pages.globals |= {"shares": _shares, "mean": mean, "some": _some, "total": total}  # ty: ignore[unsupported-operator] - typed by jinja2's own
    return pages.get_template("data_report.html.j2").render(
        manifest=manifest,
        splits=splits,
        colours=_COLOURS,
        humans=max(max(counted.humans) for counted in splits.values()),
        images=_images(images, manifest["pictures"]),
        alike=images.alike[:ALIKE_SHOWN],
        pictures=images.pictures,
        thumbnail=lambda image_id: page.thumbnail(images.pictures[image_id], str(image_id), max_pixels),
    )


def _some(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.2f} %)"


def _counted(answers: Sequence[str]) -> str:
    """Return answers in words, each once with its number, the most common first."""
    ranked = Counter(sorted(answers)).most_common()
    return ", ".join(f"{answer or '(blank)'} ({count})" for answer, count in ranked)


def _shares(counts: Sequence[Counter[Any]], last: int | None = None) -> dict[str, Any]:
    """Return the most common values over all splits, or up to `last`, which counts greater ones, all numbers; with their
    shares in each split, the greatest share, and how many values are left."""
    if last is not None:
        counts = [Counter(min(value, last) for value in count.elements()) for count in counts]
    together = sum(counts, Counter())
    names = sorted(together, key=lambda name: name if last is not None else (-together[name], name))
    shown = names if last is not None else names[:_ROWS]
    rows = [(name, [count[name] / max(count.total(), 1) for count in counts]) for name in shown]
    return {"rows": rows, "most": max((max(shares) for _, shares in rows), default=0), "more": len(names) - len(rows)}


def _images(images: Images, pictures: Mapping[str, Any]) -> dict[str, str]:
    """Return what there is to say of the images of both splits: what they are, were changed to, and have twins of."""
    sizes = sorted(images.sizes, key=lambda size: (size[0] * size[1], size))
    pixels = Counter[int]()
    for (width, height), count in images.sizes.items():
        pixels[width * height] += count
    # Equal counts in the order of the sizes, whatever came first.
    common = sorted(images.sizes, key=lambda size: (-images.sizes[size], size))[:5]
    twins = {f"the bytes of an earlier image of {split}, another id": n for split, n in pictures["twins"].items()}
    across = {"in both splits": "twins_across", "in both splits by their looks alone": "alike_across"}
    counts = {f"changed: {change}": count for change, count in pictures["changed"].items()} | twins
    counts |= {f"the same picture under two ids {where}": pictures[key] for where, key in across.items()}
    return {
        "images of both splits": f"{images.count:,}",
        "bytes": f"{images.bytes / 1e6:,.1f} MB, {images.bytes / images.count / 1e3:.1f} kB an image",
        "smallest and largest": "{} x {}, {} x {}".format(*sizes[0], *sizes[-1]),
        "median": f"{median_low(pixels.elements()) / 1e6:.3g} megapixels",
        "most common sizes": "; ".join(f"{w} x {h}: {_some(images.sizes[w, h], images.count)}" for w, h in common),
    } | {name: _some(count, images.count) for name, count in counts.items()}
