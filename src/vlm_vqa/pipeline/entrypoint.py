"""How every stage starts and ends: logging, one clear message for what a person can mend, exit codes."""

import errno
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

from transformers.utils import logging as transformers_logging

from vlm_vqa.errors import GO_ON, UserError
from vlm_vqa.pipeline import orphans
from vlm_vqa.pipeline.early import end_quietly, handle, send_again
from vlm_vqa.sealed import SWITCH, checks_blocks
from vlm_vqa.secrets import causes, mask_output

EXIT_USER_ERROR = 2
EXIT_PEER_GONE = 3
# As shells report it: 128 + the signal.
EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_INTERRUPTED = 128 + signal.SIGINT
SECONDS_FOR_THE_FIRST = 1.0
_DISK_REMEDIES = {
    errno.ENOSPC: "the disk is full. Free some space, then run `dvc repro` again: finished stages are kept.",
    errno.EDQUOT: "the disk quota is used up. Free some space, then run `dvc repro` again: finished stages are kept.",
    errno.EROFS: "the file system is read-only. Mount it writable or work elsewhere, then run `dvc repro` again.",
    errno.EACCES: "permission was denied. Make the path writable, then run `dvc repro` again.",
}
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
"""How gloo words that the process at the other end of a connection is gone."""


def run(name: str, main: Callable[[], None]) -> None:
    """Run a stage's `main` and leave the process with its exit code.

    Exit codes: 0 done, 2 a mistake of the user's (`UserError`, or a disk that is full or read-only), 3 another process of
    the launch is gone, 130 Ctrl-C, 143 SIGTERM. Any other exception keeps its traceback and ends with 1.
    """
    mask_output(f"{name}: %(message)s", logging.INFO, force=True)
    # Libraries that log every request or every op would bury the stage's own lines.
    for noisy in ("httpx", "httpx2", "datasets", "alembic", "mlflow", "accelerate", "torch", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # The stages' own bars show what takes time; loading weights does not.
    transformers_logging.disable_progress_bar()
    # SystemExit unwinds: files are closed, child processes ended, the MLflow run marked.
    handle(signal.SIGTERM, partial(SystemExit, EXIT_TERMINATED))
    if signal.getsignal(signal.SIGINT) is end_quietly:
        handle(signal.SIGINT, KeyboardInterrupt)
    sys.unraisablehook = send_again
    orphans.end_with_parents()
    if not checks_blocks() and os.environ.get("RANK", "0") == "0":
        logging.warning("%s is off: damaged bytes of records and features are read as they are", SWITCH)
    try:
        main()
    except UserError as error:
        _fail(name, str(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _fail(name, f"interrupted. {GO_ON}", EXIT_INTERRUPTED)
    except Exception as error:
        if (remedy := disk_remedy(error)) is not None:
            _fail(name, remedy, EXIT_USER_ERROR)
        if any(words in str(error) for words in _PEER_GONE):
            _fail(name, "another process of this launch has ended; its own message says why.", EXIT_PEER_GONE)
        raise


def disk_remedy(error: BaseException) -> str | None:
    """Say in one sentence what a failing disk needs, or None when `error` is about something else.

    safetensors and torch turn the system's error into their own, so the causes and the text are searched as well.
    """
    for seen in causes(error):
        if isinstance(seen, OSError) and seen.errno in _DISK_REMEDIES:
            path = seen.filename if seen.filename is not None else "while writing"
            return f"{path}: {_DISK_REMEDIES[seen.errno]}"
    text = "".join(traceback.format_exception_only(error))
    for code, words in ((errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")):
        if words in text:
            return f"{text.strip()}: {_DISK_REMEDIES[code]}"
    return None


def _fail(name: str, message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # What concerns all processes is said by the first one, and its launcher ends the others meanwhile.
        time.sleep(SECONDS_FOR_THE_FIRST)
        message = f"rank {rank}: {message}"
    print(f"{name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
