"""`vlm-vqa publish`: what goes to the hub is what dvc.lock and the reports speak of, and only when it is told to."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.fake_hub import STRANGER, TOKEN, Hosted, lead_to, serve
from vlm_vqa import cli
from vlm_vqa.errors import UserError
from vlm_vqa.hashing import write_json
from vlm_vqa.inference.card import UNSCORED, card, scored
from vlm_vqa.params import ModelParams, Start, load_params
from vlm_vqa.sealed import read_folder, write_folder

REPO = Path(__file__).parents[1]
DATA = {"source": "easy-vqa", "notes": ["a note"], "splits": {"train": {"questions": 3, "images": 2}}}
REPORT = {
    "helm": {"bleu_1": 0.9, "instances": 1000},
    "vqa_accuracy": {"overall": 0.8, "questions": 9673},
    "baselines": {"prior": {"bleu_1": 0.6, "vqa_accuracy": 0.5}},
    "model": {"weights_hash": "w" * 64},
}
PIPELINE = """stages:
  export:
    cmd: "true"
    outs: [models/export]
  helm-eval:
    cmd: "true"
    deps: [models/export]
    outs: [reports/evaluation.json: {cache: false}]
"""


def write_export(text: str) -> None:
    """Write what looks like an export."""
    Path("models/export/adapter").mkdir(parents=True)
    Path("models/export/README.md").write_text(text)
    Path("models/export/model.safetensors").write_bytes(b"weights")
    Path("models/export/adapter/adapter_model.safetensors").write_bytes(b"adapter")
    write_folder(Path("models/export/vlm_vqa.json"), {"weights_hash": "w" * 64, "mask": "causal"})


def dvc(*words: str) -> None:
    subprocess.run(["dvc", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A DVC project whose last two stages have run: making one costs seconds, copying it none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("published"))
        dvc("init", "--no-scm", "--quiet")
        Path("dvc.yaml").write_text(PIPELINE)
        shutil.copy(REPO / "presets/small.yaml", "params.yaml")
        write_export(card(load_params("params.yaml"), {}, {}, DATA))
        Path("reports").mkdir()
        write_json("reports/evaluation.json", REPORT)
        dvc("commit", "--force", "--quiet")
        return Path.cwd()


@pytest.fixture
def project(committed, tmp_path, monkeypatch):
    shutil.copytree(committed, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    for path in Path("models/export").rglob("*"):
        path.chmod(0o755)
    return tmp_path / "project"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve() as hub:
        lead_to(hub, tmp_path / "home", monkeypatch)
        hub.made_in = tmp_path / "hub"
        yield hub


def test_a_dry_run_shows_the_card_with_scores_and_asks_no_hub(project, hub, capsys):
    before = Path("models/export/README.md").read_bytes()
    assert cli.main(["publish", "me/vqa", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "value: 0.8\n" in shown and "| VQA accuracy | 0.8000 | 9,673 questions of val | prior 0.5000 |" in shown
    assert "7 bytes  model.safetensors" in shown and "reports/evaluation.json" in shown
    assert hub.requests == [] and Path("models/export/README.md").read_bytes() == before


def test_it_publishes_one_commit_that_is_whole(project, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli.main(["publish", "me/vqa"]) == 0
    said = capsys.readouterr()
    assert "/me/vqa/commit/" in said.out and TOKEN not in said.out + said.err
    assert len(hub.asked_for("/commit/")) == 1
    there = hub.hosted["models/me/vqa"]
    assert there.private
    # The seal is of what lies there: who downloads it can ask it.
    assert read_folder(there.folder / "vlm_vqa.json", "", "") == {"weights_hash": "w" * 64, "mask": "causal"}
    assert (there.folder / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((there.folder / "reports/evaluation.json").read_text()) == REPORT
    results = ModelCard((there.folder / "README.md").read_text()).data.eval_results
    assert [(one.metric_type, one.metric_value) for one in results] == [("accuracy", 0.8), ("bleu", 0.9)]


def test_weights_of_an_earlier_export_go_and_what_else_is_there_stays(project, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = hub.made_in / "models/me/vqa"
    folder.mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "LICENSE"):
        (folder / name).write_text("old")
    hub.hosted["models/me/vqa"] = Hosted(folder, "1" * 40)
    assert cli.main(["publish", "me/vqa"]) == 0
    names = {path.name for path in folder.iterdir()}
    assert "LICENSE" in names and {name for name in names if "safetensors" in name} == {"model.safetensors"}
    assert not hub.hosted["models/me/vqa"].private


@pytest.mark.parametrize(("token", "says"), [(None, "HF_TOKEN"), (STRANGER, "HF_TOKEN"), ("hf_mistyped", "HF_TOKEN")])
def test_without_the_right_token_it_says_what_to_do(project, hub, monkeypatch, capsys, token, says):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert cli.main(["publish", "me/vqa"]) == 2
    said = capsys.readouterr()
    assert says in said.err and (token or "hf_") not in said.err and hub.hosted == {}


def other_report() -> None:
    write_json("reports/evaluation.json", REPORT | {"model": {"weights_hash": "v" * 64}})
    dvc("commit", "--force", "--quiet", "helm-eval")


def other_export() -> None:
    shutil.rmtree("models/export")
    write_export("another")
    lock = Path("dvc.lock").read_text()
    dvc("commit", "--force", "--quiet", "export")
    assert Path("dvc.lock").read_text() != lock


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: Path("models/export/model.safetensors").write_bytes(b"WEIGHTS"), "damaged"),
        (lambda: shutil.rmtree("models/export"), "models/export/vlm_vqa.json"),
        (lambda: Path("reports/evaluation.json").write_text(json.dumps(REPORT)), "reports/evaluation.json"),
        (lambda: Path("reports/evaluation.json").unlink(), "reports/evaluation.json"),
        (other_report, "other weights"),
        (other_export, "another export"),
    ],
)
def test_it_refuses_what_the_records_do_not_speak_of(project, hub, monkeypatch, capsys, change, says):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    change()
    assert cli.main(["publish", "me/vqa"]) == 2
    said = capsys.readouterr().err
    assert says in said and "`" in said and hub.requests == []


def test_the_head_says_to_the_hub_what_the_weights_are_of():
    params = load_params(REPO / "presets/small.yaml")
    head = ModelCard(card(params, {}, {}, DATA)).data
    assert (head.license, head.base_model, head.datasets) == ("apache-2.0", None, None)
    params = load_params(REPO / "presets/vqav2.yaml")
    text = card(params, {}, {}, DATA)
    head = ModelCard(text).data
    names = [params.vision.model, params.language.model]
    assert head.license == "gemma" and head.base_model == names and "ai.google.dev/gemma/terms" in text
    assert head.base_model_revisions == {one.model: one.revision for one in (params.vision, params.language)}
    assert "LVD-142M" in text and head.pipeline_tag == "image-text-to-text" and head.metrics == ["accuracy", "bleu"]
    # What YAML would read as something else stays what it is.
    start = ModelParams(start=Start.CHECKPOINT, checkpoint="me/a: b # c", revision="0" * 39 + "1")
    head = ModelCard(card(dataclasses.replace(params, model=start), {}, {}, DATA)).data
    assert head.base_model_revisions == {"me/a: b # c": "0" * 39 + "1"}


def test_scores_with_hostile_names_and_intervals_pass_the_hubs_own_parser():
    text = card(load_params(REPO / "presets/small.yaml"), {}, {}, DATA)
    assert text.count(UNSCORED) == 1 and "model-index" not in text
    intervals = {"answer_accuracy": {"model": {"overall": {"low": 0.6, "high": 0.8}}}}
    report = REPORT | {"answer_accuracy": {"overall": 0.7, "questions": 5}, "intervals": intervals}
    report["baselines"] = {"prior": {"bleu_1": 0.6, "answer_accuracy": 0.5}}
    filled = scored(text, report, "a: b # c", "null")
    data = ModelCard(filled).data
    first, second = data.eval_results
    assert (
        data.model_name == "null" and first.dataset_name == "a: b # c" and first.metric_args == {"interval": [0.6, 0.8]}
    )
    assert second.metric_args is None and "answer accuracy | 0.7000 (0.6000 to 0.8000) | 5 questions" in filled
    assert UNSCORED not in filled
    with pytest.raises(UserError, match="dvc repro export"):
        scored(filled, report, "a", "b")
