"""Does whoever opens an export compute the trained function? Answers and logits of each consumer beside ours.

`python -m proofs.consumers` needs what the first three stages write (`make repro`). The trained weights are exported once
for each mask, whichever they were trained with: a consumer must compute the function of the export's own. Each runs in a
process of its own; the stock ones with transformers and Pillow and no code of ours.

Answers hide a wrong mask, so what counts is the largest difference of the logits that choose an answer's first token;
`vlm-vqa ask` shows probabilities of whole answers, servers show answers alone. One consumer of each export has the mask
wrong on purpose: its logits must say so.
"""

import csv
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import httpx
import openai
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import measure
from proofs.serving import MODEL, chat, server
from vlm_vqa import tracking
from vlm_vqa.data.records import iter_images, load_questions, read_manifest
from vlm_vqa.inference.export import read_training, write_export
from vlm_vqa.inference.predictor import FACTS_FILE, Predictor
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.layout import QuestionTokens, Row, visible
from vlm_vqa.model.vlm import text_hidden, text_logits
from vlm_vqa.params import Dtype, ExportParams, Mask, load_params
from vlm_vqa.tracking.registry import EXPORT, model_name, register
from vlm_vqa.tracking.store import Store

RECORDS, TRAINED = Path("data/records"), Path("models/trained")
EXACT = 1e-5
"""Of a logit, in float32: rounding in another order."""
COARSE = 0.5
"""Of a logit, which Gemma 2 caps at 30, in bfloat16, which has 8 bits."""

BEGIN = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, cases, out = sys.argv[1:]
pictures, questions = zip(*((Image.open(path).convert("RGB"), question) for path, question in json.load(open(cases))))
processor = AutoProcessor.from_pretrained(folder)
answers, logits = [], []

def watched(model):
    def keep(model, args, kwargs, output):
        if kwargs["input_ids"].shape[1] > 1:
            logits.append(output.logits[:, -1].float())
    model.register_forward_hook(keep, with_kwargs=True)
    return model

def load(folder=folder, **options):
    return watched(AutoModelForImageTextToText.from_pretrained(folder, **options))

def chat(picture, question):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]

def template(chats, processor=processor):
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )

def answer(model, inputs):
    output = model.generate(**inputs.to(model.device, model.dtype))
    answers.extend(processor.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True))

def one_by_one(model, processor=processor):
    for picture, question in zip(pictures, questions):
        answer(model, template([chat(picture, question)], processor))
"""
END = """
from safetensors.torch import save_file
assert "vlm_vqa" not in sys.modules
save_file({"logits": torch.cat(logits)}, out)
print(json.dumps([one.strip() for one in answers]))
"""
PROCESSOR = """
for picture, question in zip(pictures, questions):
    prompt = processor.apply_chat_template(chat(picture, question))
    answer(model, processor(images=[picture], text=[prompt], return_tensors="pt"))
"""
PIPELINE = """
asked = pipeline("image-text-to-text", model=folder, dtype=torch.float32)
watched(asked.model)
"""
TYPES = 'inputs["token_type_ids"] = (inputs["input_ids"] != model.config.image_token_id).long()\n'


FRAME = """
import json, sys, mlflow, pandas
rows = [(open(path, "rb").read(), question) for path, question in json.load(sys.stdin)]
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(list(model.predict(pandas.DataFrame(rows, columns=["image", "question"]))["answer"])))
"""

Cases = Sequence[tuple[Path, str]]
"""A picture's file, upright and opaque, and a question about it."""
Results = tuple[list[str], dict[str, Tensor]]
"""Answers, and what else a consumer shows of them: `logits` of their first tokens [N, V], `probabilities` [N]."""


@dataclass(frozen=True)
class Consumer:
    """One way to use an export."""

    name: str
    use: str | Callable[[Path, Cases], Results]
    """A script that fills `answers` and `logits`, or what asks the export in this folder."""
    tolerance: float = EXACT
    dtype: Literal[Dtype.FLOAT32, Dtype.BFLOAT16] = Dtype.FLOAT32
    """Of the export."""
    wrong: bool = False
    """The mask is another on purpose: the difference must be at least the tolerance."""


