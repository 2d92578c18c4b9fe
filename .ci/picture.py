"""Draw the scores with their 95 % intervals as text, for a pull request's comment.

    python .ci/picture.py [BASE]

A comment on GitHub shows no picture that is in it (data: addresses are taken out), only who is logged in can see a run's
files, and a branch for pictures would need a token that writes. Mermaid's charts have no intervals. So it is drawn in
letters, which the run's summary, e-mails and terminals show too.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPORT = "reports/evaluation.json"
WIDTH = 50


def line(name: str, found: Mapping[str, float], low: float, high: float) -> str:
    """Draw one interval between the scale's ends: `|-o-|`, or what of it there is room for."""
    ends = (found["low"], found["mean"], found["high"])
    start, middle, end = (round((value - low) / (high - low or 1) * (WIDTH - 1)) for value in ends)
    drawn = [" "] * WIDTH
    drawn[start : end + 1] = "-" * (end + 1 - start)
    drawn[start] = drawn[end] = "|"
    drawn[middle] = "o"
    return f"{name:30} {''.join(drawn)} {found['mean']:.4f}"


def picture(new: Mapping[str, Any], base: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the lines: for each score the model's, here and at the base, overall and by type, then the baselines'."""
    for metric, answerers in new["intervals"].items():
        before = (base or {}).get("intervals", {}).get(metric, {})
        rows = {"model": answerers["model"]["overall"]}
        rows |= {"model at the base": before["model"]["overall"]} if before else {}
        rows |= {f"model, {kind}": found for kind, found in answerers["model"]["per_answer_type"].items()}
        rows |= {name.replace("_", " "): found["overall"] for name, found in answerers.items() if name != "model"}
        low, high = min(row["low"] for row in rows.values()), max(row["high"] for row in rows.values())
        yield f"{metric:30} {low:<{WIDTH // 2}.4f}{high:>{WIDTH - WIDTH // 2}.4f}"
        yield from (line(name[:30], row, low, high) for name, row in rows.items())
        yield ""


def main(base: str = "HEAD") -> None:
    """Print the picture as Markdown."""
    new = json.loads(Path(REPORT).read_text(encoding="utf-8"))
    shown = subprocess.run(["git", "show", f"{base}:./{REPORT}"], capture_output=True, text=True, check=False)
    lines = picture(new, json.loads(shown.stdout) if shown.returncode == 0 else None)
    print("\n".join(["", "### Scores with their 95 % intervals", "", "```", *lines][:-1] + ["```"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
