"""`params.yaml` as typed, validated, frozen objects.

Every key is required and unknown ones are refused: a run is what its file says, and nothing else. The meaning of a key
stands in the docstring below its field. Names of the reference recipe are kept as they are.

The file is read by DVC's own parser (ruamel, YAML 1.2), but no scalar is resolved by its looks: a key's type says what its
text is. So `1e-5`, `+1e-5`, `.00001` and `"1e-5"` are one number where a number is wanted, `2.0` and `1e3` are whole ones,
`010` is ten as it is for DVC, and `2024`, `no` or `2026-11-26` stay text where text is wanted. Truth values are `true` and
`false`; `yes`, `no`, `on` and `off`, which YAML 1.2 takes for text, are refused there.
"""

import dataclasses
import itertools
import logging
import os
import re
import sys
import types
import typing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from vlm_vqa.errors import UserError
from vlm_vqa.files import check_regular
from vlm_vqa.hashing import hash_json
from vlm_vqa.secrets import without_secrets


class Source(Enum):
    """Where questions and images come from."""

    EASY_VQA = "easy-vqa"
    DIRECTORY = "directory"
    OFFICIAL = "official"
    HUB = "hub"


class Mask(Enum):
    """What a position may see; see `vlm_vqa.model.layout`."""

    IMAGE_PREFIX = "image-prefix"
    PREFIX_LM = "prefix-lm"


class TooLong(Enum):
    """What happens to a record that does not fit `prompt.text_length`."""

    ERROR = "error"
    DROP = "drop"


class Answers(Enum):
    """Which of a question's ten answers is taught."""

    MAJORITY = "majority"
    DRAWN = "drawn"


class Optimizer(Enum):
    """The optimizers this project supports, by the HF Trainer's names."""

    ADAMW_TORCH = "adamw_torch"
    ADAMW_BNB_8BIT = "adamw_bnb_8bit"


class Attention(Enum):
    """How attention is computed in training; see `vlm_vqa.model.attention`."""

    EAGER = "eager"
    FLEX = "flex_attention"


class Scheduler(Enum):
    """Learning-rate schedules, by the HF Trainer's names."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"


class Dtype(Enum):
    """Floating-point types, by torch's names."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class StoreDtype(Enum):
    """Types of stored features; see `vlm_vqa.data.feature_store`."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


class Rounding(Enum):
    """How an updated weight is rounded to `train.weights_dtype`."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


class Punkt(Enum):
    """Where HELM's metrics take nltk's sentence splitter from."""

    BUNDLED = "bundled"
    INSTALLED = "installed"


HELM_INSTRUCTION = (
    'Answer the question using a single word or phrase. When the question asks "How many...", '
    "respond with just a number (e.g., 3) and not the word corresponding to the number."
)
"""What HELM's `vqa` run tells every model."""
HELM_MAX_TOKENS = 20
"""Longest answer that HELM's `vqa` run asks for, in tokens."""
IMAGE_NAME = re.compile(r"[^{}/\\]*\{image_id(?::0(\d{1,2})d)?\}[^{}/\\]*")
ENCODERS = {"small": (65, 128)} | {
    f"facebook/dinov2-{size}": (257, width)
    for size, width in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536))
}
"""Tokens an image becomes, and their width."""
_LEAST_VOCABULARY = 260
"""Every byte, and four special tokens."""
_MOST_PARAMETERS = 28 * 10**9
"""Gemma 2's largest has 27 billion."""


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes; 0 is none of them where `above_0`, and `most` is."""

    most: float
    above_0: bool = True

    def words(self) -> str:
        """Return the range for a message."""
        most = f"{self.most:,}" if isinstance(self.most, int) else f"{self.most:g}"
        return f"{'above 0' if self.above_0 else 'at least 0'} and at most {most}"

    def __contains__(self, number: float) -> bool:
        return (number > 0 if self.above_0 else number >= 0) and number <= self.most


Count = typing.Annotated[int, Range(2**31 - 1)]
Natural = typing.Annotated[int, Range(2**31 - 1, above_0=False)]
Seed = typing.Annotated[int, Range(2**32 - 1, above_0=False)]
"""What numpy and torch both take."""
Few = typing.Annotated[int, Range(4096)]
"""Of what every one costs memory, whatever the data."""
Size = typing.Annotated[int, Range(2**20)]
"""A tensor's edge."""
Rate = typing.Annotated[float, Range(1e6)]
"""Larger ones overflow in float32, whatever they stand for."""
Decay = typing.Annotated[float, Range(1e6, above_0=False)]
Share = typing.Annotated[float, Range(0.999, above_0=False)]


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split, relative to `data.directory`, in VQAv2's official layout."""

    questions: str
    """Questions file, JSON or gzipped JSON."""
    annotations: str
    """Annotations file, JSON or gzipped JSON."""
    images: str
    """Folder of images, or a zip archive of them."""
    image_name: str
    """Name of an image's file as a format string of `image_id`."""


