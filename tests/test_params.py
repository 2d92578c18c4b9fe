"""params.yaml: every mistake is refused by the key's full name, and every spelling of a number is read as that number."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from scripts import schema
from vlm_vqa.checks import fill_in
from vlm_vqa.errors import UserError
from vlm_vqa.hashing import hash_json
from vlm_vqa.params import Mask, Rounding, ValidationParams, keys_of, load_params, parse_params

ROOT = Path(__file__).parents[1]


@pytest.fixture
def values():
    return yaml.safe_load((ROOT / "presets/small.yaml").read_text())


def put(values, key, value):
    *path, last = key.split(".")
    for name in path:
        values = values[name]
    values[last] = value


def test_the_committed_file_is_typed_and_frozen():
    params = load_params(ROOT / "presets/small.yaml")
    assert params.prompt.mask is Mask.IMAGE_PREFIX
    assert params.flat()["train.learning_rate"] == params.train.learning_rate
    with pytest.raises(AttributeError):
        params.seed = 1


def test_the_hash_names_all_but_the_tracking(values):
    before = parse_params(values).hash()
    put(values, "tracking.experiment", "other")
    assert parse_params(values).hash() == before
    put(values, "train.learning_rate", 0.5)
    assert parse_params(values).hash() != before


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.learnig_rate", 1.0, "unknown key train.learnig_rate"),
        ("train.learning_rate", "tiny", "train.learning_rate is 'tiny'; it must be a finite number"),
        ("train.learning_rate", float("nan"), "train.learning_rate is nan; it must be a finite number"),
        ("train.max_grad_norm", float("inf"), "train.max_grad_norm is inf; it must be a finite number"),
        ("train.learning_rate", True, "train.learning_rate is True; it must be a finite number"),
        ("train.freeze_embeddings", 1, "train.freeze_embeddings is 1; it must be true or false"),
        ("tracking.experiment", 2024, "tracking.experiment is 2024; it must be text"),
        ("train.batch_size", 2.5, "train.batch_size is 2.5"),
        ("train.batch_size", True, "train.batch_size is True"),
        ("train.batch_size", 0, "train.batch_size is 0"),
        ("train.optimizer", "sgd", "train.optimizer is 'sgd'"),
        ("train.block_wise", False, "train.block_wise"),
        ("train.percentile_clipping", 95, "train.percentile_clipping is 95"),
        ("train.weights_dtype", "bfloat16", "train.weights_dtype is bfloat16, but train.compute_dtype is float32"),
        ("train.weights_dtype", "float16", "train.weights_dtype is 'float16'; it must be one of float32, bfloat16"),
        ("train.rounding", "stochastic", "train.rounding is stochastic"),
        ("train.stall_seconds", 0, "train.stall_seconds is 0"),
        ("train.answers", "all", "train.answers is 'all'"),
        (
            "train.lora",
            {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ["c_attn"]},
            "train.lora.targets.0 is 'c_attn'; it must be one of q_proj, ",
        ),
        ("train.lora", {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": []}, "train.lora.targets is []"),
        (
            "train.lora",
            {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ["q_proj"]},
            "train.freeze_embeddings is false",
        ),
        ("vision.launch", "../evil", "vision.launch"),
        ("vision.store_dtype", "int4", "vision.store_dtype is 'int4'"),
        ("data.source", "official", "data.official must be given"),
        (
            "data.hub",
            {
                "train": {"repository": "a/b", "revision": "main", "split": "train"},
                "val": {"repository": "a/b", "revision": "main", "split": "val"},
            },
            "data.hub must be null",
        ),
        ("train.compute_dtype", "float16", "train.compute_dtype is 'float16'; it must be one of float32, bfloat16"),
        ("train.warmup_ratio", 1.0, "train.warmup_ratio is 1.0"),
        ("train.launch", "../evil", "train.launch"),
        ("train.questions_per_row", 0, "train.questions_per_row is 0"),
        ("train.dataloader_workers", -1, "train.dataloader_workers is -1"),
        ("train.attention", "sdpa", "train.attention is 'sdpa'"),
        ("prompt.mask", "prefix-lm", "train.questions_per_row is 6"),
        ("prompt.mask", "full", "prompt.mask is 'full'"),
        ("vision.model", "facebook/dinov2-base", "vision.revision is null"),
        ("vision.revision", "0" * 40, "vision.revision"),
        ("language.config", None, "language.config must be given"),
        ("language.model", "./gemma", "language.vocab_size must be null"),
        ("data.val.image_name", "COCO_{id}.jpg", "data.val.image_name"),
        ("data.train", "train2014", "data.train must be a mapping"),
        ("seed", -1, "seed is -1"),
        ("seed", 2**32, "seed is 4294967296; it must be at least 0 and at most 4,294,967,295"),
        ("evaluation.max_new_tokens", 21, "evaluation.max_new_tokens is 21; it must be above 0 and at most 20"),
        (
            "evaluation.vqa_questions",
            999,
            "evaluation.helm_instances is 1000, but evaluation.vqa_questions, of which they are, is 999",
        ),
        ("prompt.instruction", "Answer.", "prompt.instruction is 'Answer.', but HELM's vqa run asks with"),
        (
            "prompt.text_length",
            20,
            "prompt.text_length is 20; it must be at least 36 and at most 1,048,576: below, the instruction",
        ),
        ("language.config.num_key_value_heads", 3, "num_key_value_heads is 3; it must divide num_attention_heads (4)"),
        ("language.config.num_attention_heads", 6, "num_attention_heads is 6; it must divide hidden_size (128)"),
        ("language.config.head_dim", 31, "language.config.head_dim is 31; it must be even"),
        ("language.config.hidden_size", -1, "language.config.hidden_size is -1; it must be above 0"),
        (
            "language.config",
            dict(
                hidden_size=2**20,
                intermediate_size=2**20,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=2,
            ),
            "language.config makes 3,299,080,142,848 weights",
        ),  # fmt: skip
        (
            "language.vocab_size",
            259,
            "language.vocab_size is 259; it must be at least 260 and at most 1,048,576: bytes and special",
        ),
        ("vision.num_patches", 64, "vision.num_patches is 64, but 'small' makes 65"),
        ("vision.visual_embed_dim", 0, "vision.visual_embed_dim is 0; it must be above 0"),
        ("train.learning_rate", 1e300, "train.learning_rate is 1e+300; it must be above 0 and at most 1e+06"),
        ("train.save_total_limit", 2**31, "train.save_total_limit is 2147483648"),
        ("train.dataloader_workers", 257, "train.dataloader_workers is 257"),
        ("train.percentile_clipping", 101, "train.percentile_clipping is 101"),
        ("data.directory", "a\0b", "data.directory is 'a\\x00b'; it must be one line of at most 1,000"),
        *(
            ("data.val.image_name", pattern, "data.val.image_name is")
            for pattern in (
                "a.jpg",
                "{image_id}{image_id}",
                "{image_id:d}",
                "x/{image_id}.jpg",
                "{}.jpg",
                "{image_id.foo}",
                "{image_id.__class__}",
                "{image_id!r}",
                "{image_id[0]}",
                "{image_id:02000000000d}",
                "{image_id:0{image_id}d}",
            )  # fmt: skip
        ),
    ],
)
def test_refused_by_name(values, key, value, words):
    put(values, key, value)
    with pytest.raises(UserError, match="params.yaml: ") as error:
        parse_params(values)
    assert words in str(error.value)


def test_bfloat16_weights_want_stochastic_rounding(values):
    values["train"] |= {"weights_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    with pytest.raises(UserError, match="train.rounding is nearest, but train.weights_dtype is bfloat16"):
        parse_params(values)
    put(values, "train.rounding", "stochastic")
    assert parse_params(values).train.rounding is Rounding.STOCHASTIC


def test_every_mistake_stands_in_one_message_a_line_each(values):
    """Of one key and between keys, in every section, whatever else is wrong there; but for what follows from another."""
    for key, value in {
        "seed": -1, "data.hub": {}, "data.train.images": 5, "vision.model": "facebook/dinov2-base",
        "language.config.head_dim": 31, "language.config.hidden_size": "wide", "prompt.mask": "prefix-lm",
        "train.learnig_rate": 1.0, "train.dropout": 0.5, "train.attention": "flex_attention", "train.block_wise": False,
        "tracking.experiment": None,
    }.items():  # fmt: skip
        put(values, key, value)
    del values["train"]["learning_rate"]
    with pytest.raises(UserError) as caught:
        parse_params(values)
    found = str(caught.value).splitlines()
    assert found[0].startswith(
        "params.yaml: unknown key train.learnig_rate. Known here: launch, answers, lora, batch_size, "
    )
    for line, start in zip(found[1:], [
        "seed is -1", "data.train.images is 5", "data.hub must be null", "vision.revision is null",
        "vision.num_patches is 65", "vision.visual_embed_dim is 128", "language.config.hidden_size is 'wide'",
        "language.config.head_dim is 31", "train.questions_per_row is 6", "missing key train.learning_rate",
        "train.dropout is 0.5", "train.block_wise is false", "tracking.experiment is null",
    ], strict=True):  # fmt: skip
        assert line.startswith(f"params.yaml: {start}")
    with pytest.raises(UserError) as caught:
        parse_params(values | {f"key{number}": 1 for number in range(1000)})
    assert len(str(caught.value).splitlines()) == 21 and str(caught.value).endswith("more mistakes.")


@pytest.mark.parametrize("key", [5, None, ("a",), "\ud800", "a" * 5000])
@pytest.mark.parametrize("section", [None, "data", "train"])
def test_a_key_that_is_no_name_is_refused(values, section, key):
    (values if section is None else values[section])[key] = 1
    with pytest.raises(UserError, match="^params.yaml: ") as caught:
        parse_params(values)
    assert len(str(caught.value)) < 1000


def test_flex_attention_with_dropout_is_refused(values):
    put(values, "train.attention", "flex_attention")
    put(values, "train.dropout", 0.1)
    with pytest.raises(UserError, match="flex_attention cannot drop"):
        parse_params(values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"optimizer_in_backward": True, "max_grad_norm": 0.5},
            "optimizer_in_backward is true, but train.max_grad_norm is 0.5",
        ),
        (
            {"optimizer_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 2},
            "optimizer_in_backward is true, but train.gradient_accumulation_steps is 2",
        ),
        (
            {"attention_checkpointing": True, "gradient_checkpointing": True},
            "attention_checkpointing is true, but train.gradient_checkpointing is, too",
        ),
        (
            {"attention_checkpointing": True, "attention": "flex_attention"},
            "attention_checkpointing is true, but train.attention is flex_attention",
        ),
        ({"compile": True, "attention": "flex_attention"}, "compile is true, but train.attention is flex_attention"),
    ],
)
def test_what_saves_memory_is_refused_where_it_cannot(values, changes, words):
    for key, value in changes.items():
        put(values, f"train.{key}", value)
    with pytest.raises(UserError, match=f"train.{words}"):
        parse_params(values)


def test_what_saves_memory_changes_the_hash_only_where_it_is_asked_for(values):
    before = parse_params(values).training_hash()
    for key in ("optimizer_in_backward", "attention_checkpointing", "compile"):
        values["train"].pop(key, None)
        assert parse_params(values).training_hash() == before
    put(values, "train.attention_checkpointing", True)
    assert parse_params(values).training_hash() != before


def test_a_missing_key_is_refused_by_name(values):
    del values["train"]["dropout"], values["data"]["source"]
    with pytest.raises(UserError, match="missing key data.source.*\n.*missing key train.dropout"):
        parse_params(values)


# --- files of earlier versions -----------------------------------------------------------------------------------------

LATER = {"data": ["official", "hub", "table", "bad_records", "most_dropped", "doubtful"],
         "vision": ["store"],
         "train": ["answers", "lora", "questions_per_row", "attention", "freeze_embeddings", "dataloader_workers",
                   "rounding", "restart_optimizer", "stall_seconds", "projector_learning_rate",
                   "embedding_learning_rate", "projector_steps", "adam_beta2", "optimizer_in_backward",
                   "attention_checkpointing", "compile"],
         "evaluation": ["launch", "compute_dtype", "gate"]}  # fmt: skip
"""Keys that the first version did not have; those that DVC fills in (vision.launch) have to be there."""


def lacking(text, section, name):
    """Return a file's text without a key of a section."""
    text, count = re.subn(rf"^({section}:\n(?: .*\n)*?)  {name}: .*\n", r"\1", text, flags=re.M)
    assert count == 1, name
    return text


