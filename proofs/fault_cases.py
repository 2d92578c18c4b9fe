"""The cases that `proofs.faults` draws: each returns what was wrong, how the call ended, and what was said."""

import contextlib
import copy
import csv
import dataclasses
import hashlib
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks import vqav2
from proofs import child, mutations
from proofs.faulty_server import FaultyServer
from proofs.project import ROOT, TINY, Project, own_sample, with_changes
from proofs.random_params import draw
from vlm_vqa import cli
from vlm_vqa.data import records
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.sources import official_archives
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.hashing import hash_files, write_json
from vlm_vqa.inference.export import write_export
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.vlm import (
    TRAINING_FILE,
    build_processor,
    hash_weights,
    initial_model,
    load_tokenizer,
    save_trained,
    trained_state,
)
from vlm_vqa.params import DataParams, OfficialParams, Source, parse_params
from vlm_vqa.sealed import write_folder

SMALL = yaml.safe_load((ROOT / "presets/small.yaml").read_text(encoding="utf-8"))
PATIENCE, PATIENCE_OF_A_START = 20.0, 60.0
SERVER_FAULTS: dict[Any, int] = {
    **dict.fromkeys(("drop", "wrong", "stall", "drip", "endless", 416, 429, 500, 503), 6),
    # These end it at once.
    **dict.fromkeys((302, 403, 404), 1),
}
"""With their weights."""
Outcome = tuple[str, str, str]


