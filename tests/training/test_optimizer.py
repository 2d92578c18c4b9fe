"""8-bit AdamW: states really in 8 bits, and percentile clipping by the old bitsandbytes rule."""

import dataclasses

import pytest
import torch

from vlm_vqa.params import Dtype, Optimizer, Rounding, load_params
from vlm_vqa.training.optimizer import (
    HISTORY,
    ClippedAdamW8bit,
    StochasticAdamW,
    build_optimizer,
    clipping_factor,
    has_8bit_work,
    round_stochastically,
    rounding_generator,
    state_types,
)


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


def test_8_bits_are_missed_of_no_parameter_that_waits():
    small, large = torch.nn.Parameter(torch.zeros(8)), torch.nn.Parameter(torch.zeros(80, 64))
    optimizer = ClippedAdamW8bit([{"params": [small, large], "optim_bits": 8}], lr=0.01)
    small.grad = torch.ones(8)
    optimizer.step()
    assert not has_8bit_work(optimizer) and state_types(optimizer) == ["float32"]
    large.grad = torch.ones(80, 64)
    optimizer.step()
    assert has_8bit_work(optimizer) and state_types(optimizer) == ["float32", "uint8"]


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


# --- bfloat16 weights ------------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_right_on_average_and_exact_where_nothing_is_lost():
    source = torch.full((200_000,), 1.0 + 0.3 * 2**-7)
    target = torch.empty_like(source, dtype=torch.bfloat16)
    round_stochastically(target, source, torch.Generator().manual_seed(0))
    # bfloat16 has 1 and 1 + 2**-7 here, and nothing between.
    assert set(target.tolist()) == {1.0, 1 + 2**-7}
    assert target.float().mean().item() == pytest.approx(source[0].item(), abs=2**-7 * 0.005)
    special = torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), float("-inf"), float("nan"), 3.3895e38])
    written = torch.empty(8, dtype=torch.bfloat16)
    round_stochastically(written, special, torch.Generator().manual_seed(1))
    assert written[:6].tolist() == special[:6].tolist() and written[6].isnan()


def displacement(train, dtype, *, nearest=False, steps=30):
    """Move 4,096 weights of common size by the reference recipe's learning rate; return how far each came, float32."""
    weight = torch.nn.Parameter(torch.full((64, 64), 0.02).to(dtype))
    start = weight.detach().float().clone()
    model = torch.nn.Module()
    model.weight = weight
    optimizer = torch.optim.AdamW([weight], lr=1e-5) if nearest else build_optimizer(train, model, {"weight"}, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weight.grad = (1 + 0.1 * torch.randn(64, 64, generator=generator)).to(dtype)
        optimizer.step()
    return (weight.detach().float() - start).flatten()


@pytest.mark.parametrize("kind", [Optimizer.ADAMW_TORCH, Optimizer.ADAMW_BNB_8BIT])
def test_the_recipes_learning_rate_moves_bfloat16_weights_as_it_moves_float32_ones(kind):
    base = dataclasses.replace(load_params("presets/small.yaml").train, optimizer=kind, learning_rate=1e-5)
    precise = displacement(base, torch.float32)
    rounded = displacement(
        dataclasses.replace(base, weights_dtype=Dtype.BFLOAT16, rounding=Rounding.STOCHASTIC), torch.bfloat16
    )
    assert rounded.mean().item() == pytest.approx(precise.mean().item(), rel=0.05)
    # What is refused, and why: rounded to nearest, no weight moves at all.
    assert displacement(base, torch.bfloat16, nearest=True).abs().max() == 0


@pytest.mark.parametrize("kind", [Optimizer.ADAMW_TORCH, Optimizer.ADAMW_BNB_8BIT])
def test_updating_in_parts_changes_nothing(kind, monkeypatch):
    base = dataclasses.replace(load_params("presets/small.yaml").train, optimizer=kind, learning_rate=1e-3,
                               weights_dtype=Dtype.BFLOAT16, rounding=Rounding.STOCHASTIC)  # fmt: skip
    whole = displacement(base, torch.bfloat16)
    monkeypatch.setattr("vlm_vqa.training.optimizer.CHUNK", 1024)
    # The random numbers fall elsewhere, so weights differ by chance; their mean does not.
    assert displacement(base, torch.bfloat16).mean().item() == pytest.approx(whole.mean().item(), rel=0.01)


def test_rounding_repeats_itself_and_differs_by_step_and_parameter():
    parameter = torch.nn.Parameter(torch.zeros(2))
    draw = lambda *key: torch.randint(0, 1 << 30, (4,), generator=rounding_generator(*key, parameter)).tolist()  # noqa: E731
    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({tuple(draw(*key)) for key in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3)]}) == 4


