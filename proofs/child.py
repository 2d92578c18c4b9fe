"""Call something in a process of its own that has read nothing before, whatever it does there."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path

from vlm_vqa.errors import UserError

BAD = ("raised", "hung", "died")
"""What nothing that a person does may come to: an exception that is no UserError, no end, a signal."""


def in_child(call: Callable[[], str], seconds: float = 60.0, quiet: bool = True) -> tuple[str, str]:
    """Return `done`, `refused` (a UserError) or one of `BAD`, with what `call` returned or what was said.

    Args:
        call: runs in a fork of this process: what it imports is there, and the parent must not have begun threads.
        seconds: after them it is killed.
        quiet: what it prints goes nowhere.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        if quiet:
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        try:
            theirs.send(("done", call()))
        except UserError as error:
            theirs.send(("refused", str(error)))
        except BaseException as error:  # noqa: BLE001 - which one it is counts
            place = traceback.extract_tb(error.__traceback__)[-1]
            theirs.send(
                ("raised", f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})")
            )

    child = context.Process(target=run, daemon=True)
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else ("hung", f"no end after {seconds:.0f} s")
    except EOFError:
        child.join()
        return "died", f"exit code {child.exitcode}"
    finally:
        child.kill()
        child.join()
