"""What a program of ours does before its other imports, which take many seconds on a busy machine."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

_STAGES = {"fetch_vqav2.py", "extract_features.py", "train.py", "export.py", "helm_eval.py"}


def end_quietly(signum: int, frame: object) -> None:
    """Handle Ctrl-C while libraries are imported: one line, no traceback through them, no error that they make of it."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


def send_again(lost: "sys.UnraisableHookArgs") -> None:
    """Send a signal again whose handler has raised where Python drops exceptions, as in a finalizer: it would be lost."""
    sent = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}
    # torchrun's own exception names its signal.
    signum = sent.get(lost.exc_type) or getattr(lost.exc_value, "sigval", None)
    if signum is None:
        return sys.__unraisablehook__(lost)
    # Not from here, where it would be dropped, too.
    _later(signum)


def _later(signum: int) -> None:
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signum))
    timer.daemon = True
    timer.start()


def handle(signum: int, error: Callable[[], BaseException]) -> None:
    """Let a signal raise `error()`; or come again a little later where it meets `send_again` at work, out of which Python
    would print and drop it."""

    def handler(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is send_again.__code__:
                return _later(number)
            frame = frame.f_back
        raise error()

    signal.signal(signum, handler)


def begin() -> None:
    """End by Ctrl-C without a traceback, and a stage with its parents; `entrypoint.run` and `cli.main` take over later."""
    # A notebook that imports the package keeps its own way.
    program = os.path.basename(sys.argv[0] if sys.argv else "")
    if program in {"vlm-vqa", *_STAGES} and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_quietly)
    if program in _STAGES:
        from vlm_vqa.pipeline import orphans

        orphans.end_with_parents()
