"""`dvc repro` as a user runs it: all five stages on real VQAv2 pictures, once; then only what a change asks for."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from proofs.project import ROOT, Project, sample_params
from tests import golden
from tests.dvc_project import flip
from tests.workflow import MARKER, Runner
from vlm_vqa.hashing import code_hash, imported
from vlm_vqa.training.trainer import CURVE_COLUMNS, write_curve
from vlm_vqa.training.validation import COLUMNS, LOSS, SCORE

STAGES = ["fetch-vqav2", "extract-features", "train", "export", "helm-eval"]


def test_the_five_stages_stand_in_order():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list(stages) == STAGES
    for name, stage in stages.items():
        assert f"stages/{name.replace('-', '_')}.py" in stage["deps"]


PAGES = [f"src/vlm_vqa/{name}.html.j2" for name in ("data/page", "fetch/data_report")]
REPORT = [f"src/vlm_vqa/evaluation/{name}.j2" for name in ("report", "report_html", "report_md")]
TEMPLATES = ["src/vlm_vqa/inference/card.md", "src/vlm_vqa/inference/chat_template.jinja"]
CLIENT = "src/vlm_vqa/evaluation/helm/client.py"
SMALL = [
    f"src/vlm_vqa/model/small_encoder/{name}"
    for name in ("config.json", "model.safetensors", "preprocessor_config.json")
]
READ = {
    "fetch-vqav2": PAGES,
    "extract-features": SMALL,
    "train": SMALL,
    "export": [*TEMPLATES, *SMALL],
    "helm-eval": [PAGES[0], *REPORT],
}
"""What a stage reads of the package beside Python files."""


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_what_it_imports_and_no_more(name):
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][name]["deps"]
    sources = [f"stages/{name.replace('-', '_')}.py", *([CLIENT] if name == "helm-eval" else [])]
    imports = {path.relative_to(ROOT).as_posix() for source in sources for path in imported(ROOT / source)}
    assert {path for path in deps if path.startswith(("src/", "stages/")) or path == CLIENT} == {
        *sources, *imports, *READ[name],
    }  # fmt: skip


OUTPUTS = ("data/records/manifest.json", "data/features/manifest.json", "models/trained/training.json", "reports/train.json",
           "reports/train_curve.csv", "reports/validation/curve.csv", "models/export/vlm_vqa.json", "reports/metrics.json",
           "reports/predictions.parquet", "reports/helm_predictions.parquet", "reports/evaluation.json",
           "reports/scores.parquet", "reports/helm/stats.json", "reports/report.html", "reports/report.md",
           "reports/calibration.csv")  # fmt: skip


def test_a_comment_reruns_what_imports_it_and_no_more(tmp_path, shared_data):
    project = Project(tmp_path, sample_params(shared_data))
    for name in OUTPUTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert project.command("dvc commit --force --quiet").returncode == 0

    def stale_after(*names: str) -> list[str]:
        for name in names:
            with open(tmp_path / "src/vlm_vqa" / name, "a") as file:
                file.write("# A comment\n")
        return list(json.loads(project.command("dvc status --json").stdout))

    assert stale_after("cli.py", "errors.py", "tracking/store.py", "model/small_encoder/README.md") == []
    assert stale_after("training/sampler.py") == ["train"]
    assert stale_after("fetch/sources/table.py", "evaluation/bleu.py") == ["fetch-vqav2", "train", "helm-eval"]


def test_dvc_plots_draw_training_and_validation_together_and_what_is_there_where_one_is_not(tmp_path):
    project = Project(tmp_path, {})
    curves = tmp_path / "reports/train_curve.csv", tmp_path / "reports/validation/curve.csv"
    curves[1].parent.mkdir(parents=True)
    write_curve([{"step": 1, "loss": 2.0, "learning_rate": 1e-3}], curves[0], "loss", CURVE_COLUMNS)

    def drawn():
        """Return by plot the curves that are in it, each as pairs of step and value, and the pictures."""
        done = project.command("dvc plots show --json")
        assert done.returncode == 0, done.stderr
        found = {}
        for name, plot in ((name, plot) for name, plots in json.loads(done.stdout)["data"].items() for plot in plots):
            found[name] = plot.get("url") and Path(plot["url"]).read_bytes()
            for row in plot["content"]["data"]["values"] if "content" in plot else ():
                curve = row.get("filename::field", row.get("field"))
                found[name] = {**(found[name] or {}), curve: (row["step"], row.get("dvc_inferred_y_value"))}
        return found

    trained = {"Loss": {"train_curve.csv::loss": ("1", "2.0")}, "reports/train_curve.csv": {None: ("1", None)}}
    assert {name: what for name, what in drawn().items() if what} == trained
    write_curve([{"step": 1, SCORE: 0.5, LOSS: 3.0, "validation_blind_score": 0.2}], curves[1], SCORE, COLUMNS)
    (tmp_path / "reports/validation/answers.png").write_bytes(b"png")
    both = drawn()
    assert both["Loss"] == trained["Loss"] | {
        "validation/curve.csv::validation_loss": ("1", "3.0"), "validation/curve.csv::train_part_loss": ("1", "nan"),
    }  # fmt: skip
    scores = {SCORE: "0.5", "validation_blind_score": "0.2", "train_part_score": "nan"}
    assert both["Score"] == {name: ("1", value) for name, value in scores.items()}
    assert both["reports/validation/answers.png"] == b"png"


def test_a_stages_code_is_what_it_imports_wherever_the_import_stands(tmp_path):
    """Imports in functions count, those of imported modules too, rooms' docstrings and what decides nothing do not."""
    stage = tmp_path / "stage.py"
    stage.write_text(
        "def main():\n    from vlm_vqa.data import records; from vlm_vqa import prefetch\n    import vlm_vqa.errors\n"
    )
    names = [path.name for path in imported(stage)]
    assert (
        "prefetch.py" in names
        and "sealed.py" in names
        and not {"__init__.py", "errors.py", "write_records.py"} & {*names}
    )
    before = code_hash(stage)
    assert before == code_hash(stage)
    stage.write_text(stage.read_text() + "# A comment\n")
    assert code_hash(stage) != before != code_hash(ROOT / "stages/export.py")


