"""What can be wrong with a file, drawn: its bytes, its encoding, its JSON or table, its name, its being a file at all."""

import csv
import io
import json
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from proofs.random_params import NUMBERS, OTHERS, WORDS

MOST_DEPTH = 12
"""Values below are left alone."""


ENDINGS = ("csv", "tsv", "jsonl", "json", "parquet")
"""Of tables."""
_ENCODINGS = ("utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-8-sig", "cp037", "utf-7")


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file and return how; JSON and tables more often in their values than in their bytes."""
    inside = damage_json if path.suffix == ".json" else damage_table
    if path.suffix[1:] in ENDINGS and rng.random() < 0.7:
        # Damaged before, it may be neither.
        with suppress(ValueError, TypeError, LookupError, AttributeError, OSError, pa.ArrowException, csv.Error):
            return inside(path, rng)
    how = rng.choice(
        (bits, bits, cut, cut, zeros, twice, insert, empty, missing, folder, loop, swapped, renamed, encoded)
    )
    how(path, rng)
    return how.__name__


def bits(path: Path, rng: random.Random) -> None:
    """Flip up to twenty bits."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """Leave only the beginning, or only the end."""
    data = path.read_bytes()
    place = rng.randrange(len(data))
    path.write_bytes(data[:place] if rng.random() < 0.8 else data[place:])


def zeros(path: Path, rng: random.Random) -> None:
    """Overwrite a part with zeros, as a disk that lost a block."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 64, 4096)))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def twice(path: Path, rng: random.Random) -> None:
    """Append the file to itself."""
    path.write_bytes(path.read_bytes() * 2)


def insert(path: Path, rng: random.Random) -> None:
    """Insert random bytes."""
    data = path.read_bytes()
    place = rng.randrange(len(data))
    path.write_bytes(data[:place] + rng.randbytes(rng.choice((1, 3, 1000))) + data[place:])


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def missing(path: Path, rng: random.Random) -> None:
    path.unlink()


def folder(path: Path, rng: random.Random) -> None:
    """A folder where the file was."""
    path.unlink()
    path.mkdir()


def loop(path: Path, rng: random.Random) -> None:
    """A link to itself."""
    path.unlink()
    path.symlink_to(path.name)


def swapped(path: Path, rng: random.Random) -> None:
    """Two files of a folder, each in the other's place."""
    other = rng.choice(sorted(path.parent.iterdir()))
    if other.is_file() and other != path:
        ours, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(ours)


def renamed(path: Path, rng: random.Random) -> None:
    """Another ending, another case, or a name that is not plain."""
    names = (path.name.upper(), f"{path.stem}.png", f"{path.stem}.txt", f" {path.name}", f"\u00e9\n{path.name}")
    path.rename(path.with_name(rng.choice(names)))


def encoded(path: Path, rng: random.Random) -> None:
    """As a program writes it that knows no UTF-8."""
    text = path.read_bytes().decode("utf-8", "replace")
    path.write_bytes(text.encode(rng.choice(_ENCODINGS), "replace"))


def damage_table(path: Path, rng: random.Random) -> str:
    """Change the columns, the cells or rows, or the quotes of a table."""
    if rng.random() < 0.15 and path.suffix != ".parquet":
        text = path.read_text(encoding="utf-8")
        place = rng.randrange(len(text))
        path.write_text(text[:place] + rng.choice(('"', "'", '""', "\r", "\\", ",", "\t", "[")) + text[place:])
        return "quotes"
    if path.suffix == ".parquet":
        return damage_columns(path, rng)
    if path.suffix == ".jsonl":
        rows: Any = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        delimiter = "," if path.suffix == ".csv" else "\t"
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8")), delimiter=delimiter))
    if rng.random() < 0.4:
        said = _change_column(rows, rng)
    else:
        depth = rng.choice(sorted({depth for _, _, depth in _spots(rows)}))
        where, key, _ = rng.choice([spot for spot in _spots(rows) if spot[2] == depth])
        said = _change(where, key, rng)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            for row in rows:
                csv.writer(file, delimiter=delimiter).writerow(row if isinstance(row, list) else [row])
    return f"table: {said}"


