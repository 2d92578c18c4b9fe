"""The HF Trainer with our batches: accumulation is the large batch, dropout is where it is said to be, resume goes on."""

import dataclasses
import itertools
import sysconfig
from functools import partial
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainerCallback

from tests.tiny_model import GivenFeatures
from vlm_vqa.errors import UserError
from vlm_vqa.model.adapters import add_adapters, merge_adapter, merge_adapters, projector_of, save_adapter
from vlm_vqa.model.layout import Row
from vlm_vqa.model.vlm import (
    compile_layers,
    freeze_embeddings,
    hash_weights,
    initial_model,
    set_dropout,
    trained_state,
)
from vlm_vqa.params import (
    Attention,
    Dtype,
    LoraParams,
    Mask,
    Optimizer,
    Rounding,
    Scheduler,
    TooLong,
    load_params,
)
from vlm_vqa.training import checkpoint_files, checkpoint_state, launch
from vlm_vqa.training import trainer as trainer_module
from vlm_vqa.training.dataset import Collator, QuestionDataset
from vlm_vqa.training.prepare import base_model
from vlm_vqa.training.throughput import COUNTS
from vlm_vqa.training.trainer import CURVE_COLUMNS, ProgressCallback, VqaTrainer, training_arguments, write_curve
from vlm_vqa.training.validation import ANSWERS, SCORE

QUESTIONS = [
    ("What color is the shape?", "red"),
    ("Is it?", "yes"),
    ("How many dogs are there?", "two"),
    ("Is it?", "no"),
]


@pytest.fixture
def make(tiny, tmp_path):
    """Return a function that builds a Trainer on 24 questions about 6 images."""
    features = torch.randn(6, tiny.num_patches, 24, generator=torch.Generator().manual_seed(0))
    store = GivenFeatures(features)
    base = load_params("presets/small.yaml").train

    def build(folder="run", layout=None, dropout=0.0, seed=0, callbacks=(), **changes):
        layout = layout or tiny.layout("image-prefix")
        # Answers of different lengths: otherwise the mean over batches would equal the mean over tokens.
        asked = [QUESTIONS[i % 4] for i in range(24)]
        data = QuestionDataset(
            datasets.Dataset.from_dict(
                {
                    "question_id": range(24),
                    "image_id": [i // 4 for i in range(24)],
                    "question": [question for question, _ in asked],
                    "multiple_choice_answer": [answer for _, answer in asked],
                }
            ),
            layout,
            TooLong.ERROR,
        )
        settings = {
            "batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "save_steps": 1000,
            "logging_steps": 1,
            "questions_per_row": 1 if layout.mask is Mask.PREFIX_LM else base.questions_per_row,
        }
        train = dataclasses.replace(base, **{**settings, **changes})
        model = initial_model(tiny.language, tiny.encoder_config, tiny.processor, seed=1)
        set_dropout(model, dropout)
        if train.freeze_embeddings:
            freeze_embeddings(model)
        if train.lora is not None:
            add_adapters(model, train.lora)
        running = launch.start(train)
        arguments = training_arguments(train, seed, tmp_path / folder, running)
        return VqaTrainer(model, arguments, train, data, Collator(layout, store), list(callbacks), running)

    return build


def weights(trainer):
    return torch.cat([value.flatten() for _, value in sorted(trained_state(trainer.model).items())])


def moved(trainer, start):
    return (weights(trainer) - start).norm()


@pytest.mark.parametrize("mask", [mask.value for mask in Mask])
def test_accumulation_equals_the_large_batch(make, tiny, mask):
    start = weights(make())
    large, small = (
        make("large", tiny.layout(mask)),
        make("small", tiny.layout(mask), batch_size=2, gradient_accumulation_steps=4),
    )
    large.train()
    small.train()
    assert large.state.global_step == small.state.global_step == 6
    assert (weights(large) - weights(small)).norm() / moved(large, start) < 1e-4


def test_a_run_repeats_itself_and_another_seed_does_not(make):
    hashes = []
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        trainer = make(name, seed=seed)
        trainer.train()
        hashes.append(hash_weights(trained_state(trainer.model)))
    assert hashes[0] == hashes[1] != hashes[2]


# Also in the second epoch, whose order is another one; with and without accumulation and workers; before the last step of
# the projector's phase, at it and after it.
@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (3, {"optimizer": Optimizer.ADAMW_TORCH, "projector_steps": 3}),
        (
            5,
            {
                "optimizer": Optimizer.ADAMW_TORCH,
                "projector_steps": 4,
                "embedding_learning_rate": 2e-3,
                "batch_size": 2,
                "gradient_accumulation_steps": 4,
                "dataloader_workers": 1,
            },
        ),
        (3, {"optimizer": Optimizer.ADAMW_BNB_8BIT, "percentile_clipping": 50, "projector_steps": 1}),
        (
            5,
            {
                "optimizer": Optimizer.ADAMW_BNB_8BIT,
                "batch_size": 4,
                "gradient_accumulation_steps": 2,
                "projector_steps": 5,
            },
        ),
        (5, {"optimizer": Optimizer.ADAMW_TORCH, "questions_per_row": 1, "dropout": 0.1}),
        (3, {"optimizer_in_backward": True, "max_grad_norm": 0.0, "attention_checkpointing": True, "dropout": 0.1}),
        (3, {"freeze_embeddings": True}),
    ],
)
def test_an_interrupted_run_goes_on(make, tmp_path, stop, options):
    options = {"save_steps": 2, **options}
    straight = make("straight", **options)
    straight.train()
    cut = make("cut", **options)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == stop:
                raise KeyboardInterrupt

    cut.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    cut.writer.wait()
    # A process that is killed lets go of it.
    cut.lock.close()
    assert checkpoint_files.latest(tmp_path / "cut").name == f"checkpoint-{stop - 1}"
    resumed = make("cut", **options)
    resumed.run()
    assert resumed.state.global_step == straight.state.global_step == 6
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=0, atol=0)


