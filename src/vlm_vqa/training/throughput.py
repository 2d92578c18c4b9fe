"""How fast training runs, over all processes: rates, share of the hardware's peak, waiting for data, memory.

What a batch holds is counted from its rows, on the host: a count on a GPU would wait for the GPU. The counts travel
in the batch as plain numbers, and the Trainer takes them out before the forward pass.
"""

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from vlm_vqa.model.flops import Cost, rows_work
from vlm_vqa.model.layout import Row, TokenLayout

COUNTS = "counts"  # key of what a batch holds, by the names in `COUNTED`
COUNTED = ("questions", "tokens", "supervised", "flops")


class Peak(NamedTuple):
    """TFLOP/s of dense matrix products; None where the hardware has no such type."""

    bfloat16: float | None
    tf32: float | None
    float32: float


# From NVIDIA's data sheets, or the architecture's white paper where it is named. Data sheets give most figures of
# tensor cores "with sparsity": here stands half of those. Names, and GiB of memory: GDDR6 boards for servers keep error
# correction in it, switched on when they are delivered: 16, 24 and 48 GiB less 1/16.
_DATA_SHEETS = (
    (Peak(312, 156, 19.5), {"A100-SXM4-40GB": 40, "A100-SXM4-80GB": 80, "A100-PCIE-40GB": 40}),
    (Peak(312, 156, 19.5), {"A100-PCIE-80GB": 80, "A100 80GB PCIe": 80}),
    (Peak(165, 82, 10.3), {"A30": 24}),
    (Peak(149.7, 74.8, 37.4), {"A40": 45}),
    (Peak(125, 62.5, 31.2), {"A10": 22.5}),
    # AWS's own variant, in its data sheet: more float32 than the A10, less of the tensor cores.
    (Peak(70, 35, 35), {"A10G": 22.5}),
    # An eighth of HGX B200.
    (Peak(2250, 1125, 75), {"B200": 180}),
    # White paper "NVIDIA H100 Tensor Core GPU architecture" for the SXM5 board.
    (Peak(989.4, 494.7, 66.9), {"H100 80GB HBM3": 80, "H200": 141}),
    (Peak(756.5, 378, 51), {"H100 PCIe": 80}),
    (Peak(835.5, 417.5, 60), {"H100 NVL": 94, "H200 NVL": 141}),
    (Peak(121, 60, 30.3), {"L4": 22.5}),
    (Peak(181.05, 90.5, 90.5), {"L40": 45}),
    (Peak(362.05, 183, 91.6), {"L40S": 45}),
    (Peak(364.2, 182.1, 91.1), {"RTX 6000 Ada Generation": 48}),
    # White papers "NVIDIA Ampere GA102", "Ada" and "RTX Blackwell GPU architecture": accumulated in float32, which
    # GeForce boards do at half the speed.
    (Peak(154.8, 77.4, 38.7), {"RTX A6000": 48}),
    (Peak(71, 35.6, 35.6), {"GeForce RTX 3090": 24}),
    (Peak(165.2, 82.6, 82.6), {"GeForce RTX 4090": 24}),
    (Peak(209.5, 104.8, 104.8), {"GeForce RTX 5090": 32}),
    # Before Ampere torch emulates bfloat16.
    (Peak(None, None, 8.1), {"Tesla T4": 15}),
    (Peak(None, None, 15.7), {"Tesla V100-SXM2-16GB": 16, "Tesla V100-SXM2-32GB": 32}),
    (Peak(None, None, 14), {"Tesla V100-PCIE-16GB": 16, "Tesla V100-PCIE-32GB": 32}),
    (Peak(None, None, 10.6), {"Tesla P100-SXM2-16GB": 16}),
    (Peak(None, None, 9.3), {"Tesla P100-PCIE-16GB": 16}),
)
PEAKS = {name: peak for peak, boards in _DATA_SHEETS for name in boards}
MEMORY = {name: size for _, boards in _DATA_SHEETS for name, size in boards.items()}
"""By the device's whole name, less a leading NVIDIA: a Ti, a laptop's chip or a slice of a GPU is another device."""


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the dense FLOP/s that the vendor promises for matrix products of `dtype`; None where it is not known.

    float32 means TF32 where torch is allowed to use it.
    """
    # Older drivers do not print the vendor.
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ") if device.type == "cuda" else "cpu"
    if (peak := PEAKS.get(name)) is None:
        return None
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    float32 = peak.tf32 if tf32 and peak.tf32 else peak.float32
    teraflops = {torch.bfloat16: peak.bfloat16, torch.float32: float32}.get(dtype)
    return None if teraflops is None else teraflops * 1e12


@dataclass(frozen=True)
class CountingCollator:
    """A collator whose batches carry under `COUNTS` how many questions with an answer, tokens and FLOPs they hold."""

    collator: Callable[[Sequence[Row]], dict[str, Tensor]]
    layout: TokenLayout
    cost: Cost

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the collator's batch and its counts; rows that teach nothing add nothing."""
        work = rows_work(self.layout, rows)
        questions = sum(bool(tokens.answer) for row in rows for tokens in row.questions)
        counts = (questions, work.tokens, work.supervised, self.cost.flops(work))
        return {**self.collator(rows), COUNTS: dict(zip(COUNTED, counts, strict=True))}


