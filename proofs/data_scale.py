"""VQAv2's real counts through source `official`: how long the stage takes and how much memory.

    python -m proofs.data_scale [--layout official|jsonl] [--share 1] [--images N]

443,757 + 214,354 questions with ten answers each, under the official names and in the official layout, are made up by
seed; the 82,783 + 40,504 images are a few tiny JPEGs again and again, so decoding photographs and moving 20 GB are not in
the figures. A server on loopback hands out the six archives, and the stage runs as `dvc repro` runs it, in a process of
its own. The first 1,000 questions of HELM's choice from the made-up file, picked by HELM's own function, must be those
that the evaluation picks from the records.

With `--layout jsonl` the same questions are a table of JSON lines, too: source `table` may take 1.5 of the time and memory
of source `directory`, and the records must be the same. `--share` of the questions, about no more than N images a split.
"""

import functools
import hashlib
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from benchmarks import measure
from proofs.faulty_server import fetch_command
from vlm_vqa.data import records
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.helm.files import pick_instances
from vlm_vqa.hashing import sha256_file, write_json

ROOT = Path(__file__).parents[1]
COUNTS = {"train": (443_757, 82_783), "val": (214_354, 40_504)}
"""Questions and images."""
MOST_SECONDS = 300
MOST_GIB = 4
MOST_RATIO = 1.5
"""Of the time and memory that JSON lines take to those of the official layout."""
INSTANCES = 1_000

