"""BLEU-1 equals HELM's, and the bundled sentence splitter is what its README says."""

import gzip
import json
import os
from pathlib import Path

import nltk
import pytest
from nltk.tokenize import word_tokenize
from nltk.tokenize.punkt import PunktSentenceTokenizer
from nltk.tokenize.treebank import TreebankWordTokenizer

from tests.shared_data import SHARED
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.bleu import bleu_1, prepare_punkt
from vlm_vqa.params import Punkt

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "evaluation" / "helm" / "nltk_data"


@pytest.fixture(autouse=True)
def bundled_punkt(monkeypatch):
    """The bundled data alone, whatever the machine has; nltk keeps loaded data, so that is dropped as well."""
    import nltk.tokenize as tokenize

    monkeypatch.setattr(nltk.data, "path", list(nltk.data.path))
    for value in vars(tokenize).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    return prepare_punkt(Punkt.BUNDLED, BUNDLED)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("yes", ["no"] * 9 + ["yes"], 1.0),  # the best of the ten counts
        ("Yes", ["yes"] * 10, 0.0),
        ("yes.", ["yes"] * 10, 0.5),
        (" yes\n", ["yes"] * 10, 1.0),
        ("", ["yes"] * 10, 0.0),
        ("a red ball", ["red ball"] * 10, 2 / 3),
        ("yes", ["yes"], 1.0),
        ("", ["", "yes", " "], 0.0),  # who said nothing is no reference
    ],
)
def test_bleu_1(prediction, answers, score):
    assert bleu_1(prediction, answers) == pytest.approx(score)


def test_equals_helms_own_function_on_real_answers(bundled_punkt, monkeypatch):
    if not (SHARED / "vqav2-text").is_dir():
        pytest.skip(f"no real VQAv2 text at {SHARED} (set VLM_VQA_SHARED_DATA)")
    # HELM looks for the data on import; the path is set, so nothing is downloaded.
    from helm.benchmark.metrics.evaluate_reference_metrics import bleu_1 as helms

    with gzip.open(SHARED / "vqav2-text" / "annotations.json.gz", "rt") as file:
        rows = json.load(file)["annotations"][:400]
    answers = [[answer["answer"] for answer in row["answers"]] for row in rows]
    predictions = [answers[(index * 7 + 1) % len(answers)][index % 10] for index in range(0, 400, 2)]
    predictions += [answers[index][index % 10].title() + "." for index in range(1, 400, 2)]
    for prediction, golds in zip(predictions, answers, strict=True):
        assert bleu_1(prediction, golds) == max(helms(gold, prediction.strip()) for gold in golds)


def test_bundled_punkt_is_the_algorithm_without_parameters():
    texts = ["yes", "2", "black and white", "it's 3.5 m.", "p.m.", "st. louis", "yes. no", "White. And", "u.s. flag"]
    words = TreebankWordTokenizer()
    for text in texts:
        sentences = PunktSentenceTokenizer().tokenize(text)
        assert word_tokenize(text) == [word for sentence in sentences for word in words.tokenize(sentence)]


def test_where_bundled_punkt_differs_from_nltks_own():
    # nltk's own knows the abbreviation and answers ["st.", "louis"].
    assert word_tokenize("st. louis") == ["st", ".", "louis"]
    # Without a period inside there is one sentence, so no parameter is ever asked.
    assert word_tokenize("black and white.") == ["black", "and", "white", "."]


def test_bundled_punkt_comes_first_and_goes_to_children(bundled_punkt, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", "/elsewhere")
    added = prepare_punkt(Punkt.BUNDLED, BUNDLED)
    assert nltk.data.path[0] == str(BUNDLED)
    assert added == {"NLTK_DATA": f"{BUNDLED}{os.pathsep}/elsewhere"}


def test_missing_bundled_punkt_is_named(tmp_path):
    with pytest.raises(UserError, match="no punkt_tab"):
        prepare_punkt(Punkt.BUNDLED, tmp_path)


def test_installed_punkt_that_is_not_there_is_refused_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *names, **options: False)
    with pytest.raises(UserError, match="python -m nltk.downloader punkt_tab"):
        prepare_punkt(Punkt.INSTALLED)


def test_installed_punkt_that_is_there_is_taken(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(BUNDLED)])
    monkeypatch.setattr(nltk, "download", lambda *names, **options: pytest.fail("nothing to download"))
    assert prepare_punkt(Punkt.INSTALLED) == {}
