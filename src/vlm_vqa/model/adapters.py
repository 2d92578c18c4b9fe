"""Low-rank adapters: put on for training, merged, kept in peft's own format, and read from it, those of others too.

What training under `train.lora` changes is the adapters on Gemma 2's layers and the projector; both are in the folder. peft
itself takes two seconds to load, and few runs have adapters: it is imported where it is used.
"""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from vlm_vqa.errors import UserError
from vlm_vqa.model.vlm import VlmForTraining, hash_weights, save_tensors, trained_state
from vlm_vqa.params import LoraParams, Params, is_local
from vlm_vqa.sealed import read_folder, write_folder

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel

ADAPTER = "adapter"  # the folder's name, in `models/trained` and in an export
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # as peft calls them
FACTS_FILE = "adapter.json"
"""Beside peft's files, of those made here: `base_hash`, the hash of the weights before the first step; `weights_hash`, of
those that merging gives; `mask` and `instruction` of the training; the SHA-256 of peft's files."""
PROJECTOR = "multi_modal_projector"
_BASE = ".base_layer.weight"  # how peft calls the weight under an adapter
_PREFIX = "base_model.model."  # what peft's files put before the stock model's names
_MAY_CHANGE = re.compile(rf"language_model\.(model\.)?layers\.\d+\.|{PROJECTOR}\.")
_CAN_MERGE = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "peft_version", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""Settings of peft that any value of leaves an adapter one that is added to its layers, as it stands in the file."""


def peft_config(lora: LoraParams, **more: Any) -> "LoraConfig":
    """Return peft's settings of `train.lora`; `more` are others of `LoraConfig`."""
    from peft import LoraConfig

    # An expression: vision towers have layers of the same names, which a list would mean too.
    targets = rf".*language_model.*\.({'|'.join(lora.targets)})"
    alpha: Any = lora.alpha  # peft says int and takes any number
    return LoraConfig(
        r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none", **more
    )


def add_adapters(model: VlmForTraining, lora: LoraParams) -> None:
    """Put low-rank adapters on Gemma 2's linear layers by peft; they and the projector are all that is trained then."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(peft_config(lora), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_of_adapter(name))


def _is_of_adapter(name: str) -> bool:
    return ".lora_" in name or f".{PROJECTOR}." in name


def projector_of(model: PaliGemmaForConditionalGeneration) -> dict[str, Tensor]:
    """Return a float32 copy of the projector on the CPU, by the model's names."""
    state = model.state_dict()
    return {n: v.to("cpu", torch.float32, copy=True) for n, v in state.items() if f".{PROJECTOR}." in n}


def merge_adapters(weights: Mapping[str, Tensor], lora: LoraParams) -> dict[str, Tensor]:
    """Return the float32 weights of a model that `add_adapters` has changed, merged, by the names of the plain model."""
    merged = _without_adapters(weights)
    for name in weights:
        if name.endswith(_BASE):
            stem = name.removesuffix(_BASE)
            down, up = (weights[f"{stem}.lora_{part}.default.weight"] for part in "AB")
            merged[f"{stem}.weight"] = weights[name] + lora.alpha / lora.rank * (up @ down)
    return merged


def _without_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(_BASE, ".weight"): value for name, value in weights.items() if ".lora_" not in name}


def save_adapter(
    folder: Path, weights: Mapping[str, Tensor], projector: Mapping[str, Tensor], params: Params, weights_hash: str
) -> None:
    """Write the adapter as `PeftModel.from_pretrained` reads it; the same training writes the same bytes.

    `weights` are as `merge_adapters` takes them, `weights_hash` of what it gives; `projector` is that of the model before
    the first step, which with the weights under adapters is the base.
    """
    lora, start = params.train.lora, params.model
    assert lora is not None, "there is no adapter"
    folder.mkdir(parents=True)
    # A folder of this machine says nothing elsewhere; and with an adapter merged into it the checkpoint is not the base.
    named = start.checkpoint if start.checkpoint and not is_local(start.checkpoint) and not start.adapter else None
    revision = start.revision if named else None
    peft_config(
        lora, modules_to_save=[PROJECTOR], inference_mode=True, base_model_name_or_path=named, revision=revision
    ).save_pretrained(str(folder))
    of_adapter = {
        _PREFIX + name.replace(".default.", "."): one for name, one in weights.items() if _is_of_adapter(name)
    }
    save_tensors(of_adapter, folder / WEIGHTS_FILE, {"format": "pt"})
    facts = {
        "base_hash": hash_weights({**_without_adapters(weights), **projector}),
        "weights_hash": weights_hash,
        "mask": params.prompt.mask.value,
        "instruction": params.prompt.instruction,
    }
    write_folder(folder / FACTS_FILE, facts)


