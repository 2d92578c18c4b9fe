"""Throughput: what is counted, over which time, by how many ranks, and against which peak."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from vlm_vqa.model.flops import cost, rows_work
from vlm_vqa.model.layout import Row
from vlm_vqa.params import LanguageConfig, Mask
from vlm_vqa.training import throughput
from vlm_vqa.training.throughput import (
    COUNTS,
    CountingCollator,
    Meter,
    device_peak,
    figures,
    peak_memory_gib,
)

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COST = cost(LanguageConfig(16, 32, 3, 4, 2, 8), 100, 12)


def counts_of(questions, tokens, supervised, flops):
    return {"questions": questions, "tokens": tokens, "supervised": supervised, "flops": flops}


class Clock:
    """A clock that stands still until it is told."""

    now = 100.0

    def __call__(self):
        return self.now


def collator(layout):
    """Return a collator like `training.dataset.Collator`, without a feature store."""

    def collate(rows):
        return {"image_features": torch.zeros(len(rows), layout.num_patches, 12), **layout.collate(rows)}

    return CountingCollator(collate, layout, COST)


def rows_of_four_questions(layout):
    """Return rows with 4 questions, and one that teaches nothing."""
    red, dogs = layout.tokenize("Is it red?", "yes"), layout.tokenize("How many dogs are there?", "no")
    if layout.mask is Mask.PREFIX_LM:
        return [Row(0, (red,)), Row(1, (dogs,)), Row(1, (red,)), Row(0, (dogs,)), Row(2, ())]
    return [Row(0, (red, dogs)), Row(1, (red,)), Row(2, (dogs,)), Row(2, ())]


@pytest.mark.parametrize("mask", [mask.value for mask in Mask])
def test_a_batch_brings_its_counts(tiny, mask):
    layout = tiny.layout(mask)
    rows = rows_of_four_questions(layout)
    counts = collator(layout)(rows)[COUNTS]
    taught = [tokens for row in rows for tokens in row.questions]
    prefixes = (len(rows) - 1) * (layout.num_patches + len(layout.prefix))
    assert counts["questions"] == 4
    assert counts["tokens"] == prefixes + sum(len(tokens.read) for tokens in taught)
    assert counts["supervised"] == sum(len(tokens.answer) for tokens in taught)
    assert counts["flops"] == COST.flops(rows_work(layout, rows))
    assert collator(layout)(rows[-1:])[COUNTS] == counts_of(0, 0, 0, 0)


def test_counts_reach_the_trainer_as_they_were_made(tiny):
    """Through a worker and accelerate's loader, onto a device where no value can be read: counting never waits."""
    layout = tiny.layout("image-prefix")
    rows = rows_of_four_questions(layout)
    loader = prepare_data_loader(
        DataLoader(rows, batch_size=2, collate_fn=collator(layout), num_workers=1),
        device=torch.device("meta"), num_processes=1, process_index=0, put_on_device=True,
    )  # fmt: skip
    meter = Meter(CPU, torch.float32)
    meter.begin_step()
    for batch, two in zip(loader, (rows[:2], rows[2:]), strict=True):
        assert batch["labels"].device.type == "meta"
        assert batch[COUNTS] == collator(layout)(two)[COUNTS]
        meter.batch(batch.pop(COUNTS))
        assert all(isinstance(value, torch.Tensor) for value in batch.values()), "the model takes nothing else"
    assert meter.read()["questions_per_second"] > 0


def test_pinning_leaves_counts_as_they_are():
    counts = counts_of(1, 2, 3, 4)
    assert pin_memory({COUNTS: counts}) == {COUNTS: counts}


def test_rates_of_an_interval():
    clock = Clock()
    meter = Meter(CPU, torch.float32, clock)
    for _ in range(2):
        meter.begin_step()
        for _ in range(3):
            meter.batch(counts_of(questions=6, tokens=100, supervised=20, flops=10**12))
            clock.now += 0.5
        meter._spend("loading", 0.25)
    found = meter.read()
    # 6 passes in 3 seconds, of which 0.5 were spent waiting.
    assert found.pop("peak_memory_gib") == pytest.approx(peak_memory_gib(CPU), abs=0.1)
    assert found == pytest.approx({
        "questions_per_second": 12, "tokens_per_second": 200, "supervised_tokens_per_second": 40, "step_seconds": 1.5,
        "loading_share": 1 / 6, "model_tflops_per_second": 2,
    })  # fmt: skip


def test_the_next_interval_begins_at_the_reading():
    clock = Clock()
    meter = Meter(CPU, torch.float32, clock)
    meter.begin_step()
    meter.batch(counts_of(50, 1, 1, 1))
    clock.now += 1
    meter.read()
    # Loading the next batch comes before its step, and belongs to it.
    clock.now += 3
    meter._spend("loading", 3)
    meter.begin_step()
    meter.batch(counts_of(8, 1, 1, 1))
    clock.now += 1
    found = meter.read()
    assert (found["questions_per_second"], found["step_seconds"], found["loading_share"]) == (2, 4, 0.75)
    with pytest.raises(AssertionError, match="no step"):
        meter.read()


