"""Memory and rate of the devices that people name."""

import difflib
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch

from vlm_vqa.errors import UserError
from vlm_vqa.params import Dtype
from vlm_vqa.training.throughput import PEAKS, Peak

GIB = 2**30
# Published, not measured: GiB by NVIDIA's data sheets, of `PEAKS`' names that do not say it themselves.
_NOMINAL = {
    24: ("A30", "GeForce RTX 3090", "GeForce RTX 4090"),
    32: ("GeForce RTX 5090",),
    48: ("RTX A6000", "RTX 6000 Ada Generation"),
    80: ("H100 PCIe",),
    94: ("H100 NVL",),
    141: ("H200", "H200 NVL"),
    180: ("B200",),
}
_WITH_ECC = {16: ("Tesla T4",), 24: ("A10", "A10G", "L4"), 48: ("A40", "L40", "L40S")}
"""GDDR6 boards for servers keep error correction in the memory itself, 1/16 of it, switched on when they are delivered."""
_WITHOUT_KERNELS = ("V100", "P100")
"""The wheels of PyTorch that this project pins (CUDA 13) begin with compute capability 7.5."""
CPU_PROBE = (128, 2304, 9216)
"""Tokens, inputs and outputs of the product that tells a CPU's rate: one of Gemma 2 2B's, of few tokens."""


@dataclass(frozen=True)
class Device:
    """One device of a rank."""

    name: str
    memory: int
    """Bytes that the driver offers."""
    peak: Peak
    """TFLOP/s of dense matrix products."""
    basis: str
    """Where memory and rate come from."""

    @property
    def gpu(self) -> bool:
        return self.name != "cpu"

    def rate(self, dtype: Dtype) -> float | None:
        """Return FLOP/s of matrix products in `dtype`; None where the device has none."""
        teraflops = self.peak.bfloat16 if dtype is Dtype.BFLOAT16 else self.peak.float32
        return None if teraflops is None else teraflops * 1e12

    def lacks(self, wanted: Sequence[str]) -> Iterator[str]:
        """Yield why a run whose keys `wanted` are bfloat16 is not to be had on this device."""
        if any(old in self.name for old in _WITHOUT_KERNELS):
            yield f"the pinned PyTorch has no kernels for {self.name}: name a T4 or a newer device"
        if wanted and self.peak.bfloat16 is None:
            keys = ", ".join(wanted) + " to float32" + ", train.rounding to nearest" * ("train.weights_dtype" in wanted)
            yield f"{self.name} has no bfloat16, torch would emulate it slowly: name an A10 or newer, or set {keys}"


def find_device(name: str | None, *, on_cpu: bool, launch: str) -> Device:
    """Return the device called `name`; without a name the CPU for launches on CPUs, else this machine's GPU.

    Args:
        on_cpu: the launch's `use_cpu`; launch: its name.

    Raises:
        UserError: there is no such device, or the launch runs on another kind.
    """
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
        raise UserError(
            f"--device {name}: these parameters train on the CPU (train.launch: {launch}). Set train.launch: gpu, or try a "
            f"preset, such as `vlm-vqa preflight presets/vqav2-1gpu.yaml --device {shlex.quote(name)}`."
        )
    found = _known(name)
    size, ecc = _gigabytes(found)
    return Device(found, size * GIB - ecc * size * GIB // 16, PEAKS[found], "NVIDIA's data sheets, not measured")


def _known(name: str) -> str:
    """Return the driver's name of a device: the whole one, or the first that has all the words asked for, in any order.

    The word with the model's number must be among them: `h100`, `A100-80GB`, `V100 SXM2 32GB`, `rtx4090`, `4090`.
    """
    asked, names = _plain(name), {_plain(known): known for known in PEAKS}
    if asked in names:
        return names[asked]
    for known in PEAKS:
        words = [_plain(word) for word in re.split(r"[ -]", known)]
        model, rest = next(word for word in words if re.search(r"\d", word)), asked
        for word in sorted({*words, f"{_gigabytes(known)[0]}gb"}, key=len, reverse=True):
            rest = rest.replace(word, "", 1)
        if model in asked and not rest:
            return known
    nearest = [names[one] for one in difflib.get_close_matches(asked, names, n=4, cutoff=0)]
    raise UserError(f"--device {name!r} is not known. The nearest known: {', '.join(nearest)}.")


def _plain(text: str) -> str:
    """Return a device's name without what people leave out or write otherwise."""
    return re.sub(r"sxm\d?|[^a-z0-9]|nvidia|tesla|geforce|generation|gpu", "", text.lower())


def _gigabytes(name: str) -> tuple[int, bool]:
    """Return a device's GiB by its data sheet, and whether error correction takes some of them."""
    if stated := re.search(r"(\d+)GB", name):
        return int(stated[1]), False
    sizes = [(size, table is _WITH_ECC) for table in (_NOMINAL, _WITH_ECC) for size in table if name in table[size]]
    return sizes[0]


def _cpu() -> Device:
    """Return this machine's CPU; its rate is measured now, for there is no data sheet for what is left of a shared one."""
    rates = {dtype: _measured_rate(dtype) / 1e12 for dtype in (torch.bfloat16, torch.float32)}
    basis = "this machine's memory; a product of {} x {} x {} timed just now".format(*CPU_PROBE)
    return Device("cpu", psutil.virtual_memory().total, Peak(rates[torch.bfloat16], None, rates[torch.float32]), basis)


def _measured_rate(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Return FLOP/s of `CPU_PROBE`."""
    tokens, width, outputs = CPU_PROBE
    one, other = torch.ones(tokens, width, dtype=dtype), torch.ones(outputs, width, dtype=dtype)
    torch.nn.functional.linear(one, other)
    begun, products = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        torch.nn.functional.linear(one, other)
        products += 1
    return products * 2 * tokens * width * outputs / (time.perf_counter() - begun)
