"""Dockerfile, compose.yaml and requirements.lock, as far as they can be checked where no Docker runs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
TEXT = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
STEPS = [tuple(line.split(maxsplit=1)) for line in TEXT.splitlines() if line and not line.startswith("#")]


def lines(name):
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def pinned(name):
    text = (ROOT / name).read_text()
    found = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", text, re.MULTILINE)
    return {re.sub("[-_.]+", "-", package).lower(): version for package, version in found}


def test_the_lock_has_the_hashes_of_what_is_pinned():
    assert pinned("requirements.lock") == pinned("constraints.txt")
    for entry in re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip()):
        assert entry.startswith("#") or re.fullmatch(r"\S+==\S+( ; .+?)?( \\\n +--hash=sha256:[0-9a-f]{64})+", entry), (
            entry
        )


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_make_installs_the_lock_and_nothing_beside_it(installer):
    command = ["make", "--dry-run", "setup", "VENV=nowhere", "LOCKED=yes", f"INSTALLER={installer}", "WHEELS=cuda"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    hashed, project = re.findall(r"pip install .*", said)
    assert hashed.endswith("--no-deps --require-hashes --requirement requirements.lock")
    assert project.endswith("--no-deps --no-build-isolation --editable .") and "constraint" not in project


def test_the_lock_is_not_for_cpu_wheels(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "setup", "LOCKED=yes", "WHEELS=cpu", "PYTHON=false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode and "leave WHEELS or LOCKED out" in done.stderr


def test_the_image_is_made_by_make_as_a_user_without_rights():
    names = [name for name, _ in STEPS]
    user = names.index("USER")
    assert names.count("USER") == 1 and STEPS[user] == ("USER", "10001") and "--uid 10001" in TEXT
    after = [words for name, words in STEPS[user:] if name in ("RUN", "CMD")]
    assert after == ["make setup INSTALLER=uv LOCKED=yes", '["make", "repro"]']
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{name} \?=", makefile, re.MULTILINE) for name in ("INSTALLER", "LOCKED"))
    # What root does brings no Python package.
    assert not re.search(r"\b(pip|uv|curl|wget)\b", " ".join(words for name, words in STEPS[:user] if name == "RUN"))
    images = [words.partition("=")[2] for name, words in STEPS if name == "ARG"]
    assert all(re.fullmatch(r"\S+:\d+\.\d+\S*", image) for image in images) and len(images) == 2
    assert all(words.startswith("${") for name, words in STEPS if name == "FROM")


def test_the_image_leaves_out_what_git_does_and_all_that_may_hold_a_password():
    left_out = {line.strip("/") for line in lines(".dockerignore")}
    for folder in ("", ".dvc/"):
        for line in lines(f"{folder}.gitignore"):
            kept, name = "!" * line.startswith("!"), f"{folder}{line.strip('!/')}"
            assert {f"{kept}{name}", f"**/{name}"} & left_out, name
    assert {".git/config", ".dvc/config.local", ".env"} <= left_out and ".git" not in left_out


def test_compose_names_versions_and_what_it_names_is_there():
    services = COMPOSE["services"]
    for service in services.values():
        assert "build" in service or re.fullmatch(r"\S+:(\d+\.\d+|RELEASE\.\d{4})\S*", service["image"])
        assert set(service.get("depends_on", {})) <= set(services)
        assert {one["source"] for one in service.get("configs", [])} <= set(COMPOSE["configs"])
        assert {one.partition(":")[0] for one in service.get("volumes", [])} <= set(COMPOSE["volumes"])
        assert all(port.startswith("${TEAM_ADDRESS:-127.0.0.1}:") for port in service.get("ports", []))


def test_compose_holds_no_password_and_asks_for_each():
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY|_USER$", name):
                assert re.fullmatch(r"\$\{[A-Z0-9_]+:\?write it into \.env\}", value), name
        assert "$" not in str(service.get("command", ""))
    asked = set(re.findall(r"\$\{([A-Z0-9_]+):\?", (ROOT / "compose.yaml").read_text()))
    page = (ROOT / "docs/team.md").read_text()
    assert all(name in page for name in asked)
    assert "/.env" in lines(".gitignore")
