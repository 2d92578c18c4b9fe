"""The memory of an optimizer step, against real optimizers and saved tensors."""

import dataclasses

import pytest
import torch

from vlm_vqa.estimate.memory import BLOCK, CHUNK, LEAST_8BIT, Step, total
from vlm_vqa.estimate.questions import Batch
from vlm_vqa.estimate.shapes import Model, model_of
from vlm_vqa.model.flops import Work, rows_work
from vlm_vqa.model.layout import Row
from vlm_vqa.model.vlm import compile_layers, freeze_embeddings, initial_model, recompute_scores, set_dropout
from vlm_vqa.params import Mask
from vlm_vqa.training import optimizer as training_optimizer
from vlm_vqa.training.launch import Strategy
from vlm_vqa.training.optimizer import build_optimizer


@pytest.fixture
def train_params(preset):
    return lambda **changes: preset("small", **{f"train.{name}": value for name, value in changes.items()}).train


NARROW = {"weights_dtype": "bfloat16", "rounding": "stochastic", "compute_dtype": "bfloat16"}


@pytest.mark.parametrize("changes", [{}, NARROW, {"freeze_embeddings": True}], ids=["float32", "bfloat16", "frozen"])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_bnb_8bit"])
def test_optimizer_states_are_those_of_a_real_step(tiny, train_params, changes, optimizer):
    train = train_params(optimizer=optimizer, **changes)
    # Some parameters of more than 4,096 elements, and no whole number of blocks.
    config = dataclasses.replace(tiny.language.config, hidden_size=64, intermediate_size=97)
    real = initial_model(dataclasses.replace(tiny.language, config=config), tiny.encoder_config, tiny.processor, seed=0)
    if train.weights_dtype.value == "bfloat16":
        real.to(torch.bfloat16)
    if train.freeze_embeddings:
        freeze_embeddings(real)
    trained = [one for one in real.parameters() if one.requires_grad]
    for one in trained:
        one.grad = torch.ones_like(one)
    found = build_optimizer(train, real, set(), seed=0)
    found.step()
    model = Model(config, len(tiny.processor.tokenizer), 24, train.freeze_embeddings, train.lora)
    step = Step(model, train, Strategy.SINGLE, 1, gpu=False)
    held = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in found.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    # But for a step's number or a last block's scales of each parameter, and two tables of 256 values.
    assert total(step.states()) == pytest.approx(sum(held.values()), abs=16 * len(trained) + 2048)
    assert total(step.gradients()) == sum(one.grad.nbytes for one in trained)
    assert total(step.weights()) == sum(one.nbytes for one in real.parameters())


def test_the_optimizers_constants_are_its_own():
    own = training_optimizer
    assert (BLOCK, LEAST_8BIT, CHUNK) == (own.BLOCK, own.LEAST_8BIT, own.CHUNK)


class Saved:
    """Bytes that autograd keeps of a real forward pass, but parameters and what belongs to them."""

    def __init__(self, model):
        self.parameters = {one.untyped_storage().data_ptr() for one in model.parameters()}
        self.shapes = {tuple(one.shape) for one in model.parameters() if one.dim() == 2}
        self.kept = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        # Autocast saves its copies of the weights, some of them transposed.
        cast = tensor.dtype == torch.bfloat16 and {tuple(tensor.shape), tuple(tensor.shape[::-1])} & self.shapes
        if storage.data_ptr() not in self.parameters and not cast:
            # Kept alive, so that no other tensor gets its place.
            self.kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    @property
    def bytes(self):
        return sum(size for size, _ in self.kept.values())


def forward(tiny, train_params, mask, changes, layers, narrow=True):
    """Run a real forward pass; return the bytes that autograd kept, the step and the pass that predict them."""
    train = train_params(freeze_embeddings=True, **changes)
    config = dataclasses.replace(tiny.language.config, num_hidden_layers=layers)
    real = initial_model(dataclasses.replace(tiny.language, config=config), tiny.encoder_config, tiny.processor, seed=0)
    set_dropout(real, train.dropout)
    real.narrow_last_layer = narrow
    if train.attention_checkpointing:
        recompute_scores(real)
    freeze_embeddings(real)
    if train.weights_dtype.value == "bfloat16":
        real.to(torch.bfloat16)
    saved = Saved(real)
    if train.compile:
        # What is kept is decided as by inductor, which takes five times as long.
        compile_layers(real, "aot_eager_decomp_partition")
    layout = tiny.layout(mask)
    first, second = layout.tokenize("Is there a red circle?", "no"), layout.tokenize("How many dogs?", "yes yes")
    rows = [Row(0, (first, second) if layout.mask is not Mask.PREFIX_LM else (first,)), Row(1, (second,))]
    batch = layout.collate(rows)
    with (
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=train.compute_dtype.value == "bfloat16"),
    ):
        real(torch.randn(2, tiny.num_patches, 24), **batch)
    closed = batch["prefix_places"].shape[1] if layout.mask is not Mask.PREFIX_LM else 0
    one = Batch(rows_work(layout, rows), len(rows), closed, batch["input_ids"].shape[1])
    model = Model(config, len(tiny.processor.tokenizer), 24, True, None)
    return saved.bytes, Step(model, train, Strategy.SINGLE, 1, gpu=False), one


MODES = {
    "float32": {},
    "autocast": {"compute_dtype": "bfloat16"},
    "bfloat16": NARROW,
    "dropout": {"dropout": 0.1},
    "recomputed scores": {"attention_checkpointing": True},
    "autocast, dropout and recomputed scores": {
        "compute_dtype": "bfloat16",
        "dropout": 0.1,
        "attention_checkpointing": True,
    },
    "autocast and dropout": {"compute_dtype": "bfloat16", "dropout": 0.1},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [mask.value for mask in Mask])
