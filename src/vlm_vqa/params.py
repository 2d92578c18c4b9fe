"""`params.yaml` as typed, validated, frozen objects.

Unknown keys are refused, and so are missing ones but for those that came after the first version: their default is the
value that means "as before". Below its field stands the meaning of a key; its type says which values it takes, and the
class's rules what must agree with others. pydantic applies both to a file; `scripts.schema` writes the types for editors.
Objects that are made in Python are not validated.

A key's type also says what its text is. So `1e-5`, `+1e-5`, `.00001` and `"1e-5"` are one number where a number is wanted,
`2.0` and `1e3` are whole ones, `010` is ten as it is for DVC, and `2024`, `no` or `2026-11-26` stay text where text is
wanted. Truth values are `true` and `false`; `yes`, `no`, `on` and `off`, which YAML 1.2 takes for text, are refused there.
"""

import functools
import json
import logging
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, ValidationInfo

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import hash_json
from vlm_vqa.yaml_file import Line, Range, read_yaml, shown, truth

# What their values mean stands below the keys.
Source = StrEnum(
    "Source", {"EASY_VQA": "easy-vqa", "DIRECTORY": "directory", "TABLE": "table", "OFFICIAL": "official", "HUB": "hub"}
)
Start = StrEnum("Start", {"TOWERS": "towers", "CHECKPOINT": "checkpoint"})
BadRecords = StrEnum("BadRecords", {"REFUSE": "refuse", "DROP": "drop"})
Doubtful = StrEnum("Doubtful", {"COUNT": "count", "REFUSE": "refuse"})
Mask = StrEnum("Mask", {"IMAGE_PREFIX": "image-prefix", "PREFIX_LM": "prefix-lm", "CAUSAL": "causal"})
TooLong = StrEnum("TooLong", {"ERROR": "error", "DROP": "drop"})
Answers = StrEnum("Answers", {"MAJORITY": "majority", "DRAWN": "drawn"})
ValidateOn = StrEnum("ValidateOn", {"TRAIN": "train", "VAL": "val"})
Keep = StrEnum("Keep", {"LAST": "last", "BEST": "best"})
Optimizer = StrEnum("Optimizer", {"ADAMW_TORCH": "adamw_torch", "ADAMW_BNB_8BIT": "adamw_bnb_8bit"})
Attention = StrEnum("Attention", {"EAGER": "eager", "FLEX": "flex_attention"})
Scheduler = StrEnum(
    "Scheduler", {"COSINE": "cosine", "LINEAR": "linear", "CONSTANT_WITH_WARMUP": "constant_with_warmup"}
)
Dtype = StrEnum("Dtype", {"FLOAT32": "float32", "BFLOAT16": "bfloat16", "FLOAT16": "float16"})
StoreDtype = StrEnum("StoreDtype", {"FLOAT32": "float32", "BFLOAT16": "bfloat16", "FLOAT16": "float16", "INT8": "int8"})
Rounding = StrEnum("Rounding", {"NEAREST": "nearest", "STOCHASTIC": "stochastic"})
Punkt = StrEnum("Punkt", {"BUNDLED": "bundled", "INSTALLED": "installed"})
Gate = StrEnum("Gate", {"ACCURACY": "accuracy", "BLEU_1": "bleu_1"})

HELM_INSTRUCTION = (
    'Answer the question using a single word or phrase. When the question asks "How many...", '
    "respond with just a number (e.g., 3) and not the word corresponding to the number."
)
"""What HELM's `vqa` run tells every model."""
HELM_MAX_TOKENS = 20  # Longest answer that HELM's `vqa` run asks for, in tokens
IMAGE_NAME = re.compile(r"[^{}/\\]*\{image_id(?::0(\d{1,2})d)?\}[^{}/\\]*")
ENCODERS = {"small": (65, 128)} | {
    f"facebook/dinov2-{size}": (257, width)
    for size, width in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536))
}
ENCODERS |= {"google/siglip-so400m-patch14-224": (256, 1152)}  # Tokens an image becomes, and their width
CHECKPOINT = "checkpoint"  # How `vision.model` and `language.model` say that they are the checkpoint's own
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOST_MISTAKES = 20  # Lines of a message
_MOST_WEIGHTS = 28 * 10**9  # Gemma 2's largest has 27 billion


def _places(value: Any) -> Any:
    one = Line().read
    return tuple(map(one, value)) if isinstance(value, list | tuple) and value else one(value)


