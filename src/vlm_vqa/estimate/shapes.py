"""The towers' shapes without a download, and the parameters that training holds and updates."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Dinov2Config, Gemma2Config, SiglipVisionConfig

from vlm_vqa.errors import UserError
from vlm_vqa.model.flops import linear_maps, vision_linear_maps
from vlm_vqa.params import PROJECTIONS, LanguageConfig, LoraParams, Params

ADDED_TOKENS = 1024 + 128 + 1  # by `PaliGemmaProcessor` to a tokenizer: locations, segments and <image>


Language = LanguageConfig | Gemma2Config
Tower = Any  # a `Dinov2Config` or a `SiglipVisionConfig`, of whose sizes transformers says that they may be pairs


def _sizes(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}


# As published in their config.json on the hub, which no test here can fetch; Gemma 2's also in arXiv 2408.00118, table 1:
GEMMA_2_2B = LanguageConfig(2304, 9216, 26, 8, 4, 256)  # width, MLP, layers, heads, heads of keys, head width
GEMMA_VOCABULARY = 256_000
LANGUAGE = {"google/gemma-2-2b": GEMMA_2_2B, "google/gemma-2-2b-it": GEMMA_2_2B}
SO400M = SiglipVisionConfig(**_sizes(1152, 27, 16), intermediate_size=4304, patch_size=14)
VISION = {
    "facebook/dinov2-small": Dinov2Config(**_sizes(384, 12, 6), image_size=518),
    "facebook/dinov2-base": Dinov2Config(**_sizes(768, 12, 12), image_size=518),
    "facebook/dinov2-large": Dinov2Config(**_sizes(1024, 24, 16), image_size=518),
    "google/siglip-so400m-patch14-224": SO400M,
    "small": Dinov2Config(**_sizes(128, 4, 4), mlp_ratio=2, image_size=64, patch_size=8),
}
CHECKPOINTS = {
    "google/paligemma2-3b-pt-224": (GEMMA_2_2B, 257_216, SO400M),
    "google/paligemma-3b-pt-224": (LanguageConfig(2048, 16384, 18, 8, 1, 256), 257_216, SO400M),
}
"""Gemma (the first has half of the norms that are counted), rows of its embedding, the processor's tokens too, tower."""


class Parameter(NamedTuple):
    name: str
    shape: tuple[int, ...]
    trained: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def elements(parameters: Iterable[Parameter]) -> int:
    return sum(one.elements for one in parameters)


class Model:
    """What is trained: Gemma 2 and the projector; the vision tower is not there in training. Counts are of elements."""

    def __init__(self, language: Language, vocabulary: int, features: int, frozen: bool, lora: LoraParams | None):
        """Lay out all parameters, the tied head once; `frozen` embeddings have `vocabulary` rows, projections `features`."""
        self.language, self.vocabulary, self.features, self.lora = language, vocabulary, features, lora
        width, whole = language.hidden_size, lora is None
        self.freeze_embeddings = frozen or not whole
        maps = []
        for name, (inputs, outputs) in zip(PROJECTIONS, linear_maps(language), strict=True):
            maps.append(Parameter(name, (outputs, inputs), whole))
            if lora is not None and name in lora.targets:
                maps.append(Parameter(f"{name}.lora_A", (lora.rank, inputs), True))
                maps.append(Parameter(f"{name}.lora_B", (outputs, lora.rank), True))
        self.one_layer = [*maps, *[Parameter("norm", (width,), whole)] * 4]
        self.parameters = [
            Parameter("embedding", (vocabulary, width), not self.freeze_embeddings),
            *self.one_layer * language.num_hidden_layers,
            Parameter("norm", (width,), whole),
            Parameter("projector", (width, features), True),
            Parameter("projector.bias", (width,), True),
        ]
        self.all, self.embedding = elements(self.parameters), vocabulary * width
        self.trained = elements(one for one in self.parameters if one.trained)
        self.maps = elements(maps) * language.num_hidden_layers
        # After adapters are merged: what models/trained holds, and beside it the adapter: its layers and the projector.
        self.saved = elements(one for one in self.parameters if "lora_" not in one.name)
        self.adapter = 0 if whole else self.trained


