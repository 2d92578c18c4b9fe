"""Checkpoints of an unfinished training: where they lie, when one is whole, which one to go on from.

They lie outside DVC's outs, since DVC deletes a stage's outs before it runs the stage again, in a folder named by
everything that decides the result. Training with other parameters, data or code therefore never finds them.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import hash_json, sha256_file, write_json

log = logging.getLogger(__name__)

ROOT = Path("checkpoints")
SEAL = "complete.json"
"""Written last: file names and hashes. A checkpoint without it was cut off while being written."""


def checkpoint_key(facts: dict[str, Any]) -> str:
    """Name a training by what decides its result."""
    return hash_json(facts)[:16]


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    write_json(checkpoint / SEAL, {path.relative_to(checkpoint).as_posix(): sha256_file(path) for path in files})


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of `folder`, checked against its seal, or None.

    Unsealed ones are reported, removed and passed over: the process died while it wrote them.

    Raises:
        UserError: a sealed checkpoint does not hold what was written.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if not (checkpoint / SEAL).is_file():
            log.warning("%s was cut off while it was written; passing over it", checkpoint)
            shutil.rmtree(checkpoint)
            continue
        _verify(checkpoint)
        return checkpoint
    return None


def _verify(checkpoint: Path) -> None:
    try:
        hashes = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except ValueError:
        hashes = {SEAL: "unreadable"}
    for name, expected in hashes.items():
        path = checkpoint / name
        if not path.is_file() or sha256_file(path) != expected:
            raise UserError(
                f"{path}: corrupt or missing (its hash is not the one that was written). Delete the folder {checkpoint} to "
                "go on from the checkpoint before it, or from the start."
            )


def _step(checkpoint: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1
