"""The model: stock `PaliGemmaForConditionalGeneration` with a DINOv2 or SigLIP tower and a Gemma 2 language model.

Training reads stored image features, so its model is the stock class without the tower and with a forward of its own:
`VlmForTraining`. Everything below the forward is the stock modules, which makes parity with Hugging Face hold by
construction, and the export is a stock model again.

Shapes: B rows, T image tokens, S grid width (tokens of the longest row, image tokens included), N packed tokens (those of
all rows, no padding), M supervised positions, E image feature width, D hidden width, V vocabulary.
"""

import copy
import hashlib
import os
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Cache,
    Gemma2Config,
    Gemma2ForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
)

from vlm_vqa.errors import UserError
from vlm_vqa.hf_hub import SETTINGS, WANTED, download_snapshot
from vlm_vqa.model import checkpoint
from vlm_vqa.model.attention import IMPLEMENTATION, RECOMPUTES, PackedRows, packed_mask
from vlm_vqa.model.last_layer import Asked, narrow
from vlm_vqa.model.layout import additive_mask
from vlm_vqa.params import Attention, LanguageConfig, LanguageParams, ModelParams

WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE = "training.json"  # seals a folder of trained weights and says what they were made of
VISION_PREFIX = "model.vision_tower."  # names of the tower's weights in the stock model begin so
PROJECTOR = "model.multi_modal_projector."  # names of the projector's


def language_of(config: PaliGemmaConfig) -> Gemma2Config:
    """Return the language model's part; of PaliGemma's first version it is a `GemmaConfig`, without window and soft caps."""
    return config.text_config  # ty: ignore[invalid-explicit-return] - transformers leaves a PaliGemma's parts open


