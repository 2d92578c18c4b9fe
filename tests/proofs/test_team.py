"""The proof of a team's servers sees passwords, and says what it needs; servers start in the proof alone."""

import subprocess
import sys
import time

import pytest

from proofs import team
from vlm_vqa.errors import UserError

WORD = "sesame0123"


def test_a_password_in_a_command_line_is_seen():
    with team.Watch([WORD, "another"]) as watch:
        process = subprocess.Popen([sys.executable, "-c", "input()", f"--password={WORD}"], stdin=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while not watch.found and time.monotonic() < deadline:
            time.sleep(0.05)
        process.communicate(b"\n")
    assert watch.found == {WORD} and watch.looks


def test_a_password_in_a_file_is_seen(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/model.bin").write_bytes(b"\xff\0" + WORD.encode() + b"\0")
    (tmp_path / "b.txt").write_text("nothing")
    assert team.holding(WORD, team.files(tmp_path)) == ["a/model.bin"]


def test_the_servers_are_those_of_compose_and_no_command_holds_a_password(tmp_path, monkeypatch):
    monkeypatch.setattr(team, "postgres", lambda name: name)
    servers = team.Servers(tmp_path, dict.fromkeys(team.SECRETS, WORD))
    try:
        command = " ".join(servers._mlflow)
        assert "--app-name=basic-auth --host=127.0.0.1" in command and "@127.0.0.1:" in command
        assert "postgres:5432" not in command + servers._auth.read_text() and WORD not in command
    finally:
        servers.__exit__()
    assert not servers.data.exists()


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(team, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(UserError, match=r"not installed: no_such_package\. .*dev"):
        team.check_installed()
