"""Checkpoints of an unfinished training: where they lie, when one is whole, which one to go on from.

They lie outside DVC's outs, since DVC deletes a stage's outs before it runs the stage again, in a folder named by
everything that decides the result. Training with other parameters, data or code therefore never finds them.

    checkpoints/KEY/checkpoint-120/rank-0-of-2.safetensors   what process 0 holds: weights and optimizer states
                                   rank-0-of-2.json          its seal, written last: hashes of its files, and facts
                                   rank-1-of-2.safetensors ...
                                   trainer_state.json        the Trainer's own

Every process writes its own files and needs no other one for it; a checkpoint is whole when all seals are there. So it is
written in a thread while training goes on, and one that was cut off at any point is never taken for a whole one.
"""

import errno
import logging
import os
import pickle
import re
import shutil
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, serialization

from vlm_vqa import files
from vlm_vqa.errors import UserError
from vlm_vqa.hashing import sha256_file
from vlm_vqa.sealed import flush, read_folder, read_sealed, write_sealed

log = logging.getLogger(__name__)

ROOT = Path("checkpoints")
_KIND = "the seal of a process's part of a checkpoint"
SEAL = re.compile(r"rank-(\d+)-of-(\d+)\.json")
TENSORS = ".safetensors"


def folder_of(root: Path, step: int) -> Path:
    return root / f"checkpoint-{step}"  # the name that the Trainer expects


def seal_of(checkpoint: Path, rank: int, world: int) -> Path:
    return checkpoint / f"rank-{rank}-of-{world}.json"


def world_of(checkpoint: Path) -> int | None:
    """Return how many processes wrote a checkpoint if it is whole, else None."""
    seals = [match for path in checkpoint.glob("rank-*.json") if (match := SEAL.fullmatch(path.name))]
    worlds, ranks = ({int(match[part]) for match in seals} for part in (2, 1))
    (world,) = worlds if len(worlds) == 1 else (0,)
    return world if world and ranks == set(range(world)) else None


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a folder, the newest first."""
    found = sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)
    return [checkpoint for checkpoint in found if world_of(checkpoint)]


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of `folder`, or None; what was cut off is reported, removed and passed over.

    So is one whose best checkpoint is gone: going on from an earlier one makes that again.
    """
    whole = whole_checkpoints(folder)
    for torn in sorted(set(folder.glob("checkpoint-*")) - set(whole)):
        log.warning("%s was cut off while it was written; passing over it", torn)
        shutil.rmtree(torn)
    for checkpoint in whole:
        if (best := best_of(checkpoint)) is None or best in whole:
            return checkpoint
        log.warning("%s: the best one before it, %s, is not there; passing over it", checkpoint, best.name)
        remove(checkpoint)
    return None


def best_of(checkpoint: Path) -> Path | None:
    """Return the checkpoint that holds the best weights as of a whole checkpoint, itself perhaps; None if none is kept."""
    step = read_seal(checkpoint, 0, world_of(checkpoint) or 0).get("best")
    return None if step is None else folder_of(checkpoint.parent, step)