@dataclass(frozen=True)
class OfficialParams:
    """Where source `official` downloads VQAv2's six archives from; their names and checksums are fixed."""

    texts_url: str
    """Folder of the four archives of questions and annotations."""
    images_url: str
    """Folder of the two archives of images."""
    keep_archives: bool
    """Leave the archives in data/archives when the records are made; else they are removed then."""
    downloads: Few
    """Archives downloaded at once."""


@dataclass(frozen=True)
class HubRepository:
    """One split in a `datasets` repository on the hub."""

    repository: str
    """`owner/name`."""
    revision: str
    """Its commit, 40 hex digits."""
    split: str
    """The name of the split there."""


@dataclass(frozen=True)
class HubParams:
    """What source `hub` streams."""

    train: HubRepository
    val: HubRepository


@dataclass(frozen=True)
class DataParams:
    """What `fetch-vqav2` reads."""

    source: Source
    """`easy-vqa` (from its PyPI package), `directory` (VQAv2's official layout in a local folder), `official` (its six
    archives, downloaded) or `hub` (a `datasets` repository)."""
    directory: str
    """Folder of the official files, for source `directory`. It is a dependency of the stage, so it must exist."""
    train: SplitFiles
    """Files of the training split, for source `directory`."""
    val: SplitFiles
    """Files of the validation split, for source `directory`."""
    allow_split_overlap: bool
    """Accept images that stand in both splits. Only plumbing tests want that."""
    official: OfficialParams | None
    """For source `official`; null otherwise."""
    hub: HubParams | None
    """For source `hub`; null otherwise."""
    max_image_pixels: Count
    """Images with more pixels are refused before they are decoded."""


@dataclass(frozen=True)
class VisionParams:
    """The frozen DINOv2 and how `extract-features` runs it."""

    launch: str
    """Name of the accelerate config in `launch/` that extract-features runs under."""
    model: str
    """`small` (the encoder in this package), a hub id, or a local folder in HF format."""
    revision: str | None
    """Commit of a hub id (40 hex digits); null for `small` and for folders."""
    num_patches: Size
    """Tokens an image becomes, CLS included; checked against the encoder."""
    visual_embed_dim: Size
    """Width of such a token; checked against the encoder."""
    batch_size: Count
    """Images per forward pass."""
    compute_dtype: Dtype
    """Weights and activations of the encoder. DINOv2 in float16 is not supported."""
    store_dtype: StoreDtype
    """Type of the stored features; `int8` has a scale for every token and takes half the disk of 16 bits."""


