"""Optimizers by `params.yaml`: AdamW in 32 or 8 bits, on whole or sharded parameters, on float32 or bfloat16 weights.

Under FSDP2 a parameter is a `DTensor` of which each process holds some rows. The states of 8-bit AdamW belong to those rows
alone and are plain tensors: bitsandbytes has no sharded operations, and needs none.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Shard

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import hash_json
from vlm_vqa.model.vlm import PROJECTOR
from vlm_vqa.params import Dtype, Optimizer, TrainParams

if TYPE_CHECKING or find_spec("bitsandbytes"):
    from bitsandbytes import functional as bnb
    from bitsandbytes.optim import AdamW8bit
else:
    # torch's own AdamW does without; `build_optimizer` says so where it is needed.
    bnb, AdamW8bit = None, torch.optim.AdamW

HISTORY = 100  # gradient norms remembered for each parameter
BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit states
LEAST_8BIT = 4096
"""Smaller parameters keep 32-bit states, as bitsandbytes has it; counted over all shards, so that every launch agrees."""
CHUNK = 1 << 24  # values of bfloat16 weights that are updated at once: what bounds the memory of their float32 copies


class ClippedAdamW8bit(AdamW8bit):
    """8-bit AdamW that clips each parameter's gradient to a percentile of its own last 100 norms.

    bitsandbytes dropped `percentile_clipping` in 0.50, and the Trainer never forwarded it before; this is the rule of
    bitsandbytes 0.49 and earlier, with the norm of the whole parameter where it is sharded. States are uint8 in blocks of
    256 values; float32 for parameters under 4,096 elements and for groups with `optim_bits: 32`.
    """

    def __init__(self, params, percentile_clipping: int = 100, seed: int | None = None, **options: Any):
        """Take `AdamW8bit`'s options; a percentile of 0 or 100 is off, bfloat16 weights need a seed for their rounding."""
        super().__init__(params, **options)
        self.percentile = percentile_clipping if percentile_clipping != 100 else 0
        self.seed: Any = seed  # None where no weights are bfloat16, and nobody asks

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config = super().get_config(gindex, pindex, group)
        whole = self.param_groups[gindex]["params"][pindex].numel()
        eight = group.get("optim_bits", 8) == 8 and whole >= LEAST_8BIT
        # A shard may be smaller than the bound that its parameter passes.
        return config | {"optim_bits": 8 if eight else 32, "min_8bit_size": 0}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # ty: ignore[incompatible-method-override] - see the assertion
        """Clip, then update every parameter that has a gradient."""
        assert closure is None, "no closure: the Trainer has the gradients already"
        work = [
            (group, gindex, pindex, parameter)
            for gindex, group in enumerate(self.param_groups)
            for pindex, parameter in enumerate(group["params"])
        ]
        # Numbered before some are left out: rounding draws the same, whoever else has a gradient.
        work = [(number, *one) for number, one in enumerate(work) if one[-1].grad is not None]
        for _, group, gindex, pindex, parameter in work:
            if not self.state[parameter]:
                # The states of the rows held here.
                rows = local(parameter)
                super().init_state(group, rows, gindex, pindex)
                self.state[parameter] = self.state.pop(rows)
                if self.percentile:
                    self.state[parameter]["gnorm_vec"] = torch.zeros(HISTORY, dtype=torch.float32, device=rows.device)
            self.state[parameter]["step"] += 1
        if self.percentile and work:
            self._clip([parameter for *_, parameter in work])
        for number, group, gindex, pindex, parameter in work:
            self._update(number, self.get_config(gindex, pindex, group), parameter)

    def _clip(self, parameters: list[Tensor]) -> None:
        """Scale each gradient down to the percentile of its history, by the norm over all its shards."""
        squared = torch.stack([local(parameter.grad).float().pow(2).sum() for parameter in parameters])  # ty: ignore[invalid-argument-type] - `step` looked
        sharded = torch.tensor([is_sharded(parameter) for parameter in parameters], device=squared.device)
        if sharded.any():
            everywhere = squared.clone()
            distributed.all_reduce(everywhere)
            squared = torch.where(sharded, everywhere, squared)
        for parameter, norm in zip(parameters, squared, strict=True):
            state = self.state[parameter]
            factor = clipping_factor(norm, state["gnorm_vec"], state["step"], self.percentile)
            gradient = local(parameter.grad)  # ty: ignore[invalid-argument-type] - `step` looked
            gradient.mul_(factor.to(gradient.dtype))

    def _update(self, number: int, config: dict[str, Any], parameter: Tensor) -> None:
        state = self.state[parameter]
        weights, gradient = local(parameter).view(-1), local(parameter.grad).contiguous().view(-1)  # ty: ignore[invalid-argument-type] - `step` looked
        if weights.dtype == torch.float32:
            self._update_part(config, state, weights, gradient, slice(0, weights.numel()))
            return
        random = rounding_generator(self.seed, state["step"], number, parameter)
        for start in range(0, weights.numel(), CHUNK):
            part = slice(start, min(start + CHUNK, weights.numel()))
            precise = weights[part].float()
            self._update_part(config, state, precise, gradient[part].float(), part)
            round_stochastically(weights[part], precise, random)

    @staticmethod
    def _update_part(
        config: dict[str, Any], state: dict[str, Any], weights: Tensor, gradient: Tensor, part: slice
    ) -> None:
        """Update float32 `weights` [n] in place with the states of the same places; parts begin at a block."""
        if not weights.numel():
            return
        first, second = (state[name].view(-1)[part] for name in ("state1", "state2"))
        (beta1, beta2), step = config["betas"], state["step"]
        eps, rate, decay = (config[name] for name in ("eps", "lr", "weight_decay"))
        what = ("adam", gradient, weights, first)
        if first.dtype == torch.float32:
            bnb.optimizer_update_32bit(*what, beta1, eps, step, rate, second, beta2, weight_decay=decay)
            return
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        maps, scales = (state["qmap1"], state["qmap2"]), (state["absmax1"][blocks], state["absmax2"][blocks])
        betas = (beta1, beta2, 0.0, 0.0)
        bnb.optimizer_update_8bit_blockwise(*what, second, *betas, eps, step, rate, *maps, *scales, weight_decay=decay)