def first_version(text):
    """Return a file's text as the first version had it."""
    for section, names in LATER.items():
        for name in names:
            text = lacking(text, section, name)
    return text


@pytest.mark.parametrize("preset", ["small", "vqav2-reference"])
def test_a_file_of_the_first_version_means_what_it_meant(tmp_path, caplog, preset):
    path, whole = tmp_path / "params.yaml", (ROOT / f"presets/{preset}.yaml").read_text()
    if preset != "small":
        whole = re.sub(
            r"source: official\n", "source: directory\n", re.sub(r"official:\n(    .*\n)+", "official: null\n", whole)
        )
    path.write_text(first_version(whole))
    params = load_params(path)
    # All of an image's questions in a batch shared a row, where the mask lets them; reference froze no embedding then.
    before = {"lora": None, "attention": "eager", "freeze_embeddings": False, "dataloader_workers": 0, "rounding": "nearest",
              "adam_beta2": 0.999, "questions_per_row": 64 if preset == "small" else 1}  # fmt: skip
    path.write_text(whole)
    values = load_params(path).as_dict()
    evaluation = values["evaluation"] | {"launch": None, "compute_dtype": "float32"}
    assert params == parse_params(values | {"train": values["train"] | before, "evaluation": evaluation})
    (said,) = caplog.messages
    assert said.startswith(
        f"{path} lacks data.official, data.hub, data.table, data.bad_records, data.most_dropped, data.doubtful, "
        "vision.store, train.answers, train.lora, train.questions_per_row, "
    )
    assert said.endswith("600, null, float32, accuracy, as before; `vlm-vqa check --write` adds them.")