@dataclass(frozen=True)
class LanguageConfig:
    """Shape of a randomly initialised Gemma 2; everything else is `Gemma2Config`'s default."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Few
    num_attention_heads: Few
    num_key_value_heads: Few
    head_dim: Few


@dataclass(frozen=True)
class LanguageParams:
    """The Gemma 2 that is trained."""

    model: str
    """`random` (from `language.config` and `seed`), a hub id, or a local folder in HF format."""
    revision: str | None
    """Commit of a hub id (40 hex digits); null otherwise."""
    vocab_size: Size | None
    """Size of the tokenizer trained on the training records, for `random`; null otherwise."""
    config: LanguageConfig | None
    """Shape, for `random`; null otherwise."""


@dataclass(frozen=True)
class PromptParams:
    """The token layout: image, `<bos>`, instruction, question, newline, answer, `<eos>`."""

    mask: Mask
    """`image-prefix`: image tokens see each other, text is causal. `prefix-lm`: PaliGemma's, all before the answer too."""
    instruction: str
    """What is asked of the model before each question; HELM's `vqa` scenario sends the same words."""
    text_length: Size
    """Most tokens after the image tokens: `<bos>`, instruction, question, newline, answer, `<eos>`."""
    too_long: TooLong
    """`error` stops at a record over `text_length`, `drop` leaves it out and reports how many. Answers are never cut."""


@dataclass(frozen=True)
class LoraParams:
    """Low-rank adapters instead of all of Gemma 2's weights; merged into them at the end of training."""

    rank: Few
    alpha: Rate
    """Adapters are scaled by alpha / rank."""
    dropout: Share
    """On what enters an adapter."""
    targets: tuple[str, ...]
    """Linear layers of Gemma 2 that get one, by the last part of their names."""


@dataclass(frozen=True)
class TrainParams:
    """Fine-tuning with the HF Trainer."""

    launch: str
    """Name of the accelerate config in `launch/`."""
    answers: Answers
    """`majority` teaches the most common of a question's ten answers; `drawn` one of the ten, drawn anew each epoch."""
    lora: LoraParams | None
    """Train adapters and the projector; null trains all weights."""
    batch_size: Count
    """Questions per process and forward pass, on average: an optimizer step takes exactly batch_size x
    gradient_accumulation_steps x processes of them, and divides them into forward passes of about equally many tokens."""
    gradient_accumulation_steps: Few
    """Forward passes per optimizer step."""
    questions_per_row: Count
    """Most questions of one image that share a row under `image-prefix`; its others come in rows of other steps. Fewer cost
    more time and show more different images a step; 1 is one row per question, in random order. `prefix-lm` wants 1."""
    attention: Attention
    """`eager` runs everywhere; `flex_attention` is for GPUs (it compiles, and knows no dropout)."""
    freeze_embeddings: bool
    """Leave Gemma 2's token embedding, which is its output head too, as it is."""
    dataloader_workers: typing.Annotated[int, Range(256, above_0=False)]
    """Processes that prepare the next batches while this one is computed; 0 prepares each when it is needed, which is
    faster where the cores that would prepare are the ones that compute."""
    learning_rate: Rate
    weight_decay: Decay
    dropout: Share
    """Dropout on Gemma 2's attention probabilities, the only dropout that Gemma 2 has. The projector has none."""
    optimizer: Optimizer
    block_wise: bool
    """8-bit optimizer states quantised block by block; bitsandbytes has no other mode left, so false is refused."""
    percentile_clipping: typing.Annotated[int, Range(100, above_0=False)]
    """8-bit AdamW: clip each parameter's gradient norm to this percentile of its last 100; 0 and 100 are off."""
    lr_scheduler_type: Scheduler
    warmup_ratio: Share
    """Share of all optimizer steps over which the learning rate rises from 0."""
    max_grad_norm: typing.Annotated[float, Range(1e30)]
    """Global gradient norm is clipped to this."""
    num_train_epochs: Count
    compute_dtype: Dtype
    """float32, or bfloat16 by autocast. float16 overflows in Gemma 2 and is refused."""
    weights_dtype: Dtype
    """Type of the weights that the optimizer updates: float32, or bfloat16 where memory allows no more; see `rounding`."""
    rounding: Rounding
    """`nearest` for float32 weights. `stochastic` for bfloat16 ones, whose spacing is wider than most updates: rounded up or
    down by chance, in proportion, they move on average as float32 weights do."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third more time."""
    logging_steps: Count
    save_steps: Count
    """Optimizer steps between checkpoints."""
    save_total_limit: Count
    """Checkpoints kept while training; all go when the stage has succeeded."""
    restart_optimizer: bool
    """Go on with fresh optimizer states where those of the checkpoint do not fit, after a change of the number of processes
    for instance; false refuses."""
    stall_seconds: typing.Annotated[int, Range(30 * 24 * 3600)]
    """With several processes: when none has made progress for so long, all stop and the one that holds them up is named."""


