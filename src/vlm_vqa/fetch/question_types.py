"""The types of questions and answers, found by rule where data give none."""

import re

QUESTION_TYPES = frozenset(
    "how many|is the|what|what color is the|what is the|is this|is this a|what is|are the|what kind of|is there a|"
    "what type of|is it|what are the|where is the|is there|does the|what color are the|are these|are there|which|is|"
    "what is the man|is the man|are|how|does this|what is on the|what does the|how many people are|what is in the|"
    "what is this|do|what are|are they|what time|what sport is|are there any|is he|what color is|why|where are the|"
    "what color|who is|what animal is|is the woman|is this an|do you|how many people are in|what room is|has|"
    "is this person|what is the woman|can you|why is the|is the person|what is the color of the|what is the person|"
    "could|was|is that a|what number is|what is the name|what brand".split("|")
)
"""VQAv2's (GT-Vision-Lab/VQA, QuestionTypes/mscoco_question_types.txt)."""
_MOST_WORDS = max(len(phrase.split()) for phrase in QUESTION_TYPES)


def question_type(question: str) -> str:
    """Return the longest of VQAv2's leading phrases that the question begins with, or `none`."""
    words = re.findall(r"[^\s?!.,;:]+", question.lower()[:200])[:_MOST_WORDS]
    leads = (" ".join(words[:count]) for count in range(len(words), 0, -1))
    return next((lead for lead in leads if lead in QUESTION_TYPES), "none")


def answer_type(answer: str) -> str:
    """Return VQAv2's answer type: `yes/no`, `number` or `other`."""
    answer = answer.strip().lower()
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if re.fullmatch(r"[-+]?\d[\d.,]*", answer) else "other"
