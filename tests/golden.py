"""The terminal of a run as a golden text: what differs from run to run is masked, and any new line is seen.

    make repro > repro.log 2>&1
    python -m tests.golden repro.log            # the difference to tests/golden_repro.txt; exit code 1 if there is one
    python -m tests.golden repro.log --write    # the new golden text: read `git diff` line by line before it is committed

`tests/test_pipeline.py` compares its own run; `GOLDEN_WRITE=1 python -m pytest tests/test_pipeline.py` writes the text anew.
A line that begins with "? " in the golden text may come or not: what depends on the parameters, and warnings that depend on
the machine.
"""

import difflib
import os
import re
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden_repro.txt"
OPTIONAL = "? "

_MASKS = [
    (r"\x1b\[[0-9;]*[A-Za-z]", ""),
    (r"(sqlite:///)?/[\w.+~/-]*/(?=mlflow\.db)", "PLACE/"),
    (r"[\w.-]+\.json(?= \(\d)", "FILE.json"),
    (r"\b[0-9a-f]{12,}\b", "HASH"),
    (r"(?<![A-Za-z_])[-+]?\d+([.,]\d+)*(e[-+]?\d+)?", "N"),
    (r"(?<=^\tgit add ).*", "FILES"),
    (r"(?<=threads N )\([^)]*\)", "(WHY)"),
]
# As tqdm writes it, with and without a known end: " 7/14 [00:09<00:10, ", "74image [00:00, ".
_PROGRESS = re.compile(r"\d+%\||\[[\d:]+[<,] ?")


def masked(text: str) -> list[str]:
    """Return what `dvc repro` printed, from its first stage on, without progress bars.

    File names of the data, paths, hashes and numbers are masked, so that the tiny run and the small one read alike.
    """
    lines = _lines(text)
    first = next(
        (place for place, line in enumerate(lines) if line.startswith(("Running stage", "Stage '"))), len(lines)
    )
    return lines[first:]


def _once(lines: list[str]) -> list[str]:
    """Return one of equal neighbours."""
    return [line for place, line in enumerate(lines) if line not in lines[place - 1 : place]]


def foreign(text: str, stage: str) -> list[str]:
    """Return the lines of one stage that are neither ours, nor progress, nor what the Trainer measures."""
    ours = (f"{stage}: ", "{'loss': ", "{'validation_loss': ", "{'train_runtime': ")
    return [line for line in _lines(text) if not line.startswith(ours)]


def _lines(text: str) -> list[str]:
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip() and not _PROGRESS.search(line)]
    for pattern, mask in _MASKS:
        lines = [re.sub(pattern, mask, line) for line in lines]
    return [line.strip() for line in lines]


def difference(text: str, golden: str) -> str:
    """Return a unified diff from the golden text to what was printed; empty when nothing is new and nothing is missing."""
    expected = golden.splitlines()
    optional = {line.removeprefix(OPTIONAL) for line in expected if line.startswith(OPTIONAL)}
    found = _once([line for line in masked(text) if line not in optional])
    expected = [line for line in expected if not line.startswith(OPTIONAL)]
    return "\n".join(difflib.unified_diff(expected, found, "golden", "printed", lineterm=""))


def check(text: str, write: bool = bool(os.environ.get("GOLDEN_WRITE"))) -> str:
    """Return the difference to the committed golden text, after writing that text anew if asked to; optional lines stay."""
    old = GOLDEN.read_text(encoding="utf-8") if GOLDEN.exists() else ""
    if write and difference(text, old):
        kept = [line for line in old.splitlines() if line.startswith(OPTIONAL)]
        optional = {line.removeprefix(OPTIONAL) for line in kept}
        GOLDEN.write_text(
            "\n".join(_once([line for line in masked(text) if line not in optional]) + kept) + "\n", encoding="utf-8"
        )
    return difference(text, GOLDEN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    found = check(Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace"), write="--write" in sys.argv)
    print(found or "as the golden text")
    sys.exit(bool(found))