_PLACES = pydantic.WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
Truth = Annotated[bool, BeforeValidator(truth)]
Count = Annotated[int, Range(2**31 - 1)]
Natural = Annotated[int, Range(2**31 - 1, least=0)]
Seed = Annotated[int, Range(2**32 - 1, least=0)]  # What numpy and torch both take
Few = Annotated[int, Range(4096)]  # Of what every one costs memory, whatever the data
Size = Annotated[int, Range(2**20)]  # A tensor's edge
Rate = Annotated[float, Range(1e6)]  # Larger ones overflow in float32, whatever they stand for
Decay = Annotated[float, Range(1e6, least=0)]
Share = Annotated[float, Range(0.999, least=0)]
Wide = Literal[Dtype.FLOAT32, Dtype.BFLOAT16]  # The towers and Gemma 2 overflow in float16
Text = Annotated[str, Line()]
Places = Annotated[str | tuple[str, ...], BeforeValidator(_places), _PLACES]  # One folder or archive, or several
Commit = Annotated[str, Line("[0-9a-f]{40}", "a commit of 40 hex digits")]
Launch = Annotated[str, Line("[a-z0-9-]{1,100}", "the NAME of a file launch/NAME.yaml", dvc=True)]
Part = Annotated[float, Range(0.999)]
_IMAGE = "a file name (no folder) with one {image_id} or {image_id:012d}, such as COCO_train2014_{image_id:012d}.jpg"
ImageName = Annotated[str, Line(IMAGE_NAME.pattern, _IMAGE)]

Above = Mapping[str, Any]  # The valid fields above one, and those of the sections above as `Class.field`


def rules(check: Callable[[Any, str, Any, Above], str | None]) -> Any:
    """Make a method the rules of its class: from a field's name and valid value, it returns what is wrong beside others."""

    def validate(cls: type, value: Any, info: ValidationInfo) -> Any:
        assert info.context is not None, "parse_params gives one"
        if wrong := check(cls, str(info.field_name), value, info.context | info.data):
            raise ValueError(wrong)
        info.context[f"{cls.__name__}.{info.field_name}"] = value
        return value

    return pydantic.field_validator("*")(classmethod(validate))


def is_local(model: str) -> bool:
    """Tell a local folder from a hub id: it exists, or it is written as a path."""
    return os.path.isdir(model) or model.startswith(("/", "./", "../"))


def _pinned(model: str, revision: str | None, *own: str) -> str | None:
    """Return what is wrong with a model's revision; it must be loaded the same way next month."""
    from_hub = model not in own and not is_local(model)
    if from_hub and revision is None:
        return f"is null, but {model!r} comes from the hub (no such local folder): give its commit of 40 hex digits."
    return None if from_hub or revision is None else f"is {revision!r}; it must be null: {model!r} has no revisions."


class Section:
    """A group of keys."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", validate_default=True)


# --- the keys -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFiles(Section):
    """The files of one split, relative to `data.directory`, in VQAv2's official layout."""

    questions: Text
    """Questions file, JSON or gzipped JSON."""
    annotations: Text
    """Annotations file, JSON or gzipped JSON."""
    images: Places
    """Folder of images, with its sub-folders, or a zip archive of them; or a list of such."""
    image_name: ImageName
    """Name of an image's file as a format string of `image_id`."""


@dataclass(frozen=True)
class OfficialParams(Section):
    """Where source `official` downloads VQAv2's six archives from; their names and checksums are fixed."""

    texts_url: Text
    """Folder of the four archives of questions and annotations."""
    images_url: Text
    """Folder of the two archives of images."""
    keep_archives: Truth
    """Leave the archives in data/archives when the records are made; else they are removed then."""
    downloads: Few
    """Archives downloaded at once."""


@dataclass(frozen=True)
class HubRepository(Section):
    """One split in a `datasets` repository on the hub."""

    repository: Text
    """`owner/name`."""
    revision: Commit
    """Its commit, 40 hex digits."""
    split: Text
    """The name of the split there."""


@dataclass(frozen=True)
class HubParams(Section):
    """What source `hub` reads."""

    train: HubRepository
    val: HubRepository


@dataclass(frozen=True, kw_only=True)
class Columns(Section):
    """The columns of a table by what they hold; null is found by the usual names."""

    image: Text | None = None
    """File name of the picture, with or without ending and folder; or its bytes, as `datasets` embeds them in Parquet."""
    question: Text | None = None
    """The question; with LLaVA's conversations, the same column as `answers`."""
    answers: Text | None = None
    """One answer, or a list of them: of texts, of objects with `answer`, or such a list in JSON text."""
    question_id: Text | None = None
    """Its id, of any type; made where there is no such column."""
    image_id: Text | None = None
    """The picture's id, of any type; made of the picture's name where there is no such column."""
    question_type: Text | None = None
    """Leading words of the question; found by VQAv2's list where there is none."""
    answer_type: Text | None = None
    """`yes/no`, `number` or `other`; found by rule where there is none."""
    main_answer: Text | None = None
    """The answer that is taught; where there is none, the most common one, the earlier first."""


@dataclass(frozen=True, kw_only=True)
class HubTable(Section):
    """How a repository's table is read."""

    columns: Columns | None = None
    """The table's columns; null: all are found by the usual names."""


@dataclass(frozen=True, kw_only=True)
class TableParams(Section):
    """Questions in tables (csv, tsv, JSON lines, JSON, Parquet, or a folder of Parquet), relative to `data.directory`."""

    train: Text
    """The table to train on."""
    val: Text | None = None
    """The table to validate on; null with `val_share`."""
    val_share: Part | None = None
    """Share of the images of `train` that become val with all their questions; null with `val`."""
    val_seed: Seed = 0
    """Which images those are."""
    images: Places | None = None
    """Folder of images with its sub-folders, a zip archive, or a list of such; `{split}` in it stands for train or val.
    Null: the table holds the pictures' bytes."""
    image_name: ImageName | None = None
    """Makes a file name of what the image column holds, an id; null: that is a file name."""
    columns: Columns | None = None
    """The table's columns; null: all are found by the usual names."""

    @rules
    def _rules(cls, name: str, value: Any, above: Above) -> str | None:
        if name == "val_share" and (value is None) == (above.get("val") is None):
            return "and val: exactly one of them must be given, the other null."
        return None


