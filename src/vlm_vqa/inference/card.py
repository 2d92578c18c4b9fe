"""The model card: what the model is, how plain transformers computes it, and what it was made from."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlm_vqa.errors import UserError
from vlm_vqa.model.adapters import ADAPTER
from vlm_vqa.params import Params, Start

TRAINED_BY = ("seed", "model.", "vision.", "language.", "prompt.", "train.", "validation.")
KINDS = {"dinov2": "DINOv2", "siglip_vision_model": "SigLIP", "gemma2": "Gemma 2", "gemma": "Gemma"}
"""How people call what configurations call otherwise."""
PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "safetensors", "pillow")
"""What the card's code needs; the card names their versions, which are the same on every machine (constraints.txt)."""

UNSCORED = "Those on val are in the project's `reports/evaluation.json` and in MLflow, found by the weights' hash."


def card(
    params: Params,
    training: dict[str, str],
    results: dict[str, Any],
    data: dict[str, Any],
    kinds: tuple[str, ...] = ("DINOv2", "Gemma 2"),
) -> str:
    """Return the model card, with the hub's fields in its head; evaluation comes later, and `scored` adds it to a copy."""
    place = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=place, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return pages.get_template("card.md").render(
        head=_head(params),
        params=params,
        trained_by=[(name, value) for name, value in params.flat().items() if name.startswith(TRAINED_BY)],
        training=training,
        results=results,
        data=data,
        kinds=kinds,
        python="{}.{}".format(*sys.version_info),
        # A wheel's own suffix, such as +cpu, tells machines apart and cannot be installed by that name.
        packages=" ".join(f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES),
        peft=version("peft"),
        adapter=ADAPTER,
        unscored=UNSCORED,
    )


def _head(params: Params) -> ModelCardData:
    """Return what the hub reads of a card. Only what the hub knows is named there: local folders are in the text."""
    whole = params.model.start is Start.CHECKPOINT
    bases = {params.model.checkpoint: params.model.revision}
    if not whole:
        bases = {one.model: one.revision for one in (params.vision, params.language)}
    on_hub = {str(name): revision for name, revision in bases.items() if revision}
    hub = params.data.hub
    head = ModelCardData(
        language="en",
        license="gemma" if whole or params.language.model != "random" else "apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["visual-question-answering"],
        metrics=["accuracy", "bleu"],
        base_model=list(on_hub) or None,
        datasets=None if hub is None else sorted({hub.train.repository, hub.val.repository}),
    )
    head["base_model_revisions"] = on_hub or None  # ours: the hub's own field has no place for them
    return head


def scored(text: str, report: dict[str, Any], source: str, name: str) -> str:
    """Return a copy of a card that shows the scores of `reports/evaluation.json`, in its text and as the hub's model-index;
    `source` is what `data.source` calls the data, `name` the model's."""
    accuracy = "answer_accuracy" if "answer_accuracy" in report else "vqa_accuracy"
    words, scores, helm = accuracy.replace("_", " ").replace("vqa", "VQA"), report[accuracy], report["helm"]
    found = {
        ("accuracy", words): (scores["overall"], _interval(report, accuracy), scores["questions"], accuracy),
        ("bleu", "BLEU-1, by HELM"): (helm["bleu_1"], _interval(report, "bleu_1"), helm["instances"], "bleu_1"),
    }
    lines = ["| score | value | of | baselines |", "|---|---|---|---|"]
    for (_, title), (value, interval, questions, key) in found.items():
        beside = ", ".join(f"{blind.replace('_', ' ')} {of[key]:.4f}" for blind, of in report["baselines"].items())
        shown = f"{value:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")
        lines.append(f"| {title} | {shown} | {questions:,} questions of val | {beside} |")
    card = ModelCard(text)
    if card.text.count(UNSCORED) != 1:
        raise UserError("the export's card was written by another version or by hand. Run `dvc repro export` first.")
    card.text = card.text.replace(UNSCORED, "\n".join(lines))
    card.data["model_name"] = name
    card.data["eval_results"] = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=source,
            dataset_name=source,
            dataset_split="validation",
            metric_type=kind,
            metric_name=title,
            metric_value=value,
            metric_args={"interval": interval} if interval else None,
        )
        for (kind, title), (value, interval, *_) in found.items()
    ]
    return str(card)


def _interval(report: dict[str, Any], score: str) -> list[float] | None:
    """Return the ends of the model's 95 % interval; None in reports of earlier versions."""
    found = report.get("intervals", {}).get(score)
    return [found["model"]["overall"][end] for end in ("low", "high")] if found else None
