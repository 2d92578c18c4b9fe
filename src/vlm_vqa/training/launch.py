"""The launch that was asked for is the launch that runs, or training stops in its first seconds.

accelerate falls back without a word: an FSDP config on CPUs becomes DDP or two unrelated trainings, `--cpu` with two
processes becomes one. So every fact of the launch file is compared with what really started (`start`), and what the model
and the optimizer were turned into with what the launch means (`check_prepared`).
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vlm_vqa import cores
from vlm_vqa.errors import UserError
from vlm_vqa.launch_file import LaunchFile, Strategy, check_params, read_launch
from vlm_vqa.params import TrainParams
from vlm_vqa.training.optimizer import is_sharded, local

SLACK_SECONDS = 60  # how much later than our own watch a collective gives up by itself


@dataclass(frozen=True)
class Launch:
    name: str
    strategy: Strategy
    processes: int
    process: int
    machines: int
    device: str  # `cpu` or `cuda`
    backend: str
    threads: cores.Threads  # of each process

    @property
    def facts(self) -> dict[str, Any]:
        """What the start banner and MLflow say."""
        counts = {"num_processes": self.processes, "num_machines": self.machines}
        where = {"device": self.device, "backend": self.backend, "threads": str(self.threads)}
        return {"strategy": self.strategy.value, **counts, **where}

    @property
    def main(self) -> bool:
        """Whether this is the process that writes shared outputs."""
        return self.process == 0


def on_main_process() -> bool:
    """Whether this is the launch's first process; for what is said or shown once."""
    return os.environ.get("RANK", "0") == "0"


def start(train: TrainParams, folder: str | Path = "launch") -> Launch:
    """Start the process group and accelerate's process state, and check them against `launch/NAME.yaml`.

    UserError if what started is not what the file asks for, or `OMP_NUM_THREADS` is no number of threads.
    """
    name = train.launch
    asked = read_launch(name, folder)
    strategy = asked.strategy
    check_params(train, strategy)
    device = "cpu" if asked.on_cpu else "cuda"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = cores.threads(local)
    _check_environment(asked)
    if device == "cpu":
        _keep_deepspeed_on_cpu()
    if strategy is not Strategy.SINGLE:
        _join(device, train.stall_seconds)
    # A process may train more than once, each time in another precision; ZeRO-3 would build the next model in pieces.
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    state = PartialState(cpu=device == "cpu")
    if strategy is Strategy.FSDP2 and device == "cpu":
        # accelerate turns MULTI_GPU into FSDP and would leave MULTI_CPU as DDP; nothing else depends on the name.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    found = {"num_processes": state.num_processes, "device": state.device.type}  # ty: ignore[missing-union-attribute] - it has one when it is made
    asked.compare({"num_processes": asked.processes, "device": device}, found)
    torch.set_num_threads(threads.count)
    backend = distributed.get_backend() if distributed.is_initialized() else "none"
    count = state.num_processes
    return Launch(name, strategy, count, state.process_index, count // local, device, backend, threads)


def _check_environment(asked: LaunchFile) -> None:
    """Compare what `accelerate launch` has set with what the file asks for, before any process waits for another."""
    environ, strategy, world = os.environ.get, asked.strategy, int(os.environ.get("WORLD_SIZE", 1))
    facts: dict[str, tuple[Any, Any]] = {"num_processes": (asked.processes, world)}
    for name, wanted in (("FSDP", strategy is Strategy.FSDP2), ("DeepSpeed", strategy.deepspeed)):
        facts[name] = wanted, environ(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"
    if world > 1:
        facts["num_machines"] = asked.machines, world // int(environ("LOCAL_WORLD_SIZE", world))
    if strategy is Strategy.FSDP2:
        facts["fsdp_version"] = 2, int(environ("FSDP_VERSION", 1))
    if strategy.deepspeed:
        facts["zero_stage"] = 2 if strategy is Strategy.ZERO2 else 3, int(environ("ACCELERATE_DEEPSPEED_ZERO_STAGE", 0))
    if not asked.on_cpu:
        gpus = max(1, asked.on_a_machine)
        facts["GPUs"] = gpus, min(gpus, torch.cuda.device_count())  # more than it needs do no harm
    asked.compare(*({name: both[side] for name, both in facts.items()} for side in (0, 1)))


def _join(device: str, stall_seconds: int) -> None:
    """Join the process group that torchrun has described in the environment, once."""
    if distributed.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo beside nccl carries the few facts that live on the host.
    backend = "gloo" if device == "cpu" else "cuda:nccl,cpu:gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=stall_seconds + SLACK_SECONDS))


def _keep_deepspeed_on_cpu() -> None:
    """Let DeepSpeed, which transformers imports under every launch, use the CPU and plain gloo.

    By itself it compiles a shared-memory transport at start, for minutes, and a compilation that was killed leaves a lock on
    which every later run waits for ever.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    if find_spec("deepspeed"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_prepared(launch: Launch, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Compare what accelerate has made of model and (unwrapped) optimizer with what the launch means.

    Return facts for the start banner and MLflow; UserError if the model is not divided as asked for.
    """
    parameters = list(model.parameters())
    unsharded = sum(not is_sharded(p) for p in parameters)
    if launch.strategy is Strategy.FSDP2 and unsharded:
        raise _refused(launch, f"{unsharded} of {len(parameters)} parameters are not sharded")
    weights = sum(_local(p).numel() for p in parameters) / sum(_whole(p) for p in parameters)
    updated = sum(part.numel() for part in _updated_parts(launch.strategy, model, optimizer))
    trained = sum(_whole(p) for p in parameters if p.requires_grad)
    updates = updated / max(1, trained)
    even, whole = 1 / launch.processes, launch.strategy in (Strategy.SINGLE, Strategy.DDP)
    expected = (even if launch.strategy.sharded_weights else 1.0, 1.0 if whole else even)
    for what, found, wanted in zip(("weights", "trained elements"), (weights, updates), expected, strict=True):
        # A matrix of few rows cannot be divided evenly; a whole copy or none at all is what must not be.
        if not (found == wanted if wanted == 1.0 else 0.5 * wanted < found < (1 + wanted) / 2):
            who = f"process {launch.process} of {launch.processes}"
            raise _refused(launch, f"{who} holds {found:.0%} of the {what} instead of {wanted:.0%}")
    if launch.strategy is Strategy.DDP and not isinstance(model, DistributedDataParallel):
        raise _refused(launch, f"the model is a {type(model).__name__}: gradients would not be averaged")
    shares = {"share_of_weights": round(weights, 4), "share_of_updates": round(updates, 4)}
    return shares | {"optimizer": type(optimizer).__name__}


def _refused(launch: Launch, found: str) -> UserError:
    return UserError(
        f"train.launch {launch.name} asks for {launch.strategy.value}, but {found}. Install "
        "the pinned versions (`make setup`) or choose another train.launch."
    )


def _updated_parts(strategy: Strategy, model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the tensors that this process's optimizer updates."""
    if strategy is Strategy.ZERO2:
        return model.optimizer.single_partition_of_fp32_groups
    if strategy is Strategy.ZERO3:  # whose optimizer is given one of these at a time
        return model.optimizer.fp32_partitioned_groups_flat
    return [_local(p) for group in optimizer.param_groups for p in group["params"]]


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return getattr(parameter, "ds_tensor", local(parameter))


def _whole(parameter: torch.Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