@pytest.mark.parametrize("key", [f"{section}.{name}" for section, names in LATER.items() for name in names])
def test_a_key_that_came_later_may_be_missing_and_is_written_in_its_place(tmp_path, caplog, key):
    path, (section, name) = tmp_path / "params.yaml", key.split(".")
    before = COMMITTED.replace("rounding: nearest", "rounding: nearest  # as ever").replace("row: 6", "row: 64")
    before = before.replace("evaluation:\n  launch: cpu", "evaluation:\n  launch: null")
    before = before.replace("adam_beta2: 0.98", "adam_beta2: 0.999")
    path.write_text(lacking(before, section, name))
    params = load_params(path)
    assert caplog.messages[0].startswith(f"{path} lacks {key}: taken as ")
    assert fill_in(path) == [key] and load_params(path) == params and len(caplog.messages) == 1
    assert path.read_text() == before.replace(
        "nearest  # as ever", "nearest" if name == "rounding" else "nearest  # as ever"
    )
    assert fill_in(path) == [] and load_params(path).hash() == params.hash()


def test_a_line_is_written_whatever_its_neighbours_look_like(tmp_path):
    path = tmp_path / "params.yaml"
    text = first_version(COMMITTED).replace(
        "  allow_split_overlap: false", "  allow_split_overlap:\n    false  # none\n"
    )
    path.write_text(
        "# first\n" + text.replace("  save_total_limit: 2", "  save_total_limit: !!int\n\n    '2' # kept") + "\n# last"
    )
    params = load_params(path)
    assert len(fill_in(path)) == sum(map(len, LATER.values())) and load_params(path) == params
    written = path.read_text()
    assert "    false  # none\n  official: null\n  hub: null\n  table: null\n" in written and written.endswith(
        "\n\n# last"
    )
    assert (
        "    '2' # kept\n  restart_optimizer: false\n  stall_seconds: 600\n\nexport:\n  dtype: float32\n\nevaluation:"
        in written
    )
    flow = yaml.safe_load(first_version(COMMITTED))
    path.write_text(yaml.safe_dump(flow, default_flow_style=True, sort_keys=False, width=9999))
    before = path.read_text()
    with pytest.raises(UserError, match="params.yaml: data is not in lines of its own. Write `official: null` into it"):
        fill_in(path)
    assert path.read_text() == before


