"""The whole evaluation with a fake model: what is reported, over which questions, and what is refused beforehand."""

import collections
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import chromium
from tests.evaluation.second_opinion import recomputed, recomputed_difference
from tests.sealing import seal_records
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.data.records import load_questions, question_features
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation import evaluate as module
from vlm_vqa.evaluation.answering import Ask, answer_asks
from vlm_vqa.evaluation.bleu import bleu_1
from vlm_vqa.evaluation.evaluate import _choose, evaluate
from vlm_vqa.evaluation.helm.files import SCORES, HelmResults, helm_order, pick_instances
from vlm_vqa.evaluation.helm.run import RESULTS
from vlm_vqa.params import Params, load_params

ROOT = Path(__file__).parents[2]
TEN = {"val": {"answers_per_question": {"10": 16}}}


@pytest.fixture
def load(project):
    """The fake predictor's loader, as this process sees it."""
    sys.modules.pop("fake_predictor", None)
    return importlib.import_module("fake_predictor").load


def with_evaluation(params: Params, **values) -> Params:
    return dataclasses.replace(params, evaluation=dataclasses.replace(params.evaluation, **values))


@pytest.fixture
def params(project) -> Params:
    return with_evaluation(load_params(), helm_instances=6, batch_size=5, helm_threads=4)


@pytest.fixture
def no_helm(monkeypatch):
    """HELM replaced by its answers: what the pixels say."""

    def ask_helm(questions, *_):
        predictions = ["red" if row["image_id"] % 2 == 0 else "blue" for row in questions]
        bleu = np.mean([bleu_1(one, row["answers"]) for one, row in zip(predictions, questions, strict=True)])
        scores = dict.fromkeys(SCORES, 0.25) | {"bleu_1": bleu, "num_instances": len(questions)}
        return HelmResults(scores, predictions, [{"bleu_1": 1.0}] * len(questions), {"name": "vqa"})

    monkeypatch.setattr(module, "_ask_helm", ask_helm)


def test_report_has_the_agreed_keys_and_figures(project, records, features, params, load, no_helm):
    report = evaluate(params, load)[0]
    # Colours are right in full (10 of 10 and 4 of 10 humans say the colour); shuffled images are another colour or not.
    assert report["vqa_accuracy"] == {
        "overall": 1.0,
        "per_answer_type": {"other": 1.0, "yes/no": 1.0},
        "questions": 16,
        "empty_answers": 0,
    }
    assert set(report["helm"]) == {*SCORES, "instances"} and report["helm"]["instances"] == 6
    assert set(report["baselines"]) == {"prior", "shuffled_images", "blank_image"}
    for scores in report["baselines"].values():
        assert set(scores) == {"vqa_accuracy", "bleu_1"}
        assert scores["vqa_accuracy"] < 1.0
    # From the question alone it says "blue" and "no", first of two equally common answers: right for half the images.
    assert report["baselines"]["prior"]["vqa_accuracy"] == 0.5
    unknown = {"step": None, "step_is": None, "selected_on": None}
    assert report["model"] == {"mask": "image-prefix", "weights_hash": "w" * 64} | unknown, (
        "an earlier version's export"
    )
    assert report["helm_equals_stored_features"] == 1.0
    assert json.loads(Path("reports/evaluation.json").read_text()) == report
    assert json.loads(Path("reports/metrics.json").read_text()) == {
        "accuracy": 1.0,
        "accuracy_blind": 0.5,
        "accuracy_shuffled": round(report["baselines"]["shuffled_images"]["vqa_accuracy"], 6),
        "bleu_1": report["helm"]["bleu_1"],
    }


def test_what_selected_the_weights_stands_in_the_report(project, records, features, params, load, no_helm):
    facts = {"step": 40, "step_is": "the best of 6 validations", "selected_on": "reported questions"}
    Path("models/export/vlm_vqa.json").write_text(json.dumps(facts))
    assert facts.items() <= evaluate(params, load)[0]["model"].items()


