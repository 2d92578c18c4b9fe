"""What can be wrong with a file, drawn: its bytes, its JSON, its being a file at all."""

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from proofs.random_params import NUMBERS, OTHERS, WORDS

MOST_DEPTH = 12
"""Values below are left alone."""


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file and return how; JSON more often in its values than in its bytes."""
    if path.suffix == ".json" and rng.random() < 0.7:
        with suppress(ValueError):
            return damage_json(path, rng)
    how = rng.choice((bits, bits, cut, cut, zeros, twice, insert, empty, missing, folder, loop))
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