def prune(folder: Path, limit: int) -> None:
    """Remove all but the newest `limit` whole checkpoints and the best one of each; those being written stay."""
    whole = whole_checkpoints(folder)
    kept = {*whole[:limit], *map(best_of, whole[:limit])}
    for old in whole:
        if old not in kept:
            remove(old)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its seals first: cut off at any point, what is left is no whole one."""
    for path in checkpoint.glob("rank-*.json"):
        path.unlink()
    shutil.rmtree(checkpoint)


def remove_all(folder: Path) -> None:
    """Remove the checkpoints of a training that has ended."""
    for checkpoint in folder.glob("checkpoint-*"):
        remove(checkpoint)
    shutil.rmtree(folder, ignore_errors=True)


def claim(folder: Path) -> IO[str]:
    """Make `folder` one training's own until the process ends; the caller keeps what is returned.

    UserError if another one, perhaps forgotten by its launcher, is at work there.
    """
    return files.claim(
        folder / "lock",
        f"{folder}: another process is training there. Wait for it or end it (`pgrep -f stages/train.py` finds it), then "
        "run `dvc repro` again.",
    )


def read_seal(checkpoint: Path, rank: int, world: int) -> dict[str, Any]:
    """Return the facts that process `rank` of `world` has written; UserError if its seal is damaged or missing."""
    return read_sealed(seal_of(checkpoint, rank, world), _KIND, _remedy(checkpoint))["facts"]


def verify(checkpoint: Path, rank: int, world: int) -> None:
    """Compare the files of process `rank` of `world` with their hashes; UserError if one is damaged or missing."""
    read_folder(seal_of(checkpoint, rank, world), _KIND, _remedy(checkpoint))


def _remedy(checkpoint: Path) -> str:
    return f"Delete the folder {checkpoint} to go on from the checkpoint before it, or from the start."


@contextmanager
def nothing_but_tensors(checkpoint: Path | None) -> Generator[None]:
    """Let torch read no pickle that could run code, even where DeepSpeed, whose files are pickles, asks it to.

    Tensors, plain values and three classes of DeepSpeed's settings are read; UserError at anything else, before it is read.
    """
    settings: list[Any] = []
    if find_spec("deepspeed"):
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        settings = [LossScaler, ZeroStageEnum, fragment_address]
    # torch's own switches. The first overrules what the caller of torch.load asks for; both at once are an error.
    force, opposite = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name) for name in (force, opposite) if name in os.environ}
    os.environ[force] = "1"
    try:
        with serialization.safe_globals(settings):
            yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{checkpoint}: a pickle in it holds {found[1] if found else 'something'} beside tensors and settings, which "
            "could run code; it was not read. Delete the folder to go on from the checkpoint before it, or from the start."
        ) from error
    finally:
        del os.environ[force]
        os.environ.update(before)


def read_tensors(checkpoint: Path, rank: int, world: int) -> Any:
    """Open a process's tensors; the handle gives `get_tensor` and `get_slice` and reads nothing else."""
    return safe_open(seal_of(checkpoint, rank, world).with_suffix(TENSORS), framework="pt", device="cpu")


def _step(checkpoint: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


class Writer:
    """Writes one process's parts of checkpoints in a thread, one at a time, while training goes on."""

    def __init__(self, folder: Path, rank: int, world: int, limit: int):
        """`folder` holds the checkpoints; process 0 keeps `limit` whole ones of them."""
        self.folder, self.rank, self.world, self.limit = folder, rank, world, limit
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] = Future()
        self._writing.set_result(None)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        texts: Mapping[str, str],
        others: Iterable[str] = (),
    ) -> None:
        """Begin to write the checkpoint after `step`; waits for the one before it. UserError if that could not be written.

        Args:
            tensors: on the CPU, not changed by anyone any more; `facts`: what else has to be known to go on, JSON.
            texts: further files by name; `others`: names of files that are there already and belong to this part.
        """
        self.wait()
        checkpoint = folder_of(self.folder, step)

        def write() -> None:
            try:
                checkpoint.mkdir(parents=True, exist_ok=True)
                seal = seal_of(checkpoint, self.rank, self.world)
                file = seal.with_suffix(TENSORS)
                save_file(dict(tensors), file)
                for name, text in texts.items():
                    (checkpoint / name).write_text(text, encoding="utf-8")
                files = sorted([file.name, *texts, *others])
                for name in files:
                    flush(checkpoint / name)
                hashes = {name: sha256_file(checkpoint / name) for name in files}
                write_sealed(seal, {"files": hashes, "facts": dict(facts)})
                if self.rank == 0:
                    prune(self.folder, self.limit)
            except BaseException as error:
                # What is left of it would only fill the disk; without its seal it is no checkpoint.
                for path in checkpoint.glob(f"rank-{self.rank}-of-*"):
                    path.unlink(missing_ok=True)
                # safetensors hands on the system's words, not its number.
                if getattr(error, "errno", None) != errno.ENOSPC and "No space left on device" not in str(error):
                    raise
                raise UserError(
                    f"{checkpoint}: could not be written: the disk is full. Free some space, then run `dvc repro` "
                    "again: training goes on from the checkpoint before it."
                ) from error

        self._writing = self._pool.submit(write)

    def check(self) -> None:
        """Raise what went wrong in the thread, if anything did."""
        if self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is written; UserError if it could not be."""
        self._writing.result()
