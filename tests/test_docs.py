"""The documents are true: what they name exists, their links lead somewhere, and their figures are those measured."""

import importlib.util
import json
import math
import re
import subprocess
import sys
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import easy_vqa
import pytest
import yaml

from benchmarks.__main__ import DEFAULT
from benchmarks.training_step import THIN
from proofs import consumers, gpu, strategies
from proofs.serving import INSPECT_AI, LMMS_EVAL
from proofs.trainings import table
from scripts import parameters_page
from vlm_vqa import cli

ROOT = Path(__file__).parents[1]
DOCS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md"))]
OTHERS = ["SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/vqav2/README.md", "evaluation/helm/README.md"]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ["README.md", *DOCS, *OTHERS]}
TEXT = "\n\n".join(PAGES.values())
FLAT = " ".join(TEXT.split())
PAGE = [pytest.param(name, id=name) for name in PAGES]


def there(path: str) -> bool:
    """Tell whether a path or pattern of the repository leads somewhere."""
    return any(ROOT.glob(path))


def results(name: str) -> dict:
    return json.loads(next(ROOT.glob(f"*/results/{name}.json")).read_text(encoding="utf-8"))


def table_rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of every table's line."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


# --- what is named exists


def test_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 8000


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make (?:[A-Z]+=\S+ )*([a-z-]+)", TEXT, flags=re.MULTILINE))
    assert {"repro", "test", "docs", "setup"} <= named <= targets


def test_commands_and_options_of_vlm_vqa_exist(capsys):
    named = re.findall(r"\bvlm-vqa ([a-z][a-z-]+)([^`\n#]*)", TEXT)
    assert {"ask", "demo", "track", "preflight", "unlock"} <= {command for command, _ in named}
    for command, rest in named:
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0, command
        assert set(re.findall(r"--[a-z-]+", rest)) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), rest


def test_modules_that_are_run_exist():
    named = set(re.findall(r"python -m\s+([a-z_.]+)", TEXT))
    assert {"benchmarks.small_run", "proofs.kills", "scripts.parameters_page"} <= named
    for module in named:
        path = module.replace(".", "/")
        ours = any(there(f"{place}{path}{end}") for place in ("", "src/") for end in (".py", "/__main__.py"))
        assert ours or importlib.util.find_spec(module), module


@pytest.mark.parametrize("page", PAGE)
def test_paths_are_there(page):
    made_by_a_run = (
        "data/records",
        "data/features",
        "data/answers.parts",
        "data/archives",
        "benchmarks/results.here",
        "reports/helm_pred",
        "reports/report.",
        "reports/calibration",
        "reports/validation",
    )
    places = "presets|launch|evaluation|stages|src|scripts|tests|docs|benchmarks|proofs|reports|data|[.]ci"
    named = re.findall(rf"(?<![\w/.-])(?:{places})/[\w./*-]*[\w*/]", PAGES[page])
    assert not [name for name in named if not name.startswith(made_by_a_run) and not there(name)]


@pytest.mark.parametrize("page", PAGE)
def test_keys_and_stages_are_there(page):
    known = set(re.findall(r"^\| `([\w.]+)`", PAGES["docs/parameters.md"], flags=re.MULTILINE))
    sections = {key.partition(".")[0] for key in known}
    named = {key for key in re.findall(r"[`=]([a-z]+\.[\w.]+\w)(?=[`:=])", PAGES[page])
             if key.partition(".")[0] in sections and not key.endswith((".json", ".yaml"))}  # fmt: skip
    assert not named - known
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert set(re.findall(r"dvc (?:repro|commit) ([a-z][\w-]+)", PAGES[page])) <= set(stages)


def test_environment_variables_are_read():
    code = "".join(path.read_text(encoding="utf-8") for folder in ("src", "benchmarks", "tests", "proofs")
                   for path in (ROOT / folder).rglob("*.py") if path != Path(__file__))  # fmt: skip
    assert not [name for name in set(re.findall(r"\bVLM_VQA_\w+", TEXT)) if name not in code]


def test_documents_name_no_place_outside():
    assert not re.search(r"\.\./shared|/work/|(?<!/var)/tmp/|localhost:", TEXT)


