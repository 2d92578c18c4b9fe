"""Is distributed training the same training? Every launch against one process: loss curves and final weights.

`python -m proofs.strategies` needs what the first two stages write (`make repro`). The same questions in the same steps
are trained under each launch of this machine's kind, several ways (`CASES`). A row of the table says how far the final
weights are from those of one process, relative to how far training moved them: |a - b| / |a - start|. Dropout is 0, since
every launch would draw other numbers.

With 8-bit states a launch that divides parameters has other blocks of 256 values, so its weights may differ by as much as
8-bit AdamW differs from 32-bit AdamW in one process, and no more.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from benchmarks import begin, measure
from benchmarks.measure import Claim
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.data.records import read_manifest
from vlm_vqa.errors import UserError
from vlm_vqa.model.adapters import add_adapters, merge_adapters
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.vlm import VlmForTraining, freeze_embeddings, initial_model
from vlm_vqa.params import LoraParams, Mask, Optimizer, Params, load_params
from vlm_vqa.training import launch
from vlm_vqa.training.dataset import Collator
from vlm_vqa.training.optimizer import local, state_types
from vlm_vqa.training.prepare import FEATURES, RECORDS, build_once, prepare
from vlm_vqa.training.rows import named_parameters, rows_held
from vlm_vqa.training.trainer import VqaTrainer, training_arguments

ONE = "cpu"
LAUNCHES = {"cpu": 1, "cpu-ddp": 2, "cpu-fsdp2": 2, "cpu-fsdp2-uneven": 3, "cpu-zero2": 2, "cpu-zero3": 2}
"""By processes. Three divide no matrix of a power of two evenly; that launch is made here."""
QUESTIONS = 48
"""A step's; 1, 2 and 3 processes and 4 passes divide it."""
TARGET = 1e-4


@dataclass(frozen=True)
class Case:
    """One way to train."""

    name: str
    shared_rows: bool = True
    optimizer: Optimizer = Optimizer.ADAMW_TORCH
    accumulation: int = 1
    recomputed: bool = False
    percentile_clipping: int = 100
    lora: LoraParams | None = None
    phased: bool = False
    """Projector and embedding have rates of their own, and the projector alone is trained for the first third."""
    in_backward: bool = False
    """Weights are updated in the backward pass, and attention's scores computed a second time there; nothing is clipped to a
    global norm."""
    spoilt: bool = False
    """The last process reads other images: what the comparison must notice."""

    def runs_under(self, name: str) -> bool:
        """Whether a launch can do it: ZeRO hides the norms that clipping needs, it and DDP add gradients up in buckets, and
        one process has no other."""
        clipped = self.percentile_clipping != 100 and "zero" in name
        in_buckets = self.in_backward and name not in (ONE, "cpu-fsdp2", "cpu-fsdp2-uneven")
        return not clipped and not in_buckets and (not self.spoilt or name == "cpu-ddp")


CASES = (
    Case("shared rows"),
    Case("one question a row", shared_rows=False),
    Case("shared rows, 4 passes", accumulation=4, recomputed=True),
    Case("shared rows, 8 bits", optimizer=Optimizer.ADAMW_BNB_8BIT),
    Case("one question a row, 8 bits", shared_rows=False, optimizer=Optimizer.ADAMW_BNB_8BIT),
    Case("shared rows, 8 bits, clipped", optimizer=Optimizer.ADAMW_BNB_8BIT, percentile_clipping=95),
    Case("shared rows, adapters", lora=LoraParams(rank=4, alpha=8.0, dropout=0.0, targets=("q_proj", "down_proj"))),
    Case("rates and projector phase, 4 passes", accumulation=4, recomputed=True, phased=True),
    Case("rates and projector phase, 8 bits", optimizer=Optimizer.ADAMW_BNB_8BIT, phased=True),
    Case(
        "rates and projector phase, 8 bits, clipped",
        optimizer=Optimizer.ADAMW_BNB_8BIT,
        percentile_clipping=95,
        phased=True,
    ),
    Case("updates in the backward pass", in_backward=True),
    Case(
        "updates in the backward pass, phase, 8 bits, clipped",
        optimizer=Optimizer.ADAMW_BNB_8BIT,
        percentile_clipping=95,
        phased=True,
        in_backward=True,
    ),
    Case("one process misled", spoilt=True),
)
REFERENCE = {"shared rows, 4 passes": "shared rows", "one process misled": "shared rows"}
"""Cases that are compared with another one under one process; the others with themselves."""