def stages_run(project, *options, terminal=None):
    """Return the stages that `dvc repro` runs now; all that a terminal would show is added to `terminal`."""
    done = project.command(" ".join(["dvc repro", *options, "2>&1"]))
    assert done.returncode == 0, done.stdout[-4000:]
    if terminal is not None:
        terminal.append(done.stdout)
    return [name for name in STAGES if f"Running stage '{name}'" in done.stdout]


@pytest.mark.slow
def test_real_pictures_through_all_stages(tmp_path, tmp_path_factory, shared_data):
    project = Project(tmp_path, sample_params(shared_data))
    terminal = []
    assert stages_run(project, terminal=terminal) == STAGES
    report = json.loads((tmp_path / "reports/evaluation.json").read_text())
    assert set(report["helm"]) == {
        "bleu_1", "bleu_4", "exact_match", "quasi_exact_match", "quasi_prefix_exact_match", "f1_score", "rouge_l",
        "instances",
    }  # fmt: skip
    assert report["helm"]["instances"] == 20
    assert report["vqa_accuracy"]["questions"] == 109
    # Blind answers counted on the very questions they are scored on; a broken scorer or a broken count falls below.
    assert report["baselines"]["prior"]["vqa_accuracy"] > 0.5
    assert (tmp_path / "mlflow.db").is_file()
    assert not list((tmp_path / "checkpoints").glob("*/*")), "checkpoints go when the stage has succeeded"

    # Two clones must write the same bytes: no output may know where it was made.
    outputs = [
        path for name in ("data", "models", "reports") for path in (tmp_path / name).rglob("*") if path.is_file()
    ]
    assert len(outputs) > 15
    assert not [path for path in outputs if str(tmp_path).encode() in path.read_bytes()]

    # New lines are ours or they go: see tests/golden.py.
    assert not (found := golden.check(*terminal)), found

    assert stages_run(project) == []
    project.set({"evaluation.batch_size": 7})
    assert stages_run(project, "--dry") == ["helm-eval"]
    project.set({"evaluation.batch_size": 128, "tracking.experiment": "other"})
    assert stages_run(project, "--dry") == []
    project.set({"train.learning_rate": 1e-3})
    assert stages_run(project) == ["train", "export", "helm-eval"]
    compared_in_the_terminal(project)
    damaged_and_repaired(project)
    pulled_and_evaluated(project, tmp_path_factory.mktemp("ci"))


def damaged_and_repaired(project):
    """Damage that DVC does not see is found, and the command that is named makes what was there, whatever was made of it."""
    lock = (project.folder / "dvc.lock").read_bytes()
    vlm_vqa = f"{sys.executable} -m vlm_vqa.cli"
    for name in ("data/features/*.safetensors", "reports/metrics.json"):
        flip(next(project.folder.glob(name)), keep_time=True)
    found = project.command(f"{vlm_vqa} verify")
    assert found.returncode == 1 and "Run `vlm-vqa repair extract-features helm-eval`" in found.stdout
    done = project.command(f"{vlm_vqa} repair extract-features helm-eval 2>&1")
    ran = [name for name in STAGES if f"Running stage '{name}'" in done.stdout]
    assert done.returncode == 0 and ran == ["extract-features"], done.stdout[-4000:]
    assert project.command(f"{vlm_vqa} verify").returncode == 0
    assert (project.folder / "dvc.lock").read_bytes() == lock


