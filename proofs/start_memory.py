"""How much host memory does a training take before its first step, over its weights, by how many processes?

    python -m proofs.start_memory [--processes 1 2 4]

The train stage starts on the sample of VQAv2, real or drawn (see `benchmarks.vqav2`), under `cpu` and `cpu-fsdp2`, with
a Gemma 2 of 0.9 GB (float32, random) and with a tiny one. What all its processes hold (proportional set size: pages that
several share count once) is read ten times a second until the launch's banner; the difference of the two peaks is what the
weights cost. Before the first step a CPU's processes hold their rows of the weights, and nothing more is needed.
"""

import time
from collections.abc import Sequence
from contextlib import suppress

import psutil
import yaml

from benchmarks import measure, vqav2
from benchmarks.measure import Claim
from proofs.project import Project, own_sample, workplace
from proofs.tree import Call
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.shapes import model_of
from vlm_vqa.params import load_params

LARGE = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
MOST = 1.3
SECONDS = 900
"""After which a start is given up."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `start_memory.json`."""
    parser = measure.parser("start_memory", __doc__, "proofs")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    options = measure.parse(parser, arguments)
    claims, details = [], {}
    with workplace(None) as folder:
        project = Project(folder / "project", own_sample(folder))
        for stage in ("fetch-vqav2", "extract-features"):
            if (done := project.stage(stage)).returncode:
                raise UserError(f"{stage} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        for processes in options.processes:
            peaks = {name: peak(project, processes, shape) for name, shape in (("tiny", TINY), ("large", LARGE))}
            weights = peaks["large"][1] - peaks["tiny"][1]
            ratio = (peaks["large"][0] - peaks["tiny"][0]) / weights
            details[str(processes)] = {"peaks": peaks, "weights": weights, "ratio": ratio}
            what = f"host memory at start over the weights, {processes} process{'es' * (processes > 1)}"
            claims.append(Claim(what, ratio, ratio, ratio, MOST, True, f"{weights / 2**20:,.0f} MiB of weights"))
            print(f"  {what}: {ratio:.2f}", flush=True)
    measure.write("start_memory", claims, details, {"questions and photographs": vqav2.origin(vqav2.SAMPLE)})


def peak(project: Project, processes: int, shape: dict[str, int]) -> tuple[int, int]:
    """Start the train stage until it says how it runs; return the most bytes that it held, and those of its weights."""
    launch = "cpu" if processes == 1 else "cpu-fsdp2"
    file = project.folder / f"launch/{launch}.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"num_processes": processes}))
    project.set({f"language.config.{key}": value for key, value in shape.items()} | {"train.launch": launch})
    command, most = project.stage_command("train"), 0
    with Call(command, project.folder, project.environment(), project.folder / "terminal.txt") as call:
        while True:
            held_now = sum(map(held, call.processes()))
            if "launch cpu" in (said := call.text()):
                break  # the first step may have begun while the processes were looked at
            if call.shell.poll() is not None or call.seconds() > SECONDS:
                raise UserError(f"the training did not start:\n{said[-2000:]}")
            most = max(most, held_now)
            time.sleep(0.05)
    return most, 4 * model_of(load_params(project.folder / "params.yaml")).all


def held(process: psutil.Process) -> int:
    """Return the bytes that a process holds, its part of those that it shares."""
    with suppress(psutil.Error):
        return process.memory_full_info().pss
    return 0


if __name__ == "__main__":
    main()
