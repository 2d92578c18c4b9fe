"""One flipped bit in any output is found and mended by the command that is named, however DVC's cache is linked."""

import shutil

import pytest

from tests.dvc_project import DvcProject, flip
from vlm_vqa.cli import main

LINKS = ("hardlink,symlink", "symlink", "copy")


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    made = {}

    def project(links):
        if links not in made:
            made[links] = DvcProject(tmp_path_factory.mktemp("project"), links)
        return made[links]

    return project


@pytest.fixture
def project(projects, request, monkeypatch):
    project = projects(request.param)
    monkeypatch.chdir(project.folder)
    for name, value in project.environment().items():
        monkeypatch.setenv(name, value)
    return project


def command(capfd, *words):
    code = main(words)
    return code, capfd.readouterr().out


def check_mended(project, capfd):
    assert command(capfd, "verify") == (0, "4 outputs: every file is what dvc.lock records\n")
    assert project.contents() == project.made
    assert (project.folder / "dvc.lock").read_bytes() == project.lock


@pytest.mark.parametrize(
    ("project", "keep_time"), [(LINKS[0], True), (LINKS[0], False), (LINKS[1], True), (LINKS[2], True)],
    indirect=["project"],
)  # fmt: skip
def test_a_flipped_bit_in_each_kind_of_output(project, keep_time, capfd):
    damaged = ("data/made/deep/b", "model.bin", "metrics.json")
    for name in damaged:
        # In one call, files whose time tells of the change and others.
        flip(project.folder / name, keep_time == (name != "model.bin"))
    code, out = command(capfd, "verify")
    named = [line for line in out.splitlines() if line.endswith(": damaged")]
    assert code == 1 and len(named) == 3 and all(any(f" {name}:" in line for line in named) for name in damaged)
    assert "Run `vlm-vqa repair make report`" in out
    # DVC alone keeps what is linked damaged, whether it sees the change or not.
    if not keep_time:
        project.dvc("repro", "--force")
        assert project.folder.joinpath("model.bin").read_bytes() != project.made["model.bin"]
    assert command(capfd, "repair")[0] == 0
    check_mended(project, capfd)


@pytest.mark.parametrize("project", ["hardlink,symlink", "copy"], indirect=True)
def test_a_stage_of_which_a_copy_is_whole_does_not_run(project, capfd):
    runs, copies = project.runs(), project.folder.joinpath("data/made/a").stat().st_nlink == 1
    flip(project.stored("data/made"), keep_time=True)
    project.stored("data/made/c").unlink()
    if copies:
        flip(project.stored("data/made/a"), keep_time=True)
    code, out = command(capfd, "repair")
    assert code == 0 and out.count("written anew") == (3 if copies else 2)
    if copies:
        flip(project.folder / "data/made/deep/b", keep_time=True)
        assert command(capfd, "repair")[0] == 0
    for name in ("metrics.json", "report/x.json"):
        flip(project.folder / name, keep_time=True)
    code, out = command(capfd, "repair")
    assert code == 0 and out.count("written anew") == 2
    assert project.runs() == runs
    check_mended(project, capfd)


@pytest.mark.parametrize("project", LINKS[:1], indirect=True)
def test_a_damaged_list_of_a_folder_beside_a_damaged_file(project, capfd):
    flip(project.stored("data/made"), keep_time=True)
    flip(project.folder / "data/made/a", keep_time=True)
    code, out = command(capfd, "verify", "make")
    assert code == 1 and "list of the files of made is damaged or missing, and some differ" in out
    assert command(capfd, "repair", "make")[0] == 0
    check_mended(project, capfd)


@pytest.mark.parametrize("project", LINKS[:1], indirect=True)
def test_what_is_good_or_not_ours_stays(project, capfd):
    # Which file of a folder is damaged that only git would keep, and does not, nobody knows: it is moved, not removed.
    project.git("rm", "-rq", "--cached", "report")
    project.git("commit", "-qm", "no report")
    flip(project.folder / "report/x.json", keep_time=True)
    other, inode = project.folder / "data/made/notes.txt", (project.folder / "data/made/a").stat().st_ino
    other.write_text("mine")
    flip(project.folder / "model.bin", keep_time=True)
    code, out = command(capfd, "verify")
    assert (
        code == 1
        and "data/made/notes.txt: no part of the stage's output" in out
        and "list of the files of report is damaged" in out
    )
    assert main(["repair"]) == 2 and "move it away" in capfd.readouterr().err and other.exists()
    assert project.folder.joinpath("model.bin").exists()
    other.unlink()
    code, out = command(capfd, "repair", "--no-run", "report")
    assert code == 0 and "moved to report.damaged-" in out and not project.folder.joinpath("model.bin").exists()
    (aside,) = project.folder.glob("report.damaged-*")
    assert (aside / "y.json").read_bytes() == project.made["report/y.json"]
    assert command(capfd, "repair")[0] == 0
    assert project.folder.joinpath("data/made/a").stat().st_ino == inode
    check_mended(project, capfd)
    project.git("add", "report")
    project.git("commit", "-qm", "report")


@pytest.mark.parametrize("project", LINKS[:1], indirect=True)
def test_missing_files_unknown_stages_and_nothing_to_do(project, capfd):
    runs = project.runs()
    (project.folder / "data/made/c").unlink()
    (project.folder / "metrics.json").unlink()
    shutil.rmtree(project.folder / "report")
    code, out = command(capfd, "verify")
    assert code == 1 and out.count(": missing") == 4
    assert command(capfd, "repair")[0] == 0 and project.runs() == runs
    check_mended(project, capfd)
    assert main(["verify", "train"]) == 2 and "no stage train, but make, report" in capfd.readouterr().err
    code, out = command(capfd, "repair", "make")
    assert code == 0 and "dvc repro --force --single-item STAGE" in out
