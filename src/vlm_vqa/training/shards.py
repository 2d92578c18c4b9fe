"""Weights that are in no process yet, or in process 0 alone: how FSDP2's processes come to hold each its rows.

accelerate's own way (`fsdp_cpu_ram_efficient_loading`) keeps the whole model until the last row is sent. Here each parameter
is let go once it has been sent. What a machine holds: `python -m proofs.start_memory`.
"""

import torch
from torch import Tensor, distributed, nn

from vlm_vqa.model.vlm import VlmForTraining
from vlm_vqa.training.checkpoint_state import named_parameters, rows_held
from vlm_vqa.training.optimizer import local


def take_weights(model: VlmForTraining) -> dict[str, Tensor]:
    """Take the parameters out of a model, which keeps their shapes, and return them by name; none if it has but shapes."""
    taken = {name: one.detach() for name, one in named_parameters(model).items() if not one.is_meta}
    model._apply(lambda one: one.to("meta") if isinstance(one, nn.Parameter) else one)
    model.tie_weights()
    return taken


def make_room(model: VlmForTraining, device: torch.device | str) -> VlmForTraining:
    """Give parameters that have but shapes room on `device`, for whatever fills it."""
    model._apply(lambda one: torch.empty_like(one, device=device) if one.is_meta else one)
    model.tie_weights()
    return model


def send_rows(model: VlmForTraining, weights: dict[str, Tensor], device: torch.device) -> None:
    """Let process 0 send its `weights`, which are used up, to all, each keeping the rows that it is to hold."""
    main = distributed.get_rank() == 0
    with torch.no_grad():
        for name, parameter in named_parameters(make_room(model, device)).items():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if main:
                whole.copy_(weights.pop(name))
            distributed.broadcast(whole, 0)
            local(parameter).copy_(whole[slice(*rows_held(parameter))])