def compared_in_the_terminal(project):
    """What DVC prints of scores fits a terminal of 100 columns."""
    scores = json.loads((project.folder / "reports/metrics.json").read_text())
    identity = "-c user.name=a -c user.email=a@b.c"
    done = project.command(f"git add *.yaml dvc.lock reports && git {identity} commit -qm run")
    assert done.returncode == 0, done.stderr
    experiments = re.search(r"dvc exp show .*", (ROOT / "Makefile").read_text()).group().replace("$$", "$")
    for command, columns in (
        ("dvc metrics show", scores),
        (experiments, ["train.learning_rate", "accuracy", "bleu_1"]),
    ):
        done = project.command(command, COLUMNS="100")
        lines = done.stdout.splitlines()
        assert len(lines) > 1 and max(map(len, lines)) <= 100 and "…" not in done.stdout, done.stdout + done.stderr
        assert set(columns) <= set(done.stdout.split()), done.stdout
    assert {"0.001", f"{scores['accuracy']:.5g}"} <= set(done.stdout.split())


def pulled_and_evaluated(box, folder):
    """A machine has trained and pushed; the workflow's own steps evaluate in a clone, train nothing, and comment once."""
    for name in (".ci", ".gitignore", "Makefile", "pyproject.toml", "constraints.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, box.folder / name)
    git = "git -c user.name=a -c user.email=a@b.c"
    done = box.command(
        f"dvc remote add --default store {folder}/store && git add . && {git} commit -qm run && dvc push"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    subprocess.run(["git", "clone", "--quiet", box.folder, folder / "clone"], check=True)
    clone = Project.at(folder / "clone")
    shared_environment(clone.folder / ".venv")

    runner = Runner(ROOT / ".github/workflows/helm-eval.yml", folder / "temp")
    others = [{"id": 0, "user": "User", "body": MARKER}, {"id": 1, "user": "Bot", "body": f"Other {MARKER}"}]
    runner.comments = others
    environment = clone.environment(PYTHONPATH="src:.", DVC_SITE_CACHE_DIR=str(folder / "site"))

    def evaluated():
        """Run both jobs, in between what GitHub's actions do."""
        shutil.rmtree(runner.temp / "comparison", ignore_errors=True)
        outcome = runner.run("evaluate", clone.folder, environment)
        (runner.temp / "comparison").mkdir()
        shutil.copy(runner.temp / "comparison.md", runner.temp / "comparison")
        commented = runner.run("comment", folder, environment)
        assert commented.returncode == 0, commented.stdout + commented.stderr
        assert len(runner.comments) == 3 and runner.comments[:2] == others
        return outcome, runner.comments[2]["body"]

    outcome, comment = evaluated()
    said = outcome.stdout + outcome.stderr
    assert outcome.returncode == 0, said[-4000:]
    assert [name for name in STAGES if f"Running stage '{name}'" in said] == ["helm-eval"]
    assert not (clone.folder / "models/trained").exists() and not (clone.folder / ".dvc/config.local").exists()
    # What is evaluated there is what was evaluated here, to the last byte.
    assert clone.command("git status --porcelain").stdout == ""
    assert comment.startswith(f"{MARKER}\n## HELM evaluation against `HEAD~1`") and "Passed: the interval of" in comment
    assert (
        "no difference shown" in comment
        and "Of commit abc: [the run](https://hub/me/project/actions/runs/1)" in comment
    )
    assert re.search(r"^model +[|o-]*o[|o-]* +\d\.\d{4}$", comment, re.M)
    assert "[all reports](https://hub/artifact)" in comment
    assert (runner.temp / "summary.md").read_text() in comment

    # Parameters that nobody has trained with: refused by name, in the same comment.
    clone.set({"train.weight_decay": 0.5})
    outcome, comment = evaluated()
    assert outcome.returncode == 1 and "dvc.lock does not belong to the committed parameters" in outcome.stderr
    assert 'train: changed deps: {"params.yaml": {"train": "modified"}}' in comment and "not run" in comment
    # A remote that lacks a file of the export.
    shutil.rmtree(clone.folder / "models")
    shutil.rmtree(clone.folder / ".dvc/cache")
    assert clone.command("git checkout params.yaml").returncode == 0
    md5 = re.search(r"path: models/export\n +hash: md5\n +md5: (\S+)", (clone.folder / "dvc.lock").read_text())[1]
    (folder / "store/files/md5" / md5[:2] / md5[2:]).unlink()
    outcome, comment = evaluated()
    assert outcome.returncode == 1 and "The DVC remote store does not have all of models/export" in comment
    assert "`dvc push`" in comment and md5 in comment


def shared_environment(folder):
    """Make an environment that is the tests' own, and that `make` finds ready."""
    folder.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / name).symlink_to(Path(sys.prefix) / name)
    (folder / ".ready").write_text("cpu\n")