class Meter:
    """Measures training from one logged step to the next."""

    def __init__(self, device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter):
        """`device` is that of this process's model, `dtype` the one in which products are computed."""
        self.device, self.peak, self._clock = device, device_peak(device, dtype), clock
        self._begun: float | None = None
        # Since the last reading: steps, seconds by kind, counts.
        self._sums: defaultdict[str, float] = defaultdict(float)

    def begin_step(self) -> None:
        """Count an optimizer step; the first one starts the clock."""
        self._begun = self._clock() if self._begun is None else self._begun
        self._sums["steps"] += 1

    def _spend(self, kind: str, seconds: float) -> None:
        if self._begun is not None:  # before the first step all is start-up
            self._sums[kind] += seconds

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield what `batches` yields and add how long each took to come."""
        begun = self._clock()
        for batch in batches:
            self._spend("loading", self._clock() - begun)
            yield batch
            begun = self._clock()

    def batch(self, counts: Mapping[str, int]) -> None:
        """Add what one forward pass computes."""
        for name, count in counts.items():
            self._sums[name] += count

    @contextmanager
    def paused(self) -> Generator[None]:
        """Leave out the time spent inside, as of saving a checkpoint; for all ranks."""
        begun = self._finished()
        try:
            yield
        finally:
            self._spend("paused", self._clock() - begun)

    def read(self) -> dict[str, float]:
        """Return the interval's `figures`, the same on all ranks, and begin the next one; every rank must call it."""
        done = self._sums
        assert done["steps"] and self._begun is not None, "nothing to read: no step since the last reading"
        seconds = self._finished() - self._begun
        self._begun, self._sums = self._begun + seconds, defaultdict(float)
        done |= {"seconds": seconds - done["paused"], "peak": self.peak or 0.0, "memory": peak_memory_gib(self.device)}
        ranks = [done]
        if distributed.is_initialized():
            ranks *= distributed.get_world_size()
            distributed.all_gather_object(ranks, done)
        return figures(ranks, done["steps"])

    def _finished(self) -> float:
        """Return the time at which the device has done its steps, which would not be measured otherwise."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()


def figures(ranks: Sequence[Mapping[str, float]], steps: float) -> dict[str, float]:
    """Return metrics of `steps` optimizer steps of all ranks.

    Of each: `seconds` of wall clock without pauses, those spent `loading`, the counts, FLOP/s of its device as `peak` (0
    where they are not known) and `memory` in GiB.

    `questions_per_second`, `tokens_per_second` (real ones, image tokens included), `supervised_tokens_per_second` and
    `model_tflops_per_second` are sums over ranks, per second of the slowest. `loading_share`, 0 to 1, is the time that
    the loop waits for data, of the rank that waits most; a device may still be computing meanwhile. `flops_utilisation`
    is MFU, model FLOP/s over the devices' peaks, and stands only where all peaks are known. `peak_memory_gib` is the
    largest; several ranks have theirs beside it.
    """
    seconds = max(rank["seconds"] for rank in ranks)
    total = {name: sum(rank[name] for rank in ranks) for name in (*COUNTED, "peak")}
    found = {
        "questions_per_second": total["questions"] / seconds,
        "tokens_per_second": total["tokens"] / seconds,
        "supervised_tokens_per_second": total["supervised"] / seconds,
        "step_seconds": seconds / steps,
        "loading_share": max(rank["loading"] / rank["seconds"] for rank in ranks),
        "model_tflops_per_second": total["flops"] / seconds / 1e12,
        "peak_memory_gib": max(rank["memory"] for rank in ranks),
    }
    if all(rank["peak"] for rank in ranks):
        found["flops_utilisation"] = total["flops"] / seconds / total["peak"]
    if len(ranks) > 1:
        found |= {f"peak_memory_gib_rank_{number}": rank["memory"] for number, rank in enumerate(ranks)}
    return found


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this process has held: allocated on its GPU, or resident on the host where it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts KiB here.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
