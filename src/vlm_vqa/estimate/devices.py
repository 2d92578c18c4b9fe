"""Memory and rate of the devices that people name."""

import difflib
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import psutil
import torch

from vlm_vqa.errors import UserError
from vlm_vqa.training.throughput import MEMORY, PEAKS, Peak

GIB = 2**30


class Device(NamedTuple):
    """One device of a rank: bytes that the driver offers, TFLOP/s of dense matrix products, and where they come from."""

    name: str
    memory: int
    peak: Peak
    basis: str

    @property
    def gpu(self) -> bool:
        return self.name != "cpu"

    def lacks(self, wanted: Sequence[str]) -> Iterator[str]:
        """Yield why a run whose keys `wanted` are bfloat16 is not to be had on this device."""
        # The wheels of PyTorch that this project pins (CUDA 13) begin with compute capability 7.5.
        if "V100" in self.name or "P100" in self.name:
            yield f"the pinned PyTorch has no kernels for {self.name}: name a T4 or a newer device"
        if wanted and self.peak.bfloat16 is None:
            keys = ", ".join(wanted) + " to float32" + ", train.rounding to nearest" * ("train.weights_dtype" in wanted)
            yield f"{self.name} has no bfloat16, torch would emulate it slowly: name an A10 or newer, or set {keys}"


def find_device(name: str | None, *, on_cpu: bool, launch: str) -> Device:
    """Return the device called `name`, by default the one here; UserError if it is unknown, or `launch` is for others."""
    if name in (None, "cpu") and on_cpu:
        return _cpu()
    if name is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    if name is None:
        missing = f"--device is missing: train.launch {launch} runs on GPUs and this machine has none."
        raise UserError(f"{missing} Name the one you mean, such as H100, A100-80GB, L4 or RTX 4090.")
    if name == "cpu":
        raise UserError(f"--device cpu, but train.launch {launch} runs on GPUs. Name a GPU, or set train.launch: cpu.")
    if on_cpu:
        other = f"`vlm-vqa preflight presets/vqav2-1gpu.yaml --device {shlex.quote(name)}`"
        wrong = f"--device {name}: these parameters train on the CPU (train.launch: {launch})."
        raise UserError(f"{wrong} Set train.launch: gpu, or try a preset, such as {other}.")
    found = _known(name)
    return Device(found, round(MEMORY[found] * GIB), PEAKS[found], "NVIDIA's data sheets, not measured")


def _known(name: str) -> str:
    """Return the driver's name of a device by it or a part with the model's number: `h100`, `A100-80GB`, `4090`."""
    asked, names = _plain(name), {_plain(known): known for known in PEAKS}
    for plain, known in sorted(names.items(), key=lambda one: one[0] != asked):
        model = next(_plain(word) for word in re.split(r"[ -]", known) if re.search(r"\d", word))
        if model in asked and asked in plain:
            return known
    nearest = [names[one] for one in difflib.get_close_matches(asked, names, n=4, cutoff=0)]
    raise UserError(f"--device {name!r} is not known. The nearest known: {', '.join(nearest)}.")


def _plain(text: str) -> str:
    """Return a device's name without what people leave out or write otherwise."""
    return re.sub(r"sxm\d\b|sxm|[^a-z0-9]|nvidia|tesla|geforce|generation|gpu", "", text.lower())


def _cpu(seconds: float = 0.2) -> Device:
    """Return this machine's CPU; its rate is measured now, for there is no data sheet for what is left of a shared one."""
    # One of Gemma 2 2B's products, of few tokens.
    tokens, width, outputs, rates = 128, 2304, 9216, []
    for dtype in (torch.bfloat16, torch.float32):
        one, other = torch.ones(tokens, width, dtype=dtype), torch.ones(outputs, width, dtype=dtype)
        torch.nn.functional.linear(one, other)
        begun, products = time.perf_counter(), 0
        while time.perf_counter() < begun + seconds:
            torch.nn.functional.linear(one, other)
            products += 1
        rates.append(products * 2 * tokens * width * outputs / (time.perf_counter() - begun) / 1e12)
    basis = f"this machine's memory; a product of {tokens} x {width} x {outputs} timed just now"
    return Device("cpu", psutil.virtual_memory().total, Peak(rates[0], None, rates[1]), basis)
