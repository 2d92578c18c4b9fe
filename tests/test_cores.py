"""How many threads a process gets, and why: the user's word, affinity, quotas of real layouts; and a busy machine's sign."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from proofs.project import ROOT, Project
from vlm_vqa import cores
from vlm_vqa.cores import LEAST_SHARE, WANTED_SECONDS, Crowd, Threads, threads, usable_cores
from vlm_vqa.errors import UserError


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    """A machine of eight cores whose user has said nothing."""
    for name in (cores.VARIABLE, cores.CARRIED, *cores.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def system(folder, groups=(), **files):
    """Write what `proc` and the cgroups of a system say; return its root."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in groups))
    for name, content in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


# --- limits of the system --------------------------------------------------------------------------------------------


def test_without_limits_the_processes_share_the_cores(tmp_path):
    root = system(tmp_path, ["0::/user.slice"])
    assert str(threads(1, root)) == "8 (8 cores / 1 process)"
    assert str(threads(3, root)) == "2 (8 cores / 3 processes)"
    assert str(threads(16, root)) == "1 (8 cores / 16 processes)"
    assert usable_cores(tmp_path / "no-such-system").count == 8


def test_affinity_is_named_where_it_leaves_less_than_the_machine_has(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert str(threads(1, system(tmp_path))) == "1 (affinity of 1 core / 1 process)"


def test_a_system_without_affinity_counts_its_cores(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(system(tmp_path)) == Threads(8, "8 cores")


@pytest.mark.parametrize(
    ("groups", "files", "found"),
    [
        # Version 2: docker with a namespace of its own.
        (["0::/"], {"cpu.max": "150000 100000\n"}, "1 (cgroup quota of 1.5 CPUs)"),
        (["0::/"], {"cpu.max": "max 100000\n"}, "8 (8 cores)"),
        # A systemd slice's limit holds below it; the tightest counts, wherever it stands.
        (["0::/a.slice/b/c"],
         {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "max 100000", "a.slice/b/c/cpu.max": "600000 100000"},
         "3 (cgroup quota of 3.0 CPUs)"),
        (["0::/a/b"], {"a/cpu.max": "600000 100000", "a/b/cpu.max": "50000 100000"},
         "1 (cgroup quota of 0.5 CPUs)"),
        # Another group's limit is not ours.
        (["0::/a/b"], {"a/other/cpu.max": "100000 100000"}, "8 (8 cores)"),
        # The file names the host's path, the mount begins at the container's; and so it is beside version 1.
        (["9:cpuset:/x", "0::/docker/4f"], {"cpu.max": "250000 100000"}, "2 (cgroup quota of 2.5 CPUs)"),
        (["0::/../.."], {"cpu.max": "250000 100000"}, "2 (cgroup quota of 2.5 CPUs)"),
    ],
)  # fmt: skip
def test_quotas_count(tmp_path, groups, files, found):
    assert str(usable_cores(system(tmp_path, groups, **files))) == found


# --- what the user says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("1", "1 (OMP_NUM_THREADS)"),
        (" 2 ", "2 (OMP_NUM_THREADS)"),
        ("4,2", "4 (OMP_NUM_THREADS)"),
        ("3, 2 ,1", "3 (OMP_NUM_THREADS)"),
        ("", "4 (8 cores / 2 processes)"),
        ("16", "16 (OMP_NUM_THREADS, more than 8 cores / 2 processes)"),
    ],
)
def test_the_user_decides(monkeypatch, tmp_path, said, found):
    monkeypatch.setenv(cores.VARIABLE, said)
    assert str(threads(2, system(tmp_path))) == found


@pytest.mark.parametrize("said", ["0", "abc", "-1", "2.5", "4,", ",4", "4,x", "1e3", "99999", "00", "4 2", "\u0664"])
def test_what_is_no_number_of_threads_is_refused_by_name(monkeypatch, tmp_path, said):
    monkeypatch.setenv(cores.VARIABLE, said)
    with pytest.raises(UserError, match=r"OMP_NUM_THREADS is '.*'; set it to a number .* or unset it for 8 \(8 cores"):
        threads(1, system(tmp_path))


@pytest.mark.parametrize(
    ("own", "parent", "command", "found"),
    [
        # The launcher's own number, the user's, its option; another user's launcher; dvc.yaml's command.
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, {"HOME": "/"}, "accelerate", 4),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, {"OMP_NUM_THREADS": "1"}, "accelerate", 1),
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, {"HOME": "/"},
         "--num_cpu_threads_per_process\x003", 3),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, {"OMP_NUM_THREADS": "2"},
         "--num-cpu-threads-per-process=3", 3),
        ({"OMP_NUM_THREADS": "2", "ACCELERATE_MIXED_PRECISION": "no"}, None, "", 2),
        ({"OMP_NUM_THREADS": "1", "VLM_VQA_THREADS": ""}, {"OMP_NUM_THREADS": "1"}, "accelerate", 4),
        ({"OMP_NUM_THREADS": "1", "VLM_VQA_THREADS": "2"}, {"OMP_NUM_THREADS": "1"}, "accelerate", 2),
        # No launcher: `export` in a shell is not in what the shell was started with.
        ({"OMP_NUM_THREADS": "2"}, {"HOME": "/"}, "bash", 2),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": "none"}, "bash", 2),
    ],
)  # fmt: skip
def test_a_launcher_s_number_is_not_the_user_s(monkeypatch, tmp_path, own, parent, command, found):
    class Launcher:
        def __init__(self, pid):
            if pid != os.getppid() or parent is None:
                raise psutil.AccessDenied(pid)

        def environ(self):
            return parent

        def cmdline(self):
            return ["python", *command.split("\0")]

    monkeypatch.setattr(psutil, "Process", Launcher)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert threads(2, system(tmp_path)).count == found


