"""Exports as versions of a registered model: found by their seals, loaded and served by MLflow, moved ones refused."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from tests.mlflow_store import runs
from tests.tiny_model import tiny_base
from vlm_vqa import tracking
from vlm_vqa.errors import UserError
from vlm_vqa.inference.export import write_base
from vlm_vqa.inference.predictor import FACTS_FILE, Predictor
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.sealed import write_folder
from vlm_vqa.tracking import registry
from vlm_vqa.tracking.store import Store

REPO = Path(__file__).parents[2]
DATA_HASH = "0123456789" * 6 + "abcd"
REPORT = {"helm": {"bleu_1": 0.9}, "vqa_accuracy": {"overall": 0.8, "questions": 3}, "model": {"step": 3}}


def put_export(folder: Path, weights_hash: str = "w" * 64, mask: str = "causal") -> None:
    """Write what looks like an export from outside."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"0" * 3000)
    (folder / "README.md").write_text("card")
    write_folder(folder / FACTS_FILE, {"weights_hash": weights_hash, "mask": mask, "step": 3})


@pytest.fixture
def trained(checkout, params, monkeypatch):
    """A trained run's id, and an export of its weights."""
    # MLflow looks through all installed packages for this check of our own versions: seconds.
    monkeypatch.setattr("mlflow.utils.environment.warn_dependency_requirement_mismatches", lambda *_, **__: None)
    with tracking.training_run(params, key="k", tags={"data_hash": DATA_HASH, "git_commit": "abc"}) as run:
        run.set_tags({"weights_hash": "w" * 64})
    put_export(checkout / registry.EXPORT)
    return run.run_id


def large(params):
    """Parameters under which every export is too large to be copied."""
    return dataclasses.replace(params, tracking=dataclasses.replace(params.tracking, max_artifact_mib=0))


def exported(params) -> None:
    tracking.log_results(params, weights_hash="w" * 64, files=[registry.EXPORT / "README.md"])


def client(checkout) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{checkout / 'mlflow.db'}")


def versions(checkout):
    return client(checkout).search_model_versions("name = 'vlm-vqa'")


def test_an_export_is_a_version_linked_to_run_data_and_scores(checkout, params, trained):
    exported(params)
    tracking.log_results(params, weights_hash="w" * 64, report=REPORT)
    (version,) = versions(checkout)
    assert version.run_id == trained and version.version == 1
    assert version.tags["weights_hash"] == "w" * 64 and version.tags["params_hash"] == params.hash()
    assert version.tags["data_hash"] == DATA_HASH and version.tags["mask"] == "causal"
    model = client(checkout).get_logged_model(version.tags["model_id"])
    assert model.status == "READY" and model.source_run_id == trained
    scores = {metric.key: (metric.value, metric.dataset_name, metric.dataset_digest) for metric in model.metrics}
    assert scores["vqa_accuracy"] == (0.8, "easy-vqa", DATA_HASH[:36])
    (run,) = runs(checkout)
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("easy-vqa", DATA_HASH[:36])
    assert [output.model_id for output in run.outputs.model_outputs] == [version.tags["model_id"]]


def test_one_export_is_one_version(checkout, params, trained):
    for _ in range(2):
        exported(params)
    assert len(versions(checkout)) == 1
    put_export(checkout / registry.EXPORT, mask="prefix-lm")
    exported(params)
    assert [version.tags["mask"] for version in versions(checkout)] == ["prefix-lm", "causal"]
    put_export(checkout / registry.EXPORT, weights_hash="v" * 64)  # what is there is not what the stage speaks of
    exported(params)
    assert len(versions(checkout)) == 2