OFF = """\
validation:
  from: train
  questions: 0
  train_questions: 0
  every_steps: 100
  keep: last
  patience: null
"""
SECTION = re.compile(r"^validation:\n(  .*\n)+", re.M)


@pytest.mark.parametrize("after", ["\n", "\n# the training\n", ""])
def test_a_section_that_came_later_is_asked_for_and_written_in_its_place(tmp_path, after):
    """DVC fails without it: of a forced run only when the stage has run, of another after all stages before."""
    path = tmp_path / "params.yaml"
    whole = SECTION.sub(OFF, COMMITTED).replace("too_long: error", "too_long: error  # as ever")
    path.write_text(whole.replace(f"\n{OFF}", "").replace("\n\ntrain:", f"\n{after}train:"))
    with pytest.raises(UserError, match="lacks the section validation, .* `vlm-vqa check --write` adds it") as error:
        load_params(path, whole=True)
    assert "\n" not in str(error.value)
    assert load_params(path).validation == ValidationParams()
    assert fill_in(path) == [f"validation.{name}" for name in keys_of(["validation"])]
    assert path.read_text() == whole.replace("null\n\ntrain:", f"null\n{after}train:") and fill_in(path) == []
    assert load_params(path).validation == ValidationParams()


def test_a_section_is_written_at_the_end_and_not_between_braces(tmp_path):
    path = tmp_path / "params.yaml"
    text = SECTION.sub("", COMMITTED)
    prompt = re.search(r"^prompt:\n(  .*\n)+", text, re.M)[0]
    path.write_text(text.replace(prompt, "") + "\n" + prompt.rstrip("\n"))
    assert len(fill_in(path)) == 6 and path.read_text().endswith(f"too_long: error\n\n{OFF.rstrip()}")
    path.write_text(yaml.safe_dump(yaml.safe_load(text), default_flow_style=True, sort_keys=False, width=9999))
    with pytest.raises(
        UserError, match="its first level is not in lines of its own. Write `validation:\n  from: train` into"
    ):
        fill_in(path)


