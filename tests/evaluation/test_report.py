"""The report: its figures are those of the predictions, it stands alone, and no text of the data is markup."""

import asyncio
import os
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from tests import chromium
from tests.evaluation import second_opinion
from tests.html_page import Page
from vlm_vqa.data.records import load_questions
from vlm_vqa.evaluation.report import BINS, NAMES, calibration, confusion, write_report
from vlm_vqa.evaluation.score_table import compared, rounded

EVIL = "<script>alert(1)</script>"
NASTY = [
    EVIL, "", "costs $5 or $\\frac{$", "a|b\\n# no heading", "x" * 3000, "Größe 東京 🙂", "yes", "red",
    '<img src="http://127.0.0.1:9/a.png" onerror="alert(1)">', "![](http://127.0.0.1:9/b.png)",
    "`code` *b* [l](javascript:1)",
]  # fmt: skip
RUN = {"weights": "w" * 64, "data source": EVIL, "seed": 3, "which is": f"the best of {EVIL}", "selected on": None}


@pytest.fixture
def evaluated(records, tmp_path):
    """Predictions that hold whatever breaks a page, and their report, over the 16 questions of the records."""
    draw, rows = np.random.RandomState(0), load_questions(records, "val").to_list()
    for at, row in enumerate(rows):
        row["question"] = NASTY[at % len(NASTY)]
        row["question_type"] = ["$is$", EVIL, "a|b"][at % 3]
        row["answers"] = [NASTY[(at + 6) % len(NASTY)]] * 6 + ["", "red", "blue", EVIL]
    scores = {who: draw.choice([0, 0.3, 0.6, 0.9, 1], len(rows)).tolist() for who in NAMES}
    bleu = {who: draw.rand(6).tolist() for who in NAMES}
    helm = {"bleu_1": sum(bleu["model"]) / 6, "quasi_prefix_exact_match": 0.25, "instances": 6}
    report = {
        "helm": helm, "vqa_accuracy": {"overall": 0.5, "questions": len(rows), "empty_answers": 1},
        "prior": {"way": "question type", "cross_validated": {}, "counted_on_reported_questions": 0.125},
        "model": {"mask": "image-prefix", "weights_hash": "w" * 64}, "people": 0.75,
    } | compared({"vqa_accuracy": (scores, rows), "bleu_1": (bleu, rows[:6])})  # fmt: skip
    columns = {name: [row[name] for row in rows] for name in rows[0] if not name.startswith("original")}
    columns |= {"prediction": [NASTY[at % len(NASTY)] for at in range(len(rows))], "score": scores["model"]}
    columns["probability"] = [0.0, 1.0, 0.3, 0.7, *draw.rand(len(rows) - 4).round(6).tolist()]
    reports = tmp_path / "reports"
    (reports / "validation").mkdir(parents=True)
    (reports / "train_curve.csv").write_text("step,loss,learning_rate\n1,2.5,0.1\n20,0.5,0.2\n")
    names = "validation_loss,validation_score,validation_blind_score,train_part_loss,train_part_score"
    (reports / "validation/curve.csv").write_text(f"step,{names}\n0,2.0,0.125,0.0,,\n20,0.25,0.75,0.5,,\n")
    predictions = pa.table(columns)
    written = lambda folder=reports: write_report(folder, rounded(report), predictions, records, RUN)  # noqa: E731
    return SimpleNamespace(
        rows=rows, scores=scores, bleu=bleu, helm=helm, predictions=predictions, folder=reports, write=written
    )


def cell(numbers):
    return pytest.approx([*numbers[:3]], abs=1e-9)


