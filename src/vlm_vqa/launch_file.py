"""`launch/NAME.yaml`, accelerate's own configuration: what it may ask for, and what it cannot do; read without torch."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlm_vqa.errors import UserError
from vlm_vqa.params import Dtype, TrainParams


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
    key: str  # the parameter that names it, for messages
    strategy: Strategy
    processes: int
    machines: int
    on_cpu: bool

    @property
    def on_a_machine(self) -> int:
        """Processes of one machine."""
        return self.processes // self.machines

    def compare(self, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Compare facts that the file asks for with what has started; UserError if one differs."""
        stages = {"train": "train", "vision": "extract-features", "evaluation": "helm-eval"}
        stage = stages[self.key.removesuffix(".launch")]
        command = f"accelerate launch --config_file {self.path} stages/{stage.replace('-', '_')}.py"
        for fact, value in wanted.items():
            if found[fact] != value:
                where = f"on a machine that has what it asks for, or choose another {self.key}."
                wrong = f"{self.path} ({self.key}) asks for {fact} {value}, but {found[fact]} started"
                raise UserError(f"{wrong}. Run `dvc repro {stage}`, or `{command}`, {where}")


def read_launch(name: str, folder: str | Path = "launch", key: str = "train.launch") -> LaunchFile:
    """Read `launch/NAME.yaml`, which `key` names; UserError if there is none, or it asks for what training cannot do."""
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
    sizes = asked["num_processes"], asked["num_machines"]
    return LaunchFile(path, key, _strategy_of(asked, path), *sizes, asked["use_cpu"])


def read_copies(name: str, folder: str | Path = "launch", key: str = "vision.launch") -> LaunchFile:
    """Read a launch of processes that each hold the whole model, as those but training's; UserError if it says otherwise."""
    asked = read_launch(name, folder, key)
    if asked.strategy not in (Strategy.SINGLE, Strategy.DDP) or asked.machines != 1:
        copied = f"here it is copied to processes of one machine. Set {key} to cpu, cpu-ddp or ddp."
        raise UserError(f"{key} is {name!r}, which divides a model or spans machines; {copied}")
    return asked


def _strategy_of(asked: dict[str, Any], path: Path) -> Strategy:
    def check(key: str, *allowed: Any, section: str = "", default: Any = None, why: str = "") -> None:
        """Refuse other values; where there is none, accelerate takes `default`."""
        value = (asked.get(section) or {} if section else asked).get(key)
        value = default if value is None else value
        if value not in allowed:
            raise UserError(f"{path}: {key} is {value!r}; it must be {' or '.join(map(str, allowed))}{why}.")

    kind = asked["distributed_type"]
    check("distributed_type", "NO", "MULTI_GPU", "FSDP", "DEEPSPEED")
    one = asked["num_processes"] == 1
    # On one GPU accelerate divides all the same; DDP it refuses, and on a CPU it forgets what was asked for.
    alone = kind == "NO" or kind in ("FSDP", "DEEPSPEED") and not asked["use_cpu"]
    if one and not alone or kind == "NO" and not one:
        number = f"distributed_type {kind} with num_processes {asked['num_processes']}"
        raise UserError(
            f"{path}: {number}; NO is for one process, the others for several, FSDP and DEEPSPEED for one GPU too."
        )
    check("mixed_precision", "no", default="no", why=": train.compute_dtype decides")
    if kind == "FSDP":
        check("fsdp_version", 2, section="fsdp_config", default=1)
        for key in ("cpu_ram_efficient_loading", "activation_checkpointing", "offload_params"):
            check(f"fsdp_{key}", False, section="fsdp_config", default=False)
    if kind == "DEEPSPEED":
        check("zero_stage", 2, 3, section="deepspeed_config")
        built = ": the model is built before it is divided"
        check("zero3_init_flag", False, section="deepspeed_config", default=False, why=built)
        config = asked["deepspeed_config"]
        if unknown := sorted(config.keys() - {"zero_stage", "zero3_init_flag"}):
            raise UserError(f"{path}: deepspeed_config has {', '.join(unknown)}; params.yaml decides everything else.")
        return Strategy.ZERO2 if config["zero_stage"] == 2 else Strategy.ZERO3
    return {"NO": Strategy.SINGLE, "MULTI_GPU": Strategy.DDP, "FSDP": Strategy.FSDP2}[kind]


def check_params(train: TrainParams, strategy: Strategy) -> None:
    """Refuse, by UserError, parameters that a strategy would drop."""
    zero = strategy.deepspeed
    if zero and train.percentile_clipping not in (0, 100):
        key, mend = "percentile_clipping", "Set it to 100 (off), or use DDP or FSDP2."
        why = f"joins all parameters into pieces that hide each parameter's norm. {mend}"
    elif zero and train.weights_dtype is not Dtype.FLOAT32:
        key, why = "weights_dtype", "keeps float32 weights of its own. Set it to float32, or use DDP or FSDP2."
    elif zero and train.restart_optimizer:
        key, mend = "restart_optimizer", "Set it to false, or delete the folder below checkpoints/ to start again."
        why = f"cannot do that. {mend}"
    elif zero and train.compile:
        key, why = "compile", "changes the layers while they run. Set it to false, or use DDP or FSDP2."
    elif (zero or strategy is Strategy.DDP) and train.optimizer_in_backward:
        key, mend = "optimizer_in_backward", "Set it to false, or use FSDP2 or one process."
        why = f"adds the gradients of all processes up in buckets of its own. {mend}"
    else:
        return
    value = str(getattr(train, key)).lower()
    raise UserError(f"train.{key} is {value}, but {strategy.value} (train.launch {train.launch}) {why}")
