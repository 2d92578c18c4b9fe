"""What can be known before hours are spent is refused before: whatever a file says, it is valid or named."""

import dataclasses
import json
import shutil
from pathlib import Path

import nltk
import pytest
import yaml
from transformers import Gemma2Config

from proofs.random_params import draw
from vlm_vqa.checks import check_here, check_machine, check_records
from vlm_vqa.cli import main
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import Answers, Params, Punkt, load_params, parse_params

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
            "train.restart_optimizer is true, which ZeRO-2",
        ),
        ({"vision": {"launch": "cpu-fsdp2"}}, "vision.launch is 'cpu-fsdp2', which divides a model"),
        ({"vision": {"model": "./none"}}, "vision.model is './none', but no model's config.json is there"),
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


def records_of(folder, target):
    """Fetch a folder; return the parameters that did so."""
    data = SMALL["data"] | {"source": "directory", "directory": str(folder)}
    params = parse_params(SMALL | {"data": data, "evaluation": SMALL["evaluation"] | {"helm_instances": 1}})
    fetch(params.data, target)
    return params


def test_one_validation_image_cannot_be_shuffled(vqav2_folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    params = records_of(vqav2_folder(val_images=1), one)
    with pytest.raises(UserError, match="the 3 validation questions to evaluate are all about one image"):
        check_here(params, ROOT / "launch", one)
    # Records of another source are about to be replaced.
    check_here(parse_params(SMALL), ROOT / "launch", one)
    records_of(vqav2_folder("other"), two)
    check_records(params, two)
    with pytest.raises(UserError, match="the 1 validation questions to evaluate are all about one image"):
        check_records(changed(params, evaluation={"vqa_questions": 1}), two)


def test_a_blank_main_answer_is_refused_before_the_training(vqav2_folder, tmp_path):
    folder = vqav2_folder()
    path = folder / "v2_mscoco_train2014_annotations.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["multiple_choice_answer"] = " "
    path.write_text(json.dumps(content))
    records = tmp_path / "records"
    params = records_of(folder, records)
    with pytest.raises(UserError, match="1 training questions have a blank multiple_choice_answer"):
        check_records(params, records)
    check_records(changed(params, train={"answers": Answers.DRAWN}), records)


def test_a_check_for_another_machine_says_what_nltk_lacks(monkeypatch, caplog):
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("a check downloads nothing"))
    monkeypatch.setattr(nltk.data, "path", [])
    check_here(changed(parse_params(SMALL), evaluation={"punkt_tab": Punkt.INSTALLED}), records=Path("none"))
    assert "nltk's punkt_tab is not on this machine" in caplog.text
