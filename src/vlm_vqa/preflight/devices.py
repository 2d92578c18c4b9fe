"""Memory and rate of the devices that `preflight` knows by name."""

import time
from dataclasses import dataclass

import psutil
import torch

from vlm_vqa.errors import UserError
from vlm_vqa.params import Dtype
from vlm_vqa.training.throughput import PEAKS, Peak

GIB = 2**30

# GiB by NVIDIA's data sheets, of `PEAKS`' names that do not say it themselves. GDDR6 boards for servers keep error
# correction in the memory itself, switched on when they are delivered: 1/16 of it is gone then.
_NOMINAL = {
    "A30": 24, "H200": 141, "H100 PCIe": 80, "H100 NVL": 94, "H200 NVL": 141, "RTX A6000": 48, "GeForce RTX 3090": 24,
    "GeForce RTX 4090": 24, "GeForce RTX 5090": 32,
}  # fmt: skip
_WITH_INLINE_ECC = {"A40": 48, "A10": 24, "A10G": 24, "L4": 24, "L40": 48, "L40S": 48, "Tesla T4": 16}
ECC_SHARE = 1 / 16
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

    def rate(self, dtype: Dtype) -> float:
        """Return FLOP/s of matrix products in `dtype`.

        Raises:
            UserError: the device has no such products.
        """
        teraflops = self.peak.bfloat16 if dtype is Dtype.BFLOAT16 else self.peak.float32
        if teraflops is None:
            raise UserError(
                f"--device {self.name!r} has no {dtype.value} products, torch would emulate them slowly. Name another "
                "device, or set train.compute_dtype and vision.compute_dtype to float32."
            )
        return teraflops * 1e12


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
            f"--device {name!r}, but train.launch {launch} runs on the CPU. Set train.launch to one of the launches on "
            "GPUs, such as gpu, ddp or fsdp2."
        )
    found = _by_short_name(name)
    return Device(found, _memory(found), PEAKS[found], "NVIDIA's data sheets")


def known_devices() -> list[str]:
    """Return the names that `--device` takes, as the driver prints them."""
    return [*PEAKS, "cpu"]


def _by_short_name(name: str) -> str:
    """Return the driver's name of a device; `RTX 4090` and `rtx4090` will do, and `A100-80GB` where one rate fits all."""

    def plain(text: str) -> str:
        return "".join(character for character in text.lower() if character.isalnum())

    asked = plain(name.removeprefix("NVIDIA "))
    exact = [known for known in PEAKS if plain(known) == asked]
    parts = [known for known in PEAKS if asked and asked in (plain(known), plain(known).removeprefix("geforce"))]
    if not exact + parts:
        raise UserError(f"--device {name!r} is not known. Known devices: {', '.join(known_devices())}.")
    return (exact + parts)[0]


def _memory(name: str) -> int:
    if name in _WITH_INLINE_ECC:
        return round(_WITH_INLINE_ECC[name] * (1 - ECC_SHARE) * GIB)
    stated = _NOMINAL.get(name) or next(
        int(part.removesuffix("GB")) for part in name.replace("-", " ").split() if part.endswith("GB")
    )
    return stated * GIB


def _own_gpu(launch: str) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().removeprefix("NVIDIA ")
    raise UserError(
        f"--device is missing: train.launch {launch} runs on GPUs and this machine has none. Name the one you mean: "
        f"{', '.join(known_devices()[:-1])}."
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
