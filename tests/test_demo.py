"""`vlm-vqa demo`: the page answers as the predictor does, says what is wrong, and asks no other machine for anything."""

import asyncio
import io
import json
import re
import socket
import sys
from html import unescape
from types import SimpleNamespace

import aiohttp
import pytest
from PIL import Image

from scripts.demo_picture import ask, click_example
from tests import chromium
from vlm_vqa.cli import main
from vlm_vqa.data.decoding import open_image
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.inference.predictor import Candidate, Predictor

gr = pytest.importorskip("gradio", reason="the extra `demo` is not installed")
demo = pytest.importorskip("vlm_vqa.demo")

MOST_PIXELS = 1_000_000
SPECIAL = "<image><bos> what <loc0001> is <b>it</b> & {{value}} ${value}?"


@pytest.fixture(scope="module")
def predictor(tiny):
    facts = {"weights_hash": "w", "mask": "image-prefix", "instruction": tiny.layout("causal").instruction}
    facts |= {"num_patches": tiny.num_patches, "text_length": 100}
    return Predictor(tiny.stock, tiny.processor, facts, max_new_tokens=4)


@pytest.fixture
def records(vqav2_folder, directory_params, tmp_path):
    fetch(directory_params(vqav2_folder(val_images=9)), tmp_path / "records")
    return tmp_path / "records"


@pytest.fixture
def picture(tmp_path):
    Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 50).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


class Sure(SimpleNamespace):
    """A predictor of one answer."""

    layout = SimpleNamespace(tokenize=lambda question: question)

    def encode(self, images):
        return images

    def likeliest(self, questions, features, images):
        return [[Candidate("<i>red", 0.9), Candidate("", 0.05), Candidate("no", 0.00004)]] * len(questions)


def text(page):
    return unescape(re.sub(r"<[^>]*>", " ", page)).split()


def test_the_page_shows_answers_truth_and_what_the_question_says_alone(records, tmp_path):
    data = demo.Data(records, tmp_path, MOST_PIXELS)
    assert not data.missing and len(data.examples) == len({path for path, _ in data.examples}) == demo.EXAMPLES
    assert len({question for _, question in data.examples}) == 3, "one of each type"
    path, question = next(one for one in data.examples if one[1].startswith("How many"))
    page = demo.answer_html(Sure(), data, MOST_PIXELS, path, question)
    assert " ".join(text(page)) == (
        "How many colors are there? <i>red <i>red 90.0% (nothing) 5.0% no < 0.1%"
        " People said: 1, maybe Without seeing the picture, one would say: 1"
    )
    assert "width:90.00%" in page
    assert "People said" not in demo.answer_html(Sure(), data, MOST_PIXELS, path, "How many colors?")


def test_without_records_it_works_and_says_so(picture, tmp_path):
    data = demo.Data(tmp_path / "nowhere", tmp_path, MOST_PIXELS)
    assert data.examples == [] and "nowhere" in data.missing and "--records" in data.missing
    page = demo.answer_html(Sure(), data, MOST_PIXELS, str(picture), "what?")
    assert "90.0%" in page and "Without" not in page and "People" not in page
    assert data.missing in json.dumps(demo.page(print, data, "a model").get_config_file())


@pytest.mark.parametrize(
    ("name", "question", "message"),
    [
        (None, "what?", "Drop, paste or choose a picture first."),
        ("photo.png", "  ", "the question is empty"),
        ("photo.png", None, "the question is empty"),
        ("page.jpg", "what?", "page.jpg: not a readable image: it is a web page (HTML)."),
        ("huge.png", "what?", "huge.png: 1001 x 1000 is more than --max-image-pixels (1000000)."),
    ],
)
def test_what_cannot_be_answered_is_a_message(picture, tmp_path, name, question, message):
    (tmp_path / "page.jpg").write_text("<html>")
    Image.new("1", (1001, 1000)).save(tmp_path / "huge.png")
    data = demo.Data(tmp_path / "nowhere", tmp_path, MOST_PIXELS)
    page = demo.answer_html(Sure(), data, MOST_PIXELS, name and str(tmp_path / name), question)
    assert 'class="problem"' in page and message in " ".join(text(page)) and str(tmp_path) not in page


