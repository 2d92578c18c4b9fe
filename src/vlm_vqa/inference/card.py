"""The model card: what the model is, how plain transformers computes it, and what it was made from."""

import sys
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from vlm_vqa.model.adapters import ADAPTER
from vlm_vqa.params import Mask, Params, Start

TRAINED_BY = ("seed", "model.", "vision.", "language.", "prompt.", "train.", "validation.")
KINDS = {"dinov2": "DINOv2", "siglip_vision_model": "SigLIP", "gemma2": "Gemma 2", "gemma": "Gemma"}
"""How people call what configurations call otherwise."""
PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "safetensors", "pillow")
"""What the card's code needs; the card names their versions, which are the same on every machine (constraints.txt)."""

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
    """Return the model card; evaluation comes later and is in `reports/` and MLflow."""
    template = Template((Path(__file__).parent / "card.md").read_text(encoding="utf-8"))
    splits = "\n".join(
        f"- {name}: {counts['questions']:,} questions on {counts['images']:,} images"
        + (f"; {dropped:,} bad records were left out" if (dropped := counts.get("dropped")) else "")
        for name, counts in data["splits"].items()
    )
    # A wheel's own suffix, such as +cpu, tells machines apart and cannot be installed by that name.
    pins = " ".join(f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES)
    return template.substitute(
        python="{}.{}".format(*sys.version_info),
        packages=pins,
        tower_kind=kinds[0],
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


def _starts(params: Params) -> dict[str, str]:
    """Return what the card says of where the weights come from."""
    if params.model.start is Start.CHECKPOINT:
        whole = f"`{params.model.checkpoint}`, revision {params.model.revision or 'none: local'}"
        names = {"vision": f"of {whole}", "language": "of the same checkpoint", "tower": "the checkpoint's, as it was"}
        return names | {"projector_start": "the checkpoint's weights", "language_start": "the checkpoint's too"}
    parts = {"vision": params.vision, "language": params.language}
    names = {key: f"`{one.model}`, revision {one.revision or 'none: local'}" for key, one in parts.items()}
    tower = f"`{params.vision.model}` as its authors pretrained it"
    if params.vision.model == "small":
        tower = (
            "the project's small one, pretrained on drawn pictures with labels for shape and colour: those that easy-VQA "
            "asks about"
        )
    language = "random weights too" if params.language.model == "random" else "its authors' weights"
    return names | {"projector_start": "random weights", "language_start": language, "tower": tower}