def test_a_large_export_stays_where_it_is(checkout, params, trained):
    exported(large(params))
    assert not list((checkout / "mlartifacts").rglob("*.safetensors"))
    put_export(checkout / registry.EXPORT)
    assert registry.local_folder("models:/vlm-vqa/1") == checkout / registry.EXPORT
    client(checkout).set_registered_model_alias("vlm-vqa", "champion", "1")
    assert registry.local_folder("models:/vlm-vqa@champion") == checkout / registry.EXPORT
    put_export(checkout / registry.EXPORT, weights_hash="v" * 64)
    with pytest.raises(UserError, match="another export is there now.*`git checkout abc && dvc pull` brings"):
        registry.local_folder("models:/vlm-vqa/1")
    shutil.rmtree(checkout / registry.EXPORT)
    with pytest.raises(UserError, match="no whole export is there"):
        registry.local_folder("models:/vlm-vqa@champion")


@pytest.mark.parametrize("by_reference", [True, False])
def test_a_version_made_in_a_copy_of_dvcs_outlives_the_copy(checkout, params, trained, monkeypatch, by_reference):
    copy = checkout / ".dvc/tmp/exps/tmpab12"
    shutil.copytree(checkout / registry.EXPORT, copy / registry.EXPORT)
    shutil.copy("dvc.yaml", copy)
    shutil.rmtree(checkout / registry.EXPORT)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_EXP_NAME", "molal-coir")
    params = dataclasses.replace(params, seed=7)
    with tracking.training_run(params, key="k", tags={}) as run:
        run.set_tags({"weights_hash": "w" * 64})
    exported(large(params) if by_reference else params)
    monkeypatch.chdir(checkout)
    assert not list(copy.rglob("mlflow.db"))
    shutil.rmtree(copy)
    (version,) = versions(checkout)
    assert version.run_id == run.run_id and not any(str(copy) in text for text in version.tags.values())
    if by_reference:
        with pytest.raises(UserError, match="`dvc exp apply molal-coir` brings it back"):
            registry.local_folder("models:/vlm-vqa/1")
        put_export(checkout / registry.EXPORT)
    assert (registry.local_folder("models:/vlm-vqa/1") / "README.md").read_text() == "card"


@pytest.mark.parametrize(
    "name", ["models:/vlm-vqa/2", "models:/vlm-vqa@champion", "models:/other/1", "models:/", "models:/a/b/c"]
)
def test_what_is_not_registered_is_named_with_what_to_do(checkout, params, trained, name):
    exported(params)
    with pytest.raises(UserError, match=f"^{name}: .*MLFLOW_TRACKING_URI"):
        registry.local_folder(name)


def test_no_store_is_made_to_look_into_it(checkout):
    (checkout / "mlflow.db").unlink()
    with pytest.raises(UserError, match="no MLflow store here"):
        registry.local_folder("models:/vlm-vqa/1")
    assert not (checkout / "mlflow.db").exists()


def test_a_registry_that_fails_costs_a_warning(checkout, params, trained, monkeypatch, caplog):
    monkeypatch.setattr(MlflowClient, "create_model_version", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    exported(params)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "full" in message and "vlm-vqa track" in message


def test_track_registers_what_a_pull_has_brought_and_its_scores(checkout, params, trained):
    for name, value in {
        "models/trained/training.json": {"weights_hash": "v" * 64, "data_hash": DATA_HASH},
        "dvc.lock": {"stages": {}},
        "reports/evaluation.json": REPORT,
    }.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(json.dumps(value))
    (checkout / "reports/validation").mkdir()
    for name in ("train_curve.csv", "validation/curve.csv"):
        (checkout / "reports" / name).write_text("step,loss\n1,2.0\n")
    put_export(checkout / registry.EXPORT, weights_hash="v" * 64)
    run_id, made = tracking.recreate_run(checkout)
    assert made and tracking.recreate_run(checkout) == (run_id, False)
    (version,) = versions(checkout)
    scores = client(checkout).get_logged_model(version.tags["model_id"]).metrics
    assert version.run_id == run_id and {metric.key for metric in scores} >= {"bleu_1", "vqa_accuracy"}
    client(checkout).delete_model_version("vlm-vqa", version.version)
    assert tracking.recreate_run(checkout) == (run_id, True) and len(versions(checkout)) == 1


def test_a_models_name_is_the_experiments_without_what_mlflow_refuses(params):
    named = dataclasses.replace(params, tracking=dataclasses.replace(params.tracking, experiment="team/vqa: 1.0 %"))
    assert registry.model_name(named) == "team-vqa-1-0-"


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tiny, checkout, params, trained):
    """A registered tiny model that answers, by reference."""
    shutil.rmtree(checkout / registry.EXPORT)
    prompt = dataclasses.replace(params.prompt, instruction=tiny.layout("causal").instruction, text_length=64)
    vision = dataclasses.replace(params.vision, num_patches=tiny.num_patches)
    encoder = Encoder(tiny.stock.model.vision_tower.eval(), tiny.processor.image_processor, "hash", tiny.num_patches)
    shape = dataclasses.replace(params, prompt=prompt, vision=vision)
    weights_hash = write_base(checkout / registry.EXPORT, tiny_base(tiny), encoder, tiny.processor, shape)
    assert registry.register(Store(large(params), checkout), trained, Path("."), weights_hash)
    return Predictor.from_export(checkout / registry.EXPORT)