@pytest.mark.parametrize("key", ["from", "questions", "train_questions", "every_steps", "keep", "patience"])
def test_a_key_of_that_section_may_be_missing(tmp_path, key, caplog):
    path, whole = tmp_path / "params.yaml", SECTION.sub(OFF.replace("\n", "\n  # why\n", 1), COMMITTED)
    path.write_text(re.sub(rf"^  {key}: .*\n", "", whole, flags=re.M))
    assert load_params(path).validation == ValidationParams()
    assert caplog.messages[0].startswith(f"{path} lacks validation.{key}: taken as ")
    assert fill_in(path) == [f"validation.{key}"] and load_params(path) == parse_params(yaml.safe_load(whole))
    if key == "from":
        whole = whole.replace("  # why\n  from: train\n", "  from: train\n  # why\n")
    assert path.read_text() == whole


def test_a_section_that_asks_for_nothing_changes_no_hash(values):
    """What was trained before there was validation is found again."""
    del values["train"]["adam_beta2"]
    off = yaml.safe_load(OFF)["validation"]
    without, whole, on = (
        parse_params({key: value for key, value in {**values, "validation": section}.items() if value is not None})
        for section in (None, off, off | {"questions": 2})
    )
    assert without == whole
    for name, arguments in (("hash", ()), ("training_hash", ()), ("recipe_hash", (4,))):
        one, two, three = (getattr(params, name)(*arguments) for params in (without, whole, on))
        assert one == two != three
    before = {
        key: value for key, value in whole.as_dict().items() if key not in ("model", "validation", "export", "tracking")
    }
    before["train"] = {key: value for key, value in before["train"].items() if "projector" not in key}
    del before["train"]["adam_beta2"]
    later = {
        "vision": ("store",),
        "train": ("embedding_learning_rate", "optimizer_in_backward", "attention_checkpointing", "compile"),
    }
    for section, names in (later | {"evaluation": ("gate", "compute_dtype")}).items():
        before[section] = {key: value for key, value in before[section].items() if key not in names}
    assert without.hash() == hash_json(before)


