"""The model card: what the model is, how plain transformers computes it, and what it was made from."""

import sys
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vlm_vqa.errors import UserError
from vlm_vqa.model.adapters import ADAPTER
from vlm_vqa.params import Mask, Params, Start

TRAINED_BY = ("seed", "model.", "vision.", "language.", "prompt.", "train.", "validation.")
KINDS = {"dinov2": "DINOv2", "siglip_vision_model": "SigLIP", "gemma2": "Gemma 2", "gemma": "Gemma"}
"""How people call what configurations call otherwise."""
PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "safetensors", "pillow")
"""What the card's code needs; the card names their versions, which are the same on every machine (constraints.txt)."""

SEEN = {
    "facebook/dinov2": ", self-supervised on LVD-142M: 142 million pictures without labels",
    "google/siglip": ", on pictures and their texts from the web (WebLI)",
    "google/paligemma": ", first on pictures and their texts from the web (WebLI)",
}
"""What a tower was pretrained on, as its makers say; by how their names for it begin."""
LICENSES = {
    "gemma": (
        "Gemma's weights are inside. Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms, and who passes this on must say so, too."
    ),
    "apache-2.0": "Apache 2.0: the language model began with random weights; DINOv2's and SigLIP's license is the same.",
}
UNSCORED = "Those on val are in the project's `reports/evaluation.json` and in MLflow, found by the weights' hash."

# Its processor marks a whole prompt as one bidirectional block, which is prefix-lm.
TYPE_IDS_LINES = dict.fromkeys(Mask, "") | {
    Mask.IMAGE_PREFIX: (
        'inputs["token_type_ids"] = (inputs["input_ids"] != model.config.image_token_id).long()'
        "  # image-prefix: text is causal\n"
    ),
}
PLAIN_USE = dict.fromkeys(
    Mask, "Whatever opens this folder with `transformers` computes the trained function: processor, pipeline or server."
) | {
    Mask.IMAGE_PREFIX: (
        "**Only the code below computes the trained function.** The mask of the training is `image-prefix`, which no\n"
        "processor of `transformers` expresses: with pipelines and servers the whole prompt sees the whole prompt. Their\n"
        "answers are mostly the same, their probabilities are not the model's. For them, train with `prompt.mask: causal`."
    )
}

ADAPTER_SECTION = f"""
## The adapter

`{ADAPTER}/` is what training has changed, in peft's format: low-rank adapters on Gemma 2's layers, and the projector. The
weights here are the base's with it merged in. One base serves many adapters: `vlm-vqa base base` writes it to the folder
`base`, in the project that this was trained in. After `pip install peft=={{peft}}`, these lines give the model of above:

```
from peft import PeftModel
base = AutoModelForImageTextToText.from_pretrained("base", attn_implementation="eager")
model = PeftModel.from_pretrained(base, folder + "/{ADAPTER}")
```
"""


def card(
    params: Params,
    training: dict[str, str],
    results: dict[str, Any],
    data: dict[str, Any],
    kinds: tuple[str, ...] = ("DINOv2", "Gemma 2"),
) -> str:
    """Return the model card, with the hub's fields in its head; evaluation comes later, and `scored` adds it to a copy."""
    template = Template((Path(__file__).parent / "card.md").read_text(encoding="utf-8"))
    splits = "\n".join(
        f"- {name}: {counts['questions']:,} questions on {counts['images']:,} images"
        + (f"; {dropped:,} bad records were left out" if (dropped := counts.get("dropped")) else "")
        for name, counts in data["splits"].items()
    )
    # A wheel's own suffix, such as +cpu, tells machines apart and cannot be installed by that name.
    pins = " ".join(f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES)
    head = _head(params)
    return template.substitute(
        head=head.to_yaml(),
        license=LICENSES[str(head.license)],
        scores=UNSCORED,
        python="{}.{}".format(*sys.version_info),
        packages=pins,
        tower_kind=kinds[0],
        processor="LlavaProcessor" if params.prompt.mask is Mask.CAUSAL else "PaliGemmaProcessor",
        gemma=kinds[1],
        **_starts(params),
        source=data["source"],
        splits=splits,
        notes="\n".join(f"- {note}" for note in data["notes"]),
        mask=params.prompt.mask.value,
        plain_use=PLAIN_USE[params.prompt.mask],
        type_ids=TYPE_IDS_LINES[params.prompt.mask],
        adapter="" if params.train.lora is None else ADAPTER_SECTION.format(peft=version("peft")),
        hashes="\n".join(f"- {name}: `{value}`" for name, value in sorted(training.items())),
        results="\n".join(f"- {name}: {value}" for name, value in sorted(results.items())),
        params="\n".join(f"{name}: {value}" for name, value in params.flat().items() if name.startswith(TRAINED_BY)),
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
    """Return a copy of a card that shows the scores of `reports/evaluation.json`, in its text and as the hub's model-index.

    Args:
        source: what `data.source` calls the data.
        name: the model's.
    """
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


def _starts(params: Params) -> dict[str, str]:
    """Return what the card says of where the weights come from."""
    if params.model.start is Start.CHECKPOINT:
        whole = f"`{params.model.checkpoint}`, revision {params.model.revision or 'none: local'}"
        names = {
            "vision": f"of {whole}",
            "language": "of the same checkpoint",
            "tower": f"the checkpoint's, as it was{_seen(params.model.checkpoint)}",
        }
        return names | {"projector_start": "the checkpoint's weights", "language_start": "the checkpoint's too"}
    parts = {"vision": params.vision, "language": params.language}
    names = {key: f"`{one.model}`, revision {one.revision or 'none: local'}" for key, one in parts.items()}
    tower = f"`{params.vision.model}` as its authors pretrained it{_seen(params.vision.model)}"
    if params.vision.model == "small":
        tower = (
            "the project's small one, pretrained on drawn pictures with labels for shape and colour: those that easy-VQA "
            "asks about"
        )
    language = "random weights too" if params.language.model == "random" else "its authors' weights"
    return names | {"projector_start": "random weights", "language_start": language, "tower": tower}


def _seen(model: str | None) -> str:
    return next((seen for name, seen in SEEN.items() if (model or "").startswith(name)), "")


def _interval(report: dict[str, Any], score: str) -> list[float] | None:
    """Return the ends of the model's 95 % interval; None in reports of earlier versions."""
    found = report.get("intervals", {}).get(score)
    return [found["model"]["overall"][end] for end in ("low", "high")] if found else None
