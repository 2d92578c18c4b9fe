"""What `vlm-vqa demo` does: a page to ask in, heard on this machine alone, that asks no other machine for anything."""

import os
import threading
from abc import ABCMeta
from collections.abc import Callable, Generator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

# Read when gradio is imported: it would tell its makers of each start.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr
import numpy as np

from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.page import environment
from vlm_vqa.data.records import MANIFEST, images_of, load_questions, said_answers
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.baselines import QuestionOnlyBaseline
from vlm_vqa.fetch.question_types import question_type
from vlm_vqa.inference.asking import Asked, answered
from vlm_vqa.inference.predictor import Predictor

EXAMPLES = 8
_MOST_BYTES = 32 * 2**20
_WAITING = 16  # questions that may wait for the one that is being answered
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; object-src 'none'"
_FONT = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
"""It comes with gradio; of the half bold one that it would take there are only a few letters."""
_THEME = gr.themes.Default(font=[_FONT, "sans-serif"], font_mono="monospace")
_HEAD = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'


class Data:
    """What records add to the page: what the question alone would say, and `examples`, pictures' paths and questions, with
    what people said; or why there is nothing of this, `missing`."""

    def __init__(self, records: str | Path, scratch: str | Path, max_pixels: int, seed: int = 0):
        self.examples: list[tuple[str, str]] = []
        self.missing = ""
        self._said: dict[tuple[str, str], str] = {}
        self._blind: QuestionOnlyBaseline | None = None
        if not (Path(records) / MANIFEST).is_file():
            self.missing = f"there are no records in {records} (--records names their folder)."
            return
        try:
            self._blind = QuestionOnlyBaseline(
                load_questions(records, "train", ["image_id", "question", "question_type", "answers"])
            )
            self._draw(Path(records), Path(scratch), max_pixels, seed)
        except UserError as error:
            self.missing = str(error)

    def _draw(self, records: Path, scratch: Path, max_pixels: int, seed: int) -> None:
        """Draw validation questions, of as many types as there are, and no picture twice."""
        questions = load_questions(records, "val", ["image_id", "question", "question_type", "answers"])
        drawn = [questions[at] for at in np.random.RandomState(seed).permutation(len(questions))[:1000].tolist()]
        chosen = {row["image_id"]: row for row in {row["question_type"]: row for row in drawn}.values()}
        chosen = dict([*(chosen | {row["image_id"]: row for row in drawn} | chosen).items()][:EXAMPLES])
        for image in images_of(records, chosen):
            # As a PNG, which every browser shows, of the very pixels.
            path, row = scratch / f"{image.image_id}.png", chosen[image.image_id]
            open_image(image.data, image.file_name, max_pixels, bound="--max-image-pixels").save(path)
            self.examples.append((str(path), row["question"]))
            said = sorted(set(said_answers(row["answers"])))
            self._said[_digest(path), row["question"]] = ", ".join(said)

    def blind(self, question: str) -> str | None:
        """Return the question-only baseline's answer, None where there are no records."""
        return None if self._blind is None else self._blind.answer(question, question_type(question))

    def said(self, path: str | Path, question: str) -> str | None:
        """Return people's answers to an example, None for any other picture or question."""
        return self._said.get((_digest(path), question))


def _digest(path: str | Path) -> str:
    return sha256(Path(path).read_bytes()).hexdigest()


def answer_html(predictor: Predictor, data: Data, max_pixels: int, path: str | None, question: str | None) -> str:
    """Ask about an uploaded file and return what the page shows: answers, or why there are none."""
    one, name = Asked(path or "", question or "", path or ""), Path(path or "").name
    if path is None:
        one.problem = "Drop, paste or choose a picture first."
    else:
        (one,) = answered([one], lambda: predictor, max_pixels)
    said, blind = (None, None) if one.problem else (data.said(one.path, one.question), data.blind(one.question))
    problem = one.problem and one.problem.replace(path or name, name)
    template = environment(Path(__file__).parent).get_template("demo.html.j2")
    return template.render(one=one, name=name, problem=problem, said=said, blind=blind)


async def _move(picture: gr.Image, name: str | Path | None) -> str | None:
    if "://" in str(name):
        raise gr.Error("Upload the picture: addresses are not fetched.")
    return await gr.Image.async_move_resource_to_block_cache(picture, name)


# Hands an uploaded file on as it came: gradio would decode it without our bounds, and fetch what an address names. Made so,
# for of a class that is derived by a statement gradio writes a file beside our code.
_PICTURE = ABCMeta.__new__(
    type(gr.Image), "Picture", (gr.Image,),
    {
        "is_template": True, "preprocess": lambda picture, given: given and given.path,
        "async_move_resource_to_block_cache": _move,
    },
)  # fmt: skip


def page(answer: Callable[[str | None, str | None], str], data: Data, about: str) -> gr.Blocks:
    """Lay the page out; `answer` gives a picture's path and a question the answer's HTML."""
    with gr.Blocks(title="VLM-VQA", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# Ask about a picture\nModel: `{about}`", elem_id="about")
        with gr.Row():
            with gr.Column():
                picture = _PICTURE(
                    type="filepath", sources=["upload", "clipboard"], label="Picture", height=400, buttons=[],
                    elem_id="picture",
                )  # fmt: skip
            with gr.Column():
                question = gr.Textbox(label="Question", max_length=1000, max_lines=1, elem_id="question")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                shown = gr.HTML(
                    '<p class="hint">The answer and the next two, each with its probability.</p>', elem_id="answer"
                )
        inputs = [picture, question]
        for event in (ask.click, question.submit):
            event(answer, inputs, shown, api_visibility="private")
        if data.examples:
            gr.Examples(
                [list(one) for one in data.examples], inputs, shown, answer, cache_examples=False, run_on_click=True,
                label="Validation questions", elem_id="examples", api_visibility="private",
            )  # fmt: skip
        else:
            gr.Markdown(f"No examples, and nothing to say about the question alone: {data.missing}", elem_id="missing")
    return blocks.queue(max_size=_WAITING, default_concurrency_limit=1)


@contextmanager
def served(predictor: Predictor, about: str, records: str | Path, max_pixels: int, port: int) -> Generator[str]:
    """Serve the page to this machine alone, and give its address; UserError if the port is taken."""
    with TemporaryDirectory(prefix="vlm-vqa-demo-") as scratch:
        # Uploads lie here, not in a folder that other users may have made.
        os.environ["GRADIO_TEMP_DIR"] = scratch
        data = Data(records, scratch, max_pixels)
        blocks = page(lambda *asked: answer_html(predictor, data, max_pixels, *asked), data, about)
        try:
            _, address, _ = blocks.launch(
                server_name="127.0.0.1", server_port=port or None, share=False, quiet=True, prevent_thread_lock=True,
                max_file_size=_MOST_BYTES, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
                footer_links=[], run_history=False, theme=_THEME, css_paths=Path(__file__).with_suffix(".css"), head=_HEAD,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error}). Name another by --port.") from error
        try:
            yield address
        finally:
            blocks.close(verbose=False)


def run(predictor: Predictor, about: str, records: str | Path, max_pixels: int, port: int) -> None:
    """Serve the page until Ctrl-C."""
    with served(predictor, about, records, max_pixels, port) as address:
        print(f"{address} shows the page to this machine; Ctrl-C ends it", flush=True)
        threading.Event().wait()
