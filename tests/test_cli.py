"""The command `vlm-vqa`: what it prints, its exit codes, and that asking for help costs nothing."""

import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlm_vqa.cli import main

REPO = Path(__file__).parents[1]


def test_help_names_every_command_and_imports_nothing_heavy():
    script = (
        "import sys; sys.path.insert(0, 'src')\n"
        "from vlm_vqa.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'pandas', 'datasets', 'pydantic', 'ruamel'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    for command in ("ask", "base", "check", "compare", "helm-web", "track"):
        assert f"\n    {command} " in done.stdout


def test_check_accepts_the_committed_parameters(capsys, clean_checkout):
    assert main(["check", str(REPO / "presets/small.yaml")]) == 0
    assert "valid; params_hash" in capsys.readouterr().out


def test_check_names_a_misspelt_key(tmp_path, capsys):
    text = (REPO / "presets/small.yaml").read_text().replace("learning_rate:", "learning_rat:")
    (tmp_path / "params.yaml").write_text(text)
    assert main(["check", str(tmp_path / "params.yaml")]) == 2
    assert "train.learning_rat" in capsys.readouterr().err


def test_check_fills_in_what_a_file_of_an_earlier_version_lacks(tmp_path, capsys, caplog, clean_checkout):
    whole = (REPO / "presets/small.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(whole.replace("  lora: null\n", ""))
    assert main(["check", str(path)]) == 0 and "train.lora" not in path.read_text()
    assert caplog.messages == [f"{path} lacks train.lora: taken as null, as before; `vlm-vqa check --write` adds it."]
    assert main(["check", "--write", str(path)]) == 0 and path.read_text() == whole
    assert f"{path}: added train.lora" in capsys.readouterr().out
    assert main(["check", "--write", str(path)]) == 0 and path.read_text() == whole and len(caplog.messages) == 1


def test_track_says_whether_there_was_anything_to_do(capsys, monkeypatch):
    for made, words in ((True, "recorded these outputs as MLflow run abc"), (False, "nothing to do")):
        monkeypatch.setattr("vlm_vqa.tracking.recreate_run", lambda made=made: ("abc", made))
        assert main(["track"]) == 0
        assert words in capsys.readouterr().out


def test_track_without_outputs_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((REPO / "presets/small.yaml").read_text())
    assert main(["track"]) == 2
    assert "models/trained/training.json is missing: `dvc pull` or `dvc repro`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["--help", "ask --help", "check", "check missing.yaml", "compare --base HEAD", "preflight --device H100",
     "ask missing.jpg what?", "track"],
)  # fmt: skip
def test_a_command_says_nothing_but_its_own(command, tmp_path):
    """Outputs are missing here: what a command then says is one line of ours; whatever libraries would say is seen."""
    (tmp_path / "params.yaml").write_text((REPO / "presets/small.yaml").read_text())
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "vlm_vqa.cli", *command.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == (1 if done.returncode == 2 else 0), done.stderr
    assert all(line.startswith("vlm-vqa: error: ") for line in lines)
    assert done.returncode == 2 or not re.search(r"warn|kernels|DeepSpeed|accelerator|\[(INFO|WARN)", done.stdout)


@pytest.mark.parametrize(
    ("logger", "module", "message"),
    [("bitsandbytes.backends.cpu.ops", "bitsandbytes/backends/cpu/ops.py", "Failed to load CPU gemm_4bit_forward"),
     ("DeepSpeed", "deepspeed/accelerator/real_accelerator.py", "Setting accelerator to CPU.")],
)  # fmt: skip
def test_noise_that_reads_as_failure_is_kept_back_and_nothing_else(logger, module, message, monkeypatch, caplog):
    package, _, rest = module.partition("/")
    assert message in (Path(find_spec(package).origin).parent / rest).read_text(), "the library says it otherwise now"
    monkeypatch.setattr(logging.getLogger(logger), "propagate", True)
    logging.getLogger(logger).warning(message + " %s and more", "this")
    logging.getLogger(logger).warning("something else")
    # Once, or twice where the library has been imported before and its logger hands on what it has.
    assert set(caplog.messages) == {"something else"}


def test_a_reader_that_has_enough_ends_the_command_quietly():
    done = subprocess.run(
        f"{sys.executable} -c 'import sys; sys.path.insert(0, \"src\"); import vlm_vqa.cli as c;"
        " spill = lambda: [print(n, flush=True) for n in range(100000)]; spill.__name__ = \"spill\";"
        " c.command()(spill); sys.exit(c.main([\"spill\"]))' | head -n 1",
        shell=True, cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "0\n" and done.stderr == ""


def test_ctrl_c_ends_with_130(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm_vqa.tracking.recreate_run", interrupt)
    assert main(["track"]) == 130