# --- links


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and mkdocs both make of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        words = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode().strip().lower()
        words = re.sub(r"[^\w\s-]", "", words)
        github, mkdocs = re.sub(r"\s", "-", words), re.sub(r"[-\s]+", "-", words).strip("-")
        found |= {github} if github == mkdocs else set()
    return found


@pytest.mark.parametrize("page", PAGE)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_every_page_is_linked_from_the_start():
    linked = set(re.findall(r"\]\(([^)#]+\.md)", PAGES["docs/index.md"]))
    assert {Path(name).name for name in DOCS} - {"index.md"} <= linked


# --- pages that are made


def test_the_page_of_parameters_is_current():
    """If not: python -m scripts.parameters_page."""
    assert PAGES["docs/parameters.md"] == parameters_page.page()


def test_the_site_builds_and_asks_no_other_machine(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed; make setup installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert {"index.html", "parameters.html", "SECURITY.html"} <= {path.name for path in pages}
    for path in pages:
        loaded = r"<(?:script|img|iframe|link(?! rel=\"canonical\"))\b[^>]*\b(?:src|href)=\"?((?:https?:)?//[^\" >]+)"
        assert re.findall(loaded, path.read_text(encoding="utf-8")) == [], path.name


# --- licence, citation, changelog


def test_versions_and_licence_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["license"] == citation["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    assert (ROOT / "LICENSE").read_text().split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert citation["version"] == project["version"]
    released = f"## {project['version']} - {citation['date-released']}"
    assert released in PAGES["CHANGELOG.md"] and "## Unreleased" in PAGES["CHANGELOG.md"]


# --- figures


def test_speed_is_what_was_measured():
    """Every claim that was measured stands in the documents, met or missed."""
    claims = [claim for name in DEFAULT for claim in results(name)["claims"]]
    for one in claims:
        target = "" if one["target"] is None else f"{'at most' if one['at_most'] else 'at least'} {one['target']:.3g}"
        verdict = {True: "met", False: "**missed**", None: ""}[one["met"]]
        line = f"| {one['what']} | {one['ratio']:.3g} | {one['low']:.3g} .. {one['high']:.3g} | {target} | {verdict} |"
        assert line in PAGES["docs/benchmarks.md"], line
    machine = results(DEFAULT[0])["machine"]
    assert f"torch {machine['torch']}, transformers {machine['transformers']}" in FLAT
    assert sum(claim["met"] is False for claim in claims) == 4 and "a target is missed, and four are" in FLAT


def test_the_step_at_26_layers_is_what_was_measured():
    found = results("training_step")
    positions, timed = found["details"]["small"]["positions"], found["details"]["gemma_2_2b"]["seconds"]["whole"]
    (deepest,) = (one for one in found["claims"] if one["what"] == "2B shape, 26 layers: whole step")
    apart = (deepest["high"] - deepest["low"]) / deepest["ratio"]
    said = f"{deepest['ratio']:.2f} where 8.5 was the aim; the rounds lie {apart:.0%} apart, where 10% was"
    assert said.replace("%", " %") in FLAT
    few, many = (timed[f"hidden 2304, {layers} layers, vocabulary 32,000"] for layers in THIN)
    slow, fast = (
        median(long - short for short, long in zip(few[name], many[name], strict=True)) / (THIN[1] - THIN[0])
        for name in ("reference", "ours")
    )
    assert f"takes the reference {slow:.0f} s of the step, ours {fast:.0f}: a ratio of {slow / fast:.1f}" in FLAT
    assert f"({positions['reference']:,} and {positions['ours']:,})" in FLAT
    whole = median(timed["hidden 2304, 2 layers, vocabulary 256,000"]["reference"])
    assert 0.25 < (whole - 2 * slow) / (whole + 24 * slow) < 0.3 and "at 26 layers it is over a quarter of" in FLAT


def test_what_comes_out_is_what_was_measured():
    found = {name: results(name) for name in ("learning", "strategies", "kills")}
    assert all(claim["met"] for name in ("learning", "strategies") for claim in found[name]["claims"])
    details, made = found["strategies"]["details"], strategies
    assert made.table(details["distances"], details["8_from_32_bits"], list(made.LAUNCHES)) in PAGES["docs/training.md"]
    assert f"after {details['losses']} steps" in FLAT
    measured = {claim["what"]: claim["ratio"] for result in found.values() for claim in result["claims"]}
    loss = measured["32 bits: largest relative difference of a step's loss"]
    assert f"Every step's loss agrees to {loss:.1e} with 32-bit AdamW" in FLAT
    details = found["kills"]["details"]
    trials = [trial for trial in details["trials"] if trial["kills"]]
    longest = max(kill["outlived"] for kill in details["kills"])
    assert (
        f"After {len(details['kills'])} such kills in {len(trials)} trials, every trial ended in the `dvc.lock`" in FLAT
    )
    assert f"no process lived for more than {math.ceil(longest)} s after its parent" in FLAT
    one, other = sorted(problem for trial in trials for problem in trial["problems"])
    assert one.startswith("SIGINT to python dvc repro") and "a traceback" in one
    assert other.startswith("SIGKILL to python dvc repro") and "a traceback: SystemExit: 143" in other


def test_the_spread_over_seeds_is_what_was_measured():
    details = results("learning")["details"]
    for way, mean in details["mean_accuracy"].items():
        seeds = [run["accuracy"] for name, run in details["runs"].items() if name.startswith(f"{way}, seed")]
        assert len(seeds) == 3
        spread = f"{min(seeds):.4f} .. {max(seeds):.4f}"
        assert f"| {way} | {mean:.4f} | {spread} |" in PAGES["docs/training.md"]


@pytest.mark.parametrize(
    ("name", "what", "count"), [("rates", "rates", 3), ("masks", "mask", 3), ("seeds", "small run", 10)]
)
def test_a_table_over_seeds_is_what_was_measured(name, what, count):
    rows = results(name)["details"]["rows"]
    assert {len(seeds) for seeds in rows.values()} == {count}
    assert table(rows, what) in PAGES["docs/training.md"]
    if own := rows.get("10 seeds"):
        spread = f"{min(own):.4f} .. {max(own):.4f}"
        assert f"as committed | 0 to 9 | {spread} |" in PAGES["docs/training.md"]
        said = {"README.md": f"Ten seeds gave {spread}.", "docs/evaluation.md": f"one thread, gave {spread} ("}
        for page, words in said.items():
            assert words in " ".join(PAGES[page].split()), page


def test_what_intervals_hold_is_what_was_counted():
    found = results("coverage")
    false, caught = (claim["ratio"] for claim in found["claims"][2:])
    assert false == 0 and f"saw a true drop by a point in {caught:.1%}".replace("%", " %") in FLAT
    for name in ("means", "differences"):
        held = found["details"][name].values()
        shown = f"between {min(held):.1%} and {max(held):.1%}".replace("%", " %")
        assert f"{found['details']['sets']:,} synthetic sets of each of {len(held)} kinds" in FLAT and shown in FLAT
        assert f"in the mean {sum(held) / len(held):.1%}".replace("%", " %") in FLAT


def test_full_scale_is_what_was_measured():
    real, data, features = results("real_shape"), results("data_scale"), results("features")
    missed = [claim["what"] for result in (data, features) for claim in result["claims"] if claim["met"] is False]
    assert len(missed) == FLAT.count("(the target of 0.5 is missed: every image is checked)")
    assert missed == ["features: random single images over sequential reads, bfloat16"]
    over = [one["ratio"] for one in real["claims"] if "over the weights" in one["what"]]
    assert f"{min(over):.2f} to {max(over):.2f} times the float32 weights (aim 1.3)" in FLAT and max(over) < 1.3
    off = [one["ratio"] for one in real["claims"] if "off preflight's" in one["what"]]
    said = f"{min(off):.1%} to {max(off):.1%} from preflight's prediction (aim 10%)"
    assert said.replace("%", " %") in FLAT and len(off) == 10 and max(off) < 0.1
    peaks = [max(real["details"][f"processes: {number}"]["peaks"].values()) for number in (1, 2)]
    assert "peaks " + " and ".join(f"{peak / 2**30:.1f}" for peak in peaks) + " GiB" in FLAT
    starts = results("start_memory")["claims"]
    drawn, read = ([f"{one['ratio']:.2f}" for one in starts if way in one["what"]] for way in ("drawn", "read"))
    assert sum(claim["met"] is False for claim in starts) == 1 and "the last one misses the aim of 1.3" in FLAT
    first, second, third = (f"{one['ratio']:.2f}" for one in results("start_memory_real")["claims"])
    assert f"Gemma 2 2B's shape, 9.7 GiB, it is {first}, {second} and {third} times" in FLAT
    assert f"which takes {results('registering')['claims'][0]['ratio']:.1f} s" in FLAT
    assert f"together hold {', '.join(drawn[:-1])} and {drawn[-1]} times the weights" in FLAT
    assert f"{', '.join(read[:-1])} and {read[-1]} times if they are read from a folder" in FLAT
    seconds, memory = (claim["ratio"] for claim in data["claims"][:2])
    assert f"{seconds:.0f} s, {memory:.2f} GiB" in FLAT
    questions, images = (sum(count[index] for count in data["details"]["counts"].values()) for index in (0, 1))
    assert f"{questions:,} questions with ten answers each, {images:,} tiny images" in FLAT
    narrow, wide = (claim["ratio"] for claim in features["claims"][:2])
    assert f"{narrow:.2f} of the rate in bfloat16, {wide:.2f} in int8" in FLAT
    error = features["details"]["relative_error_of_a_token"]["int8"]["median"]
    assert f"relative error of a token {error:.1%} (median)".replace("%", " %") in FLAT


def test_what_a_gpu_does_is_what_was_measured():
    data, readme, page = results("gpu"), PAGES["README.md"], " ".join(PAGES["docs/gpu.md"].split())
    assert gpu.page(data) in PAGES["docs/gpu.md"]
    assert set(re.findall(r"^\| `(\w+)` \|", PAGES["docs/gpu.md"], flags=re.MULTILINE)) == set(gpu.CHECKS)
    found, shape = (
        {claim["what"].removeprefix("GPU: "): claim["ratio"] for claim in data["claims"]},
        "2B shape, 26 layers",
    )
    full = f"{shape}, full card"
    stock, ours, compiled = (found[f"{full}: questions/s, {name}"] for name in ("stock", "ours", "compiled"))
    assert f"{stock:.0f} questions a second by the stock recipe, {ours:.0f} by ours, {compiled:.0f} compiled" in readme
    assert f"to {compiled / stock:.1f} times the stock recipe's" in page
    assert f"{found[f'{full}: MFU, compiled: model FLOP/s over measured products']:.2f} of the rate" in page
    preset = found["preset vqav2-1gpu, questions/s"]
    assert f"`vqav2-1gpu` trains {preset / found['preset vqav2-1gpu, 8 passes a step, questions/s']:.1f} times" in page
    faster = found["preset vqav2-1gpu, questions/s"] / found["preset vqav2-1gpu, not compiled, questions/s"]
    assert f"the preset `vqav2-1gpu` trains {faster:.1f} times as fast" in FLAT
    narrow, wide = (found[f"{full}: {of}, GiB"] for of in ("compiled: peak of memory", "ours: peak of memory"))
    takes = 1 / found[f"{full}: step, compiled over not"]
    assert f"takes {takes:.2f} of the time and {narrow:.0f} GiB instead of {wide:.0f}" in FLAT
    few, more, most = (found[f"{shape}: answers/s, bfloat16, {count} at once"] for count in (64, 256, 1024))
    assert f"64 give {few:.0f} answers a second, 256 give {more:.0f}, 1,024 give {most:.0f}" in FLAT


def test_who_computes_what_was_trained_is_what_was_measured():
    found = results("consumers")
    assert all(claim["met"] for claim in found["claims"])
    assert consumers.table(found["details"]) in PAGES["docs/deployment.md"]
    assert [every[consumers.WRONG]["equal"] for every in found["details"].values()] == [200] * 3
    found = {claim["what"]: claim for claim in results("serving")["claims"]}
    assert not [what for what, claim in found.items() if claim["met"] is False]
    answers = int(next(what for what in found if what.startswith("64 clients for 60 s: answers that")).split()[-1])
    waited = math.ceil(max(claim["ratio"] for what, claim in found.items() if "seconds until the last" in what))
    bleu = next(claim["ratio"] for what, claim in found.items() if "OpenAI client: bleu_1" in what)
    assert f"{answers:,} answers came, none of them wrong" in FLAT and f"its error at most {waited} s later" in FLAT
    assert f"the `bleu_1` ({bleu:.3f}) of our client" in FLAT
    for package in (INSPECT_AI, LMMS_EVAL):
        assert package.replace("lmms_eval", "lmms-eval").replace("==", " ") in FLAT
        assert f"{package}: answers that are wrong, of 500" in found


def test_what_validation_costs_is_what_preflight_says():
    found = re.findall(r"(\d\.\d) % \(`([\w-]+)`\)", PAGES["docs/training.md"])
    for share, preset in found:
        golden = (ROOT / f"tests/estimate/golden/{preset}.txt").read_text()
        assert f"validation adds {share}% to training's FLOPs" in golden, preset
    assert len(found) == 5


def test_the_small_run_is_what_was_measured():
    """By what is committed for it, with its machine: a user's own run in reports/ is none of these tests' business."""
    found = results("small_run")["details"]
    scores, seconds = found["scores"], found["seconds"]
    names = {"this model": "**this model**", "shuffled_images": "the same model, shuffled images",
             "blank_image": "the same model, a grey picture", "prior": "question-only baseline"}  # fmt: skip
    for page in ("README.md", "docs/evaluation.md"):
        rows = {cells[0]: cells[1:] for cells in table_rows(PAGES[page])}
        for key, name in names.items():
            accuracy, bleu = scores[key]
            assert rows[name][:2] == [f"{accuracy:.4f}", f"{bleu:.3f}"], (page, name)
            groups = scores["by answer type"]["model" if key == "this model" else key]
            mean, low, high = groups["all"]
            shown = [f"{low:.4f} .. {high:.4f}", f"{groups['yes/no'][0]:.4f}", f"{groups['other'][0]:.4f}"]
            assert rows[name][2:5] == shown and mean == pytest.approx(accuracy), (page, name)
        assert f"All {scores['questions']:,} " in PAGES[page]
        assert f"HELM on the {scores['helm_instances']:,} of them" in " ".join(PAGES[page].split())
    minutes, rest = divmod(round(sum(seconds.values())), 60)
    share = next(claim["ratio"] for claim in results("small_run")["claims"] if "share" in claim["what"])
    assert f"all hashes and checksums together are {100 * share:.1f} %" in FLAT
    taken = f"The five stages took {minutes} min {rest} s after set-up, training {seconds['train']:.0f} s of them"
    assert taken in FLAT
    assert f"at most {found['peak_gib']:.1f} GiB in one process" in FLAT
    assert f"{scores['wrong']} of the {scores['questions']:,} answers are wrong" in FLAT


def test_how_fast_answers_come_is_what_was_measured():
    two, shuffled, _, changed = results("answers")["claims"]
    assert f"two processes answer {two['ratio']:.2f} times as fast as one, where {two['target']:g} was the aim" in FLAT
    assert (
        f"take {shuffled['ratio']:.2f} times as long as its own alone, where at most {shuffled['target']:g} was" in FLAT
    )
    count, of, number = changed["note"].split()
    assert f"bfloat16 changes {count} {of} {int(number):,} answers" in FLAT


def test_what_one_thread_is_worth_on_a_busy_machine_is_what_was_measured():
    ratios = {claim["what"]: claim["ratio"] for claim in results("threads")["claims"]}
    cases = ("beside 8, OMP_NUM_THREADS=1", "beside 8")
    one, two = (ratios[f"{case}: questions/s over the quiet run's"] for case in cases)
    assert f"{one:.2f} of the quiet rate instead of {two:.2f}" in FLAT


def test_what_is_said_against_the_small_run_is_so():
    """Its questions are the same in both splits, and the encoder's pretraining knew all that they ask about."""
    train, test = (set(split()[0]) for split in (easy_vqa.get_train_questions, easy_vqa.get_test_questions))
    assert train == test and f"All {len(train)} question strings of easy-VQA are in both splits" in FLAT
    answers = set(easy_vqa.get_answers()) - {"yes", "no"}
    card = (ROOT / "src/vlm_vqa/model/small_encoder/README.md").read_text(encoding="utf-8")
    assert len(answers) == 11 and not [answer for answer in answers if answer not in card]
    assert "three shapes and eight colours that easy-VQA asks about" in " ".join(PAGES["README.md"].split())
