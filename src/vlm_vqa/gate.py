"""The gate of continuous integration: are this checkout's scores as good as those committed at another revision?

Both have answered the same questions, so that scores are compared question by question: the interval of the mean difference,
clustered by image, is far narrower than those of the two scores. The gate fails where all of it lies below the tolerance.
"""

import subprocess
import sys

from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.difference_page import as_markdown
from vlm_vqa.evaluation.differences import REPORT, SCORES_TABLE, compare_sides
from vlm_vqa.params import Gate
from vlm_vqa.sides import committed, working_tree

# More than seeds of the small run differ by (0.9959 .. 0.9991), and half of what must be caught: `proofs/coverage.py`.
TOLERANCE = 0.004


def hold_against(base: str, tolerance: float, allow_missing: bool, gate: Gate) -> tuple[str, bool]:
    """Compare the working tree with what git has of a revision; return what a pull request is told, and whether it passes.

    UserError: the revision is unknown or has no scores, which `allow_missing` lets pass, or is of other questions.
    """
    if not 0 <= tolerance <= 1:
        raise UserError(f"--tolerance {tolerance:g} is not between 0 and 1: scores are fractions, 0.01 is one point")
    if (old := committed(base)) is not None:
        found = compare_sides(old, working_tree())
        row = found.deciding(gate)
        # A drop of exactly the tolerance passes, also where 0.99 - 0.98 is a bit more than 0.01.
        passed = -row.paired.difference.high <= tolerance + 1e-9
        verdict, lies = ("Passed", "does not lie") if passed else ("FAILED", "lies")
        said = f"{verdict}: the interval of {row.score}'s change {lies} below -{tolerance:g} as a whole."
        text = f"{said}\n\n{as_markdown(found, gate)}"
    elif allow_missing:
        text, passed = f"Passed without a comparison: the base has no {REPORT} with {SCORES_TABLE.name}.\n", True
    else:
        raise UserError(
            f"{REPORT} and {SCORES_TABLE} are not in git at {base}, so there is nothing to compare with: commit them there,"
            " name another revision by --base, or pass --allow-missing-base for the change that brings the first report"
        )
    return f"## HELM evaluation against `{base}`\n\n{text}\n### `dvc metrics diff`\n\n{metrics_diff(base)}\n", passed


def metrics_diff(revision: str) -> str:
    """What `dvc metrics diff REVISION --md` prints."""
    command = [sys.executable, "-m", "dvc", "metrics", "diff", revision, "--md"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"`dvc metrics diff {revision} --md` failed:\n\n```\n{done.stderr.strip()}\n```"
    return done.stdout.strip() or "No metric changed."