class VlmForTraining(PaliGemmaForConditionalGeneration):
    """The stock model without its vision tower, fed with stored features and packed rows: only real tokens are computed."""

    # Our loss divides by the step's supervised tokens itself. Left unstated, Trainer would guess from the signature and
    # might divide by the accumulation steps a second time.
    accepts_loss_kwargs = True
    _keys_to_ignore_on_load_unexpected = ["vision_tower"]
    narrow_last_layer = True  # the last layer computes supervised positions alone; false is for comparisons

    def __init__(self, config: PaliGemmaConfig):
        super().__init__(config)
        self.model.vision_tower = nn.Identity()
        narrow(self.model.language_model.layers[-1])

    def forward(
        self,
        image_features: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        bidirectional: Tensor,
        labels: Tensor,
        prefix_places: Tensor,
        rest_places: Tensor,
        supervised: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss`, the cross entropy summed over supervised positions and divided by `num_items_in_batch`.

        Beside it stand the supervised positions' `logits` [M, V].

        Args:
            image_features: [B, T, E]; the others as `TokenLayout.collate` gives them.
            num_items_in_batch: supervised tokens of the whole optimizer step (Trainer counts them), so that gradient
                accumulation gives the large batch's gradient; by default those of this batch.
        """
        _check_window(self, segment_ids.shape[1])
        places_N, ids = torch.cat([prefix_places.flatten(), rest_places]), input_ids.flatten()
        prefixes = torch.cat(_embed(self, image_features, ids[prefix_places[:, image_features.shape[1] :]]), dim=1)
        rest_XD = self.model.language_model.embed_tokens(ids[rest_places])
        embeds_1ND = torch.cat([prefixes.flatten(0, 1), rest_XD])[None]
        attention, grid = language_of(self.config)._attn_implementation, (segment_ids, position_ids, bidirectional)
        closed = prefix_places.shape[1] > image_features.shape[1]
        # Flex attention wants a query, where nothing is taught, too: of one that nobody reads.
        flex = attention == IMPLEMENTATION[Attention.FLEX]
        asked = supervised.new_zeros(1) if flex and not len(supervised) else supervised
        shape = {"closed_prefix": closed, "dtype": embeds_1ND.dtype}
        mask, narrow_mask = packed_mask(attention, prefix_places, rest_places, *grid, asked, **shape)
        last = Asked(asked, narrow_mask) if self.narrow_last_layer else None
        hidden_ND = _run_layers(self, embeds_1ND, mask, position_ids.flatten()[places_N][None], asked=last)[0]
        # Only supervised positions pass through the last layer, and through the output head, which is wide.
        hidden_MD = hidden_ND[: len(supervised)] if self.narrow_last_layer else hidden_ND[supervised]
        assert not self.narrow_last_layer or len(hidden_ND) == len(asked), "the last layer is not narrowed"
        logits_MV = text_logits(self, hidden_MD)
        labels_M = labels.flatten()[places_N[supervised]]
        total = nn.functional.cross_entropy(logits_MV.float(), labels_M, reduction="sum")
        return {
            "loss": total / (len(labels_M) if num_items_in_batch is None else num_items_in_batch),
            "logits": logits_MV,
        }


def text_hidden(
    model: PaliGemmaForConditionalGeneration,
    image_features: Tensor | None,
    input_ids: Tensor,
    position_ids: Tensor,
    allowed: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Run the projector and Gemma 2 and return its last hidden states [B, S, D] in the compute type.

    UserError if there are more keys than Gemma 2's sliding window holds.

    Args:
        image_features: [B, T, E], whose projections replace the first T tokens; None in a later step of generation.
        input_ids, position_ids: int64 [B, S].
        allowed: bool [B, S, K], which keys each position sees; K counts the cache's keys too.
        cache: keys and values to extend in place.
    """
    _check_window(model, allowed.shape[-1])
    if image_features is None:
        embeds_BSD = model.model.language_model.embed_tokens(input_ids)
    else:
        embeds_BSD = torch.cat(_embed(model, image_features, input_ids[:, image_features.shape[1] :]), dim=1)
    return _run_layers(model, embeds_BSD, additive_mask(allowed, embeds_BSD.dtype), position_ids, cache)


def _check_window(model: PaliGemmaForConditionalGeneration, keys: int) -> None:
    # Beyond it, its layers would need a second mask.
    window = getattr(language_of(model.config), "sliding_window", None)
    if window is not None and keys > window:
        raise UserError(
            f"a row has {keys} tokens, but Gemma 2's sliding window holds {window}. Lower prompt.text_length, "
            "train.questions_per_row or evaluation.batch_size: so many questions of one image share a row."
        )


def _embed(model: PaliGemmaForConditionalGeneration, image_features: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings of image tokens [B, T, D] and of text tokens [..., D], of one type."""
    text = model.model.language_model.embed_tokens(text_ids)
    return model.model.multi_modal_projector(image_features.to(model.dtype)).to(text.dtype), text


def _run_layers(
    model: PaliGemmaForConditionalGeneration,
    embeds: Tensor,
    mask: Tensor | PackedRows | BlockMask,
    position_ids: Tensor,
    cache: Cache | None = None,
    asked: Asked | None = None,
) -> Tensor:
    """Run Gemma 2 on embeddings [B, S, D] and return its last hidden states, alike, or of what is `asked` for."""
    masks: dict[str, Any] = {"attention_mask": {"full_attention": mask, "sliding_attention": mask}}
    if language_of(model.config).model_type == "gemma":
        # It hands on what transformers knows as a mask, and any other argument.
        masks = {"rows": mask} if isinstance(mask, PackedRows) else {"attention_mask": mask}
    if asked is not None:
        masks["asked"] = asked
    cached = {"past_key_values": cache, "use_cache": cache is not None}
    return model.model.language_model(
        inputs_embeds=embeds, **masks, position_ids=position_ids, **cached
    ).last_hidden_state


def text_logits(model: PaliGemmaForConditionalGeneration, hidden: Tensor) -> Tensor:
    """Return the soft-capped logits [..., V] of hidden states [..., D]."""
    # FSDP2 has the head's weights in the type of its products; torch 2.11's leaves it to us that these have it, too.
    logits = model.lm_head(hidden.to(model.lm_head.weight.dtype))
    cap = getattr(language_of(model.config), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def initial_model(language: LanguageParams, encoder_config, processor: PaliGemmaProcessor, seed: int) -> VlmForTraining:
    """Build the model that training starts from: Gemma 2 as `language` says, a fresh linear projector; float32.

    `encoder_config` is the tower's; the embedding grows to the size of the tokenizer of `processor`.
    """
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    if language.model == "random":
        assert language.config is not None, "load_params asks for it where the model is random"
        lm = Gemma2ForCausalLM(random_config(language.config, tokenizer))
    else:
        lm = _load_gemma(language)
        if (before := lm.config.vocab_size) < len(tokenizer):
            # The processor's tokens (image, locations, segments) must have rows of their own: the mean of all, as of
            # transformers' own, which holds a second copy more for a noise of 3e-5 of their spread.
            rows = lm.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight.detach()
            rows[before:] = rows[:before].mean(dim=0)
    width = lm.config.hidden_size
    how: dict[str, Any] = {"projection_dim": width, "hidden_size": width, "vocab_size": lm.config.vocab_size}
    how |= {"text_config": lm.config.to_dict(), "vision_config": encoder_config.to_dict(), "dtype": "float32"}
    config = PaliGemmaConfig(**how, image_token_index=processor.image_token_id, **special_tokens(tokenizer))
    without_paths(config)
    # Its weights stand in the stock model's frame without a second copy.
    with torch.device("meta"):
        model = VlmForTraining._from_config(config, attn_implementation="eager")
    model.model.language_model, model.lm_head = lm.model, lm.lm_head
    narrow(lm.model.layers[-1])
    # One configuration object for the frame and its language model: what is saved is what ran.
    parts: list[Any] = [lm.model, *(layer.self_attn for layer in lm.model.layers)]
    for part in parts:
        part.config = model.config.text_config
    projector = model.model.multi_modal_projector.to_empty(device="cpu")
    # Image tokens enter Gemma 2 about as large as the features are.
    nn.init.normal_(projector.linear.weight, std=projector.linear.in_features**-0.5)
    nn.init.zeros_(projector.linear.bias)
    model.tie_weights()
    set_attention(model, Attention.EAGER)
    return model.train()


def checkpoint_model(start: ModelParams, encoder_config, processor: PaliGemmaProcessor) -> VlmForTraining:
    """Load the projector and Gemma 2 of a whole checkpoint to start from; float32, whatever their type in the files.

    `encoder_config` is its tower's, as `load_encoder` read it. UserError as `checkpoint.read_config`, `check_weights` and
    `check_tokens`.
    """
    folder = checkpoint.folder_of(start)
    found = checkpoint.read_config(start, folder)
    checkpoint.check_weights(start, folder, found)
    checkpoint.check_tokens(start, found, processor)
    own = {"vision_config": encoder_config.to_dict(), "dtype": "float32"}
    how: dict[str, Any] = {"config": PaliGemmaConfig.from_dict(found.to_dict() | own), "dtype": torch.float32}
    how |= {"attn_implementation": "eager", "use_safetensors": True}
    with checkpoint.reading(checkpoint.name_of(start), "its *.safetensors"):
        model: VlmForTraining = VlmForTraining.from_pretrained(folder, trust_remote_code=False, **how)
    without_paths(model.config)
    set_attention(model, Attention.EAGER)
    return model.train()


def without_paths(config: PaliGemmaConfig) -> None:
    """Leave out where the parts were read from: a path of this machine, which would make equal runs differ."""
    vision: Any = config.vision_config
    config._name_or_path = language_of(config)._name_or_path = vision._name_or_path = ""


def random_config(shape: LanguageConfig, tokenizer) -> Gemma2Config:
    """Return a Gemma 2 of this shape; the query scale follows the head width, as in the 2B model.

    The weights' initial size follows the width. Gemma's own 0.02 fits a width of 2,304: at 128 it leaves attention so
    even that nothing is learnt from images for a long time.
    """
    return Gemma2Config(
        vocab_size=len(tokenizer),
        **asdict(shape),
        query_pre_attn_scalar=shape.head_dim,
        initializer_range=shape.hidden_size**-0.5,
        **special_tokens(tokenizer),
    )


def special_tokens(tokenizer) -> dict[str, Any]:
    """Return the ids of padding, beginning and end by the names of configurations."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def set_dropout(model: VlmForTraining, probability: float) -> None:
    """Set the dropout on Gemma 2's attention probabilities, the only dropout that Gemma 2 has."""
    language_of(model.config).attention_dropout = probability
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = probability


def set_attention(model: PaliGemmaForConditionalGeneration, attention: Attention) -> None:
    """Choose how Gemma 2's attention is computed, see `vlm_vqa.model.attention`; the vision tower keeps its own."""
    model.model.language_model.set_attn_implementation(IMPLEMENTATION[attention])
    # transformers falls back to another one where it thinks a class cannot do it.
    used = {layer.self_attn.config._attn_implementation for layer in model.model.language_model.layers}
    assert used == {IMPLEMENTATION[attention]}, f"layers attend by {used}, not by {attention.value}"


def recompute_scores(model: VlmForTraining, on: bool = True) -> None:
    """Compute eager attention once more in the backward pass, so that its scores, the largest tensors, are not kept."""
    for layer in model.model.language_model.layers:
        setattr(layer.self_attn, RECOMPUTES, on)


def recompute_layers(model: VlmForTraining) -> None:
    """Compute each layer once more in the backward pass, with the same dropout, by a frame around it: FSDP2, which divides
    that, gathers no weights for the second time. The names of weights get the frame's among them."""
    layers = model.model.language_model.layers
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer)


def compile_layers(model: VlmForTraining, backend: str = "inductor") -> None:
    """Let torch compile every layer but the last, once for all of them and for rows of any number and length.

    The last one, at few positions, is another module. Whoever generates with the model does it under `uncompiled`.
    UserError: there is no C compiler, or Python's headers, which compiled layers are linked with, are not there.
    """
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang"))), None)
    if compiler is None or not headers.is_file():
        lacking = "a C compiler (gcc)" if compiler is None else f"{headers} (Debian's python3-dev)"
        raise UserError(
            f"train.compile is true, but this machine lacks {lacking}. Install it, or set train.compile to false."
        )
    options: Any = torch._dynamo.config
    # Made are versions for one row and more, few tokens and many, and two kinds of layers. Left alone, torch gives up after
    # eight and goes on without a word.
    options.recompile_limit, options.fail_on_recompile_limit_hit = 32, True
    # Under FSDP2 a layer's own numbers would be unknowns, too, over which it ponders for many minutes.
    options.specialize_int = options.specialize_float = True
    for layer in list(model.model.language_model.layers)[:-1]:
        layer.compile(dynamic=True, backend=backend)


def uncompiled() -> AbstractContextManager[None]:
    """Return a context in which nothing that `compile_layers` has compiled is."""
    return torch.compiler.set_stance("force_eager")


def freeze_embeddings(model: VlmForTraining) -> None:
    """Leave the token embedding as it is; it is the output head too, so neither has a gradient."""
    model.model.language_model.embed_tokens.weight.requires_grad_(False)


def load_tokenizer(language: LanguageParams, texts: list[str]) -> PreTrainedTokenizerFast:
    """Return the language model's tokenizer; for `random`, one trained on `texts`."""
    if language.model != "random":
        return _from_pretrained(AutoTokenizer, language)
    assert language.vocab_size is not None, "load_params asks for it where the model is random"
    return train_tokenizer(texts, language.vocab_size)


def _load_gemma(language: LanguageParams) -> Gemma2ForCausalLM:
    """Load a whole Gemma 2 in float32; UserError if it is not there, is no Gemma 2, or lacks weights.

    Left to itself, `from_pretrained` takes the 2.6 B model's shape where config.json is missing, reads another
    architecture's file as Gemma 2, and fills missing weights with random ones, with no more than a warning.
    """
    config = _from_pretrained(AutoConfig, language)
    if not isinstance(config, Gemma2Config):
        raise UserError(f"language.model {language.model!r} is a {config.model_type}; it must be a Gemma 2 (gemma2).")
    lm, found = _from_pretrained(
        Gemma2ForCausalLM, language, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    # The output head is the embedding and need not stand in the file.
    missing = sorted(set(found["missing_keys"]) - {"lm_head.weight"})
    if missing:
        raise UserError(f"language.model {language.model!r} lacks the weights {missing[:5]}. Get a whole copy of it.")
    return lm


def _from_pretrained(kind, language: LanguageParams, **options):
    """Load from the hub or a local folder, or say why not with transformers' own reason; no code from there is run."""
    folder = language.model
    if language.revision is not None:
        wanted = WANTED if kind is Gemma2ForCausalLM else SETTINGS
        folder = download_snapshot("language.model", language.model, language.revision, wanted)
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"language.model {language.model!r} cannot be loaded ({kind.__name__}): {error} Name a folder in Hugging Face's "
            "format with safetensors weights and a tokenizer, or a hub id with language.revision."
        ) from error


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Gemma's special tokens; deterministic in the order of `texts`.

    Byte level: any text can be written, also words that training never saw.
    """
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    tokenizer = Tokenizer(models.BPE())
    # A newline ends the question, so it must never melt into a word.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def build_processor(image_processor, tokenizer, num_patches: int) -> PaliGemmaProcessor:
    """Return the stock processor; it adds the image token and PaliGemma's location and segment tokens to `tokenizer`."""
    # A copy that says how many image tokens it stands for, as PaliGemma's asks.
    image_processor = copy.deepcopy(image_processor)
    image_processor.image_seq_length = num_patches
    # Generation from the export pads prompts on the left.
    tokenizer.padding_side = "left"
    return PaliGemmaProcessor(image_processor, tokenizer)


def trained_state(model: PaliGemmaForConditionalGeneration) -> dict[str, Tensor]:
    """Return what training changes, by the stock model's names: projector and Gemma 2, the tied head once."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(VISION_PREFIX) and name != "lm_head.weight"
    }


def save_trained(config: PaliGemmaConfig, state: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write the configuration and a `trained_state`, by the names that it has in memory.

    `save_pretrained` would rename the weights on disk, and what reads files without renaming them back would go on from a
    fresh model with no more than a warning.
    """
    config.save_pretrained(folder)
    save_tensors(state, Path(folder) / WEIGHTS_FILE)


def save_tensors(state: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that all may read."""
    save_file({name: value.contiguous() for name, value in state.items()}, file, metadata)
    file.chmod(0o644)  # safetensors leaves it to its owner alone


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a safetensors file, such as `save_trained` wrote, each read when it is asked for.

    Read in its own type, a tensor is the file's pages, which the system takes back when it is let go.
    """

    def __init__(self, file: Path, dtype: torch.dtype = torch.float32):
        self._file, self._dtype = file, dtype
        with safe_open(file, "pt") as stored:
            self._names = list(stored.keys())

    def __getitem__(self, name: str) -> Tensor:
        # Opened for each: all tensors that an open file has given keep all of its pages.
        with safe_open(self._file, "pt") as stored:
            return stored.get_tensor(name).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes, in the order of names: what `weights_hash` means."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
