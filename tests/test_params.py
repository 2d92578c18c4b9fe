"""params.yaml: every mistake is refused by the key's full name, and every spelling of a number is read as that number."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from vlm_vqa.errors import UserError
from vlm_vqa.params import INTERPOLATED, Mask, load_params, parse_params

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
        ("seed", 2**32, "seed is 4294967296; it must be at least 0 and at most 4,294,967,295"),
        ("evaluation.max_new_tokens", 21, "evaluation.max_new_tokens is 21; it must be above 0 and at most 20"),
        ("evaluation.vqa_questions", 999, "evaluation.vqa_questions is 999, below evaluation.helm_instances (1000)"),
        ("prompt.instruction", "Answer.", "prompt.instruction is 'Answer.', but HELM's vqa run asks with"),
        ("prompt.text_length", 20, "the instruction alone leaves room for no question below"),
        ("language.config.num_key_value_heads", 3, "num_attention_heads is 4; it must be a multiple"),
        ("language.config.num_attention_heads", 6, "divide hidden_size (128)"),
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
        ("language.vocab_size", 259, "language.vocab_size is 259; bytes and special tokens alone are 260"),
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
    assert set(re.findall(r"\$\{(.*?)\}", (ROOT / "dvc.yaml").read_text())) == set(INTERPOLATED)
    for key in INTERPOLATED:
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
        (COMMITTED + "seed: 1\n", "line {last}: seed stands in line 3 already"),
        (COMMITTED + "  experiment: b\n", "line {last}: tracking.experiment stands in line"),
        (COMMITTED.replace("seed: 0", "seed: 0\n'seed': 1"), "line 4: seed stands in line 3 already"),
        (COMMITTED.replace("seed: 0", "? [seed]\n: 0"), "line 3: a key of the file is not a name"),
        (COMMITTED.replace("seed: 0", "<<: 3"), "line 3: << must be an alias of a mapping"),
        (COMMITTED.replace("seed: 0", "seed: !!python/name:os.system x"), "line 3: seed has the tag python/name"),
        (COMMITTED.replace("seed: 0", "seed: !!binary aGk="), "line 3: seed has the tag binary"),
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


def test_merged_mappings_give_way_to_own_keys(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(COMMITTED.replace("  val:\n    questions:", "  val:\n    <<: [{images: b}, {images: c}]\n    questions:")
                    .replace("    images: val2014\n", ""))  # fmt: skip
    assert load_params(path).data.val.images == "b"
    path.write_text(COMMITTED.replace("  val:\n    questions:", "  val:\n    <<: {images: b}\n    questions:"))
    assert load_params(path).data.val.images == "val2014"


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