@dataclass(frozen=True)
class EvaluationParams:
    """What `helm-eval` measures."""

    vqa_questions: Count | None
    """Validation questions for VQA accuracy, the first of HELM's own random order; null is all."""
    helm_instances: Count
    """Instances of HELM's `vqa` run."""
    helm_threads: typing.Annotated[int, Range(1024)]
    """HELM's request threads; one worker answers them in batches."""
    punkt_tab: Punkt
    """nltk data for HELM's metrics: `bundled` (in this repo, offline) or `installed` (nltk's own, downloaded)."""
    batch_size: Count
    """Questions answered at once."""
    max_new_tokens: typing.Annotated[int, Range(HELM_MAX_TOKENS)]
    """Longest answer, in tokens."""


@dataclass(frozen=True)
class TrackingParams:
    """MLflow."""

    experiment: str
    """Name of the MLflow experiment."""
    max_artifact_mib: Natural
    """Larger files are logged by reference (path, size, hash) and not copied."""


@dataclass(frozen=True)
class Params:
    """All of `params.yaml`."""

    seed: Seed
    data: DataParams
    vision: VisionParams
    language: LanguageParams
    prompt: PromptParams
    train: TrainParams
    evaluation: EvaluationParams
    tracking: TrackingParams

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested values, as in the file."""
        return _plain(self)

    def flat(self) -> dict[str, Any]:
        """Return `{"train.learning_rate": 0.001, ...}` in the file's order."""
        return dict(_flatten(self.as_dict(), ""))

    def hash(self) -> str:
        """Return the hash that names these parameters; where a run is tracked does not change what it is."""
        return hash_json({key: value for key, value in self.as_dict().items() if key != "tracking"})

    def training_hash(self) -> str:
        """Return the hash of what decides trained weights."""
        return hash_json(self._training())

    def recipe_hash(self, processes: int) -> str:
        """Return the hash of what decides trained weights up to rounding: what a checkpoint must agree with.

        It is `training_hash`, but that an optimizer step's questions count, not how they are divided: a training may go on
        with another launch or number of processes if batch_size and gradient_accumulation_steps make up for it.
        """
        sections = self._training()
        train = sections["train"]
        per_process = train["batch_size"] * train["gradient_accumulation_steps"]
        kept = {key: value for key, value in train.items() if key not in DIVISION}
        return hash_json(sections | {"train": kept | {"questions_a_step": per_process * processes}})

    def _training(self) -> dict[str, Any]:
        """Return the sections that the train stage declares, but for how extract-features was launched."""
        sections = {key: self.as_dict()[key] for key in ("seed", "vision", "language", "prompt", "train")}
        vision = {key: value for key, value in sections["vision"].items() if key != "launch"}
        return sections | {"vision": vision}


DIVISION = {
    "launch",
    "batch_size",
    "gradient_accumulation_steps",
    "dataloader_workers",
    "restart_optimizer",
    "stall_seconds",
}
"""Keys of `train` that say how the work is divided and watched, not what is computed."""


class Unquoted(str):
    """A scalar that YAML takes for a number, a truth value or a date, as its text stands in the file."""

    __repr__ = str.__str__


