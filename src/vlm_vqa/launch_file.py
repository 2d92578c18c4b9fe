"""`launch/NAME.yaml`, accelerate's own configuration: what it may ask for, and which parameters it cannot do.

Apart from `vlm_vqa.training.launch`, so that a file is checked without loading torch.
"""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlm_vqa.errors import UserError
from vlm_vqa.params import Dtype, TrainParams

TYPES = {"NO", "MULTI_GPU", "FSDP", "DEEPSPEED"}
"""accelerate's distributed types that a launch file may ask for."""


class Strategy(Enum):
    """How the work is divided among processes."""

    SINGLE = "one process"
    DDP = "DDP"
    FSDP2 = "FSDP2"
    ZERO2 = "ZeRO-2"
    ZERO3 = "ZeRO-3"

    @property
    def deepspeed(self) -> bool:
        return self in (Strategy.ZERO2, Strategy.ZERO3)

    @property
    def sharded_weights(self) -> bool:
        """Whether a process holds only a part of the weights."""
        return self in (Strategy.FSDP2, Strategy.ZERO3)


class LaunchFile(NamedTuple):
    """What a launch file asks for."""

    path: Path
    key: str
    """The parameter that names it, for messages."""
    strategy: Strategy
    processes: int
    machines: int
    on_cpu: bool

    @property
    def on_a_machine(self) -> int:
        """Processes of one machine."""
        return self.processes // self.machines

    def compare(self, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Compare facts that the file asks for with what has started.

        Raises:
            UserError: one differs.
        """
        stage = {"train.launch": "train", "vision.launch": "extract-features"}[self.key]
        command = f"accelerate launch --config_file {self.path} stages/{stage.replace('-', '_')}.py"
        for fact, value in wanted.items():
            if found[fact] != value:
                raise UserError(
                    f"{self.path} ({self.key}) asks for {fact} {value}, but {found[fact]} started. Run `dvc repro {stage}`, "
                    f"or `{command}`, on a machine that has what it asks for, or choose another {self.key}."
                )


def read_launch(name: str, folder: str | Path = "launch", key: str = "train.launch") -> LaunchFile:
    """Read `launch/NAME.yaml`; `key` is the parameter that names it, for messages.

    Raises:
        UserError: there is no such launch (the existing ones are named), or it asks for what training does not support.
    """
    path = Path(folder) / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in Path(folder).glob("*.yaml")))
        raise UserError(f"{key} is {name!r}, but there is no {path}. Known launches: {known}.")
    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
        lacking = {"distributed_type", "num_processes", "num_machines", "use_cpu"} - asked.keys()
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not an accelerate config: {error}. Compare with launch/cpu.yaml.") from error
    if lacking:
        raise UserError(f"{path}: without {', '.join(sorted(lacking))}. Compare with launch/cpu.yaml.")
    return LaunchFile(
        path, key, _strategy_of(asked, path), asked["num_processes"], asked["num_machines"], asked["use_cpu"]
    )


def read_copies(name: str, folder: str | Path = "launch") -> LaunchFile:
    """Read a launch of extract-features, whose processes each hold the whole encoder.

    Raises:
        UserError: as `read_launch`; or it divides a model or spans machines.
    """
    asked = read_launch(name, folder, "vision.launch")
    if asked.strategy not in (Strategy.SINGLE, Strategy.DDP) or asked.machines != 1:
        raise UserError(
            f"vision.launch is {name!r}, which divides a model or spans machines; the encoder is copied to processes of one "
            "machine. Set vision.launch to cpu, cpu-ddp or ddp."
        )
    return asked


def _strategy_of(asked: dict[str, Any], path: Path) -> Strategy:
    kind = asked.get("distributed_type")
    if kind not in TYPES:
        raise UserError(f"{path}: distributed_type is {kind!r}; it must be one of {', '.join(sorted(TYPES))}.")
    if (kind == "NO") != (asked["num_processes"] == 1):
        raise UserError(
            f"{path}: distributed_type {kind} with num_processes {asked['num_processes']}; NO is for one process, "
            "the others for several."
        )
    if asked.get("mixed_precision", "no") != "no":
        raise UserError(f"{path}: mixed_precision must be 'no': train.compute_dtype decides.")
    if kind == "FSDP":
        return _check_fsdp(asked.get("fsdp_config", {}), path)
    if kind == "DEEPSPEED":
        return _check_deepspeed(asked.get("deepspeed_config", {}), path)
    return {"NO": Strategy.SINGLE, "MULTI_GPU": Strategy.DDP}[kind]


def _check_fsdp(config: dict[str, Any], path: Path) -> Strategy:
    wanted = {
        "fsdp_version": 2,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_activation_checkpointing": False,
        "fsdp_offload_params": False,
    }
    for key, value in wanted.items():
        # accelerate's defaults are other ones for the version alone.
        if config.get(key, 1 if key == "fsdp_version" else False) != value:
            raise UserError(f"{path}: {key} is {config.get(key)}; it must be {value}.")
    return Strategy.FSDP2


def _check_deepspeed(config: dict[str, Any], path: Path) -> Strategy:
    stages = {2: Strategy.ZERO2, 3: Strategy.ZERO3}
    if config.get("zero_stage") not in stages:
        raise UserError(f"{path}: zero_stage is {config.get('zero_stage')}; it must be 2 or 3.")
    if config.get("zero3_init_flag"):
        raise UserError(f"{path}: zero3_init_flag must be false: the model is built before it is divided.")
    unknown = sorted(config.keys() - {"zero_stage", "zero3_init_flag"})
    if unknown:
        raise UserError(f"{path}: deepspeed_config has {', '.join(unknown)}; params.yaml decides everything else.")
    return stages[config["zero_stage"]]


def check_params(train: TrainParams, strategy: Strategy) -> None:
    """Refuse parameters that a strategy would drop.

    Raises:
        UserError: naming both.
    """
    if not strategy.deepspeed:
        return
    if train.percentile_clipping not in (0, 100):
        raise UserError(
            f"train.percentile_clipping is {train.percentile_clipping}, but {strategy.value} (train.launch {train.launch}) "
            "joins all parameters into flat pieces that hide each parameter's norm. Set it to 100 (off), or use DDP or "
            "FSDP2."
        )
    if train.weights_dtype is not Dtype.FLOAT32:
        raise UserError(
            f"train.weights_dtype is {train.weights_dtype.value}, but {strategy.value} (train.launch {train.launch}) keeps "
            "float32 weights of its own. Set it to float32, or use DDP or FSDP2."
        )
    if train.restart_optimizer:
        raise UserError(
            f"train.restart_optimizer is true, which {strategy.value} (train.launch {train.launch}) cannot do. Set it to "
            "false, or delete the folder below checkpoints/ to start again."
        )