def test_compiled_layers_train_alike_go_on_and_are_left_out_of_validation(make, monkeypatch):
    """By the compiler's first part alone, which decides what is compiled, and for what; the others take a minute."""
    monkeypatch.setattr(trainer_module, "compile_layers", partial(compile_layers, backend="eager"))
    counted = torch._dynamo.utils.counters["stats"]
    start = weights(make())
    plain, compiled, cut = (
        make(name, gradient_checkpointing=True, compile=name != "plain", save_steps=2)
        for name in ("plain", "compiled", "cut")
    )
    plain.train()
    counted.clear()
    compiled.train()
    assert counted["unique_graphs"] >= 1, "nothing was compiled"
    assert (weights(compiled) - weights(plain)).norm() / moved(plain, start) < 1e-4
    cut.add_callback(StopAt(3))
    cut.run()
    cut.lock.close()
    resumed = make("cut", gradient_checkpointing=True, compile=True, save_steps=2)
    resumed.run()
    torch.testing.assert_close(weights(resumed), weights(compiled), rtol=0, atol=0)
    batch = next(iter(compiled.get_train_dataloader()))
    batch.pop(COUNTS)

    def measure(model, device, beat):
        model.eval()
        with torch.no_grad():
            compiled.compute_loss(model, compiled._prepare_inputs(dict(batch)))
        return {ANSWERS: [], SCORE: 0.0}

    counted.clear()
    compiled.validation = SimpleNamespace(settings=SimpleNamespace(patience=None), measure=measure)
    compiled._evaluate(None, None)
    assert not counted["unique_graphs"]
    # By itself it would have made other versions.
    measure(compiled.model, None, None)
    assert counted["unique_graphs"]


