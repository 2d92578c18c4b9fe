"""`vlm-vqa init`: params.yaml for the questions in a file, a folder or a hub repository, from a preset."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.recognise import Found, recognise
from vlm_vqa.fetch.sources.hf_dataset import recognise_repository
from vlm_vqa.fetch.write_records import Look, look
from vlm_vqa.launch_file import read_launch
from vlm_vqa.params import Params, load_params, parse_params
from vlm_vqa.sealed import aside
from vlm_vqa.yaml_file import Unquoted, compose, read_yaml

PRESETS = Path("presets")
_STEPS = {True: 300, False: 100}
"""Optimizer steps, at least: for a language model that starts from random weights, and for one that knows English."""
_IMAGES = 200
"""Pictures that `init` looks at; `check` looks at all."""


def init(path: Path, preset: str, force: bool, target: Path = Path("params.yaml")) -> list[str]:
    """Write `target` for the questions at `path`, and return what is to be said about them.

    Raises:
        UserError: there are none, or it is not clear which; or `target` was edited, and `force` is not given.
    """
    presets = {file.stem: file for file in sorted(PRESETS.glob("*.yaml"))}
    if preset not in presets:
        raise UserError(f"--preset is {preset!r}; it must be one of {', '.join(presets)}. Run from the project's root folder.")
    found = recognise(path) if path.exists() or len(path.parts) != 2 else recognise_repository(str(path))
    values = read_yaml(presets[preset])
    values["data"] |= {"official": None, "hub": None, "table": None} | found.data | _directory(path, found)
    params = parse_params(values, "what was recognised")
    seen = look(params.data, _IMAGES)
    text = _with(presets[preset].read_text(encoding="utf-8"), "data", _section(values["data"], found.unsure))
    for key, value in _fitting(params, seen).items():
        text = _with(text, key, str(value))
    if target.exists() and not force and target.read_bytes() not in {file.read_bytes() for file in presets.values()}:
        raise UserError(f"{target} is none of the presets as they are: --force replaces it. It would be:\n\n{text}")
    with aside(target) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
        load_params(unfinished)
    return _said(path, found, values["data"]["directory"], seen)


def _directory(path: Path, found: Found) -> dict[str, str]:
    """Return the data's folder as params.yaml names it: below the project relative to it, else wherever it is."""
    if found.data["source"] == "hub":
        return {}
    folder, project = (path if path.is_dir() else path.parent).resolve(), Path.cwd()
    if project.is_relative_to(folder):
        raise UserError(f"{folder}: the project itself lies in it. Move questions and pictures to a folder of their own.")
    return {"directory": str(folder.relative_to(project) if folder.is_relative_to(project) else folder)}


def _fitting(params: Params, seen: Look) -> dict[str, int]:
    """Return the values that depend on how many questions there are, and how long."""
    train, questions = params.train, seen.questions["train"]
    processes = read_launch(train.launch)["num_processes"]
    step = train.batch_size * train.gradient_accumulation_steps * processes
    # Small data are divided into eight steps an epoch, but for steps of less than eight questions.
    wanted = max(8, 2 ** int(math.log2(max(questions, 8) / 8)), processes)
    changed = {}
    if wanted < step:
        rows = min(train.batch_size, wanted // processes)
        changed = {"batch_size": rows, "gradient_accumulation_steps": wanted // (rows * processes)}
        step = changed["gradient_accumulation_steps"] * rows * processes
    steps = _STEPS[params.language.model == "random"]
    epochs = max(train.num_train_epochs, math.ceil(steps / math.ceil(max(questions, 1) / step)))
    changed |= {"num_train_epochs": epochs}
    # Every tokenizer here falls back to bytes, so a text has no more tokens than bytes. Rows are as long as their tokens.
    most = len(params.prompt.instruction.encode()) + seen.longest + 4
    return {f"train.{key}": value for key, value in changed.items()} | {
        "prompt.text_length": max(params.prompt.text_length, 32 * math.ceil(most / 32)),
        "evaluation.helm_instances": min(params.evaluation.helm_instances, seen.questions["val"] or 1),
    }


def _said(path: Path, found: Found, directory: str, seen: Look) -> list[str]:
    counts = ", ".join(f"{split}: {seen.questions[split]} questions on {seen.images[split]} images" for split in seen.images)
    lines = [f"{path} is {found.what}; params.yaml reads it as data.source: {found.data['source']}.", counts]
    lines += [f"unsure: {key}: {why}. Look at it in params.yaml." for key, why in found.unsure.items()]
    if found.data["source"] != "hub" and not Path(directory).is_absolute():
        lines.append(f"for `dvc exp run --temp` and `--queue`: dvc add {directory} && git add {directory}.dvc .gitignore")
    if seen.violations:
        return [*lines, seen.violations.text(), "next: mend these, then `vlm-vqa check`, then `make repro`"]
    return [*lines, 'next: make repro, then: vlm-vqa ask PICTURE "QUESTION"']


# --- text -----------------------------------------------------------------------------------------------------------


def _with(text: str, key: str, value: str) -> str:
    """Return a file's text with another value of a key; all else, comments too, stays."""
    node = compose(text)
    for name in key.split("."):
        node = {one.value: two for one, two in node.value}[name]
    return text[: node.start_mark.index] + value + text[node.end_mark.index :]