def by_ask(folder: Path, cases: Cases) -> Results:
    """Ask by `vlm-vqa ask`."""
    csv.writer(asked := io.StringIO()).writerows([("image", "question"), *((path.absolute(), q) for path, q in cases)])
    words = ["vlm_vqa.cli", "ask", "--csv", "-", "--json", "--model", folder]
    found = [json.loads(line) for line in run("-m", *words, given=asked.getvalue()).splitlines()]
    return [one["answer"] for one in found], {"probabilities": torch.tensor([one["probability"] for one in found])}


def by_openai(address: str, cases: Cases, model: str = MODEL) -> Results:
    """Ask a server by OpenAI's own client."""
    client = openai.OpenAI(base_url=address, api_key="none")
    bodies = (json.loads(chat(question, path.read_bytes())) | {"model": model} for path, question in cases)
    return [client.chat.completions.create(**body).choices[0].message.content for body in bodies], {}


def by_our_server(folder: Path, cases: Cases) -> Results:
    """Ask `vlm-vqa serve`."""
    with server(folder) as (_, address):
        return by_openai(address, cases)


def by_stock_server(folder: Path, cases: Cases) -> Results:
    """Ask `transformers serve`, as it is without options."""
    with listening("transformers.cli.transformers", "serve", folder) as address:
        return by_openai(f"{address}/v1", cases, str(folder))


def by_mlflow(folder: Path, cases: Cases) -> Results:
    """Ask the registered model as a function of a frame."""
    with registered(folder) as name:
        return json.loads(run("-c", FRAME, name, given=json.dumps(cases, default=str)).splitlines()[-1]), {}


def by_mlflow_server(folder: Path, cases: Cases) -> Results:
    """Ask `mlflow models serve`."""
    rows = [[b64encode(path.read_bytes()).decode(), question] for path, question in cases]
    body = {"dataframe_split": {"columns": ["image", "question"], "data": rows}}
    command = ("mlflow", "models", "serve", "--env-manager", "local", "-m")
    with registered(folder) as name, listening(*command, name) as address:
        found = httpx.post(f"{address}/invocations", json=body, timeout=600).raise_for_status().json()
    return [one["answer"] for one in found["predictions"]], {}


