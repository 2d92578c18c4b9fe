"""`vlm-vqa preflight` as a whole: verdicts, refusals, exit codes, and advice that holds."""

import json
import re
from pathlib import Path

import pytest
import torch

from vlm_vqa.cli import main
from vlm_vqa.data.feature_store import Layout
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.devices import GIB
from vlm_vqa.estimate.memory import total
from vlm_vqa.estimate.predict import changed
from vlm_vqa.estimate.render import as_text
from vlm_vqa.launch_file import read_launch
from vlm_vqa.params import StoreDtype

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
NO_KERNELS = "the pinned PyTorch has no kernels for"
SLOW = (
    "Tesla T4 has no bfloat16, torch would emulate it slowly: name an A10 or newer, or set vision.compute_dtype, "
    "train.compute_dtype, train.weights_dtype, evaluation.compute_dtype"
)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_runs_through_in_json_and_text(path, capsys, monkeypatch, clean_checkout):
    device = ["--device", "A100-SXM4-80GB"] if path.stem != "small" else []
    arguments = ["preflight", str(path), *device, "--host-memory", "512", "--disk", "2000", "--price", "2"]
    assert main([*arguments, "--details"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"VERDICT: {path} fits: ")
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and [stage["name"] for stage in found["stages"]] == [
        "fetch-vqav2",
        "extract-features",
        "train",
        "export",
        "helm-eval",
    ]
    assert json.loads(json.dumps(found)) == found
    for stage in found["stages"]:
        assert stage["name"] in text
        for moment, parts in (stage["host"] | stage["gpu"]).items():
            assert moment in text and min(parts.values()) >= 0


@pytest.mark.parametrize(
    ("name", "changes", "device"),
    [
        ("vqav2-reference", {"train.launch": "gpu"}, "RTX 4090"),
        ("vqav2", {"train.launch": "ddp", "train.optimizer": "adamw_torch"}, "A10G"),
        ("vqav2", {"train.gradient_checkpointing": False, "train.batch_size": 512}, "RTX 4090"),
        ("vqav2-reference", {"evaluation.batch_size": 256}, "A10G"),
        ("vqav2", {"train.launch": "ddp", "train.gradient_checkpointing": False, "evaluation.batch_size": 512}, "A10G"),
    ],
    ids=["one GPU", "DDP", "long passes", "evaluation", "several together"],
)
def test_advice_fits_when_it_is_followed(preset, ask, name, changes, device):
    params = preset(name, **changes)
    before = ask(params, device=device)
    assert not before.fits and before.options
    for changes, needed in before.options:
        after = ask(changed(params, changes), device=device)
        assert after.fits
        assert needed.items() <= {f"{one.stage}: {one.resource}": one.needed for one in after.checks}.items()
    questions = {
        after.train.batch_size
        * after.train.gradient_accumulation_steps
        * read_launch(after.train.launch, ROOT / "launch").processes
        for after in [params, *(changed(params, changes) for changes, _ in before.options)]
    }
    assert len(questions) == 1, "an optimizer step keeps its questions"


def test_a_small_disk_is_advised_too(preset, ask):
    before = ask(preset("vqav2-reference"), device="A10G", disk=125)
    assert not before.fits
    assert any("vision.store_dtype" in changes for changes, _ in before.options)


def test_what_no_change_mends_is_said(preset, ask):
    before = ask(preset("vqav2-reference"), device="A10G", host_memory=8)
    assert not before.fits and not before.options
    assert "name a larger --device, --host-memory or --disk" in as_text(before)


@pytest.mark.parametrize("dtype", StoreDtype)
def test_features_take_what_the_store_says(preset, ask, dtype):
    stages = ask(preset("vqav2-reference", **{"vision.store_dtype": dtype.value}), device="A10G").stages
    store = Layout(123_287, 257, 768, dtype)
    assert total(stages[1].disk) == store.images * store.image_bytes


def test_live_features_take_no_disk_and_cost_the_tower_in_every_epoch(preset, ask):
    """Against the formulas of another place: `vision_flops` of every picture that is shown."""
    stored, live = (ask(preset("vqav2", **{"vision.store": store}), device="RTX 4090") for store in (True, False))
    _, extracted, trained, _, evaluated = stored.stages
    _, nothing, looking, _, answering = live.stages
    assert total(extracted.disk) > 40 * GIB and not nothing.disk and nothing.hours == 0.0
    each = extracted.facts["flop"] / 123_287
    params = preset("vqav2")
    shown = looking.facts["flop_of_the_tower"] / each / params.train.num_train_epochs
    # Rows that share an image show it once.
    assert 82_783 * 0.9 < shown < 443_757
    assert looking.hours > trained.hours and answering.facts["flop"] > evaluated.facts["flop"]
    assert looking.facts["flop"] == trained.facts["flop"]
    at = {name: total(parts) for name, parts in looking.gpu.items()}
    assert at["looking at pictures"] < max(at.values()), "the step itself takes more"
    before = {name: total(parts) for name, parts in trained.gpu.items()}
    tower = looking.gpu["loss"]["encoder"]
    # And 5 % of it that the allocator loses.
    assert all(tower <= at[name] - before[name] <= 1.06 * tower for name in before)


def test_exit_codes(capsys, monkeypatch, clean_checkout):
    reference = str(ROOT / "presets/vqav2-reference.yaml")
    assert main(["preflight", reference, "--device", "RTX 4090", "--host-memory", "192", "--disk", "500"]) == 0
    assert capsys.readouterr().out.startswith(f"VERDICT: {reference} fits: 4 x GeForce RTX 4090 of 24.0 GiB, 192.0 GiB")
    assert main(["preflight", reference, "--device", "RTX 4090", "--host-memory", "16", "--disk", "500"]) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"VERDICT: {reference} does not fit: 4 x GeForce RTX 4090 of 24.0 GiB, 16.0 GiB")
    assert second.startswith("does not fit: train: host memory")