# --- in each process of a launch -------------------------------------------------------------------------------------


def work(name: str, folder: Path, steps: int, cases: Sequence[Case]) -> None:
    """Train every case under a launch that `accelerate launch` has started; write weights and losses to `folder`."""
    params = load_params()
    encoder = load_encoder(params.vision, device="cpu")
    features = FeatureStore(FEATURES, {"encoder_hash": encoder.hash})
    for case in cases:
        if case.runs_under(name):
            trainer = _trainer(params, case, name, folder, steps, encoder, features)
            trainer.train()
            weights = trainer.whole_weights()
            if trainer.launch.main:
                weights = weights if case.lora is None else merge_adapters(weights, case.lora)
                save_file(
                    {key: value.contiguous() for key, value in weights.items()},
                    _path(folder, name, case, "safetensors"),
                )
                losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
                facts = {"losses": losses, "states": state_types(trainer.inner_optimizer), **trainer.facts}
                _path(folder, name, case, "json").write_text(json.dumps(facts))
            if case.lora is None:
                _check_saved(trainer, _path(folder, name, case, "safetensors"))


def _trainer(
    params: Params, case: Case, name: str, folder: Path, steps: int, encoder, features: FeatureStore
) -> VqaTrainer:
    per_row = params.train.questions_per_row if case.shared_rows else 1
    rate = params.train.learning_rate
    apart = {"projector_learning_rate": 3 * rate, "embedding_learning_rate": rate / 3, "projector_steps": steps // 3}
    train = dataclasses.replace(
        params.train,
        launch=name,
        batch_size=QUESTIONS // LAUNCHES[name] // case.accumulation,
        gradient_accumulation_steps=case.accumulation,
        optimizer=case.optimizer,
        dropout=0.0,
        logging_steps=1,
        percentile_clipping=case.percentile_clipping,
        lora=case.lora,
        freeze_embeddings=case.lora is not None,
        questions_per_row=per_row,
        dataloader_workers=0,
        save_steps=10**9,
        max_grad_norm=0.0 if case.in_backward else params.train.max_grad_norm,
        optimizer_in_backward=case.in_backward,
        attention_checkpointing=case.in_backward,
        gradient_checkpointing=case.recomputed,
        **(apart if case.phased else {}),
    )
    running = launch.start(train, folder)
    data, layout, processor = prepare(params, encoder)
    count = min(len(data), steps * QUESTIONS)
    data.head(count)
    train = dataclasses.replace(train, num_train_epochs=math.ceil(steps * QUESTIONS / count))

    def build() -> VlmForTraining:
        model, start = (
            initial_model(params.language, encoder.model.config, processor, params.seed),
            folder / "start.safetensors",
        )
        if name == ONE and not start.exists():
            save_file({key: value.detach() for key, value in named_parameters(model).items()}, start)
        if case.lora is not None:
            freeze_embeddings(model)
            add_adapters(model, case.lora)
        return model

    model = build_once(build, running)
    misled = case.spoilt and running.process == running.processes - 1
    shown: Any = Misleading(features) if misled else features
    arguments = training_arguments(train, params.seed, folder / "unused", running)
    return VqaTrainer(model, arguments, train, data, Collator(layout, shown), [], running)


@dataclass(frozen=True)
class Misleading:
    """A feature store that shows each image upside down."""

    features: FeatureStore

    live = False

    def inputs(self, image_ids: Sequence[int]) -> dict[str, Tensor]:
        return self.features.inputs(image_ids)

    def of(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.features.of(inputs).flip(1)


def _check_saved(trainer: VqaTrainer, path: Path) -> None:
    """Compare the saved weights with the rows that this process holds; ZeRO keeps them in pieces of its own."""
    if distributed.is_initialized():
        distributed.barrier()
    if trainer.launch.strategy.deepspeed:
        return
    saved = load_file(path)
    for name, parameter in named_parameters(trainer.model).items():
        rows = rows_held(parameter)
        assert torch.equal(saved[name][rows.start : rows.stop], local(parameter)), f"{name} is not what was saved"


def _path(folder: Path, name: str, case: Case, suffix: str) -> Path:
    return folder / f"{name}, {case.name}.{suffix}"


# --- around them -----------------------------------------------------------------------------------------------------


def start(name: str, folder: Path, steps: int, cases: Sequence[Case]) -> None:
    """Run `work` under a launch.

    Raises:
        UserError: it failed; what it said is shown.
    """
    command = [
        "accelerate",
        "launch",
        "--quiet",
        "--config_file",
        str(folder / f"{name}.yaml"),
        "-m",
        "proofs.strategies",
        "--worker",
        name,
        "--folder",
        str(folder),
        "--steps",
        str(steps),
        "--cases",
        *(case.name for case in cases),
    ]
    here = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (here / "src", here)))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode != 0:
        said = re.search(r"strategies: (?:error: )?(.*)", done.stderr)
        raise UserError(f"{name}: {said[1] if said else 'failed:' + chr(10) + done.stderr[-9000:]}")