def test_a_parameter_rounds_the_same_whoever_else_has_a_gradient():
    ends = []
    for waits in (False, True):
        both = [torch.nn.Parameter(torch.full((64,), 0.02, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = StochasticAdamW([{"params": both, "optim_bits": 32}], lr=1e-5, seed=0)
        for parameter in both[waits:]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ends.append(both[1].detach())
        assert (not optimizer.state.get(both[0])) == waits
    assert torch.equal(*ends)


class Parts(torch.nn.Module):
    """A projector, an embedding, a layer, by the names that a model has."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.multi_modal_projector = torch.nn.Linear(3, 4)
        self.embedding, self.layer = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["layers+projector 1 8 0.3 1", "embedding 1 32 0.3 1", "layers+projector 1 8 0 1"]),
        (
            {"optimizer": Optimizer.ADAMW_TORCH, "percentile_clipping": 100},
            ["layers+projector 1 32 0.3 1", "embedding 1 32 0.3 1", "layers+projector 1 32 0 1"],
        ),
        (
            {"projector_learning_rate": 5.0, "embedding_learning_rate": 2.0},
            ["layers 1 8 0.3 1", "layers 1 8 0 1", "embedding 2 32 0.3 1", "projector 5 8 0.3 1", "projector 5 8 0 1"],
        ),
        (
            {"projector_steps": 7},
            ["layers 1 8 0.3 8", "embedding 1 32 0.3 8", "layers 1 8 0 8", "projector 1 8 0.3 1", "projector 1 8 0 1"],
        ),
    ],
)
def test_groups_are_by_part_decay_and_bits(changes, expected):
    base = {"optimizer": Optimizer.ADAMW_BNB_8BIT, "weight_decay": 0.3, "learning_rate": 1.0}
    train = dataclasses.replace(load_params("presets/small.yaml").train, **base | changes)
    decayed = {"model.multi_modal_projector.weight", "embedding.weight", "layer.weight"}
    groups = build_optimizer(train, Parts(), decayed, seed=0).param_groups
    keys = ("lr", "optim_bits", "weight_decay", "from_step")
    assert [" ".join([group["name"], *(f"{group[key]:g}" for key in keys)]) for group in groups] == expected
    assert [group["elements"] for group in groups] == [sum(map(torch.numel, group["params"])) for group in groups]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": Optimizer.ADAMW_BNB_8BIT},
        {"weights_dtype": Dtype.BFLOAT16, "rounding": Rounding.STOCHASTIC},
    ],
)
def test_every_optimizer_forgets_as_slowly_as_asked(changes):
    """After gradients of 1 and then of 0, the second moment is (1 - beta2) x beta2."""
    train = dataclasses.replace(load_params("presets/small.yaml").train, adam_beta2=0.75, **changes)
    weight = torch.zeros(4, 4, dtype=getattr(torch, train.weights_dtype.value))
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(weight)
    optimizer = build_optimizer(train, model, set(), seed=0)
    for gradient in (torch.ones_like, torch.zeros_like):
        model.weight.grad = gradient(weight)
        optimizer.step()
    state = optimizer.state[model.weight]
    second = state["exp_avg_sq"] if "exp_avg_sq" in state else state["state2"]
    torch.testing.assert_close(second.float(), torch.full((4, 4), 0.25 * 0.75))