def _kind_of_table(table: Any) -> str:
    return "hub" if isinstance(table, Mapping) and table.keys() <= {"columns"} else "table"


_Table = Annotated[
    Annotated[TableParams, pydantic.Tag("table")] | Annotated[HubTable, pydantic.Tag("hub")],
    pydantic.Discriminator(_kind_of_table),
]


@dataclass(frozen=True, kw_only=True)
class DataParams(Section):
    """What `fetch-vqav2` reads."""

    source: Source
    """`easy-vqa` (from its PyPI package), `directory` (VQAv2's official layout in a local folder), `table` (csv, JSON or
    Parquet in a local folder), `official` (VQAv2's six archives, downloaded) or `hub` (a `datasets` repository)."""
    directory: Annotated[str, Line(dvc=True)]
    """Folder of the files, for sources `directory` and `table`. It is a dependency of the stage, so it must exist."""
    train: SplitFiles
    """Files of the training split, for source `directory`."""
    val: SplitFiles
    """Files of the validation split, for source `directory`."""
    allow_split_overlap: Truth
    """Accept images that stand in both splits. Only plumbing tests want that."""
    official: OfficialParams | None = None
    """For source `official`; null otherwise."""
    hub: HubParams | None = None
    """For source `hub`; null otherwise."""
    table: _Table | None = None
    """For source `table`; for `hub` its columns alone, or null; null otherwise."""
    max_image_pixels: Count
    """Images with more pixels are refused before they are decoded."""
    bad_records: BadRecords = BadRecords.REFUSE
    """`drop` leaves out records that break the contract, and names them in the report."""
    most_dropped: Share = 0.01
    """Share of a split's questions that may be dropped; more are refused."""
    doubtful: Doubtful = Doubtful.COUNT
    """Main answers that nobody gave, and nearly equal pictures in both splits: counted in the report, or refused."""

    @pydantic.field_validator("official", "hub", "table", mode="before")
    @classmethod
    def _of_its_source(cls, value: Any, info: ValidationInfo) -> Any:
        name, source = str(info.field_name), info.data.get("source")
        if value is not None and source not in (None, name) and (name, source) != ("table", Source.HUB):
            raise ValueError(f"must be null, as data.source is not {name}.")
        if value is None and source == name:
            raise ValueError(f"must be given, as a mapping of {', '.join(keys_of(['data', name]))}.")
        if name == "table" and isinstance(value, Mapping) and source not in (None, _kind_of_table(value)):
            raise ValueError("has columns alone for data.source hub, and for table must have train, too.")
        return value


@dataclass(frozen=True, kw_only=True)
class ModelParams(Section):
    """What training starts from."""

    start: Start = Start.TOWERS
    """`towers`: the vision tower and Gemma 2 that `vision` and `language` name, joined by a freshly drawn projector.
    `checkpoint`: a whole `PaliGemmaForConditionalGeneration`, its own tower and projector included."""
    checkpoint: Text | None = None
    """A hub id or a local folder in HF format, a copy of an export of this project among them; null for `towers`."""
    revision: Commit | None = None
    """Commit of a hub id (40 hex digits); null otherwise."""
    adapter: Text | None = None
    """A local folder with an adapter of that checkpoint in peft's format, merged into it before training; null: none."""

    @rules
    def _rules(cls, name: str, value: Any, above: Above) -> str | None:
        start, checkpoint = above.get("start"), above.get("checkpoint")
        if name == "checkpoint" and start is not None and (value is not None) != (start is Start.CHECKPOINT):
            return f"must be {'given' if value is None else 'null'}: model.start is {start.value}."
        if name == "revision" and (checkpoint or value):
            return _pinned(checkpoint or "", value, "")
        if name == "adapter" and value is not None and not checkpoint:
            return f"is {value!r}, but model.start is not checkpoint: an adapter is of one whole model."
        return None


def _of_checkpoint(key: str, model: str, above: Above) -> str | None:
    """Return what is wrong with a tower's name beside `model.start`: a checkpoint brings its own towers."""
    wanted = above.get("ModelParams.start") is Start.CHECKPOINT
    if wanted and model != CHECKPOINT:
        return f"is {model!r}, but model.start is checkpoint, which brings its own. Set {key} to {CHECKPOINT}."
    if not wanted and model == CHECKPOINT:
        return f"is {CHECKPOINT}, but model.start is towers. Name the model, or set model.start to checkpoint."
    return None