def test_from_is_a_key_of_the_file_and_no_word_of_python_takes_its_place(values):
    flat = parse_params(values).flat()
    assert flat["validation.from"] == "train" and not [name for name in flat if name.endswith("_")]
    with pytest.raises(UserError, match="unknown key validation.from_. Known here: from, questions, train_questions, "):
        parse_params(values | {"validation": values["validation"] | {"from_": "val"}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"questions": 0},
            "validation.train_questions is 250, but validation.questions is 0: nothing is measured. .* to 0",
        ),
        ({"questions": 0, "train_questions": 0}, "validation.keep is best, but validation.questions is 0: .* to last"),
        (
            {"questions": 0, "train_questions": 0, "keep": "last", "patience": 3},
            "validation.patience is 3, but .* to null",
        ),
        ({"questions": 1}, "validation.questions is 1; it must be 0 or at least 2, of two images"),
        ({"questions": -2}, "validation.questions is -2; it must be at least 0"),
        ({"questions": 2.5}, "validation.questions is 2.5; it must be a whole number"),
        ({"train_questions": -1}, "validation.train_questions is -1; it must be at least 0"),
        ({"every_steps": 0}, "validation.every_steps is 0; it must be above 0"),
        ({"every_steps": None}, "validation.every_steps is null; it must be a whole number"),
        ({"patience": 0}, "validation.patience is 0; it must be above 0"),
        ({"keep": "first"}, "validation.keep is 'first'; it must be one of last, best"),
        ({"from": "test"}, "validation.from is 'test'; it must be one of train, val"),
        ({"patience": "null"}, "validation.patience is 'null'; it must be a whole number"),
    ],
)
def test_what_cannot_be_validated_is_refused_by_name(values, change, words):
    with pytest.raises(UserError, match=words):
        parse_params(values | {"validation": values["validation"] | change})


def test_only_what_came_later_may_be_missing(values):
    for name, section in values.items():
        for key in [*section] if isinstance(section, dict) and name not in ("model", "validation", "export") else []:
            if key not in LATER.get(name, []):
                kept = {other: value for other, value in section.items() if other != key}
                with pytest.raises(UserError, match=f"missing key {name}.{key}"):
                    parse_params(values | {name: kept})


# --- the schema --------------------------------------------------------------------------------------------------------


def test_the_schema_is_current():
    """If not: python -m scripts.schema."""
    assert json.loads((ROOT / "params.schema.json").read_text()) == schema.schema()


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))], ids=lambda path: path.stem
)
def test_every_parameter_file_names_the_schema_that_lies_beside_it(path):
    first, _, text = path.read_text().partition("\n")
    assert first == "# yaml-language-server: $schema=params.schema.json"
    assert (path.parent / "params.schema.json").resolve() == ROOT / "params.schema.json"
    assert "yaml-language-server" not in text


def test_every_key_has_its_meaning_in_the_schema():
    made = schema.schema()
    groups = [made, *(group for group in made["$defs"].values() if "properties" in group)]
    assert len(groups) == 20
    for group in groups:
        for name, node in group["properties"].items():
            about = (
                made["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node and "description" not in node else node
            )
            assert len(about.get("description", "")) > 5 or name == "data", name


# --- files that are none -----------------------------------------------------------------------------------------------


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("seed: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_params(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_params(tmp_path / "none.yaml")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir,
                                  lambda path: path.write_bytes(bytes(2**20 + 1))])  # fmt: skip
def test_what_is_no_file_of_parameters_is_not_read(make, tmp_path):
    make(tmp_path / "params.yaml")
    with pytest.raises(UserError, match="params.yaml: cannot be read"):
        load_params(tmp_path / "params.yaml")


# --- how values are written --------------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path):
    """Return a function that reads the committed file with one line changed."""

    def read(key, written):
        *sections, last = key.split(".")
        pattern = "".join(rf"^{name}:\n(?:.*\n)*?" for name in sections) + rf"(?:  )*{last}: "
        text, changes = re.subn(rf"({pattern}).*", lambda found: found[1] + written, COMMITTED, count=1, flags=re.M)
        assert changes == 1
        (tmp_path / "params.yaml").write_text(text)
        return load_params(tmp_path / "params.yaml").flat()[key]

    return read


COMMITTED = (ROOT / "presets/small.yaml").read_text()
SPELLINGS = {"1e-5": 1e-5, "1.0e-5": 1e-5, "2e-05": 2e-5, "1E-5": 1e-5, ".00001": 1e-5, "+1e-5": 1e-5, "3e-4": 3e-4}


@pytest.mark.parametrize(
    ("written", "number"),
    [*SPELLINGS.items(), ("0.00001", 1e-5), ("1.e-5", 1e-5), (".5e-3", 5e-4), ("'1e-5'", 1e-5), ('" 1e-5 "', 1e-5),
     ("1", 1.0), ("010", 10.0), ("1_000.5", 1000.5), ("!!float 1e-5", 1e-5), ("&rate 1e-5", 1e-5)],
)  # fmt: skip
def test_every_spelling_of_a_number_is_that_number(read, written, number):
    found = read("train.learning_rate", written)
    assert found == number and type(found) is float