INTERPOLATED = ("data.directory", "vision.launch", "train.launch")
"""Texts that DVC fills into `dvc.yaml` as YAML reads them."""
MOST_VALUES = 10_000
"""In a parameter file; the longest has a hundred. Aliases of aliases make millions out of ten lines."""
MOST_BYTES = 2**20
"""Of a parameter file; the longest has three thousand."""
MOST_CHARACTERS = 1000
"""In a text; the longest has two hundred."""
_TAG = "tag:yaml.org,2002:"
_TAGS = {_TAG + kind for kind in "map seq str int float bool null timestamp merge value".split()}


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and validate a parameter file.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, missing, given twice or of the wrong type, or a
            combination is impossible; the message holds the key's full name.
    """
    try:
        check_regular(path, MOST_BYTES)
        node = YAML(typ="safe", pure=True).compose(Path(path).read_text(encoding="utf-8"))
        values = None if node is None else _read(node, "", itertools.count(1))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Run from the project's root folder.") from error
    except (YAMLError, ValueError, OverflowError) as error:
        # Alone: the error quotes the line, in which a password may stand.
        raise UserError(f"{path}: not valid YAML in UTF-8: {error}. Mend the place it names.") from None
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply, or inside itself. Compare with presets/small.yaml.") from error
    return parse_params(values, str(path))


def _read(node: Node, key: str, count: typing.Iterator[int]) -> Any:
    """Return what a YAML node holds, with every scalar but null as its text; `key` is its full name."""
    line = node.start_mark.line + 1
    if next(count) > MOST_VALUES:
        raise UserError(f"line {line}: more than {MOST_VALUES:,} values. Compare with presets/small.yaml.")
    if node.tag not in _TAGS:
        raise UserError(f"line {line}: {key} has the tag {node.tag.removeprefix(_TAG)}. Write the value without a tag.")
    if isinstance(node, MappingNode):
        return _read_mapping(node, key, count)
    if isinstance(node, SequenceNode):
        return [_read(item, key, count) for item in node.value]
    if node.tag == _TAG + "null":
        return None
    if node.tag == _TAG + "timestamp":
        logging.getLogger(__name__).warning("%s is %s: DVC cannot read a date, put it in quotes", key, node.value)
    return node.value if node.style or node.tag == _TAG + "str" else Unquoted(node.value)


def _read_mapping(node: MappingNode, key: str, count: typing.Iterator[int]) -> dict[str, Any]:
    """Return a mapping whose keys are texts; what `<<` brings gives way to its own keys."""
    lines, merged, own = {}, {}, {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        if not isinstance(name, ScalarNode):
            raise UserError(f"line {line}: a key of {key or 'the file'} is not a name.")
        full = _join(key, name.value)
        if name.value in lines:
            raise UserError(f"line {line}: {full} stands in line {lines[name.value]} already. Keep one of them.")
        lines[name.value] = line
        found = _read(value, full, count)
        if name.tag != _TAG + "merge":
            own[name.value] = found
            continue
        for part in reversed(found if isinstance(found, list) else [found]):
            if not isinstance(part, dict):
                raise UserError(f"line {line}: {full} must be an alias of a mapping.")
            merged |= part
    return merged | own


def parse_params(values: Any, name: str = "params.yaml") -> Params:
    """Validate nested plain values as `load_params` does; `name` stands in error messages."""
    try:
        params = _build(Params, values, "")
        _check(params)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return params


def _build(kind: type, values: Any, key: str) -> Any:
    """Turn a mapping into dataclass `kind`; `key` is its full name."""
    if not isinstance(values, dict):
        raise UserError(
            f"{key or 'the file'} must be a mapping, not {_shown(values)}. Compare with presets/small.yaml."
        )
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)]
    for unknown in values.keys() - set(names):
        raise UserError(f"unknown key {_join(key, unknown)}. Known here: {', '.join(names)}.")
    for missing in (name for name in names if name not in values):
        raise UserError(f"missing key {_join(key, missing)}. Every key is required; compare with presets/small.yaml.")
    return kind(**{name: _convert(hints[name], values[name], _join(key, name)) for name in names})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Check one value against its type; enums and nested dataclasses are built."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (option for option in hint.__args__ if option is not type(None))
    if typing.get_origin(hint) is typing.Annotated:
        number, (allowed,) = _scalar(hint.__origin__, value, key), hint.__metadata__
        if number not in allowed:
            raise UserError(f"{key} is {number}; it must be {allowed.words()}.")
        return number
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key)
    if issubclass(hint, Enum):
        allowed = [option.value for option in hint]
        if value not in allowed:
            raise UserError(f"{key} is {_shown(value)}; it must be one of {', '.join(allowed)}.")
        return hint(value)
    if hint == tuple[str, ...]:
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise UserError(f"{key} is {_shown(value)}; it must be a list of names.")
        return tuple(_scalar(str, item, key) for item in value)
    return _scalar(hint, value, key)


_WANTED = {
    str: "text: put it in quotes",
    bool: "true or false",
    int: "a whole number below 2^63, such as 64",
    float: "a finite number, such as 1e-5",
}
_GREATEST = {int: 2**63 - 1, float: sys.float_info.max}


def _scalar(hint: type, value: Any, key: str) -> Any:
    """Return the text, truth value or number that a key of type `hint` wants; Python's own values pass if they are that."""
    if hint is str and isinstance(value, str):
        if isinstance(value, Unquoted) and key in INTERPOLATED:
            raise UserError(f"{key} is {value}, which DVC fills in as YAML reads it. Put it in quotes: '{value}'.")
        if not value.isprintable() or len(value) > MOST_CHARACTERS:
            raise UserError(
                f"{key} is {_shown(value)}; it must be one line of at most {MOST_CHARACTERS:,} printable characters."
            )
        return str(value)
    if hint is bool:
        truth = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
        if type(truth) is bool:
            return truth
    if hint in _GREATEST:
        number = _number(value) if isinstance(value, str) else value
        if type(number) in (int, float) and abs(number) <= _GREATEST[hint] and (hint is float or number == int(number)):
            return hint(number)
    raise UserError(f"{key} is {_shown(value)}; it must be {_WANTED[hint]}.")


