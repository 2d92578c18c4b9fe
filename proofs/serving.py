"""The export served to many at once: no answer is wrong or lost, and when the server is killed nobody waits.

    python -m proofs.serving [--clients 64] [--seconds 60] [--questions 500] [--helm 200]
                             [--inspect-ai FOLDER] [--lmms-eval FOLDER]

Needs what the stages write (`make repro`); the questions are the first of val. Clients ask without a pause, each its own
next question, over as many connections, from one process. "Wrong" is an answer that is not what the same weights give in
this process, "lost" a request without an answer. Then the server is ended under the same load by SIGTERM and by SIGKILL:
counted are the seconds until the last client has its answer or an error. `--helm N` asks N questions by HELM's own OpenAI
client, and by ours, with HELM's own `vqa` run. `--inspect-ai FOLDER` asks all questions by inspect_ai, in an environment of
its own that is made in FOLDER (360 MB from the package index) unless it is there, and compares answers and scores;
`--lmms-eval FOLDER` does the same by lmms-eval, which brings a torch of its own (gigabytes).
"""

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks import measure
from benchmarks.measure import Claim
from proofs.project import ROOT, workplace
from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.records import images_of, load_questions
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.helm.files import read_results, write_scenario
from vlm_vqa.evaluation.helm.run import CONFIG, RESULTS, SCENARIO, run_helm
from vlm_vqa.evaluation.vqa_accuracy import score_answer
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.params import Params, load_params

EXPORT, RECORDS = Path("models/export"), Path("data/records")
MODEL = "vlm-vqa"
INSPECT_AI = "inspect_ai==0.3.285"
INSPECT_TASK = """
import json, sys
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText
from inspect_ai.scorer import exact

samples = []
for number, sample in enumerate(json.load(open("samples.json"))):
    content = [ContentImage(image=sample["picture"]), ContentText(text=sample["question"])]
    samples.append(Sample(id=number, input=[ChatMessageUser(content=content)], target=sample["target"]))
task = Task(dataset=MemoryDataset(samples), scorer=exact())
model = "openai-api/served/" + sys.argv[2]
(log,) = eval(task, model=model, model_base_url=sys.argv[1], log_dir="logs", display="none", max_connections=32)
assert log.status == "success", log.error
found = {sample.id: [sample.output.completion, sample.scores["exact"].as_str() == "C"] for sample in log.samples}
json.dump([found[number] for number in range(len(samples))], open("found.json", "w"))
"""
LMMS_EVAL = "lmms_eval==0.7.3"
LMMS_TASK = """
import base64, io, json, pathlib, sys
from PIL import Image

def pictures(sample):
    return [Image.open(io.BytesIO(base64.b64decode(sample["picture"].partition(",")[2])))]

def score(sample, answers):
    return {"exact": float(answers[0] == sample["target"])}

if __name__ == "__main__":
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    pathlib.Path("served.yaml").write_text('''
task: served
dataset_path: json
dataset_kwargs: {data_files: {test: samples.json}}
test_split: test
output_type: generate_until
doc_to_visual: !function task.pictures
doc_to_text: question
doc_to_target: target
process_results: !function task.score
generation_kwargs: {max_new_tokens: 16, temperature: 0}
metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]
metadata: [{version: 0}]
''')
    model = f"model_version={sys.argv[2]},base_url={sys.argv[1]},api_key=none,timeout=60"
    tasks = TaskManager(include_path=".", include_defaults=False, model_name="openai")
    samples = simple_evaluate("openai", model, tasks=["served"], batch_size=1, task_manager=tasks)["samples"]["served"]
    samples.sort(key=lambda sample: sample["doc_id"])
    json.dump([[sample["filtered_resps"][0], sample["exact"] == 1] for sample in samples], open("found.json", "w"))
"""
BEFORE_KILL = 3.0
"""Seconds of load before the server is killed."""
MOST_WAIT = 15.0
"""Seconds after it in which every client must have heard: those that the server waits, and some for a busy machine."""