def test_predictions_are_kept_question_by_question(project, records, features, params, load, no_helm):
    evaluate(params, load)
    rows = pq.read_table("reports/predictions.parquet").to_pylist()
    questions = load_questions(records, "val").to_list()
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in questions]
    for row, question in zip(rows, questions, strict=True):
        assert row["answers"] == question["answers"] and row["answer_type"] == question["answer_type"]
        assert row["prediction"] == ("red" if row["image_id"] % 2 == 0 else "blue")
        assert row["prediction_shuffled"] == ("red" if row["shuffled_image_id"] % 2 == 0 else "blue")
        assert row["shuffled_image_id"] != row["image_id"]
        assert row["score"] == pytest.approx(1.0)
        assert row["prediction_prior"] in ("blue", "no", "yes")


def assert_figures(shown, expected):
    """Every group's mean, interval and error: to 1e-9."""
    flat = {("overall",): shown["overall"]}
    for kind in ("per_answer_type", "per_question_type"):
        flat |= {(kind, name): found for name, found in shown[kind].items()}
    assert set(flat) == set(expected)
    for group, found in flat.items():
        assert [found[key] for key in ("mean", "low", "high", "error")] == pytest.approx(expected[group], abs=1e-9), (
            group
        )


def test_every_figure_is_recomputed_from_the_predictions(project, records, features, params, load, no_helm):
    report = evaluate(params, load)[0]
    rows = pq.read_table("reports/predictions.parquet").to_pylist()
    columns = {"model": "prediction", "shuffled_images": "prediction_shuffled", "blank_image": "prediction_blank",
               "prior": "prediction_prior"}  # fmt: skip
    # Ten answers that are plain lower-case words: the official score is the tenths of min(1, matches of nine / 3).
    scores = {
        who: np.array([
            np.mean([min(1, (row["answers"].count(row[column]) - (one == row[column])) / 3) for one in row["answers"]])
            for row in rows
        ])
        for who, column in columns.items()
    }  # fmt: skip
    for who, of in scores.items():
        assert_figures(report["intervals"]["vqa_accuracy"][who], recomputed(of, rows))
        if who != "model":
            assert report["baselines"][who]["vqa_accuracy"] == pytest.approx(of.mean(), abs=1e-9)
    gain = recomputed_difference(scores["model"], scores["prior"], rows)
    assert_figures(report["looks_at_image"]["vqa_accuracy"], gain)
    at_helm = [rows[at] for at in pick_instances(16, 6)]
    bleu = np.array([float(row["prediction"] in row["answers"]) for row in at_helm])
    assert_figures(report["intervals"]["bleu_1"]["model"], recomputed(bleu, at_helm))
    others = [np.mean([min(1, (row["answers"].count(one) - 1) / 3) for one in row["answers"]]) for row in rows]
    assert report["people"] == pytest.approx(np.mean(others), abs=1e-9)


def test_answers_of_nothing_and_questions_seen_in_training_are_told(
    project, records, features, params, load, no_helm, caplog, monkeypatch
):
    Path("models/export/vlm_vqa.json").write_text('{"red": ""}')
    both = datasets.Dataset.from_list(load_questions(records, "val").to_list(), features=question_features())
    both.to_parquet(records / "questions-train.parquet")
    seal_records(records, data_hash="d", splits=TEN)
    monkeypatch.setattr(module, "_check_agreement", lambda *_: 1.0)
    report = evaluate(params, load)[0]
    assert report["vqa_accuracy"]["empty_answers"] == 8 and "8 of 16 answers are empty" in caplog.text
    assert report["prior"]["counted_on_reported_questions"] == 1.0 and "100.0% of the reported questions" in caplog.text


def few_answers(records, answers):
    """Let the validation questions have these answers, in turn."""
    path = records / "questions-val.parquet"
    rows = [
        row | {"answers": answers[at % len(answers)]} for at, row in enumerate(load_questions(records, "val").to_list())
    ]
    datasets.Dataset.from_list(rows, features=question_features()).to_parquet(path)
    counts = collections.Counter(str(len(row["answers"])) for row in rows)
    seal_records(records, data_hash="d", splits={"val": {"answers_per_question": dict(counts)}})