@dataclass(frozen=True)
class VisionParams(Section):
    """The frozen vision tower, a DINOv2 or a SigLIP, and how `extract-features` runs it."""

    launch: Launch
    """Name of the accelerate config in `launch/` that extract-features runs under."""
    model: Text
    """`small` (the encoder in this package), a hub id or a local folder in HF format; `checkpoint` with `model.start`."""
    revision: Commit | None
    """Commit of a hub id (40 hex digits); null otherwise."""
    num_patches: Size
    """Tokens an image becomes, a DINOv2's CLS included; checked against the encoder."""
    visual_embed_dim: Size
    """Width of such a token; checked against the encoder."""
    batch_size: Count
    """Images per forward pass."""
    compute_dtype: Wide
    """Weights and activations of the encoder. float16 is not supported."""
    store_dtype: StoreDtype
    """Type of the features; `int8` has a scale for every token and takes half the disk of 16 bits."""
    store: Truth = True
    """Store features once, in `data/features`; false: look at the pictures anew whenever they are needed."""

    @rules
    def _rules(cls, name: str, value: Any, above: Above) -> str | None:
        model = above.get("model")
        if name == "model":
            return _of_checkpoint("vision.model", value, above)
        if name == "store" and not value and above.get("store_dtype") is StoreDtype.INT8:
            return "is false, but vision.store_dtype is int8, which saves disk alone. Set that to the type of features."
        if name == "revision" and model:
            return _pinned(model, value, "small", CHECKPOINT)
        if name in ("num_patches", "visual_embed_dim") and model in ENCODERS:
            makes = ENCODERS[model][name == "visual_embed_dim"]
            return f"is {value}, but {model!r} makes {makes}. Set it to {makes}." if value != makes else None
        return None


@dataclass(frozen=True)
class LanguageConfig(Section):
    """Shape of a randomly initialised Gemma 2; everything else is `Gemma2Config`'s default."""

    hidden_size: Size
    """Width of a token; `num_attention_heads` must divide it."""
    intermediate_size: Size
    """Width inside a feed-forward part."""
    num_hidden_layers: Few
    """Transformer layers."""
    num_attention_heads: Few
    """Query heads of a layer."""
    num_key_value_heads: Few
    """Key and value heads of a layer, each for as many query heads; it must divide `num_attention_heads`."""
    head_dim: Few
    """Width of a head; even, since positions rotate pairs."""

    @rules
    def _rules(cls, name: str, value: Any, above: Above) -> str | None:
        width, heads = above.get("hidden_size", 0), above.get("num_attention_heads", 0)
        if name == "num_attention_heads" and width % value:
            return f"is {value}; it must divide hidden_size ({width}), as transformers wants it."
        if name == "num_key_value_heads" and heads % value:
            return f"is {value}; it must divide num_attention_heads ({heads}), as transformers wants it."
        if name == "head_dim" and value % 2:
            return f"is {value}; it must be even: positions rotate pairs."
        return None


@dataclass(frozen=True)
class LanguageParams(Section):
    """The Gemma 2 that is trained."""

    model: Text
    """`random` (from `language.config` and `seed`), a hub id, or a local folder; `checkpoint` with `model.start`."""
    revision: Commit | None
    """Commit of a hub id (40 hex digits); null otherwise."""
    vocab_size: Annotated[int, Range(2**20, least=260, why="bytes and special tokens alone are 260")] | None
    """Size of the tokenizer trained on the training records, for `random`; null otherwise."""
    config: LanguageConfig | None
    """Shape, for `random`; null otherwise."""

    @rules
    def _rules(cls, name: str, value: Any, above: Above) -> str | None:
        model, random = above.get("model"), above.get("model") == "random"
        if name == "model":
            return _of_checkpoint("language.model", value, above)
        if name == "revision" and model:
            return _pinned(model, value, "random", CHECKPOINT)
        if name in ("vocab_size", "config") and model and (value is not None) != random:
            return f"must be {'given' if random else 'null'}: language.model is {model!r}."
        if name == "config" and value is not None:
            heads = 2 * (value.num_attention_heads + value.num_key_value_heads)
            layer = value.hidden_size * (heads * value.head_dim + 3 * value.intermediate_size)
            weights = value.num_hidden_layers * layer + (above.get("vocab_size") or 0) * value.hidden_size
            if weights > _MOST_WEIGHTS:
                return f"makes {weights:,} weights; more than {_MOST_WEIGHTS:,} are refused. Make it smaller."
        return None


@dataclass(frozen=True)
class PromptParams(Section):
    """The token layout: image, `<bos>`, instruction, question, newline, answer, `<eos>`."""

    mask: Mask
    """`image-prefix`: image tokens see each other, text is causal. `prefix-lm`: PaliGemma's, all before the answer too.
    `causal`: image tokens, too, see only what is before them, as in most open models."""
    instruction: Text
    """What is asked of the model before each question; HELM's `vqa` scenario sends the same words."""
    # A token holds no more than a word; the question and the answer have at least one each, and there are two newlines.
    text_length: Annotated[int, Range(2**20, 6 + len(HELM_INSTRUCTION.split()), "below, the instruction has no room")]
    """Most tokens after the image tokens: `<bos>`, instruction, question, newline, answer, `<eos>`."""
    too_long: TooLong
    """`error` stops at a record over `text_length`, `drop` leaves it out and reports how many. Answers are never cut."""

    @rules
    def _rules(cls, name: str, value: Any, above: Above) -> str | None:
        if name == "instruction" and value != HELM_INSTRUCTION:
            return f"is {value!r}, but HELM's vqa run asks with {HELM_INSTRUCTION!r}. Set it to HELM's text."
        return None