class StochasticAdamW(ClippedAdamW8bit):
    """AdamW for bfloat16 weights: float32 states and arithmetic (`optim_bits: 32`), results rounded stochastically."""


def clipping_factor(squared: Tensor, history: Tensor, step: int, percentile: int) -> Tensor:
    """Return what scales a gradient down to the percentile of its history, at most 1; enters its norm into `history`.

    Args:
        squared: float32 [], the gradient's squared norm.
        history: float32 [100], squared norms; zeros where none was seen yet. Zeros count: with percentile 95 the first
            four gradients are scaled to nothing, as in bitsandbytes.
        step: number of this update, from 1: bitsandbytes counted it before it clipped, so the first norm lands at index 1.
    """
    history[step % HISTORY] = squared
    limit = history.sort().values[percentile]
    return torch.where(squared > limit, (limit / squared).sqrt(), torch.ones_like(squared))


def round_stochastically(target: Tensor, source: Tensor, random: torch.Generator) -> None:
    """Write float32 `source` into bfloat16 `target`, up or down by chance so that the expected value is `source`.

    A bfloat16 is the upper half of a float32: adding random bits to the lower half carries into it in proportion.
    """
    bits = source.view(torch.int32)
    noise = torch.randint(0, 1 << 16, source.shape, dtype=torch.int32, device=source.device, generator=random)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    # Bits added to an infinity would make another number of it.
    target.copy_(torch.where(source.isfinite(), rounded, source))


def rounding_generator(seed: int, step: int, number: int, parameter: Tensor) -> torch.Generator:
    """Return random bits that depend on seed, step and parameter alone: a resumed run rounds as the unbroken one.

    Processes that hold the same weights must round alike, those that hold other rows independently.
    """
    shard = parameter.device_mesh.get_local_rank() if is_sharded(parameter) else 0
    mixed = int(hash_json([seed, step, number, shard])[:15], 16)
    return torch.Generator(local(parameter).device).manual_seed(mixed)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process holds only a part of a tensor."""
    return isinstance(tensor, DTensor) and any(isinstance(placement, Shard) for placement in tensor.placements)


class InBackward:
    """Updates each parameter in the backward pass, as soon as its gradient is whole, and frees that.

    The optimizer's own step, after it, then finds nothing to do.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[[], int]):
        """Take groups as `build_optimizer` makes them, of what gets gradients; `step` tells which one this is."""
        self._norms: dict[Tensor, Tensor] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update, optimizer, group["from_step"], step))

    def _update(self, optimizer: torch.optim.Optimizer, first: int, step: Callable[[], int], parameter: Tensor) -> None:
        assert parameter not in self._norms and parameter.grad is not None, "a gradient came in two parts"
        if step() >= first:
            self._norms[parameter] = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32)
            # It passes over all that have no gradient: all others.
            optimizer.step()
        parameter.grad = None

    def take_norm(self) -> Tensor:
        """Return the norm of the step's gradients, float32 [], over all processes."""
        sharded = any(map(is_sharded, self._norms))
        squared = torch.stack(list(self._norms.values())).square().sum()
        self._norms.clear()
        if sharded:
            distributed.all_reduce(squared)
        return squared.sqrt()


