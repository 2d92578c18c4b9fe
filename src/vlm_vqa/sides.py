"""What `vlm-vqa compare` compares: a folder's reports, a git revision's, a DVC experiment's or an MLflow run's."""

import io
import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.differences import REPORT, SCORES_TABLE, Side
from vlm_vqa.evaluation.helm.files import read_table
from vlm_vqa.params import flatten, parse_params
from vlm_vqa.tracking.describe import param_text
from vlm_vqa.tracking.evaluated import Evaluated, find_evaluated

PREDICTIONS, MANIFEST, PARAMS = "reports/predictions.parquet", "data/records/manifest.json", "params.yaml"
EXPERIMENTS = "refs/exps/"

Read = Callable[[str], bytes | None]  # gives a file by its place in the project, or None
Asked = tuple[str, Read, Mapping[str, str] | None, str | None]  # the arguments of `_side`


def side_of(name: str) -> Side:
    """Return the side of this name, which may begin with its kind: `folder:`, `git:`, `exp:` or `run:`.

    UserError: nothing or more than one thing has the name, or it holds no evaluation.
    """
    kind, _, rest = name.partition(":")
    kinds, name = ([kind], rest) if kind in KINDS else (list(KINDS), name)
    found = {kind: one for kind in kinds if (one := KINDS[kind](name)) is not None}
    if not found:
        words = (
            f"{kind} of that name" if kind in KINDS else "folder of reports, git revision, DVC experiment or MLflow run"
        )
        raise UserError(
            f"{name}: there is no {words} here. `git fetch`, `dvc exp pull`, MLFLOW_TRACKING_URI bring others."
        )
    if len(found) > 1:
        ways = " or ".join(f"{kind}:{name}" for kind in found)
        raise UserError(f"{name} is the name of more than one thing: say which, by {ways}.")
    return _side(*next(iter(found.values())))


def working_tree() -> Side:
    """Return the checkout as it is."""
    return _side("the working tree", lambda place: _bytes(Path(place)))


def committed(revision: str) -> Side | None:
    """Return what git alone has of a revision, None where it has no scores; UserError where it knows no such revision."""
    if (commit := _commit(revision)) is None:
        raise UserError(f"git knows no revision {revision!r} here: `git fetch` it, or name another by --base")
    files = {
        place: _git("show", f"{commit}:./{place}") for place in (REPORT.as_posix(), SCORES_TABLE.as_posix(), PARAMS)
    }
    return None if None in list(files.values())[:2] else _side(f"git revision {revision}", files.get)


def side_of_run(run: Evaluated) -> Side:
    """Return what MLflow holds of an evaluated model."""
    return _side(*_of_run(run))


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _git(*arguments: str) -> bytes | None:
    done = subprocess.run(["git", *arguments], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _folder(name: str) -> Asked | None:
    """A checkout, its `reports`, or a folder that holds what those hold."""
    folder = Path(name)
    if name and folder.resolve().name == "reports" and not (folder / REPORT).is_file():
        folder = folder.resolve().parent
    for cut in ("", "reports/"):
        if name and (folder / REPORT.as_posix().removeprefix(cut)).is_file():
            return f"folder {name}", lambda place, cut=cut: _bytes(folder / place.removeprefix(cut)), None, None
    return None


def _commit(name: str) -> str | None:
    found = None if name.startswith("-") else _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    return None if found is None else found.decode().strip()


def _revision(name: str, shown: str = "") -> Asked | None:
    if (commit := _commit(name)) is None:
        return None
    return shown or f"git revision {name}", lambda place: _at(commit, place), None, None


def _at(commit: str, place: str) -> bytes | None:
    """Return a file that git has, or DVC's cache or remote, at a commit."""
    if (content := _git("show", f"{commit}:./{place}")) is not None:
        return content
    import dvc.api

    try:
        return dvc.api.read(place, rev=commit, mode="rb")
    except Exception:  # noqa: BLE001 - DVC's own and those of its parts and remotes: it is not to be had
        return None


def _experiment(name: str) -> Asked | None:
    refs = (_git("for-each-ref", "--format=%(refname)", EXPERIMENTS) or b"").decode().split()
    found = [ref for ref in refs if ref.rpartition("/")[2] == name and not ref.startswith(f"{EXPERIMENTS}exec/")]
    if len(found) > 1:
        ways = " or ".join(f"git:{one}" for one in found)
        raise UserError(f"{len(found)} experiments are called {name}: say which, by {ways}.")
    return _revision(found[0], f"experiment {name}") if found else None


def _run(name: str) -> Asked | None:
    run = find_evaluated(name) if re.fullmatch("[0-9a-f]{32}", name) else None
    return None if run is None else _of_run(run)


def _of_run(run: Evaluated) -> Asked:
    return f"run {run.run_id}", run.files.get, run.params, run.tags.get("data_hash")


KINDS = {"folder": _folder, "git": _revision, "exp": _experiment, "run": _run}


def _side(name: str, read: Read, params: Mapping[str, str] | None = None, data_hash: str | None = None) -> Side:
    """Read a side; UserError if it was not evaluated, or by a version that kept no scores by question."""

    def table(place: str) -> Any:
        content = read(place)
        return None if content is None else read_table(io.BytesIO(content), f"{name}: {place}").sort_by("question_id")

    report, scores, predictions = read(REPORT.as_posix()), table(SCORES_TABLE.as_posix()), table(PREDICTIONS)
    if report is None or scores is None:
        place = REPORT if report is None else SCORES_TABLE
        raise UserError(
            f"{name} has no {place}: it was not evaluated, or by an earlier version. `dvc repro` evaluates."
        )
    if predictions is not None and not all(
        predictions[column].equals(scores[column]) for column in ("question_id", "prediction")
    ):
        predictions = None  # DVC's outputs are of another revision than git's files
    try:
        if params is None:
            params = _params(read(PARAMS))
            data_hash = json.loads(read(MANIFEST) or "{}").get("data_hash")
        return Side(name, json.loads(report), scores, predictions, params, data_hash)
    except (ValueError, YAMLError) as error:
        raise UserError(f"{name}: a file cannot be read ({' '.join(str(error).split())})") from error


def _params(content: bytes | None) -> dict[str, str]:
    """Return the parameters of a file as MLflow has them, with what an earlier version's file lacks."""
    if content is None:
        return {}
    values = YAML(typ="safe", pure=True).load(content.decode())
    try:
        flat = parse_params(values).flat()
    except UserError:  # of a version that knows others
        flat = dict(flatten(values))
    return {key: param_text(value) for key, value in flat.items()}