def _number(text: str) -> int | float | None:
    """Return the number that a text writes, or None; nan, inf and 12:30 are none."""
    if not re.fullmatch(r"[-+.0-9_a-fA-Fxo]+", text.strip()):
        return None
    for read in (int, float, lambda prefixed: int(prefixed, 0)):
        try:
            return read(text)
        except ValueError:
            continue
    return None


def _shown(value: Any) -> str:
    """Return a value for a message, in one short line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _check(params: Params) -> None:
    _check_secrets(params)
    _check_source(params.data)
    _check_models(params)
    _check_shape(params)
    _check_helm(params)
    _check_train(params.train)
    for key, name in (("vision.launch", params.vision.launch), ("train.launch", params.train.launch)):
        if not re.fullmatch(r"[a-z0-9-]{1,100}", name):
            raise UserError(f"{key} is {name!r}; it must name a file launch/NAME.yaml.")
    if params.prompt.mask is Mask.PREFIX_LM and params.train.questions_per_row != 1:
        raise UserError(
            f"train.questions_per_row is {params.train.questions_per_row}; prompt.mask prefix-lm lets the image see the "
            "question, so no two questions can share it. Set it to 1, or prompt.mask to image-prefix."
        )


def _check_secrets(params: Params) -> None:
    """Refuse addresses with a login or a query: this file, dvc.lock and MLflow are for all to read."""
    for key, value in params.flat().items():
        if isinstance(value, str) and key != "prompt.instruction" and without_secrets(value) != value:
            raise UserError(
                f"{key} holds a login or a query (?...). Such secrets do not belong here: DVC copies this file's values "
                "into dvc.lock, which is committed. Write the address without them, and the login into ~/.netrc, which "
                "downloads read: machine HOST login NAME password PASSWORD."
            )


def _check_helm(params: Params) -> None:
    """Refuse what HELM's unmodified run could not measure, hours before it would."""
    if params.prompt.instruction != HELM_INSTRUCTION:
        raise UserError(
            f"prompt.instruction is {params.prompt.instruction!r}, but HELM's vqa run asks with {HELM_INSTRUCTION!r}. "
            "Set it to HELM's text."
        )
    # A token holds no more than a word; the question and the answer have at least one each, and there are two newlines.
    least = 1 + len(HELM_INSTRUCTION.split()) + 2 + 1 + 1 + 1
    if params.prompt.text_length < least:
        raise UserError(
            f"prompt.text_length is {params.prompt.text_length}; the instruction alone leaves room for no question below "
            f"{least}. Raise it; the presets have 64."
        )
    most, instances = params.evaluation.vqa_questions, params.evaluation.helm_instances
    if most is not None and most < instances:
        raise UserError(
            f"evaluation.vqa_questions is {most}, below evaluation.helm_instances ({instances}), which are among them. Set "
            f"it to {instances} or more, or to null for the whole split."
        )


