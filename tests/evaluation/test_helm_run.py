"""HELM in a child process: what is shown when it fails, and that it ends when we do."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import yaml
from tqdm import tqdm

from vlm_vqa.data.records import load_questions
from vlm_vqa.errors import UserError
from vlm_vqa.evaluation.bleu import prepare_punkt
from vlm_vqa.evaluation.helm.files import write_scenario
from vlm_vqa.evaluation.helm.run import ANSWERED, RESULTS, SCENARIO, SUITE, _run_child, run_helm
from vlm_vqa.params import Punkt

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_what_the_client_refuses_is_the_one_message(project, records):
    (project / "models" / "export" / "vlm_vqa.json").write_text('{"instruction": "Say something."}')
    questions = load_questions(records, "val").to_list()
    write_scenario(SCENARIO, questions, records)
    with pytest.raises(UserError, match="HELM asks with .* trained with 'Say something.'.*helm-run.log"):
        run_helm(len(questions), threads=4, environment=prepare_punkt(Punkt.BUNDLED))


def test_a_child_that_fails_is_shown_by_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing.py").write_text("print('on the way')\nraise RuntimeError('the reason')\n")
    with pytest.raises(match="(?s)failing ended with code 1.*logs/log.*on the way.*the reason"):
        _run_child(["failing"], Path("logs/log"), {})


def test_a_child_that_was_killed_is_no_fault_of_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "killed.py").write_text("import os\nos.kill(os.getpid(), 15)\n")
    with pytest.raises(UserError, match="killed was ended by SIGTERM. Run `dvc repro` again"):
        _run_child(["killed"], Path("log"), {})


def test_the_clients_words_are_found_in_the_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing.py").write_text("print('12:00 INFO   vlm-vqa client failed: no image.')\nraise SystemExit(1)")
    with pytest.raises(UserError, match=r"^no image\. \(HELM's whole log: log\)$"):
        _run_child(["failing"], Path("log"), {})


@pytest.mark.parametrize("said", ["3", "6, 2"])
def test_the_child_has_the_threads_that_the_user_says(tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    (tmp_path / "telling.py").write_text("import os\nprint('threads', os.environ['OMP_NUM_THREADS'])")
    _run_child(["telling"], Path("log"), {})
    assert Path("log").read_text() == f"threads {said[0]}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_child_and_all_that_it_started(tmp_path, number):
    (tmp_path / "endless.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    # A shell's background job, as tests may be run in, ignores Ctrl-C, and so would the program below.
    program = textwrap.dedent("""
        import signal
        from pathlib import Path
        from vlm_vqa.pipeline import entrypoint
        from vlm_vqa.evaluation.helm.run import _run_child
        signal.signal(signal.SIGINT, signal.default_int_handler)
        entrypoint.run("stage", lambda: _run_child(["endless"], Path("log"), {}))
    """)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    log = tmp_path / "log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.1)
    below = psutil.Process(parent.pid).children(recursive=True)
    assert len(below) == 2
    parent.send_signal(number)
    assert parent.wait(30) == 128 + number
    gone, alive = psutil.wait_procs(below, timeout=10)
    assert not alive


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no threads")
def test_one_core_is_left_to_the_metrics_and_only_after_the_last_answer(tmp_path, monkeypatch):
    allowed = len(os.sched_getaffinity(0))
    if allowed == 1:
        pytest.skip("one core: nothing to see")
    monkeypatch.chdir(tmp_path)
    # Once the parent has logged what follows an answer, it has done what it does about that answer.
    (tmp_path / "asking.py").write_text(
        textwrap.dedent(f"""
            import os, time
            from concurrent.futures import ThreadPoolExecutor
            from pathlib import Path

            def answer(number):
                print("12:00 INFO   {ANSWERED}", number)
                print("next", number)
                while f"next {{number}}" not in Path("log").read_text():
                    time.sleep(0.01)
                with ThreadPoolExecutor(1) as pool:
                    here, new_thread = cores(), pool.submit(cores).result()
                print("after", number, "cores", here, new_thread)

            def cores():
                return len(os.sched_getaffinity(0))

            answer(32)
            answer(50)
        """)
    )
    with tqdm(total=50, disable=True) as bar:
        _run_child(["asking"], Path("log"), {}, bar)
    log = Path("log").read_text()
    assert f"after 32 cores {allowed} {allowed}\n" in log
    assert "after 50 cores 1 1\n" in log


def test_committed_files_are_what_helm_reads_and_name_this_projects_client():
    config = ROOT / "evaluation" / "helm"
    (deployment,) = yaml.safe_load((config / "model_deployments.yaml").read_text())["model_deployments"]
    (model,) = yaml.safe_load((config / "model_metadata.yaml").read_text())["models"]
    assert deployment["model_name"] == model["name"] == deployment["name"]
    assert set(deployment) == {"name", "model_name", "client_spec"}  # no tokenizer and no lengths
    assert deployment["client_spec"]["class_name"] == "vlm_vqa.evaluation.helm.client.VlmVqaClient"
    assert f"vqa:model={model['name']}" in (config / "run_entries.conf").read_text()
    assert not (config / "__init__.py").exists()  # it would shadow the package `helm`
    assert SUITE in str(RESULTS)