# Linux counts into a process's greatest size what its parent had when it started it, so a small one starts the stage.
_STARTER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(code)
"""

_ANSWERS = 60_000
"""Different words for answers other than yes, no and numbers; VQAv2 has some 200,000 different answers of its ten."""
_ENVELOPE = {"info": {"description": "made up"}, "license": {"name": "none"}, "data_type": "mscoco"}
_OBJECTS = (
    "man woman dog cat train bus table plate pizza street sign shirt horse umbrella clock laptop boat kite".split()
)
_PLACES = (
    "on the left|on the right|in the background|behind the fence|near the water|under the tree|in the photo".split("|")
)
_TYPES = {
    "what color is the": "other",
    "how many": "number",
    "is the": "yes/no",
    "what is the": "other",
    "are there": "yes/no",
    "where is the": "other",
    "is this a": "yes/no",
    "what kind of": "other",
}


def make_archives(folder: Path, counts: dict[str, tuple[int, int]] = COUNTS) -> dict[str, tuple[str, int]]:
    """Write the six archives into `folder` and return their checksums and sizes by name."""
    for split, (questions, images) in counts.items():
        # COCO's ids are sparse and below 600,000; no image is in both splits.
        ids = np.random.RandomState(0).permutation(590_000)[: sum(number for _, number in COUNTS.values())]
        ids = ids[:images] if split == "train" else ids[-images:]
        _write_texts(folder, split, questions, ids.tolist())
        _write_images(folder / f"{split}2014.zip", split, ids.tolist())
    return {path.name: (f"sha256:{sha256_file(path)}", path.stat().st_size) for path in sorted(folder.glob("*.zip"))}


def _write_texts(folder: Path, split: str, count: int, image_ids: list[int]) -> None:
    """Write a split's questions and annotations, each into its archive, the questions in no order of ids."""
    chance = random.Random(split)
    # Every image has a question; the others fall where they may. VQAv2 numbers the questions of an image.
    chosen = image_ids + chance.choices(image_ids, k=count - len(image_ids))
    chance.shuffle(chosen)
    numbers: dict[int, int] = {}
    questions, annotations = [], []
    for image_id in chosen:
        numbers[image_id] = number = numbers.get(image_id, -1) + 1
        ids = {"image_id": image_id, "question_id": 1000 * image_id + number}
        kind = chance.choice(list(_TYPES))
        questions.append(json.dumps({**ids, "question": _question(kind, chance)}))
        annotations.append(json.dumps(_annotation(kind, chance) | ids))
    for title, name, key, entries in (
        ("Questions", f"v2_OpenEnded_mscoco_{split}2014_questions", "questions", questions),
        ("Annotations", f"v2_mscoco_{split}2014_annotations", "annotations", annotations),
    ):
        content = f'{json.dumps(_ENVELOPE)[:-1]}, "{key}": [{", ".join(entries)}]}}'
        with zipfile.ZipFile(folder / f"v2_{title}_{split.capitalize()}_mscoco.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(f"{name}.json", content)


def _question(kind: str, chance: random.Random) -> str:
    words = (
        chance.choice(_OBJECTS),
        "and the",
        chance.choice(_OBJECTS),
        chance.choice(_PLACES),
        "made of",
        _word(chance),
    )
    return f"{kind.capitalize()} {' '.join(words[: chance.choice((1, 3, 4, 6))])}?"


def _annotation(kind: str, chance: random.Random) -> dict[str, Any]:
    main = {"yes/no": chance.choice(("yes", "no")), "number": str(chance.randrange(20)), "other": _word(chance)}[
        _TYPES[kind]
    ]
    humans = [main if chance.random() < 0.7 else _word(chance) for _ in range(10)]
    return {
        "question_type": kind,
        "multiple_choice_answer": main,
        "answers": [
            {"answer": answer, "answer_confidence": chance.choice(("yes", "yes", "maybe", "no")), "answer_id": number}
            for number, answer in enumerate(humans, start=1)
        ],
        "answer_type": _TYPES[kind],
    }


def _word(chance: random.Random) -> str:
    """Draw one of `_ANSWERS` answers, few of them often and most of them rarely."""
    number = int(_ANSWERS ** chance.random())
    return (
        f"{_OBJECTS[number % len(_OBJECTS)]} {hashlib.sha256(str(number).encode()).hexdigest()[: number % 9]}".strip()
    )


def _write_images(path: Path, split: str, image_ids: list[int]) -> None:
    pictures = []
    for shade in range(0, 250, 25):
        buffer = BytesIO()
        Image.new("RGB", (64, 48), (shade, 255 - shade, 128)).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        for image_id in sorted(image_ids):
            # What follows a JPEG's end is no part of the picture: equal files may not stand in both splits.
            data = pictures[image_id % len(pictures)] + str(image_id).encode()
            archive.writestr(f"{split}2014/COCO_{split}2014_{image_id:012d}.jpg", data)


@contextmanager
def served(folder: Path) -> Generator[str]:
    """Serve a folder on loopback and yield its URL."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *_: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def official(url: str) -> dict[str, Any]:
    """Return the part of params.yaml that downloads the archives."""
    archives = {"texts_url": url, "images_url": url, "keep_archives": True, "downloads": 3}
    return {"source": "official", "official": archives, "hub": None}


def make_table(archives: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Put the official layout and the same as JSON lines into `folder`; return the parts of params.yaml that read them."""
    read: dict[str, dict[str, Any]] = {
        "directory": {"source": "directory", "directory": str(folder)},
        "jsonl": {"source": "table", "directory": str(folder), "table": {"images": "{split}2014.zip"}},
    }
    for split in COUNTS:
        names = [f"v2_{kind}_{split.capitalize()}_mscoco.zip" for kind in ("Questions", "Annotations")]
        entries = []
        for archive in names:
            with zipfile.ZipFile(archives / archive) as file:
                content = file.read(file.namelist()[0])
                (folder / file.namelist()[0]).write_bytes(content)
            entries.append(next(value for value in json.loads(content).values() if isinstance(value, list)))
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for question, annotation in zip(*entries, strict=True):
                image = f"COCO_{split}2014_{question['image_id']:012d}.jpg"
                file.write(json.dumps({**question, **annotation, "image": image}) + "\n")
        shutil.copy(archives / f"{split}2014.zip", folder)
        texts = {"questions": f"v2_OpenEnded_mscoco_{split}2014_questions.json"}
        texts |= {"annotations": f"v2_mscoco_{split}2014_annotations.json", "images": f"{split}2014.zip"}
        read["directory"][split] = texts | {"image_name": f"COCO_{split}2014_{{image_id:012d}}.jpg"}
        read["jsonl"]["table"][split] = f"{split}.jsonl"
    return read


class Took(NamedTuple):
    """What a run of the stage took; who else is at work on the machine changes its seconds, hardly those of processors."""

    seconds: float
    processor_seconds: float
    gib: float
    """The greatest that were resident."""


def run_stage(folder: Path, data: dict[str, Any], checksums: Path | None = None) -> Took:
    """Run the stage in `folder` on `data`."""
    params = yaml.safe_load((ROOT / "presets" / "small.yaml").read_text(encoding="utf-8"))
    params["data"] |= data
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    (folder / "launch").symlink_to(ROOT / "launch")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    start = time.perf_counter()
    stage = fetch_command(checksums) if checksums else [sys.executable, ROOT / "stages" / "fetch_vqav2.py"]
    command = [sys.executable, "-c", _STARTER, *stage]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise UserError(f"stage fetch-vqav2 {measure.ended(done.returncode)}; its own message is above.")
    seconds, kib = done.stdout.split()[-2:]
    return Took(time.perf_counter() - start, float(seconds), int(kib) / 2**20)


def helm_picks(questions_zip: Path, instances: int) -> list[int]:
    """Return the ids of the questions that HELM's own function picks from a file of questions, in its order."""
    from helm.benchmark.runner import downsample_eval_instances
    from helm.benchmark.scenarios.scenario import VALID_SPLIT, Input, Instance

    with zipfile.ZipFile(questions_zip) as archive:
        questions = json.loads(archive.read(archive.namelist()[0]))["questions"]
    # As its `vqa` scenario does: in the order of the file.
    rows = [Instance(Input(text=str(row["question_id"])), references=[], split=VALID_SPLIT) for row in questions]
    return [int(row.input.text) for row in downsample_eval_instances(rows, instances, [VALID_SPLIT])]


def our_picks(folder: Path, instances: int) -> list[int]:
    """Return the ids that the evaluation picks from the records."""
    ids = records.load_questions(folder, "val")["question_id"]
    return [ids[place] for place in pick_instances(len(ids), instances)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write `data_scale.json`."""
    parser = measure.parser("data_scale", __doc__, "proofs")
    parser.add_argument("--layout", choices=("official", "jsonl"), default="official")
    parser.add_argument("--share", type=float, default=1, help="of VQAv2's questions")
    parser.add_argument("--images", type=int, default=COUNTS["train"][1], metavar="N", help="most images of a split")
    options = measure.parse(parser, arguments)
    counts = {}
    for split, (questions, images) in COUNTS.items():
        counts[split] = (asked := round(options.share * questions), min(images, options.images, asked))
    with tempfile.TemporaryDirectory(prefix="vlm-vqa-data-scale-") as name:
        archives = Path(name) / "server"
        archives.mkdir()
        print("making the archives", flush=True)
        checksums = make_archives(archives, counts)
        write_json(Path(name) / "checksums.json", checksums)
        claims, made = (measure_official if options.layout == "official" else measure_jsonl)(Path(name))
        found = records.read_manifest(made)["splits"]
        if (found := {split: (one["questions"], one["images"]) for split, one in found.items()}) != counts:
            raise RuntimeError(f"the records hold {found} instead of {counts}")
        details = {
            "counts": found,
            "archive_bytes": {path.name: path.stat().st_size for path in sorted(archives.iterdir())},
            "record_bytes": {path.name: path.stat().st_size for path in sorted(made.iterdir())},
        }
    measure.write("data_scale", claims, details, {"questions and pictures": "made up"})


def measure_official(folder: Path) -> tuple[list[measure.Claim], Path]:
    """Run the stage on downloads; return what it took, and the records."""
    archives, work = folder / "server", folder / "work"
    with served(archives) as url:
        seconds, _, gib = run_stage(work, official(url), folder / "checksums.json")
    made = work / "data" / "records"
    theirs, ours = helm_picks(archives / "v2_Questions_Val_mscoco.zip", INSTANCES), our_picks(made, INSTANCES)
    return [
        measure.Claim(
            "fetch-vqav2 at VQAv2's counts, tiny images, seconds", *[seconds] * 3, MOST_SECONDS, at_most=True
        ),
        measure.Claim("fetch-vqav2 at VQAv2's counts, GiB resident at most", *[gib] * 3, MOST_GIB, at_most=True),
        measure.Claim(
            f"share of HELM's {INSTANCES:,} questions that we pick, in its order",
            *[sum(one == other for one, other in zip(theirs, ours, strict=True)) / INSTANCES] * 3,
            target=1,
        ),
    ], made


def measure_jsonl(folder: Path) -> tuple[list[measure.Claim], Path]:
    """Run the stage on the official layout and on JSON lines; return how they compare, and the latter's records."""
    (folder / "data").mkdir()
    took, hashes = {}, set()
    for layout, data in make_table(folder / "server", folder / "data").items():
        took[layout] = run_stage(folder / layout, data)
        print(f"{layout}: {took[layout]}", flush=True)
        made = folder / layout / "data" / "records"
        hashes.add(records.read_manifest(made)["data_hash"])
    ratios = [theirs / ours for theirs, ours in zip(took["jsonl"], took["directory"], strict=True)]
    return [
        measure.Claim(f"fetch-vqav2, JSON lines to the official layout, {what}", *[ratio] * 3, MOST_RATIO, at_most=True)
        for what, ratio in zip(("time", "processors' time", "memory"), ratios, strict=True)
    ] + [measure.Claim("fetch-vqav2, data hashes of both layouts", *[len(hashes)] * 3, 1, at_most=True)], made


if __name__ == "__main__":
    main()