def model_of(params: Params) -> Model:
    """Return the shape of the model that `params` trains; UserError if it is not known and cannot be read."""
    name, train, start = params.language.model, params.train, params.model.checkpoint
    width = params.vision.visual_embed_dim
    if start is not None:
        shape, rows, _ = _checkpoint(start)
        return Model(shape, rows, width, train.freeze_embeddings, train.lora)
    if name == "random":
        shape, vocabulary = params.language.config, params.language.vocab_size
        assert shape is not None and vocabulary is not None, "load_params asks for both where the model is random"
    elif name in LANGUAGE:
        shape, vocabulary = LANGUAGE[name], GEMMA_VOCABULARY
    else:
        # A folder's vocabulary may hold the processor's tokens already: 0.4 % of the embedding.
        shape = Gemma2Config.from_dict(_read_config(name, "language.model", ["gemma2"], LANGUAGE))
        vocabulary = shape.vocab_size
    return Model(shape, vocabulary + ADDED_TOKENS, width, train.freeze_embeddings, train.lora)


def vision_of(params: Params) -> Tower:
    """Return the shape of the vision tower; UserError if it is not known, or not as wide as params.yaml says."""
    name, start = params.vision.model, params.model.checkpoint
    if start is not None:
        name, (_, _, shape) = start, _checkpoint(start)
    elif (shape := VISION.get(name)) is None:
        shape = _tower(_read_config(name, "vision.model", ["dinov2", "siglip", "siglip_vision_model"], VISION))
    if (width := shape.hidden_size) != (asked := params.vision.visual_embed_dim):
        raise UserError(f"vision.visual_embed_dim is {asked}, but {name} is {width} wide. Set it to that.")
    return shape


def _checkpoint(name: str) -> tuple[Language, int, Tower]:
    """Return the shapes of a whole model, and the rows of its embedding."""
    if name in CHECKPOINTS:
        return CHECKPOINTS[name]
    config = _read_config(name, "model.checkpoint", ["paligemma"], CHECKPOINTS)
    # What its file leaves out is transformers' default.
    language = Gemma2Config.from_dict(config["text_config"])
    return language, language.vocab_size, _tower(config["vision_config"])


def _tower(values: dict[str, Any]) -> Tower:
    """Return the shape of a tower, or of the one for images where there is one for texts beside it."""
    values = values.get("vision_config", values)
    return (Dinov2Config if values.get("model_type") == "dinov2" else SiglipVisionConfig).from_dict(values)


def tower_parameters(tower: Tower) -> int:
    """Count the weights and biases of a `Dinov2Model`, or of a `SiglipVisionModel` without its pooling head."""
    width, dino = tower.hidden_size, tower.model_type == "dinov2"
    # Positions and a patch's pixels with a bias; a DINOv2 has a class and a mask token, too.
    positions = (tower.image_size // tower.patch_size) ** 2 + dino
    embeddings = (positions + tower.num_channels * tower.patch_size**2 + 1 + 2 * dino) * width
    linear = sum((inputs + 1) * outputs for inputs, outputs in vision_linear_maps(tower))
    # Two norms of weight and bias; a DINOv2's two layer scales.
    return embeddings + tower.num_hidden_layers * (linear + (4 + 2 * dino) * width) + 2 * width


def _read_config(model: str, key: str, kinds: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    try:
        config = json.loads((Path(model).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        others = f"preflight knows the shapes of {', '.join(known)} and of local folders with a config.json"
        raise UserError(f"{key} {model!r}: {others} ({error}). Download it and name the folder.") from error
    if (kind := config.get("model_type")) not in kinds:
        raise UserError(f"{model}/config.json: model_type is {kind!r}; {key} must be a {' or '.join(kinds)}.")
    return config
