"""`accelerate launch`, but for how it ends: in a line of words, not in tracebacks of the launcher's own.

    python -m vlm_vqa.pipeline.launcher --config_file launch/NAME.yaml stages/train.py
    python -m vlm_vqa.pipeline.launcher --config_file evaluation.launch stages/helm_eval.py

The second looks the launch up in params.yaml, where the key may be missing: DVC would fill in none of dvc.yaml's commands.

Of a process that has failed, what it said itself is the report: torchrun's would bury it.
"""

import logging
import signal
import sys
from collections.abc import Mapping

from vlm_vqa.errors import GO_ON, UserError
from vlm_vqa.pipeline import orphans
from vlm_vqa.pipeline.early import end_quietly, send_again

# Before the imports below, which take seconds; torchrun has a way of its own once its processes run.
signal.signal(signal.SIGINT, end_quietly)
sys.unraisablehook = send_again
# A stage that begins after its dvc has gone finds none above it.
orphans.end_with_parents()

# ruff: noqa: E402
from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from vlm_vqa import workers
from vlm_vqa.launch_file import read_copies
from vlm_vqa.params import load_params
from vlm_vqa.pipeline.entrypoint import EXIT_USER_ERROR

KEY = "evaluation.launch"

# Which process it has sent which signal, in capitals, where one has already said what was wrong.
for _name in ("agent.server.api", "multiprocessing.api"):
    logging.getLogger(f"torch.distributed.elastic.{_name}").disabled = True


def main() -> int:
    """Launch what the command line says; return 0, 128 + the signal that ended all, or a failed process's exit code."""
    try:
        if KEY in sys.argv:
            # What the file lacks the stage will say.
            logging.getLogger("vlm_vqa.params").disabled = True
            asked = read_copies(workers.named(load_params().evaluation.launch), key=KEY)
            sys.argv[sys.argv.index(KEY)] = str(asked.path)
        launch.main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return report(error.failures)
    finally:
        # torchrun's handlers would raise while the interpreter ends.
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, end_quietly)
    return 0


def report(failures: Mapping[int, ProcessFailure]) -> int:
    """Name, by rank, those that a signal has ended before they could say so; return the exit code of the first failure.

    torchrun ends the others by SIGTERM.
    """
    first = {rank: one for rank, one in failures.items() if one.exitcode != -signal.SIGTERM} or failures
    for rank, one in sorted(first.items()):
        if one.exitcode < 0:
            print(f"rank {rank} (process {one.pid}) was ended by {one.signal_name()}. {GO_ON}", file=sys.stderr)
    code = min(first.values(), key=lambda one: one.timestamp).exitcode
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
