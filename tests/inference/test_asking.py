"""`vlm-vqa ask`: answers in order, and what lacks one is named while the others are answered."""

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from vlm_vqa.cli import main
from vlm_vqa.errors import UserError
from vlm_vqa.inference import asking
from vlm_vqa.inference.asking import AT_ONCE
from vlm_vqa.inference.predictor import Candidate


class Answers:
    """An predictor that says which picture it saw, by its width, and how often it looked at one."""

    def __init__(self):
        self.looked, self.batches, self.folders, self.loaded = [], [], [], 0
        self.layout = SimpleNamespace(tokenize=self.tokenize)

    def load(self, folder):
        self.loaded += 1
        self.folders.append(folder)
        return self

    def tokenize(self, question):
        if len(question) > 50:
            raise UserError("too long to be asked")

    def encode(self, images):
        assert all(image.mode == "RGB" for image in images)
        self.looked += [image.width for image in images]
        return [image.width for image in images]

    def likeliest(self, questions, features, images):
        self.batches.append(len(questions))
        texts = [f"{question.split()[0]} {features[image]}" for question, image in zip(questions, images, strict=True)]
        return [[Candidate(text, 0.75), Candidate("no", 0.125), Candidate("", 0.0625)] for text in texts]


@pytest.fixture
def answers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "empty").mkdir()
    for width in (5, 6):
        Image.new("L", (width, 4)).save(tmp_path / "photos" / f"{width}.png")
    (tmp_path / "photos/page.jpg").write_text("<html>")
    made = Answers()
    answering = SimpleNamespace(Predictor=SimpleNamespace(from_export=made.load))
    monkeypatch.setitem(sys.modules, "vlm_vqa.inference.predictor", answering)
    return made


def ask(capsys, *words):
    code = main(["ask", *words])
    done = capsys.readouterr()
    return code, done.out.splitlines(), done.err.splitlines()


def csv_of(tmp_path, text, encoding="utf-8"):
    (tmp_path / "photos/q.csv").write_bytes(text.encode(encoding))
    return "photos/q.csv"


def test_one_question_gives_its_answer_alone(answers, capsys):
    assert ask(capsys, "photos/5.png", "what shape?") == (0, ["what 5"], [])


@pytest.mark.parametrize(
    "words", [["what?", "who is?", "--json"], ["--json", "what?", "who is?"], ["what?", "--json", "who is?"]]
)
def test_several_questions_of_a_picture_look_at_it_once(answers, capsys, words):
    questions = [word for word in words if word != "--json"]
    others = [{"answer": "no", "probability": 0.125}, {"answer": "", "probability": 0.0625}]
    assert ask(capsys, "photos/5.png", *questions) == (0, ["what?\twhat? 5", "who is?\twho 5"], [])
    code, lines, _ = ask(capsys, "photos/5.png", *words)
    assert code == 0 and [json.loads(line) for line in lines] == [
        {"image": "photos/5.png", "question": "what?", "answer": "what? 5", "probability": 0.75, "others": others},
        {"image": "photos/5.png", "question": "who is?", "answer": "who 5", "probability": 0.75, "others": others},
    ]
    assert answers.looked == [5, 5] and answers.loaded == 2


def test_many_questions_of_a_picture_come_in_pieces(answers, capsys):
    code, lines, _ = ask(capsys, "photos/5.png", *(f"{n} dogs?" for n in range(2 * AT_ONCE + 1)))
    assert code == 0 and lines[-1] == f"{2 * AT_ONCE} dogs?\t{2 * AT_ONCE} 5"
    assert answers.batches == [AT_ONCE, AT_ONCE, 1] and answers.looked == [5]


@pytest.mark.parametrize("question", ["", " ", "\t\n", "\u00a0"])
def test_an_empty_question_is_refused_before_anything_is_loaded(answers, capsys, question):
    assert ask(capsys, "photos/5.png", question) == (2, [], ["vlm-vqa: error: the question is empty"])
    assert answers.loaded == 0 and answers.looked == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.jpg", "what?"], "missing.jpg: cannot be read (No such file or directory)"),
        (["empty", "what?"], "empty: no picture in it, by the files' names (.jpg, "),
        (["photos/page.jpg", "what?"], "photos/page.jpg: not a readable image: it is a web page (HTML)."),
        (
            ["photos/5.png", "what?", "--max-image-pixels", "9"],
            "photos/5.png: 5 x 4 is more than --max-image-pixels (9)",
        ),
        (["photos/5.png", "x" * 51], "too long to be asked"),
        (["photos/5.png", "caf\udce9?"], "the question is not valid UTF-8"),
        (["photos/5.png"], "give a picture and a question"),
        ([], "give a picture and a question"),
        (["photos/5.png", "what?", "--csv", "q.csv"], "--csv names the pictures and the questions"),
        (["--csv", "missing.csv"], "missing.csv: cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_one_line(answers, capsys, words, message):
    code, lines, errors = ask(capsys, *words)
    assert code == 2 and lines == [] and len(errors) == 1
    assert errors[0].startswith(f"vlm-vqa: error: {message}")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("words", [["strange", "what?"], ["--csv", "strange"]])
def test_what_has_no_end_is_not_read(make, words, answers, capsys):
    make("strange")
    code, _, errors = ask(capsys, *words)
    assert code == 2 and errors == [
        "vlm-vqa: error: strange: cannot be read (a pipe, socket or device, not a file). Name a file that is there."
    ]


def test_standard_input_has_an_end(answers, capsys, monkeypatch):
    monkeypatch.setattr(asking, "MOST_BYTES", 10)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=open("/dev/zero", "rb")))
    code, _, errors = ask(capsys, "-", "what?")
    assert code == 2 and "-: cannot be read (more than 10 bytes)" in errors[0]


