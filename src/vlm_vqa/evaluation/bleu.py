"""BLEU-1 as HELM computes it for `vqa`, for predictions that do not go through HELM (the baselines).

nltk's sentence BLEU with weights (1, 0, 0, 0), no smoothing, case and punctuation kept; of the human answers that say
something the best one counts; then the mean. So "Yes" scores 0 and "yes." 0.5 against "yes".

nltk splits text into sentences before words, for which it needs its `punkt_tab` data. `prepare_punkt` decides which.
"""

import os
import socket
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import nltk
from nltk.tokenize import word_tokenize
from nltk.translate.bleu_score import sentence_bleu

from vlm_vqa.data.records import said_answers
from vlm_vqa.errors import UserError
from vlm_vqa.params import Punkt

BUNDLED_PUNKT = Path("evaluation/helm/nltk_data")
"""Our own `punkt_tab` without parameters; its README says what that changes."""
_SECONDS = 15.0


def prepare_punkt(mode: Punkt, bundled: Path = BUNDLED_PUNKT) -> dict[str, str]:
    """Make `punkt_tab` available here; call it before any inference, HELM would miss it only afterwards.

    Returns what to add to the environment of a child process so that it uses the same data. UserError if the bundled folder
    is missing, or nltk's own data is neither installed nor to be had.
    """
    if mode is Punkt.BUNDLED:
        if not (bundled / "tokenizers" / "punkt_tab" / "english").is_dir():
            raise UserError(f"{bundled}: no punkt_tab there. Run from the project's root folder, or restore it.")
        root = str(bundled.resolve())
        # First, so that the result does not depend on what else the machine has.
        nltk.data.path[:] = [root, *(path for path in nltk.data.path if path != root)]
        return {"NLTK_DATA": os.pathsep.join(filter(None, [root, os.environ.get("NLTK_DATA")]))}
    waited = socket.getdefaulttimeout()
    # nltk itself would wait for ever.
    socket.setdefaulttimeout(_SECONDS)
    there = punkt_is_installed() or (nltk.download("punkt_tab", quiet=True) and punkt_is_installed())
    socket.setdefaulttimeout(waited)
    if not there:
        raise UserError(
            "evaluation.punkt_tab is installed, but nltk's punkt_tab is not on this machine and cannot be downloaded. "
            "Run `python -m nltk.downloader punkt_tab` where there is a network, or set evaluation.punkt_tab: bundled."
        )
    return {}


def punkt_is_installed() -> bool:
    """Whether nltk finds its own data."""
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return False
    return True


def bleu_1(prediction: str, answers: Sequence[str]) -> float:
    """Return the best BLEU-1 of one prediction over the human answers of its question, in 0..1."""
    return max(_sentence_bleu_1(answer, prediction) for answer in set(said_answers(answers)))


@cache
def _sentence_bleu_1(answer: str, prediction: str) -> float:
    with warnings.catch_warnings():
        # nltk warns about every pair without a common 2-gram, which weigh nothing here.
        warnings.simplefilter("ignore")
        return float(sentence_bleu([word_tokenize(answer)], word_tokenize(prediction), weights=(1, 0, 0, 0)))
