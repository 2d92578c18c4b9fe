"""The exported folder: a stock model and processor that plain transformers opens, with a card that says how."""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from vlm_vqa.errors import UserError, make_again
from vlm_vqa.inference.card import KINDS, card
from vlm_vqa.inference.predictor import FACTS_FILE
from vlm_vqa.inference.processor import export_processor
from vlm_vqa.model.adapters import ADAPTER
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.model.vlm import TRAINING_FILE, hash_weights, load_trained, special_tokens, trained_state
from vlm_vqa.params import Params
from vlm_vqa.sealed import aside, read_folder, write_folder

CARD = "README.md"
RETRAIN = make_again("train")


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
        processor: of the training; that of the export is made of it.
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
    mask, instruction = params.prompt.mask, params.prompt.instruction
    export_processor(processor, mask, instruction, model.config.vision_config).save_pretrained(folder)
    facts = {
        "instruction": instruction,
        "mask": mask.value,
        "num_patches": params.vision.num_patches,
        "text_length": params.prompt.text_length,
        "step": results["kept_step"],
        "step_is": results["kept_because"],
        "selected_on": selected_on,
        "weights_hash": weights_hash,
    }
    write_folder(folder / FACTS_FILE, facts)
