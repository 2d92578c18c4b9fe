"""`vlm-vqa preflight`: from a parameter file and options to a prediction."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import psutil

from vlm_vqa.checks import check_here
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.advice import advise, checks
from vlm_vqa.estimate.dataset_size import RECORDS, read_texts
from vlm_vqa.estimate.devices import GIB, find_device
from vlm_vqa.estimate.render import Prediction
from vlm_vqa.estimate.stage_costs import CPU_UTILISATION, GPU_UTILISATION, Machine, launch_shape, predict
from vlm_vqa.params import load_params

BANDWIDTH = 20.0
"""MB/s of downloads, assumed."""
OUTPUTS = ("data/records", "data/features", "models/trained", "models/export", "checkpoints")
"""What the stages write; those that are there take no further room."""


def preflight(
    path: Path, *, device: str | None = None, price: float | None = None, host_memory: float | None = None,
    disk: float | None = None, utilisation: float | None = None, bandwidth: float = BANDWIDTH,
    records: Path = RECORDS, launches: Path = Path("launch"),
) -> Prediction:  # fmt: skip
    """Predict what a run of the parameter file `path` needs.

    Args:
        device: as `find_device` takes it; price: of a device and hour, in any currency.
        host_memory, disk: GiB; this machine's by default. utilisation: 0 to 1. bandwidth: MB/s.

    Raises:
        UserError: a file, device or shape is not known, or an option makes no sense.
    """
    _check_options({"--price": price, "--host-memory": host_memory, "--disk": disk, "--utilisation": utilisation,
                    "--bandwidth": bandwidth})  # fmt: skip
    params = load_params(path)
    check_here(params, launches, records)
    launch = launch_shape(params.train.launch, launches)
    found = find_device(device, on_cpu=launch.on_cpu, launch=params.train.launch)
    basis = {"device": found.basis, "host_memory": "--host-memory", "disk": "--disk", "utilisation": "--utilisation"}
    if host_memory is None:
        basis["host_memory"] = "this machine's"
    if disk is None:
        basis["disk"] = "free here, with the outputs that are there"
    if utilisation is None:
        utilisation = GPU_UTILISATION if found.gpu else CPU_UTILISATION
        basis["utilisation"] = (
            "assumed: no GPU was measured" if found.gpu else "benchmarks/results/training_step.json: 0.79"
        )
    links = _cache_links()
    if not links:
        basis["disk"] += "; DVC's cache copies every output (cache.type), so all count twice"
    machine = Machine(
        found, psutil.virtual_memory().total if host_memory is None else round(host_memory * GIB),
        _room() if disk is None else round(disk * GIB), utilisation, bandwidth * 1e6, links,
    )  # fmt: skip
    texts = read_texts(params, records)
    stages = predict(params, texts, machine, launches)
    compared = checks(stages, machine)
    failed = [one for one in compared if not one.fits]
    options = advise(params, texts, machine, launches, failed) if failed else []
    on_device = ["train.compute_dtype", "train.weights_dtype"]
    if not launch_shape(params.vision.launch, launches).on_cpu:
        on_device.insert(0, "vision.compute_dtype")
    lacks = tuple(found.lacks([key for key in on_device if params.flat()[key] == "bfloat16"]))
    return Prediction(params, str(path), machine, basis, launch.processes, price, stages, compared, options, lacks)


def _check_options(options: Mapping[str, float | None]) -> None:
    for name, value in options.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} is {value}; it must be a number above 0.")
    if (options["--utilisation"] or 0) > 1:
        raise UserError(f"--utilisation is {options['--utilisation']}; it is a share of the device's peak, at most 1.")


def _room() -> int:
    """Return the bytes that the outputs may take here."""
    held = sum(path.stat().st_size for name in OUTPUTS for path in Path(name).rglob("*") if path.is_file())
    return shutil.disk_usage(".").free + held


def _cache_links(config: Path = Path(".dvc/config")) -> bool:
    """Whether DVC's cache links outputs, by its settings here; by default it copies where it cannot reflink."""
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return "hardlink" in text or "symlink" in text
