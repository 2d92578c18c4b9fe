"""What is claimed about speed and memory, as programs: `python -m benchmarks`, or `python -m benchmarks.NAME` for one.

What is claimed about exactness, interruptions and damage is proved in `proofs`, which ends as these do.
"""

import os
import signal
import sys
from types import TracebackType

from vlm_vqa.pipeline.early import end_quietly

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """End the program after an exception: in one line where a person can mend it, else with its traceback.

    Exit codes are those of the stages: 2 a mistake of the user's (a `UserError`, a disk that is full or read-only, too
    little memory, a package that is not installed), 130 Ctrl-C; 1 with a traceback.
    """
    folder, name = os.path.split(sys.argv[0].removesuffix(".py"))
    name = os.path.basename(folder) if name == "__main__" else name
    message, code = _message(error)
    if message is None:
        sys.__excepthook__(kind, error, traceback)
        return
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def begin() -> None:
    """Let Ctrl-C raise again: a program's imports are done."""
    if signal.getsignal(signal.SIGINT) is end_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _message(error: BaseException) -> tuple[str | None, int]:
    """Return what to say, None for a fault of ours, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; results are as they were.", 130
    if isinstance(error, BrokenPipeError):
        # As from `| head`; what is left to print goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return "whoever read the output has gone.", 128 + signal.SIGPIPE
    if isinstance(error, ModuleNotFoundError):
        return f"error: {error}. Activate the environment of `make setup`: source .venv/bin/activate", 2
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY):
        return f"error: memory ran out ({error}). The first lines of the program say how much it takes.", 2
    # Only now: these take seconds to import, and Ctrl-C may come meanwhile.
    from vlm_vqa.errors import UserError
    from vlm_vqa.pipeline.entrypoint import disk_remedy

    if isinstance(error, UserError):
        return f"error: {error}", 2
    if disk_remedy(error) is not None:
        return f"error: {error}. Make it writable or free some space, then run it again.", 2
    return None, 1


# Only of a program that `python -m` starts: this is what argv holds while it looks for the module.
if sys.argv[0] == "-m":
    sys.excepthook = end
    # SystemExit unwinds: temporary folders go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Libraries in C++ abort when a KeyboardInterrupt comes while they are imported; `begin` gives Ctrl-C back.
    signal.signal(signal.SIGINT, end_quietly)