def launch_files(folder: Path) -> None:
    """Write the launch files that are used here: those of the project, and one of three processes."""
    for name, processes in LAUNCHES.items():
        asked = yaml.safe_load((Path("launch") / f"{name.removesuffix('-uneven')}.yaml").read_text(encoding="utf-8"))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(asked | {"num_processes": processes}), encoding="utf-8")


def distances(folder: Path, names: Sequence[str], cases: Sequence[Case]) -> dict[str, dict[str, dict[str, float]]]:
    """Return, by case and launch, how far `weights` and `loss` (the largest difference of a step, relative) are off."""
    begin = _flat(load_file(folder / "start.safetensors"))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases:
        reference = next(other for other in CASES if other.name == REFERENCE.get(case.name, case.name))
        one, losses = _outcome(folder, ONE, reference)
        for name in names:
            if case.runs_under(name) and (name != ONE or case is not reference):
                weights, curve = _outcome(folder, name, case)
                found.setdefault(case.name, {})[name] = {
                    "weights": ((weights - one).norm() / (one - begin).norm()).item(),
                    "loss": max(abs(a - b) / abs(b) for a, b in zip(curve, losses, strict=True)),
                }
    return found


def _outcome(folder: Path, name: str, case: Case) -> tuple[Tensor, list[float]]:
    return _flat(load_file(_path(folder, name, case, "safetensors"))), _facts(folder, name, case)["losses"]


def _facts(folder: Path, name: str, case: Case) -> dict[str, Any]:
    return json.loads(_path(folder, name, case, "json").read_text(encoding="utf-8"))