@contextmanager
def server(export: Path, **environment: str) -> Generator[tuple[subprocess.Popen, str]]:
    """Yield the process of `vlm-vqa serve` and the address that it prints."""
    command = [sys.executable, "-m", "vlm_vqa.cli", "serve", str(export), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        assert process.stdout is not None, "it is a pipe"
        yield process, process.stdout.readline().split()[0]
    finally:
        process.kill()
        process.wait()


def chat(question: str, picture: bytes) -> bytes:
    """Return the body of a request."""
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": content}]}).encode()


async def load(
    address: str,
    bodies: Sequence[bytes],
    clients: int,
    seconds: float,
    kill: tuple[subprocess.Popen, int] | None = None,
) -> tuple[list[tuple[int, str]], list[str], float]:
    """Ask from many clients at once until the time is over, or, where a process and a signal are given, after
    `BEFORE_KILL` send it the signal and ask until every client has had an error.

    Returns:
        The answers, each with the number of its body; what went wrong; seconds, from the start or from the signal.
    """
    answers, errors, numbers = [], [], itertools.count()
    begun = time.perf_counter()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(limits=limits, timeout=60) as http:

        async def ask() -> None:
            while kill is not None or time.perf_counter() - begun < seconds:
                number = next(numbers) % len(bodies)
                try:
                    response = await http.post(f"{address}/chat/completions", content=bodies[number])
                    response.raise_for_status()
                    answers.append((number, response.json()["choices"][0]["message"]["content"]))
                except (httpx.HTTPError, ValueError, LookupError) as error:
                    errors.append(f"{type(error).__name__}: {error}")
                    if kill is not None:
                        return

        asking = [asyncio.create_task(ask()) for _ in range(clients)]
        if kill is not None:
            await asyncio.sleep(BEFORE_KILL)
            kill[0].send_signal(kill[1])
            begun = time.perf_counter()
        await asyncio.gather(*asking)
    return answers, errors, time.perf_counter() - begun


def under_load(
    export: Path, bodies: Sequence[bytes], expected: Sequence[str], clients: int, seconds: float
) -> tuple[list[Claim], dict[str, Any]]:
    """Load one server to the end, and kill two; return what is claimed of it, and what went wrong."""

    def wrong(answers: Sequence[tuple[int, str]]) -> int:
        return sum(answer != expected[number] for number, answer in answers)

    with server(export) as (_, address):
        answers, errors, lasted = asyncio.run(load(address, bodies, clients, seconds))
    if not answers:
        raise UserError(f"the server at {address} has answered nothing: {errors[:1]}")
    what = f"{clients} clients for {seconds:g} s"
    rate = len(answers) / lasted
    claims = [
        exactly(f"{what}: answers that are wrong, of {len(answers)}", wrong(answers), 0),
        exactly(f"{what}: requests without an answer", len(errors), 0),
        Claim(f"{what}: answers a second", rate, rate, rate),
    ]
    details: dict[str, Any] = {"errors": Counter(errors)}
    for number in (signal.SIGTERM, signal.SIGKILL):
        with server(export) as (process, address):
            answers, errors, lasted = asyncio.run(load(address, bodies, clients, seconds, (process, number)))
        claims += [
            exactly(f"{number.name}: answers that are wrong, of {len(answers)}", wrong(answers), 0),
            exactly(f"{number.name}: clients that had an error", len(errors), clients),
            Claim(f"{number.name}: seconds until the last of them", lasted, lasted, lasted, MOST_WAIT, at_most=True),
        ]
        details[number.name] = Counter(errors)
    return claims, details


def exactly(what: str, found: float, wanted: float) -> Claim:
    """Return the claim that a number is another."""
    return Claim(what, found, found, found, wanted, at_most=found >= wanted)


def helm(
    folder: Path, export: Path, params: Params, rows: Sequence[Mapping[str, Any]], address: str | None
) -> tuple[float, list[str]]:
    """Run HELM's `vqa` in `folder` by its OpenAI client at an address, or by ours; return bleu_1 and the answers."""
    shutil.copytree(ROOT / CONFIG, folder / CONFIG, ignore=shutil.ignore_patterns("images"))
    params_file, records = Path("params.yaml").absolute(), RECORDS.absolute()
    ours = {"class_name": "vlm_vqa.evaluation.helm.client.VlmVqaClient"}
    ours["args"] = {"export": str(export.absolute()), "params": str(params_file)}
    theirs = {"class_name": "helm.clients.openai_client.OpenAIClient"}
    theirs["args"] = {"base_url": address, "api_key": "none", "openai_model_name": MODEL}
    deployments = folder / CONFIG / "model_deployments.yaml"
    content = yaml.safe_load(deployments.read_text(encoding="utf-8"))
    content["model_deployments"][0]["client_spec"] = ours if address is None else theirs
    deployments.write_text(yaml.safe_dump(content), encoding="utf-8")
    with chdir(folder):
        write_scenario(SCENARIO, rows, records)
        run_helm(len(rows), params.evaluation.helm_threads, {"NLTK_DATA": str(Path(CONFIG, "nltk_data").absolute())})
        found = read_results(RESULTS, rows)
    return found.scores["bleu_1"], found.predictions


def by_helm(folder: Path, export: Path, params: Params, rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return what is claimed of HELM's OpenAI client against the server, beside ours in HELM's process."""
    ours, our_answers = helm(folder / "ours", export, params, rows, None)
    with server(export) as (_, address):
        theirs, answers = helm(folder / "openai", export, params, rows, address)
    other = sum(one != two for one, two in zip(our_answers, answers, strict=True))
    return [
        exactly(f"HELM's OpenAI client: answers other than our client's, of {len(rows)}", other, 0),
        exactly("HELM's OpenAI client: bleu_1; wanted: our client's", theirs, ours),
    ]


def by_others(
    package: str,
    task: str,
    folder: Path,
    export: Path,
    rows: Sequence[Mapping[str, Any]],
    bodies: Sequence[bytes],
    expected: Sequence[str],
) -> list[Claim]:
    """Return what is claimed of another's evaluation against the server: its answers, and its scores beside ours.

    Args:
        package: what is installed in `folder`, an environment of its own.
        task: a script that reads `samples.json` and writes each one's answer, and whether it is right, to `found.json`.
    """
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", package, "openai"], check=True)
    samples = []
    for row, body in zip(rows, bodies, strict=True):
        picture, question = json.loads(body)["messages"][0]["content"]
        sample = {"picture": picture["image_url"]["url"], "question": question["text"], "target": row["answers"][0]}
        samples.append(sample)
    own = {name: os.environ[name] for name in ("PATH", "HOME")} | {"SERVED_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    with workplace(None) as place, server(export) as (_, address):
        (place / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
        (place / "task.py").write_text(task, encoding="utf-8")
        subprocess.run([python.absolute(), "task.py", address, MODEL], cwd=place, env=own, check=True)
        found = json.loads((place / "found.json").read_text(encoding="utf-8"))
    wrong = sum(answer != ours for (answer, _), ours in zip(found, expected, strict=True))
    ours = [score_answer(answer, row["answers"]) for answer, row in zip(expected, rows, strict=True)]
    other = sum(right != (own == 1) for (_, right), own in zip(found, ours, strict=True))
    return [
        exactly(f"{package}: answers that are wrong, of {len(found)}", wrong, 0),
        exactly(f"{package}: questions of another score than ours", other, 0),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write `serving.json`."""
    parser = measure.parser("serving", __doc__, "proofs", clients=64, seconds=60, questions=500)
    parser.add_argument("--export", type=Path, default=EXPORT, metavar="FOLDER", help="an exported model")
    parser.add_argument(
        "--helm", type=measure.positive, metavar="N", help="ask N questions by HELM's OpenAI client, too"
    )
    parser.add_argument("--inspect-ai", type=Path, metavar="FOLDER", help="ask by inspect_ai, which is installed there")
    parser.add_argument("--lmms-eval", type=Path, metavar="FOLDER", help="ask by lmms-eval, which is installed there")
    options = measure.parse(parser, arguments)
    params = load_params()
    rows = load_questions(RECORDS, "val").select(range(options.questions)).to_list()
    pictures = {image.image_id: image.data for image in images_of(RECORDS, {row["image_id"] for row in rows})}
    predictor = Predictor.from_export(options.export, max_new_tokens=params.evaluation.max_new_tokens)
    expected = [
        predictor.answer([row["question"]], [open_image(pictures[row["image_id"]], "", 10**9)])[0] for row in rows
    ]
    bodies = [chat(row["question"], pictures[row["image_id"]]) for row in rows]
    claims, details = under_load(options.export, bodies, expected, options.clients, options.seconds)
    if options.helm:
        with workplace(None) as folder:
            claims += by_helm(folder, options.export, params, rows[: options.helm])
    for package, task, folder in (
        (INSPECT_AI, INSPECT_TASK, options.inspect_ai),
        (LMMS_EVAL, LMMS_TASK, options.lmms_eval),
    ):
        if folder:
            claims += by_others(package, task, folder, options.export, rows, bodies, expected)
    details["different answers"] = len(set(expected))
    measure.write("serving", claims, details, {"questions and pictures": params.data.source.value})


if __name__ == "__main__":
    main()
