"""What we claim about what comes out, as programs: `python -m proofs` lists them, `python -m proofs NAME ...` runs some.

Here belongs a claim that no short test can settle: the same result under every launch, after every kill, with every flipped
bit, at full scale. A proof draws its cases from a seed, says how many it ran, and writes `NAME.json` beside the benchmarks'
results; each has a test in tests/proofs that runs it with the least counts.

What is about speed or memory belongs in `benchmarks`, one case that everybody should see pass in `tests`. Nothing here is
imported by the package or its stages, and proofs import neither stages nor tests: they use the package as any user may, and
the stages through `proofs.project`, a temporary copy of the project in which commands run.
"""

# A proof ends as a benchmark does: after a mistake in one line, after Ctrl-C without a traceback.
from benchmarks import end

__all__ = ["end"]