def _check_source(data: DataParams) -> None:
    """Refuse settings of a source that is not used, unpinned repositories, and names that make no file names."""
    for split in ("train", "val"):
        pattern = getattr(data, split).image_name
        if not IMAGE_NAME.fullmatch(pattern):
            raise UserError(
                f"data.{split}.image_name is {pattern!r}; it must be a file name (no folder) with one {{image_id}} or "
                "{image_id:012d}, such as COCO_train2014_{image_id:012d}.jpg."
            )
    for name, source in (("official", Source.OFFICIAL), ("hub", Source.HUB)):
        if (getattr(data, name) is not None) != (data.source is source):
            raise UserError(
                f"data.{name} must {'be given' if data.source is source else 'be null'}: data.source is {data.source.value}."
            )
    if data.hub is not None:
        for split in ("train", "val"):
            revision = getattr(data.hub, split).revision
            if not re.fullmatch(r"[0-9a-f]{40}", revision):
                raise UserError(f"data.hub.{split}.revision is {revision!r}; it must be a commit of 40 hex digits.")


def _check_models(params: Params) -> None:
    """Refuse towers that could not be loaded the same way next month."""
    for key, model, revision, own in (
        ("vision", params.vision.model, params.vision.revision, "small"),
        ("language", params.language.model, params.language.revision, "random"),
    ):
        from_hub = model != own and not is_local(model)
        if from_hub and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            raise UserError(
                f"{key}.revision is {revision!r}; {key}.model {model!r} comes from the hub (no such local folder), and a "
                "hub model is pinned by its commit of 40 hex digits."
            )
        if not from_hub and revision is not None:
            raise UserError(f"{key}.revision is {revision!r}; it must be null: {key}.model {model!r} has no revisions.")
    random = params.language.model == "random"
    for name in ("vocab_size", "config"):
        if (getattr(params.language, name) is not None) != random:
            raise UserError(f"language.{name} must {'be given' if random else 'be null'}: language.model is "
                            f"{params.language.model!r}.")  # fmt: skip
    if params.vision.compute_dtype is Dtype.FLOAT16:
        raise UserError("vision.compute_dtype is float16; use float32 or bfloat16: DINOv2 overflows in float16.")


