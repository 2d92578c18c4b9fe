"""GitHub's runner and its `gh`, as far as our workflows need them: the `run:` steps of a job, in a folder here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

# Of helm-eval.yml: what its comment begins with, and what GitHub would put in for pull request 7.
MARKER = "<!-- HELM evaluation of VLM-VQA -->"
EXPRESSIONS = {
    "vars.HELM_EVAL_WHEELS || 'cpu'": "cpu",
    "inputs.mode != 'default' && inputs.mode || vars.HELM_EVAL_MODE || 'reproduce'": "pull",
    "github.event.pull_request.base.sha || inputs.base": "HEAD~1",
    "secrets.DVC_CONFIG_LOCAL": "[core]\n    no_scm = false",
    "github.token": "a token that comments",
    "github.repository": "me/project",
    "github.event.pull_request.number": "7",
    "github.event.pull_request.head.sha": "abc",
    "github.server_url": "https://hub",
    "github.run_id": "1",
    "needs.evaluate.outputs.reports": "https://hub/artifact",
}

# `gh api` over a file of comments.
GH = """#!{python}
import json, os, re, sys
from pathlib import Path

assert os.environ["GH_TOKEN"] and sys.argv[1] == "api", sys.argv
store, words = Path({store!r}), sys.argv[2:]
comments, option = json.loads(store.read_text()), lambda name: words[words.index(name) + 1]
place = next(word for word in words if word.startswith("repos/"))
if "--method" not in words:
    assert "--paginate" in words and place == "repos/me/project/issues/7/comments?per_page=100", words
    of_whom = r'select\\(\\.user\\.type == "(\\w+)" and \\(\\.body \\| startswith\\("(.*)"\\)\\)\\)'
    wanted = re.fullmatch(rf"\\.\\[\\] \\| {{of_whom}} \\| \\.id", option("--jq"))
    print(*[one["id"] for one in comments if one["user"] == wanted[1] and one["body"].startswith(wanted[2])], sep="\\n")
else:
    body = Path(option("--field").removeprefix("body=@")).read_text()
    if option("--method") == "POST":
        assert place == "repos/me/project/issues/7/comments"
        comments.append({{"id": len(comments), "user": "Bot", "body": body}})
    else:
        comments[int(place.removeprefix("repos/me/project/issues/comments/"))]["body"] = body
    store.write_text(json.dumps(comments))
"""


class Runner:
    """Runs jobs of a workflow in `folder`; `temp` is the job's RUNNER_TEMP, `comments` are those of pull request 7."""

    def __init__(self, workflow: Path, temp: Path):
        self.jobs = yaml.safe_load(workflow.read_text())["jobs"]
        self.temp, self._store = temp, temp / "comments.json"
        temp.mkdir()
        programs = temp / "programs"
        programs.mkdir()
        (programs / "gh").write_text(GH.format(python=sys.executable, store=str(self._store)))
        (programs / "gh").chmod(0o755)
        self.path = f"{programs}{os.pathsep}{os.environ['PATH']}"

    @property
    def comments(self) -> list[dict]:
        return json.loads(self._store.read_text())

    @comments.setter
    def comments(self, value: list[dict]) -> None:
        self._store.write_text(json.dumps(value))

    def run(self, job: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
        """Run a job's steps until one fails, and those that always run; return its code and what all have said."""
        given = self._filled(self.jobs[job].get("env", {}))
        common = {**environment, **given, "PATH": self.path, "RUNNER_TEMP": str(self.temp)}
        common["GITHUB_STEP_SUMMARY"] = str(self.temp / "summary.md")
        conditions = {None: True, "always()": True, "env.MODE == 'pull'": given.get("MODE") == "pull"}
        outcome = subprocess.CompletedProcess(job, 0, "", "")
        for step in (step for step in self.jobs[job]["steps"] if "run" in step):
            if not conditions[step.get("if")] or outcome.returncode and step.get("if") != "always()":
                continue
            done = subprocess.run(
                ["bash", "-e", "-c", step["run"]], cwd=folder, env={**common, **self._filled(step.get("env", {}))},
                capture_output=True, text=True, timeout=900,
            )  # fmt: skip
            outcome.returncode = outcome.returncode or done.returncode
            outcome.stdout, outcome.stderr = outcome.stdout + done.stdout, outcome.stderr + done.stderr
        return outcome

    def _filled(self, values: dict[str, str]) -> dict[str, str]:
        """Put in what GitHub would; an expression that is not known is a KeyError."""
        return {
            name: re.sub(r"\$\{\{ *(.*?) *\}\}", lambda found: EXPRESSIONS[found[1]], str(value))
            for name, value in values.items()
        }
