"""Write docs/parameters.md, a table of every key of params.yaml, from the docstrings in `vlm_vqa.params`.

    python -m scripts.parameters_page

A test compares the committed page with what this writes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scripts.schema import schema_of
from vlm_vqa.params import Params

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/parameters.md"
UNBOUNDED = 2**31 - 1
"""A limit that only says which integers a computer has."""
HEAD = """\
# Parameters

<!-- Written by `python -m scripts.parameters_page` from the docstrings in src/vlm_vqa/params.py: change those. -->

Every key of `params.yaml`. Unknown keys are refused, so that a run is what its file says. The column *small run* shows the
values of `presets/small.yaml`, which `params.yaml` starts with; `presets/` has whole files for the
[full scale](full-scale.md). `vlm-vqa check FILE` checks a file without running anything and names every mistake in it.

The type of a key decides how its value is read: `1e-5`, `.00001` and `"1e-5"` are the same number, and `no` stays text where
text is wanted. Truth values are `true` and `false`, never `yes` or `on`.

A file of an earlier version keeps working: a key that came later may be missing, and its value is then what was done before
it came. `vlm-vqa check` says so, and `vlm-vqa check --write` adds the key to the file.

Editors that know YAML schemas (such as VS Code with the extension *YAML*) complete keys and mark mistakes as you type. The
first line of every parameter file names `params.schema.json`, which lies beside `params.yaml` and, as a link, in `presets/`.
"""


def resolved(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a key's schema, what it refers to in its place; `nullable` says whether it may be null, too."""
    options = [one for one in node.get("anyOf", [node]) if one.get("type") != "null"]
    # Of a union all keys stand in its first.
    first = options[0].get("oneOf", options)[0]
    found = {**first, **{key: value for key, value in node.items() if key != "anyOf"}}
    if "$ref" in found:
        found = definitions[found["$ref"].rpartition("/")[2]] | found
    return found | {"nullable": any(one.get("type") == "null" for one in node.get("anyOf", []))}


def takes(node: dict[str, Any]) -> str:
    """Return what a key takes, in words."""
    if "enum" in node:
        return ", ".join(f"`{one}`" for one in node["enum"])
    kind = {
        "object": "group",
        "boolean": "`true`, `false`",
        "string": "text",
        "array": "list of texts",
        "integer": "whole number",
        "number": "number",
    }[node["type"]]
    least = "above 0" if "exclusiveMinimum" in node else f"at least {node.get('minimum')}"
    most = node.get("maximum")
    if most is None:
        return kind
    limit = f" and at most {most:,}" if isinstance(most, int) else f" and at most {most:g}"
    return f"{kind} {least}{limit if most != UNBOUNDED else ''}"


def rows(group: dict[str, Any], definitions: dict[str, Any], prefix: str, values: Any) -> Iterator[str]:
    """Yield the table's lines of one group and of those inside it."""
    for name, node in group["properties"].items():
        node = resolved(node, definitions)
        value = values.get(name) if isinstance(values, dict) else None
        is_group = "properties" in node
        shown = ("null" if isinstance(values, dict) and value is None else "") if is_group else plain(values, value)
        cells = f"`{prefix}{name}`", takes(node) + (" or null" if node["nullable"] else ""), shown, flat(node)
        yield " ".join(f"| {cell}".rstrip() for cell in cells) + " |"
        if is_group:
            yield from rows(node, definitions, f"{prefix}{name}.", value)


def flat(node: dict[str, Any]) -> str:
    """Return the description on one line."""
    return " ".join(node["description"].split())


def plain(values: Any, value: Any) -> str:
    """Return a value as params.yaml writes it; nothing where its whole group is null."""
    if not isinstance(values, dict):
        return ""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"`{value if len(str(value)) < 40 else str(value)[:36].rstrip() + ' ...'}`"


def page() -> str:
    """Return the whole page."""
    values = yaml.safe_load((ROOT / "presets/small.yaml").read_text(encoding="utf-8"))
    whole = schema_of(Params)
    sections, definitions = whole["properties"], whole["$defs"]
    groups = {name: resolved(node, definitions) for name, node in sections.items()}
    groups = {name: node for name, node in groups.items() if "properties" in node}
    alone = {"properties": {name: node for name, node in sections.items() if name not in groups}}
    table = ["| key | takes | small run | meaning |", "|---|---|---|---|"]
    lines = [HEAD, "## At the top\n", *table, *rows(alone, definitions, "", values), ""]
    for name, node in groups.items():
        lines += [f"## {name}\n", f"{flat(node)}\n", *table, *rows(node, definitions, f"{name}.", values[name]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