def run(*words: str | Path, given: str = "", **options: Any) -> str:
    """Run Python to its end; return what it prints."""
    done = subprocess.run([sys.executable, *words], input=given, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@contextmanager
def listening(*command: str | Path) -> Generator[str]:
    """Start a module that serves at `--port`, and yield its address when it is well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", *command, "--port", str(port)]
    # Gunicorn and uvicorn of MLflow are found by the path.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            assert process.poll() is None, (log.seek(0), log.read()[-2000:])
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@contextmanager
def registered(folder: Path) -> Generator[str]:
    """Make an export a registered model of a store of its own, which the environment names meanwhile; yield its name."""
    params, weights_hash = load_params(), json.loads((folder / FACTS_FILE).read_text())["weights_hash"]
    with (
        tempfile.TemporaryDirectory() as place,
        chdir(place),
        patch.dict(os.environ, MLFLOW_TRACKING_URI=f"sqlite:///{place}/mlflow.db"),
    ):
        Path("dvc.yaml").write_text("stages: {}")
        EXPORT.parent.mkdir()
        EXPORT.symlink_to(folder)
        with tracking.training_run(params, key="proof", tags={"weights_hash": weights_hash}) as training:
            assert training.run_id is not None
        assert register(Store(params, Path()), training.run_id, Path(), weights_hash)
        yield f"models:/{model_name(params)}/1"


STOCK = (
    Consumer("processor and generate", "model = load()" + PROCESSOR),
    Consumer("chat template", "one_by_one(load())"),
    Consumer(
        "chat template, batches of 8",
        "model = load()\n"
        "for at in range(0, len(questions), 8):\n"
        "    answer(model, template([chat(*one) for one in zip(pictures[at : at + 8], questions[at : at + 8])]))\n",
    ),
    Consumer(
        "pipeline, chat",
        PIPELINE + "for one in zip(pictures, questions):\n"
        "    answers.append(asked(text=chat(*one), return_full_text=False)[0]['generated_text'])\n",
    ),
    Consumer(
        "pipeline, text",
        PIPELINE + "for picture, question in zip(pictures, questions):\n"
        "    prompt = processor.apply_chat_template(chat(picture, question))\n"
        "    answers.append(asked(images=picture, text=prompt, return_full_text=False)[0]['generated_text'])\n",
    ),
    Consumer("device_map", 'one_by_one(load(device_map="auto"))'),
    Consumer(
        "saved and loaded again",
        "import tempfile\n"
        "with tempfile.TemporaryDirectory() as again:\n"
        "    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(again)\n"
        "    processor.save_pretrained(again)\n"
        "    one_by_one(load(again), AutoProcessor.from_pretrained(again))\n",
    ),
    Consumer("bfloat16", "one_by_one(load(dtype=torch.bfloat16))", COARSE),
    Consumer("bfloat16 export", "one_by_one(load(dtype='auto'))", COARSE, Dtype.BFLOAT16),
)
"""Whoever opens the folder in plain transformers."""
CARD = (
    Consumer(
        "the card's lines",
        "model = load()\n"
        "for picture, question in zip(pictures, questions):\n"
        "    inputs = template([chat(picture, question)])\n"
        f"    {TYPES}"
        "    answer(model, inputs)\n",
    ),
)
WRONG = "the mask of another, on purpose"
OTHER_MASK = Consumer(WRONG, CARD[0].use, 100 * EXACT, wrong=True)
OURS = (
    Consumer("`vlm-vqa ask`, probabilities", by_ask),
    Consumer("`vlm-vqa serve`, OpenAI's client", by_our_server),
    Consumer("`mlflow.pyfunc.load_model`", by_mlflow),
    Consumer("`mlflow models serve`", by_mlflow_server),
)
"""Whose code is this project's, and right under every mask."""
EVERYONE = (*STOCK, Consumer("`transformers serve`, OpenAI's client", by_stock_server), OTHER_MASK, *OURS)
CONSUMERS = {
    Mask.CAUSAL: EVERYONE,
    Mask.PREFIX_LM: EVERYONE,
    Mask.IMAGE_PREFIX: (*CARD, dataclasses.replace(OTHER_MASK, use=STOCK[1].use), *OURS),
}
"""What must compute the trained function of which export; another consumer is one more in its list."""


@dataclass(frozen=True)
class Found:
    """What a consumer made of an export's questions."""

    equal: int
    """How many answers are ours."""
    difference: float | None
    """Of the logits, or of what else it shows, the largest; None of answers alone."""


def consume(consumer: Consumer, folder: Path, cases: Cases) -> Results:
    """Run a consumer in a process of its own."""
    if not isinstance(consumer.use, str):
        return consumer.use(folder.absolute(), cases)
    with tempfile.TemporaryDirectory() as place:
        listed, out = Path(place) / "cases.json", Path(place) / "logits.safetensors"
        listed.write_text(json.dumps([[str(path.absolute()), question] for path, question in cases]), encoding="utf-8")
        printed = run("-I", "-c", BEGIN + consumer.use + END, folder.absolute(), listed, out, cwd=place)
        return json.loads(printed.splitlines()[-1]), load_file(out)


def ours(folder: Path, cases: Cases) -> Results:
    """Return the same of the trained function in float32, by its definition: the whole sequence again for each token."""
    predictor = Predictor.from_export(folder, device="cpu")
    layout, answers, logits, probabilities = predictor.layout, [], [], []
    for path, question in cases:
        features, prompt, tokens = predictor.encode([Image.open(path)]), layout.tokenize(question).prompt, []
        probability = 1.0
        while layout.eos_id not in tokens and len(tokens) < predictor.max_new_tokens:
            batch = layout.collate([Row(0, (QuestionTokens(prompt, [*tokens, layout.eos_id]),))])
            allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
            with torch.inference_mode():
                hidden = text_hidden(predictor.model, features, batch["input_ids"], batch["position_ids"], allowed)
                last = text_logits(predictor.model, hidden)[:, -1]
            logits += [] if tokens else [last]
            tokens.append(int(last.argmax()))
            probability *= last.softmax(-1).max().item()
        answers.append(layout.decode(tokens))
        probabilities.append(probability)
    return answers, {"logits": torch.cat(logits), "probabilities": torch.tensor(probabilities)}


def compare(consumer: Consumer, folder: Path, cases: Cases, expected: Results) -> Found:
    """Run a consumer beside what we found."""
    answers, shown = consume(consumer, folder, cases)
    equal = sum(one == other for one, other in zip(answers, expected[0], strict=True))
    return Found(equal, max(((shown[one] - expected[1][one]).abs().max().item() for one in shown), default=None))


def claim(mask: str, consumer: Consumer, found: Found, questions: int) -> measure.Claim:
    """Return what is claimed: of the difference, and of the answers where they are all that is shown."""
    what, note = f"{mask}: {consumer.name}", f"{found.equal} of {questions} answers equal"
    if found.difference is None:
        share = found.equal / questions
        return measure.Claim(f"answers equal, {what}", share, share, share, 1, note=note)
    difference = found.difference
    return measure.Claim(
        f"largest difference, {what}", difference, difference, difference, consumer.tolerance, not consumer.wrong, note
    )


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return what was found, by mask and consumer: answers equal, and the largest difference."""

    def cell(one: Mapping[str, Any] | None) -> str:
        difference = "-" if one is None or one["difference"] is None else f"{one['difference']:.0e}"
        return "" if one is None else f"{one['equal']}, {difference}"

    masks = [mask for mask in CONSUMERS if mask in found]
    names = dict.fromkeys(one.name for mask in masks for one in CONSUMERS[mask])
    rows = [[name, *(cell(found[mask].get(name)) for mask in masks)] for name in names]
    head = ["consumer", *(f"`{mask}`" for mask in masks)], ["---"] * (len(masks) + 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (*head, *rows))


def read_cases(folder: Path, count: int) -> list[tuple[Path, str]]:
    """Write the pictures of the first validation questions to a folder."""
    questions = load_questions(RECORDS, "val", ["image_id", "question"]).select(range(count)).to_list()
    wanted, paths = {one["image_id"] for one in questions}, {}
    for image in iter_images(RECORDS):
        if image.image_id in wanted:
            paths[image.image_id] = folder / f"{image.image_id}{Path(image.file_name).suffix}"
            paths[image.image_id].write_bytes(image.data)
    return [(paths[one["image_id"]], one["question"]) for one in questions]


def main(arguments: Sequence[str] | None = None) -> None:
    """Export for each mask, run every consumer, print the table and write `consumers.json`."""
    params, parser = load_params(), measure.parser("consumers", __doc__, "proofs", questions=200)
    parser.add_argument("--masks", nargs="+", choices=[*CONSUMERS], default=[*CONSUMERS], help="default: all")
    options = measure.parse(parser, arguments)
    encoder, training = load_encoder(params.vision, "cpu", params.model), read_training(TRAINED)
    manifest, results = read_manifest(RECORDS), {"kept_step": 0, "kept_because": "exported for a proof"}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    claims = []
    with tempfile.TemporaryDirectory() as place:
        cases = read_cases(Path(place), options.questions)
        for mask, consumers in ((Mask(one), CONSUMERS[Mask(one)]) for one in options.masks):
            expected: Any = None
            for consumer in consumers:
                folder = Path(place) / f"{mask}-{consumer.dtype}"
                if not folder.exists():
                    prompt, export = dataclasses.replace(params.prompt, mask=mask), ExportParams(dtype=consumer.dtype)
                    changed = dataclasses.replace(params, prompt=prompt, export=export)
                    write_export(folder, TRAINED, encoder, changed, training, results, manifest)
                expected = expected or ours(folder, cases)
                one = compare(consumer, folder, cases, expected)
                found.setdefault(mask.value, {})[consumer.name] = dataclasses.asdict(one)
                claims.append(claim(mask.value, consumer, one, options.questions))
                print(f"  {mask.value}, {consumer.name}: {one}", flush=True)
    print(table(found))
    measure.write("consumers", claims, found, {"questions and pictures": params.data.source.value})


if __name__ == "__main__":
    main()
