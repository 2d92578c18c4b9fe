"""How much host memory does a training take before its first step, over what it then holds, by how many processes?

    python -m proofs.start_memory [--processes 1 2 4] [--real]

The train stage starts on the sample of VQAv2, real or drawn (see `benchmarks.vqav2`), under `cpu` and `cpu-fsdp2`, with
a Gemma 2 of 0.9 GB in float32 and with a tiny one: drawn at random; read from a folder in bfloat16, whose embedding grows by
the processor's tokens; resumed from a checkpoint, with AdamW's moments. What all its processes hold (pages that several
share count once; those of files that are read do not, for the system takes them back) is read ten times a second until the
launch's banner; the difference of the two peaks is what the weights cost. Before the first step a CPU's processes hold
their rows, and nothing more is needed.

With --real the large one is of Gemma 2 2B's shape, 9.8 GiB, read from a folder alone: `start_memory_real.json`. It takes 16
GiB of memory, 6 GB of disk and some minutes.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from transformers import Gemma2ForCausalLM

from benchmarks import measure, vqav2
from benchmarks.measure import Claim
from proofs.project import ROOT, Project, own_sample, with_changes, workplace
from proofs.tree import Call
from vlm_vqa.data.records import load_questions
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.shapes import GEMMA_2_2B, model_of
from vlm_vqa.model.vlm import load_tokenizer, random_config
from vlm_vqa.params import load_params, parse_params
from vlm_vqa.training.checkpoint_files import whole_checkpoints

LARGE = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
REAL = asdict(GEMMA_2_2B)
MOST = 1.3
SECONDS = 900
"""After which a start is given up."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `start_memory.json`."""
    parser = measure.parser("start_memory", __doc__, "proofs")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--real", action="store_true", help="the shape of Gemma 2 2B")
    options = measure.parse(parser, arguments)
    shapes = {"tiny": TINY, "large": REAL if options.real else LARGE}
    ways = {READ: partial(read, unused=250_000)} if options.real else WAYS
    claims, details = [], {}
    with workplace(None) as folder:
        project = Project(folder / "project", own_sample(folder))
        shutil.copy(project.folder / "params.yaml", project.folder / "before.yaml")
        for stage in ("fetch-vqav2", "extract-features"):
            if (done := project.stage(stage)).returncode:
                raise UserError(f"{stage} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        for processes in options.processes:
            for way, measured in ways.items():
                peaks = {name: measured(project, processes, shape) for name, shape in shapes.items()}
                weights = peaks["large"][1] - peaks["tiny"][1]
                ratio = (peaks["large"][0] - peaks["tiny"][0]) / weights
                details[f"{processes}, {way}"] = {"peaks": peaks, "held": weights, "ratio": ratio}
                what = f"host memory at start, {way}, {processes} process{'es' * (processes > 1)}"
                claims.append(Claim(what, ratio, ratio, ratio, MOST, True, f"{weights / 2**20:,.0f} MiB"))
                print(f"  {what}: {ratio:.2f}", flush=True)
    measure.write(
        "start_memory_real" if options.real else "start_memory",
        claims,
        details,
        {"questions and photographs": vqav2.origin(vqav2.SAMPLE)},
    )


def drawn(project: Project, processes: int, shape: dict[str, int]) -> tuple[int, int]:
    """Start with a model of this shape that is drawn at random; return as `peak`."""
    return peak(project, processes, _random(shape))


def resumed(project: Project, processes: int, shape: dict[str, int]) -> tuple[int, int]:
    """Train up to a checkpoint, end that, and start again; return the most bytes, and those of weights and both moments."""
    small = {"train.batch_size": 2, "train.save_steps": 1, "train.optimizer": "adamw_torch"}
    arguments = processes, _random(shape) | small
    with start(project, *arguments) as call:
        folders = project.folder / "checkpoints"
        if not call.wait(lambda: any(map(whole_checkpoints, folders.glob("*"))), SECONDS, pause=0.5):
            raise UserError(f"the training wrote no checkpoint:\n{call.text()[-2000:]}")
    most, weights = peak(project, *arguments, says="going on from")
    shutil.rmtree(folders)
    return most, 3 * weights


def read(project: Project, processes: int, shape: dict[str, int], unused: int = 65_000) -> tuple[int, int]:
    """Write a model of this shape in bfloat16 into a folder, once, with `unused` tokens that no question has, and start with
    that; return as `peak`."""
    folder = project.folder / f"gemma-{shape['hidden_size']}"
    if not folder.exists():
        questions = load_questions(project.folder / "data/records", "train")["question"]
        tokenizer = load_tokenizer(load_params(ROOT / "presets/small.yaml").language, questions)
        # As of Gemma 2 2B, a quarter of the weights is its embedding.
        tokenizer.add_tokens([f"<{number}>" for number in range(unused)])
        write_gemma(folder, shape, tokenizer)
    named = {"model": str(folder), "revision": None, "vocab_size": None, "config": None}
    return peak(project, processes, {"language": named, "prompt.text_length": 256})


def write_gemma(folder: Path, shape: dict[str, Any], tokenizer: Any) -> None:
    """Write a Gemma 2 of this shape, drawn at random, and its tokenizer in Hugging Face's layout, weights in bfloat16."""
    like = load_params(ROOT / "presets/small.yaml").as_dict()
    config = parse_params(with_changes(like, _random(shape))).language.config
    assert config is not None
    Gemma2ForCausalLM(random_config(config, tokenizer)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


READ = "read from a folder, over the weights"
WAYS = {"drawn, over the weights": drawn, READ: read}
WAYS |= {"resumed, over weights and moments": resumed}


def _random(shape: dict[str, int]) -> dict[str, Any]:
    config = {f"language.config.{key}": value for key, value in shape.items()}
    return {"language": load_params(ROOT / "presets/small.yaml").as_dict()["language"], **config}


def start(project: Project, processes: int, changes: dict[str, Any], threads: int = 1) -> Call:
    """Start the train stage with these parameters, everything else as it was before all."""
    launch = "cpu" if processes == 1 else "cpu-fsdp2"
    file = project.folder / f"launch/{launch}.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"num_processes": processes}))
    (project.folder / "params.yaml").write_bytes((project.folder / "before.yaml").read_bytes())
    project.set(changes | {"train.launch": launch})
    command = project.stage_command("train")
    environment = project.environment(OMP_NUM_THREADS=str(threads))
    return Call(command, project.folder, environment, project.folder / "terminal.txt")


def peak(project: Project, processes: int, changes: dict[str, Any], says: str = "from the start") -> tuple[int, int]:
    """Start until it says how it runs; return the most bytes that it held, and those of its weights."""
    with start(project, processes, changes) as call:
        most = call.most(held, lambda: "launch cpu" in call.text(), SECONDS)
        assert says in (said := call.text()), f"{says!r} is not in what it said: {said[-500:]}"
    return most, 4 * model_of(load_params(project.folder / "params.yaml")).all


def held(process: psutil.Process) -> int:
    """Return the bytes that a process holds, its part of those that it shares; of files' pages none."""
    with suppress(OSError):
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return 0


if __name__ == "__main__":
    main()
