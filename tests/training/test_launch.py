"""The launch that was asked for is the launch that runs, or training stops at once and says what is wrong."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from vlm_vqa.cores import Threads
from vlm_vqa.errors import UserError
from vlm_vqa.params import Dtype, Rounding, load_params
from vlm_vqa.training import launch
from vlm_vqa.training.launch import Launch, Strategy, check_params, check_prepared, read_launch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch"
ONE = Threads(1, "1 core / 1 process")
TRAIN = load_params(ROOT / "presets/small.yaml").train
EXPECTED = {
    "cpu": Strategy.SINGLE, "gpu": Strategy.SINGLE, "cpu-ddp": Strategy.DDP, "cpu-fsdp2": Strategy.FSDP2,
    "cpu-zero2": Strategy.ZERO2,
    "cpu-zero3": Strategy.ZERO3, "ddp": Strategy.DDP, "fsdp2": Strategy.FSDP2, "zero2": Strategy.ZERO2,
    "zero3": Strategy.ZERO3, "fsdp2-multinode": Strategy.FSDP2,
}  # fmt: skip


# --- what a file asks for --------------------------------------------------------------------------------------------


def test_every_launch_file_is_understood():
    files = {path.stem: path for path in FOLDER.glob("*.yaml")}
    assert {name: read_launch(name, FOLDER).strategy for name in files} == EXPECTED
    for name, path in files.items():
        asked = read_launch(name, FOLDER)
        assert asked.on_cpu == name.startswith("cpu") and asked.processes % asked.machines == 0
        if EXPECTED[name] is Strategy.FSDP2:
            config = yaml.safe_load(path.read_text())["fsdp_config"]
            assert config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
            assert config["fsdp_transformer_layer_cls_to_wrap"] == "Gemma2DecoderLayer"


def test_an_unknown_launch_names_the_known_ones():
    with pytest.raises(UserError, match="'tpu'.*Known launches: cpu, cpu-ddp, cpu-fsdp2"):
        read_launch("tpu", FOLDER)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("cpu", {"distributed_type": "MULTI_CPU"}, "distributed_type is 'MULTI_CPU'"),
        ("cpu", {"num_processes": 2}, "distributed_type NO with num_processes 2"),
        ("cpu-ddp", {"num_processes": 1}, "distributed_type MULTI_GPU with num_processes 1"),
        ("ddp", {"num_processes": 1}, "distributed_type MULTI_GPU with num_processes 1"),
        ("cpu-fsdp2", {"num_processes": 1}, "distributed_type FSDP with num_processes 1"),
        ("cpu-ddp", {"mixed_precision": "bf16"}, "mixed_precision is 'bf16'; it must be no"),
        ("cpu-fsdp2", {"fsdp_config": {}}, "fsdp_version is 1; it must be 2"),
        ("cpu-fsdp2", {"fsdp_config": {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": True}}, "ram_efficient"),
        ("cpu-zero2", {"deepspeed_config": {"zero_stage": 1}}, "zero_stage is 1; it must be 2 or 3"),
        ("cpu-zero3", {"deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True}}, "zero3_init_flag is True; it"),
        ("cpu-zero2", {"deepspeed_config": {"zero_stage": 2, "gradient_clipping": 5}}, "deepspeed_config has gradient_clip"),
    ],
)  # fmt: skip
def test_what_training_does_not_support_is_refused_by_file_and_key(tmp_path, name, changes, words):
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) | changes))
    with pytest.raises(UserError, match=r"odd\.yaml: .*" + words):
        read_launch("odd", tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"percentile_clipping": 95}, "train.percentile_clipping is 95, but ZeRO-2 .*hide each parameter's norm"),
        (
            {"weights_dtype": Dtype.BFLOAT16, "rounding": Rounding.STOCHASTIC},
            "train.weights_dtype is bfloat16, but ZeRO-2",
        ),
        ({"restart_optimizer": True}, "train.restart_optimizer is true, but ZeRO-2"),
        ({"compile": True}, "train.compile is true, but ZeRO-2"),
    ],
)
def test_what_zero_would_drop_is_refused_by_name(changes, words):
    train = dataclasses.replace(TRAIN, **changes)
    with pytest.raises(UserError, match=words):
        check_params(train, Strategy.ZERO2)
    check_params(train, Strategy.FSDP2)


def test_updates_in_the_backward_pass_are_refused_where_gradients_are_added_up_in_buckets():
    train = dataclasses.replace(TRAIN, optimizer_in_backward=True, max_grad_norm=0.0)
    for strategy in (Strategy.DDP, Strategy.ZERO2, Strategy.ZERO3):
        with pytest.raises(UserError, match=f"train.optimizer_in_backward is true, but {strategy.value} .*buckets"):
            check_params(train, strategy)
    for strategy in (Strategy.SINGLE, Strategy.FSDP2):
        check_params(train, strategy)


# --- what started ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "environment", "words"),
    [
        # `accelerate launch --cpu --num_processes 2` starts one process, without a warning.
        ("cpu-ddp", {}, "asks for num_processes 2, but 1 started"),
        ("cpu", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "asks for num_processes 1, but 2 started"),
        ("cpu-fsdp2", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "asks for FSDP True, but False started"),
        (
            "cpu-ddp",
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
            "FSDP False, but True",
        ),
        (
            "cpu-fsdp2",
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            "asks for fsdp_version 2, but 1 started",
        ),
        (
            "cpu-zero2",
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true",
             "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "asks for zero_stage 2, but 3 started",
        ),
        ("cpu-ddp", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, "asks for num_machines 1, but 2 started"),
    ],
)  # fmt: skip
def test_another_start_is_refused_before_processes_wait_for_each_other(monkeypatch, name, environment, words):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=f"launch/{name}.yaml .*{words}.*accelerate launch --config_file"):
        launch.start(dataclasses.replace(TRAIN, launch=name), FOLDER)


def test_threads_are_the_user_s_or_this_process_s_part_and_the_facts_say_why(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)), raising=False)
    try:
        for said, count, why in (("3", 3, "OMP_NUM_THREADS"), ("", 5, "affinity of 5 cores / 1 process")):
            monkeypatch.setenv("OMP_NUM_THREADS", said)
            running = launch.start(dataclasses.replace(TRAIN, launch="cpu"), FOLDER)
            assert running.facts["threads"] == f"{count} ({why})" and torch.get_num_threads() == count
        monkeypatch.setenv("OMP_NUM_THREADS", "all")
        with pytest.raises(UserError, match="OMP_NUM_THREADS is 'all'"):
            launch.start(dataclasses.replace(TRAIN, launch="cpu"), FOLDER)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.device_count() >= 4, reason="there are as many GPUs as are asked for")
def test_gpus_that_are_not_there_are_refused(monkeypatch):
    """Left alone, accelerate would start unrelated trainings on the CPU, one a process."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="asks for GPUs 4, but 0 started"):
        launch.start(dataclasses.replace(TRAIN, launch="fsdp2"), FOLDER)


