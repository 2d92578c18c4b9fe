"""params.yaml: every mistake is refused by the key's full name."""

from pathlib import Path

import pytest
import yaml

from vlm_vqa.errors import UserError
from vlm_vqa.params import Mask, load_params, parse_params

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
        ("train.learning_rate", "1e-5", "train.learning_rate is '1e-5'"),
        ("train.batch_size", 2.5, "train.batch_size is 2.5"),
        ("train.batch_size", True, "train.batch_size is True"),
        ("train.batch_size", 0, "train.batch_size is 0"),
        ("train.optimizer", "sgd", "train.optimizer is 'sgd'"),
        ("train.block_wise", False, "train.block_wise"),
        ("train.percentile_clipping", 95, "train.percentile_clipping is 95"),
        ("train.weights_dtype", "bfloat16", "train.weights_dtype is bfloat16 with train.rounding nearest"),
        ("train.weights_dtype", "float16", "train.weights_dtype is float16"),
        ("train.rounding", "stochastic", "train.rounding is stochastic"),
        ("train.stall_seconds", 0, "train.stall_seconds is 0"),
        ("train.answers", "all", "train.answers is 'all'"),
        (
            "train.lora",
            {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ["c_attn"]},
            "train.lora.targets has c_attn",
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
        ("train.compute_dtype", "float16", "train.compute_dtype is float16"),
        ("train.warmup_ratio", 1.0, "train.warmup_ratio is 1.0"),
        ("train.launch", "../evil", "train.launch"),
        ("train.questions_per_row", 0, "train.questions_per_row is 0"),
        ("train.dataloader_workers", -1, "train.dataloader_workers is -1"),
        ("train.attention", "sdpa", "train.attention is 'sdpa'"),
        ("prompt.mask", "prefix-lm", "train.questions_per_row is 32"),
        ("prompt.mask", "causal", "prompt.mask is 'causal'"),
        ("vision.model", "facebook/dinov2-base", "vision.revision is None"),
        ("vision.revision", "0" * 40, "vision.revision"),
        ("language.config", None, "language.config must be given"),
        ("language.model", "./gemma", "language.vocab_size must be null"),
        ("data.val.image_name", "COCO_{id}.jpg", "data.val.image_name"),
        ("data.train", "train2014", "data.train must be a mapping"),
        ("seed", -1, "seed is -1"),
    ],
)
def test_refused_by_name(values, key, value, words):
    put(values, key, value)
    with pytest.raises(UserError, match="params.yaml: ") as error:
        parse_params(values)
    assert words in str(error.value)


def test_flex_attention_with_dropout_is_refused(values):
    put(values, "train.attention", "flex_attention")
    put(values, "train.dropout", 0.1)
    with pytest.raises(UserError, match="flex_attention cannot drop"):
        parse_params(values)


def test_a_missing_key_is_refused_by_name(values):
    del values["train"]["dropout"]
    with pytest.raises(UserError, match="missing key train.dropout"):
        parse_params(values)


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("seed: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_params(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_params(tmp_path / "none.yaml")
