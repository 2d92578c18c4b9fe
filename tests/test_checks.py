"""What can be known before hours are spent is refused before: whatever a file says, it is valid or named."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import nltk
import pytest
import yaml
from transformers import Gemma2Config

from proofs.random_params import draw
from vlm_vqa.checks import check_here, check_machine, check_records
from vlm_vqa.cli import main
from vlm_vqa.data.held_out import validation_questions
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import Params, Punkt, Start, TooLong, load_params, parse_params

ROOT = Path(__file__).parents[1]
SMALL = yaml.safe_load((ROOT / "presets/small.yaml").read_text())
FILES = 2000


def changed(params, **sections):
    return dataclasses.replace(
        params, **{name: dataclasses.replace(getattr(params, name), **change) for name, change in sections.items()}
    )


def test_random_parameter_files_are_valid_or_refused_by_name(monkeypatch):
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    valid = 0
    for seed in range(FILES):
        try:
            params = parse_params(draw(SMALL, seed))
            check_machine(params)
            valid += 1
            if params.language.config is not None:
                # transformers has rules of its own.
                Gemma2Config(vocab_size=params.language.vocab_size, **dataclasses.asdict(params.language.config))
        except UserError as error:
            assert len(str(error)) < 2000, seed
    # Neither everything nor nothing: 2,000 refusals would prove as little as 2,000 passes.
    assert FILES / 20 < valid < FILES / 2


def test_random_files_through_the_parser(tmp_path):
    """As text, in which YAML's own spellings of nan, long numbers and odd characters stand."""
    path = tmp_path / "params.yaml"
    for seed in range(100):
        path.write_text(yaml.safe_dump(draw(SMALL, seed), allow_unicode=False))
        try:
            assert isinstance(load_params(path), Params)
        except UserError as error:
            assert str(error).startswith(f"{path}: "), seed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"launch": "none"}}, "train.launch is 'none', but there is no launch/none.yaml"),
        ({"vision": {"launch": "none"}}, "vision.launch is 'none', but there is no launch/none.yaml"),
        (
            {"train": {"launch": "cpu-zero2", "restart_optimizer": True}},
            "train.restart_optimizer is true, but ZeRO-2",
        ),
        ({"vision": {"launch": "cpu-fsdp2"}}, "vision.launch is 'cpu-fsdp2', which divides a model"),
        (
            {"evaluation": {"launch": "zero3"}},
            "evaluation.launch is 'zero3', which divides a model",
        ),
        ({"vision": {"model": "./none"}}, "vision.model is './none', but no model's config.json is there"),
        (
            {"model": {"start": Start.CHECKPOINT, "checkpoint": "./none"}},
            "model.checkpoint is './none', but no model's config.json is there",
        ),
        ({"language": {"model": "/dev"}}, "language.model is '/dev', but no model's config.json is there"),
        (
            {"evaluation": {"punkt_tab": Punkt.INSTALLED}},
            "evaluation.punkt_tab is installed, but nltk's punkt_tab is not",
        ),
    ],
)
def test_what_this_machine_lacks(change, words, monkeypatch):
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError) as error:
        check_machine(changed(parse_params(SMALL), **change))
    assert words in str(error.value)


def test_check_looks_at_this_machine_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "params.yaml").write_text(
        (ROOT / "presets/small.yaml").read_text().replace("launch: cpu", "launch: gone")
    )
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "launch", "launch")
    assert main(["check"]) == 2 and "vision.launch is 'gone'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[", "a: 1", 'distributed_type: "NO"', "[1]", "\0"])
def test_a_launch_file_that_is_none(text, tmp_path):
    (tmp_path / "cpu.yaml").write_text(text)
    with pytest.raises(UserError, match="(?s)cpu.yaml: .*Compare with launch/cpu.yaml"):
        check_machine(parse_params(SMALL), tmp_path)


# --- records ----------------------------------------------------------------------------------------------------------


def values_of(folder, **validation):
    """Return the values of a parameter file for a folder."""
    changes = {"data": {"source": "directory", "directory": str(folder)}, "evaluation": {"helm_instances": 1}}
    sections = {name: SMALL[name] | change for name, change in changes.items()}
    return {**SMALL, **sections, "validation": validation}


def records_of(folder, target):
    """Fetch a folder; return the parameters that did so."""
    params = parse_params(values_of(folder))
    fetch(params.data, target)
    return params


def test_one_validation_image_cannot_be_shuffled(vqav2_folder, tmp_path):
    records = tmp_path / "records"
    params = records_of(vqav2_folder(), records)
    check_records(params, records)
    one = changed(params, evaluation={"vqa_questions": 1})
    with pytest.raises(UserError, match="the 1 validation questions to evaluate are all about one image"):
        check_here(one, ROOT / "launch", records)
    # Records of another source are about to be replaced.
    check_here(changed(parse_params(SMALL), evaluation={"vqa_questions": 1}), ROOT / "launch", records)


def ask_at_length(folder, split, words):
    """Let the first two questions of a split be long."""
    path = folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json"
    content = json.loads(path.read_text())
    for number, length in enumerate((words, 2 * words)):
        content["questions"][number]["question"] = "Is " + " ".join(map(str, range(100, 100 + length))) + " it?"
    path.write_text(json.dumps(content))
    return [row["question_id"] for row in content["questions"]]


