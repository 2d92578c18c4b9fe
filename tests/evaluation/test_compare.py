"""The gate of continuous integration: its verdicts."""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vlm_vqa.cli import main
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation import compare
from vlm_vqa.evaluation.compare import compare_reports, report_at, report_here, summary
from vlm_vqa.evaluation.helm.files import write_table
from vlm_vqa.params import Gate

REPO = Path(__file__).parents[2]
REPORT = {
    "helm": {"bleu_1": 0.99, "instances": 1000},
    "vqa_accuracy": {"overall": 0.995, "questions": 9673},
    "baselines": {
        "prior": {"vqa_accuracy": 0.67, "bleu_1": 0.67},
        "shuffled_images": {"vqa_accuracy": 0.59, "bleu_1": 0.58},
    },
}


def changed(**values) -> dict:
    """REPORT with `section__key=value` set."""
    report = copy.deepcopy(REPORT)
    for name, value in values.items():
        section, key = name.split("__")
        report[section][key] = value
    return report


def table(scores, images=None, bleu=None) -> pa.Table:
    """What `reports/scores.parquet` holds, two questions an image; HELM's are the first ones."""
    ids = list(range(len(scores)))
    bleu = [None] * len(scores) if bleu is None else [*bleu, *[None] * (len(scores) - len(bleu))]
    return pa.table({
        "question_id": ids,
        "image_id": [one // 2 for one in ids] if images is None else images,
        "question": ["what?"] * len(scores),
        "prediction": ["a"] * len(scores),
        "accuracy": pa.array(scores, pa.float64()),
        "bleu_1": pa.array(bleu, pa.float64()),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("bleu_1", "passed"),
    [(0.99, True), (1.0, True), (0.981, True), (0.98, True), (0.9799, False), (0.5, False)],
)
def test_without_the_bases_questions_a_drop_beyond_the_tolerance_fails(bleu_1, passed):
    comparison = compare_reports(REPORT, changed(helm__bleu_1=bleu_1), 0.01, Gate.BLEU_1)
    assert comparison.passed is passed
    assert comparison.verdict().startswith("Passed" if passed else "FAILED")
    assert "the base has no reports/scores.parquet" in comparison.verdict()


def test_only_the_gates_score_decides_but_all_are_shown():
    worse = changed(vqa_accuracy__overall=0.5)
    assert compare_reports(REPORT, worse, gate=Gate.BLEU_1).passed
    comparison = compare_reports(REPORT, worse)
    assert not comparison.passed and "vqa_accuracy.overall changed by -0.4950" in comparison.verdict()
    assert "| vqa_accuracy.overall                   | 0.9950 | 0.5000 | -0.4950 |" in comparison.table()


# Of 2,000 questions: as many right answers lost, and as many gained.
@pytest.mark.parametrize(
    ("lost", "gained", "passed", "shown"),
    [
        (0, 0, True, "no difference shown"),
        (40, 40, True, "no difference shown"),
        (44, 20, True, "no difference shown"),  # the interval lies below 0 by a hair, the permutation test has p = 0.05
        (48, 20, True, "worse"),  # a percent worse, but it may be a tenth of one
        (120, 20, False, "worse"),
        (0, 40, True, "better"),
        (2000, 0, False, "worse"),
    ],
)
def test_the_gate_fails_when_all_of_the_interval_lies_below(lost, gained, passed, shown):
    base, new = np.zeros(2000), np.zeros(2000)
    base[:lost], new[lost : lost + gained] = 1, 1
    comparison = compare_reports(REPORT, REPORT, tables=(table(base), table(new)))
    assert comparison.passed is passed, comparison.verdict()
    line = comparison.paired["vqa_accuracy.overall"].line
    assert line.startswith(shown) and f"{gained} questions better and {lost} worse of 2,000 on 1,000 images" in line
    assert line in comparison.table() and "helm.bleu_1" not in comparison.paired


def test_helms_score_is_paired_over_helms_questions():
    comparison = compare_reports(
        REPORT, REPORT, gate=Gate.BLEU_1, tables=(table([1] * 80, bleu=[1] * 40), table([1] * 80, bleu=[0] * 40))
    )
    assert comparison.paired["helm.bleu_1"].difference.questions == 40
    assert not comparison.passed and "the interval of helm.bleu_1's change lies below -0.004" in comparison.verdict()


def test_questions_of_one_image_are_no_independent_evidence():
    base, new = np.ones(200), np.concatenate([np.zeros(8), np.ones(192)])
    # Eight wrong answers to eight pictures, and to one.
    apart, together = np.arange(200), np.maximum(np.arange(200) - 7, 0)
    found = [
        compare_reports(REPORT, REPORT, tables=(table(base, images), table(new, images))).paired["vqa_accuracy.overall"]
        for images in (apart, together)
    ]
    assert found[0].p < 0.05 < found[1].p
    assert found[0].difference.high < 0 < found[1].difference.high


def test_other_questions_are_refused():
    for other in (table([1] * 9), table([1] * 10, images=[7] * 10)):
        with pytest.raises(UserError, match="scores.parquet is of other questions at the base .10. than here"):
            compare_reports(REPORT, REPORT, tables=(table([1] * 10), other))


def test_another_number_of_instances_is_not_comparable():
    other = changed(helm__instances=200)
    with pytest.raises(UserError, match="helm.bleu_1 is of 1000 questions at the base .* and of 200 here"):
        compare_reports(REPORT, other, gate=Gate.BLEU_1)
    assert dict((row[0], row[1]) for row in compare_reports(REPORT, other).rows)["helm.bleu_1"] is None


def test_accuracy_over_other_questions_is_shown_without_a_base():
    rows = dict(
        (name, base)
        for name, base, _ in compare_reports(REPORT, changed(vqa_accuracy__questions=10), gate=Gate.BLEU_1).rows
    )
    assert rows["vqa_accuracy.overall"] is None and rows["helm.bleu_1"] == 0.99


def test_another_kind_of_accuracy_is_shown_by_its_name_and_without_a_base():
    other = json.loads(json.dumps(REPORT).replace("vqa_accuracy", "answer_accuracy"))
    for base, new, name in ((REPORT, other, "answer_accuracy"), (other, REPORT, "vqa_accuracy")):
        comparison = compare_reports(base, new, gate=Gate.BLEU_1)
        rows = {row[0]: row[1] for row in comparison.rows}
        assert comparison.passed and rows.pop("helm.bleu_1") == 0.99
        assert rows == {
            f"{name}.overall": None,
            f"baselines.shuffled_images.{name}": None,
            f"baselines.prior.{name}": None,
        }
        with pytest.raises(UserError, match="scores of other questions do not compare"):
            compare_reports(base, new)
    assert all(row[1] is not None for row in compare_reports(other, other).rows)


@pytest.mark.parametrize(
    ("selected_on", "biased"), [("reported questions", True), ("a dev part of the training images", False)]
)
def test_what_selected_the_weights_stands_below_the_scores(selected_on, biased):
    """Nobody takes a score for unbiased by which the checkpoint was chosen."""
    model = {"step": 40, "step_is": "the best of 6 validations, by vqa_accuracy", "selected_on": selected_on}
    text = summary(compare_reports(REPORT, REPORT | {"model": model}), "main", "diff")
    table, _, rest = text.partition("\n\nThe weights are those of step 40: the best of 6 validations, by vqa_accuracy.")
    assert table.endswith("|") and ("**It was selected by the reported questions: " in rest) == biased
    for model in (None, {"mask": "image-prefix"}, {"step": None, "step_is": None, "selected_on": None}):
        assert "The weights" not in summary(compare_reports(REPORT, REPORT | {"model": model}), "main", "diff")


@pytest.mark.parametrize("value", [float("nan"), None, True, "0.99"])
def test_a_score_that_is_no_number_is_refused_by_name(value):
    with pytest.raises(UserError, match=r"this checkout's reports/evaluation\.json has no number helm\.bleu_1"):
        compare_reports(REPORT, changed(helm__bleu_1=value))


@pytest.mark.parametrize("tolerance", [-0.01, 1.5, float("nan")])
def test_an_impossible_tolerance_is_refused(tolerance):
    with pytest.raises(UserError, match="--tolerance"):
        compare_reports(REPORT, REPORT, tolerance)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository whose HEAD holds REPORT, and whose first commit holds none."""
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "a")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "a@b.c")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.chdir(tmp_path)

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], check=True, capture_output=True)

    git("init", "-q")
    git("commit", "-qm", "empty", "--allow-empty")
    (tmp_path / "reports").mkdir()
    shutil.copy(REPO / "params.yaml", "params.yaml")
    write(REPORT)
    git("add", ".")
    git("commit", "-qm", "report")
    return tmp_path


def write(report: dict) -> None:
    Path("reports/evaluation.json").write_text(json.dumps(report))


def test_reports_come_from_git_and_from_the_working_tree(checkout):
    write(changed(helm__bleu_1=0.5))
    assert report_at("HEAD") == REPORT
    assert report_at("HEAD~1") is None
    assert report_here()["helm"]["bleu_1"] == 0.5
    with pytest.raises(UserError, match="no revision 'nowhere'"):
        report_at("nowhere")
    Path("reports/evaluation.json").unlink()
    with pytest.raises(UserError, match="make repro"):
        report_here()


def test_the_command_ends_with_0_1_or_2(checkout, capsys, monkeypatch):
    monkeypatch.setattr("vlm_vqa.evaluation.compare.metrics_diff", lambda revision: f"diff to {revision}")
    assert main(["compare", "--base", "HEAD", "--markdown", "out/note.md"]) == 0
    assert Path("out/note.md").read_text() in capsys.readouterr().out
    assert "diff to HEAD" in Path("out/note.md").read_text()
    write(changed(vqa_accuracy__overall=0.975))
    assert main(["compare", "--base", "HEAD"]) == 1
    assert "FAILED: vqa_accuracy.overall changed by -0.0200 (a drop of 0.004 is tolerated" in capsys.readouterr().out
    assert main(["compare", "--base", "HEAD", "--tolerance", "0.02"]) == 0
    assert main(["compare", "--base", "HEAD~1"]) == 2
    assert "--allow-missing-base" in capsys.readouterr().err
    assert main(["compare", "--base", "HEAD~1", "--allow-missing-base"]) == 0
    assert "Passed without a comparison" in capsys.readouterr().out
    # The score that decides is params.yaml's.
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(params.replace("gate: accuracy", "gate: bleu_1"))
    assert main(["compare", "--base", "HEAD"]) == 0 and "helm.bleu_1 changed by" in capsys.readouterr().out


def test_the_bases_questions_come_from_git(checkout, capsys, monkeypatch):
    monkeypatch.setattr("vlm_vqa.evaluation.compare.metrics_diff", lambda revision: "")
    assert compare.scores_at("HEAD") is None and compare.scores_here() is None
    write_table(table([1.0] * 400), compare.SCORES_TABLE)
    for arguments in (["add", "."], ["commit", "-qm", "scores"]):
        subprocess.run(["git", *arguments], check=True)
    write_table(table([0.0] * 20 + [1.0] * 380), compare.SCORES_TABLE)
    assert main(["compare", "--base", "HEAD"]) == 1
    assert "0 questions better and 20 worse of 400 on 200 images" in capsys.readouterr().out
    compare.SCORES_TABLE.write_bytes(b"PAR1")
    assert main(["compare", "--base", "HEAD"]) == 2 and "scores.parquet: cannot be read" in capsys.readouterr().err
