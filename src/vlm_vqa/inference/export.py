"""The exported folder: a stock model and processor that plain transformers opens, with a card that says how."""

import copy
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from vlm_vqa.errors import UserError, make_again
from vlm_vqa.inference.predictor import FACTS_FILE
from vlm_vqa.model.adapters import ADAPTER
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.model.vlm import TRAINING_FILE, hash_weights, load_trained, special_tokens, trained_state
from vlm_vqa.params import Mask, Params, Start
from vlm_vqa.sealed import aside, read_folder, write_folder

CARD = "README.md"
TRAINED_BY = ("seed", "model.", "vision.", "language.", "prompt.", "train.", "validation.")
KINDS = {"dinov2": "DINOv2", "siglip_vision_model": "SigLIP", "gemma2": "Gemma 2", "gemma": "Gemma"}
"""How people call what configurations call otherwise."""
PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "safetensors", "pillow")
"""What the card's code needs; the card names their versions, which are the same on every machine (constraints.txt)."""
RETRAIN = make_again("train")

# The stock processor marks a whole prompt as one bidirectional block, which is prefix-lm.
TYPE_IDS_LINES = {
    Mask.PREFIX_LM: "",
    Mask.IMAGE_PREFIX: (
        'inputs["token_type_ids"] = (inputs["input_ids"] != model.config.image_token_id).long()'
        "  # image-prefix: text is causal\n"
    ),
    Mask.CAUSAL: 'inputs.pop("token_type_ids")  # causal: no block is bidirectional\n',
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


def join(folder: str | Path, encoder: Encoder, weights_hash: str) -> PaliGemmaForConditionalGeneration:
    """Join the trained weights of `folder` and the frozen tower into one stock model, float32, in evaluation mode.

    Call `read_training` before it: that finds damaged files.

    Raises:
        UserError: the weights do not have the hash that training named.
    """
    model = stock_model(PaliGemmaConfig.from_pretrained(folder, trust_remote_code=False), encoder)
    load_trained(model, folder)
    if (found := hash_weights(trained_state(model))) != weights_hash:
        raise UserError(f"{folder}: the weights have hash {found[:12]}, training wrote {weights_hash[:12]}. {RETRAIN}")
    return model


def stock_model(config: PaliGemmaConfig, encoder: Encoder) -> PaliGemmaForConditionalGeneration:
    """Return a stock model, float32, in evaluation mode, with the encoder as its tower and nothing else in it yet."""
    # A copy: the configuration may be another model's own, whose attention this would change.
    config = copy.deepcopy(config)
    model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.model.vision_tower.load_state_dict({name: v.float() for name, v in encoder.model.state_dict().items()})
    return model.eval()


def read_training(folder: str | Path) -> dict[str, str]:
    """Return the hashes of weights, parameters, data, encoder and code, every file of the folder found as it was written.

    Raises:
        UserError: one is missing or damaged.
    """
    return read_folder(Path(folder) / TRAINING_FILE, "the seal of a training", RETRAIN)


def write_export(
    folder: Path,
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    params: Params,
    training: dict[str, str],
    results: dict[str, Any],
    data: dict[str, Any],
    adapter: Path | None = None,
) -> None:
    """Write model, processor, facts and card.

    Args:
        training: as `read_training` gives it.
        results: `reports/train.json`.
        data: the manifest of `data/records`.
        adapter: where it is, if `train.lora` has made one.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if params.train.lora is not None and adapter is not None:
        # DVC's files cannot be written to, which a copy need not keep.
        shutil.copytree(adapter, folder / ADAPTER, copy_function=shutil.copyfile)
    parts: Any = (model.config.vision_config, model.config.text_config)
    kinds = tuple(KINDS[part.model_type] for part in parts)
    (folder / CARD).write_text(card(params, training, results, data, kinds), encoding="utf-8")
    _write_model(folder, model, processor, params, training["weights_hash"], results, params.validation.selected_on)


def write_base(
    folder: Path,
    start: PaliGemmaForConditionalGeneration,
    encoder: Encoder,
    processor: PaliGemmaProcessor,
    params: Params,
) -> str:
    """Write the model before the first step as an export that was never trained, without a card; return its weights' hash.

    Adapters are of it: kept once, it serves all that were trained from it.

    Raises:
        UserError: something is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already. Name a new folder.")
    weights = trained_state(start)
    model, weights_hash = stock_model(start.config, encoder), hash_weights(weights)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    results = {"kept_step": 0, "kept_because": "before the first step"}
    with aside(folder) as part:
        _write_model(part, model, processor, params, weights_hash, results, "nothing")
    return weights_hash


def _write_model(
    folder: Path,
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    params: Params,
    weights_hash: str,
    results: dict[str, Any],
    selected_on: str,
) -> None:
    """Write model and processor, and seal them with what else is in the folder."""
    model.generation_config.update(
        max_new_tokens=params.evaluation.max_new_tokens, do_sample=False, **special_tokens(processor.tokenizer)
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    facts = {
        "instruction": params.prompt.instruction,
        "mask": params.prompt.mask.value,
        "num_patches": params.vision.num_patches,
        "text_length": params.prompt.text_length,
        "step": results["kept_step"],
        "step_is": results["kept_because"],
        "selected_on": selected_on,
        "weights_hash": weights_hash,
    }
    write_folder(folder / FACTS_FILE, facts)


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
        instruction=repr(params.prompt.instruction),
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