@dataclass(frozen=True, kw_only=True)
class ValidationParams(Section):
    """What is measured while training, on questions that are not trained on; see `vlm_vqa.training.validation`."""

    from_: Annotated[ValidateOn, pydantic.Field(alias="from")] = ValidateOn.TRAIN
    """`train`: a dev part, split off the training images with all their questions, so that choosing by it does not touch
    what is reported. `val`: the first of the validation split, which is what helm-eval reports."""
    questions: Natural = 0
    """How many questions validate; 0 is no validation."""
    train_questions: Natural = 0
    """How many of those that are trained on are measured beside them; 0 is none."""
    every_steps: Count = 100
    """Optimizer steps between validations. One comes before the first step and one after the last, too."""
    keep: Keep = Keep.LAST
    """`last`: the last step's weights. `best`: those of the highest validation score; of equal ones, of the lowest loss."""
    patience: Count | None = None
    """Training ends after so many validations in a row without a higher score than before; null: it never ends early."""

    @rules
    def _rules(cls, name: str, value: Any, above: Above) -> str | None:
        off = {"train_questions": 0, "keep": Keep.LAST, "patience": None}
        if above.get("questions") == 0 and value != off.get(name, value):
            one = "Set that, or this to"
            return f"is {value}, but validation.questions is 0: nothing is measured. {one} {written(off[name])}."
        if name == "questions" and value == 1:
            return "is 1; it must be 0 or at least 2, of two images, so that one can be shown the other's."
        return None

    @property
    def selected_on(self) -> str:
        """By which questions the weights are selected, or when to end; a score of these is higher than of others."""
        if self.keep is Keep.LAST and self.patience is None:
            return "nothing"
        return "reported questions" if self.from_ is ValidateOn.VAL else "a dev part of the training images"


@dataclass(frozen=True)
class LoraParams(Section):
    """Low-rank adapters instead of all of Gemma 2's weights; merged into them at the end of training."""

    rank: Few
    """Width of an adapter: more can learn more, and have more weights."""
    alpha: Rate
    """Adapters are scaled by alpha / rank."""
    dropout: Share
    """On what enters an adapter."""
    targets: Annotated[tuple[Literal[PROJECTIONS], ...], pydantic.Field(min_length=1)]  # ty: ignore[invalid-type-form] - pydantic unfolds it
    """Linear layers of Gemma 2 that get one, by the last part of their names."""