def test_json_has_the_keys_it_had(capsys, monkeypatch, clean_checkout):
    arguments = ["presets/vqav2-1gpu.yaml", "--device", "T4", "--host-memory", "128", "--disk", "500", "--json"]
    assert main(["preflight", *arguments]) == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["params", "params_hash", "machine", "stages", "checks", "options", "lacks", "fits"]
    assert not found["fits"] and "Tesla T4 has no bfloat16" in found["lacks"][0]


@pytest.mark.parametrize(
    ("name", "device", "lines"),
    [
        ("vqav2-1gpu", "T4", [f"{SLOW} to float32, train.rounding to nearest"]),
        (
            "vqav2-1gpu",
            "V100",
            [f"{NO_KERNELS} Tesla V100-SXM2-16GB: name a T4", "Tesla V100-SXM2-16GB has no bfloat16"],
        ),
        ("small", "P100", [f"{NO_KERNELS} Tesla P100-SXM2-16GB"]),
        ("small", "T4", []),
    ],
)
def test_what_a_device_cannot_do_stands_in_the_verdict(preset, ask, name, device, lines):
    changes = {"train.launch": "gpu"}
    if name == "small" and lines:
        changes["vision.compute_dtype"] = "bfloat16"
    prediction = ask(preset(name, **changes), device=device)
    assert prediction.fits == (not lines) and len(prediction.lacks) == len(lines)
    text = as_text(prediction).splitlines()
    assert ("cannot run: 1 x" in text[0]) == bool(lines)
    for said, line in zip(text[1:], lines, strict=False):
        assert said.startswith(line) and len(said) < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "RTX 4080"], "'RTX 4080' is not known. The nearest known: GeForce RTX 4090"),
        (["--device", "H1OO"], "'H1OO' is not known. The nearest known: H100"),
        (["--device", "cpu"], "train.launch fsdp2 runs on GPUs"),
        ([], "--device is missing"),
        (["--device", "A10G", "--utilisation", "1.5"], "at most 1"),
        (["--device", "A10G", "--disk", "-1"], "--disk is -1.0; it must be a number above 0"),
        (["--device", "A10G", "--disk", "inf"], "--disk is inf; it must be a number above 0"),
        (["--device", "A10G", "--price", "nan"], "--price is nan; it must be a number above 0"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys, monkeypatch, clean_checkout):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["preflight", str(ROOT / "presets/vqav2-reference.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_small_parameters_on_a_gpu_are_refused_in_one_line_that_helps(capsys, monkeypatch, clean_checkout):
    assert main(["preflight", "presets/small.yaml", "--device", "H100"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "(train.launch: cpu)" in said
    advised = re.search("`vlm-vqa (.*)`", said)[1].split()
    assert main([*advised, "--host-memory", "128", "--disk", "500"]) == 0


def test_extraction_and_training_may_run_on_other_devices(preset, ask):
    extraction = ask(preset("vqav2-reference", **{"vision.launch": "cpu"}), device="A10G").stages[1]
    assert extraction.hours is None and not extraction.gpu and "not known" in extraction.facts["note"]
    with pytest.raises(UserError, match="vision.launch gpu runs on GPUs"):
        ask(preset("small", **{"vision.launch": "gpu"}))


def test_hours_and_cost_follow_rate_share_and_price(preset, ask):
    one = ask(preset("vqav2-reference"), device="A10G", price=1.0, utilisation=0.2)
    two = ask(preset("vqav2-reference"), device="A10G", price=3.0, utilisation=0.4)
    for slow, fast in zip(one.stages[1:], two.stages[1:], strict=True):
        if slow.hours is not None:
            assert slow.hours == pytest.approx(2 * fast.hours)
            assert two.cost(fast.hours) == pytest.approx(1.5 * one.cost(slow.hours))
            assert one.cost(slow.hours) == 4 * slow.hours
    train = one.stages[2]
    flop = train.facts["flop"] + train.facts["flop_recomputed"]
    assert train.hours * 3600 == pytest.approx(flop / (70e12 * 0.2 * 4))


def trained(prediction):
    return prediction.stages[2]


def test_validation_costs_time_and_is_said(preset, ask):
    off = {"validation.questions": 0, "validation.train_questions": 0, "validation.keep": "last"}
    without, held, val = (
        ask(preset("vqav2", **changes), device="A10G")
        for changes in (
            off,
            {"validation.every_steps": 1000},
            {"validation.from": "val", "validation.every_steps": 1000},
        )
    )
    assert "validation adds" not in as_text(without) and "validations" not in trained(without).facts
    # The dev part is not trained on: 2,000 questions twice, 256 a step.
    assert [trained(one).facts["steps"] for one in (without, held, val)] == [3468, 3452, 3468]
    facts = trained(val).facts
    assert facts["validations"] == 5, "at 0, 1000, 2000, 3000 and the end"
    share = facts["flop_of_validation"] / (facts["flop"] + facts["flop_recomputed"])
    assert trained(val).hours == pytest.approx((1 + share) * trained(without).hours)
    assert f"validation adds {share:.1%} to training's FLOPs: 5 times by validation.every_steps 1000" in as_text(val)
    assert facts["step_seconds"] == trained(without).facts["step_seconds"]
    often = trained(ask(preset("vqav2", **{"validation.every_steps": 100}), device="A10G")).facts
    assert often["validations"] == 36 and 0.1 < often["flop_of_validation"] / often["flop"]


def test_the_best_checkpoint_takes_room_beside_the_others_and_no_memory(preset, ask):
    last, best = (
        trained(ask(preset("vqav2", **{"validation.keep": keep}), device="A10G")) for keep in ("last", "best")
    )
    assert best.disk["checkpoints"] == last.disk["checkpoints"] * 4 / 3, "two are kept, and one is being written"
    assert (best.host, best.gpu) == (last.host, last.gpu)
