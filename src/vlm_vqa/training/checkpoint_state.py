"""What a checkpoint holds of a training, and how a training takes it up again.

Each process writes the rows of every parameter that it holds, and of the optimizer's states for them; with them the rows'
places in the whole parameter. Reading asks for rows by place, so the same code resumes on as many processes as before, bit
for bit, and on more or fewer of them. Under DDP all processes hold the same, and the first one writes it.

The one thing that cannot always be divided anew is an 8-bit state whose blocks of 256 values run across the new borders.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm_vqa.errors import UserError
from vlm_vqa.training import checkpoint_files
from vlm_vqa.training.optimizer import BLOCK, is_sharded, local
from vlm_vqa.training.rows import Rows, named_parameters, rows_held

log = logging.getLogger(__name__)

CONSTANT_STATES = {"qmap1", "qmap2"}  # states of bitsandbytes that are the same for all parameters and are made anew
BLOCK_STATES = {"absmax1", "absmax2"}  # one value for each block of 256 values of the rows
WHOLE_STATES = {"gnorm_vec"}  # one for the whole parameter, the same on all processes


class Unfit(Exception):
    """Stored optimizer states cannot be divided as this launch divides them."""


def leave_out_frozen(model: nn.Module) -> None:
    """Let the files that DeepSpeed makes of `model.state_dict()` hold only what is trained: the rest, which a checkpoint
    names by its hash, is what the model has already when it reads them."""

    def frozen(prefix: str) -> dict[str, Tensor]:
        # By all their names: an embedding is the output head, too.
        every = model.named_parameters(prefix.removesuffix("."), remove_duplicate=False)
        return {name: one.data for name, one in every if not one.requires_grad}

    def drop(_model: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
        for name in frozen(prefix):
            state.pop(name, None)

    def fill(_model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name, value in frozen(prefix).items():
            state.setdefault(name, value)

    model.register_state_dict_post_hook(drop)
    model.register_load_state_dict_pre_hook(fill)


# --- writing ---------------------------------------------------------------------------------------------------------


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, rank: int, copy: bool) -> tuple[dict, dict]:
    """Return this process's tensors, on the CPU, and facts, for `checkpoint_files.Writer.save`.

    With `copy` training may go on while they are written; without, what is on the CPU already is not held twice.
    Frozen weights are not among them: whoever goes on has built the same, as `VqaTrainer.frozen` says.
    """
    parameters = named_parameters(model)
    tensors: dict[str, Tensor] = {}
    states: dict[str, dict[str, Any]] = {}
    held: dict[str, Rows] = {}
    for name, parameter in parameters.items():
        if rank > 0 and not is_sharded(parameter):
            continue
        held[name] = rows_held(parameter)
        if parameter.requires_grad:
            tensors[f"model/{name}"] = _on_cpu(parameter, copy)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and key not in CONSTANT_STATES:
                tensors[f"optimizer/{name}/{key}"] = _on_cpu(value, copy)
            elif not isinstance(value, Tensor):
                states.setdefault(name, {})[key] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, {"parameters": _described(parameters), "rows": held, "states": states, "groups": groups}


def _described(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: {"shape": list(one.shape), "dtype": str(one.dtype)} for name, one in parameters.items()}


def _on_cpu(tensor: Tensor, copy: bool) -> Tensor:
    return local(tensor.detach()).to("cpu", copy=copy).contiguous()


def save_random_state(scheduler: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what belongs to a process, not to its parameters: torch's generators (steps draw from no other), schedule."""
    tensors = {"random/cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.random.get_rng_state()
    return tensors, {"scheduler": scheduler.state_dict()}


# --- reading ---------------------------------------------------------------------------------------------------------


class Checkpoint:
    """A whole checkpoint, open for reading."""

    def __init__(self, folder: Path, rank: int, world: int):
        """Open it for process `rank` of `world`; its files have been verified."""
        self.folder, self.rank, self.world = folder, rank, checkpoint_files.world_of(folder) or 0
        self.same_world = self.world == world
        self.facts = [checkpoint_files.read_seal(folder, writer, self.world) for writer in range(self.world)]
        self._files = [checkpoint_files.read_tensors(folder, writer, self.world) for writer in range(self.world)]

    def load_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, restart: bool) -> None:
        """Put weights and optimizer states back.

        UserError if the checkpoint is of another model, or its optimizer states do not fit and `restart` is false.
        """
        parameters = self.load_weights(model)
        try:
            states = {one: dict(self._states(optimizer, name, one)) for name, one in parameters.items()}
            optimizer.state.update({parameter: state for parameter, state in states.items() if state})
        except Unfit as error:
            if not restart:
                raise UserError(
                    f"{self.folder}: {error}. Go on with {self.world} processes as before; or set train.restart_optimizer: "
                    "true to go on from the weights with fresh optimizer states; or delete the folder to start again."
                ) from error
            log.warning("%s: %s; going on from its weights with fresh optimizer states", self.folder, error)
        for group, stored in zip(optimizer.param_groups, self.facts[0]["groups"], strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})

    def load_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Put the weights back, and return the parameters by name; UserError if the checkpoint is of another model."""
        parameters = named_parameters(model)
        stored, found = self.facts[0]["parameters"], _described(parameters)
        wrong = sorted(name for name in stored.keys() | found.keys() if stored.get(name) != found.get(name))
        if wrong:
            raise UserError(
                f"{self.folder}: belongs to another model; missing, unknown or of another shape: {wrong[:5]}. Delete "
                f"the folder {self.folder}."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    local(parameter).copy_(self._read(f"model/{name}", name, rows_held(parameter)))
        return parameters

    def load_random_state(self, seed: int) -> None:
        """Put the generators back where they were; with another number of processes, seed them anew and say so."""
        if not self.same_world:
            said = "%s was written by another number of processes: dropout draws other numbers from here on"
            log.warning(said, self.folder)
            torch.manual_seed(seed)
            return
        file = self._files[self.rank]
        torch.random.set_rng_state(file.get_tensor("random/cpu"))
        if torch.cuda.is_available():
            torch.cuda.random.set_rng_state(file.get_tensor("random/cuda"))

    def _states(self, optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> Iterator[tuple[str, Any]]:
        """Yield the states of the rows of `parameter` that this process holds."""
        rows = rows_held(parameter)
        keys = sorted({key for file in self._files for key in file.keys() if key.startswith(f"optimizer/{name}/")})
        for key in keys:
            state = key.rpartition("/")[2]
            if state in WHOLE_STATES or state == "step":
                value = next(file for file in self._files if key in file.keys()).get_tensor(key)
            else:
                width = self._width(name, parameter) if state in BLOCK_STATES else None
                value = self._read(key, name, rows, width)
            if state != "step":  # which torch keeps on the CPU
                value = value.to(local(parameter).device)
                if isinstance(parameter, DTensor) and isinstance(optimizer, torch.optim.AdamW):
                    # torch's own wants a state sharded as the parameter is.
                    where, shape, stride = parameter.placements, parameter.shape, parameter.stride()
                    place: dict[str, Any] = {"run_check": False, "shape": shape, "stride": stride}
                    value = DTensor.from_local(value, parameter.device_mesh, where, **place)
            yield state, value
        scalars = next((facts["states"][name] for facts in self.facts if name in facts["states"]), {})
        yield from scalars.items()
        if any(key.endswith("absmax1") for key in keys):
            for state, kind in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
                yield state, optimizer.name2qmap[kind].to(local(parameter).device)  # ty: ignore[missing-attribute] - bitsandbytes'

    def _read(self, key: str, name: str, rows: Rows, width: int | None = None) -> Tensor:
        """Read what is held of `rows`, or of the blocks of their `width` values each, from the processes that hold it."""
        parts = []
        for file, held in self._holders(name):
            if rows == held:
                return file.get_tensor(key)
            start, stop = max(rows.start, held.start) - held.start, min(rows.stop, held.stop) - held.start
            if start < stop:
                # Where a block goes over the last row, it belongs to it; other borders run between blocks.
                first, last = (start, stop) if width is None else (-(-row * width // BLOCK) for row in (start, stop))
                parts.append(file.get_slice(key)[first:last])
        # A process may hold no rows.
        return torch.cat(parts) if parts else file.get_slice(key)[:0]

    def _width(self, name: str, parameter: Tensor) -> int:
        """Return the values of a row of a parameter whose states have blocks; Unfit if a border runs through a block.

        All processes find the same: some with old states, some with fresh ones would train no one model.
        """
        rows, width = parameter.shape[0], math.prod(parameter.shape[1:])
        # The first rows of all processes that hold any.
        stored = {held.start for _, held in self._holders(name) if held.start < held.stop}
        # FSDP2 divides as `torch.chunk` does.
        asked = set(range(0, rows, -(-rows // parameter.device_mesh.size()))) if is_sharded(parameter) else {0}
        if asked != stored and any(edge * width % BLOCK for edge in asked | stored):
            raise Unfit(
                f"the 8-bit optimizer states of {name} were divided among {self.world} processes in blocks of {BLOCK} "
                "values that run across the new borders"
            )
        return width

    def _holders(self, name: str) -> Iterator[tuple[Any, Rows]]:
        for file, facts in zip(self._files, self.facts, strict=True):
            if name in facts["rows"]:
                yield file, Rows(*facts["rows"][name])
