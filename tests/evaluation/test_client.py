"""HELM's client: one model for all threads, no old answers, no retries."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helm.clients.auto_client import AutoClient
from helm.common.media_object import MediaObject, MultimediaObject
from helm.common.request import Request

from vlm_vqa.evaluation.helm.client import VlmVqaClient, load, shared_model
from vlm_vqa.evaluation.helm.run import FAILED
from vlm_vqa.params import HELM_INSTRUCTION


@pytest.fixture(autouse=True)
def fresh(project, picture):
    """No model and no fake module of an earlier test."""
    load.cache_clear()
    sys.modules.pop("fake_predictor", None)
    for name, red in (("red", True), ("blue", False)):
        (project / f"{name}.jpg").write_bytes(picture(red))
    return project


def request(image="red.jpg", question="what colour?", instruction=HELM_INSTRUCTION):
    """As HELM's `vqa` builds it."""
    media = [
        MediaObject(text=instruction, content_type="text/plain"),
        MediaObject(text="\n", content_type="text/plain"),
        MediaObject(location=image, content_type="image/jpeg"),
        MediaObject(text=question, content_type="text/plain"),
    ]
    name = "vlm-vqa/dinov2-gemma2"
    return Request(model=name, model_deployment=name, temperature=0.0, multimodal_prompt=MultimediaObject(media))


def client():
    return VlmVqaClient(predictor="fake_predictor:load")


def text(result):
    assert result.success, result.error
    return result.completions[0].text


def test_answers_and_takes_the_instruction_out():
    asked = []
    one = client()
    model = shared_model("models/export", "params.yaml", "fake_predictor:load")
    answer_features = model.predictor.answer_features
    model.predictor.answer_features = lambda questions, *rest: (
        asked.extend(questions) or answer_features(questions, *rest)
    )
    assert text(one.make_request(request("red.jpg"))) == "red"
    assert text(one.make_request(request("blue.jpg", "which?"))) == "blue"
    assert asked == ["what colour?", "which?"]


def test_one_model_for_many_clients_and_threads_and_each_image_encoded_once_a_batch(fresh, monkeypatch):
    import fake_predictor

    loads = []
    real = fake_predictor.load
    monkeypatch.setattr(fake_predictor, "load", lambda *a, **k: loads.append(threading.get_ident()) or real(*a, **k))
    with ThreadPoolExecutor(32) as pool:
        wanted = ["red.jpg" if at % 3 else "blue.jpg" for at in range(64)]
        answers = list(pool.map(lambda image: text(client().make_request(request(image))), wanted))
    assert answers == [image.removesuffix(".jpg") for image in wanted]
    assert len(loads) == 1
    model = shared_model("models/export", "params.yaml", "fake_predictor:load")
    # Two batches of 32 (params.yaml's helm_threads) that hold two different images each.
    assert model.predictor.encoded == 4


def test_a_retrained_model_never_gets_old_answers(fresh):
    assert text(client().make_request(request())) == "red"
    load.cache_clear()
    facts = {"weights_hash": "v" * 64, "red": "crimson"}
    (fresh / "models" / "export" / "vlm_vqa.json").write_text(json.dumps(facts))
    retrained = client().make_request(request())
    assert not retrained.cached and text(retrained) == "crimson"


def test_another_image_under_the_same_path_never_gets_old_answers(fresh, picture):
    assert text(client().make_request(request("red.jpg"))) == "red"
    (fresh / "red.jpg").write_bytes(picture(False))
    assert text(client().make_request(request("red.jpg"))) == "blue"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"instruction": "Answer."}, "HELM asks with the instruction 'Answer.'"),
        ({"image": "gone.jpg"}, "gone.jpg: cannot be read"),
        ({"image": "torn.jpg"}, "torn.jpg: not a readable image"),
    ],
)
def test_every_error_is_fatal_and_not_retried(fresh, picture, asked, message):
    for name in ("torn.jpg", "gone.jpg"):
        (fresh / name).write_bytes(picture(True)[:200])
    asked = request(**asked)
    (fresh / "gone.jpg").unlink()
    result = client().make_request(asked)
    assert not result.success
    assert result.error.startswith(f"{FAILED} ") and message in result.error
    assert result.error_flags.is_retriable is False and result.error_flags.is_fatal is True


def test_a_failing_model_is_reported_with_its_traceback(fresh):
    (fresh / "models" / "export" / "vlm_vqa.json").write_text('{"fails": "out of memory"}')
    result = client().make_request(request())
    assert "RuntimeError('out of memory')" in result.error and "Traceback" in result.error


def test_a_model_that_does_not_load_is_tried_once(fresh, monkeypatch):
    import fake_predictor

    (fresh / "models" / "export" / "vlm_vqa.json").unlink()
    loads = []
    real = fake_predictor.load
    monkeypatch.setattr(fake_predictor, "load", lambda *a, **k: loads.append(1) or real(*a, **k))
    assert {client().make_request(request()).error for _ in range(3)} == {f"{FAILED} models/export: no export there."}
    assert len(loads) == 1


def test_requests_of_another_shape_are_refused():
    prompt = MultimediaObject([MediaObject(text="hello", content_type="text/plain")])
    result = client().make_request(Request(model="a/b", multimodal_prompt=prompt))
    assert "Use its `vqa` run" in result.error


def test_helm_does_not_ask_again(fresh, monkeypatch):
    """Through HELM's own retrying front: one request, no minutes of waiting."""
    asked = []

    class Counting(VlmVqaClient):
        def make_request(self, request):
            asked.append(request)
            return super().make_request(request)

    front = AutoClient.__new__(AutoClient)
    monkeypatch.setattr(
        front,
        "_get_client",
        lambda name: Counting(predictor="fake_predictor:load"),
        raising=False,
    )
    assert not front.make_request(request(instruction="Answer.")).success
    assert len(asked) == 1
