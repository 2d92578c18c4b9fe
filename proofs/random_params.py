"""Parameter files that nobody would write: the small preset with one to three values replaced by others, by chance."""

import copy
import random
from collections.abc import Callable
from typing import Any

NUMBERS = [
    0,
    -0.0,
    1,
    -1,
    2,
    3,
    7,
    0.5,
    1.5,
    -2.5,
    1e-320,
    1e-9,
    19,
    20,
    21,
    64,
    255,
    256,
    257,
    1000,
    4096,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    10**30,
    10**400,
    1e6,
    1e30,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
]
WORDS = [
    "",
    " ",
    "none",
    "true",
    "1e-5",
    "small",
    "random",
    "cpu",
    "cpu-ddp",
    "cpu-zero2",
    "installed",
    "float16",
    "bfloat16",
    "int8",
    "drawn",
    "drop",
    "prefix-lm",
    "causal",
    "flex_attention",
    "adamw_bnb_8bit",
    "linear",
    "stochastic",
    "constant_with_warmup",
    "official",
    "hub",
    "directory",
    "easy-vqa",
    "a" * 5000,
    "a\0b",
    "\ud800",
    "../x",
    "/dev/zero",
    "{image_id}",
    "{image_id.foo}",
    "{image_id:02000000000d}",
    "{image_id!r}",
    "{",
    "\n",
]
OTHERS = [None, True, False, [], [1], {}, {"a": 1}, [[]], ["q_proj"]]
LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ["q_proj"]}


def places(values: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return every key of nested mappings, with the mapping that it stands in."""
    found = []
    for key, value in values.items():
        found.append((values, key))
        if isinstance(value, dict):
            found += places(value)
    return found


def draw(base: dict[str, Any], seed: int, keep: Callable[[str], bool] = lambda key: False) -> dict[str, Any]:
    """Return `base` with up to three keys changed, added or taken away; those that `keep` names stay."""
    chance, values = random.Random(seed), copy.deepcopy(base)
    if chance.random() < 0.1:
        values["train"] |= {"lora": copy.deepcopy(LORA), "freeze_embeddings": True}
    for _ in range(chance.randint(1, 3)):
        where, key = chance.choice([place for place in places(values) if not keep(place[1])])
        kind = chance.random()
        if kind < 0.02:
            del where[key]
        elif kind < 0.04:
            where[chance.choice(WORDS)] = 1
        else:
            like = WORDS if isinstance(where[key], str) else NUMBERS
            where[key] = chance.choice(like if kind < 0.8 else [*NUMBERS, *WORDS, *OTHERS])
    return values
