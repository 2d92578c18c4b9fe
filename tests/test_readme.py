"""README is true: its commands exist, the files it names are there, and its figures are those of benchmarks/results."""

import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.__main__ import DEFAULT
from proofs import strategies

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"repro", "test"} <= named <= targets


def test_commands_of_vlm_vqa_exist():
    done = subprocess.run([sys.executable, "-m", "vlm_vqa.cli", "--help"], capture_output=True, text=True, cwd=ROOT)
    named = set(re.findall(r"\bvlm-vqa ([a-z][a-z-]+)", README))
    assert {"ask", "gallery", "track"} <= named
    assert not [command for command in named if not re.search(rf"^\s+{command}\s", done.stdout, flags=re.MULTILINE)]


def test_files_and_presets_are_there():
    made_by_a_run = {"data/records", "data/features", "data/archives", "data/records/report.html"}
    named = set(re.findall(r"(?:presets|launch|evaluation|\.ci|data)/[\w./-]*\w", README)) - made_by_a_run
    assert {"presets/vqav2.yaml", ".ci/run", "data/vqav2/README.md"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


def results(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def test_speed_is_what_was_measured():
    """Every claim that was measured stands in the README, met or missed."""
    for one in (claim for name in DEFAULT for claim in results(name)["claims"]):
        target = "" if one["target"] is None else f"{'at most' if one['at_most'] else 'at least'} {one['target']:.3g}"
        verdict = {True: "met", False: "**missed**", None: ""}[one["met"]]
        line = f"| {one['what']} | {one['ratio']:.3g} | {one['low']:.3g} .. {one['high']:.3g} | {target} | {verdict} |"
        assert line in README, line


def test_what_comes_out_is_what_was_measured():
    found = {name: results(name) for name in ("learning", "strategies", "kills")}
    assert all(claim["met"] for result in found.values() for claim in result["claims"])
    details = found["strategies"]["details"]
    assert strategies.table(details["distances"], details["8_from_32_bits"], list(strategies.LAUNCHES)) in README
    assert f"after {details['losses']} steps" in README.replace("\n", " ")
    assert "after each of 20 such kills" in README and len(found["kills"]["details"]["kills"]) == 20
    for accuracy in found["learning"]["details"]["mean_accuracy"].values():
        assert f"{accuracy:.4f}" in README


def test_full_scale_is_what_was_measured():
    real, data, features = results("real_shape"), results("data_scale"), results("features")
    assert all(claim["met"] is not False for result in (real, data, features) for claim in result["claims"])
    losses, peak = real["details"]["losses"], real["claims"][0]["ratio"]
    worst = max(claim["ratio"] for claim in real["claims"] if "off preflight's" in claim["what"])
    assert f"loss {losses[0]:.2f} to {losses[-1]:.2f} over the same 8 questions, peak {peak:.1f} GiB" in README
    assert f"at most {worst:.1%} from".replace("%", " %") in README
    seconds, memory = (claim["ratio"] for claim in data["claims"][:2])
    assert f"{seconds:.0f} s, {memory:.2f} GiB" in README
    narrow, wide = (claim["ratio"] for claim in features["claims"][:2])
    assert f"{narrow:.2f} of the rate in bfloat16, {wide:.2f} in int8" in README


def test_the_small_run_is_what_was_measured():
    """By what is committed for it, with its machine: a user's own run in reports/ is none of these tests' business."""
    found = results("small_run")["details"]
    scores, seconds = found["scores"], found["seconds"]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in
            (line.strip("|").split("|") for line in README.splitlines() if line.startswith("|"))}  # fmt: skip
    names = {"this model": "**this model**", "shuffled_images": "the same model, shuffled images",
             "prior": "best blind answerer"}  # fmt: skip
    for key, name in names.items():
        accuracy, bleu = scores[key]
        assert rows[name][:2] == [f"{accuracy:.4f}", f"{bleu:.3f}"], name
    minutes, rest = divmod(round(sum(seconds.values())), 60)
    text = README.replace("\n", " ")
    assert (
        f"The five stages took {minutes} min {rest} s after set-up, training {seconds['train']:.0f} s of them" in text
    )
    assert f"at most {found['peak_gib']:.1f} GiB in one process" in text
    assert f"{scores['wrong']} of the {scores['questions']:,} answers are wrong" in text
    assert f"HELM on the {scores['helm_instances']:,} of them" in text


def test_what_one_thread_is_worth_on_a_busy_machine_is_what_was_measured():
    ratios = {claim["what"]: claim["ratio"] for claim in results("threads")["claims"]}
    cases = ("beside 8, OMP_NUM_THREADS=1", "beside 8")
    one, two = (ratios[f"{case}: questions/s over the quiet run's"] for case in cases)
    assert f"{one:.2f} of the quiet rate instead of {two:.2f}" in README.replace("\n", " ")