SCRIPT = """
import os
from vlm_vqa import cores
from vlm_vqa.errors import UserError
try:
    found = cores.threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
except UserError as error:
    found = error
# A line is one write: the ranks share a pipe.
print(f"found: {found}")
"""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "launch", "option", "said", "words"),
    [
        ("", "cpu-ddp", "", None, f"found: {max(1, CORES // 2)} ("),
        ("", "cpu-ddp", "", "77", "found: 77 (OMP_NUM_THREADS, more than"),
        ("", "cpu-zero2", "--num_cpu_threads_per_process 5", None, "found: 5 (OMP_NUM_THREADS"),
        ("dvc", "cpu-ddp", "", "1, 2", "found: 1 (OMP_NUM_THREADS)"),
        ("dvc", "cpu", "", "abc", "found: OMP_NUM_THREADS is 'abc'"),
    ],
)
def test_launches_as_they_are_typed_and_as_dvc_starts_them(tmp_path, prefix, launch, option, said, words):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = Project.environment(None, PYTHONPATH=str(ROOT / "src"))
    del environment[cores.VARIABLE]
    if said is not None:
        environment[cores.VARIABLE] = said
    command = f"accelerate launch {option} --config_file launch/{launch}.yaml stages/train.py"
    if prefix:
        text = (ROOT / "dvc.yaml").read_text().split("\n  train:\n    cmd: ")[1].split("\n")[0]
        command = text.replace("${train.launch}", launch).replace("PYTHONPATH=src:. ", "")
    command = command.replace("stages/train.py", str(tmp_path / "script.py"))
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert words in done.stdout, done.stdout + done.stderr[-2000:]


# --- a busy machine --------------------------------------------------------------------------------------------------

TWO_THREADS = Threads(2, "2 cores / 1 process")
ENOUGH = 1.01 * WANTED_SECONDS


def reading(share, seconds, thread="7", since=(0.0, 0.0)):
    """Return what a thread has run and waited for `seconds` more, of which it ran a share."""
    return {thread: (since[0] + share * seconds, since[1] + (1 - share) * seconds)}


def test_a_busy_machine_is_said_once_with_reason_and_remedy():
    crowd = Crowd(TWO_THREADS)
    said = crowd.notice(reading(0.2, ENOUGH))
    assert said.startswith("the machine is busy: this process gets 20% of the time that it wants of its cores")
    assert "its 2 threads wait for each other: OMP_NUM_THREADS=1 would be faster" in said
    assert "End other programs, or stop this and start it again so" in said
    assert all(crowd.notice(reading(0.2, n * ENOUGH)) is None for n in range(2, 20))


def test_who_has_one_thread_already_is_told_something_else():
    said = Crowd(Threads(1, "OMP_NUM_THREADS")).notice(reading(0.1, ENOUGH))
    assert "the machine is busy" in said and "OMP_NUM_THREADS" not in said and "End other programs" in said


def test_it_is_noticed_whenever_it_begins():
    crowd = Crowd(TWO_THREADS)
    ran, waited, said = 0.0, 0.0, []
    for step in range(1000):
        share = 1.0 if step < 700 else 0.1
        ran, waited = ran + share, waited + (1 - share)
        if crowd.notice({"7": (ran, waited)}):
            said.append(step)
    assert len(said) == 1 and 700 <= said[0] <= 700 + 2 * WANTED_SECONDS


@pytest.mark.parametrize("share", [1.0, 0.5, LEAST_SHARE + 0.01])
def test_what_two_threads_bear_is_not_said(share):
    crowd = Crowd(TWO_THREADS)
    assert all(crowd.notice(reading(share, seconds)) is None for seconds in range(0, 1000, 3))


def test_a_moment_s_load_is_not_said():
    crowd = Crowd(TWO_THREADS)
    ran = waited = 0.0
    for step in range(1000):
        share = 0.1 if step % 40 < 5 else 1.0
        ran, waited = ran + share, waited + (1 - share)
        assert crowd.notice({"7": (ran, waited)}) is None


def test_pauses_are_no_load():
    """Validation, logging and checkpoints stand still, or run in threads that come and go."""
    crowd = Crowd(TWO_THREADS)
    for step in range(500):
        short = {f"writer {step}": (2.0, 0.1)} if step % 50 == 0 else {}
        assert crowd.notice({"7": (0.1 * step, 0.0)} | short) is None
    still = reading(0.0, 0.9 * WANTED_SECONDS)
    crowd = Crowd(TWO_THREADS)
    assert all(crowd.notice(still) is None for _ in range(1000))


def test_threads_that_end_take_nothing_back():
    crowd = Crowd(TWO_THREADS)
    assert crowd.notice({"7": (ENOUGH, 0.0), "8": (ENOUGH, 900.0)}) is not None
    crowd = Crowd(TWO_THREADS)
    assert crowd.notice({"7": (ENOUGH, 0.0), "8": (900.0, 0.0)}) is None
    assert crowd.notice({"7": (ENOUGH + 1, 0.0)}) is None
    assert crowd.notice({"7": (ENOUGH + 3, 0.9 * WANTED_SECONDS)}) is not None


def test_a_system_that_does_not_tell_is_never_busy():
    crowd = Crowd(TWO_THREADS)
    assert all(crowd.notice({}) is None for _ in range(100))


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not count waiting")
def test_this_process_s_own_time_is_read():
    sys.stdout.flush()
    before = cores.waits()
    total = sum(range(2_000_000))
    after = cores.waits()
    main = str(os.getpid())
    assert total and after[main][0] > before[main][0] and 0 < after[main][0] < 36_000