def _change_column(rows: list[Any], rng: random.Random) -> str:
    """Remove a column, call it otherwise, or give all its cells another value."""
    key = rng.choice(list(rows[0]) if isinstance(rows[0], dict) else range(len(rows[0])))
    how, other, name = rng.choice(("no", "other", "filled")), rng.choice([*NUMBERS, *WORDS, *OTHERS]), rng.choice(WORDS)
    if how == "other" and isinstance(rows[0], list):
        rows[0][key] = rng.choice((name, rng.choice(rows[0])))
        return f"column {key} is {rows[0][key]!r:.20}"
    for row in rows if isinstance(rows[0], dict) else rows[how == "filled" :]:
        value = row.pop(key)
        if how != "no" and isinstance(row, dict):
            row[key if how == "filled" else str(name)] = other if how == "filled" else value
        elif how != "no":
            row.insert(key, other)
    return f"{how} column {key}"


def damage_columns(path: Path, rng: random.Random) -> str:
    """Remove a column of Parquet, call it otherwise, nest it, or change its type."""
    table = pq.read_table(path)
    at = rng.randrange(table.num_columns)
    name, column = table.column_names[at], table.column(at).combine_chunks()
    made = {
        "no": lambda: None,
        "none": lambda: pa.nulls(len(column), column.type),
        "nothing": lambda: pa.nulls(len(column)),
        "list": lambda: pa.array([[value] for value in column.to_pylist()]),
        "struct": lambda: pa.array([{"a": {"b": value}} for value in column.to_pylist()]),
        "float": lambda: pa.array([0.5 + place for place in range(len(column))]),
        "binary": lambda: pa.array([str(value).encode("utf-16") for value in column.to_pylist()]),
        "date": lambda: pa.array(range(len(column)), pa.timestamp("s")),
        "other": lambda: column,
        "twice": lambda: column,
    }
    how = rng.choice(list(made))
    new = made[how]()
    changed = table if how == "twice" else table.remove_column(at)
    if new is not None:
        changed = changed.append_column("other" if how == "other" else name, new)
    pq.write_table(changed, path)
    return f"table: {how} {name}"


def damage_json(path: Path, rng: random.Random) -> str:
    """Change, remove, add or repeat one to three values, wherever in the tree."""
    content = json.loads(path.read_text(encoding="utf-8"))
    said = []
    for _ in range(rng.randint(1, 3)):
        spots = _spots(content)
        if not spots:
            break
        # The outer values are few and the inner ones many: first a depth, then a place.
        depth = rng.choice(sorted({depth for _, _, depth in spots}))
        where, key, _ = rng.choice([spot for spot in spots if spot[2] == depth])
        said.append(_change(where, key, rng))
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    return "json: " + ", ".join(said)


def _spots(value: Any, depth: int = 0) -> list[tuple[Any, Any, int]]:
    """Return (container, key, depth) of every value in a tree."""
    if not isinstance(value, (dict, list)) or depth == MOST_DEPTH:
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [spot for key in keys for spot in ((value, key, depth), *_spots(value[key], depth + 1))]


def _change(where: Any, key: Any, rng: random.Random) -> str:
    how = rng.random()
    if how < 0.15:
        del where[key]
        return f"no {key}"
    if how < 0.25 and isinstance(where, list):
        where.append(where[key])
        return f"{key} twice"
    if how < 0.3:
        deep: Any = 1
        for _ in range(900):
            deep = [deep]
        where[key] = deep
        return f"{key} deep"
    where[key] = rng.choice([*NUMBERS, *WORDS, *OTHERS])
    return f"{key} {str(where[key])[:20]!r}"


def restore(whole: Path, place: Path) -> None:
    """Put a folder back as it was."""
    remove(place)
    shutil.copytree(whole, place)


def remove(place: Path) -> None:
    """Remove a folder, if there is one."""
    shutil.rmtree(place, ignore_errors=True)
