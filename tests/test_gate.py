"""The gate of continuous integration: its verdicts."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.evaluated import write_evaluated
from vlm_vqa.cli import main
from vlm_vqa.evaluation.differences import SCORES_TABLE, Paired
from vlm_vqa.gate import hold_against
from vlm_vqa.params import Gate

RIGHT = np.ones(400, dtype=bool)


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A git repository whose HEAD holds an evaluation, and whose first commit holds none."""
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "a")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "a@b.c")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlm_vqa.gate.metrics_diff", lambda revision: f"diff to {revision}")
    git("init", "-q")
    git("commit", "-qm", "empty", "--allow-empty")
    Path(".gitignore").write_text("/reports/predictions.parquet\n/evaluation\n")
    commit(RIGHT)


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True, capture_output=True)


def commit(right: np.ndarray) -> None:
    """Commit the evaluation of a model that is right where told."""
    write_evaluated(Path(), right, "a")
    git("add", ".")
    git("commit", "-qm", "report")


def gated(right: np.ndarray, tolerance: float = 0.004, gate: Gate = Gate.ACCURACY) -> tuple[str, bool]:
    """Hold another model against HEAD's."""
    write_evaluated(Path(), right, "b")
    return hold_against("HEAD", tolerance, False, gate)


def right(wrong: slice, questions: int = 2000) -> np.ndarray:
    found = np.ones(questions, dtype=bool)
    found[wrong] = False
    return found


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
    commit(right(slice(lost, lost + gained)))
    text, found = gated(right(slice(lost)))
    assert found is passed, text
    verdict = "Passed: the interval of vqa_accuracy's change does not lie" if passed else "FAILED: the interval of"
    assert text.startswith(f"## HELM evaluation against `HEAD`\n\n{verdict}")
    assert f"**vqa\\_accuracy of the working tree against git revision HEAD: {shown}: " in text
    assert f"{gained} questions better and {lost} worse of 2,000 on 1,000 images" in text and "diff to HEAD" in text


def test_helms_score_is_paired_over_helms_questions():
    wrong_at_helm = right(slice(None, 40, 2), len(RIGHT))
    text, passed = gated(wrong_at_helm, gate=Gate.BLEU_1)
    assert not passed and "the interval of bleu_1's change lies below -0.004" in text
    assert "bleu\\_1 of the working tree against git revision HEAD: worse: " in text and "20 worse of 200 on" in text
    wrong_elsewhere = right(slice(1, 41, 2), len(RIGHT))
    assert gated(wrong_elsewhere, gate=Gate.BLEU_1)[1] and not gated(wrong_elsewhere)[1]


def test_questions_of_one_image_are_no_independent_evidence():
    base, new = np.ones(200), np.concatenate([np.zeros(8), np.ones(192)])
    # Eight wrong answers to eight pictures, and to one.
    apart, together = (Paired.of(new, base, one) for one in (np.arange(200), np.maximum(np.arange(200) - 7, 0)))
    assert apart.p < 0.05 < together.p and apart.difference.high < 0 < together.difference.high


@pytest.mark.parametrize(
    ("selected_on", "biased"), [("reported questions", True), ("a dev part of the training images", False)]
)
def test_what_selected_the_weights_stands_below_the_scores(selected_on, biased):
    """Nobody takes a score for unbiased by which the checkpoint was chosen."""
    write_evaluated(Path(), RIGHT, "b")
    path = Path("reports/evaluation.json")
    report = json.loads(path.read_text())
    assert "The weights" not in hold_against("HEAD", 0.004, False, Gate.ACCURACY)[0]
    report["model"] |= {"step": 40, "step_is": "the best of 6 validations", "selected_on": selected_on}
    path.write_text(json.dumps(report))
    said = hold_against("HEAD", 0.004, False, Gate.ACCURACY)[0]
    assert "- the working tree: the weights are those of step 40: the best of 6 validations." in said
    assert ("It was selected by the reported questions: their scores are higher" in said) == biased


def test_the_command_ends_with_0_1_or_2(capsys):
    assert main(["compare", "--base", "HEAD", "--markdown", "out/note.md"]) == 0
    assert Path("out/note.md").read_text() in capsys.readouterr().out
    write_evaluated(Path(), right(slice(40), len(RIGHT)), "b")
    assert main(["compare", "--base", "HEAD"]) == 1
    assert "FAILED: the interval of vqa_accuracy's change lies below -0.004 as a whole." in capsys.readouterr().out
    assert main(["compare", "--base", "HEAD", "--tolerance", "0.2"]) == 0
    assert main(["compare", "--base", "HEAD~1"]) == 2
    assert "--allow-missing-base" in capsys.readouterr().err
    assert main(["compare", "--base", "HEAD~1", "--allow-missing-base"]) == 0
    assert "Passed without a comparison" in capsys.readouterr().out
    # The score that decides is params.yaml's.
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(params.replace("gate: accuracy", "gate: bleu_1"))
    assert main(["compare", "--base", "HEAD"]) == 1 and "the interval of bleu_1's change" in capsys.readouterr().out


@pytest.mark.parametrize("tolerance", ["-0.01", "1.5", "nan"])
def test_an_impossible_tolerance_is_refused(tolerance, capsys):
    assert main(["compare", "--base", "HEAD", f"--tolerance={tolerance}"]) == 2
    assert "--tolerance" in capsys.readouterr().err


def test_what_does_not_compare_is_refused(capsys):
    def refused(words: str, base: str = "HEAD") -> None:
        assert main(["compare", "--base", base]) == 2 and words in capsys.readouterr().err

    refused("git knows no revision 'nowhere' here", "nowhere")
    write_evaluated(Path(), RIGHT[:300])
    refused("they answered other questions (400 and 300")
    write_evaluated(Path(), RIGHT, metric="answer_accuracy")
    refused("one is scored by vqa_accuracy, the other by answer_accuracy")
    write_evaluated(Path(), RIGHT)
    SCORES_TABLE.write_bytes(b"PAR1")
    refused("scores.parquet: cannot be read")
    shutil.rmtree("reports")
    refused("the working tree has no reports/evaluation.json")