def _flat(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


def between_bits(folder: Path) -> dict[str, float]:
    """Return how far 8-bit from 32-bit AdamW is in one process, by case of 8 bits; neither clipped by percentile."""
    begin = _flat(load_file(folder / "start.safetensors"))
    found = {}
    for case in CASES:
        alike = [c for c in CASES if (c.shared_rows, c.phased) == (case.shared_rows, case.phased)]
        plain = [other for other in alike if other.percentile_clipping == 100]
        pair = [
            next(c for c in plain if c.optimizer is kind) for kind in (Optimizer.ADAMW_TORCH, Optimizer.ADAMW_BNB_8BIT)
        ]
        there = all(_path(folder, ONE, which, "json").exists() for which in (case, *pair))
        if case.optimizer is Optimizer.ADAMW_BNB_8BIT and there:
            wide, narrow = (_outcome(folder, ONE, which)[0] for which in pair)
            found[case.name] = ((wide - narrow).norm() / (wide - begin).norm()).item()
    return found


def claims(found: Mapping[str, Mapping[str, Mapping[str, float]]], bits: Mapping[str, float]) -> list[Claim]:
    """Return a claim a case: the worst launch, with the best and the worst as its range."""
    made = []
    for name, launches in found.items():
        off = [distance["weights"] for distance in launches.values()]
        if name in bits:
            made.append(
                Claim(
                    f"{name}: a launch's distance from one process over that of 8 from 32 bits",
                    max(off) / bits[name],
                    min(off) / bits[name],
                    max(off) / bits[name],
                    1.0,
                    True,
                )
            )
        elif name == "one process misled":
            made.append(Claim(f"{name}: distance from one process", max(off), min(off), max(off), 100 * TARGET))
        else:
            made.append(
                Claim(f"{name}: a launch's distance from one process", max(off), min(off), max(off), TARGET, True)
            )
    wide = {case.name for case in CASES if case.optimizer is Optimizer.ADAMW_TORCH and not case.spoilt}
    losses = [d["loss"] for name, launches in found.items() for d in launches.values() if name in wide]
    made.append(
        Claim(
            "32 bits: largest relative difference of a step's loss", max(losses), min(losses), max(losses), TARGET, True
        )
    )
    return made


def table(
    found: Mapping[str, Mapping[str, Mapping[str, float]]], bits: Mapping[str, float], names: Sequence[str]
) -> str:
    """Return distances of weights as a Markdown table, a row a case, a column a launch."""
    lines = [f"| {' | '.join(['', *names, '8 from 32 bits'])} |", "|---" * (len(names) + 2) + "|"]
    for case, launches in ((case.name, found[case.name]) for case in CASES if case.name in found):
        cells = [f"{launches[name]['weights']:.1e}" if name in launches else "" for name in names]
        lines.append(f"| {' | '.join([case, *cells, f'{bits[case]:.1e}' if case in bits else ''])} |")
    return "\n".join(lines)


def compare(names: Sequence[str], steps: int, cases: Sequence[Case], results: Path) -> None:
    """Train all and write `strategies.json`.

    Raises:
        UserError: the mask cannot share rows, or the first two stages have not run.
    """
    params = load_params()
    if params.prompt.mask is Mask.PREFIX_LM:
        raise UserError("prompt.mask must be image-prefix or causal: rows are to be shared.")
    read_manifest(RECORDS)
    FeatureStore(FEATURES, {"encoder_hash": load_encoder(params.vision, device="cpu").hash})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        launch_files(folder)
        for name in names:
            print(f"{name} ...", flush=True)
            start(name, folder, steps, cases)
        found, bits = distances(folder, names, cases), between_bits(folder)
        states = {c.name: {n: _facts(folder, n, c)["states"] for n in names if c.runs_under(n)} for c in cases}
        losses = len(_facts(folder, names[0], cases[0])["losses"])
    print(table(found, bits, names))
    details: dict[str, Any] = {
        "losses": losses,
        "questions_a_step": QUESTIONS,
        "distances": found,
        "8_from_32_bits": bits,
        "states": states,
    }
    data = {"questions and pictures": params.data.source.value}
    measure.write("strategies", claims(found, bits), details, data, results)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare what is asked for; a process of a launch does its part."""
    parser = measure.parser("strategies", __doc__, "proofs", steps=32)
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument(
        "--cases", nargs="+", choices=[case.name for case in CASES], default=[case.name for case in CASES]
    )
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder for strategies.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    begin()
    options = parser.parse_args(arguments)
    chosen = [case for case in CASES if case.name in options.cases]
    if options.worker:
        work(options.worker, options.folder, options.steps, chosen)
    else:
        measure.check_writable(options.results)
        compare(options.launches, options.steps, chosen, options.results)


if __name__ == "__main__":
    main()