QUESTIONS = ["What color is the shape?", "Is there a red circle?", "How many dogs are there?"]


def asked() -> tuple[pd.DataFrame, list[Image.Image]]:
    """More rows than one batch."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (30, 40, 3), dtype=np.uint8)) for _ in range(20)]
    files = []
    for image in images:
        image.save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    return pd.DataFrame({"image": files, "question": (QUESTIONS * 7)[:20]}), images


def test_mlflow_answers_a_frame(served):
    frame, images = asked()
    answers = [served.answer([question], [image])[0] for question, image in zip(frame["question"], images, strict=True)]
    assert len(set(answers)) > 1
    model = mlflow.pyfunc.load_model("models:/vlm-vqa/1")
    assert list(model.predict(frame)["answer"]) == answers
    texts = frame.assign(image=[base64.b64encode(data).decode() for data in frame["image"]])
    assert list(model.predict(texts)["answer"]) == answers
    assert list(model.predict(model.input_example)) == ["answer"]
    for bad, message in [("/etc/passwd", "paths are not read"), (b"GIF", "not a readable image")]:
        with pytest.raises(MlflowException, match=f"row 1: .*{message}"):
            model.predict(pd.DataFrame({"image": [frame["image"][0], bad], "question": QUESTIONS[:2]}))


def test_mlflow_refuses_another_export_in_its_place(served, checkout):
    put_export(checkout / registry.EXPORT)
    with pytest.raises(UserError, match="another export is there now"):
        mlflow.pyfunc.load_model("models:/vlm-vqa/1")


@pytest.mark.slow
def test_mlflow_serves_it(served, checkout):
    frame, images = asked()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/vlm-vqa/1", "--env-manager", "local"]
    environment = os.environ | {
        "PYTHONPATH": str(REPO / "src"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{checkout}/mlflow.db",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with (checkout / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "-p", str(port)], env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def ask(images: list[str]) -> tuple[int, str]:
        rows = [[image, question] for image, question in zip(images, frame["question"], strict=False)]
        body = json.dumps({"dataframe_split": {"columns": ["image", "question"], "data": rows}}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            assert server.poll() is None, (checkout / "log").read_text()
            time.sleep(0.5)
        status, text = ask([base64.b64encode(data).decode() for data in frame["image"]])
        assert status == 200, text
        answers = [
            served.answer([question], [image])[0] for question, image in zip(frame["question"], images, strict=True)
        ]
        assert [row["answer"] for row in json.loads(text)["predictions"]] == answers
        for bad in ("/etc/passwd", base64.b64encode(b"no picture").decode()):
            status, text = ask([bad])
            assert status == 400 and "root:" not in text, text
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
