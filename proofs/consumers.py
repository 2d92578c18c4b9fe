"""Does whoever opens an export compute the trained function? Answers and logits of each consumer beside ours.

`python -m proofs.consumers` needs what the first three stages write (`make repro`). The trained weights are exported once
for each mask, whichever they were trained with: a consumer must compute the function of the export's own. Each runs in a
process of its own, with transformers and Pillow and no code of ours.

Answers hide a wrong mask, so what counts is the largest difference of the logits that choose an answer's first token.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import measure
from vlm_vqa.data.records import iter_images, load_questions, read_manifest
from vlm_vqa.inference.export import read_training, write_export
from vlm_vqa.inference.predictor import Predictor
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.layout import Row, visible
from vlm_vqa.model.vlm import text_hidden, text_logits
from vlm_vqa.params import Dtype, ExportParams, Mask, load_params

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


@dataclass(frozen=True)
class Consumer:
    """One way to use an export."""

    name: str
    script: str
    """Fills `answers` and `logits`."""
    tolerance: float = EXACT
    dtype: Dtype = Dtype.FLOAT32
    """Of the export."""


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
CONSUMERS = {Mask.CAUSAL: STOCK, Mask.PREFIX_LM: STOCK, Mask.IMAGE_PREFIX: CARD}
"""What must compute the trained function of which export; another consumer is one more in its list."""


@dataclass(frozen=True)
class Found:
    """What a consumer made of an export's questions."""

    equal: float
    """Share of the answers that are ours."""
    difference: float
    """Of the logits, the largest."""


Cases = Sequence[tuple[Path, str]]
"""A picture's file, upright and opaque, and a question about it."""


def consume(consumer: Consumer, folder: Path, cases: Cases) -> tuple[list[str], Tensor]:
    """Run a consumer in a process of its own; return its answers and first tokens' logits [N, V]."""
    with tempfile.TemporaryDirectory() as place:
        listed, out = Path(place) / "cases.json", Path(place) / "logits.safetensors"
        listed.write_text(json.dumps([[str(path.absolute()), question] for path, question in cases]), encoding="utf-8")
        words = [sys.executable, "-I", "-c", BEGIN + consumer.script + END, folder.absolute(), listed, out]
        done = subprocess.run(words, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, f"{consumer.name}: {done.stderr[-2000:]}"
        return json.loads(done.stdout.splitlines()[-1]), load_file(out)["logits"]


def ours(folder: Path, cases: Cases) -> tuple[list[str], Tensor]:
    """Return the same of this project's own code: the trained function, in float32."""
    predictor = Predictor.from_export(folder, device="cpu")
    answers, logits = [], []
    for path, question in cases:
        features = predictor.encode([Image.open(path)])
        answers += [given.answer for given in predictor.answer_features([question], features)]
        batch = predictor.layout.collate([Row(0, (predictor.layout.tokenize(question),))])
        allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
        with torch.inference_mode():
            hidden = text_hidden(predictor.model, features, batch["input_ids"], batch["position_ids"], allowed)
            logits.append(text_logits(predictor.model, hidden)[:, -1])
    return answers, torch.cat(logits)


def compare(consumer: Consumer, folder: Path, cases: Cases, expected: tuple[list[str], Tensor]) -> Found:
    """Run a consumer beside what we found."""
    answers, logits = consume(consumer, folder, cases)
    equal = sum(one == other for one, other in zip(answers, expected[0], strict=True)) / len(cases)
    return Found(equal, (logits - expected[1]).abs().max().item())


def table(found: Mapping[tuple[str, str], tuple[Found, float]]) -> str:
    """Return the table of all, by mask and consumer, with the difference that passes."""
    lines = [f"{'mask':<13} {'consumer':<28} {'answers equal':>13} {'largest logit difference':>25}"]
    for (mask, name), (one, tolerance) in found.items():
        lines.append(f"{mask:<13} {name:<28} {one.equal:>13.1%} {one.difference:>12.1e} of {tolerance:.0e}")
    return "\n".join(lines)


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
    found: dict[tuple[str, str], tuple[Found, float]] = {}
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
                key = (mask.value, consumer.name)
                found[key] = compare(consumer, folder, cases, expected), consumer.tolerance
                print(f"  {mask.value}, {consumer.name}: {found[key][0]}", flush=True)
    print(table(found))
    claims = [
        measure.Claim(
            f"largest logit difference, {mask}: {name}", one.difference, one.difference, one.difference, tolerance, True,
            note=f"{one.equal:.1%} of {options.questions} answers equal",
        )
        for (mask, name), (one, tolerance) in found.items()
    ]  # fmt: skip
    details = {mask.value: [dataclasses.asdict(one) for one in consumers] for mask, consumers in CONSUMERS.items()}
    measure.write("consumers", claims, details, {"questions and pictures": params.data.source.value})


if __name__ == "__main__":
    main()
