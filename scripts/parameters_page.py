"""Write docs/parameters.md, a table of every key of params.yaml, from the docstrings in `vlm_vqa.params`.

    python -m scripts.parameters_page

A test compares the committed page with what this writes.
"""

import ast
import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vlm_vqa import params

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/parameters.md"
UNBOUNDED = " and at most 2,147,483,647"
"""A limit that only says which integers a computer has."""
HEAD = """\
# Parameters

<!-- Written by `python -m scripts.parameters_page` from the docstrings in src/vlm_vqa/params.py: change those. -->

Every key of `params.yaml`. Unknown keys are refused, so that a run is what its file says. The column *small run* shows the
values of `presets/small.yaml`, which `params.yaml` starts with; `presets/` has whole files for the
[full scale](full-scale.md). `vlm-vqa check FILE` checks a file without running anything.

The type of a key decides how its value is read: `1e-5`, `.00001` and `"1e-5"` are the same number, and `no` stays text where
text is wanted. Truth values are `true` and `false`, never `yes` or `on`.
"""


def docstrings(source: str) -> dict[str, dict[str, str]]:
    """Return `{class: {field: docstring}}`: the text directly below a field, on one line."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            fields = found.setdefault(node.name, {})
            for field, below in zip(node.body, node.body[1:], strict=False):
                text = getattr(getattr(below, "value", None), "value", None)
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(text, str):
                    fields[field.target.id] = " ".join(text.split())
    return found


def takes(kind: Any) -> str:
    """Return what a field of this type takes, in words."""
    if typing.get_origin(kind) is typing.Annotated:
        base, *limits = typing.get_args(kind)
        words = {int: "whole number", float: "number"}[base]
        return " ".join([words, *(limit.words().removesuffix(UNBOUNDED) for limit in limits)])
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    if typing.get_origin(kind) is tuple:
        return "list of texts"
    return {bool: "`true`, `false`", str: "text", int: "whole number", float: "number"}[kind]


def rows(kind: type, prefix: str, values: Any, texts: dict[str, dict[str, str]]) -> Iterator[str]:
    """Yield the table's lines of one class and of those inside it."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
        hint = inner[0] if optional else hint
        value = values.get(name) if isinstance(values, dict) else None
        text = texts[kind.__name__].get(name, "")
        if dataclasses.is_dataclass(hint):
            text = text or " ".join(inspect.getdoc(hint).split())
            what = "group" + (" or null" if optional else "")
            shown = "null" if isinstance(values, dict) and value is None else ""
        else:
            if not text and isinstance(hint, type) and issubclass(hint, enum.Enum):
                text = " ".join(inspect.getdoc(hint).split())
            what, shown = takes(hint) + (" or null" if optional else ""), plain(values, value)
        yield " ".join(f"| {cell}".rstrip() for cell in (f"`{prefix}{name}`", what, shown, text)) + " |"
        if dataclasses.is_dataclass(hint):
            yield from rows(hint, f"{prefix}{name}.", value, texts)


def plain(values: Any, value: Any) -> str:
    """Return a value as params.yaml writes it; nothing where its whole group is null."""
    if not isinstance(values, dict):
        return ""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"`{value if len(str(value)) < 40 else str(value)[:36].rstrip() + ' ...'}`"


def page() -> str:
    """Return the whole page."""
    texts = docstrings(inspect.getsource(params))
    values = yaml.safe_load((ROOT / "presets/small.yaml").read_text(encoding="utf-8"))
    lines, table = [HEAD], ["| key | takes | small run | meaning |", "|---|---|---|---|"]
    alone = [name for name, kind in typing.get_type_hints(params.Params).items() if not dataclasses.is_dataclass(kind)]
    everything = list(rows(params.Params, "", values, texts))
    lines += ["## At the top\n", *table, *(row for row in everything if row.split("`")[1] in alone), ""]
    for name, kind in typing.get_type_hints(params.Params).items():
        if dataclasses.is_dataclass(kind):
            lines += [f"## {name}\n", f"{' '.join(inspect.getdoc(kind).split())}\n", *table]
            lines += [*(row for row in everything if row.split("`")[1].startswith(f"{name}.")), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