def merge_adapter(model: PaliGemmaForConditionalGeneration, folder: str | Path, checkpoint: str) -> None:
    """Merge an adapter in peft's format, ours or others', into its base, in place.

    `model` is the whole checkpoint, float32, with or without its tower; `checkpoint` its name for messages. UserError as
    `check_adapter`; or the adapter was made here on other weights than `model` has, or is not finite.
    """
    base_hash = hash_weights(trained_state(model)) if (Path(folder) / FACTS_FILE).is_file() else None
    check_adapter(folder, model.config, checkpoint, base_hash)
    trained = {name: one.requires_grad for name, one in model.named_parameters()}
    try:
        _load(model, Path(folder)).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"model.adapter {str(folder)!r}: {error}") from error
    # peft freezes what it stands on, and wakes the projector that it brings.
    for name, one in model.named_parameters():
        one.requires_grad_(trained[name])
    assert model.lm_head.weight is model.get_input_embeddings().weight, "the output head is the embedding"


def check_adapter(folder: str | Path, config: PaliGemmaConfig, checkpoint: str, base_hash: str | None = None) -> None:
    """Refuse, by UserError, a folder that is no adapter of a checkpoint, or that cannot be merged exactly.

    Names and shapes follow from the checkpoint's `config`, none of its weights is read; `base_hash` is the `hash_weights` of
    those but the tower's, where it is known.
    """
    where, folder = f"model.adapter {str(folder)!r}", Path(folder).expanduser()
    remedy = "Name the folder of another adapter, or make this one again."
    if (folder / FACTS_FILE).is_file():
        facts = read_folder(folder / FACTS_FILE, "the seal of an adapter", remedy)
        if base_hash is not None and facts["base_hash"] != base_hash:
            raise UserError(
                f"{where} is of another base: of weights {facts['base_hash'][:12]}; model.checkpoint {checkpoint!r} has "
                f"{base_hash[:12]}. Name its base there: `vlm-vqa base FOLDER` writes it, where it was trained."
            )
    with torch.device("meta"):
        # A copy: the configuration is a model's own, whose attention this would change.
        model = PaliGemmaForConditionalGeneration._from_config(copy.deepcopy(config), attn_implementation="eager")
    try:
        _load(model, folder)
    except OSError as error:
        pickled = " Pickled weights (.bin) can run code when they are read, so they are not."
        more = pickled if list(folder.glob("*.bin")) else ""
        raise UserError(
            f"{where}: {CONFIG_FILE} and {WEIGHTS_FILE} must be there ({error.strerror or error}).{more} {remedy}"
        ) from error
    except UserError as error:
        raise UserError(f"{where}: {error} {remedy}") from error
    # On files that are no adapter, or another model's, peft raises whatever its code meets first.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[1:2] or lines[:1])[:300]
        raise UserError(
            f"{where} is no adapter of model.checkpoint {checkpoint!r} ({type(error).__name__}: {reason}). {remedy}"
        ) from error


def _load(model: PaliGemmaForConditionalGeneration, folder: Path) -> "LoraModel":
    """Put the adapter on the model by peft; on the meta device names and shapes alone are compared."""
    from peft import LoraModel, set_peft_model_state_dict

    config, tensors = _read_config(folder / CONFIG_FILE), load_file(folder / WEIGHTS_FILE)
    if others := sorted(name for name in tensors if not _MAY_CHANGE.search(name)):
        raise UserError(
            f"it changes {others[0].removeprefix(_PREFIX)}; an adapter may change Gemma 2's layers and the projector only: "
            "features are of the checkpoint's own tower, and its embedding is its output head too."
        )
    joined = LoraModel(model, config, "default")
    state = {name.removeprefix(_PREFIX): value.to(model.device) for name, value in tensors.items()}
    found = set_peft_model_state_dict(model, state)
    missing = [name for name in found.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    for what, names in (("lacks", missing), ("has no place for", found.unexpected_keys)):
        if names:
            raise UserError(f"{WEIGHTS_FILE} and the model do not fit: it {what} {names[0].removeprefix(_PREFIX)}.")
    return joined


def _read_config(path: Path) -> "LoraConfig":
    """Read peft's settings, refusing by name whatever is not plain LoRA: what peft does not know, it would leave out."""
    from peft import LoraConfig

    try:
        given = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{CONFIG_FILE} is no JSON object of settings.") from error
    if given.get("peft_type") != "LORA":
        raise UserError(f"{CONFIG_FILE}: peft_type is {given.get('peft_type')!r}; only LORA can be merged.")
    # How weights were drawn before the first step says nothing of them now, but for those that change the base as well.
    plain = {"init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
    default = LoraConfig().to_dict()
    for name, value in given.items():
        if name not in _CAN_MERGE and value not in plain.get(name, (default.get(name), None, False)):
            raise UserError(f"{CONFIG_FILE}: {name} is {value!r:.100}, and such an adapter cannot be merged exactly.")
    return LoraConfig(**{name: value for name, value in given.items() if name in _CAN_MERGE})
