"""Optimizers by `params.yaml`: torch's AdamW, and bitsandbytes' 8-bit AdamW with percentile clipping."""

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.optim import GlobalOptimManager
from torch import Tensor, nn

from vlm_vqa.params import Optimizer, TrainParams

HISTORY = 100
"""Gradient norms remembered for each parameter."""


class ClippedAdamW8bit(bitsandbytes.optim.AdamW8bit):
    """8-bit AdamW that clips each parameter's gradient to a percentile of its own last 100 norms.

    bitsandbytes dropped `percentile_clipping` in 0.50, and the Trainer never forwarded it before; this is the rule of
    bitsandbytes 0.49 and earlier. States are uint8 in blocks of 256 values, float32 for tensors under 4,096 elements.
    """

    def __init__(self, params, percentile_clipping: int = 100, **options: Any):
        """`percentile_clipping` 0 or 100 is off; the other options are `AdamW8bit`'s."""
        super().__init__(params, **options)
        self.percentile = percentile_clipping if percentile_clipping != 100 else 0

    @torch.no_grad()
    def init_state(self, group, p, gindex, pindex):
        """Create the states of `p`; the history lies under a name that bitsandbytes saves and loads unchanged."""
        super().init_state(group, p, gindex, pindex)
        if self.percentile:
            self.state[p]["gnorm_vec"] = torch.zeros(HISTORY, dtype=torch.float32, device=p.device)

    @torch.no_grad()
    def update_step(self, group, p, gindex, pindex):
        """Clip, then update `p` as `AdamW8bit` does."""
        if self.percentile:
            state = self.state[p]
            # bitsandbytes counts the step before it clips, so the first norm lands at index 1.
            p.grad.mul_(clipping_factor(p.grad, state["gnorm_vec"], state["step"] + 1, self.percentile))
        super().update_step(group, p, gindex, pindex)


def clipping_factor(gradient: Tensor, history: Tensor, step: int, percentile: int) -> Tensor:
    """Return what scales `gradient` down to the percentile of its history, at most 1; enters its norm into `history`.

    Args:
        history: float32 [100], squared norms; zeros where none was seen yet. Zeros count: with percentile 95 the first
            four gradients are scaled to nothing, as in bitsandbytes.
        step: number of this update, from 1.
    """
    squared = gradient.float().pow(2).sum()
    history[step % HISTORY] = squared
    limit = history.sort().values[percentile]
    return torch.where(squared > limit, (limit / squared).sqrt(), torch.ones_like(squared)).to(gradient.dtype)


def optimizer_class(train: TrainParams, model: nn.Module) -> tuple[type, dict[str, Any]] | None:
    """Return what the Trainer's `optimizer_cls_and_kwargs` takes, or None for its own `adamw_torch`.

    With 8-bit AdamW the embedding keeps 32-bit states, as the Trainer itself arranges for bitsandbytes: its gradients are
    sparse, and quantised blocks would mix rare words with frequent ones.
    """
    if train.optimizer is Optimizer.ADAMW_TORCH:
        return None
    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return ClippedAdamW8bit, {"lr": train.learning_rate, "percentile_clipping": train.percentile_clipping}