def test_neither_start_up_nor_checkpoints_are_measured():
    clock = Clock()
    meter = Meter(CPU, torch.float32, clock)
    # Workers start, the first batch comes; a checkpoint is loaded.
    meter._spend("loading", 60)
    with meter.paused():
        clock.now += 60
    meter.begin_step()
    meter.batch(counts_of(10, 1, 1, 1))
    clock.now += 2
    with pytest.raises(OSError), meter.paused():
        clock.now += 30
        raise OSError("the disk is full")
    found = meter.read()
    assert (found["questions_per_second"], found["step_seconds"], found["loading_share"]) == (5, 2, 0)


def test_waiting_for_batches_is_timed_and_what_is_done_with_them_is_not():
    clock = Clock()

    def slow():
        for number in range(3):
            clock.now += 1
            yield number

    meter = Meter(CPU, torch.float32, clock)
    meter.begin_step()
    source = slow()
    # The Trainer takes a step's batches at a time from one iterator.
    taken = [next(meter.timed(source))]
    for batch in meter.timed(source):
        taken.append(batch)
        clock.now += 1.5
    assert taken == [0, 1, 2]
    assert meter.read()["loading_share"] == 0.5


RANK = {
    "seconds": 2, "loading": 0.5, "questions": 10, "tokens": 100, "supervised": 20, "flops": 6e12, "peak": 10e12,
    "memory": 3,
}  # fmt: skip


def test_figures_of_several_ranks():
    """Rates are sums; the slowest, the one that waits most and the fullest are what holds the others up."""
    found = figures([RANK, RANK | {"seconds": 4, "loading": 0.2, "questions": 30, "peak": 5e12, "memory": 1}], steps=2)
    assert found == pytest.approx({
        "questions_per_second": 10, "tokens_per_second": 50, "supervised_tokens_per_second": 10, "step_seconds": 2,
        "loading_share": 0.25, "model_tflops_per_second": 3, "flops_utilisation": 0.2,
        "peak_memory_gib": 3, "peak_memory_gib_rank_0": 3, "peak_memory_gib_rank_1": 1,
    })  # fmt: skip


def test_utilisation_is_claimed_only_where_every_peak_is_known():
    assert figures([RANK], steps=1)["flops_utilisation"] == pytest.approx(0.3)
    assert "flops_utilisation" not in figures([RANK, RANK | {"peak": 0}], steps=1)


IN_A_RANK = """
import json, sys
import torch
from torch import distributed
from vlm_vqa.training import throughput

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
now = [0.0]
throughput.peak_memory_gib = lambda device: 1.5 + rank
meter = throughput.Meter(torch.device("cpu"), torch.float32, lambda: now[0])
meter.peak = 4e12
for reading in range(2):
    meter.begin_step()
    # Beyond what float32 could add up to the last one.
    meter.batch(dict(questions=2**25 + rank, tokens=1, supervised=1, flops=2 * 10**12))
    meter._spend('loading', 0.25 * rank)
    now[0] += 1 + reading
    print(json.dumps(meter.read()))
# Without a common end, gloo may abort in the rank that is left alone.
distributed.barrier()
distributed.destroy_process_group()
"""


def test_two_processes_add_up_and_agree(tmp_path):
    command = [sys.executable, "-c", IN_A_RANK]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "rendezvous")], env=environment, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0].splitlines() for process in started)
    assert first == second and [process.returncode for process in started] == [0, 0]
    one, other = map(json.loads, first)
    assert one == {
        "questions_per_second": 2**26 + 1, "tokens_per_second": 2, "supervised_tokens_per_second": 2,
        "step_seconds": 1, "loading_share": 0.25, "model_tflops_per_second": 4, "flops_utilisation": 0.5,
        "peak_memory_gib": 2.5, "peak_memory_gib_rank_0": 1.5, "peak_memory_gib_rank_1": 2.5,
    }  # fmt: skip
    assert (other["step_seconds"], other["loading_share"], other["flops_utilisation"]) == (2, 0.125, 0.25)


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32", "tf32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12, 156e12),
        # An older driver.
        ("A100-SXM4-40GB", 312e12, 19.5e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756.5e12, 51e12, 378e12),
        ("NVIDIA A10G", 70e12, 35e12, 35e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 82.6e12),
        ("Tesla T4", None, 8.1e12, 8.1e12),
        # Near to one that is known, and another device.
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None, None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None, None),
        ("AMD Instinct MI300X", None, None, None),
    ],
)
def test_the_peak_goes_by_the_whole_name(monkeypatch, name, bfloat16, float32, tf32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak(CUDA, torch.bfloat16) == pytest.approx(bfloat16)
    assert device_peak(CUDA, torch.float32) == pytest.approx(float32)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert device_peak(CUDA, torch.float32) == pytest.approx(tf32)
    assert device_peak(CUDA, torch.float16) is None
    assert device_peak(CPU, torch.float32) is None


def test_peaks_are_those_of_dense_products():
    """Tensor cores are at most 16 times as fast as the rest (Hopper; Blackwell 30, dense); a sparse figure is beyond."""
    for name, peak in throughput.PEAKS.items():
        if peak.bfloat16 is not None:
            assert peak.bfloat16 == pytest.approx(2 * peak.tf32, rel=0.02)
            assert 1.9 <= peak.bfloat16 / peak.float32 <= (30.1 if name == "B200" else 16.1)


def test_memory_of_a_device_is_asked_of_that_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30 if device == CUDA else 0)
    assert peak_memory_gib(CUDA) == 3
    # On a machine with GPUs that trains on its CPU too.
    assert 0.1 < peak_memory_gib(CPU) < 100
