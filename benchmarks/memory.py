"""How much memory an optimizer step takes, against the reference recipe; each measurement in a process of its own.

    python -m benchmarks.memory

Two layers of Gemma 2 2B's shape, the last of which ours computes at supervised positions only, with vocabulary 256,000,
float32, optimizer apart:

    step         the reference's first two of ten equal micro-batches (the second adds to gradients), all of ours
    frozen step  the same with the token embedding, which is the output head too, frozen
    logits       6 questions, embedding frozen, with and without logits: without, the head has 8 outputs. The dense gradient
                 of the embedding, which both recipes have, would hide what logits and loss take

Memory is the process's resident set on Linux and what torch allocates on a GPU. About 8 minutes on 2 quiet cores; 18 GiB.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from benchmarks import measure, recipes
from benchmarks.measure import Claim
from benchmarks.recipes import Recipe
from benchmarks.training_step import GEMMA_2B, GEMMA_VOCABULARY
from benchmarks.workload import Workload, data, draw_step, read_questions
from vlm_vqa.errors import UserError
from vlm_vqa.model.vlm import VlmForTraining, freeze_embeddings
from vlm_vqa.params import LanguageConfig

SHAPE = replace(GEMMA_2B, num_hidden_layers=2)
HEAD_WITHOUT_LOGITS = 8
"""Outputs; 6 x 321 of them are 60 kB."""
RECIPES = ("reference", "ours")
KINDS = ("step", "frozen", "logits", "no_logits")
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and write `memory.json`."""
    parser = measure.parser("memory", __doc__)
    parser.add_argument(
        "--one",
        metavar="RECIPE,KIND",
        choices=[f"{one},{kind}" for one in RECIPES for kind in KINDS],
        help="measure in this process and print JSON",
    )
    options = measure.parse(parser, arguments)
    if options.one:
        print(json.dumps(measure_one(*options.one.split(","), draw_step(read_questions()), SHAPE, GEMMA_VOCABULARY)))
        return
    found = {}
    for kind in KINDS:
        for recipe in RECIPES:
            found[kind, recipe] = in_a_process(recipe, kind)
            print(f"  {kind:<10} {recipe:<10} {found[kind, recipe]} MiB", flush=True)
    details = {
        "shape": asdict(SHAPE) | {"vocabulary": GEMMA_VOCABULARY},
        "unit": "MiB; peak of the process, without = peak - memory before the step - gradients",
        **{kind: {recipe: found[kind, recipe] for recipe in RECIPES} for kind in KINDS},
    }
    measure.write("memory", claims_of(found), details, data())


def in_a_process(recipe: str, kind: str) -> dict[str, float]:
    """Run `measure_one` in a fresh process.

    Raises:
        UserError: it did not come to its end.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "--one", f"{recipe},{kind}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{recipe}, {kind}: its process {measure.ended(done.returncode)}. It takes up to 18 GiB.")
    return json.loads(done.stdout.splitlines()[-1])


def measure_one(name: str, kind: str, workload: Workload, shape: LanguageConfig, vocabulary: int) -> dict[str, float]:
    """Compute loss and gradients once and return the memory it took.

    Args:
        name: of the recipe, one of `RECIPES`; kind: one of `KINDS`.

    Returns:
        In MiB: `peak`, `before` (weights and libraries), `gradients`, and `without`, the peak without the other two.
    """
    if kind in ("logits", "no_logits"):
        workload = replace(workload, questions=workload.questions[: workload.micro_batch])
    model = recipes.build_model(shape, vocabulary, workload)
    recipe = build_recipe(name, model, workload, trim=kind == "no_logits")
    if kind != "step":
        freeze_embeddings(model)
    # The second micro-batch meets the gradients of the first; all further ones are like it.
    batches = recipe.batches[:2] if name == "reference" else recipe.batches
    before = reset_peak()
    recipe.run(batches)
    peak = read_peak()
    gradients = sum(one.grad.nbytes for one in recipe.model.parameters() if one.grad is not None) / MIB
    sizes = {"peak": peak, "before": before, "gradients": gradients, "without": peak - before - gradients}
    return {key: round(value, 1) for key, value in sizes.items()}


def build_recipe(name: str, model: VlmForTraining, workload: Workload, trim: bool) -> Recipe:
    """Return the recipe called `name`; with `trim`, of a model whose head and labels are of a few tokens."""
    used = recipes.stock_model(model) if name == "reference" else model
    recipe = getattr(recipes, name)(used, workload)
    if trim:
        text: Any = used.config.text_config
        used.lm_head = nn.Linear(text.hidden_size, HEAD_WITHOUT_LOGITS, device=measure.device())
        text.vocab_size = HEAD_WITHOUT_LOGITS
        for batch in recipe.batches:
            batch.inputs["labels"].clamp_(max=HEAD_WITHOUT_LOGITS - 1)
    return recipe


def reset_peak() -> float:
    """Forget the peak so far; return the memory held now, in MiB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MIB
    # What building left free inside the process would hide what the step takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss / MIB


def read_peak() -> float:
    """Return the greatest memory held since `reset_peak`, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def claims_of(found: dict[tuple[str, str], dict[str, float]]) -> list[Claim]:
    """Turn the measurements, by (kind, recipe), into ratios; each was made once."""

    def once(what: str, ratio: float, **options: Any) -> Claim:
        return Claim(what, ratio, ratio, ratio, **options)

    def of(kind: str, recipe: str, key: str = "peak") -> float:
        return found[kind, recipe][key]

    logits = {name: max(of("logits", name) - of("no_logits", name), 0.0) for name in RECIPES}
    named = "memory, 2B shape, 2 layers: "
    claims = []
    for kind, state in (("step", ""), ("frozen", ", embedding frozen")):
        total = of(kind, "ours") / of(kind, "reference")
        besides = of(kind, "ours", "without") / of(kind, "reference", "without")
        claims.append(once(f"{named}peak{state}", total))
        claims.append(once(f"{named}besides weights and gradients{state}", besides))
    claims.append(
        once(
            f"{named}logits and loss of 6 questions",
            logits["ours"] / logits["reference"],
            target=0.333,
            at_most=True,
            note=f"{logits['ours']:.0f} against {logits['reference']:.0f} MiB",
        )
    )
    for name in RECIPES:
        claims.append(once(f"{named}embedding frozen against trained, {name}", of("frozen", name) / of("step", name)))
    return claims


if __name__ == "__main__":
    main()
