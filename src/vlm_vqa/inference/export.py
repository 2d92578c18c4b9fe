"""The exported folder: a stock model and processor that plain transformers opens, with a card that says how."""

import copy
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
)

from vlm_vqa.errors import UserError, make_again
from vlm_vqa.inference.card import KINDS, card
from vlm_vqa.inference.predictor import FACTS_FILE
from vlm_vqa.inference.processor import export_processor
from vlm_vqa.model.adapters import ADAPTER
from vlm_vqa.model.checkpoint import HEAD
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.model.vlm import (
    TRAINING_FILE,
    VISION_PREFIX,
    WEIGHTS_FILE,
    StoredWeights,
    hash_weights,
    special_tokens,
    trained_state,
)
from vlm_vqa.params import Params
from vlm_vqa.sealed import aside, read_folder, write_folder

CARD = "README.md"
SHARD = "5GB"  # a larger model is stored in several files, of so much at most
RETRAIN = make_again("train")


def read_training(folder: str | Path) -> dict[str, str]:
    """Return the hashes of weights, parameters, data, encoder and code, every file of the folder found as it was written.

    UserError: one is missing or damaged.
    """
    return read_folder(Path(folder) / TRAINING_FILE, "the seal of a training", RETRAIN)


def write_export(
    folder: Path,
    trained: Path,
    encoder: Encoder,
    params: Params,
    training: dict[str, str],
    results: dict[str, Any],
    data: dict[str, Any],
) -> None:
    """Write model, processor, facts and card, and the adapter, if `train.lora` has made one.

    `trained` holds weights, processor and adapter, of which `read_training`, called before, gives `training` and finds
    damage; `results` is `reports/train.json`, `data` the manifest of `data/records`.
    UserError: the weights do not have the hash that training named.
    """
    weights, named = StoredWeights(trained / WEIGHTS_FILE), training["weights_hash"]
    if (found := hash_weights(weights)) != named:
        raise UserError(f"{trained}: the weights have hash {found[:12]}, training wrote {named[:12]}. {RETRAIN}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if params.train.lora is not None:
        # DVC's files cannot be written to, which a copy need not keep.
        shutil.copytree(trained / ADAPTER, folder / ADAPTER, copy_function=shutil.copyfile)
    config = PaliGemmaConfig.from_pretrained(trained, trust_remote_code=False)
    parts: Any = (config.vision_config, config.text_config)
    kinds = tuple(KINDS[part.model_type] for part in parts)
    (folder / CARD).write_text(card(params, training, results, data, kinds), encoding="utf-8")
    processor = AutoProcessor.from_pretrained(trained, trust_remote_code=False)
    selected = (results["kept_step"], results["kept_because"], params.validation.selected_on)
    _write_model(folder, weights, named, config, encoder, processor, params, selected)


def write_base(
    folder: Path,
    start: PaliGemmaForConditionalGeneration,
    encoder: Encoder,
    processor: PaliGemmaProcessor,
    params: Params,
) -> str:
    """Write the model before the first step as an export that was never trained, without a card; return its weights' hash.

    Adapters are of it: kept once, it serves all that were trained from it. UserError: something is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already. Name a new folder.")
    weights = trained_state(start)
    weights_hash = hash_weights(weights)
    selected = (0, "before the first step", "nothing")
    with aside(folder) as part:
        _write_model(part, weights, weights_hash, start.config, encoder, processor, params, selected)
    return weights_hash


def _write_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    weights_hash: str,
    config: PaliGemmaConfig,
    encoder: Encoder,
    processor: PaliGemmaProcessor,
    params: Params,
    selected: tuple[int, str, str],
) -> None:
    """Join trained weights and tower in one stock model and write it with its processor, sealed with what else is there.

    Nothing is held twice: the model has shapes alone, and what `StoredWeights` reads in its own type is the file's pages.
    """
    dtype = getattr(torch, params.export.dtype)
    with torch.device("meta"):
        # Of a copy: the configuration may be another model's own, whose attention this would change.
        model = PaliGemmaForConditionalGeneration._from_config(copy.deepcopy(config), dtype=dtype)
    tower = ((VISION_PREFIX + name, value) for name, value in encoder.model.state_dict().items())
    state = {name: value.detach().to(dtype).contiguous() for name, value in chain(tower, weights.items())}
    shapes = {name: value.shape for name, value in model.state_dict().items() if name != HEAD}
    assert shapes == {name: value.shape for name, value in state.items()}, "the model has other weights than these"
    model.generation_config = GenerationConfig(
        max_new_tokens=params.evaluation.max_new_tokens, do_sample=False, **special_tokens(processor.tokenizer)
    )
    model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
    mask, instruction = params.prompt.mask, params.prompt.instruction
    export_processor(processor, mask, instruction, config.vision_config).save_pretrained(folder)
    facts = {
        "dtype": params.export.dtype.value,
        "instruction": instruction,
        "mask": mask.value,
        "num_patches": params.vision.num_patches,
        "text_length": params.prompt.text_length,
        "weights_hash": weights_hash,
    } | dict(zip(("step", "step_is", "selected_on"), selected, strict=True))
    write_folder(folder / FACTS_FILE, facts)