def test_a_machine_that_cannot_compile_says_what_it_lacks(make, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(
        UserError, match=r"train.compile is true, but .* lacks .*include/Python.h \(Debian's python3-dev\)"
    ):
        make(compile=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match=r"lacks a C compiler \(gcc\). Install it, or set train.compile to false"):
        make(compile=True)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == self.step


def test_a_checkpoint_that_stands_on_other_frozen_weights_is_refused(make):
    options = {"freeze_embeddings": True, "save_steps": 2}
    make("same", **options).run()
    resumed = make("same", **options)
    assert resumed.frozen != make("all", save_steps=2).frozen
    resumed.frozen = resumed.frozen[::-1]
    with pytest.raises(UserError, match="stands on other weights"):
        resumed.run()


BFLOAT16 = {"weights_dtype": Dtype.BFLOAT16, "compute_dtype": Dtype.BFLOAT16, "rounding": Rounding.STOCHASTIC}


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": Optimizer.ADAMW_TORCH, "projector_steps": 2, "projector_learning_rate": 3e-2},
        {"optimizer": Optimizer.ADAMW_BNB_8BIT, "percentile_clipping": 50, "embedding_learning_rate": 2e-3},
        {"optimizer": Optimizer.ADAMW_TORCH, **BFLOAT16},
        {"lora": LoraParams(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",)), "freeze_embeddings": True},
    ],
    ids=["torch", "8 bits", "bfloat16", "lora"],
)
def test_updates_in_the_backward_pass_are_the_steps_own(make, options):
    """To the bit, after 21 steps; and no two gradients are there at once."""
    usual, early = (
        make(name, num_train_epochs=7, max_grad_norm=0.0, optimizer_in_backward=name == "early", **options)
        for name in ("usual", "early")
    )
    graded, at_end = [], Watch()
    at_end.trainer = early
    early.add_callback(at_end)
    for parameter in (parameters := [one for one in early.model.parameters() if one.requires_grad]):
        parameter.register_post_accumulate_grad_hook(
            lambda _: graded.append(sum(p.grad is not None for p in parameters))
        )
    usual.train()
    early.train()
    assert early.state.global_step == 21 and early.facts["updates"] == "in the backward pass"
    assert hash_weights(trained_state(early.model)) == hash_weights(trained_state(usual.model))
    assert set(graded) == {1} and at_end.graded == [set()] * 21
    norms = [[entry["grad_norm"] for entry in one.state.log_history if "loss" in entry] for one in (early, usual)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2 if "weights_dtype" in options else 1e-5)


def test_a_gradient_that_is_no_number_stops_updates_in_the_backward_pass(make):
    trainer = make(max_grad_norm=0.0, optimizer_in_backward=True)
    with torch.no_grad():
        next(iter(trainer.model.model.language_model.layers)).mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="step 1: loss is not a number"):
        trainer.train()


def test_workers_change_nothing(make):
    hashes = []
    for workers in (0, 1, 2):
        trainer = make(str(workers), dataloader_workers=workers)
        assert trainer.get_train_dataloader().num_workers == workers
        trainer.train()
        hashes.append(hash_weights(trained_state(trainer.model)))
    assert len(set(hashes)) == 1


def test_a_checkpoint_is_copied_where_a_step_follows(make, monkeypatch):
    copied, save = {}, checkpoint_state.save_state

    def watched(*held, copy, **options):
        copied[trainer.state.global_step] = copy
        return save(*held, copy=copy, **options)

    monkeypatch.setattr(checkpoint_state, "save_state", watched)
    trainer = make(save_steps=4)
    trainer.run()
    assert copied == {4: True, 6: False}


def test_flex_attention_is_refused_where_it_cannot_train(make):
    with pytest.raises(UserError, match="train.attention is flex_attention.*CPU"):
        make(attention=Attention.FLEX)


