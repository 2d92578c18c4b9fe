"""A whole model to start from: a folder or hub repository of the class `PaliGemmaForConditionalGeneration`.

Its tower is a SigLIP (PaliGemma's) or a DINOv2 (that of an export of this project), its language model a Gemma 2 or a Gemma.
The encoder reads the tower, training the rest. What does not fit is refused from config.json, the tokenizer and the headers
of the weights' files: left to itself, transformers fills gaps with random numbers and a warning.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
from transformers.utils import logging

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import hash_files, hash_json
from vlm_vqa.hf_hub import WANTED, download_snapshot
from vlm_vqa.params import ModelParams

OUTPUTS = Path("models")  # where the stages write, and remove what stands there before
TOWERS = ("dinov2", "siglip_vision_model")
LANGUAGES = ("gemma2", "gemma")
HEAD = "lm_head.weight"  # tied to the token embedding, it need not stand in a file


def name_of(start: ModelParams) -> str:
    return f"model.checkpoint {start.checkpoint!r}"


def folder_of(start: ModelParams, wanted: list[str] = WANTED) -> Path:
    """Return where the checkpoint lies; from the hub, what is `wanted` of it is downloaded first.

    UserError if it is not there, or lies where the stages write.
    """
    assert start.checkpoint is not None, "load_params asks for it where training starts from one"
    if start.revision is not None:
        return download_snapshot("model.checkpoint", start.checkpoint, start.revision, wanted)
    folder = Path(start.checkpoint).expanduser()
    said = f"model.checkpoint is {start.checkpoint!r}, but"
    if not (folder / "config.json").is_file():
        raise UserError(f"{said} no model's config.json is there. Mend the path.")
    if folder.resolve().is_relative_to(OUTPUTS.resolve()):
        copy = f"Copy it (`mkdir -p starts && cp -rL {start.checkpoint} starts/first`), and set model.checkpoint"
        raise UserError(f"{said} the stages remove what is in {OUTPUTS}/ and write it anew. {copy} to starts/first.")
    return folder


def read_config(start: ModelParams, folder: Path) -> PaliGemmaConfig:
    """Return the checkpoint's configuration; UserError if it is of another class or of parts that are not read."""
    with reading(name_of(start), "config.json"):
        values, _ = PaliGemmaConfig.get_config_dict(folder)
    if (kind := values.get("model_type")) != "paligemma":
        _refuse(start, f"is a {kind!r} model; only the class {PaliGemmaForConditionalGeneration.__name__} is read here")
    # What it lacks transformers takes for PaliGemma's first version.
    for key, name, known in (("vision_config", "vision tower", TOWERS), ("text_config", "language model", LANGUAGES)):
        if (found := (values.get(key) or {}).get("model_type")) not in known:
            _refuse(start, f"has the {name} {found!r} ({key} in its config.json); this reads {' and '.join(known)}")
    with reading(name_of(start), "config.json"):
        config = PaliGemmaConfig.from_dict(values)
    if not config.tie_word_embeddings:
        what = "has an output head of its own (tie_word_embeddings)"
        _refuse(start, f"{what}; only Gemma's, its token embedding, is read")
    without_head(config.vision_config)
    return config


def without_head(tower: Any) -> None:
    """Leave out a SigLIP's pooling head: it makes one vector of a picture, which no PaliGemma reads; most do not have it."""
    if tower.model_type == "siglip_vision_model":
        tower.vision_use_head = False


def check_weights(start: ModelParams, folder: Path, config: PaliGemmaConfig) -> None:
    """Refuse, by UserError, a folder without all weights that `config` describes; their files' headers are read alone."""
    how = {"config": config, "device_map": "meta", "use_safetensors": True, "ignore_mismatched_sizes": True}
    with reading(name_of(start), "its *.safetensors"), quiet():
        stock: Any = PaliGemmaForConditionalGeneration
        _, found = stock.from_pretrained(folder, trust_remote_code=False, **how, output_loading_info=True)
    missing = sorted(set(found["missing_keys"]) - {HEAD})
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        if lacking := [name for name in missing if f".{part}." in name]:
            _refuse(start, f"lacks {len(lacking)} weights of its {part}, such as {lacking[0]}")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        _refuse(start, f"has {name} of shape {tuple(stored)}, but its config.json says {tuple(wanted)}")


def check_tokens(start: ModelParams, config: PaliGemmaConfig, processor: PaliGemmaProcessor) -> None:
    """Refuse, by UserError, a tokenizer that is not the one of the token embedding."""
    text: Any = config.text_config
    tokens, image = len(processor.tokenizer), processor.image_token_id
    if tokens > text.vocab_size:
        _refuse(start, f"has a tokenizer of {tokens} tokens, but an embedding of {text.vocab_size}")
    if image != config.image_token_id:
        _refuse(start, f"has {config.image_token_id} for an image's token in config.json, its tokenizer {image}")
    special = ("pad_token", "bos_token", "eos_token")
    if lacking := [name for name in special if getattr(processor.tokenizer, name) is None]:
        _refuse(start, f"has a tokenizer without {', '.join(lacking)}")


def load_tokenizer(start: ModelParams, folder: Path):
    with reading(name_of(start), "its tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def start_hash(start: ModelParams) -> str:
    """Return a hash over the files of checkpoint and adapter: what training starts from, whatever they are called."""
    folders = [folder_of(start), *([Path(start.adapter).expanduser()] if start.adapter else [])]
    found = [[path for wanted in WANTED for path in folder.glob(wanted)] for folder in folders]
    return hash_json(list(map(hash_files, found, folders)))


def _refuse(start: ModelParams, what: str) -> None:
    raise UserError(f"{name_of(start)} {what}. Name another checkpoint, or get a whole copy of it.")


@contextmanager
def quiet() -> Generator[None]:
    """Let transformers not list what else there is in a file, or is not: who asks for its report reads that."""
    said = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(said)


@contextmanager
def reading(name: str, file: str) -> Generator[None]:
    """Say which file of a model it is that cannot be read; `name`: which parameter names it, and how."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged weights raise safetensors' own and several built-in errors
        raise UserError(
            f"{name}: {file} cannot be read ({str(error).strip()}). The folder or commit must hold intact config.json, "
            "*.safetensors and preprocessor_config.json, and for a whole model its tokenizer."
        ) from error