def test_every_figure_is_that_of_the_predictions(evaluated):
    evaluated.write()
    html, markdown = ((evaluated.folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    tables, seen = Page(html).tables, []

    def check(shown, expected):
        assert shown == cell(expected)
        seen.extend(f"{number:.4f}" for number in shown)

    for column, metric, values in ((1, "vqa_accuracy", evaluated.scores), (2, "bleu_1", evaluated.bleu)):
        rows, values = evaluated.rows[: len(values["model"])], {who: np.array(one) for who, one in values.items()}
        own = {who: second_opinion.recomputed(values[who], rows) for who in NAMES}
        gain = second_opinion.recomputed_difference(values["model"], values["prior"], rows)
        for row, who in zip(tables["headline"][1:], NAMES, strict=False):
            assert row[0] == NAMES[who]
            check(row[column], own[who]["overall",])
        check(tables["headline"][len(NAMES) + 1][column], gain["overall",])
        for kind in ("answer_type", "question_type"):
            shown = tables[f"{metric} {kind.replace('_', ' ')}"][1:]
            members = second_opinion.groups(rows)
            assert {row[0] for row in shown} == {row[kind] for row in rows}
            for group, questions, images, *figures in shown:
                at = members[f"per_{kind}", group]
                assert (int(questions), int(images)) == (len(at), len({rows[i]["image_id"] for i in at}))
                for figure, found in zip(figures, [*own.values(), gain], strict=True):
                    check(figure, found[f"per_{kind}", group])
    assert tables["headline"][len(NAMES) + 2][1] == [0.75]
    assert {row[0]: row[1] for row in tables["helm"][1:]} == {
        name: [pytest.approx(value, abs=1e-9)] for name, value in evaluated.helm.items() if name != "instances"
    }
    columns = evaluated.predictions.to_pydict()
    bins, error = second_opinion.calibration(columns["probability"], columns["score"], columns["image_id"])
    for (_, questions, probability, score), found in zip(tables["calibration"][1:], bins, strict=True):
        assert int(questions) == found[0] and probability == [pytest.approx(found[1], abs=1e-9)]
        check(score, found[2:])
    (shown,) = re.findall(r'of equal width: <data value="([^"]+)">', html)
    assert float(shown) == pytest.approx(error, abs=1e-9)
    assert all(number in markdown for number in [*seen, f"{error:.4f}"])
    wrong = sum(score < 0.5 for score in columns["score"])
    assert f"{wrong} of 16 answers score below 0.5" in html and "1 of 16 answers are empty" in html
    csv = (evaluated.folder / "calibration.csv").read_text().splitlines()
    assert len(csv) == len(bins) + 1 and csv[1].split(",")[-1] == str(bins[0][0])


def test_who_is_confused_with_whom():
    said = [("yes", "yes")] * 5 + [("yes", "no")] * 2 + [("no", "maybe"), ("no", "no"), ("red", "yes")]
    rows = [{"answers": [truth] * 3 + ["", "else"], "prediction": answer} for truth, answer in said]
    found = confusion(rows)
    assert found["names"] == ["yes", "no", "red"]
    assert found["rows"] == [("yes", [5, 2, 0, 0], 7), ("no", [0, 1, 0, 1], 2), ("red", [1, 0, 0, 0], 1)]
    many = confusion([{"answers": [str(at % 15)], "prediction": str(at % 14)} for at in range(300)])
    counts = Counter((str(at % 15), str(at % 14)) for at in range(300))
    for name, shown, total in many["rows"]:
        assert shown[:-1] == [counts[name, other] for other in many["names"]] and sum(shown) == total == 20


def test_calibration_of_thousands():
    draw = np.random.RandomState(1)
    probabilities, scores, images = draw.rand(2000) ** 0.2, draw.rand(2000), draw.randint(0, 300, 2000)
    probabilities[:11] = np.arange(11) / 10
    bins, error = calibration(probabilities, scores, images)
    expected, expected_error = second_opinion.calibration(probabilities.tolist(), scores.tolist(), images.tolist())
    assert len(bins) == BINS and error == pytest.approx(expected_error, abs=1e-9)
    for one, found in zip(bins, expected, strict=True):
        names = ("questions", "probability", "score", "low", "high")
        assert [one[name] for name in names] == pytest.approx(found, abs=1e-9)


def test_the_most_probable_mistakes_and_the_drawn_are_shown(evaluated):
    evaluated.write()
    text = (evaluated.folder / "report.html").read_text()
    mistakes, drawn = text[text.index('data-name="mistakes"') :].split('data-name="drawn"')
    ids = [row["question_id"] for row in evaluated.rows]
    columns = evaluated.predictions.to_pydict()
    wrong = [at for at, score in enumerate(columns["score"]) if score < 0.5]
    wrong.sort(key=lambda at: -columns["probability"][at])
    shown = [[int(found) for found in re.findall(r"question (\d+)</span>", part)] for part in (mistakes, drawn)]
    assert shown[0] == [ids[at] for at in wrong[:12]] and len(wrong) > 2
    assert shown[1] == [ids[at] for at in np.random.RandomState(3).permutation(16)[:12]]


def test_it_stands_alone_and_no_text_is_markup(evaluated):
    evaluated.write()
    html, markdown = ((evaluated.folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    page = Page(html)
    assert not page.open and len(html) < 300_000
    # Pictures are inside; a plot refers to its own parts.
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in page.sources)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "form", "base", "foreignobject"}
    assert not [name for name in page.attributes if name.startswith("on")] and "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "$is$ (6)<" in html and "東京" in html
    assert "<script" not in markdown and "<img" not in markdown and "![" not in markdown and "](" not in markdown
    # No cell ends a row or begins another.
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert sum(block.count("\n") for block in blocks) == len(rows)
    assert all(len({line.count("|") for line in block.splitlines()}) == 1 for block in blocks)


def test_equal_evaluations_give_equal_bytes_and_what_lies_in_a_cache_stays(evaluated, tmp_path):
    first = {path.name: path.read_bytes() for path in evaluated.write()}
    assert set(first) == {"report.html", "report.md", "calibration.csv"}
    for path in evaluated.folder.glob("report.*"):
        path.write_text("of an earlier run")
        os.link(path, tmp_path / path.name)
    assert {path.name: path.read_bytes() for path in evaluated.write()} == first
    assert {(tmp_path / name).read_text() for name in ("report.html", "report.md")} == {"of an earlier run"}


def test_curves_are_told_and_their_absence_is(evaluated):
    evaluated.write()
    text = (evaluated.folder / "report.md").read_text()
    assert "from 2.5000 at step 1 to 0.5000 at step 20. It was validated at 2 steps: the best score is 0.7500" in text
    (evaluated.folder / "validation/curve.csv").unlink()
    evaluated.write()
    assert "It was not validated on the way." in (evaluated.folder / "report.md").read_text()
    (evaluated.folder / "train_curve.csv").unlink()
    evaluated.write()
    assert "There is no curve of a training" in (evaluated.folder / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_it_asks_nobody_runs_nothing_and_fits(evaluated, tmp_path, width):
    evaluated.write()

    async def look():
        async with chromium.opened((evaluated.folder / "report.html").as_uri(), tmp_path, width=width) as tab:
            await tab.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
            )
            await tab.until("document.readyState == 'complete'")
            return await tab.value(
                "({wide: document.scrollingElement.scrollWidth, shown: innerWidth, text: document.body.innerText,"
                " images: [...document.images].map((one) => one.complete && one.naturalWidth),"
                " scripts: document.scripts.length, plots: document.querySelectorAll('svg[role=img]').length})"
            )

    seen = asyncio.run(look())
    assert seen["wide"] <= seen["shown"] == width
    assert len(seen["images"]) > 12 and all(seen["images"]) and seen["plots"] == 5
    assert seen["scripts"] == 0 and EVIL in seen["text"]
    asked = chromium.requests_in(tmp_path / "net-log.json")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
