"""Two evaluated models side by side: what is said of seeds, of less training, of other questions; and the page about it."""

import json
import re

import numpy as np
import pytest

from tests.evaluated import WRONG, drawn, write_evaluated
from tests.evaluation.conftest import MARKUP
from vlm_vqa.cli import main
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.difference_page import as_html, as_markdown, as_text, headline
from vlm_vqa.evaluation.differences import compare_sides
from vlm_vqa.params import Gate
from vlm_vqa.sides import side_of


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Return a function that evaluates two models, right where told, and compares them."""
    monkeypatch.chdir(tmp_path)

    def compared(old, new, **changes):
        for name, right, of in (("a", old, {}), ("b", new, changes)):
            write_evaluated(tmp_path / name, right, weights=name, **of)
        write_evaluated(tmp_path, new)
        return compare_sides(side_of("a"), side_of("b"))

    return compared


def test_two_seeds_of_one_recipe_show_no_difference(two):
    found = two(drawn(0.9, 1), drawn(0.9, 2), seed=7)
    assert {row.paired.verdict for row in found.rows} == {"no difference shown"}
    assert found.params == [("seed", "0", "7")]
    assert (
        "The parameters differ in the seed alone: what the scores differ by is luck, whatever the verdict."
        in found.notes
    )
    assert found.mended and found.broken


def test_a_tenth_of_the_steps_is_worse_and_the_other_way_round_better(two):
    whole, tenth = drawn(0.9, 1), drawn(0.7, 2)
    found = two(whole, tenth, train__num_train_epochs=0.2)
    assert found.deciding().paired.verdict == found.deciding(Gate.BLEU_1).paired.verdict == "worse"
    assert [key for key, *_ in found.params] == ["train.num_train_epochs"]
    assert not any("seed alone" in note for note in found.notes)
    assert headline(found).startswith("vqa_accuracy of folder b against folder a: worse: -0.")
    assert two(tenth, whole).deciding().paired.verdict == "better"


def test_every_score_is_there_and_flips_are_those_that_are(two):
    old, new = drawn(0.9, 1), drawn(0.7, 2)
    found = two(old, new)
    by = {(row.score, row.who, row.group): row for row in found.rows}
    answerers = ("model", "prior", "shuffled_images", "blank_image")
    groups = {"vqa_accuracy": ("overall", "other", "yes/no"), "bleu_1": ("overall", "other")}
    assert by.keys() == {(score, who, group) for score in groups for who in answerers for group in groups[score]}
    odd, even = slice(1, None, 2), slice(0, None, 2)
    parts = {("vqa_accuracy", "overall"): slice(None), ("vqa_accuracy", "yes/no"): odd, ("vqa_accuracy", "other"): even}
    for (score, group), part in (parts | {("bleu_1", "overall"): even}).items():
        row = by[score, "model", group]
        assert (row.before, row.after) == pytest.approx((old[part].mean(), new[part].mean()))
        change = new[part].astype(float) - old[part]
        assert row.paired.difference.mean == pytest.approx(change.mean())
        # One question of each picture: the plain paired error.
        if part in (odd, even):
            assert row.paired.difference.error == pytest.approx(change.std(ddof=1) / len(change) ** 0.5)
    # "yes" to all that is asked with yes or no, "red" to all colours: half of either.
    assert by["vqa_accuracy", "prior", "overall"].before == pytest.approx(0.5)
    ids = [500 + 10 * (at // 2) + at % 2 for at in range(len(old))]
    for flips, way in ((found.mended, new & ~old), (found.broken, old & ~new)):
        assert [flip.question_id for flip in flips] == [ids[at] for at in np.flatnonzero(way)]
    assert {(flip.before, flip.after) for flip in found.mended} <= {
        (WRONG, one) for one in ("red", "blue", "yes", "no")
    }
    assert {flip.said for flip in found.broken} == {flip.before for flip in found.broken}


def test_what_is_of_other_questions_truths_or_scores_is_refused(two, tmp_path):
    right = drawn(0.9)
    with pytest.raises(
        UserError, match=r"folder a and folder b cannot be .*: they answered other questions \(300 and 298"
    ):
        two(right, right[2:])
    two(right, right)
    report = (tmp_path / "b/reports/evaluation.json").read_text()
    write_evaluated(tmp_path / "b", right, metric="answer_accuracy")
    with pytest.raises(UserError, match="one is scored by vqa_accuracy, the other by answer_accuracy"):
        compare_sides(side_of("a"), side_of("b"))
    write_evaluated(tmp_path / "b", right)
    overall = str(json.loads(report)["vqa_accuracy"]["overall"])
    (tmp_path / "b/reports/evaluation.json").write_text(report.replace(overall, "0.5"))
    with pytest.raises(UserError, match=r"evaluation\.json and scores\.parquet are not of one evaluation"):
        compare_sides(side_of("a"), side_of("b"))


def test_other_answers_of_people_are_refused_and_unknown_ones_said(two, tmp_path):
    right = drawn(0.9)
    two(right, right)
    (old, new) = side_of("a"), side_of("b")
    at = new.predictions.column_names.index("answers")
    other = new.predictions.set_column(at, "answers", new.predictions["answers"].take(list(range(len(right)))[::-1]))
    with pytest.raises(UserError, match="people's answers to these questions differ"):
        compare_sides(old, type(new)(**{**vars(new), "predictions": other}))
    for hashes, refused in ((("d", "e"), True), (("d", "d"), False), (("d", None), False)):
        sides = [
            type(side)(**{**vars(side), "predictions": None, "data_hash": data})
            for side, data in zip((old, new), hashes, strict=True)
        ]
        if refused:
            with pytest.raises(UserError, match="their data differ"):
                compare_sides(*sides)
            continue
        notes = compare_sides(*sides).notes
        assert ("Whether both were scored by the same answers of people is not known." in notes) == (None in hashes)
        assert any("folder a and folder b: no reports/predictions.parquet" in note for note in notes)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_what_people_and_models_said_is_text_and_no_markup(two):
    found = two(drawn(0.9, 1), drawn(0.7, 2))
    page, note = as_html(found), as_markdown(found)
    assert "<script>" not in page + note and "<b>it</b>" not in page + note and "<img" not in page + note
    assert "&lt;script&gt;alert(&#39;no&#39;)&lt;/script&gt; | `x`" in page
    # A bar in a cell would end it; brackets and backticks are signs.
    assert r"&lt;script&gt;alert('no')&lt;/script&gt; \| \`x\`" in note and r"\!\[\](http" in note
    assert WRONG in as_text(found) and "\x1b" not in as_text(found) and MARKUP in as_text(found)
    assert {line.count(" | ") for line in note.splitlines() if line.startswith("| bleu")} == {9}
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "default-src 'none'" in page


def test_pictures_are_shown_where_the_records_are_of_this_data(two, records, tmp_path):
    found = two(drawn(0.9, 1, 8), drawn(0.2, 2, 8))
    assert "data:image" not in as_html(found) and "is not known to be the data of folder a and folder b" in as_html(
        found
    )
    known = type(found)(
        **{**vars(found), "sides": tuple(type(side)(**{**vars(side), "data_hash": "d"}) for side in found.sides)}
    )
    page, asked = as_html(known), {flip.image_id for flip in [*found.mended, *found.broken]}
    assert {int(one) for one in re.findall(r'alt="image (\d+)" src="data:image/jpeg', page)} == asked
    assert "nowhere is not here" in as_html(known, tmp_path / "nowhere")


def test_the_command_prints_and_writes(two, capsys, tmp_path):
    two(drawn(0.9, 1), drawn(0.7, 2))
    assert main(["compare", "a", "b", "--markdown", "out/note.md", "--html", "out/page.html"]) == 0
    said = capsys.readouterr().out
    assert "worse: -0." in said and "questions that only A answers rightly, 10 of them drawn" in said
    assert (
        "\\|" in (tmp_path / "out/note.md").read_text()
        and "<!doctype html>" in (tmp_path / "out/page.html").read_text()
    )
    # The second is the working tree by default.
    assert main(["compare", "b"]) == 0 and "B: the working tree" in capsys.readouterr().out
    for wrong in ([], ["a", "--base", "HEAD"], ["--base", "HEAD", "--html", "x"]):
        assert main(["compare", *wrong]) == 2 and "give A, or A and B" in capsys.readouterr().err