@pytest.mark.parametrize(
    ("written", "number"),
    [("64", 64), ("2.0", 2), ("1e3", 1000), ("1.5e1", 15), ("1_000", 1000), ("010", 10), ("+7", 7), ("'64'", 64),
     ("0x10", 16), ("0o10", 8), ("0b11", 3), ("4294967295", 2**32 - 1)],
)  # fmt: skip
def test_whole_numbers_are_whole_however_they_are_written(read, written, number):
    found = read("seed", written)
    assert found == number and type(found) is int


@pytest.mark.parametrize("key", ["seed", "train.learning_rate"])
@pytest.mark.parametrize(
    "written",
    [".nan", ".inf", "-.inf", "nan", "inf", "Infinity", "12:30", "1,000", "1e", "0x", "_1", "1__0", "5%", "10k", "1e400",
     "9" * 5000, "true", "yes", "2026-11-26", "\N{FULLWIDTH DIGIT ONE}", "[1]", "{a: 1}", "''", "null", ""],
)  # fmt: skip
def test_what_is_no_number_is_refused_by_name(read, key, written):
    with pytest.raises(UserError, match=f"params.yaml: {key} is .*; it must be a (finite|whole) number") as error:
        read(key, written)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("written", ["2.5", "1e-3", "9223372036854775808", "1e19"])
def test_a_broken_or_endless_number_is_not_whole(read, written):
    with pytest.raises(UserError, match=re.escape(f"seed is {written}; it must be a whole number")):
        read("seed", written)


@pytest.mark.parametrize(
    "written",
    ["2024", "1e5", "1e-5", "007", "0x1F", "no", "on", "off", "yes", "true", "12:30", "2026-11-26", ".inf", "1_000",
     "12345e67", "Null point", "None", "=", "+1", ".5", "1.", "'null'", '"~"', "''", "!!str 5"],
)  # fmt: skip
def test_text_stays_text(read, written):
    found = read("tracking.experiment", written)
    assert found == written.removeprefix("!!str ").strip("'\"") and type(found) is str


@pytest.mark.parametrize("written", ["null", "~", "Null", ""])
def test_nothing_is_no_text(read, written):
    assert read("evaluation.vqa_questions", written) is None
    with pytest.raises(UserError, match="tracking.experiment is null; it must be text"):
        read("tracking.experiment", written)


@pytest.mark.parametrize("revision", ["1234567890" * 4, "0" * 37 + "1e5"])
def test_a_revision_of_digits_and_a_folder_like_a_number_are_read_as_written(read, tmp_path, revision):
    text = COMMITTED.replace("model: small\n  revision: null", f"model: 1e5/010\n  revision: {revision}")
    (tmp_path / "params.yaml").write_text(text)
    vision = load_params(tmp_path / "params.yaml").vision
    assert (vision.model, vision.revision) == ("1e5/010", revision)


@pytest.mark.parametrize("written", ["true", "True", "TRUE", "'true'"])
def test_truth_is_true_or_false_as_for_dvc(read, written):
    assert read("train.restart_optimizer", written) is True
    assert read("train.restart_optimizer", written.lower().replace("true", "false")) is False


@pytest.mark.parametrize("written", ["yes", "no", "on", "off", "y", "1", "0", "null", "'yes'"])
def test_other_words_for_truth_are_refused(read, written):
    with pytest.raises(UserError, match="train.restart_optimizer is .*; it must be true or false"):
        read("train.restart_optimizer", written)


def test_what_dvc_fills_into_its_commands_is_the_text_that_we_read(read):
    keys = set(re.findall(r"\$\{(.*?)\}", (ROOT / "dvc.yaml").read_text()))
    assert keys == {"data.directory", "vision.launch", "train.launch"}
    for key in keys:
        for written in ("1e5", "007", "true", "2026-11-26"):
            with pytest.raises(UserError, match=f"{key} is {written}, .* in quotes: '{written}'"):
                read(key, written)
        assert read(key, "'007'") == "007" and read(key, "no") == "no"