def test_frozen_embeddings_stay_as_they_are(make):
    trainer = make()
    model = trainer.model
    freeze_embeddings(model)
    before = {name: value.clone() for name, value in trained_state(model).items()}
    trainer.train()
    unmoved = [name for name, value in trained_state(model).items() if torch.equal(value, before[name])]
    assert unmoved == ["model.language_model.embed_tokens.weight"]
    # The head is the same tensor: saved once, trained nowhere.
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert id(model.lm_head.weight) not in {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_whole_weights_are_the_same_when_what_trained_them_is_let_go(make, dtype):
    changes = {"weights_dtype": dtype, "compute_dtype": dtype, "rounding": Rounding.STOCHASTIC}
    trainer = make(num_train_epochs=1, **(changes if dtype is Dtype.BFLOAT16 else {}))
    trainer.train()
    kept = {name: value.clone() for name, value in trainer.whole_weights().items()}
    assert all(one.untyped_storage().nbytes() for one in trainer.model.parameters())
    found = trainer.whole_weights(use_up=True)
    assert hash_weights(found) == hash_weights(kept) and {one.dtype for one in found.values()} == {torch.float32}
    # Once: of float32 the very parameters, of 16 bits copies alone.
    held = sum(one.untyped_storage().nbytes() for one in trainer.model.parameters())
    assert held == (0 if dtype is Dtype.BFLOAT16 else sum(one.nbytes for one in found.values()))
    assert not trainer.inner_optimizer.state and all(one.grad is None for one in trainer.model.parameters())


def test_adapters_are_trained_alone_and_merged(make, tiny):
    lora = LoraParams(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj", "down_proj"))
    trainer = make(lora=lora, freeze_embeddings=True)
    plain = trained_state(initial_model(tiny.language, tiny.encoder_config, tiny.processor, seed=1))
    trainer.train()
    merged = merge_adapters(trainer.whole_weights(), lora)
    assert merged.keys() == plain.keys()
    moved = {name for name in plain if not torch.equal(plain[name], merged[name])}
    layers = {f"model.language_model.layers.{layer}.{part}.weight" for layer in (0, 1)
              for part in ("self_attn.q_proj", "mlp.down_proj")}  # fmt: skip
    assert moved == layers | {f"model.multi_modal_projector.linear.{part}" for part in ("weight", "bias")}
    # The plain model with merged weights answers as the one with adapters.
    layout = tiny.layout("image-prefix")
    inputs = layout.collate([Row(0, (layout.tokenize(*QUESTIONS[0]),))])
    features = torch.randn(1, tiny.num_patches, 24)
    joined = initial_model(tiny.language, tiny.encoder_config, tiny.processor, seed=1)
    joined.load_state_dict(merged, strict=False)
    torch.testing.assert_close(joined(features, **inputs)["loss"], trainer.model(features, **inputs)["loss"])


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_the_adapter_that_is_kept_and_the_model_before_the_first_step_are_the_merged_model(make, tiny, tmp_path, dtype):
    lora = LoraParams(rank=2, alpha=4.0, dropout=0.1, targets=("v_proj", "up_proj"))
    bfloat16 = {"weights_dtype": dtype, "compute_dtype": dtype, "rounding": Rounding.STOCHASTIC}
    changes = bfloat16 if dtype is Dtype.BFLOAT16 else {}
    trainer = make(lora=lora, freeze_embeddings=True, num_train_epochs=1, **changes)
    projector = projector_of(trainer.model)
    trainer.train()
    params = dataclasses.replace(
        load_params("presets/small.yaml"), train=trainer.train_settings, language=tiny.language, seed=1
    )
    merged = merge_adapters(weights := trainer.whole_weights(), lora)
    save_adapter(tmp_path / "adapter", weights, projector, params, hash_weights(merged))
    encoder: Any = SimpleNamespace(model=SimpleNamespace(config=tiny.encoder_config))
    base = base_model(params, encoder, tiny.processor)
    before = hash_weights(trained_state(base))
    # Which refuses a base of other weights.
    merge_adapter(base, tmp_path / "adapter", "base")
    assert hash_weights(trained_state(base)) == hash_weights(merged) != before


def test_the_optimizer_is_the_one_asked_for(make):
    trainer = make(optimizer=Optimizer.ADAMW_BNB_8BIT, percentile_clipping=95)
    trainer.train()
    # As the Trainer arranges for bitsandbytes; this embedding is large enough for 8 bits otherwise.
    embedding = trainer.model.model.language_model.embed_tokens.weight
    assert embedding.numel() > 4096
    assert trainer.inner_optimizer.state[embedding]["state1"].dtype == torch.float32
    assert trainer.inner_optimizer.percentile == 95
    assert make(optimizer=Optimizer.ADAMW_TORCH).create_optimizer().__class__ is torch.optim.AdamW


def test_schedule_and_weight_decay_are_as_asked(make):
    trainer = make(warmup_ratio=0.5, num_train_epochs=4, weight_decay=0.3)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(rates) == pytest.approx(1e-2) and rates.index(max(rates)) == 6
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.3}


class Watch(TrainerCallback):
    """Keeps the weights after every step, by part, and what of them has gradients before it, and their norm."""

    def __init__(self):
        self.weights, self.graded, self.norms = [], [], []

    def parts(self, trainer):
        found = {"projector": [], "embed": [], "layers": []}
        for name, parameter in trainer.model.named_parameters():
            found[next((part for part in found if part in name), "layers")].append(parameter)
        return found

    def note(self):
        self.weights.append(
            {name: torch.cat([p.detach().flatten() for p in part]) for name, part in self.parts(self.trainer).items()}
        )

    def on_train_begin(self, args, state, control, **_):
        self.note()

    def on_pre_optimizer_step(self, args, state, control, **_):
        graded = {name: [p.grad for p in part if p.grad is not None] for name, part in self.parts(self.trainer).items()}
        self.graded.append({name for name, gradients in graded.items() if gradients})
        self.norms.append(sum(one.norm() ** 2 for part in graded.values() for one in part) ** 0.5)

    def on_step_end(self, args, state, control, **_):
        self.note()

    def moves(self, part):
        """Return how far the part's weight that moved most moved in each step."""
        return [(after[part] - before[part]).abs().max().item() for before, after in itertools.pairwise(self.weights)]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": Optimizer.ADAMW_TORCH, "batch_size": 4, "gradient_accumulation_steps": 2},
        {"optimizer": Optimizer.ADAMW_BNB_8BIT, "embedding_learning_rate": 2e-3},
        {"lora": LoraParams(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",)), "freeze_embeddings": True},
    ],
    ids=["torch", "8 bits", "lora"],
)
def test_the_projector_moves_first_and_every_part_at_its_own_rate(make, options):
    """AdamW's first step of a weight is as long as its rate, so that rates, and first steps, can be read off weights."""
    watch = Watch()
    trainer = make(
        callbacks=[watch], projector_steps=2, projector_learning_rate=3e-2, weight_decay=0.0, warmup_ratio=0.0,
        lr_scheduler_type=Scheduler.CONSTANT_WITH_WARMUP, max_grad_norm=1e-2, **options,
    )  # fmt: skip
    trainer.train()
    frozen = options.get("freeze_embeddings", False)
    first = {"layers": 1e-2, "embed": 0.0 if frozen else options.get("embedding_learning_rate", 1e-2)}
    assert watch.moves("projector")[0] == pytest.approx(3e-2, rel=1e-3) and min(watch.moves("projector")) > 0
    for part, rate in first.items():
        assert watch.moves(part)[:3] == [0.0, 0.0, pytest.approx(rate, rel=1e-3)]
    # What waits does not count in the norm that is clipped.
    everything = {"projector", "layers"} | ({"embed"} if not frozen else set())
    assert watch.graded == [{"projector"}] * 2 + [everything] * 4
    assert watch.norms == pytest.approx([1e-2] * 6, rel=1e-3)
    steps = {int(state["step"]) for state in trainer.inner_optimizer.state.values()}
    assert steps == {4, 6}


def test_what_waits_has_a_schedule_of_its_own_and_its_rate_is_logged(make):
    def logged(trainer):
        trainer.train()
        return [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]

    whole = make("whole", warmup_ratio=0.4)
    settings = {"warmup_ratio": 0.4, "projector_learning_rate": 1.0}
    phased = make("phased", num_train_epochs=4, projector_steps=6, **settings)
    assert logged(phased) == [0.0] * 6 + logged(whole)
    *_, projector = phased.lr_scheduler.lr_lambdas
    assert [projector(step) for step in (0, 5, 12)] == [0.0, 1.0, 0.0] and phased.lr_scheduler.base_lrs[-1] == 1.0
    # The projector alone: nothing else is trained at all.
    watch = Watch()
    alone = make("alone", projector_steps=6, callbacks=[watch], **settings)
    assert logged(alone) == [0.0] * 6
    assert max(watch.moves("layers") + watch.moves("embed")) == 0 < max(watch.moves("projector"))


def test_dropout_acts_on_attention_probabilities_alone(make, tiny):
    model = make(dropout=0.5).model
    layout = tiny.layout("image-prefix")
    inputs = layout.collate([Row(0, (layout.tokenize(*QUESTIONS[0]),))])
    features = torch.randn(1, tiny.num_patches, 24)
    model.train()
    assert model(features, **inputs)["loss"] != model(features, **inputs)["loss"]
    set_dropout(model, 0.0)
    assert model(features, **inputs)["loss"] == model(features, **inputs)["loss"]
    assert not [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    set_dropout(model, 0.5)
    model.eval()
    assert model(features, **inputs)["loss"] == model(features, **inputs)["loss"]


def test_a_loss_that_is_no_number_stops_the_run(make):
    trainer = make()
    start = weights(trainer)
    torch.nn.init.constant_(trainer.model.model.multi_modal_projector.linear.bias, float("nan"))
    with pytest.raises(UserError, match=r"step 1: loss is not a number \(rank 0: nan\); grad_norm is nan"):
        trainer.train()
    # The step was not taken: everything but the spoilt bias is as it was.
    assert (weights(trainer) != start).sum() == trainer.model.model.multi_modal_projector.linear.bias.numel()


def test_a_loss_that_spoils_no_gradient_is_laid_to_its_own_rank(make):
    trainer = make()
    trainer.launch = dataclasses.replace(trainer.launch, processes=4, process=2)
    with pytest.raises(UserError, match=r"loss is not a number \(rank 2: inf\); grad_norm is 1.5"):
        raise trainer._not_a_number(float("inf"), 1.5)


def test_bfloat16_computes_by_autocast_over_float32_masters(make, monkeypatch):
    # What `accelerate launch` sets from a launch file; params.yaml decides all the same.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    trainer = make(compute_dtype=Dtype.BFLOAT16, num_train_epochs=1)
    seen = set()
    layer = trainer.model.model.language_model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    start = weights(trainer)
    trainer.train()
    assert seen == {torch.bfloat16}
    assert weights(trainer).dtype == torch.float32 and moved(trainer, start) > 0


class Log:
    """Stands for the MLflow run."""

    def __init__(self):
        self.metrics, self.tags = [], {}

    def log_metrics(self, metrics, step):
        self.metrics.append((step, metrics))

    def set_tags(self, tags):
        self.tags |= tags


@pytest.mark.parametrize("kind", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_what_wider_weights_took_is_given_back_before_the_first_step(make, monkeypatch, kind):
    """The allocator keeps freed blocks under 32 MiB, and a step's peak would have them beside it."""
    given_back = []
    monkeypatch.setattr("vlm_vqa.training.trainer.trim", lambda: given_back.append(1))
    made = make(weights_dtype=kind, compute_dtype=kind, rounding=Rounding.STOCHASTIC)
    assert {parameter.dtype for parameter in made.model.parameters()} == {getattr(torch, kind.value)}
    assert given_back == [1] * (kind is Dtype.BFLOAT16)


@pytest.mark.parametrize("kind", [Optimizer.ADAMW_TORCH, Optimizer.ADAMW_BNB_8BIT])
def test_bfloat16_weights_learn_and_resume_to_the_bit(make, kind):
    settings = {"weights_dtype": Dtype.BFLOAT16, "compute_dtype": Dtype.BFLOAT16, "rounding": Rounding.STOCHASTIC,
                "optimizer": kind, "save_steps": 4}  # fmt: skip
    straight = make("straight", **settings)
    straight.train()
    assert {parameter.dtype for parameter in straight.model.parameters()} == {torch.bfloat16}
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    straight.writer.wait()
    resumed = make("straight", **settings)
    resumed.run()
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=0, atol=0)


@pytest.mark.parametrize(("process", "times"), [(0, 1), (1, 0)])
def test_a_busy_machine_is_said_once_by_the_main_process(make, monkeypatch, caplog, process, times):
    """In every step the process waits four times as long for a core as it runs on one."""
    step = itertools.count(1)
    monkeypatch.setattr("vlm_vqa.training.trainer.waits", lambda: {"7": (n := next(step), 4 * n)})
    trainer = make(callbacks=[ProgressCallback(Log())])
    trainer.launch = dataclasses.replace(trainer.launch, process=process)
    trainer.train()
    said = [record.levelname for record in caplog.records if "the machine is busy" in record.message]
    assert said == ["WARNING"] * times


def test_what_is_logged(make, tmp_path, caplog):
    caplog.set_level("INFO")
    run = Log()
    kind = Optimizer.ADAMW_BNB_8BIT
    trainer = make(callbacks=[ProgressCallback(run)], projector_steps=4, optimizer=kind, embedding_learning_rate=2e-3)
    trainer.train()
    assert [step for step, _ in run.metrics] == list(range(1, 7))
    assert {"loss", "grad_norm", "learning_rate"} <= run.metrics[-1][1].keys()
    assert run.tags["launch_threads"] == str(trainer.launch.threads)
    assert run.tags["launch_strategy"] == "one process" and run.tags["launch_optimizer"] == "ClippedAdamW8bit"
    groups = run.tags["optimizer_groups"].split("; ")
    assert len(groups) == 5 and set(groups) <= set(caplog.messages)
    assert groups[2].startswith("embedding: ") and groups[2].endswith(
        " elements at rate 0.002, weight decay 0.0001, 32 bits, from step 5"
    )
    # The projector's, and those of all; this model is too small for 8 bits.
    assert caplog.messages.count("optimizer states: float32") == 2
    write_curve(trainer.state.log_history, tmp_path / "curve.csv", "loss", CURVE_COLUMNS)
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,loss,grad_norm,learning_rate" and len(lines) == 7
