"""The towers' shapes without a download, and the parameters that training holds and updates."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vlm_vqa.errors import UserError
from vlm_vqa.model.encoder import SMALL_ENCODER
from vlm_vqa.model.flops import linear_maps
from vlm_vqa.params import PROJECTIONS, LanguageConfig, LanguageParams, LoraParams, Params, VisionParams, is_local

ADDED_TOKENS = 1024 + 128 + 1
"""What `PaliGemmaProcessor` adds to a tokenizer: locations, segments and <image>."""


@dataclass(frozen=True)
class VisionShape:
    """A DINOv2."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    mlp_ratio: int = 4
    image_size: int = 518
    """Pixels that the position embeddings are for."""
    patch_size: int = 14
    num_channels: int = 3

    @property
    def parameters(self) -> int:
        """Weights and biases of `Dinov2Model`."""
        width, inner = self.hidden_size, self.hidden_size * self.mlp_ratio
        positions = 1 + (self.image_size // self.patch_size) ** 2
        embeddings = 2 * width + positions * width + (self.num_channels * self.patch_size**2 + 1) * width
        attention, mlp = 4 * (width + 1) * width, (width + 1) * inner + (inner + 1) * width
        # Two norms of weight and bias, two layer scales.
        return embeddings + self.num_hidden_layers * (attention + mlp + 6 * width) + 2 * width


# As published in their config.json on the hub, which no test here can fetch; Gemma 2's also in arXiv 2408.00118, table 1.
GEMMA_2_2B = LanguageConfig(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
    head_dim=256,
)  # fmt: skip
GEMMA_VOCABULARY = 256_000
LANGUAGE = {"google/gemma-2-2b": GEMMA_2_2B, "google/gemma-2-2b-it": GEMMA_2_2B}
VISION = {
    "facebook/dinov2-small": VisionShape(384, 12, 6),
    "facebook/dinov2-base": VisionShape(768, 12, 12),
    "facebook/dinov2-large": VisionShape(1024, 24, 16),
}


class Parameter(NamedTuple):
    """One parameter tensor of the model in training."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    layer: bool
    """It belongs to one of Gemma 2's layers, which are FSDP2's units."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def held(self, processes: int) -> int:
        """Return the elements of the first of `processes` that divide its rows as FSDP2 does."""
        return -(-self.shape[0] // processes) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Model:
    """What is trained: Gemma 2 and the projector; the vision tower is not there in training."""

    language: LanguageConfig
    vocabulary: int
    """Rows of the embedding, with those that the processor's tokens need."""
    feature_width: int
    freeze_embeddings: bool
    lora: LoraParams | None

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All of them, the tied head once."""
        width, whole = self.language.hidden_size, self.lora is None
        layers = (one for _ in range(self.language.num_hidden_layers) for one in self._layer)
        return (
            Parameter("embedding", (self.vocabulary, width), whole and not self.freeze_embeddings, False),
            *layers,
            Parameter("norm", (width,), whole, False),
            Parameter("projector", (width, self.feature_width), True, False),
            Parameter("projector.bias", (width,), True, False),
        )

    @cached_property
    def _layer(self) -> list[Parameter]:
        """The parameters of one layer, adapters behind the map that they stand on."""
        whole, lora = self.lora is None, self.lora
        found = []
        for name, (inputs, outputs) in zip(PROJECTIONS, linear_maps(self.language), strict=True):
            found.append(Parameter(name, (outputs, inputs), whole, True))
            if lora is not None and name in lora.targets:
                found.append(Parameter(f"{name}.lora_A", (lora.rank, inputs), True, True))
                found.append(Parameter(f"{name}.lora_B", (outputs, lora.rank), True, True))
        return found + [Parameter("norm", (self.language.hidden_size,), whole, True)] * 4

    @cached_property
    def all(self) -> int:
        """Elements of all parameters, adapters included."""
        return sum(one.elements for one in self.parameters)

    @cached_property
    def trained(self) -> int:
        return sum(one.elements for one in self.parameters if one.trained)

    @cached_property
    def saved(self) -> int:
        """Elements after adapters are merged: what models/trained holds."""
        return sum(one.elements for one in self.parameters if "lora_" not in one.name)

    @property
    def embedding(self) -> int:
        return self.parameters[0].elements

    @cached_property
    def layer(self) -> int:
        """Elements of one layer."""
        return sum(one.elements for one in self._layer)

    @cached_property
    def maps(self) -> int:
        """Elements of the linear maps of all layers."""
        return sum(one.elements for one in self.parameters if one.layer and len(one.shape) == 2)

    @property
    def largest_trained(self) -> int:
        return max(one.elements for one in self.parameters if one.trained)


def model_of(params: Params) -> Model:
    """Return the shape of the model that `params` trains.

    Raises:
        UserError: the shape of language.model is not known and cannot be read.
    """
    language, train = params.language, params.train
    width = params.vision.visual_embed_dim
    return Model(*_language(language), width, train.freeze_embeddings, train.lora)


def _language(language: LanguageParams) -> tuple[LanguageConfig, int]:
    """Return Gemma 2's shape and the rows of its embedding."""
    if language.model == "random":
        return language.config, language.vocab_size + ADDED_TOKENS
    if language.model in LANGUAGE:
        return LANGUAGE[language.model], GEMMA_VOCABULARY + ADDED_TOKENS
    config = _read_config(language.model, "language.model", "gemma2", LANGUAGE)
    shape = LanguageConfig(**{key: config[key] for key in LanguageConfig.__dataclass_fields__})
    return shape, max(config["vocab_size"], _tokens(Path(language.model)) + ADDED_TOKENS)


def _tokens(folder: Path) -> int:
    """Return how many tokens a folder's tokenizer has, without those that the processor would add anew."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        ids = {*content["model"]["vocab"], *(token["content"] for token in content["added_tokens"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/tokenizer.json cannot be read ({error}). Name a folder with a whole copy of the model."
        ) from error
    return sum(not name.startswith(("<loc", "<seg", "<image>")) for name in ids)


def vision_of(vision: VisionParams) -> VisionShape:
    """Return the shape of the vision tower.

    Raises:
        UserError: the shape of vision.model is not known and cannot be read, or it is not as wide as params.yaml says.
    """
    shape = VISION.get(vision.model)
    if shape is None:
        folder = str(SMALL_ENCODER) if vision.model == "small" else vision.model
        config = _read_config(folder, "vision.model", "dinov2", VISION)
        shape = VisionShape(**{key: config[key] for key in VisionShape.__dataclass_fields__ if key in config})
    if shape.hidden_size != vision.visual_embed_dim:
        raise UserError(
            f"vision.visual_embed_dim is {vision.visual_embed_dim}, but {vision.model} is {shape.hidden_size} wide. "
            "Set it to that."
        )
    return shape


def _read_config(model: str, key: str, kind: str, known: dict[str, Any]) -> dict[str, Any]:
    """Read a local folder's config.json."""
    if not is_local(model):
        raise UserError(
            f"{key} {model!r}: preflight knows the shapes of {', '.join(known)} and of local folders. Download it and name "
            "the folder."
        )
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Name a folder with a whole copy of the model.") from error
    if config.get("model_type") != kind:
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}; {key} must be a {kind}.")
    return config
