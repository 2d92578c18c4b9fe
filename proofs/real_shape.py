"""The real model's shape on a CPU, through the stages themselves: what each moment takes against `vlm-vqa preflight`.

    python -m proofs.real_shape [--short] [--layers 26] [--processes 1 2] [--folder FOLDER]

DINOv2-base and Gemma 2 2B with 257,153 tokens lie in folders of Hugging Face's layout, both from random weights. The preset
`vqav2-1gpu` (bfloat16 weights with stochastic rounding, 8-bit AdamW, gradient checkpointing, the embedding frozen) takes
two steps over two questions of the VQAv2 sample, real or drawn (see `benchmarks.vqav2`), under `cpu` and `cpu-fsdp2`;
uncompiled, since that takes long for so few. When the checkpoint is whole, all processes are killed.
The stage is called again, goes on from there, gathers the whole weights and writes them; `export` writes its files and
reads them back.

Measured is what all processes of a stage hold, about once a second, and more often in the export; pages that several share
count once, those of files of weights in the export alone, for the system takes them back. It is held to what preflight
predicts, and start, whole weights and export, less each process's encoder and what preflight counts for its libraries, to
the float32 weights.

With 26 layers: 21 GiB of free memory and some 35 GB of disk; 20 minutes on 2 cores that multiply bfloat16. Where it is
emulated a step takes hours; --short is for there: pictures of 28 x 28 pixels, so 5 tokens, and instruction and question of
one each. What is read, held, updated and written is the same; what activations take is measured by `benchmarks.memory`.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from benchmarks import extraction, measure, vqav2
from benchmarks.measure import Claim
from proofs.project import ROOT, Project, clear, own_sample, workplace
from proofs.start_memory import start, write_gemma
from proofs.tree import Call
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.devices import GIB
from vlm_vqa.estimate.memory import copies, total
from vlm_vqa.estimate.predict import changed
from vlm_vqa.estimate.shapes import GEMMA_2_2B
from vlm_vqa.estimate.stage_costs import BASE
from vlm_vqa.hashing import write_json
from vlm_vqa.model.vlm import train_tokenizer
from vlm_vqa.params import Params, load_params
from vlm_vqa.training.checkpoint_files import whole_checkpoints

PRESET = ROOT / "presets/vqav2-1gpu.yaml"
QUESTIONS = 2
LEARNT, TOKENS = 4000, 256_000
"""Tokens that are learnt from the sample's texts, at most, and those that Gemma has before the processor adds its own."""
EDGE = 28
"""Pixels of a picture where tokens are to be few."""
MOST, OFF = 1.3, 0.1
"""What start, whole weights and export may take over the float32 weights; how far preflight may be off."""
SECONDS = 3 * 3600
WEIGHTS = ("models/trained", "models/export", "../dinov2")
MOMENTS = ("start", "training", "resumed start", "whole weights", "export")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `real_shape.json`."""
    parser = measure.parser("real_shape", __doc__, "proofs", layers=GEMMA_2_2B.num_hidden_layers)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--short", action="store_true", help="few tokens, for CPUs that multiply no bfloat16")
    parser.add_argument("--folder", type=Path, help="for all that is written, if it is to stay")
    options = measure.parse(parser, arguments)
    claims: list[Claim] = []
    details: dict[str, Any] = {"weights": "random; the encoder's too", "short": options.short}
    with workplace(options.folder) as folder:
        project = prepared(folder, options.layers, options.short)
        for processes in options.processes:
            params = settings(load_params(PRESET), folder, processes, options.short)
            for name in ("params.yaml", "before.yaml"):
                (project.folder / name).write_text(yaml.safe_dump(params.as_dict(), sort_keys=False))
            found = measured(project, processes)
            claims += claims_of(options.layers, processes, found)
            details[f"processes: {processes}"] = found
    # A model of fewer layers is for trying this out.
    results = measure.RESULTS if options.layers == GEMMA_2_2B.num_hidden_layers else Path(tempfile.mkdtemp())
    measure.write("real_shape", claims, details, {"questions and photographs": vqav2.origin(vqav2.SAMPLE)}, results)


def prepared(folder: Path, layers: int, short: bool) -> Project:
    """Return a copy of the project whose first two stages have run, beside both models."""
    sample = own_sample(folder)
    questions, annotations = vqav2.read(folder / vqav2.SAMPLE)
    texts = [load_params(PRESET).prompt.instruction, *(row["question"] for row in questions)]
    answers = [row["multiple_choice_answer"] for row in annotations]
    for kind, rows in (("questions", questions), ("annotations", annotations)):
        write_json(folder / vqav2.SAMPLE / f"{kind}.json", {kind: rows[:QUESTIONS]})
    encoder = extraction.build_encoder(extraction.DINOV2_BASE, torch.float32)
    encoder.model.save_pretrained(folder / "dinov2")
    processor: Any = encoder.processor
    if short:
        processor.crop_size = {"height": EDGE, "width": EDGE}
    processor.save_pretrained(folder / "dinov2")
    tokenizer = train_tokenizer([*texts, *answers], LEARNT)
    tokenizer.add_tokens(texts[: 1 + QUESTIONS] if short else [])
    tokenizer.add_tokens([f"<{number}>" for number in range(TOKENS - len(tokenizer))])
    write_gemma(folder / "gemma", asdict(replace(GEMMA_2_2B, num_hidden_layers=layers)), tokenizer)
    project = Project(folder / "project", sample)
    write_json(folder / "data.json", yaml.safe_load((project.folder / "params.yaml").read_text())["data"])
    params = settings(load_params(PRESET), folder, 1, short)
    (project.folder / "params.yaml").write_text(yaml.safe_dump(params.as_dict(), sort_keys=False))
    for stage in ("fetch-vqav2", "extract-features"):
        if (done := project.stage(stage)).returncode:
            raise UserError(f"{stage} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return project


def settings(preset: Params, folder: Path, processes: int, short: bool) -> Params:
    """Return the preset for one GPU on CPU processes, for a step over the data in `folder`."""
    few = {"vision.num_patches": 1 + (EDGE // 14) ** 2}
    return changed(
        preset,
        (few if short else {})
        | {
            "data": json.loads((folder / "data.json").read_text()),
            "vision.launch": "cpu",
            "vision.model": str(folder / "dinov2"),
            "vision.revision": None,
            "vision.compute_dtype": "float32",
            "language.model": str(folder / "gemma"),
            "language.revision": None,
            "validation.questions": 0,
            "validation.train_questions": 0,
            "validation.keep": "last",
            "train.launch": "cpu" if processes == 1 else "cpu-fsdp2",
            "train.batch_size": QUESTIONS // processes,
            "train.dataloader_workers": 0,
            # The optimizer's states lie beside the second backward pass, not the first.
            "train.num_train_epochs": 2,
            "train.lr_scheduler_type": "constant_with_warmup",
            "train.warmup_ratio": 0.0,
            "train.logging_steps": 1,
            "train.compile": False,
            # A pass takes minutes where bfloat16 is emulated.
            "train.stall_seconds": SECONDS,
            "evaluation.launch": "cpu",
            "evaluation.vqa_questions": None,
            "evaluation.helm_instances": QUESTIONS,
            "evaluation.punkt_tab": "bundled",
        },
    )


# --- what is measured ------------------------------------------------------------------------------------------------


def measured(project: Project, processes: int) -> dict[str, Any]:
    """Train, kill, go on and export under so many processes; return bytes by moment, as measured and as predicted."""
    clear(project)
    peaks: dict[str, int] = {}
    threads = max(1, measure.cores() // processes)
    check_room(predicted := predict(project))
    with start(project, processes, {}, threads) as call:
        peaks["start"] = _most(call, "start", lambda: _says(call, "launch cpu"))
        folders = project.folder / "checkpoints"
        peaks["training"] = _most(call, "training", lambda: any(map(whole_checkpoints, folders.glob("*"))))
    with start(project, processes, {}, threads) as call:
        peaks["resumed start"] = _most(call, "resumed start", lambda: _says(call, "launch cpu"))
        assert _says(call, "going on from"), "it began again"
        peaks["whole weights"] = _most(call, "whole weights", lambda: _ended(call))
    with Call(project.stage_command("export"), project.folder, project.environment(), call.output) as call:
        peaks["export"] = _most(call, "export", lambda: _ended(call), mapped=True)
    # Above 5 GB an export has several.
    files = {
        name: sum(file.stat().st_size for file in (project.folder / name).glob("*.safetensors")) for name in WEIGHTS
    }
    return {"peaks": peaks, "predicted": predicted, "files": files}


def predict(project: Project) -> dict[str, int]:
    """Return the bytes that preflight predicts for each of `MOMENTS`."""
    done = project.command("vlm-vqa preflight --device cpu --json 2>/dev/null")
    stages = {stage["name"]: stage["host"] for stage in json.loads(done.stdout)["stages"]}
    moments = {name: sum(parts.values()) for name, parts in stages["train"].items()}
    start, whole = moments.pop("start"), moments.pop("whole weights")
    resumed = max(start, moments.pop("going on from a checkpoint"))
    export = max(sum(parts.values()) for parts in stages["export"].values())
    return dict(zip(MOMENTS, (start, max(moments.values()), resumed, whole, export), strict=True))


def check_room(predicted: dict[str, int]) -> None:
    """Refuse to start where others would have to make room."""
    needed, free = max(predicted.values()) / GIB + 1, psutil.virtual_memory().available / GIB
    if free < needed:
        raise UserError(f"{free:.1f} GiB of memory are free, {needed:.1f} are needed. Wait, or take fewer --layers.")


def _most(call: Call, moment: str, until: Callable[[], bool], mapped: bool = False) -> int:
    # Reading what so many pages are takes the system a while, in which the process cannot ask for more; but an export hashes
    # its largest weight in seconds.
    most = call.most(lambda process: resident(process, mapped), until, SECONDS, pause=0.1 if mapped else 1.0)
    print(f"  {moment}: {most / GIB:.2f} GiB", flush=True)
    return most


def _says(call: Call, words: str) -> bool:
    return words in call.text()


def _ended(call: Call) -> bool:
    if (code := call.shell.poll()) not in (None, 0):
        raise UserError(f"exit code {code}:\n{call.text()[-2000:]}")
    return code == 0


def resident(process: psutil.Process, mapped: bool) -> int:
    """Return the bytes that a process holds, its part of those that it shares; of files of weights only if `mapped`."""
    held, counts = 0, True
    with suppress(OSError), open(f"/proc/{process.pid}/smaps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("Pss:"):
                held += int(line.split()[1]) if counts else 0
            elif "-" in line.partition(" ")[0]:
                counts = mapped or not line.endswith(".safetensors\n")
    return 1024 * held


# --- what came out ---------------------------------------------------------------------------------------------------


def claims_of(layers: int, processes: int, found: dict[str, Any]) -> list[Claim]:
    """Hold every moment to preflight's, and start, whole weights and export to the weights that they make."""
    name = f"{layers} layers, {processes} process{'es' * (processes > 1)}"
    peaks, predicted, (trained, exported, encoder) = found["peaks"], found["predicted"], found["files"].values()
    claims = []
    for moment in MOMENTS:
        note = f"{peaks[moment] / GIB:.2f} GiB, preflight {predicted[moment] / GIB:.2f}"
        off = abs(peaks[moment] / predicted[moment] - 1)
        claims.append(Claim(f"{name}: memory off preflight's, {moment}", off, off, off, OFF, True, note))
    for moment in ("start", "resumed start", "whole weights", "export"):
        weights, count = (exported, 1) if moment == "export" else (trained, processes)
        besides = total(copies(count, BASE | {"encoder": encoder}))
        note = f"without {besides / GIB:.1f} GiB of libraries and encoder, of {weights / GIB:.2f} GiB"
        over = (peaks[moment] - besides) / weights
        claims.append(Claim(f"{name}: memory over the weights, {moment}", over, over, over, MOST, True, note))
    return claims


if __name__ == "__main__":
    main()