def test_an_address_in_a_pictures_place_is_not_fetched():
    with gr.Blocks(analytics_enabled=False):
        picture = demo._PICTURE(type="filepath")
    given = {"path": "https://example.com/photo.png", "meta": {"_type": "gradio.FileData"}}
    moved = gr.processing_utils.async_move_files_to_cache(given, picture, check_in_upload_folder=True)
    with pytest.raises(gr.Error, match="addresses are not fetched"):
        asyncio.run(moved)
    assert not demo.Path(demo.__file__).with_suffix(".pyi").exists(), "gradio writes one of its derived classes"


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "vlm_vqa.demo")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 2
    assert "pip install 'vlm-vqa[demo]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(chromium.find() is None, reason=f"none of {', '.join(chromium.NAMES)} is installed")
def test_in_a_browser_without_network(predictor, records, picture, tmp_path, monkeypatch):
    """20 questions, clicked and typed, are answered as by the predictor; bad files give messages; nobody else is asked."""
    looked_up, resolve = set(), socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: looked_up.add(host) or resolve(host, *rest, **more)
    )
    (tmp_path / "page.jpg").write_text("<html>")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")

    def expected(path, question):
        image = open_image(path.read_bytes(), "", MOST_PIXELS)
        return predictor.answer([question], [image])[0] or "(nothing)"

    async def drive(address):
        async with chromium.opened(address, tmp_path) as tab:
            shown = "[...document.querySelectorAll('#examples tbody img')].map(one => one.src)"
            await tab.until(f"{shown}.length === {demo.EXAMPLES}")
            paths = [tmp_path / source.split("file=")[1] for source in await tab.value(shown)]
            answers = set()
            for number, path in enumerate(paths):
                question, answer = await click_example(tab, number)
                assert answer == expected(path, question)
                assert await tab.value("document.querySelector('#answer').innerText.includes('People said')")
                answers.add(answer)
            assert await ask(tab, SPECIAL, picture) == expected(picture, SPECIAL)
            for number in range(20 - len(paths)):
                question = f"Is there a red circle, or {number} dogs?"
                answer = await ask(tab, question)
                assert answer == expected(picture, question)
                answers.add(answer)
            assert len(answers) > 3, "all answers alike: the test would see nothing"
            assert await ask(tab, "") == "the question is empty"
            assert "fit beside the instruction" in await ask(tab, "what else " * 40)
            assert "it is a web page (HTML)" in await ask(tab, "what is this?", tmp_path / "page.jpg")
            assert "is more than --max-image-pixels" in await ask(tab, "and this?", tmp_path / "huge.png")
            blocked = (
                "new Promise(done => {addEventListener('securitypolicyviolation', event => done(event.blockedURI));"
                " fetch('http://example.invalid/').catch(() => 0); setTimeout(done, 2000)})"
            )
            assert await tab.value(blocked) == "http://example.invalid/"
            await tab.picture(tmp_path / "narrow.png", 400)
            assert await tab.value("document.documentElement.scrollWidth") <= 400
        async with aiohttp.ClientSession() as session:
            body = aiohttp.FormData({"files": io.BytesIO(bytes(demo._MOST_BYTES + 1))})
            async with session.post(f"{address}gradio_api/upload", data=body) as refused:
                assert refused.status == 413

    with demo.served(predictor, "tiny", records, MOST_PIXELS, port=0) as address:
        assert address.startswith("http://127.0.0.1:")
        asyncio.run(drive(address))
    asked = chromium.requests_in(tmp_path / "net-log.json")
    assert len(asked) > 20 and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert looked_up <= {"127.0.0.1", "localhost", None}
