"""VLM-VQA: fine-tune, track and evaluate a visual language model (DINOv2, linear projector, Gemma 2) on VQAv2."""

import logging
import warnings

from vlm_vqa.pipeline import early

_NOISE = {
    # Of 4-bit weights, which nothing here has; said by every process that loads it on some CPUs.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # transformers imports it to save a model; whether there is a GPU is compared with the launch file by ourselves.
    "DeepSpeed": "Setting accelerator to CPU.",
}
"""Messages of libraries that read as failures and are none, by logger; nothing else of theirs is kept back."""

# DeepSpeed's, at every step of ZeRO: torch 2.14 has new names for what it calls.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
for _logger, _start in _NOISE.items():
    logging.getLogger(_logger).addFilter(lambda record, start=_start: not str(record.msg).startswith(start))

early.begin()
