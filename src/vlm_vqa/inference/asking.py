"""What `vlm-vqa ask` does: questions about pictures from anywhere, answered in order, whatever some of them lack."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError
from vlm_vqa.files import MOST_BYTES, check_regular

if TYPE_CHECKING:
    from vlm_vqa.inference.predictor import Candidate, Predictor

COLUMNS = ("image", "question")
STDIN = "-"
AT_ONCE = 4
"""Questions of one picture that share a row of the model: few enough, with three other answers to each, for Gemma 2's
sliding window."""


@dataclass
class Asked:
    """A question and what has become of it."""

    image: str  # as the user names it; `-` is standard input
    question: str
    path: str | Path = STDIN  # where the picture lies
    where: str = ""  # which row of which csv, counted as spreadsheets do: the header is row 1
    answers: "Sequence[Candidate]" = ()  # the model's and the next two; none before it has answered
    problem: str | None = None  # why there is no answer

    def __post_init__(self) -> None:
        if not self.question.strip():
            self.problem = self.problem or "the question is empty"
        elif any("\ud800" <= character <= "\udfff" for character in self.question):
            self.problem = "the question is not valid UTF-8"

    @property
    def answer(self) -> str | None:
        """The model's answer."""
        return self.answers[0].answer if self.answers else None


def read_csv(name: str) -> list[Asked]:
    """Read questions from a csv with the columns image and question; others are left out.

    Commas, semicolons or tabs divide fields. Relative pictures lie beside the csv. `-` is standard input. A row that cannot
    be asked comes with its problem.

    UserError: it cannot be read as such a csv at all.
    """
    try:
        text = _read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: byte {error.start} is not UTF-8. Save the file as CSV UTF-8.") from error
    for delimiter in ";\t,":
        if delimiter in text.split("\n", 1)[0]:
            break
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header, *rows = list(records) or [[]]
    except csv.Error as error:
        raise UserError(f"{name}, line {records.line_num}: {error}. Mend its double quotes.") from error
    names = [field.strip().lower() for field in header]
    if [names.count(column) for column in COLUMNS] != [1, 1]:
        raise UserError(f"{name}: its first row must name the columns image and question, once each; it is {header}.")
    asked = [_of_row(record, names, name, number) for number, record in enumerate(rows, start=2) if record]
    if not asked:
        raise UserError(f"{name}: holds no question below its header.")
    return asked


def about_folder(folder: str, questions: Sequence[str], endings: tuple[str, ...]) -> list[Asked]:
    """Ask all questions about every picture of a folder, by its name's ending in lower case; UserError if there is none."""
    pictures = sorted(path for path in Path(folder).iterdir() if path.name.lower().endswith(endings))
    if not pictures:
        raise UserError(f"{folder}: no picture in it, by the files' names ({', '.join(endings)}). Name another folder.")
    return [Asked(str(path), question, path) for path in pictures for question in questions]


def _of_row(record: list[str], names: list[str], name: str, number: int) -> Asked:
    where = f"{name}, row {number}"
    if len(record) != len(names):
        problem = f"{len(record)} fields under {len(names)} columns; put a text with delimiters between double quotes"
        return Asked("", "", where=where, problem=problem)
    image, question = (record[names.index(column)] for column in COLUMNS)
    problem = None if image.strip() else "the picture's name is empty"
    return Asked(image, question, Path(name).parent / image, where, problem=problem)


def _read(path: str | Path) -> bytes:
    try:
        if path != STDIN:
            check_regular(path)
            return Path(path).read_bytes()
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        return data
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}). Name a file that is there.") from error


def answered(asked: Sequence[Asked], load: "Callable[[], Predictor]", max_pixels: int) -> Iterator[Asked]:
    """Answer questions and yield each, in order, as soon as it and all before it are done.

    The questions of one picture are asked together, wherever they stand; each picture is read once, and the model loaded
    when the first one has been. UserError: it cannot be. What one picture or question lacks stands in its `problem`.
    """
    about: dict[str | Path, list[Asked]] = {}
    for one in asked:
        if one.problem is None:
            about.setdefault(one.path, []).append(one)
    done, predictor = 0, None
    for path, questions in about.items():
        try:
            name = "standard input" if path == STDIN else str(path)
            image = open_image(_read(path), name, max_pixels, bound="--max-image-pixels")
        except UserError as error:
            for one in questions:
                one.problem = str(error)
        else:
            predictor = predictor or load()
            _answer(questions, image, predictor)
        while done < len(asked) and (asked[done].answer is not None or asked[done].problem is not None):
            yield asked[done]
            done += 1
    yield from asked[done:]


def _answer(questions: list[Asked], image, predictor: "Predictor") -> None:
    features = predictor.encode([image])
    fitting = []
    for one in questions:
        try:
            predictor.layout.tokenize(one.question)
            fitting.append(one)
        except UserError as error:
            one.problem = str(error)
    for start in range(0, len(fitting), AT_ONCE):
        together = fitting[start : start + AT_ONCE]
        texts = [one.question for one in together]
        for one, answers in zip(together, predictor.likeliest(texts, features, [0] * len(texts)), strict=True):
            one.answers = answers


def show(asked: Sequence[Asked], answers: Iterator[Asked], as_json: bool, as_table: bool) -> int:
    """Print answers as they come, and on standard error why others do not; return how many do not.

    JSON: an object a line with image, question, answer, its probability, and others, each with its own; where there is no
    answer it and its probability are null, and error says why. A table is a csv with the column answer. Otherwise one
    question gives its answer, and several give a line each: question, tab, answer.
    """
    table = csv.writer(sys.stdout, lineterminator="\n")
    if as_table and not as_json:
        table.writerow([*COLUMNS, "answer"])
    said = set()
    for one in answers:
        if one.problem:
            problem = f"{one.where}: {one.problem}" if one.where else one.problem
            if problem not in said:
                print(f"vlm-vqa: error: {problem}", file=sys.stderr)
            said.add(problem)
        if as_json:
            first, *others = [answer._asdict() for answer in one.answers] or [{"answer": None, "probability": None}]
            error = {"error": one.problem} if one.problem else {}
            print(json.dumps({"image": one.image, "question": one.question} | first | {"others": others} | error))
        elif as_table:
            table.writerow([one.image, one.question, one.answer])
        elif one.answer is not None:
            print(one.answer if len(asked) == 1 else f"{one.question}\t{one.answer}")
        sys.stdout.flush()
    return sum(one.answer is None for one in asked)
