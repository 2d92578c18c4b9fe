"""`vlm-vqa init`: params.yaml for the questions in a file, a folder or a hub repository, from a preset."""

import math
from pathlib import Path

from vlm_vqa.data.records import SPLITS
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.recognise import Found, block, recognise
from vlm_vqa.fetch.sources.hf_dataset import newest
from vlm_vqa.fetch.write_records import Inspection, inspect_data
from vlm_vqa.launch_file import read_launch
from vlm_vqa.params import HELM_MAX_TOKENS, Keep, Params, load_params, parse_params
from vlm_vqa.sealed import aside
from vlm_vqa.yaml_file import compose, read_yaml

PRESETS = Path("presets")
_STEPS = {True: 300, False: 100}
"""Optimizer steps, at least: for a language model that starts from random weights, and for one that knows English."""
_LEAST_HELD, _LEAST_TO_CHOOSE = 20, 100
"""Validation questions below which nothing is held out, and below which a checkpoint would be chosen by chance."""
_IMAGES = 200  # pictures that `init` looks at; `check` looks at all


def init(path: Path, preset: str, force: bool, target: Path = Path("params.yaml")) -> list[str]:
    """Write `target` for the questions at `path`, and return what is to be said about them; UserError if there are none,
    or it is not clear which, or `target` was edited and `force` is not given."""
    presets = {file.stem: file for file in sorted(PRESETS.glob("*.yaml"))}
    if preset not in presets:
        known = ", ".join(presets) or "in presets/: run from the project's root folder"
        raise UserError(f"--preset is {preset!r}; it must be one of {known}.")
    found = _repository(path.as_posix()) if not path.exists() and len(path.parts) == 2 else recognise(path)
    values = read_yaml(presets[preset])
    values["data"] |= {"official": None, "hub": None, "table": None} | found.data
    if found.data["source"] != "hub":
        folder, project = (path if path.is_dir() else path.parent).resolve(), Path.cwd()
        if project.is_relative_to(folder):
            raise UserError(f"{folder}: the project lies in it. Move questions and pictures to a folder of their own.")
        values["data"]["directory"] = str(folder.relative_to(project) if folder.is_relative_to(project) else folder)
    params = parse_params(values, "what was recognised")
    text = presets[preset].read_text(encoding="utf-8")
    text = _with(text, "data", block(values["data"], found.unsure).removeprefix("data:\n  ") + "\n\n")
    # A repository would be downloaded whole.
    seen = None if found.data["source"] == "hub" else inspect_data(params.data, _IMAGES)
    for key, value in _fitting(params, seen, found.unsure).items():
        text = _with(text, key, f"{value}  # unsure: {found.unsure[key]}" if key in found.unsure else str(value))
    if target.exists() and not force and target.read_bytes() not in {file.read_bytes() for file in presets.values()}:
        raise UserError(f"{target} is no preset as it comes: --force replaces it. It would be:\n\n{text}")
    with aside(target) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
        load_params(unfinished)
    lines = [f"{path} is {found.what}; params.yaml reads it as data.source: {found.data['source']}."]
    lines += [f"unsure: {key}: {why}. Look at it in params.yaml." for key, why in found.unsure.items()]
    if seen is not None:
        texts, directory = seen.texts.items(), values["data"]["directory"]
        counts = [f"{text.questions} questions on {len(text.images)} images for {split}" for split, text in texts]
        lines.append(f"{' and '.join(counts)}; of the images, up to {_IMAGES} were looked at.")
        if not Path(directory).is_absolute():
            add = f"dvc add {directory} && git add {directory}.dvc .gitignore"
            lines.append(f"before experiments in copies (`dvc exp run --temp`, `--queue`): {add}")
        if seen.violations:
            return [*lines, seen.violations.text(), "next: mend that, then: vlm-vqa check, and: make repro"]
    return [*lines, 'next: make repro, then: vlm-vqa ask PICTURE "QUESTION"']


def _repository(name: str) -> Found:
    """Return the keys for a `datasets` repository on the hub, at its newest commit."""
    commit, splits = newest(name)
    train = "train" if "train" in splits else splits[0]
    others = (split for split in ("validation", "val", "dev", "test", *splits) if split in splits and split != train)
    if (val := next(others, None)) is None:
        raise UserError(f"{name} has one split, {train}. Download it and name its folder: a share becomes val.")
    unsure = {} if val.startswith("val") else {"data.hub.val.split": f"it has {', '.join(splits)}"}
    pair = zip(SPLITS, (train, val), strict=True)
    hub = {key: {"repository": name, "revision": commit, "split": there} for key, there in pair}
    return Found("a datasets repository", {"source": "hub", "hub": hub}, unsure)


def _fitting(params: Params, seen: Inspection | None, unsure: dict[str, str]) -> dict[str, int | str]:
    """Return the values that depend on how many questions there are, and how long."""
    train, random = params.train, params.language.model == "random"
    if seen is None:
        kept = {"prompt.text_length": params.prompt.text_length, "train.num_train_epochs": train.num_train_epochs}
        kept["validation.questions"] = params.validation.questions
        unsure |= dict.fromkeys(kept, "the repository was not read")
        return kept
    questions, others = (text.questions for text in seen.texts.values())
    processes = read_launch(train.launch).processes
    step = train.batch_size * train.gradient_accumulation_steps * processes
    # Small data are divided into eight steps an epoch, but for steps of less than eight questions.
    wanted = max(8, 2 ** int(math.log2(max(questions, 8) / 8)), processes)
    changed: dict[str, int | str] = {}
    if wanted < step:
        rows = min(train.batch_size, wanted // processes)
        step = wanted // (rows * processes) * rows * processes
        changed = {"train.batch_size": rows, "train.gradient_accumulation_steps": wanted // (rows * processes)}
    steps = math.ceil(max(questions, 1) / step)
    epochs = max(train.num_train_epochs, math.ceil(_STEPS[random] / steps))
    if not random and epochs > train.num_train_epochs:
        unsure["train.num_train_epochs"] = f"{_STEPS[random]} steps were not tried with this model"
    # Every tokenizer here falls back to bytes, so a text has no more tokens than bytes. Rows are as long as their tokens.
    most = len(params.prompt.instruction.encode()) + max(text.longest for text in seen.texts.values()) + 4
    changed["train.num_train_epochs"] = epochs
    changed["prompt.text_length"] = max(params.prompt.text_length, 32 * math.ceil(most / 32))
    changed["evaluation.max_new_tokens"] = HELM_MAX_TOKENS
    changed["evaluation.helm_instances"] = min(params.evaluation.helm_instances, others or 1)
    # A tenth of the training questions validates at most, five times at least.
    settings = params.validation
    held = min(settings.questions, questions // 10)
    if held < _LEAST_HELD:
        off = {"validation.questions": 0, "validation.train_questions": 0, "validation.keep": Keep.LAST.value}
        return changed | off
    return changed | {
        "validation.questions": held,
        "validation.train_questions": min(settings.train_questions, held),
        "validation.every_steps": min(settings.every_steps, max(epochs * steps // 5, 1)),
        "validation.keep": settings.keep.value if held >= _LEAST_TO_CHOOSE else Keep.LAST.value,
    }


def _with(text: str, key: str, value: str) -> str:
    """Return a file's text with another value of a key; all else, comments too, stays."""
    node = compose(text)
    for name in key.split("."):
        node = {one.value: two for one, two in node.value}[name]
    return text[: node.start_mark.index] + value + text[node.end_mark.index :]