def test_a_layers_activations_are_what_autograd_keeps(tiny, train_params, mask, mode):
    """To the byte: what a third layer adds to two."""
    two, _, _ = forward(tiny, train_params, mask, MODES[mode], 2)
    three, step, one = forward(tiny, train_params, mask, MODES[mode], 3)
    assert three - two == step.layer_activations(one)


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_a_compiled_layers_activations_are_what_autograd_keeps(tiny, train_params, mode):
    """To the byte, as above."""
    compiled = MODES[mode] | {"compile": True}
    two, _, _ = forward(tiny, train_params, "image-prefix", compiled, 2)
    three, step, one = forward(tiny, train_params, "image-prefix", compiled, 3)
    assert three - two == step.layer_activations(one)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [mask.value for mask in Mask])
def test_the_last_layer_keeps_less_as_predicted(tiny, train_params, mask, mode):
    whole, _, _ = forward(tiny, train_params, mask, MODES[mode], 2, narrow=False)
    narrow, step, one = forward(tiny, train_params, mask, MODES[mode], 2)
    shape, tokens, asked = step.model.language, one.work.tokens, one.work.supervised
    # The last norm is of fewer tokens, too; their angles come beside those of all.
    angles = 2 * asked * shape.head_dim * (2 if MODES[mode].get("weights_dtype") else 4)
    norm = (tokens - asked) * (8 * shape.hidden_size + 4)
    predicted = step.layer_activations(one) - step.layer_activations(one, last=True) + norm - angles
    # To the byte, but for the tokens' places.
    assert predicted - (whole - narrow) in (0, 8 * asked)


@pytest.mark.parametrize("mode", MODES)
def test_all_activations_and_the_loss_are_what_autograd_keeps(tiny, train_params, mode):
    """But for indices, the last norm's scales and the like: 2 %."""
    kept, step, one = forward(tiny, train_params, "image-prefix", MODES[mode], 3)
    # At the end of the forward pass the logits' tanh and log-probabilities are what stays of them.
    logits = one.work.supervised * step.model.vocabulary * (step.compute + 4)
    assert step.activations(one) + logits == pytest.approx(kept, rel=0.02)


def parts(step):
    """Return what a rank holds at all times, by name."""
    return step.weights() | step.states() | step.gradients()


@pytest.fixture
def reference_step(preset):
    def step(strategy, processes, **changes):
        params = preset("vqav2-reference", **{f"train.{name}": value for name, value in changes.items()})
        return Step(model_of(params), params.train, strategy, processes, gpu=True)

    return step


def test_what_the_strategies_divide(reference_step):
    one, ddp = reference_step(Strategy.SINGLE, 1), reference_step(Strategy.DDP, 4)
    fsdp, zero2 = reference_step(Strategy.FSDP2, 4), reference_step(Strategy.ZERO2, 4, percentile_clipping=100)
    zero3 = reference_step(Strategy.ZERO3, 4, percentile_clipping=100)
    alone, doubled, divided = parts(one), parts(ddp), parts(fsdp)
    assert alone["weights"] == 4 * 2_618_770_176 and alone["gradients"] == 4 * 2_026_289_664
    assert doubled == alone | {"DDP's buckets": alone["gradients"]}
    # 257,153 rows are no multiple of four: the first ranks hold one more.
    assert 0 < divided["weights"] - alone["weights"] / 4 < 4 * 2304
    assert divided["gradients"] == pytest.approx(alone["gradients"] / 4)
    assert divided["optimizer states"] == pytest.approx(alone["optimizer states"] / 4, rel=1e-3)
    # ZeRO holds 16 bits of all weights, or of its share, and float32 masters of its share.
    assert parts(zero2)["weights"] == 2 * 2_618_770_176 == 4 * parts(zero3)["weights"]
    assert parts(zero2)["masters"] == parts(zero3)["masters"] == 2_026_289_664


def test_only_autocast_copies_weights(reference_step):
    batch = Batch(Work(1000, 900, 5, 10_000, 50), 4, 0, 280)
    copied = {"16-bit weights": 2 * 26 * 77_856_768, "16-bit output head": 2 * 257_153 * 2304}
    for strategy, processes, changes in (
        (Strategy.SINGLE, 1, {}),
        (Strategy.FSDP2, 4, {}),
        (Strategy.SINGLE, 1, NARROW),
    ):
        step = reference_step(strategy, processes, **changes)
        loss = step.moments([batch])["loss"]
        assert {key: loss[key] for key in copied} == (copied if step.autocast else dict.fromkeys(copied, 0))
        assert step.autocast == (strategy is Strategy.SINGLE and not changes)


@pytest.mark.parametrize(
    ("changes", "lower"),
    [
        ({"train.gradient_checkpointing": True}, {"train.gradient_checkpointing": False}),
        ({"train.freeze_embeddings": True}, {"train.freeze_embeddings": False}),
        ({"train.optimizer": "adamw_bnb_8bit"}, {"train.optimizer": "adamw_torch", "train.percentile_clipping": 100}),
        ({f"train.{key}": value for key, value in NARROW.items()}, {}),
        ({"train.batch_size": 3}, {"train.batch_size": 12}),
    ],
    ids=lambda value: "",
)
def test_savings_save(preset, ask, changes, lower):
    base = {"prompt.mask": "image-prefix", "train.launch": "gpu"}
    needed = [
        next(one.needed for one in ask(params, device="A100 80GB PCIe").checks if one[:2] == ("train", "GPU memory"))
        for params in (preset("vqav2-reference", **base, **one) for one in (changes, lower))
    ]
    assert needed[0] < needed[1]
