"""Both towers from a local hub, with the real huggingface_hub and transformers: what is fetched, refused and kept secret."""

import json
import shutil
import subprocess
import threading
import time

import huggingface_hub
import psutil
import pytest
import torch
from transformers import Gemma2ForCausalLM

from proofs.project import Project
from tests.fake_hub import STRANGER, TOKEN, Hosted, environment, lead_to, rows_of, serve, write_repository
from tests.tiny_model import TEXTS
from vlm_vqa.errors import UserError
from vlm_vqa.model.encoder import SMALL_ENCODER, load_encoder
from vlm_vqa.model.vlm import build_processor, initial_model, load_tokenizer, random_config, train_tokenizer
from vlm_vqa.params import Dtype, LanguageParams, StoreDtype, VisionParams

GEMMA, DINO = "google/gemma-2-2b-it", "facebook/dinov2-tiny"
# Not the name of a published one: the model that is served under it is smaller.
REVISION = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
EVIL = "raise SystemExit('code of the repository has run')"


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A Gemma 2 and a DINOv2 as the hub has them: with pickled weights, code, and folders for other programs."""
    folder = tmp_path_factory.mktemp("models")
    gemma, dino = folder / "gemma", folder / "dino"
    tokenizer = train_tokenizer(TEXTS, 300)
    torch.manual_seed(5)
    model = Gemma2ForCausalLM(random_config(tiny.language.config, tokenizer))
    # In several files, as the real one is.
    model.save_pretrained(gemma, max_shard_size="50KB")
    tokenizer.save_pretrained(gemma)
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((gemma / name).read_text())
        code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tok", None]}
        (gemma / name).write_text(json.dumps({**values, "auto_map": code}))
    shutil.copytree(SMALL_ENCODER, dino)
    for repository in (gemma, dino):
        (repository / "evil.py").write_text(EVIL)
        torch.save({"weight": torch.zeros(3)}, repository / "pytorch_model.bin")
        (repository / "original").mkdir()
        (repository / "original" / "model.safetensors").write_bytes(b"of another program")
    return gemma, dino


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """A local hub with both, to which this process is led."""
    with serve() as hub:
        lead_to(hub, tmp_path / "home", monkeypatch)
        for name, folder in zip((GEMMA, DINO), folders, strict=True):
            hub.hosted[f"models/{name}"] = Hosted(folder, REVISION)
        yield hub


def vision(model=DINO, revision=REVISION):
    return VisionParams("cpu", model, revision, 65, 128, 8, Dtype.FLOAT32, StoreDtype.FLOAT32)


def language(model=GEMMA, revision=REVISION):
    return LanguageParams(model, revision, None, None)


def load_language(params, tiny):
    processor = build_processor(tiny.processor.image_processor, load_tokenizer(params, []), tiny.num_patches)
    return initial_model(params, tiny.encoder_config, processor, seed=0), processor


def load_vision(params, tiny):
    return load_encoder(params, "cpu")


TOWERS = pytest.mark.parametrize(
    ("key", "load", "params", "name"),
    [("language", load_language, language, GEMMA), ("vision", load_vision, vision, DINO)],
    ids=["language", "vision"],
)


def test_gemma_is_the_one_of_its_folder(hub, folders, tiny):
    model, processor = load_language(language(), tiny)
    local, local_processor = load_language(language(str(folders[0]), None), tiny)
    assert processor.tokenizer.get_vocab() == local_processor.tokenizer.get_vocab()
    expected = local.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert hub.url not in model.config.to_json_string() and "home" not in model.config.to_json_string()


def test_dinov2_is_the_one_of_its_folder(hub, folders):
    assert load_encoder(vision(), "cpu").hash == load_encoder(vision(str(folders[1]), None), "cpu").hash


@TOWERS
def test_only_safetensors_and_settings_are_fetched_and_only_once(hub, tiny, key, load, params, name):
    load(params(), tiny)
    fetched = {request.path.rsplit("/", 1)[-1] for request in hub.requests if request.method == "GET"}
    assert {"config.json"} < fetched and not {file for file in fetched if file.endswith((".bin", ".py"))}
    assert not hub.asked_for("/original/")
    hub.requests.clear()
    load(params(), tiny)
    assert not hub.asked_for("/resolve/") and not hub.asked_for("/storage/")


@TOWERS
def test_pickled_weights_alone_are_refused(hub, tiny, tmp_path, key, load, params, name):
    hosted = hub.hosted[f"models/{name}"]
    hosted.folder = shutil.copytree(
        hosted.folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    with pytest.raises(UserError, match=rf"^{key}.model '{name}': commit {REVISION} has no \*.safetensors"):
        load(params(), tiny)
    assert not hub.asked_for(".bin")


# --- access -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, STRANGER])
@pytest.mark.parametrize(
    ("kind", "words"), [("gated", "is gated.*Accept its licence"), ("private", "private or gated")]
)
@TOWERS
def test_without_access_one_message_says_where_and_how(
    hub, tiny, monkeypatch, key, load, params, name, kind, words, token
):
    setattr(hub.hosted[f"models/{name}"], kind, True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    page = f"https://huggingface.co/{name} "
    with pytest.raises(
        UserError, match=f"^{key}.model '{name}': .*{words}.*{page}.*HF_TOKEN .*`hf auth login`"
    ) as caught:
        load(params(), tiny)
    assert "secret" not in str(caught.value)


def test_a_token_that_is_none_is_told(hub, tiny, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-mistyped")
    with pytest.raises(UserError, match=r"language.model.*refuses the token.*\(401\).*settings/tokens") as caught:
        load_language(language(), tiny)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("login", [False, True])
def test_the_token_opens_a_gated_model_and_goes_to_the_hub_alone(hub, tiny, monkeypatch, tmp_path, login):
    """From HF_TOKEN, or from where `hf auth login` puts it."""
    hub.hosted[f"models/{GEMMA}"].gated = True
    if login:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "token").write_text(TOKEN)
    else:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_language(language(), tiny)
    assert {request.authorization for request in hub.asked_for("/resolve/")} == {f"Bearer {TOKEN}"}
    assert {request.authorization for request in hub.asked_for("/storage/")} == {None}


@TOWERS
def test_what_is_not_there_is_named(hub, tiny, key, load, params, name):
    with pytest.raises(
        UserError, match=rf"{key}.model '{name}': it has no commit '{OTHER}' \({key}.revision\).*commits/main"
    ):
        load(params(revision=OTHER), tiny)
    with pytest.raises(
        UserError, match=f"{key}.model 'google/nothing': the hub shows no such model: it does not exist"
    ):
        load(params("google/nothing"), tiny)
    with pytest.raises(UserError, match=f"{key}.model 'not a name': not a repository's name .*owner/name"):
        load(params("not a name"), tiny)


# --- without a network ------------------------------------------------------------------------------------------------


@TOWERS
def test_no_connection_is_told_unless_the_cache_is_whole(hub, tiny, monkeypatch, key, load, params, name):
    nowhere = "http://127.0.0.1:1"
    # huggingface_hub would wait 24 s between its tries.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
        with pytest.raises(UserError, match=f"^{key}.model '{name}': {nowhere} cannot be reached .*HF_ENDPOINT"):
            load(params(), tiny)
    load(params(), tiny)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
    load(params(), tiny)


@TOWERS
def test_offline_the_cache_serves_or_the_command_that_fills_it_is_told(hub, tiny, monkeypatch, key, load, params, name):
    command = f"`hf download {name} --repo-type model --revision {REVISION}`"
    offline = (huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for there in ("nothing", "a part"):
        if there == "a part":
            huggingface_hub.snapshot_download(name, revision=REVISION, allow_patterns="config.json")
        with monkeypatch.context() as patch:
            patch.setattr(*offline)
            with pytest.raises(UserError, match=f"^{key}.model '{name}': HF_HUB_OFFLINE is set, and .*{command}"):
                load(params(), tiny)
    load(params(), tiny)
    monkeypatch.setattr(*offline)
    hub.requests.clear()
    load(params(), tiny)
    assert not hub.requests


# --- the secret -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(folders, tmp_path, vqav2_folder):
    """A project whose data and towers are gated repositories of a local hub, and that hub."""
    with serve() as hub:
        for name, folder in (
            (f"models/{GEMMA}", folders[0]),
            (f"models/{DINO}", folders[1]),
            ("datasets/lmms-lab/VQAv2", write_repository(tmp_path / "vqav2", rows_of(vqav2_folder("files")))),
        ):
            hub.hosted[name] = Hosted(folder, REVISION, gated=True)
        where = {"repository": "lmms-lab/VQAv2", "revision": REVISION}
        changes = {
            "data.source": "hub",
            "data.hub": {"train": {**where, "split": "train"}, "val": {**where, "split": "validation"}},
            "vision.model": DINO, "vision.revision": REVISION,
            "language": {"model": GEMMA, "revision": REVISION, "vocab_size": None, "config": None},
            "prompt.text_length": 256, "train.batch_size": 4, "train.num_train_epochs": 1,
        }  # fmt: skip
        (tmp_path / "project").mkdir()
        yield Project(tmp_path / "project", {}), changes, hub


class Watched:
    """Runs a stage, notes the command line of every process that it starts, and searches checkpoints while they exist."""

    def __init__(self, project, variables):
        self.project, self.variables = project, variables
        self.output, self.commands, self.checkpoints = "", set(), {}

    def stage(self, name):
        environment = self.project.environment(MLFLOW_TRACKING_URI="sqlite:///mlflow.db", **self.variables)
        with subprocess.Popen(
            self.project.stage_command(name), shell=True, cwd=self.project.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            watcher = threading.Thread(target=self._watch, args=(process,))
            watcher.start()
            output, _ = process.communicate(timeout=300)
            watcher.join()
        self.output += output
        return process.returncode, output

    def _watch(self, process):
        while process.poll() is None:
            try:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                self.commands |= {" ".join(member.cmdline()) for member in family}
                for path in self.project.folder.glob("checkpoints/*/*/*"):
                    self.checkpoints[path.name] = path.is_file() and b"secret" in path.read_bytes()
            except (psutil.NoSuchProcess, FileNotFoundError):
                pass
            time.sleep(0.05)


@pytest.mark.slow
def test_the_token_is_nowhere(project, tmp_path):
    """All that leaves a run is searched: output, files, MLflow's store, and the arguments of every process."""
    project, changes, hub = project
    project.set(changes)
    home = tmp_path / "home"
    run = Watched(project, {**environment(hub, home), "HF_TOKEN": TOKEN})
    for name in ("fetch-vqav2", "extract-features", "train", "export"):
        code, output = run.stage(name)
        assert code == 0, output
    for name in hub.hosted:
        opened = hub.asked_for(f"{name.removeprefix('models/')}/resolve/")
        assert opened and {request.authorization for request in opened} == {f"Bearer {TOKEN}"}, name

    assert "secret" not in run.output
    assert any("stages/train.py" in command for command in run.commands)
    assert not [command for command in run.commands if "secret" in command]
    assert "trainer_state.json" in run.checkpoints and not any(run.checkpoints.values())
    written = [path for folder in (project.folder, home) for path in folder.rglob("*") if path.is_file()]
    assert {"mlflow.db", "training.json", "model.safetensors", "train.json"} <= {path.name for path in written}
    assert list(project.folder.glob("mlartifacts/**/*.*"))
    assert not [path for path in written if b"secret-" in path.read_bytes()]
    # Nor does any output know in which cache of whose machine the towers lay.
    outputs = [path for name in ("data", "models", "reports") for path in (project.folder / name).rglob("*")]
    assert not [path for path in outputs if path.is_file() and str(tmp_path).encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_stage_without_a_token_ends_in_one_message(project, tmp_path):
    project, changes, hub = project
    project.set(changes)
    run = Watched(project, {**environment(hub, tmp_path / "home"), "HF_TOKEN": STRANGER})
    code, output = run.stage("fetch-vqav2")
    assert code == 2 and "Traceback" not in output and "secret" not in output
    assert output.count("error:") == output.count("https://huggingface.co/datasets/lmms-lab/VQAv2") == 1