def test_the_longest_text_is_named_before_the_extraction(vqav2_folder, tmp_path):
    """Under the tokenizer that the training will make of the texts; the length that the message names is enough."""
    folder, records = vqav2_folder(), tmp_path / "records"
    ids = ask_at_length(folder, "train", 70)
    params = records_of(folder, records)
    with pytest.raises(UserError, match=f"question_id {ids[1]}: .* It is the longest of 2 such") as error:
        check_records(params, records)
    check_records(changed(params, prompt={"too_long": TooLong.DROP}), records)
    needed = int(re.search(r"Set it to (\d+)", str(error.value))[1])
    check_records(changed(params, prompt={"text_length": needed}), records)
    with pytest.raises(UserError, match=f"question_id {ids[1]}"):
        check_records(changed(params, prompt={"text_length": needed - 1}), records)


def test_a_validation_question_that_cannot_be_asked_is_named_before_the_extraction(vqav2_folder, tmp_path):
    folder, records = vqav2_folder(), tmp_path / "records"
    ask_at_length(folder, "val", 70)
    params = records_of(folder, records)
    with pytest.raises(UserError, match="longest validation question takes .* prompt.text_length is 64") as error:
        check_records(changed(params, prompt={"too_long": TooLong.DROP}), records)
    needed = int(re.search(r"Set it to (\d+)", str(error.value))[1])
    check_records(changed(params, prompt={"text_length": needed}), records)
    # Its tokenizer may have to be downloaded: a look at another machine's run does not.
    hub = changed(params, language={"model": "google/gemma-2-2b-it", "revision": "0" * 40})
    check_records(hub, records, run=False)


def test_a_check_for_another_machine_says_what_nltk_lacks(monkeypatch, caplog):
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("a check downloads nothing"))
    monkeypatch.setattr(nltk.data, "path", [])
    check_here(changed(parse_params(SMALL), evaluation={"punkt_tab": Punkt.INSTALLED}), records=Path("none"))
    assert "nltk's punkt_tab is not on this machine" in caplog.text


# --- validation -------------------------------------------------------------------------------------------------------

VALIDATION = [
    ({"questions": 2}, None),
    ({"questions": 9, "train_questions": 3}, None),
    ({"questions": 9, "train_questions": 4}, "validation.train_questions is 4, but there are 3 trained questions"),
    ({"questions": 10}, "validation.questions is 10, and the images of so many are all that the 12 training questions"),
    ({"questions": 12}, "validation.questions is 12, and the images of so many are all"),
    (
        {"questions": 500},
        "validation.questions is 500, .* none is left to train on. Lower it, or set validation.from: val",
    ),
    ({"from": "val", "questions": 6, "train_questions": 12}, None),
    ({"from": "val", "questions": 7}, "validation.questions is 7, but there are 6 val questions. Lower it"),
    (
        {"from": "val", "questions": 2, "train_questions": 13},
        "validation.train_questions is 13, but there are 12 trained",
    ),
]
"""Of 12 questions about 4 images for training, and 6 about 2 for val."""


@pytest.mark.parametrize(("validation", "words"), VALIDATION)
def test_more_validation_than_there_is_is_refused_by_name(
    vqav2_folder, tmp_path, monkeypatch, capsys, validation, words
):
    """By `vlm-vqa check` before there are records, and by every stage up to the training after."""
    folder = vqav2_folder()
    params = parse_params(values_of(folder, **validation))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.as_dict(), sort_keys=False))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "launch", "launch")
    assert main(["check"]) == (2 if words else 0)
    said = capsys.readouterr()
    assert re.search(words, said.err) if words else "12 questions for train and 6 questions for val" in said.out
    fetch(params.data, tmp_path / "data/records")
    if words is None:
        check_here(params, run=True)
        # What is checked is what the training will take.
        held, trained = validation_questions(params, tmp_path / "data/records")
        assert len(held) >= params.validation.questions and len(trained) >= params.validation.train_questions
    else:
        for run in (False, True):
            with pytest.raises(UserError, match=words):
                check_here(params, run=run)
        with pytest.raises(UserError, match=words):
            validation_questions(params, tmp_path / "data/records")


@pytest.mark.parametrize(
    ("validation", "words"),
    [
        ({"questions": 38_570}, "validation.questions is 38570, .* the 38575 training questions have: none is left"),
        ({"from": "val", "questions": 9_674}, "validation.questions is 9674, but there are 9673 val questions"),
    ],
)
def test_known_data_are_not_fetched_to_be_counted(tmp_path, validation, words):
    params = parse_params(SMALL | {"validation": validation})
    with pytest.raises(UserError, match=words):
        check_here(params, ROOT / "launch", tmp_path / "none")


@pytest.mark.parametrize(("rank", "calls"), [("0", 1), ("1", 0)])
def test_one_process_of_a_launch_reads_the_checkpoint_for_all(monkeypatch, rank, calls):
    seen = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("vlm_vqa.checks.check_start", seen.append)
    start = {"model": {"start": "checkpoint", "checkpoint": "./any"}}
    towers = {
        "vision": {"model": "checkpoint"},
        "language": {"model": "checkpoint", "vocab_size": None, "config": None},
    }
    check_machine(changed(parse_params(SMALL | start | {n: SMALL[n] | one for n, one in towers.items()})))
    assert len(seen) == calls