@dataclass(frozen=True, kw_only=True)
class TrainParams(Section):
    """Fine-tuning with the HF Trainer."""

    launch: Launch
    """Name of the accelerate config in `launch/`."""
    answers: Answers = Answers.MAJORITY
    """`majority` teaches a question's main answer, or its most common; `drawn` one of all, drawn anew each epoch."""
    lora: LoraParams | None = None
    """Train adapters and the projector; null trains all weights."""
    batch_size: Count
    """Questions per process and forward pass, on average: an optimizer step takes exactly batch_size x
    gradient_accumulation_steps x processes of them, and divides them into forward passes of about equally many tokens."""
    gradient_accumulation_steps: Few
    """Forward passes per optimizer step."""
    questions_per_row: Count
    """Most questions of one image that share a row; its others come in rows of other steps. Fewer cost more time and show
    more different images a step; 1 is one row per question, in random order. Mask `prefix-lm` wants 1."""
    attention: Attention = Attention.EAGER
    """`eager` runs everywhere; `flex_attention` is for GPUs (it compiles, and knows no dropout)."""
    freeze_embeddings: Truth = False
    """Leave Gemma 2's token embedding, which is its output head too, as it is."""
    dataloader_workers: Annotated[int, Range(256, least=0)] = 0
    """Processes that prepare the next batches meanwhile; 0 is faster where they would take the cores that compute."""
    learning_rate: Rate
    """The highest, after warm-up."""
    projector_learning_rate: Rate | None = None
    """The projector's; null: `learning_rate`."""
    embedding_learning_rate: Rate | None = None
    """The token embedding's, which is Gemma 2's output head too; null: `learning_rate`."""
    projector_steps: Natural = 0
    """For so many first optimizer steps the projector alone is trained; the others' rates warm up after them."""
    weight_decay: Decay
    """AdamW's, on all trained weights but norms and biases."""
    dropout: Share
    """Dropout on Gemma 2's attention probabilities, the only dropout that Gemma 2 has. The projector has none."""
    adam_beta2: Annotated[float, Range(0.9999, least=0.5)] = 0.999
    """How slowly AdamW forgets the size of earlier gradients, those of warm-up among them."""
    optimizer: Optimizer
    """`adamw_torch`, or bitsandbytes' `adamw_bnb_8bit`, whose states take a quarter of the memory."""
    block_wise: Truth
    """8-bit optimizer states quantised block by block; bitsandbytes has no other mode left, so false is refused."""
    percentile_clipping: Annotated[int, Range(100, least=0)]
    """8-bit AdamW: clip each parameter's gradient norm to this percentile of its last 100; 0 and 100 are off."""
    lr_scheduler_type: Scheduler
    """How the learning rate falls to 0 after warm-up; `constant_with_warmup` keeps it."""
    warmup_ratio: Share
    """Share of all optimizer steps over which the learning rate rises from 0."""
    max_grad_norm: Annotated[float, Range(1e30, least=0)]
    """Global gradient norm is clipped to this; 0 is off."""
    optimizer_in_backward: Truth = False
    """Update each weight in the backward pass, as soon as its gradient is there, which is freed at once: the memory of all
    gradients is saved. Wants one pass a step, no clipping to a global norm, and one process or FSDP2."""
    num_train_epochs: Count
    """Times that each training question is seen."""
    compute_dtype: Wide
    """float32, or bfloat16 by autocast. float16 overflows in Gemma 2 and is refused."""
    weights_dtype: Wide
    """Type of the weights that the optimizer updates: float32, or bfloat16 where memory allows no more; see `rounding`."""
    rounding: Rounding = Rounding.NEAREST
    """`nearest` for float32 weights. `stochastic` for bfloat16 ones, whose spacing is wider than most updates: rounded up or
    down by chance, in proportion, they move on average as float32 weights do."""
    gradient_checkpointing: Truth
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention_checkpointing: Truth = False
    """Recompute attention's scores alone: most of long rows' activations, little of the work. For `attention: eager`."""
    compile: Truth = False
    """Compile all layers but the last by torch.compile: faster where a GPU waits for Python, after a minute or two at start.
    Wants a C compiler and `attention: eager`; not under DeepSpeed."""
    logging_steps: Count
    """Optimizer steps between log lines and points of the loss curve."""
    save_steps: Count
    """Optimizer steps between checkpoints."""
    save_total_limit: Count
    """Checkpoints kept while training; all go when the stage has succeeded."""
    restart_optimizer: Truth = False
    """Go on with fresh optimizer states where the checkpoint's do not fit, as with other processes; false refuses."""
    stall_seconds: Annotated[int, Range(30 * 24 * 3600)] = 600
    """With several processes: when none has made progress for so long, all stop and the one that holds them up is named."""

    @rules
    def _rules(cls, name: str, value: Any, above: Above) -> str | None:
        """Refuse what the installed libraries would drop without a word, or what is known to train wrongly."""
        weights, compute = above.get("weights_dtype"), above.get("compute_dtype")
        match name:
            case "questions_per_row" if value != 1 and above.get("PromptParams.mask") is Mask.PREFIX_LM:
                other = "Set it to 1, or prompt.mask to image-prefix or causal."
                return f"is {value}; prompt.mask prefix-lm lets the image see its question, so no two share it. {other}"
            case "freeze_embeddings" if not value and above.get("lora"):
                return "is false; it must be true with train.lora: only adapters are trained."
            case "embedding_learning_rate" if value is not None and above.get("freeze_embeddings"):
                return f"is {value}, but train.freeze_embeddings is true: it is not trained. Set this to null."
            case "dropout" if value > 0 and above.get("attention") is Attention.FLEX:
                other = "Set it to 0.0, or train.attention to eager."
                return f"is {value}; flex_attention cannot drop attention probabilities. {other}"
            case "block_wise" if not value:
                return "is false; it must be true: bitsandbytes has no other 8-bit mode any more."
            case "percentile_clipping" if value not in (0, 100) and above.get("optimizer") is Optimizer.ADAMW_TORCH:
                return f"is {value}, which is of train.optimizer adamw_bnb_8bit; set it to 100 (off) for adamw_torch."
            case "weights_dtype" if value is Dtype.BFLOAT16 and compute is Dtype.FLOAT32:
                other = "Or set both the other way round, to compute in 16 bits over float32 weights."
                both = "set that to bfloat16, train.rounding to stochastic"
                return f"is bfloat16, but train.compute_dtype is float32: {both}. {other}"
            case "optimizer_in_backward" if value and (passes := above.get("gradient_accumulation_steps", 1)) > 1:
                why = "a weight cannot be updated before all passes of a step have added to its gradient"
                return f"is true, but train.gradient_accumulation_steps is {passes}: {why}. Set that to 1, or this to false."
            case "optimizer_in_backward" if value and (norm := above.get("max_grad_norm")):
                why = "the norm of all gradients is not known before the last of them is there"
                return f"is true, but train.max_grad_norm is {norm:g}: {why}. Set that to 0, or this to false."
            case "attention_checkpointing" if value and above.get("gradient_checkpointing"):
                return "is true, but train.gradient_checkpointing is, too, and recomputes all. Set one to false."
            case "attention_checkpointing" if value and above.get("attention") is Attention.FLEX:
                return "is true, but train.attention is flex_attention, which keeps no scores. Set this to false."
            case "compile" if value and above.get("attention") is Attention.FLEX:
                return "is true, but train.attention is flex_attention, which compiles by itself. Set one of them otherwise."
            case "rounding" if value is Rounding.STOCHASTIC and weights is Dtype.FLOAT32:
                return "is stochastic, but train.weights_dtype is float32; set it to nearest."
            case "rounding" if value is Rounding.NEAREST and weights is Dtype.BFLOAT16:
                other = "Set it to stochastic, or train.weights_dtype to float32."
                lost = "most updates are smaller than the spacing of such weights and would be lost"
                return f"is nearest, but train.weights_dtype is bfloat16: {lost}. {other}"
        return None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _rows_as_before(cls, values: Any, info: ValidationInfo) -> Any:
        """Before there was `questions_per_row`, all questions of a batch about an image shared a row, or none."""
        if isinstance(values, dict) and "questions_per_row" not in values and "batch_size" in values:
            alone = (info.context or {}).get("PromptParams.mask") is Mask.PREFIX_LM
            return values | {"questions_per_row": 1 if alone else values["batch_size"]}
        return values


