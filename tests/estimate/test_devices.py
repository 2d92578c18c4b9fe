"""Devices by the names that people type."""

import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.estimate.devices import GIB, find_device
from vlm_vqa.training.throughput import PEAKS


def test_every_peak_has_a_memory_and_is_found_by_the_name_that_the_driver_prints():
    for name, peak in PEAKS.items():
        for printed in (name, f"NVIDIA {name}", name.lower().replace(" ", "-")):
            device = find_device(printed, on_cpu=False, launch="gpu")
            assert (device.name, device.peak) == (name, peak) and 14 * GIB < device.memory <= 180 * GIB
    assert find_device("NVIDIA A10G", on_cpu=False, launch="gpu").memory == 22.5 * GIB


TYPED = {
    "H100 80GB HBM3": ["H100", "h100-sxm", "H100 SXM5 80GB", "NVIDIA H100 80GB HBM3"],
    "H100 PCIe": ["H100-PCIe"],
    "H100 NVL": ["H100 NVL"],
    "H200": ["h200", "H200 SXM"],
    "B200": ["B200"],
    "A100-SXM4-40GB": ["A100", "A100 GPU"],
    "A100-SXM4-80GB": ["A100-80GB", "A100-SXM-80GB", "a100sxm80gb"],
    "A100-PCIE-80GB": ["a100 pcie 80gb"],
    "A100 80GB PCIe": ["A100 80GB PCIe"],
    "Tesla T4": ["T4", "NVIDIA T4"],
    "Tesla V100-SXM2-16GB": ["V100"],
    "Tesla V100-SXM2-32GB": ["V100-32GB"],
    "Tesla P100-SXM2-16GB": ["P100"],
    "L4": ["l4"],
    "L40S": ["L40S"],
    "A10": ["A10"],
    "A10G": ["A10G"],
    "RTX A6000": ["A6000"],
    "RTX 6000 Ada Generation": ["RTX 6000 Ada", "RTX6000Ada"],
    "GeForce RTX 4090": ["4090", "rtx4090", "RTX 4090"],
    "GeForce RTX 3090": ["RTX-3090"],
    "GeForce RTX 5090": ["GeForce 5090"],
}


@pytest.mark.parametrize(("typed", "name"), [(typed, name) for name, all_ in TYPED.items() for typed in all_])
def test_names_that_people_type_are_found(typed, name):
    assert find_device(typed, on_cpu=False, launch="gpu").name == name


@pytest.mark.parametrize(
    "typed",
    ["", "RTX", "80GB", "SXM", "4", "RTX 4090 Laptop GPU", "RTX 3090 Ti", "A100 MIG 1g.5gb", "Quadro RTX 6000", "TPU"],
)
def test_another_device_is_not_taken_for_one_like_it(typed):
    with pytest.raises(UserError, match="is not known. The nearest known: .+"):
        find_device(typed, on_cpu=False, launch="gpu")
