"""VLM-VQA: fine-tune, track and evaluate a visual language model (DINOv2, linear projector, Gemma 2) on VQAv2."""

import logging
import os
import signal
import sys
import warnings

_NOISE = {
    # Of 4-bit weights, which nothing here has; said by every process that loads it on some CPUs.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # transformers imports it to save a model; whether there is a GPU is compared with the launch file by ourselves.
    "DeepSpeed": "Setting accelerator to CPU.",
}
"""Messages of libraries that read as failures and are none, by logger; nothing else of theirs is kept back."""

_STAGES = {"fetch_vqav2.py", "extract_features.py", "train.py", "export.py", "helm_eval.py"}

# DeepSpeed's, at every step of ZeRO: torch 2.14 has new names for what it calls.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
for _logger, _start in _NOISE.items():
    logging.getLogger(_logger).addFilter(lambda record, start=_start: not str(record.msg).startswith(start))


def end_quietly(signum: int, frame: object) -> None:
    """Handle Ctrl-C while libraries are imported: one line, no traceback through them, no error that they make of it."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


# Programs of ours, before their other imports, which take many seconds on a busy machine; `entrypoint.run` and the command
# line's `main` then take over. A notebook that imports the package keeps its own way.
_program = os.path.basename(sys.argv[0] if sys.argv else "")
if _program in {"vlm-vqa", *_STAGES} and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_quietly)
if _program in _STAGES:
    from vlm_vqa.pipeline import orphans

    orphans.end_with_parents()