def test_a_picture_on_standard_input(answers, capsys, monkeypatch, tmp_path):
    data = (tmp_path / "photos/6.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert ask(capsys, "-", "what shape?", "and this?") == (0, ["what shape?\twhat 6", "and this?\tand 6"], [])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert ask(capsys, "-", "what?")[2] == [
        "vlm-vqa: error: standard input: not a readable image: it is empty. Give an intact JPEG, PNG, WebP, GIF, "
        "BMP, AVIF or TIFF, or convert it into one."
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_csv_as_programs_write_it(answers, capsys, tmp_path, delimiter, encoding, end):
    rows = ["id,Question,image", '1,"red, or blue?",5.png', "", "2,how?,6.png", "3,so?,5.png"]
    rows = [row.replace(",", delimiter).replace(f"red{delimiter}", "red,") for row in rows]
    path = csv_of(tmp_path, end.join(rows), encoding)
    table = ["image,question,answer", '5.png,"red, or blue?","red, 5"', "6.png,how?,how? 6", "5.png,so?,so? 5"]
    assert ask(capsys, "--csv", path) == (0, table, [])
    assert answers.looked == [5, 6], "a picture is looked at once, wherever its questions stand"


def test_a_folder_asks_about_each_of_its_pictures(answers, capsys, tmp_path):
    (tmp_path / "photos/notes.txt").write_text("no picture")
    (tmp_path / "photos/page.jpg").rename(tmp_path / "photos/PAGE.JPG")
    code, lines, errors = ask(capsys, "photos", "what?", "who is?")
    expected = [
        f"photos/{n}.png,{question},{question.split()[0]} {n}" for n in (5, 6) for question in ("what?", "who is?")
    ]
    assert code == 2 and lines == [
        "image,question,answer",
        *expected,
        "photos/PAGE.JPG,what?,",
        "photos/PAGE.JPG,who is?,",
    ]
    assert len(errors) == 1 and "photos/PAGE.JPG: not a readable image: it is a web page" in errors[0]
    assert answers.looked == [5, 6] and answers.loaded == 1


def test_a_registered_model_is_found_by_its_name(answers, capsys, monkeypatch):
    registry = SimpleNamespace(local_folder=lambda name: f"folder of {name}")
    monkeypatch.setitem(sys.modules, "vlm_vqa.tracking.registry", registry)
    for model in ("models:/vlm-vqa@champion", "elsewhere/export"):
        assert ask(capsys, "photos/5.png", "what shape?", "--model", model) == (0, ["what 5"], [])
    assert answers.folders == ["folder of models:/vlm-vqa@champion", Path("elsewhere/export")]


BAD = """image,question
5.png,one?
gone.png,two?
page.jpg,three?
6.png,
,five?
5.png,six, or six?
"5.png","What
is it?"
5.png,xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
6.png,ten?
"""
PROBLEMS = {
    3: "photos/gone.png: cannot be read (No such file or directory)", 4: "photos/page.jpg: not a readable image: it is",
    5: "the question is empty", 6: "the picture's name is empty", 7: "3 fields under 2 columns", 9: "too long to be asked",
}  # fmt: skip


def test_rows_that_cannot_be_answered_are_named_and_the_others_are_answered(answers, capsys, tmp_path):
    code, lines, errors = ask(capsys, "--csv", csv_of(tmp_path, BAD), "--json")
    found = [json.loads(line) for line in lines]
    assert code == 2 and [row["answer"] for row in found] == ["one? 5", *[None] * 5, "What 5", None, "ten? 6"]
    for number, problem in PROBLEMS.items():
        assert found[number - 2]["error"].startswith(problem)
        assert found[number - 2]["probability"] is None and found[number - 2]["others"] == []
    assert [error.split(": ")[2] for error in errors[:-1]] == [f"photos/q.csv, row {number}" for number in PROBLEMS]
    assert errors[-1] == "vlm-vqa: 6 of 9 rows have no answer; row 1 is the header"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name the columns image and question"),
        ("5.png,what?\n", "must name the columns image and question, once each; it is ['5.png', 'what?']"),
        ("image,question,question\n", "once each"),
        ("image,question\n\n", "holds no question below its header"),
        ('image,question\n5.png,"what\n', "photos/q.csv, line 2: unexpected end of data. Mend its double quotes."),
        ("image,question\n5.png,caf\u00e9?\n", "byte 24 is not UTF-8"),
    ],
)
def test_what_is_no_such_csv_is_refused_whole(answers, capsys, tmp_path, text, message):
    path = csv_of(tmp_path, text, "latin-1")
    code, lines, errors = ask(capsys, "--csv", path)
    assert code == 2 and lines == [] and len(errors) == 1 and message in errors[0]


def test_answers_come_as_they_are_made(answers, capsys, tmp_path, monkeypatch):
    """What ends the command in the middle loses no answer made before it."""

    def fail(questions, features, images):
        if features == [6]:
            raise KeyboardInterrupt
        return [[Candidate("yes", 1.0)]] * len(questions)

    answers.likeliest = fail
    code, lines, _ = ask(capsys, "--csv", csv_of(tmp_path, "image,question\n5.png,one?\n6.png,two?\n"))
    assert (code, lines) == (130, ["image,question,answer", "5.png,one?,yes"])