def _check_shape(params: Params) -> None:
    """Refuse towers that cannot be built."""
    vision, shape, vocabulary = params.vision, params.language.config, params.language.vocab_size
    known = ENCODERS.get(vision.model, (vision.num_patches, vision.visual_embed_dim))
    for name, number in zip(("num_patches", "visual_embed_dim"), known, strict=True):
        if getattr(vision, name) != number:
            raise UserError(
                f"vision.{name} is {getattr(vision, name)}, but {vision.model!r} makes {number}. Set it to {number}."
            )
    if shape is None:
        return
    if vocabulary < _LEAST_VOCABULARY:
        raise UserError(f"language.vocab_size is {vocabulary}; bytes and special tokens alone are {_LEAST_VOCABULARY}.")
    heads, shared = shape.num_attention_heads, shape.num_key_value_heads
    if heads % shared or shape.hidden_size % heads:
        raise UserError(
            f"language.config.num_attention_heads is {heads}; it must be a multiple of num_key_value_heads ({shared}) and "
            f"divide hidden_size ({shape.hidden_size}), as transformers wants it."
        )
    if shape.head_dim % 2:
        raise UserError(f"language.config.head_dim is {shape.head_dim}; it must be even: positions rotate pairs.")
    layer = shape.hidden_size * (2 * (heads + shared) * shape.head_dim + 3 * shape.intermediate_size)
    parameters = shape.num_hidden_layers * layer + vocabulary * shape.hidden_size
    if parameters > _MOST_PARAMETERS:
        raise UserError(f"language.config makes {parameters:,} weights; more than {_MOST_PARAMETERS:,} are refused.")


def is_local(model: str) -> bool:
    """Tell a local folder from a hub id: it exists, or it is written as a path."""
    return os.path.isdir(model) or model.startswith(("/", "./", "../"))


def _check_train(train: TrainParams) -> None:
    """Refuse what the installed libraries would drop without a word, or what is known to train wrongly."""
    _check_rounding(train)
    if train.compute_dtype is Dtype.FLOAT16:
        raise UserError("train.compute_dtype is float16; use bfloat16 or float32: Gemma 2 overflows in float16.")
    if not train.block_wise:
        raise UserError("train.block_wise is false; it must be true: bitsandbytes has no other 8-bit mode any more.")
    if train.percentile_clipping not in (0, 100) and train.optimizer is not Optimizer.ADAMW_BNB_8BIT:
        raise UserError(
            f"train.percentile_clipping is {train.percentile_clipping}, which belongs to train.optimizer adamw_bnb_8bit; "
            f"set it to 100 (off) for {train.optimizer.value}."
        )
    if train.attention is Attention.FLEX and train.dropout > 0:
        raise UserError(
            f"train.dropout is {train.dropout}; flex_attention cannot drop attention probabilities. Set train.dropout: 0.0 "
            "or train.attention: eager."
        )
    _check_lora(train)


def _check_lora(train: TrainParams) -> None:
    if train.lora is None:
        return
    unknown = sorted(set(train.lora.targets) - set(PROJECTIONS))
    if unknown:
        raise UserError(
            f"train.lora.targets has {', '.join(unknown)}; Gemma 2's linear layers are {', '.join(PROJECTIONS)}."
        )
    if not train.freeze_embeddings:
        raise UserError("train.freeze_embeddings is false; it must be true with train.lora: only adapters are trained.")


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a `Gemma2DecoderLayer`."""


def _check_rounding(train: TrainParams) -> None:
    """Refuse weights that would lose their updates, or a rounding that does nothing."""
    if train.weights_dtype is Dtype.FLOAT16:
        raise UserError("train.weights_dtype is float16; use float32 or bfloat16: Gemma 2 overflows in float16.")
    if train.weights_dtype is Dtype.FLOAT32 and train.rounding is not Rounding.NEAREST:
        raise UserError("train.rounding is stochastic, but train.weights_dtype is float32; set it to nearest.")
    if train.weights_dtype is Dtype.BFLOAT16 and train.rounding is not Rounding.STOCHASTIC:
        raise UserError(
            "train.weights_dtype is bfloat16 with train.rounding nearest: most updates are smaller than the spacing of such "
            "weights and would be lost. Set train.rounding: stochastic, or train.weights_dtype: float32 with "
            "train.compute_dtype: bfloat16 to compute in 16 bits over float32 weights."
        )
    if train.weights_dtype is Dtype.BFLOAT16 and train.compute_dtype is not Dtype.BFLOAT16:
        raise UserError(
            f"train.weights_dtype is bfloat16, but train.compute_dtype is {train.compute_dtype.value}; set it to bfloat16."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return list(value)
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _flatten(values: dict[str, Any], prefix: str) -> typing.Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
