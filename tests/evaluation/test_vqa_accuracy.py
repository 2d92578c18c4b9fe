"""VQA accuracy: every rule of the official evaluator, and parity with an independent second implementation. And answer
accuracy: its truth table in docs/evaluation.md."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from benchmarks.scorer import official_structure, own_scores
from tests.shared_data import SHARED
from vlm_vqa.evaluation.vqa_accuracy import CONTRACTIONS, match_answer, normalise, score_answer


@pytest.mark.parametrize(("humans", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_score_is_the_mean_over_leave_one_out_sets_and_not_a_third_per_match(humans, score):
    answers = ["cat"] * humans + ["dog"] * (10 - humans)
    assert score_answer("cat", answers) == pytest.approx(score)


def test_unanimous_answers_are_compared_raw():
    assert score_answer("yes", ["yes"] * 10) == 1.0
    assert score_answer("Yes", ["yes"] * 10) == 0.0
    assert score_answer("yes.", ["yes"] * 10) == 0.0
    assert score_answer("two", ["2"] * 10) == 0.0
    assert score_answer(" yes\n", ["\tyes "] * 10) == 1.0


def test_answers_that_differ_are_normalised():
    assert score_answer("Yes", ["yes"] * 9 + ["no"]) == 1.0


def test_whether_answers_differ_is_decided_before_normalising():
    # All ten mean the same, two spellings: normalised, so all ten match.
    assert score_answer("YES", ["yes"] * 5 + ["Yes"] * 5) == 1.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("t-shirt", "t shirt"),
        ("t - shirt", "t shirt"),
        ("t- shirt-s", "t shirts"),  # one blank beside the mark, anywhere, deletes all of that mark
        ("black/white", "black white"),
        ("a/b -c", "b c"),  # decided for each mark on its own
        ("1,000", "1000"),
        ("1,000 km/h", "1000 kmh"),  # a comma between digits deletes every mark
        ("cat,dog", "cat dog"),
        ("what?!", "what"),
        ('"stop"', "stop"),
        ("`x` [y] {z} (w) <v> a=b c+d e_f g@h i;j k\\l", "x y z w v b c d e f g h i j k l"),
    ],
)
def test_punctuation(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("text", "normal"), [("p.m.", "pm"), ("2.5", "2.5"), (".5", ".5"), ("2.", "2"), ("a.5b", "a.5b"), ("3.b", "3b")]
)
def test_a_period_goes_unless_a_digit_follows(text, normal):
    assert normalise(text) == normal


def test_at_most_32_periods_go():
    assert normalise("x" + "." * 40) == "x" + "." * 8


@pytest.mark.parametrize(
    ("text", "normal"),
    [("none", "0"), ("zero", "0"), ("ten", "10"), ("Two dogs", "2 dogs"), ("eleven", "eleven"), ("none of", "0 of")],
)
def test_number_words(text, normal):
    assert normalise(text) == normal


def test_articles_go_and_blanks_are_joined():
    assert normalise("The  cat on an\u00a0a mat") == "cat on mat"
    assert normalise("the") == ""


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("dont", "don't"),
        ("Dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("ive", "ive"),  # the official key is "Ive", words are lower-cased first
        ("im", "im"),
        ("its", "its"),
    ],
)
def test_contractions(text, normal):
    assert normalise(text) == normal


def test_contractions_are_the_official_table_without_its_dead_and_idle_rows():
    live = {key: value for key, value in OFFICIAL_CONTRACTIONS.items() if key == key.lower() and key != value}
    assert CONTRACTIONS == live


def test_scoring_leaves_the_ground_truth_as_it_was_and_repeats():
    answers = ["Two."] * 5 + ["2"] * 5
    assert score_answer("two", answers) == score_answer("two", answers) == 1.0
    assert answers == ["Two."] * 5 + ["2"] * 5


def test_equals_the_reference_on_29761_real_questions():
    folder = SHARED / "vqav2-text"
    if not folder.is_dir():
        pytest.skip(f"no real VQAv2 text at {folder} (set VLM_VQA_SHARED_DATA)")
    with gzip.open(folder / "annotations.json.gz", "rt") as file:
        annotations = json.load(file)["annotations"]
    predictions = perturbed_predictions(annotations)
    rows = [{**row, "answers": [answer["answer"] for answer in row["answers"]]} for row in annotations]
    ours = own_scores(predictions, rows)
    official = official_structure(predictions, annotations, OFFICIAL_CONTRACTIONS)
    assert len(rows) == 29_761
    assert ours == official
    # The predictions must exercise both sides of the rules, or equality says little.
    assert 0.2 < sum(ours.values()) / len(ours) < 0.8
    assert len({round(score, 3) for score in official.values()}) >= 5


def perturbed_predictions(annotations):
    """Human answers of the same or of another question, with the marks, words and blanks that the rules are about."""
    chance = random.Random(0)
    marks = [";", "/", "-", ",", "?", "!", '"', "(", "@", ".", "'", " ", "\n", "\t", " a ", " the ", "1,0", ". "]
    predictions = {}
    for row in annotations:
        source = row if chance.random() < 0.75 else chance.choice(annotations)
        text = chance.choice(source["answers"])["answer"]
        for _ in range(chance.choice([0, 0, 0, 1, 1, 2])):
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chance.choice(marks) + text[at:]
        text = chance.choice([text, text, text, text.upper(), text.title(), text.replace("'", ""), text + "." * 40])
        predictions[row["question_id"]] = text
    return predictions


# The table of the official evaluator, as data: spelling and what it becomes.
OFFICIAL_CONTRACTIONS = dict(
    pair.split("=")
    for pair in """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd
howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've
it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've
mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't
ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've she's=she's
shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's
someoned=someone'd someoned've=someone'd've someone'dve=someone'd've someonell=someone'll someones=someone's
somethingd=something'd somethingd've=something'd've something'dve=something'd've somethingll=something'll
thats=that's thered=there'd thered've=there'd've there'dve=there'd've therere=there're theres=there's
theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas
wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're whats=what's
whatve=what've whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've
who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't
wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll
y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
you'dve=you'd've youll=you'll youre=you're youve=you've
""".split()
)


# --- answer accuracy --------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
TABLE = [
    (re.findall("`([^`]*)`", answers), given, float(score), official.strip())
    for answers, given, score, official in re.findall(
        r"^\| (`[^|]*) \| `([^|]*)` \| ([01]) \| ([01]?) ?\|$", PAGE, re.M
    )
]


def test_the_truth_table_is_read():
    assert len(TABLE) == 16 and TABLE[-1] == (["red", " "], " ", 0.0, "")


@pytest.mark.parametrize(("answers", "given", "score", "official"), TABLE)
def test_the_truth_table_is_true(answers, given, score, official):
    assert (
        match_answer(given, answers) == match_answer(given, answers[::-1]) == match_answer(given, answers * 10) == score
    )
    if official:
        assert score_answer(given, answers * 10) == float(official)


def test_without_blank_answers_it_is_never_below_vqa_accuracy():
    drawn, words = random.Random(0), ["yes", "Yes", "no", "a", "the", "2", "two", "t-shirt", "t shirt"]
    for _ in range(2000):
        answers, given = drawn.choices(words, k=10), drawn.choice(words)
        assert match_answer(given, answers) >= score_answer(given, answers)


def test_any_number_of_answers_is_scored():
    assert match_answer("cat", ["a"]) == 0.0 and match_answer("Cat!", ["a", "cat"]) == 1.0
