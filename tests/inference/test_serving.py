"""`vlm-vqa serve`: the trained function over OpenAI's protocol, and a refusal in words for what is no question."""

import base64
import io
import json
import signal
import socket
import struct
import zlib

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from proofs.serving import server
from tests.inference.test_export import DATA, RESULTS
from tests.tiny_model import write_trained
from vlm_vqa.errors import UserError
from vlm_vqa.inference import serving
from vlm_vqa.inference.export import read_training, write_export
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.model.layout import Row, visible
from vlm_vqa.model.vlm import set_attention, text_hidden, text_logits
from vlm_vqa.params import Attention

QUESTIONS = ["What color is the shape?", "Is there a  dog\nor <image><eos>?", "How many red dogs are there?"]
MASKS = ("causal", "image-prefix", "prefix-lm")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def export(tiny, tmp_path_factory):
    """Return a function that exports the tiny model, whose random weights give long, odd answers, for a mask."""

    def write(mask="image-prefix"):
        folder = tmp_path_factory.mktemp("export") / mask
        trained, encoder, params = write_trained(tiny, tmp_path_factory.mktemp("trained"), mask)
        write_export(folder, trained, encoder, params, read_training(trained), RESULTS, DATA)
        return folder

    return write


@pytest.fixture(scope="module")
def front(export):
    """What a request passes before the stock handler, of an image-prefix export."""
    return serving.Front(Predictor.from_export(export(), "cpu"), 50_000_000, "secret")


@pytest.fixture(scope="module")
def client(front):
    """A client of the server in this process, by its key."""
    app = serving.build_app(front)
    with TestClient(app, "http://localhost", headers={"authorization": "Bearer secret"}) as found:
        yield found


