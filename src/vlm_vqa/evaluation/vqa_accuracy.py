"""The two scores of an answer: VQA accuracy where people gave ten answers, answer accuracy where they gave another number.

VQA accuracy is as the official evaluator computes it (GT-Vision-Lab/VQA, `vqaEval.py`), quirks included. The score of one
question is the mean over its ten leave-one-out sets of human answers of min(1, matches / 3):

    humans that gave the answer   0     1     2     3     4 or more
    score                         0.0   0.3   0.6   0.9   1.0

What counts as a match depends on the humans. Where all ten wrote the same, prediction and answers are compared as they
are, but for line breaks, tabs and outer blanks. Where they differ, both sides are normalised first. That is the
official behaviour: "Yes" against ten times "yes" scores 0.

Answer accuracy is 1 where the normalised answer equals any normalised answer that people gave, else 0. Both sides are always
normalised, and who says nothing, model or human, is right with nobody.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

_PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
# The evaluator is Python 2: its \d is ASCII.
_DIGIT_COMMA = re.compile("[0-9],[0-9]")
# Its look-behind is mistyped and never bites: a period goes unless a digit follows (".5" and "2.5" stay, "2." goes).
_PERIOD = re.compile(r"\.(?![0-9])")
# A flag (re.UNICODE is 32) stands where `sub` expects a count.
_MOST_PERIODS = int(re.UNICODE)

# Each is written for any of its spellings that lack one apostrophe. The official table's spellings with a capital I are
# left out: words are lower-cased before they are looked up.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}
"""The last pair is the wrong way round in the official table."""


def score_answer(prediction: str, answers: Sequence[str]) -> float:
    """Return one answer's official score in 0..1 against the ten human answers of its question."""
    prediction = _tidy(prediction)
    answers = [_tidy(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction = normalise(prediction)
        answers = [normalise(answer) for answer in answers]
    return _leave_one_out(tuple([answer == prediction for answer in answers]))


def match_answer(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 where the answer, normalised, is one of its question's, else 0.0."""
    said = {normalise(_tidy(answer)) for answer in answers if answer.strip()}
    return float(bool(prediction.strip()) and normalise(_tidy(prediction)) in said)


def score_people(answers: Sequence[str]) -> float:
    """Return how one person's answer scores against the others', as min(1, matches / 3), in the mean over all of them."""
    answers = [_tidy(answer) for answer in answers]
    counts = Counter(answers if len(set(answers)) == 1 else map(normalise, answers))
    return sum(count * min(1.0, (count - 1) / 3) for count in counts.values()) / len(answers)


METRICS = {"vqa_accuracy": score_answer, "answer_accuracy": match_answer}
"""How an answer is scored, by the name in reports; `records.metric_of` says which it is."""


def metric_in(report: Mapping[str, Any]) -> str:
    """Return which of `METRICS` a report holds."""
    return "answer_accuracy" if "answer_accuracy" in report else "vqa_accuracy"


@cache
def _leave_one_out(matches: tuple[bool, ...]) -> float:
    """Return the score from who gave the answer; ten humans give 1,024 cases at most, hence the cache."""
    # One term per human and summed in their order, so that even the last bit is the evaluator's.
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


@cache
def normalise(text: str) -> str:
    """Return an answer in the evaluator's normal form; the same few strings come again and again, hence the cache.

    Punctuation goes (see `_strip_punctuation`), letters become small, number words digits (and "none" 0), articles go,
    contractions get their apostrophe.
    """
    words = (_NUMBERS.get(word, word) for word in _strip_punctuation(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _strip_punctuation(text: str) -> str:
    """Delete or blank out punctuation.

    A mark is deleted everywhere when it has a blank beside it anywhere in the text, or when the text has a comma
    between digits; else it becomes a blank: "t-shirt" -> "t shirt", "t- shirt-s" -> "t shirts".
    """
    stripped = text
    # Each mark is judged by the original text, so their order is free.
    for mark in _PUNCTUATION.intersection(text):
        delete = mark + " " in text or " " + mark in text or _DIGIT_COMMA.search(text) is not None
        stripped = stripped.replace(mark, "" if delete else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS) if "." in stripped else stripped


@cache
def _tidy(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
