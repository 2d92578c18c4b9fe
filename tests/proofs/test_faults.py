"""The proof of faults with the least counts, as it is called, and what it draws."""

import ast
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from proofs import child, fault_cases, faults, mutations
from vlm_vqa.errors import UserError

ROOT = Path(__file__).parents[2]


def test_a_few_of_each(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "VLM_VQA_RESULTS": str(tmp_path)}
    counts = {"params": 3, "data": 2, "mirror": 1, "exports": 1}
    options = [word for kind, count in counts.items() for word in (f"--{kind}", str(count))]
    done = subprocess.run([sys.executable, "-m", "proofs.faults", *options], env=environment, capture_output=True,
                          text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "faults.json").read_text())
    cases = result["details"]["cases"]
    assert Counter(case["kind"] for case in cases) == counts and all(claim["met"] for claim in result["claims"]), cases
    assert {case["verdict"] for case in cases} <= set(faults.GOOD)


def test_forty_damaged_data_sets_end_in_records_or_one_refusal(tmp_path):
    code = (
        "from collections import Counter; from proofs import fault_cases, faults; "
        "found = faults.cases('data', 40, 1, fault_cases.damaged_data); "
        "print(dict(Counter(case.verdict for case in found)))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = ast.literal_eval(done.stdout.splitlines()[-1])
    assert set(counts) == set(faults.GOOD) and min(counts.values()) > 5, done.stdout


def test_every_table_is_damaged_in_its_values(tmp_path):
    rows = [{"image": f"{number}.jpg", "question": "What?", "answers": "red"} for number in range(5)]
    for ending in mutations.ENDINGS:
        ways = set()
        for seed in range(200):
            path = tmp_path / str(seed) / f"a.{ending}"
            path.parent.mkdir(exist_ok=True)
            fault_cases.write_rows(path, rows)
            ways.add(mutations.damage(path, random.Random(seed)).partition(":")[0])
        assert {"json" if ending == "json" else "table", "swapped", "renamed", "encoded"} <= ways, ending


def test_every_damage_is_one(tmp_path):
    path = tmp_path / "a.json"
    content = json.dumps({"questions": [{"question_id": number, "question": "What?"} for number in range(5)]}).encode()
    ways = set()
    for seed in range(200):
        path.write_bytes(content)
        ways.add(mutations.damage(path, random.Random(seed)).partition(":")[0])
        assert not path.is_file() or path.is_symlink() or path.read_bytes() != content or seed
        for left in tmp_path.iterdir():
            left.rmdir() if left.is_dir() and not left.is_symlink() else left.unlink()
    assert ways == {"json", "bits", "cut", "zeros", "twice", "insert", "empty", "missing", "folder", "loop",
                    "swapped", "renamed", "encoded"}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "what"),
    [("print('x')", "done"), ("raise UserError('no')", "refused"), ("raise KeyError('x')", "raised"),
     ("os.kill(os.getpid(), 9)", "died"), ("import time; time.sleep(60)", "hung")],
)  # fmt: skip
def test_how_a_call_ends(code, what):
    # In a process without threads, as a proof is.
    lines = ["import os", "from proofs.child import in_child", "from vlm_vqa.errors import UserError",
             f"print(in_child(lambda: exec({code!r}), 3)[0])"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == what, done.stderr


def test_a_command_s_exit_code_2_is_a_refusal(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert fault_cases.command("check", "presets/small.yaml") == ""
    with pytest.raises(UserError, match="vlm-vqa: error: .*none.yaml"):
        fault_cases.command("check", str(tmp_path / "none.yaml"))
    assert child.BAD and set(faults.BAD) > set(child.BAD)