def command(*words: str) -> str:
    """Run a command of `vlm-vqa` in this process, as a shell would: its exit code 2 becomes a UserError.

    Raises:
        AssertionError: another exit code than 0 and 2.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(words)
    if code == 2:
        raise UserError(said.getvalue())
    assert code == 0, f"exit code {code}: {said.getvalue()}"
    return ""


# --- params ----------------------------------------------------------------------------------------------------------


def check(place: Path, rng: random.Random) -> Outcome:
    """Let `vlm-vqa check` read a drawn file."""
    path = place / "params.yaml"
    path.write_text(yaml.safe_dump(draw(SMALL, rng.randrange(2**32)), allow_unicode=False), encoding="utf-8")
    what, said = child.in_child(lambda: _at(place, lambda: command("check", str(path))), PATIENCE)
    return "drawn parameters", what, said


def _at(place: Path, call: Callable[[], str]) -> str:
    with contextlib.chdir(place):
        return call()


# --- data ------------------------------------------------------------------------------------------------------------


def layout(folder: Path, zipped: bool) -> DataParams:
    """Write a data set under VQAv2's names and return the parameters that fetch it."""
    values = copy.deepcopy(SMALL["data"]) | {"source": "directory", "directory": str(folder)}
    for split, questions, annotations in _drawn(folder):
        images = folder / f"{split}2014"
        write_json(folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json", {"questions": questions})
        write_json(folder / f"v2_mscoco_{split}2014_annotations.json", {"annotations": annotations})
        if zipped:
            packed = pack([(f"{split}2014/{path.name}", path.read_bytes()) for path in sorted(images.iterdir())])
            (folder / f"{split}2014.zip").write_bytes(packed)
            values[split]["images"] = f"{split}2014.zip"
    return parse_params(SMALL | {"data": values}).data


def _drawn(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yield split, questions and annotations of a small data set, whose pictures are written."""
    for split, first in (("train", 0), ("val", 100)):
        questions, annotations = vqav2.draw(12, 5, seed=first)
        for row in (*questions, *annotations):
            row["image_id"] += first
            row["question_id"] += 1000 * first
        images = folder / f"{split}2014"
        images.mkdir(parents=True)
        for image_id in {row["image_id"] for row in questions}:
            name = f"COCO_{split}2014_{image_id:012d}.jpg"
            (images / name).write_bytes(vqav2.draw_picture((48, 36), seed=image_id))
        yield split, questions, annotations


def tables(folder: Path, ending: str, rng: random.Random) -> DataParams:
    """Write the same as tables, with or without ids, types and main answers, and one or all ten answers."""
    table: dict[str, Any] = {"images": [f"{split}2014" for split in records.SPLITS]}
    kept = rng.choice((("question_id", "image_id", "multiple_choice_answer"), ("question_id",), ("answer_type",), ()))
    shape: Callable[[list[dict[str, str]]], Any] = rng.choice(
        (
            lambda answers: answers[0]["answer"],
            lambda answers: [one["answer"] for one in answers],
            lambda answers: answers,
        )
    )
    for split, questions, annotations in _drawn(folder):
        rows = []
        for question, annotation in zip(questions, annotations, strict=True):
            both = question | annotation
            row = {"image": f"COCO_{split}2014_{both['image_id']:012d}.jpg", "question": both["question"]}
            answers = shape(both["answers"])
            flat = ending in ("csv", "tsv") and not isinstance(answers, str)
            row |= {"answers": json.dumps(answers) if flat else answers} | {key: both[key] for key in kept}
            rows.append(row)
        write_rows(folder / f"{split}.{ending}", rows)
        table[split] = f"{split}.{ending}"
    if rng.random() < 0.2:
        table |= {"val": None, "val_share": 0.4}
    data = SMALL["data"] | {"source": "table", "directory": str(folder), "table": table}
    if rng.random() < 0.3:
        data |= {"bad_records": "drop", "most_dropped": 0.5}
    return parse_params(SMALL | {"data": data}).data


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table as its ending says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        write_json(path, rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)


def pack(entries: Sequence[tuple[str, bytes]]) -> bytes:
    """Return a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def fetch_and_read(data: DataParams, target: Path) -> str:
    """Fetch, read all back as later stages do, and return the data's hash."""
    manifest = fetch(data, target)
    for split in records.SPLITS:
        records.load_questions(target, split).to_list()
    assert sum(1 for _ in records.iter_images(target)) == manifest["images"], "an image was not stored"
    return manifest["data_hash"]


def damaged_data(place: Path, rng: random.Random) -> Outcome:
    """Fetch a data set of which one or two files are damaged; records of an earlier run are there."""
    ending = rng.choice(("official", "official", *mutations.ENDINGS))
    folder = place / "data"
    data = layout(folder, zipped=rng.random() < 0.4) if ending == "official" else tables(folder, ending, rng)
    child.in_child(lambda: fetch_and_read(data, place / "records"))
    before = hash_files((place / "records").iterdir(), place)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if ending == "official" and str(data.train.images).endswith(".zip"):
        files = [path for path in files if path.suffix != ".jpg"]
    # Pictures are many, and what is wrong with one is soon told.
    kinds = sorted({path.suffix + path.name[:5] for path in files})
    kinds += [kind for kind in kinds if not kind.startswith(".jpg")]
    said = [ending]
    for _ in range(rng.randint(1, 2)):
        kind = rng.choice(kinds)
        path = rng.choice([path for path in files if path.suffix + path.name[:5] == kind])
        if path.is_file() and path.stat().st_size:
            said.append(f"{path.name} {mutations.damage(path, rng)}")
    what, words = child.in_child(lambda: fetch_and_read(data, place / "records"), PATIENCE)
    left = {path.name for path in place.iterdir()} - {"data", "launch", "records", "records.lock"}
    if left or what != "done" and hash_files((place / "records").iterdir(), place) != before:
        what = "lost"
    elif what == "refused" and (" at 0x" in words or "Traceback" in words):
        what = "unclear"
    return "; ".join(said), what, words


# --- mirror ----------------------------------------------------------------------------------------------------------


def faulty_mirror(place: Path, rng: random.Random) -> Outcome:
    """Fetch from a server that misbehaves; what is taken must be what a good one gives."""
    right = child.in_child(lambda: fetch_and_read(layout(place / "data", zipped=False), place / "right"))
    files = {}
    for split in records.SPLITS:
        for title, name in (
            ("Questions", f"v2_OpenEnded_mscoco_{split}2014_questions.json"),
            ("Annotations", f"v2_mscoco_{split}2014_annotations.json"),
        ):
            files[f"v2_{title}_{split.capitalize()}_mscoco.zip"] = pack([(name, (place / "data" / name).read_bytes())])
        images = sorted((place / "data" / f"{split}2014").iterdir())
        files[f"{split}2014.zip"] = pack([(f"{split}2014/{path.name}", path.read_bytes()) for path in images])
    faults = {
        name: rng.choices(list(SERVER_FAULTS), list(SERVER_FAULTS.values()), k=rng.randint(1, 4))
        for name in rng.sample(sorted(files), rng.randint(1, 3))
    }
    always = {name: rng.choice(list(SERVER_FAULTS)) for name in rng.sample(sorted(files), 1) if rng.random() < 0.2}
    switches = {"ranges": rng.random() < 0.8}
    what, said = child.in_child(lambda: _from_mirror(place, files, faults, always, switches), PATIENCE)
    return f"{faults} {always} {switches}", "silent" if what == "done" and said != right[1] else what, said


def _from_mirror(
    place: Path,
    files: dict[str, bytes],
    faults: dict[str, list[Any]],
    always: dict[str, Any],
    switches: dict[str, bool],
) -> str:
    # As patient as a person who watches a test.
    official_archives._TIMEOUT = (2.0, 0.3)
    official_archives._RETRY = official_archives._RETRY.new(
        backoff_factor=0.001, backoff_max=0.01, retry_after_max=0.01
    )
    official_archives._WINDOW = 0.3
    official_archives.ARCHIVES = {
        name: (f"sha256:{hashlib.sha256(data).hexdigest()}", len(data)) for name, data in files.items()
    }
    server = FaultyServer(files)
    server.faults.update(faults)
    server.always = always
    for name, on in switches.items():
        setattr(server, name, on)
    data = dataclasses.replace(
        parse_params(SMALL).data, source=Source.OFFICIAL, official=OfficialParams(server.url, server.url, True, 3)
    )
    try:
        return fetch_and_read(data, place / "run/records")
    finally:
        server.close()


# --- exports ---------------------------------------------------------------------------------------------------------


def make_export(folder: Path) -> str:
    """Export a model of random weights, and draw a picture beside it."""
    params = parse_params(with_changes(SMALL, {**TINY, "prompt.text_length": 256}))
    encoder = load_encoder(params.vision, device="cpu")
    questions, _ = vqav2.draw(200, 20)
    tokenizer = load_tokenizer(params.language, [row["question"] for row in questions])
    processor = build_processor(encoder.processor, tokenizer, params.vision.num_patches)
    model = initial_model(params.language, encoder.model.config, processor, params.seed)
    state = trained_state(model)
    save_trained(model.config, state, folder / "trained")
    processor.save_pretrained(folder / "trained")
    weights_hash = hash_weights(state)
    write_folder(folder / "trained" / TRAINING_FILE, {"weights_hash": weights_hash})
    data = {"source": "drawn", "notes": [], "splits": {}}
    results = {"steps": 0, "kept_step": 0, "kept_because": "the last step"}
    write_export(folder / "export", folder / "trained", encoder, params, {"weights_hash": weights_hash}, results, data)
    (folder / "picture.jpg").write_bytes(vqav2.draw_picture((60, 40), seed=0))
    command("ask", str(folder / "picture.jpg"), "What is it?", "--model", str(folder / "export"))
    return ""


def damaged_export(place: Path, rng: random.Random, whole: Path) -> Outcome:
    """Ask a model of which one file is damaged."""
    mutations.restore(whole / "export", place / "export")
    path = rng.choice(sorted((place / "export").iterdir()))
    said = f"{path.name} {mutations.damage(path, rng)}"
    words = ("ask", str(whole / "picture.jpg"), "What is it?", "--model", str(place / "export"))
    return said, *child.in_child(lambda: command(*words), PATIENCE)


# --- starts ----------------------------------------------------------------------------------------------------------


def tiny_project(folder: Path) -> Project:
    """Return a project whose first two stages have run; made in `folder` if it is not there.

    Raises:
        UserError: a stage failed.
    """
    project = Project.at(folder / "starts")
    if not (project.folder / "whole.yaml").exists():
        mutations.remove(project.folder)
        project = Project(project.folder, own_sample(folder))
        for stage in ("fetch-vqav2", "extract-features"):
            done = project.stage(stage)
            if done.returncode:
                raise UserError(f"stage {stage} failed:\n{done.stderr[-3000:]}")
        (project.folder / "whole.yaml").write_bytes((project.folder / "params.yaml").read_bytes())
    return project


def started(place: Path, rng: random.Random, project: Project) -> Outcome:
    """Start the train stage with a drawn file that `check` takes."""
    base = yaml.safe_load((project.folder / "whole.yaml").read_text(encoding="utf-8"))
    part = {name: base[name] for name in ("seed", "language", "prompt", "train")}
    path = project.folder / "params.yaml"
    while True:
        number = rng.randrange(2**32)
        path.write_text(yaml.safe_dump(base | draw(part, number), sort_keys=False), encoding="utf-8")
        if child.in_child(lambda: _at(project.folder, lambda: command("check", "params.yaml")), PATIENCE)[0] == "done":
            break
    done = project.command(
        f"timeout -k 20 {PATIENCE_OF_A_START:.0f} {project.stage_command('train')} 2>&1",
        MLFLOW_TRACKING_URI="sqlite:///mlflow.db",
    )
    text = done.stdout
    if "Traceback (most recent call last)" in text:
        return f"draw {number}", "raised", text.strip().splitlines()[-1]
    verdict = {0: "done", 124: "done", 137: "hung"}.get(
        done.returncode, "refused" if "train: error: " in text else "raised"
    )
    return f"draw {number}", verdict, "" if verdict == "done" else text.strip()[-300:]
