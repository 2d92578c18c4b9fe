"""Memory and rate of the devices that `preflight` knows by name."""

import difflib
import itertools
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

# Published, not measured: GiB by NVIDIA's data sheets, of `PEAKS`' names that do not say it themselves. GDDR6 boards for
# servers keep error correction in the memory itself, switched on when they are delivered: 1/16 of it is gone then.
_NOMINAL = {
    "A30": 24, "B200": 180, "H200": 141, "H100 PCIe": 80, "H100 NVL": 94, "H200 NVL": 141, "RTX A6000": 48,
    "RTX 6000 Ada Generation": 48, "GeForce RTX 3090": 24, "GeForce RTX 4090": 24, "GeForce RTX 5090": 32,
}  # fmt: skip
_WITH_INLINE_ECC = {"A40": 48, "A10": 24, "A10G": 24, "L4": 24, "L40": 48, "L40S": 48, "Tesla T4": 16}
ECC_SHARE = 1 / 16
_SXM = ("B200", "H100 80GB HBM3", "H200")
"""Boards of that kind whose names do not say it."""
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
    if name is None:
        name = "cpu" if on_cpu else _own_gpu(launch)
    if name == "cpu":
        if not on_cpu:
            raise UserError(
                f"--device cpu, but train.launch {launch} runs on GPUs. Name a GPU, or set train.launch: cpu."
            )
        return _cpu()
    if on_cpu:
        raise UserError(
            f"--device {name}: these parameters train on the CPU (train.launch: {launch}). Set train.launch: gpu, or try a "
            f"preset, such as `vlm-vqa preflight presets/vqav2-1gpu.yaml --device {shlex.quote(name)}`."
        )
    found = _known(name)
    return Device(found, _memory(found), PEAKS[found], "NVIDIA's data sheets, not measured")


def _known(name: str) -> str:
    """Return the driver's name of a device: the whole one, or the first that some of its words in any order make.

    The word with the model's number must be among them: `h100`, `A100-80GB`, `V100 SXM2 32GB`, `rtx4090`, `4090`.
    """
    asked, names = _plain(name), {_plain(known): known for known in PEAKS}
    if asked in names:
        return names[asked]
    for known in PEAKS:
        words = [_plain(word) for word in re.split(r"[ -]", known)]
        model = next(word for word in words if re.search(r"\d", word))
        words = {*words, "sxm" if known in _SXM else "", f"{_gigabytes(known)}gb"} - {""}
        some = itertools.chain.from_iterable(itertools.permutations(words, n + 1) for n in range(len(words)))
        if any("".join(one) == asked for one in some if model in one):
            return known
    nearest = [names[one] for one in difflib.get_close_matches(asked, names, n=4, cutoff=0)]
    raise UserError(f"--device {name!r} is not known. The nearest known: {', '.join(nearest)}.")


def _plain(text: str) -> str:
    """Return a device's name without what people leave out or write otherwise."""
    text = re.sub(r"sxm\d\b", "sxm", text.lower())
    return re.sub(r"[^a-z0-9]|nvidia|tesla|geforce|generation|gpu", "", text)


def _memory(name: str) -> int:
    return round(_gigabytes(name) * (1 - ECC_SHARE * (name in _WITH_INLINE_ECC)) * GIB)


def _gigabytes(name: str) -> int:
    stated = re.search(r"(\d+)GB", name)
    return int(stated[1]) if stated else (_NOMINAL | _WITH_INLINE_ECC)[name]


def _own_gpu(launch: str) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().removeprefix("NVIDIA ")
    raise UserError(
        f"--device is missing: train.launch {launch} runs on GPUs and this machine has none. Name the one you mean, such "
        "as H100, A100-80GB, L4 or RTX 4090."
    )


def _cpu() -> Device:
    """Return this machine's CPU; its rate is measured now, for there is no data sheet for what is left of a shared one."""
    rates = {dtype: _measured_rate(dtype) / 1e12 for dtype in (torch.bfloat16, torch.float32)}
    return Device(
        "cpu", psutil.virtual_memory().total, Peak(rates[torch.bfloat16], None, rates[torch.float32]),
        "this machine's memory; a product of {} x {} x {} timed just now".format(*CPU_PROBE),
    )  # fmt: skip


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