SCRIPT = """
import dataclasses
from vlm_vqa.params import load_params
from vlm_vqa.training import launch
from vlm_vqa.errors import UserError
try:
    print(launch.start(dataclasses.replace(load_params("presets/small.yaml").train, launch="{name}")))
except UserError as error:
    print(f"refused: {{error}}")  # one write: the ranks share a pipe
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name", "words"),
    [
        ("--use_fsdp --cpu --num_processes 2", "cpu-fsdp2", "You can only use one of"),
        ("--cpu --num_processes 2", "cpu-ddp", "refused: launch/cpu-ddp.yaml (train.launch) asks for num_processes 2"),
        ("--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0",
         "cpu-fsdp2", "refused: launch/cpu-fsdp2.yaml (train.launch) asks for FSDP True, but False"),
        ("--config_file launch/cpu-ddp.yaml", "cpu-ddp", "backend='gloo'"),
    ],
)  # fmt: skip
def test_launches_as_they_are_typed(tmp_path, command, name, words):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(name=name))
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        f"accelerate launch {command} {script}", shell=True, capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, "PATH": programs, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert words in done.stdout + done.stderr, done.stderr[-2000:]


# --- what the model was turned into ----------------------------------------------------------------------------------


def prepared(strategy, processes=2):
    model = torch.nn.Linear(8, 8)
    running = Launch("test", strategy, processes, 0, 1, "cpu", "gloo", ONE)
    return check_prepared(running, model, torch.optim.AdamW(model.parameters()))


def test_a_model_that_was_not_divided_is_refused():
    assert prepared(Strategy.SINGLE, 1)["share_of_weights"] == 1
    with pytest.raises(UserError, match="asks for DDP, but the model is a Linear: gradients would not be averaged"):
        prepared(Strategy.DDP)
    with pytest.raises(UserError, match="asks for FSDP2, but 2 of 2 parameters are not sharded"):
        prepared(Strategy.FSDP2)


def test_weights_held_whole_under_zero_3_are_refused():
    model = torch.nn.Linear(8, 8)
    model.optimizer = type("Zero", (), {"fp32_partitioned_groups_flat": [torch.zeros(36)]})()
    running = Launch("cpu-zero3", Strategy.ZERO3, 2, 1, 1, "cpu", "gloo", ONE)
    with pytest.raises(UserError, match="process 1 of 2 holds 100% of the weights instead of 50%"):
        check_prepared(running, model, torch.optim.AdamW(model.parameters()))