def state_types(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the types of the moments that an optimizer holds after a step."""
    names = ("state1", "state2", "exp_avg", "exp_avg_sq")
    kinds = {state[name].dtype for state in optimizer.state.values() for name in names if name in state}
    return sorted(str(kind).removeprefix("torch.") for kind in kinds)


def has_8bit_work(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a parameter that has been updated is large enough for 8-bit states."""
    groups = [group for group in optimizer.param_groups if group.get("optim_bits") == 8]
    updated = [p for group in groups for p in group["params"] if optimizer.state.get(p)]
    return any(parameter.numel() >= LEAST_8BIT for parameter in updated)


def build_optimizer(train: TrainParams, model: nn.Module, decayed: set[str], seed: int) -> torch.optim.Optimizer:
    """Return the optimizer that `train` asks for over the model's trained parameters.

    `decayed` names those that weight decay acts on; `seed` is of stochastic rounding. UserError if the optimizer is
    bitsandbytes', which is not installed.
    """
    groups, eight = list(_groups(train, model, decayed)), train.optimizer is Optimizer.ADAMW_BNB_8BIT
    how: dict[str, Any] = {"lr": train.learning_rate, "betas": (0.9, train.adam_beta2)}
    if not eight and train.weights_dtype is not Dtype.BFLOAT16:
        return torch.optim.AdamW(groups, **how)
    if bnb is None:
        asked = f"{train.optimizer.value} on {train.weights_dtype.value} weights"
        raise UserError(f"train.optimizer: {asked} needs bitsandbytes, which is not installed. Run `make setup`.")
    if eight:
        return ClippedAdamW8bit(groups, **how, percentile_clipping=train.percentile_clipping, seed=seed)
    return StochasticAdamW(groups, **how, seed=seed)


def _groups(train: TrainParams, model: nn.Module, decayed: set[str]) -> Iterator[dict[str, Any]]:
    """Yield parameters that are treated alike, and how; first those of no rate or phase of their own, whose rate is logged.

    With 8-bit AdamW the embedding keeps 32-bit states, as the Trainer arranges for bitsandbytes (quantised blocks would mix
    rare words with frequent ones), in a group of its own, since DeepSpeed joins the parameters of a group.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    rates = {"projector": train.projector_learning_rate, "embedding": train.embedding_learning_rate}
    apart = {kind for kind, rate in rates.items() if rate or (kind == "projector" and train.projector_steps)}
    groups: dict[tuple[str, bool, int], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "projector" if name.startswith(PROJECTOR) else "layers"
            kind = "embedding" if id(parameter) in embeddings else kind
            part, bits = kind if kind in apart else "", 32 if kind == "embedding" else 8
            groups[part, name not in decayed, bits].append((kind, parameter))
    for (part, undecayed, bits), members in sorted(groups.items(), key=lambda item: item[0]):
        yield {
            "params": [parameter for _, parameter in members],
            "lr": rates.get(part) or train.learning_rate,
            "weight_decay": 0.0 if undecayed else train.weight_decay,
            "optim_bits": bits if train.optimizer is Optimizer.ADAMW_BNB_8BIT else 32,
            "name": "+".join(sorted({kind for kind, _ in members})),
            "elements": sum(parameter.numel() for _, parameter in members),
            "from_step": 1 if part == "projector" else 1 + train.projector_steps,
        }


def describe_group(group: Mapping[str, Any], steps: int) -> str:
    """Say what one of `build_optimizer`'s groups is, in a training of so many steps, whatever the launch made of it."""
    first = group["from_step"]
    when = f"from step {first}" if first <= steps else f"never: train.projector_steps is {first - 1}, of {steps} steps"
    how = f"weight decay {group['weight_decay']:g}, {group['optim_bits']} bits"
    return f"{group['name']}: {group['elements']:,} elements at rate {group['initial_lr']:g}, {how}, {when}"
