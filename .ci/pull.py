"""Bring what helm-eval reads from the DVC remote, once dvc.lock belongs to the committed parameters, code and data.

    python .ci/pull.py [MARKDOWN]

The machine that trained has committed dvc.lock and pushed (`dvc push`); here nothing is trained. What is here already is
not asked for again, so a second call needs no access to the remote. Exit code 0: all is here; 1: it is not, and why is
printed, and written to MARKDOWN for the pull request.
"""

import re
import subprocess
import sys
from pathlib import Path

import current
import yaml

from vlm_vqa.secrets import without_secrets

STAGE = "helm-eval"
STALE = (
    "dvc.lock does not belong to the committed parameters, code and data, so no model of theirs is there to evaluate. Where "
    "models are trained, run `dvc repro export`, `dvc push`, and commit dvc.lock and reports/. What differs, by stage:"
)
NO_REMOTE = (
    "This checkout names no DVC remote. Where the model was trained: `dvc remote add --default NAME URL`, commit "
    ".dvc/config, `dvc push`."
)
LACKS = (
    "The DVC remote {remote} does not have all of {lacking}, or does not show it (some kinds of remotes answer both alike). "
    "Where the model was trained, run `dvc push`; if that finds everything up to date, look at the remote's address and at "
    "who may read it."
)
REFUSED = (
    "The DVC remote {remote} did not let us in. On GitHub the secret DVC_CONFIG_LOCAL holds what .dvc/config.local would, "
    "for an account that reads; pull requests from forks get no secrets. Elsewhere: `dvc remote modify --local`."
)
PLUGIN = (
    "The DVC remote {remote} needs the package {package}: list it beside dvc in pyproject.toml and constraints.txt."
)
OTHER = "`dvc pull` from {remote} failed."


def reason(said: str, lacking: str, remote: str) -> str:
    """Say in a sentence what DVC's words of a failed pull mean."""
    if "No remote provided" in said:
        return NO_REMOTE
    if found := re.search(r"requires '(dvc-[\w-]+)' to be installed", said):
        return PLUGIN.format(remote=remote, package=found[1])
    if re.search(r"credential|denied|forbidden|unauthori[sz]ed|authenti|\b40[13]\b|login", said, re.IGNORECASE):
        return REFUSED.format(remote=remote)
    if re.search(r"do not exist neither locally nor on remote|No such file|failed to download", said):
        return LACKS.format(remote=remote, lacking=lacking)
    return OTHER.format(remote=remote)


def problem() -> tuple[str, str]:
    """Check and pull; return a sentence that says why not and the details, both empty where all is here."""
    lines, unseen = current.check(but=STAGE)
    if lines:
        return STALE, "\n".join(lines)
    for path in unseen:
        print(f"{path} is not here: whether it is still what dvc.lock says cannot be looked at")
    stages = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    committed = current.in_git({"stages": stages})
    made = {path for stage in stages.values() for path, _ in current.outputs(stage)} - committed
    read = sorted(made & set(stages[STAGE]["deps"]))
    remotes = _dvc("remote", "list").stdout.splitlines()
    remote = next((line.split()[0] for line in remotes if "(default)" in line), "(none)")
    print(f"pulling {', '.join(read)} from {remote}", flush=True)
    done = _dvc("pull", *read)
    if done.returncode == 0:
        return "", ""
    lacking = ", ".join([path for path in read if not Path(path).exists()] or read)
    return reason(done.stderr + done.stdout, lacking, remote), without_secrets(done.stderr.strip())


def _dvc(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True, check=False)


def main(markdown: Path | None = None) -> int:
    """Print the outcome and return the exit code."""
    try:
        sentence, details = problem()
    except RuntimeError as error:
        sentence, details = "The checkout cannot be looked at.", str(error)
    if not sentence:
        return 0
    print(f"{sentence}\n{details}", file=sys.stderr)
    if markdown:
        markdown.write_text(f"## HELM evaluation: not run\n\n{sentence}\n\n```\n{details}\n```\n", encoding="utf-8")
    return 1


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