@dataclass(frozen=True, kw_only=True)
class ExportParams(Section):
    """The folder that plain transformers opens."""

    dtype: Wide = Dtype.FLOAT32
    """Type of its weights. `bfloat16` halves them, for whoever computes in it: the trained function up to rounding."""


@dataclass(frozen=True, kw_only=True)
class EvaluationParams(Section):
    """What `helm-eval` measures."""

    launch: Launch | None = None
    """Name of the accelerate config in `launch/` that helm-eval runs under; null is one process, on a GPU if there is."""
    vqa_questions: Count | None
    """Validation questions for VQA or answer accuracy, the first of HELM's own random order; null is all."""
    helm_instances: Count
    """Instances of HELM's `vqa` run."""
    helm_threads: Annotated[int, Range(1024)]
    """HELM's request threads; one worker answers them in batches."""
    punkt_tab: Punkt
    """nltk data for HELM's metrics: `bundled` (in this repo, offline) or `installed` (nltk's own, downloaded)."""
    batch_size: Count
    """Questions answered at once, of at most so many times the tokens of the longest that the model takes."""
    compute_dtype: Wide = Dtype.FLOAT32
    """Type in which answers are computed: `float32` or `bfloat16`."""
    max_new_tokens: Annotated[int, Range(HELM_MAX_TOKENS)]
    """Longest answer, in tokens."""
    gate: Gate = Gate.ACCURACY
    """What `vlm-vqa compare` decides by: `accuracy` (VQA or answer accuracy, all questions) or `bleu_1` (HELM's)."""

    @rules
    def _rules(cls, name: str, value: Any, above: Above) -> str | None:
        most = above.get("vqa_questions")
        if name == "helm_instances" and most is not None and most < value:
            return (
                f"is {value}, but evaluation.vqa_questions, of which they are, is {most}. Raise that or make it null."
            )
        return None


@dataclass(frozen=True)
class TrackingParams(Section):
    """MLflow."""

    experiment: Text
    """Name of the MLflow experiment."""
    max_artifact_mib: Natural
    """Larger files are logged by reference (path, size, hash) and not copied."""


@dataclass(frozen=True, kw_only=True)
class Params(Section):
    """All of `params.yaml`."""

    seed: Seed
    """What all random numbers of a run come from: first weights, orders, dropout."""
    data: DataParams
    model: ModelParams = ModelParams()
    vision: VisionParams
    language: LanguageParams
    prompt: PromptParams
    validation: ValidationParams = ValidationParams()
    train: TrainParams
    export: ExportParams = ExportParams()
    evaluation: EvaluationParams
    tracking: TrackingParams

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested values, as in the file."""
        return json.loads(json.dumps(asdict(self, dict_factory=_as_written)))

    def flat(self) -> dict[str, Any]:
        """Return `{"train.learning_rate": 0.001, ...}` in the file's order."""
        return dict(flatten(self.as_dict()))

    def hash(self) -> str:
        """Return the hash that names these parameters; where a run is tracked does not change what it is."""
        return hash_json(_without_default({key: value for key, value in self.as_dict().items() if key != "tracking"}))

    def training_hash(self) -> str:
        """Return the hash of what decides trained weights."""
        return hash_json(self._training())

    def recipe_hash(self, processes: int) -> str:
        """Return the hash of what decides trained weights up to rounding: what a checkpoint must agree with. An optimizer
        step's questions count, not how they are divided among processes and forward passes: that may change."""
        sections = self._training()
        train = sections["train"]
        per_process = train["batch_size"] * train["gradient_accumulation_steps"]
        kept = {key: value for key, value in train.items() if key not in DIVISION}
        return hash_json(sections | {"train": kept | {"questions_a_step": per_process * processes}})

    def _training(self) -> dict[str, Any]:
        """Return the sections that the train stage declares, but for how extract-features was launched."""
        kept = ("seed", "model", "vision", "language", "prompt", "train", "validation")
        sections = {key: value for key, value in self.as_dict().items() if key in kept}
        del sections["vision"]["launch"]
        return _without_default(sections)


