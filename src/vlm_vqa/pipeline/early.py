"""What a program of ours does before its other imports, which take many seconds on a busy machine."""

import os
import signal
import sys

_STAGES = {"fetch_vqav2.py", "extract_features.py", "train.py", "export.py", "helm_eval.py"}


def end_quietly(signum: int, frame: object) -> None:
    """Handle Ctrl-C while libraries are imported: one line, no traceback through them, no error that they make of it."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


def begin() -> None:
    """End by Ctrl-C without a traceback, and a stage with its parents; `entrypoint.run` and `cli.main` take over later."""
    # A notebook that imports the package keeps its own way.
    program = os.path.basename(sys.argv[0] if sys.argv else "")
    if program in {"vlm-vqa", *_STAGES} and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_quietly)
    if program in _STAGES:
        from vlm_vqa.pipeline import orphans

        orphans.end_with_parents()
