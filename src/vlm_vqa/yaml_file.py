"""A YAML file as nested mappings of texts, and what such a text is where a number, a truth value or a line is wanted.

It is read by DVC's own parser (ruamel, YAML 1.2), but no scalar is resolved by its looks. What people do not mean (tags,
aliases of aliases, two keys of one name) is refused by its line.
"""

import functools
import itertools
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from vlm_vqa.errors import UserError
from vlm_vqa.files import check_regular
from vlm_vqa.secrets import without_secrets

# Of a file and of a text. Ours have a hundred values in 3 kB, and 200 characters; aliases of aliases make millions of ten.
MOST_VALUES, MOST_BYTES, MOST_CHARACTERS = 10_000, 2**20, 1000
_GREATEST: dict[type, float] = {int: 2**63 - 1, float: sys.float_info.max}
_TAG = "tag:yaml.org,2002:"
_TAGS = {_TAG + kind for kind in "map seq str int float bool null timestamp merge value".split()}


class Unquoted(str):
    """A scalar that YAML takes for a number, a truth value or a date, as its text stands in the file."""

    __repr__ = str.__str__


def read_yaml(path: str | Path) -> Any:
    """Return what a file holds, with every scalar but null as its text; UserError if it is missing or no YAML, has a key
    twice, a tag, or more than a file of parameters can mean."""
    try:
        check_regular(path, MOST_BYTES)
        node = compose(Path(path).read_text(encoding="utf-8"))
        return None if node is None else _read(node, "", itertools.count(1))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Run from the project's root folder.") from error
    except (YAMLError, ValueError, OverflowError) as error:
        # Alone: the error quotes the line, in which a password may stand.
        raise UserError(f"{path}: not valid YAML in UTF-8: {error}. Mend the place it names.") from None
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply, or inside itself. Compare with presets/small.yaml.") from error


def compose(text: str) -> Any:
    """Return a text's root node, None where there is none; by DVC's own parser: YAML 1.2."""
    return YAML(typ="safe", pure=True).compose(text)


def _read(node: Node, key: str, count: Iterator[int]) -> Any:
    """Return what a YAML node holds; `key` is its full name."""
    line = node.start_mark.line + 1
    if next(count) > MOST_VALUES:
        raise UserError(f"line {line}: more than {MOST_VALUES:,} values. Compare with presets/small.yaml.")
    if node.tag not in _TAGS:
        raise UserError(f"line {line}: {key} has the tag {node.tag.removeprefix(_TAG)}. Write the value without a tag.")
    if isinstance(node, SequenceNode):
        return [_read(item, key, count) for item in node.value]
    if isinstance(node, MappingNode):
        lines, values = {}, {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, ScalarNode):
                raise UserError(f"line {line}: a key of {key or 'the file'} is not a name.")
            full = f"{key}.{name.value}" if key else name.value
            if name.value in lines:
                raise UserError(f"line {line}: {full} stands in line {lines[name.value]} already. Keep one of them.")
            lines[name.value] = line
            values[name.value] = _read(value, full, count)
        return values
    if node.tag == _TAG + "null":
        return None
    if node.tag == _TAG + "timestamp":
        logging.getLogger(__name__).warning("%s is %s: DVC cannot read a date, put it in quotes", key, node.value)
    quoted = isinstance(node, ScalarNode) and node.style
    return node.value if quoted or node.tag == _TAG + "str" else Unquoted(node.value)


# --- what a text is, where a number, a truth value or a line is wanted. What these raise goes on after the key's name. ---


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes: above 0, or from `least` on, up to `most`; `why` not others."""

    most: float
    least: float | None = None
    why: str = ""

    def read(self, kind: type, value: Any) -> Any:
        """Return the number that a text writes; Python's own pass if they are such a number."""
        number: Any = _number(value) if isinstance(value, str) else value
        # nan and inf are not at most anything; a truth value is another type.
        if type(number) not in _GREATEST or not abs(number) <= _GREATEST[kind] or number != kind(number):
            wanted = "whole number below 2^63, such as 64" if kind is int else "finite number, such as 1e-5"
            raise ValueError(f"is {shown(value)}; it must be a {wanted}.")
        if number > self.most or not (number > 0 if self.least is None else number >= self.least):
            least = "above 0" if self.least is None else f"at least {self.least}"
            most = f"{self.most:,}" if isinstance(self.most, int) else f"{self.most:g}"
            why = f": {self.why}." if self.why else "."
            raise ValueError(f"is {number}; it must be {least} and at most {most}{why}")
        return kind(number)

    def __get_pydantic_core_schema__(self, kind: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        limits = {"le": self.most} | ({"gt": 0} if self.least is None else {"ge": self.least})
        read = functools.partial(self.read, kind)
        return core_schema.no_info_before_validator_function(read, cast(CoreSchema, handler(kind) | limits))


@dataclass(frozen=True)
class Line:
    """The texts that a field takes: all of one matches `pattern`, which is `wanted`; `dvc` fills it in as YAML reads it."""

    pattern: str = ".*"
    wanted: str = "text"
    dvc: bool = False

    def read(self, text: Any) -> str:
        """Return a text as it stands in the file."""
        if not isinstance(text, str):
            raise ValueError(f"is {shown(text)}; it must be text: put it in quotes.")
        if self.dvc and isinstance(text, Unquoted):
            raise ValueError(f"is {text}, which DVC fills in as YAML reads it. Put it in quotes: '{text}'.")
        if not text.isprintable() or len(text) > MOST_CHARACTERS:
            most = f"{MOST_CHARACTERS:,} printable characters"
            raise ValueError(f"is {shown(text)}; it must be one line of at most {most}.")
        if not re.fullmatch(self.pattern, text):
            raise ValueError(f"is {shown(text)}; it must be {self.wanted}.")
        if without_secrets(text) != text:
            raise ValueError(
                "holds a login or a query (?...). Such secrets do not belong here: DVC copies this file's values into "
                "dvc.lock, which is committed. Write the address without them, and the login into ~/.netrc, which "
                "downloads read: machine HOST login NAME password PASSWORD."
            )
        return str(text)

    def __get_pydantic_core_schema__(self, kind: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = core_schema.str_schema(pattern=None if self.pattern == ".*" else f"^(?:{self.pattern})$")
        return core_schema.no_info_before_validator_function(self.read, schema)


def _number(text: str) -> int | float | None:
    """Return the number that a text writes, or None; nan, inf and 12:30 are none."""
    if not re.fullmatch(r"[-+.0-9_a-fA-Fxo]+", text.strip()):
        return None
    for read in (int, float, lambda prefixed: int(prefixed, 0)):
        try:
            return read(text)
        except ValueError:
            continue
    return None


def truth(value: Any) -> bool:
    """Return the truth value that a text writes; Python's own passes."""
    truth = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
    if type(truth) is not bool:
        raise ValueError(f"is {shown(value)}; it must be true or false.")
    return truth


def shown(value: Any) -> str:
    """Return a value for a message, in one short line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