def test_another_number_of_answers_than_ten_is_scored_and_named_so(project, records, features, params, load, no_helm):
    few_answers(records, [["Red"], ["red", ""], ["blue"] * 10])
    report = evaluate(params, load)[0]
    # Images are red and blue in turn with two questions each: 16 questions, answers in threes.
    truth = [{"Red", "red"} if at % 3 < 2 else {"blue"} for at in range(16)]
    right = [("red" if at // 2 % 2 == 0 else "blue") in words for at, words in enumerate(truth)]
    assert report["answer_accuracy"]["overall"] == round(sum(right) / 16, 12)
    text = Path("reports/evaluation.json").read_text() + Path("reports/metrics.json").read_text()
    assert "vqa_accuracy" not in text and all(
        set(one) == {"answer_accuracy", "bleu_1"} for one in report["baselines"].values()
    )
    assert set(json.loads(Path("reports/metrics.json").read_text())) == {
        "answer_accuracy", "answer_accuracy_blind", "answer_accuracy_shuffled", "bleu_1",
    }  # fmt: skip
    table = pq.read_table("reports/predictions.parquet")
    assert "score" not in table.column_names and table["answer_accuracy"].to_pylist() == [float(one) for one in right]


def test_one_answer_and_the_same_ten_times_have_the_same_bleu_1(project, records, features, params, load, no_helm):
    reports = []
    for answers in ([["red"], ["blue"]], [["red"] * 10, ["blue"] * 10]):
        few_answers(records, answers)
        reports.append(evaluate(params, load)[0])
    one, ten = reports
    assert one["helm"] == ten["helm"]
    assert [one["baselines"][name]["bleu_1"] for name in one["baselines"]] == [
        ten["baselines"][name]["bleu_1"] for name in ten["baselines"]
    ]
    assert one["answer_accuracy"]["questions"] == ten["vqa_accuracy"]["questions"]


def test_of_few_answers_one_may_be_rounded_otherwise():
    assert module._check_agreement(["a", "b", "c"], ["a", "b", "x"]) == pytest.approx(2 / 3)
    for pixels, features in ((["a", "b", "c"], ["a", "y", "x"]), (["a"] * 300, ["b"] * 4 + ["a"] * 296)):
        with pytest.raises(UserError, match="of HELM's answers"):
            module._check_agreement(pixels, features)


@pytest.mark.slow
def test_helm_itself_over_all_questions_with_one_to_three_answers_some_blank(project, records, features, params, load):
    few_answers(records, [["red"], ["red", " ", "blue"], ["Blue", ""], ["an answer"]])
    Path("models/export/vlm_vqa.json").write_text('{"red": ""}')
    report = evaluate(with_evaluation(params, helm_instances=1000), load)[0]
    assert report["helm"]["instances"] == report["answer_accuracy"]["questions"] == 16
    assert "" in pq.read_table("reports/helm_predictions.parquet")["prediction"].to_pylist()


def test_a_number_of_questions_from_params_holds_helms_instances(params):
    rows = [{"question_id": at} for at in range(100)]
    chosen, at_helm = _choose(rows, dataclasses.replace(params.evaluation, vqa_questions=20, helm_instances=7))
    assert len(chosen) == 20
    assert [row["question_id"] for row in chosen] == sorted(helm_order(100)[:20].tolist())
    assert [chosen[at]["question_id"] for at in at_helm] == pick_instances(100, 7)
    everything, at_helm = _choose(rows, dataclasses.replace(params.evaluation, vqa_questions=None, helm_instances=7))
    assert everything == rows and at_helm == pick_instances(100, 7)


def test_features_of_other_data_are_refused_before_helm_runs(project, records, features, params, load, monkeypatch):
    monkeypatch.setattr(module, "_ask_helm", lambda *_: pytest.fail("HELM was run"))
    seal_records(records, data_hash="other", splits=TEN)
    with pytest.raises(UserError, match="data_hash"):
        evaluate(params, load)


def test_helm_that_answers_otherwise_than_the_stored_features_is_refused(
    project, records, features, params, load, no_helm
):
    Path("models/export/vlm_vqa.json").write_text('{"red": "crimson"}')
    with pytest.raises(UserError, match="of HELM's answers.*extract-features"):
        evaluate(params, load)
    assert not Path("reports/evaluation.json").exists()


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_answers_come_in_the_questions_order_and_images_stay_together(project, records, features, load, batch_size):
    questions = load_questions(records, "val").to_list()[::-1]
    predictor, store = load("models/export"), FeatureStore(features)
    seen = []
    given = store.inputs
    store.inputs = lambda ids: seen.extend(ids) or given(ids)
    asks = [Ask(row["image_id"], row["question"]) for row in questions]
    answers = answer_asks(asks, predictor, store, batch_size, "questions")
    assert [answers[ask].answer for ask in asks] == ["red" if row["image_id"] % 2 == 0 else "blue" for row in questions]
    # Two questions an image.
    assert set(collections.Counter(seen).values()) == {2 if batch_size == 1 else 1}


@pytest.mark.slow
def test_with_helm_itself_twice_the_same_bytes(project, records, features, params, load, subtests):
    """The real HELM over ten instances, and again; its web view has the BLEU column and shows its images."""

    def run():
        _, files = evaluate(with_evaluation(params, helm_instances=10), load)
        return {str(path): path.read_bytes() for path in files}

    first = run()
    report = json.loads(first["reports/evaluation.json"])
    assert report["helm"]["instances"] == 10
    assert report["helm"]["exact_match"] == report["helm"]["bleu_1"] == 1.0
    assert report["helm"]["bleu_4"] == 0.0
    rows = pq.read_table(pa.BufferReader(first["reports/helm_predictions.parquet"])).to_pylist()
    ids = [row["question_id"] for row in load_questions(records, "val").to_list()]
    assert [row["question_id"] for row in rows] == [ids[at] for at in pick_instances(16, 10)]
    assert all(set(SCORES) < set(row) and row["bleu_1"] == 1.0 for row in rows)

    suite = RESULTS
    table = json.loads((suite / "groups" / "vqa_base.json").read_text())[0]
    assert [cell["value"] for cell in table["header"]][:2] == ["Model", "BLEU-1"]
    assert table["rows"][0][1]["value"] == pytest.approx(report["helm"]["bleu_1"])
    (instances,) = suite.glob("*/instances.json")
    shown = json.loads(instances.read_text())[0]["input"]["multimedia_content"]["media_objects"][0]["location"]
    assert shown.startswith("benchmark_output/") and Path(shown).is_file()
    # HELM left nothing beside the committed files but its empty folder.
    assert list((project / "evaluation" / "helm").glob("cache/*")) == []

    assert run() == first
    with subtests.test("HELM's page in a browser"):
        look_at_helms_page(project, json.loads(instances.read_text()))


def look_at_helms_page(project, instances):
    """Show HELM's page as a user does and look at it: its pictures are there, and nothing is asked of other machines."""
    if chromium.find() is None:
        pytest.skip(f"no browser to look at HELM's page with: none of {', '.join(chromium.NAMES)} is installed")
    # A shell's background job, as tests may be run in, ignores Ctrl-C.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from vlm_vqa.cli import main; sys.exit(main(['helm-web', '--port', '0']))"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    try:
        address, place = re.match(r"(http://127\.0\.0\.1:\d+/)(#/runs/\S+) ", server.stdout.readline()).groups()
        pages = {
            place: "Instance id: id9", "#/leaderboard": "BLEU-1", "#/models": "VLM-VQA (DINOv2 + Gemma 2)",
            "#/scenarios": "short-answer question answering", "#/runs": "vqa:model=",
            "#/leaderboard/vqa_base": "VHELM's PQEM",
        }  # fmt: skip
        seen, asked = chromium.look(project / "helm-web", address, pages, project)
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 0 and errors == ""
    assert not [page for page, text in pages.items() if text not in seen[page]["shown"]]
    pictures = {path: width for path, width in seen[place]["images"] if "/scenarios/" in path}
    objects = [instance["input"]["multimedia_content"]["media_objects"] for instance in instances]
    assert pictures == {f"/{picture['location']}": 16 for picture, _ in objects}
    assert all(question["text"] in seen[place]["shown"] for _, question in objects)
    assert len(asked) > 10 and [url for url in asked if not url.startswith((address, "data:"))] == []
