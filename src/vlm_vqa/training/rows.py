"""FSDP2's rows of a model's parameters: which a process holds, and how whole ones come to all processes and back to one.

What a machine holds meanwhile: `python -m proofs.start_memory`, `python -m proofs.real_shape`.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vlm_vqa.model.vlm import VlmForTraining
from vlm_vqa.training.optimizer import is_sharded, local
from vlm_vqa.training.prepare import make_room

SENT_AT_ONCE = 1 << 20
"""Elements of a parameter, at most, on their way from process to process: never a whole embedding in each."""
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc's, which else keeps freed blocks under 32 MiB: most of a model's matrices, in rows or 16 bits."""


class Rows(NamedTuple):
    """A range of a tensor's first dimension; scalars count as one row."""

    start: int
    stop: int


def rows_held(parameter: Tensor) -> Rows:
    """Return which rows of a whole parameter this process holds."""
    if not is_sharded(parameter):
        return Rows(0, parameter.shape[0] if parameter.dim() else 1)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    start = min(offset[0], parameter.shape[0])
    return Rows(start, start + shape[0])


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by the names of the unwrapped model, the tied head once."""
    return {
        name.removeprefix("module.").replace("._checkpoint_wrapped_module", ""): parameter
        for name, parameter in model.named_parameters()
    }


def _pieces(rows: Rows, parameter: Tensor) -> Iterator[Rows]:
    most = max(1, SENT_AT_ONCE // math.prod(parameter.shape[1:]))
    return (Rows(first, min(first + most, rows.stop)) for first in range(rows.start, rows.stop, most))


def take_weights(model: VlmForTraining) -> dict[str, Tensor]:
    """Take the parameters out of a model, which keeps their shapes, and return them by name; none if it has but shapes."""
    taken = {name: one.detach() for name, one in named_parameters(model).items() if not one.is_meta}
    model._apply(lambda one: one.to("meta") if isinstance(one, nn.Parameter) else one)
    model.tie_weights()
    return taken


def send_rows(model: VlmForTraining, weights: dict[str, Tensor], device: torch.device) -> None:
    """Let process 0 send its `weights`, which are used up, to all, each keeping the rows that it is to hold under FSDP2.

    accelerate's own way (`fsdp_cpu_ram_efficient_loading`) keeps the whole model until the last row is sent; here each
    parameter is let go.
    """
    with torch.no_grad():
        for name, parameter in named_parameters(make_room(model, device)).items():
            held, value = rows_held(parameter), weights.pop(name, None)
            for first, last in _pieces(Rows(0, len(parameter)), parameter):
                if value is None:
                    shape = last - first, *parameter.shape[1:]
                    piece = torch.empty(shape, dtype=parameter.dtype, device=device)
                else:
                    piece = value[first:last].to(device, parameter.dtype)
                distributed.broadcast(piece, 0)
                begin, end = max(first, held.start), min(last, held.stop)
                if begin < end:
                    local(parameter)[begin - held.start : end - held.start] = piece[begin - first : end - first]


def whole_rows(parameter: Tensor, holders: Sequence[Rows], process: int) -> Tensor:
    """Let processes send the rows that they hold of a parameter to process 0, which returns it whole: float32, on the CPU.
    The others return none of it.

    `holders` are the rows of each process, by rank. `full_tensor` would make the whole of it on all of them.
    """
    mine, shape = local(parameter.detach()), parameter.shape[1:]
    count = max(rows.stop for rows in holders) if process == 0 else 0
    whole = torch.empty((count, *shape), dtype=torch.float32)
    for sender, rows in enumerate(holders):
        if sender == 0 < process:
            continue
        for first, last in _pieces(rows, parameter):
            if sender == process:
                piece = mine[first - rows.start : last - rows.start].contiguous()
            else:
                piece = torch.empty((last - first, *shape), dtype=mine.dtype, device=mine.device)
            if sender > 0:
                distributed.broadcast(piece, sender)
            if process == 0:
                whole[first:last] = piece
    return whole


def let_go(parameter: Tensor) -> None:
    """Free what this process holds of a parameter, which is of no use then; on a CPU, give it back to the system."""
    if isinstance(parameter, DTensor):
        # FSDP2 keeps these rows by another name, too.
        parameter.to_local().untyped_storage().resize_(0)
    else:
        parameter.data = parameter.new_empty(0)
    if parameter.device.type == "cpu":
        trim()


def trim() -> None:
    """Give this process's freed memory back to the system, where its allocator would keep it and can be asked not to."""
    if TRIM is not None:
        TRIM(0)
