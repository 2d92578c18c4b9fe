"""A DVC project of two stub stages, made in seconds, for what is about DVC's files and not about the stages."""

import os
import subprocess
import sys
from pathlib import Path

DVC_YAML = """
stages:
  make:
    cmd: python stub.py make
    outs: [data/made]
  report:
    cmd: python stub.py report
    deps: [data/made]
    outs:
      - model.bin
      - metrics.json: {cache: false}
      - report: {cache: false}
"""
STUB = """
import sys, time
from pathlib import Path

def write(**files):
    for name, text in files.items():
        path = Path(name.replace("__", "/").replace("_", "."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text * 99)

if sys.argv[1] == "make":
    write(data__made__a="a", data__made__deep__b="b", data__made__c="c")
else:
    write(model_bin="m", metrics_json="j", report__x_json="x", report__y_json="y")
with open(".git/runs", "a") as runs:
    print(sys.argv[1], file=runs)
time.sleep(float(Path(".git/sleep").read_text()) if Path(".git/sleep").exists() else 0)
"""


class DvcProject:
    """The project in `folder`; its `dvc.lock` is written."""

    def __init__(self, folder: Path, links: str = "hardlink,symlink"):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dvc.yaml").write_text(DVC_YAML)
        (folder / "stub.py").write_text(STUB)
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        (folder / ".dvc").mkdir()
        (folder / ".dvc/config").write_text(f'[core]\n    analytics = false\n[cache]\n    type = "{links}"\n')
        self.dvc("repro")
        self.git("add", "metrics.json", "report")
        self.git("commit", "-qm", "reports")
        self.lock = (folder / "dvc.lock").read_bytes()
        self.made = self.contents()

    def environment(self) -> dict[str, str]:
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": programs, "DVC_SITE_CACHE_DIR": str(self.folder / ".git/site")}

    def dvc(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["dvc", *words], cwd=self.folder, env=self.environment(), check=True, capture_output=True, text=True
        )

    def git(self, *words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=self.folder, check=True)

    def contents(self) -> dict[str, bytes]:
        """Return every output's file by its path."""
        names = ("data/made/a", "data/made/deep/b", "data/made/c", "model.bin", "metrics.json", "report/x.json")
        return {name: (self.folder / name).read_bytes() for name in (*names, "report/y.json")}

    def runs(self) -> int:
        """Return how many stages have run."""
        return len((self.folder / ".git/runs").read_text().split())

    def stored(self, name: str) -> Path:
        """Return the object of DVC's cache that an output's file, or the list of a folder, is."""
        import hashlib
        import re

        if name in self.made:
            value = hashlib.md5(self.made[name]).hexdigest()
        else:
            value = re.search(rf"path: {name}\n +hash: md5\n +md5: (\S+)", self.lock.decode())[1]
        return self.folder / ".dvc/cache/files/md5" / value[:2] / value[2:]


def flip(path: Path, keep_time: bool) -> None:
    """Flip one bit of a file, its mode kept and, if asked, its time."""
    found = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 4]))
    path.chmod(found.st_mode & 0o777)
    if keep_time:
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