def test_a_date_that_stops_dvc_is_said(read, caplog):
    assert read("tracking.experiment", "2026-11-26") == "2026-11-26"
    assert "tracking.experiment is 2026-11-26: DVC cannot read a date" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (COMMITTED + "seed: 1\n", "line {last}: seed stands in line 4 already"),
        (COMMITTED + "  experiment: b\n", "line {last}: tracking.experiment stands in line"),
        (COMMITTED.replace("seed: 0", "seed: 0\n'seed': 1"), "line 5: seed stands in line 4 already"),
        (COMMITTED.replace("seed: 0", "? [seed]\n: 0"), "line 4: a key of the file is not a name"),
        (COMMITTED.replace("seed: 0", "<<: {seed: 0}"), "unknown key <<"),
        (COMMITTED.replace("seed: 0", "seed: !!python/name:os.system x"), "line 4: seed has the tag python/name"),
        (COMMITTED.replace("seed: 0", "seed: !!binary aGk="), "line 4: seed has the tag binary"),
        ("&a [*a]", "inside itself"),
        ("- " * 2000, "nested too deeply"),
        ("a: &a [x]\n" + "".join(f"{b}: &{b} [{'*' + a}{(', *' + a) * 9}]\n" for a, b in ("ab", "bc", "cd", "de", "ef")),
         "more than 10,000 values"),
        ("", "the file must be a mapping"),
        ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
        (b"seed: caf\xe9", "not valid YAML in UTF-8"),
        (bytes(range(256)), "not valid YAML in UTF-8"),
        (b"a\x00b", "not valid YAML"),
        (rb'"\UFFFFFFFF"', "not valid YAML"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_in_words(tmp_path, content, words):
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load_params(path)
    last = COMMITTED.count("\n") + 1
    assert str(error.value).startswith(f"{path}: ") and words.format(last=last) in str(error.value)


@pytest.mark.parametrize("spelling", [*SPELLINGS, '"1e-5"', "010", "1e3"])
def test_what_dvc_writes_is_read_as_what_was_asked(tmp_path, spelling):
    path = tmp_path / "params.yaml"
    path.write_text(COMMITTED)
    overrides = [f"train.learning_rate={spelling}", "tracking.experiment=007", "train.batch_size=128.0"]
    apply_overrides(path, overrides)
    params = load_params(path)
    assert params.train.learning_rate == float(spelling.strip('"'))
    assert (params.tracking.experiment, params.train.batch_size) == ("007", 128)
    before = load_params(ROOT / "presets/small.yaml")
    assert params.prompt == before.prompt and params.data == before.data


STAGE = """
import os
from vlm_vqa.params import load_params
train = load_params().train
open("seen", "w").close()
with open(os.environ["SEEN"], "a") as file:
    print(train.learning_rate, train.weight_decay, file=file)
"""


@pytest.mark.slow
def test_experiments_run_with_what_they_were_asked(tmp_path):
    """`dvc exp run -S`, at once and queued, in a repository whose one stage reads the parameters."""
    repository = tmp_path / "repository"
    (repository / ".dvc").mkdir(parents=True)
    (repository / ".dvc/config").touch()
    (repository / "params.yaml").write_text(COMMITTED)
    (repository / "read.py").write_text(STAGE)
    (repository / "dvc.yaml").write_text("stages: {read: {cmd: python read.py, params: [train], outs: [seen]}}")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    seen = tmp_path / "seen.txt"
    environment = {**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT / "src"), "SEEN": str(seen)}

    def run(*command):
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    identity = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-qm", "first")):
        run("git", *command)
    run("dvc", "exp", "run", "-S", "train.learning_rate=+1e-5", "-S", "train.weight_decay=.00001")
    run("dvc", "exp", "run", "--queue", "-S", "train.learning_rate=3e-4", "-S", "train.weight_decay=1E-5")
    run("dvc", "exp", "run", "--run-all")
    assert sorted(seen.read_text().splitlines()) == ["0.0003 1e-05", "1e-05 1e-05"]


def test_features_that_are_not_stored_are_never_int8(values):
    values["vision"] |= {"store": False, "store_dtype": "int8"}
    with pytest.raises(UserError, match="vision.store is false, but vision.store_dtype is int8"):
        parse_params(values)
