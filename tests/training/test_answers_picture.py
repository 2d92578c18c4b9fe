"""The picture of validation answers: same bytes for the same history, all text literal, nothing over anything else."""

import io
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageColor

from vlm_vqa.data.records import ImageRecord
from vlm_vqa.evaluation.vqa_accuracy import METRICS
from vlm_vqa.training import answers_picture
from vlm_vqa.training.answers_picture import GAP, PAGE, PICTURE, RIGHT, STRIP, WIDTH, WRONG, AnswersPicture
from vlm_vqa.training.trainer import ProgressCallback
from vlm_vqa.training.validation import ANSWERS, COLUMNS, SCORE

WILD = [
    "what is $x_1$?", "$", r"\frac{$ \$1 $_$", "<b>is</b> it & why", "W" * 300, "of course " * 200, "日本語 ہ 😀 \U0010ffff",
    "a\nb\r\n\tc\x00\x07\u2028d", "\u202eabc e\u0301\u0301\u0301", "", " ", "﷽" * 40,
]  # fmt: skip


def image(image_id, size=(64, 48)):
    file = io.BytesIO()
    Image.new("RGB", size, (image_id * 20, 90, 200)).save(file, "PNG")
    return ImageRecord(image_id, f"{image_id}.png", file.getvalue())


def picture(questions=("what is it?",) * 12, truth="blue", answers=("blue",) * 10, size=(64, 48)):
    rows = [
        {"image_id": at, "question": question, "answers": list(answers), "multiple_choice_answer": truth}
        for at, question in enumerate(questions)
    ]
    return AnswersPicture(
        rows, METRICS["vqa_accuracy"], "vqa_accuracy of 7 questions", [image(at, size) for at in range(len(rows))]
    )


def history(*said, count=12):
    """Return a Trainer's log with one answer to all questions a validation, or a list of them, every 200 steps."""
    entries = []
    for at, answer in enumerate(said):
        answers = answer if isinstance(answer, list) else [answer] * count
        figures = dict.fromkeys(COLUMNS, at / 100)
        entries += [{"step": 200 * at, "loss": 1.0}, {"step": 200 * at, ANSWERS: answers}, figures | {"step": 200 * at}]
    return entries


def png(page):
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def texts(drawn, log):
    """Return the lines of the first question's cell."""
    said = {entry["step"]: entry[ANSWERS][0] for entry in log if ANSWERS in entry}
    return [line.text for line in drawn._cell(drawn.questions[0], said)[0]]


def test_same_history_same_bytes_also_after_a_resume_and_another_history_other_bytes():
    log = history("red", "blue", "blue")
    first = png(picture().draw(log))
    assert png(picture().draw(log)) == first
    assert png(picture().draw(json.loads(json.dumps(log)))) == first
    assert png(picture().draw(history("red", "blue", "blue!"))) != first
    assert b"Software" not in first


def test_equal_answers_in_a_row_are_one_line_and_dollars_and_markup_are_themselves():
    drawn = picture(questions=["is $x_1$ <b>it</b>?"] * 12)
    log = history("", "blue", "blue", "blue", "$5 <i>or</i> &amp;")
    assert texts(drawn, log) == [
        "is $x_1$ <b>it</b>?", "truth: blue", "✗ 0: (nothing)", "✓ 200-600: blue", "✗ 800: $5 <i>or</i> &amp;",
    ]  # fmt: skip
    assert [line.text for line in drawn._title(log[2::3])] == [
        "What is said to 12 fixed questions after so many steps: green right, red wrong",
        "By step: vqa_accuracy of 7 questions (in brackets: with another image)",
        "0: 0.000 (0.000) · 200: 0.010 (0.010) · 400: 0.020 (0.020) · 600: 0.030 (0.030) · 800: 0.040 (0.040)",
    ]


@pytest.mark.parametrize("count", [1, 7, 8, 40])
def test_first_and_last_answer_are_shown_of_any_number(count):
    said = [f"answer {at}" for at in range(count - 1)] + ["blue"]
    lines = texts(picture(), history(*said))[2:]
    assert lines[0].startswith(("✗ 0: answer 0", "✓ 0: blue"))
    assert lines[min(count, 7) - 1] == f"✓ {200 * (count - 1)}: blue"
    assert lines[7:] == ([f"answers left out: {count - 7}"] if count > 7 else [])
    steps = [int(line.split()[1].rstrip(":")) for line in lines[:7]]
    assert steps == sorted(set(steps))
    title = picture()._title(history(*said)[2::3])[-1].text
    assert title.startswith("0: 0.000") and f"{200 * (count - 1)}: 0.{count - 1:02}0" in title
    assert title.count("·") == min(count, 7) - 1


def gaps(page, titled):
    """Return the pixels between the columns of cells, below the title."""
    pixels = np.asarray(page)[titled:]
    starts = [0, *(GAP + WIDTH + at * (WIDTH + GAP) for at in range(4))]
    # Glyphs may hang over their width by a pixel or two.
    return np.concatenate([pixels[:, start + 3 : start + GAP - 2] for start in starts], axis=1)


def test_wild_texts_warn_nobody_and_stay_in_their_cells(capfd, monkeypatch):
    log = history("", WILD, WILD[::-1], "blue")
    titled = 2 * GAP + 3 * answers_picture.LINE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = picture(questions=WILD, truth=WILD[5]).draw(log)
    assert capfd.readouterr() == ("", "")
    assert page.width == PAGE and (gaps(page, titled) == 255).all()
    # The test sees a text that is not broken.
    whole = lambda text, *_, bold=False, **__: [answers_picture.Line(text.split("\n")[0], "black", bold)]  # noqa: E731
    monkeypatch.setattr(answers_picture, "fold", whole)
    assert (gaps(picture(questions=WILD).draw(log), titled) < 255).any()


def test_right_is_what_scores_half_and_the_strip_shows_it():
    """Two of ten people score 0.6, one 0.3."""
    drawn = picture(answers=["blue"] * 7 + ["teal"] * 2 + ["red"])
    page = drawn.draw(history("red", "teal", "blue", "green"))
    top = 2 * GAP + 3 * answers_picture.LINE + PICTURE + STRIP // 2 + 2
    colours = [page.getpixel((GAP + at * WIDTH // 4 + 5, top)) for at in range(4)]
    assert colours == [ImageColor.getrgb(one) for one in (WRONG, RIGHT, RIGHT, WRONG)]


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (1, 1), (640, 480)])
def test_pictures_of_any_shape_fit(size):
    (small, *_) = picture(size=size).pictures.values()
    assert 1 <= small.width <= WIDTH and 1 <= small.height <= PICTURE
    assert small.width == WIDTH or small.height == PICTURE


def test_fewer_questions_and_hundreds_of_validations_are_drawn():
    page = picture(questions=["is it?"] * 2).draw(history(*["red", "blue"] * 300, count=2))
    assert page.width == PAGE


def test_the_run_is_shown_each_validation_whole():
    seen, drawn = [], picture()
    run = SimpleNamespace(log_metrics=lambda *_: None, log_image=lambda page, file: seen.append((png(page), file)))
    log = history("red", "blue")
    for upto in (3, 6):
        state = SimpleNamespace(global_step=log[upto - 1]["step"], log_history=log[:upto])
        ProgressCallback(run, drawn).on_log(None, state, None, logs={SCORE: 0.5})
        ProgressCallback(run).on_log(None, state, None, logs={SCORE: 0.5})
    assert seen == [(png(drawn.draw(log[:upto])), "validation/answers.png") for upto in (3, 6)]
