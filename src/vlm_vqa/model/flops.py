"""Model FLOPs: what loss and gradients of packed rows need, by formula.

Counted as in PaLM's model FLOPs utilisation (arXiv 2204.02311, appendix B): matrix products alone, two FLOPs for a
multiplication and its addition, and the gradients of a product twice the product. What an implementation adds does
not count: padding, pairs of a grid that do not see each other, logits of positions without a label and what the last layer
makes of them but keys and values, rows that teach nothing, and what activation checkpointing computes a second time.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any

from transformers import Gemma2Config, PaliGemmaConfig

from vlm_vqa.model.layout import Row, TokenLayout
from vlm_vqa.params import PROJECTIONS, LanguageConfig, LoraParams, Mask


@dataclass(frozen=True)
class Work:
    """What the FLOPs of rows depend on; rows that teach nothing add nothing."""

    tokens: int  # real ones, image tokens included
    image_tokens: int
    supervised: int  # tokens to predict
    pairs: int  # (query, key) pairs where the query sees the key
    supervised_pairs: int  # those of supervised queries


@dataclass(frozen=True)
class Cost:
    """FLOPs of loss and gradients for each unit of `Work`."""

    token: int
    image_token: int
    supervised: int
    pair: int
    supervised_pair: int

    def flops(self, work: Work) -> int:
        return sum(price * count for price, count in zip(astuple(self), astuple(work), strict=True))


def model_cost(config: PaliGemmaConfig, *, frozen_embeddings: bool, live_tokens: int = 0) -> Cost:
    """Return the `cost` of the model that `config` describes, and of its tower if that makes `live_tokens` an image anew."""
    language: Any = config.text_config
    vision: Any = config.vision_config
    found = cost(language, language.vocab_size, vision.hidden_size, frozen_embeddings=frozen_embeddings)
    seen = vision_flops(vision, live_tokens) // live_tokens if live_tokens else 0
    return replace(found, image_token=found.image_token + seen)


def cost(
    shape: LanguageConfig | Gemma2Config,
    vocabulary: int,
    feature_width: int,
    *,
    frozen_embeddings: bool = False,
    lora: LoraParams | None = None,
    everywhere: bool = False,
) -> Cost:
    """Return what each unit of work costs.

    With all weights trained: 6 x parameters of the layers' linear maps x real tokens + 4 x projector's parameters x image
    tokens + 6 x hidden x vocabulary x supervised tokens + 12 x heads x head width x layers x pairs that see each other; in
    the last layer, of tokens that are not supervised, keys and values alone.

    Args:
        vocabulary: rows of the embedding, which is the output head too.
        feature_width: inputs of the projector.
        frozen_embeddings: the output head's weight has no gradient; its input, the hidden state, still has one.
        lora: adapters are trained, the layers' maps have no gradients.
        everywhere: the last layer computes every position, as in generation.
    """
    maps = {
        name: (6 if lora is None else 4) * one * other
        + (6 * lora.rank * (one + other) if lora is not None and name in lora.targets else 0)
        for name, (one, other) in zip(PROJECTIONS, linear_maps(shape), strict=True)
    }
    # Of the last layer, what is asked of supervised positions alone; a pair of it is one of theirs.
    asked = 0 if everywhere else sum(maps.values()) - maps["k_proj"] - maps["v_proj"]
    pair, last = 12 * shape.num_attention_heads * shape.head_dim, not everywhere
    return Cost(
        token=shape.num_hidden_layers * sum(maps.values()) - asked,
        # The projector's input is stored: it needs no gradient.
        image_token=4 * feature_width * shape.hidden_size,
        supervised=(4 if frozen_embeddings else 6) * shape.hidden_size * vocabulary + asked,
        pair=(shape.num_hidden_layers - last) * pair,
        supervised_pair=last * pair,
    )


def linear_maps(shape: LanguageConfig | Gemma2Config) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of one layer's linear maps: queries, keys, values, output, gate, up, down."""
    queries, keys = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads))
    width, mlp = shape.hidden_size, shape.intermediate_size
    return [(width, queries), (width, keys), (width, keys), (queries, width), (width, mlp), (width, mlp), (mlp, width)]


def class_tokens(config: Any) -> int:
    """Return how many tokens a tower makes beside those of the patches."""
    return 1 if config.model_type == "dinov2" else 0


def vision_linear_maps(config: Any) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of one layer's linear maps in a tower: queries, keys, values, output, the MLP's two."""
    width = config.hidden_size
    inner = int(width * config.mlp_ratio) if config.model_type == "dinov2" else config.intermediate_size
    return [(width, width)] * 4 + [(width, inner), (inner, width)]


def vision_flops(config: Any, num_tokens: int) -> int:
    """Count the FLOPs of an image's forward pass through its tower: products of patches, linear maps and attention."""
    width = config.hidden_size
    patches = 2 * (num_tokens - class_tokens(config)) * config.num_channels * config.patch_size**2 * width
    linear = 2 * num_tokens * sum(one * other for one, other in vision_linear_maps(config))
    return patches + config.num_hidden_layers * (linear + 4 * num_tokens**2 * width)


def rows_work(layout: TokenLayout, rows: Iterable[Row]) -> Work:
    """Count the work of rows on the host: a count of a batch on a device would wait for it."""
    taught = [row for row in rows if any(tokens.answer for tokens in row.questions)]
    prefixes = len(taught) * (layout.num_patches + len(layout.prefix))
    return Work(
        tokens=prefixes + sum(len(tokens.read) for row in taught for tokens in row.questions),
        image_tokens=len(taught) * layout.num_patches,
        supervised=sum(len(tokens.answer) for row in taught for tokens in row.questions),
        pairs=sum(visible_pairs(layout, row) for row in taught),
        supervised_pairs=sum(supervised_pairs(layout, row) for row in taught),
    )


def visible_pairs(layout: TokenLayout, row: Row) -> int:
    """Count the (query, key) pairs of a row where the query sees the key, as `layout.visible` has them."""
    image, prefix = layout.num_patches, layout.num_patches + len(layout.prefix)
    if layout.mask is Mask.PREFIX_LM:
        block = prefix + sum(len(tokens.prompt) for tokens in row.questions)
        return block**2 + sum(_causal_pairs(block, prefix + len(tokens.read)) for tokens in row.questions)
    questions = sum(_causal_pairs(prefix, prefix + len(tokens.read)) for tokens in row.questions)
    among_image = _causal_pairs(0, image) if layout.mask is Mask.CAUSAL else image**2
    return among_image + _causal_pairs(image, prefix) + questions


def supervised_pairs(layout: TokenLayout, row: Row) -> int:
    """Count those whose query is supervised, from a question's newline to its last answer token: it sees all before it."""
    prefix = layout.num_patches + len(layout.prefix)
    starts = ((one, prefix + len(one.read)) for one in row.questions)
    return sum(_causal_pairs(end - len(one.answer), end) for one, end in starts)


def _causal_pairs(start: int, end: int) -> int:
    """Count what the tokens at positions start + 1 to end see: themselves and all before them."""
    return (end * (end + 1) - start * (start + 1)) // 2