def pictures():
    values = np.random.default_rng(0).integers(0, 255, (3, 31, 45, 3), dtype=np.uint8)
    return [Image.fromarray(value) for value in values]


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def address(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(url):
    return {"type": "image_url", "image_url": {"url": url}}


PNG = png(pictures()[0])
PICTURE, QUESTION = part(address(PNG)), {"type": "text", "text": QUESTIONS[0]}
USER = {"role": "user", "content": [PICTURE, QUESTION]}


def body(*content, **fields):
    return {
        "model": serving.MODEL,
        "messages": [{"role": "user", "content": list(content) or USER["content"]}],
    } | fields


def answer(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("mask", MASKS)
def test_answers_and_logits_are_those_of_the_trained_function(export, mask):
    ours = Predictor.from_export(export(mask), "cpu")
    expected = ours.answer(QUESTIONS, pictures())
    front = serving.Front(ours, 50_000_000, None)
    with TestClient(serving.build_app(front), "http://localhost") as client:
        found = [
            answer(client.post(CHAT, json=body(part(address(png(image))), {"type": "text", "text": question})))
            for question, image in zip(QUESTIONS, pictures(), strict=True)
        ]
    assert found == expected and len(set(found)) > 1 and all(found)
    for question, image in zip(QUESTIONS, pictures(), strict=True):
        with torch.no_grad():
            served = ours.model(**front.inputs(question, png(image))).logits[0, -1]
            grid = ours.layout.collate([Row(0, (ours.layout.tokenize(question),))])
            allowed = visible(grid["segment_ids"], grid["position_ids"], grid["bidirectional"])
            features = ours.encode([image])
            set_attention(ours.model, Attention.EAGER)
            hidden = text_hidden(ours.model, features, grid["input_ids"], grid["position_ids"], allowed)
            ours.model.model.language_model.set_attn_implementation("eager")
            torch.testing.assert_close(served, text_logits(ours.model, hidden[0, -1]), rtol=0, atol=1e-5)


def test_the_picture_is_seen_as_people_see_it(front):
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste((200, 0, 0), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[274] = 6
    turned, hidden = io.BytesIO(), Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    hidden.paste((200, 0, 0, 255), (0, 0, 10, 20))
    expected = front.predictor.preprocess([upright])
    for data in (png(upright), turned.getvalue(), png(hidden)):
        assert front.inputs("Red?", data)["pixel_values"].equal(expected)


def test_what_clients_send_beside_picture_and_question(client, front):
    instruction = front.predictor.instruction
    expected = answer(client.post(CHAT, json=body()))
    helm = [{"type": "text", "text": instruction}, {"type": "text", "text": "\n"}, PICTURE, QUESTION]
    same = [
        body(*helm, temperature=0.0, top_p=1, n=1, max_tokens=2048, presence_penalty=0, frequency_penalty=0.0),
        body(QUESTION, PICTURE, seed=3, stop=None, logprobs=False, user="me"),
        {**body(), "messages": [{"role": "system", "content": instruction}, USER]},
    ]
    assert [answer(client.post(CHAT, json=one)) for one in same] == [expected] * len(same)
    short = client.post(CHAT, json=body(max_tokens=1)).json()
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 1
    events = client.post(CHAT, json=body(stream=True)).text.split("data: ")[1:]
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(deltas).strip() == expected
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["weights_hash"]) == (serving.MODEL, front.predictor.weights_hash)


def huge_png(width, height):
    """A few hundred bytes that say they are a picture of so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


TURNS = [USER, {"role": "assistant", "content": "red"}, USER]
REFUSED = {
    "no JSON": (b'{"model": ', 400, "not JSON"),
    "deep JSON": (b"[" * 100_000, 400, "not JSON"),
    "not UTF-8": (b"\xff\xfe", 400, "not JSON"),
    "no object": (b"[1]", 400, "not a JSON object"),
    "nothing": (b"", 400, "not JSON"),
    "no messages": ({"model": serving.MODEL}, 400, "one message of a user"),
    "messages of another type": ({"model": serving.MODEL, "messages": {"role": "user"}}, 400, "one message of a user"),
    "several turns": ({"model": serving.MODEL, "messages": TURNS}, 400, "one message of a user"),
    "a system message": (
        {"model": serving.MODEL, "messages": [{"role": "system", "content": "Be rude."}, USER]}, 400, "Answer in one word",
    ),
    "no picture": (body(QUESTION), 400, "0 pictures"),
    "text alone": ({"model": serving.MODEL, "messages": [{"role": "user", "content": "Red?"}]}, 400, "0 pictures"),
    "two pictures": (body(PICTURE, PICTURE, QUESTION), 400, "2 pictures"),
    "no question": (body(PICTURE), 400, "question is empty"),
    "half a character": (body(PICTURE, {"type": "text", "text": "\ud800"}), 400, "not valid UTF-8"),
    "a long question": (body(PICTURE, {"type": "text", "text": "dog " * 90}), 400, "tokens"),
    "megabytes of question": (body(PICTURE, {"type": "text", "text": "x" * 5_000_000}), 400, "longer than 10,000"),
    "content of another type": ({"model": serving.MODEL, "messages": [{"role": "user", "content": 7}]}, 400, "neither text"),
    "a part of another type": (body({"type": "video_url", "video_url": {"url": "x"}}, QUESTION), 400, "neither text"),
    "a picture without address": (body({"type": "image_url"}, QUESTION), 400, "neither text"),
    "a file's address": (body(part("file:///etc/passwd"), QUESTION), 400, "no file is opened"),
    "a path": (body(part("/etc/passwd"), QUESTION), 400, "no file is opened"),
    "another host": (body(part("http://169.254.169.254/latest/meta-data"), QUESTION), 400, "Nothing is fetched"),
    "bare base64": (body(part(base64.b64encode(PNG).decode()), QUESTION), 400, "only data:image"),
    "cut base64": (body(part(address(PNG)[:-3]), QUESTION), 400, "cut short"),
    "no base64": (body(part("data:image/png;base64,***"), QUESTION), 400, "cut short or damaged"),
    "a cut picture": (body(part(address(PNG[:-200])), QUESTION), 400, "cut short or damaged"),
    "a text as picture": (body(part(address(b"hello")), QUESTION), 400, "a text file"),
    "100 megapixels": (body(part(address(huge_png(10_000, 10_000))), QUESTION), 400, "--max-image-pixels (50000000)"),
    "more than Pillow opens": (body(part(address(huge_png(60_000, 60_000))), QUESTION), 400, "more pixels than Pillow"),
    "100 MB": (b" " * 100_000_000, 413, "16,777,216 are read"),
    "another model": (body(model="google/gemma-2-2b-it"), 404, "there is none called"),
    "no model": ({"messages": [USER]}, 404, "there is none called None"),
    "sampling": (body(temperature=0.7), 400, "temperature: answers are greedy"),
    "several answers": (body(n=2), 400, "n: answers are greedy"),
    "probabilities": (body(logprobs=True), 400, "logprobs: answers are greedy"),
    "a stock server's field": (body(generation_config="{}"), 400, "generation_config: is not served"),
    "a template's field": (body(chat_template_kwargs={"chat_template": "{{ 1 }}"}), 400, "is not served"),
    "tools": (body(tools=[{}]), 400, "tools: is not served"),
    "no tokens": (body(max_tokens=-1), 400, "max_tokens"),
    "tokens of another type": (body(max_completion_tokens="many"), 400, "max_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_question_is_refused_in_words_and_the_next_one_is_answered(client, monkeypatch, name):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    content, status, words = REFUSED[name]
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    response = client.post(CHAT, content=content)
    error = response.json()["error"]
    assert response.status_code == status and words in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and "Traceback" not in response.text
    assert answer(client.post(CHAT, json=body()))


@pytest.mark.parametrize("key", [None, "Bearer wrong", "secret", "Bearer secrets", "Bearer \xe9"])
def test_without_the_key_nothing_is_answered(client, key):
    headers = {"authorization": key.encode("latin-1") if key else b""}
    for response in (client.post(CHAT, json=body(), headers=headers), client.get("/v1/models", headers=headers)):
        assert response.status_code == 401 and serving.KEY in response.json()["error"]["message"]
    assert client.get("/health", headers=headers).json() == {"status": "ok"}


def test_the_stock_server_s_other_doors_are_not_there(client):
    for path in ("/load_model", "/reset", "/v1/completions", "/v1/responses", "/v1/systemone", "/docs"):
        response = client.post(path, json={"model": "google/gemma-2-2b-it"})
        assert response.status_code == 404 and response.json()["error"]["message"] == "Not Found"
    assert client.get(CHAT).status_code == 405
    # A page of a stranger's that a browser has opened, whose name leads to this machine.
    assert client.post(CHAT, json=body(), headers={"host": "evil.example"}).status_code == 400


def test_a_fault_of_ours_is_no_traceback_for_the_client(front, monkeypatch):
    monkeypatch.setattr(front, "inputs", lambda *_: 1 / 0)
    app = serving.build_app(front)
    with TestClient(app, "http://localhost", False, headers={"authorization": "Bearer secret"}) as client:
        response = client.post(CHAT, json=body())
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    assert "division" not in response.text and "Traceback" not in response.text


def test_it_starts_for_other_machines_with_a_key_only_and_on_a_free_port_only(tmp_path, monkeypatch):
    monkeypatch.delenv(serving.KEY, raising=False)
    with pytest.raises(UserError, match=f"set {serving.KEY}"):
        serving.serve(tmp_path, "0.0.0.0", 0, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot be used"):
        serving.serve(tmp_path, "127.0.0.1", taken.getsockname()[1], 1)
    with pytest.raises(UserError, match="--port 99999"):
        serving.serve(tmp_path, "127.0.0.1", 99999, 1)
    with pytest.raises(UserError, match=r"no vlm_vqa\.json there"):
        serving.serve(tmp_path, "127.0.0.1", 0, 1)


@pytest.mark.slow
def test_the_process_answers_openai_s_own_client_and_a_signal_ends_it(export):
    folder = export()
    expected = Predictor.from_export(folder, "cpu").answer(QUESTIONS[:1], pictures()[:1])
    with server(folder, **{serving.KEY: "secret"}) as (process, address):
        openai_s = openai.OpenAI(base_url=address, api_key="secret", max_retries=0, timeout=60)
        ask = openai_s.chat.completions.create
        reply = ask(model=serving.MODEL, messages=[USER])
        assert [reply.choices[0].message.content] == expected
        assert [model.id for model in openai_s.models.list()] == [serving.MODEL]
        with pytest.raises(openai.AuthenticationError, match=serving.KEY):
            openai_s.with_options(api_key="other").models.list()
        with pytest.raises(openai.BadRequestError, match="no file is opened"):
            ask(model=serving.MODEL, messages=[{"role": "user", "content": [part("/etc/passwd"), QUESTION]}])
        process.send_signal(signal.SIGINT)
        # Where the tests themselves ignore Ctrl-C, as in a background job, their children do after a clean end, too.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert process.wait(serving.GRACE_SECONDS + 20) == (0 if ignored else 130)
        with pytest.raises(openai.APIConnectionError):
            ask(model=serving.MODEL, messages=[USER])
