"""What SECURITY.md promises of the code as a whole: no code of strangers is run, no pickle is read."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for part in ("src", "stages", "evaluation", "benchmarks", "proofs") for path in (ROOT / part).rglob("*.py")
)

# Calls that would run, or whose default decides whether to run, what lies in a file or on the hub.
FETCHING = {"from_pretrained", "load_dataset", "load_dataset_builder", "pipeline"}
NEVER = set("eval exec os.system pickle.load pickle.loads dill.load joblib.load yaml.load yaml.unsafe_load".split())


def calls(source):
    """Yield (line, dotted name, keywords) of all calls in a program."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def careless(source):
    """Yield the calls that trust what they read."""
    for line, name, keywords in calls(source):
        last = name.rpartition(".")[2]
        if name in NEVER or keywords.get("allow_pickle") == "True":
            yield line, name
        if last in FETCHING and keywords.get("trust_remote_code") != "False":
            yield line, name
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield line, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_is_read_can_run(path):
    assert list(careless(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "AutoModel.from_pretrained(folder)", "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "datasets.load_dataset('parquet')", "transformers.pipeline('x', trust_remote_code=given)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "pickle.loads(data)", "yaml.load(text)",
        "numpy.load(path, allow_pickle=True)",
    ],
)  # fmt: skip
def test_carelessness_is_seen(source):
    assert len(list(careless(source))) == 1


def test_the_audit_s_exceptions_are_those_that_the_document_explains():
    accepted = set(re.findall(r"CVE-\d+-\d+", (ROOT / "scripts/audit").read_text()))
    explained = (ROOT / "SECURITY.md").read_text().partition("## Dependencies")[2]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert accepted and accepted <= set(re.findall(r"CVE-\d+-\d+", explained))
    for package in re.findall(r"^\| `([\w.-]+==[\w.-]+)` ", explained, re.M):
        assert package in pinned, "SECURITY.md speaks of another version than the one that is installed"