def _as_written(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Undo what a key needs to be a name in Python: `from_` is `from` in the file."""
    return {name.rstrip("_"): value for name, value in items}


def _without_default(sections: dict[str, Any]) -> dict[str, Any]:
    """Leave out the keys that came later where they ask for nothing: what was made before them keeps its hashes."""
    whole = {"model": ModelParams(), "validation": ValidationParams(), "export": ExportParams()}
    off = {key: json.loads(json.dumps(asdict(value, dict_factory=_as_written))) for key, value in whole.items()}
    kept = {key: value for key, value in sections.items() if key not in off or value != off[key]}
    later: dict[str, dict[str, Any]] = {
        "vision": {"store": True},
        "train": dict.fromkeys(("projector_learning_rate", "embedding_learning_rate"))
        | {"projector_steps": 0, "adam_beta2": TrainParams.adam_beta2}
        | dict.fromkeys(("optimizer_in_backward", "attention_checkpointing", "compile"), False),
        "evaluation": {"gate": Gate.ACCURACY, "launch": None, "compute_dtype": Dtype.FLOAT32},
    }
    for name in later.keys() & kept.keys():
        asked = kept[name].items()
        kept[name] = {key: value for key, value in asked if key not in later[name] or value != later[name][key]}
    return kept


DIVISION = "launch batch_size gradient_accumulation_steps dataloader_workers restart_optimizer stall_seconds".split()
"""Keys of `train` that say how the work is divided and watched, not what is computed."""


# --- files --------------------------------------------------------------------------------------------------------------


@functools.cache
def adapter() -> pydantic.TypeAdapter[Params]:
    """Return what validates; made when it is first needed."""
    return pydantic.TypeAdapter(Params)


def load_params(path: str | Path = "params.yaml", whole: bool = False) -> Params:
    """Read and validate a parameter file; say which keys it lacks, being of an earlier version. UserError if the file is
    missing or not YAML, a key is unknown, missing, given twice or of the wrong type, or a combination is impossible: a line
    for each mistake, with the key's full name. And if it is to be `whole` and lacks a section that DVC notes for a stage:
    in a forced run DVC would fail when the stage has run, hours later."""
    values = read_yaml(path)
    params = parse_params(values, str(path))
    if whole and (gone := [name for name in keys_of([]) if name not in values]):
        raise UserError(
            f"{path} lacks the section {', '.join(gone)}, which DVC wants: `vlm-vqa check --write` adds it."
        )
    if lacking := lacking_keys(params, values):
        taken = ", ".join(map(written, lacking.values()))
        them = "it" if len(lacking) == 1 else "them"
        _say(f"{path} lacks {', '.join(lacking)}: taken as {taken}, as before; `vlm-vqa check --write` adds {them}.")
    return params


def parse_params(values: Any, name: str = "params.yaml") -> Params:
    """Validate nested plain values as `load_params` does; `name` stands in error messages."""
    try:
        return adapter().validate_python(values, context={})
    except pydantic.ValidationError as error:
        found = [_mistake(one) for one in error.errors(include_url=False)]
    # Out of its reach: pydantic's error shows values.
    found.sort(key=lambda line: not line.startswith("unknown key"))
    more = [f"and {len(found) - MOST_MISTAKES} more mistakes."] if len(found) > MOST_MISTAKES else []
    raise UserError("\n".join(f"{name}: {line}" for line in found[:MOST_MISTAKES] + more))


def _mistake(error: Mapping[str, Any]) -> str:
    """Return pydantic's error as a line of ours."""
    value, path = error["input"], [str(part) for part in error["loc"]]
    if path[:2] == ["data", "table"]:
        del path[2:3]  # The union's member.
    key = ".".join(path)
    match error["type"]:
        case "value_error":
            return f"{key} {error['ctx']['error']}"
        case "missing":
            return f"missing key {key}. Compare with presets/small.yaml."
        case "unexpected_keyword_argument" | "invalid_key":
            return f"unknown key {shown(key)[1:-1]}. Known here: {', '.join(keys_of(path[:-1]))}."
        case "dataclass_type" | "model_attributes_type" if value is None and path:
            return f"{key} must be given, as a mapping of {', '.join(keys_of(path))}."
        case "dataclass_type" | "model_attributes_type":
            return f"{key or 'the file'} must be a mapping, not {shown(value)}. Compare with presets/small.yaml."
        case "enum" | "literal_error":
            allowed = re.findall("'(.*?)'", error["ctx"]["expected"])
            return f"{key} is {shown(value)}; it must be one of {', '.join(allowed)}."
        case "tuple_type" | "too_short":
            return f"{key} is {shown(value)}; it must be a list of one name or more."
    return f"{key or 'the file'}: {error['msg']}. Compare with presets/small.yaml."


def keys_of(path: list[str]) -> list[str]:
    """Return the names of the keys in the group at `path`."""
    group: Any = Params
    for name in path:
        hint = typing.get_type_hints(group)[name]
        group = next(filter(is_dataclass, typing.get_args(hint)), hint)
    return [one.name.rstrip("_") for one in fields(group)]


@functools.cache
def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).warning("%s", line)


def lacking_keys(params: Params, values: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that a file's values lack, by full names, and what was taken for them."""
    given = dict(flatten(values))
    return {key: value for key, value in params.flat().items() if key not in given}


def written(value: Any) -> str:
    """Return a value as the file writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what stands in nested mappings by full names, `section.key`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
