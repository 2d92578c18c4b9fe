"""8-bit AdamW: states really in 8 bits, and percentile clipping by the old bitsandbytes rule."""

import pytest
import torch

from vlm_vqa.training.optimizer import HISTORY, ClippedAdamW8bit, clipping_factor


def reference_factor(norms, percentile):
    """The rule in plain Python: keep the last 100 squared norms, zeros before; clip to the given place of their order."""
    history = [0.0] * HISTORY
    for step, norm in enumerate(norms, start=1):
        history[step % HISTORY] = norm**2
        limit = sorted(history)[percentile]
    return (limit**0.5 / norms[-1]) if norms[-1] ** 2 > limit else 1.0


@pytest.mark.parametrize("percentile", [50, 95])
@pytest.mark.parametrize("steps", [3, 60, 250])
def test_clipping_follows_the_reference(percentile, steps):
    generator = torch.Generator().manual_seed(steps)
    history, norms = torch.zeros(HISTORY), []
    for step in range(1, steps + 1):
        gradient = torch.randn(5, generator=generator)
        norms.append(gradient.norm().item())
        factor = clipping_factor(gradient.pow(2).sum(), history, step, percentile)
    assert factor.item() == pytest.approx(reference_factor(norms, percentile), rel=1e-5)


def train(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()


def gradients(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(80, 64, generator=generator) * (10 if step % 7 == 6 else 1) for step in range(count)]


def make(percentile, start=None):
    weight = torch.nn.Parameter(torch.zeros(80, 64) if start is None else start.clone())
    return weight, ClippedAdamW8bit([weight], lr=0.01, percentile_clipping=percentile)


def test_states_are_8_bit_and_clipping_changes_the_result():
    clipped, optimizer = make(50)
    train(optimizer, clipped, gradients(120))
    assert optimizer.state[clipped]["state1"].dtype == torch.uint8
    plain, off = make(100)
    train(off, plain, gradients(120))
    assert "gnorm_vec" not in off.state[plain]
    assert not torch.equal(clipped, plain)


def test_the_history_survives_a_checkpoint():
    straight, optimizer = make(50)
    train(optimizer, straight, gradients(30))
    weight, first = make(50)
    train(first, weight, gradients(30)[:17])
    resumed, second = make(50, weight.detach())
    second.load_state_dict(first.state_dict())
    assert second.state[resumed]["state1"].dtype == torch.uint8
    assert torch.equal(second.state[resumed]["gnorm_vec"], first.state[weight]["gnorm_vec"])
    train(second, resumed, gradients(30)[17:])
    assert torch.equal(resumed, straight)
