"""`vlm-vqa preflight`: its formulas against real modules, optimizers and saved tensors, and advice that holds."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Dinov2Config, Dinov2Model, Gemma2Config, PaliGemmaConfig

from vlm_vqa.cli import main
from vlm_vqa.data.feature_store import Layout
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.advice import changed
from vlm_vqa.estimate.batches import Pass, plan
from vlm_vqa.estimate.dataset_size import VQAV2, read_texts, tokens
from vlm_vqa.estimate.devices import GIB, find_device
from vlm_vqa.estimate.memory import Step
from vlm_vqa.estimate.predict import preflight
from vlm_vqa.estimate.render import as_text
from vlm_vqa.estimate.shapes import VISION, Model, VisionShape, model_of, vision_of
from vlm_vqa.estimate.stage_costs import launch_shape
from vlm_vqa.model.flops import rows_work
from vlm_vqa.model.layout import Row
from vlm_vqa.model.vlm import VlmForTraining, add_adapters, freeze_embeddings, initial_model, set_dropout
from vlm_vqa.params import LoraParams, Mask, StoreDtype, TrainParams, load_params
from vlm_vqa.training.launch import Strategy
from vlm_vqa.training.optimizer import build_optimizer
from vlm_vqa.training.throughput import PEAKS

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
NOTHING = Path("no-records-here")
LORA = LoraParams(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj"))
BIG = {"host_memory": 512, "disk": 2000}


def ask(path, **options):
    """Return the prediction of a parameter file with the repository's launches and no records."""
    return preflight(path, records=NOTHING, launches=ROOT / "launch", **options)


def preset(name, **changes):
    return changed(load_params(ROOT / f"presets/{name}.yaml"), changes)


def written(params, tmp_path):
    """Write parameters to a file."""
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params.as_dict()))
    return path


def needed(prediction, stage, resource):
    return next(one.needed for one in prediction.checks if (one.stage, one.resource) == (stage, resource))


# --- shapes ----------------------------------------------------------------------------------------------------------


def real_model(model: Model) -> VlmForTraining:
    """Return the real class of a shape, without storage."""
    text = Gemma2Config(**dataclasses.asdict(model.language), vocab_size=model.vocabulary)
    config = PaliGemmaConfig(
        text_config=text.to_dict(), vision_config=Dinov2Config(hidden_size=model.feature_width).to_dict(),
        projection_dim=text.hidden_size, hidden_size=text.hidden_size, vocab_size=model.vocabulary,
    )  # fmt: skip
    with torch.device("meta"):
        return VlmForTraining._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_are_those_of_the_real_gemma_2_2b(frozen, lora):
    model = dataclasses.replace(
        model_of(preset("vqav2-reference")), freeze_embeddings=frozen or lora is not None, lora=lora
    )
    real = real_model(model)
    if model.freeze_embeddings:
        freeze_embeddings(real)
    if lora is not None:
        add_adapters(real, lora)
    expected = sorted((tuple(one.shape), one.requires_grad) for one in real.parameters())
    assert sorted((one.shape, one.trained) for one in model.parameters) == expected
    assert model.vocabulary == 256_000 + 1_153
    assert model.all == sum(one.numel() for one in real.parameters())
    assert model.saved == 2_618_770_176


def test_the_processor_adds_as_many_tokens_as_the_shapes_say(tiny):
    added = [
        one for one in tiny.processor.tokenizer.added_tokens_encoder if one.startswith(("<loc", "<seg", "<image>"))
    ]
    assert len(added) == 1_153


@pytest.mark.parametrize("shape", [*VISION.values(), VisionShape(24, 2, 2, mlp_ratio=2, image_size=28)], ids=str)
def test_the_encoders_parameters_are_those_of_dinov2(shape):
    with torch.device("meta"):
        real = Dinov2Model(Dinov2Config(**dataclasses.asdict(shape)))
    assert shape.parameters == sum(one.numel() for one in real.parameters())


def test_the_small_encoders_shape_is_read_and_checked():
    params = preset("small")
    assert vision_of(params.vision).hidden_size == params.vision.visual_embed_dim == 128
    with pytest.raises(UserError, match="visual_embed_dim is 768.*128 wide"):
        vision_of(dataclasses.replace(params.vision, visual_embed_dim=768))


def test_a_local_folder_is_read(tmp_path):
    text = Gemma2Config(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=12, vocab_size=100)  # fmt: skip
    text.save_pretrained(tmp_path)
    params = preset("vqav2-reference", **{"language.model": str(tmp_path), "language.revision": None})
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        model_of(params)
    tokenizer = {"model": {"vocab": {f"{n}": n for n in range(90)}}, "added_tokens": [{"content": "<image>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = model_of(params)
    assert (model.language.hidden_size, model.vocabulary) == (48, 90 + 1_153)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama'; language.model must be a gemma2"):
        model_of(params)


def test_an_unknown_hub_id_is_named():
    params = preset("vqav2-reference", **{"language.model": "google/gemma-2-9b"})
    with pytest.raises(UserError, match="google/gemma-2-9b.*Download it"):
        model_of(params)


# --- memory ----------------------------------------------------------------------------------------------------------


def train_params(**changes) -> TrainParams:
    named = {f"train.{name}": value for name, value in changes.items()}
    return preset("small", **named).train


NARROW = {"weights_dtype": "bfloat16", "rounding": "stochastic", "compute_dtype": "bfloat16"}


@pytest.mark.parametrize("changes", [{}, NARROW, {"freeze_embeddings": True}], ids=["float32", "bfloat16", "frozen"])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_bnb_8bit"])
@pytest.mark.parametrize("clipping", [100, 95])
def test_optimizer_states_are_those_of_a_real_step(tiny, changes, optimizer, clipping):
    if clipping == 95 and optimizer == "adamw_torch":
        pytest.skip("belongs to 8 bits")
    train = train_params(optimizer=optimizer, percentile_clipping=clipping, **changes)
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
    assert step.states().bytes == sum(held.values())
    (gradients,) = step.gradients()
    assert gradients.bytes == sum(one.grad.nbytes for one in trained)
    (weights,) = step.weights()
    assert weights.bytes == sum(one.nbytes for one in real.parameters())


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


def forward(tiny, mask, changes, layers):
    """Run a real forward pass; return the bytes that autograd kept, the step and the pass that predict them."""
    train = train_params(freeze_embeddings=True, **changes)
    config = dataclasses.replace(tiny.language.config, num_hidden_layers=layers)
    real = initial_model(dataclasses.replace(tiny.language, config=config), tiny.encoder_config, tiny.processor, seed=0)
    set_dropout(real, train.dropout)
    freeze_embeddings(real)
    if train.weights_dtype.value == "bfloat16":
        real.to(torch.bfloat16)
    layout = tiny.layout(mask)
    first, second = layout.tokenize("Is there a red circle?", "no"), layout.tokenize("How many dogs?", "yes yes")
    rows = [Row(0, (first, second) if layout.mask is Mask.IMAGE_PREFIX else (first,)), Row(1, (second,))]
    batch = layout.collate(rows)
    saved = Saved(real)
    with (
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=train.compute_dtype.value == "bfloat16"),
    ):
        real(torch.randn(2, tiny.num_patches, 24), **batch)
    closed = batch["prefix_places"].shape[1] if layout.mask is Mask.IMAGE_PREFIX else 0
    one = Pass(rows_work(layout, rows), len(rows), closed, batch["input_ids"].shape[1])
    model = Model(config, len(tiny.processor.tokenizer), 24, True, None)
    return saved.bytes, Step(model, train, Strategy.SINGLE, 1, gpu=False), one


MODES = {"float32": {}, "autocast": {"compute_dtype": "bfloat16"}, "bfloat16": NARROW, "dropout": {"dropout": 0.1},
         "autocast and dropout": {"compute_dtype": "bfloat16", "dropout": 0.1}}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ["image-prefix", "prefix-lm"])
def test_a_layers_activations_are_what_autograd_keeps(tiny, mask, mode):
    """To the byte: what a third layer adds to two."""
    two, _, _ = forward(tiny, mask, MODES[mode], 2)
    three, step, one = forward(tiny, mask, MODES[mode], 3)
    assert three - two == step.layer_activations(one)


@pytest.mark.parametrize("mode", MODES)
def test_all_activations_and_the_loss_are_what_autograd_keeps(tiny, mode):
    """But for indices, the last norm's scales and the like: 2 %."""
    kept, step, one = forward(tiny, "image-prefix", MODES[mode], 3)
    # At the end of the forward pass the logits' tanh and log-probabilities are what stays of them.
    logits = one.work.supervised * step.model.vocabulary * (step.compute_bytes + 4)
    assert step.activations(one).bytes + logits == pytest.approx(kept, rel=0.02)


def parts(step):
    """Return what a rank holds at all times, by name."""
    return {item.what: item.bytes for item in (*step.weights(), step.states(), *step.gradients())}


def reference_step(strategy, processes, **changes):
    params = preset("vqav2-reference", **{f"train.{name}": value for name, value in changes.items()})
    return Step(model_of(params), params.train, strategy, processes, gpu=True)


def test_what_the_strategies_divide():
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


def test_only_autocast_copies_weights():
    assert reference_step(Strategy.SINGLE, 1).casts().bytes == 2 * 26 * 77_856_768
    assert reference_step(Strategy.FSDP2, 4).casts().bytes == 0
    assert reference_step(Strategy.SINGLE, 1, **NARROW).casts().bytes == 0


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
def test_savings_save(tmp_path, changes, lower):
    base = {"prompt.mask": "image-prefix", "train.launch": "gpu"}
    with_saving = ask(written(preset("vqav2-reference", **base, **changes), tmp_path), device="A100 80GB PCIe", **BIG)
    without = ask(written(preset("vqav2-reference", **base, **lower), tmp_path), device="A100 80GB PCIe", **BIG)
    what = ("train", "GPU memory")
    assert needed(with_saving, *what) < needed(without, *what)


def test_a_step_of_more_images_in_a_row_shares_more(tmp_path):
    """The same questions are fewer tokens where they share their image."""
    shared = preset("vqav2")
    alone = preset("vqav2", **{"train.questions_per_row": 1})
    tokens_of = [plan(params, 4, read_texts(params, NOTHING)).epoch.tokens for params in (shared, alone)]
    assert 3 < tokens_of[1] / tokens_of[0] < 5.36


# --- counts ----------------------------------------------------------------------------------------------------------


def test_estimated_tokens_are_close_to_a_trained_tokenizers(shared_data):
    from benchmarks.workload import TOKENIZER_LIMIT, read_questions
    from vlm_vqa.model.vlm import train_tokenizer

    pairs = read_questions()[:5000]
    tokenizer = train_tokenizer([text for pair in pairs for text in pair], TOKENIZER_LIMIT)
    for kind, tolerance in ((0, 0.02), (1, 0.1)):
        texts = [pair[kind] for pair in pairs]
        real = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
        assert sum(map(tokens, texts)) == pytest.approx(real, rel=tolerance)


def test_the_known_counts_are_vqav2s_and_its_sample_is_like_it():
    texts = read_texts(preset("vqav2-reference"), NOTHING)
    assert texts.splits["train"] == (443_757, 82_783) and texts.images == 123_287
    assert len(texts.image_ids) / len(set(texts.image_ids)) == pytest.approx(443_757 / 82_783, rel=0.02)
    assert sum(texts.questions) / len(texts.questions) == pytest.approx(sum(VQAV2.questions) / 20, rel=0.01)


def test_records_of_the_source_count_and_others_do_not(tmp_path, vqav2_folder):
    from vlm_vqa.data.fetch import fetch

    params = preset("small", **{"data.source": "directory", "data.directory": str(vqav2_folder())})
    params = changed(params, {"data.train.questions": "v2_OpenEnded_mscoco_train2014_questions.json"})
    fetch(params.data, tmp_path / "records")
    texts = read_texts(params, tmp_path / "records")
    assert texts.splits["train"] == (12, 4) and len(texts.questions) == 12
    assert set(texts.questions) == {tokens(text) + 1 for text in ("What color is the picture?", "Is the picture red?",
                                                                  "How many colors are there?")}  # fmt: skip
    assert read_texts(preset("small"), tmp_path / "records").splits["train"].questions == 38_575


def test_a_folder_of_unknown_content_is_asked_for(tmp_path):
    params = preset("small", **{"data.source": "directory", "data.train.questions": "mine.json"})
    with pytest.raises(UserError, match="dvc repro fetch-vqav2"):
        read_texts(params, NOTHING)


def test_passes_hold_a_windows_questions():
    params = preset("vqav2-reference")
    texts = read_texts(params, NOTHING)
    passes = plan(params, 4, texts)
    assert passes.questions_a_step == 240 and passes.steps == -(-443_757 // 240)
    assert passes.questions_a_row == 1 and all(one.prefix == 0 for one in passes.sample)
    assert max(one.rows for one in passes.sample) <= 7
    # Each row holds 257 image tokens, and a question reads all of its text but <eos>.
    mean = sum(a + b for a, b in zip(texts.questions, texts.answers, strict=True)) / len(texts.questions) - 1
    assert passes.epoch.tokens / 443_757 == pytest.approx(257 + texts.instruction + mean, rel=0.01)


# --- the whole command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_runs_through_in_json_and_text(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    device = ["--device", "A100-SXM4-80GB"] if path.stem != "small" else []
    arguments = ["preflight", str(path), *device, "--host-memory", "512", "--disk", "2000", "--price", "2"]
    assert main([*arguments, "--details"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"VERDICT: {path} fits: ")
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and [stage["name"] for stage in found["stages"]] == [
        "fetch-vqav2", "extract-features", "train", "export", "helm-eval",
    ]  # fmt: skip
    assert json.loads(json.dumps(found)) == found
    for stage in found["stages"]:
        assert stage["name"] in text
        for moment in (*stage["host"], *stage["gpu"]):
            assert moment["bytes"] == sum(item["bytes"] for item in moment["items"])
            assert all(item["formula"] for item in moment["items"])


def test_formulas_are_what_they_say():
    """Products in a formula give the bytes beside it."""
    stages = ask(ROOT / "presets/vqav2-reference.yaml", device="A10G", **BIG).stages
    items = [item for stage in stages for one in (*stage.host, *stage.gpu) for item in one.items]
    plain = [item for item in items if " x " in item.formula and not set("+(;") & set(item.formula)]
    assert len(plain) > 20
    for item in plain:
        product = 1
        for factor in item.formula.split(" x "):
            product *= int(factor.split()[0].replace(",", ""))
        assert product == item.bytes, item


@pytest.mark.parametrize(
    ("name", "changes", "device"),
    [
        ("vqav2-reference", {"train.launch": "gpu"}, "RTX 4090"),
        ("vqav2", {"train.launch": "ddp", "train.optimizer": "adamw_torch"}, "A10G"),
        ("vqav2", {"train.gradient_checkpointing": False, "train.batch_size": 512}, "RTX 4090"),
        ("vqav2-reference", {"evaluation.batch_size": 256}, "A10G"),
    ],
    ids=["one GPU", "DDP", "long passes", "evaluation"],
)  # fmt: skip
def test_advice_fits_when_it_is_followed(tmp_path, name, changes, device):
    params = preset(name, **changes)
    before = ask(written(params, tmp_path), device=device, **BIG)
    assert not before.fits and before.options
    for option in before.options:
        after = ask(written(changed(params, option.changes), tmp_path), device=device, **BIG)
        assert after.fits
        for what, size in option.needed.items():
            assert needed(after, *what.split(": ")) == size
    questions = {
        one.changes.get("train.batch_size", params.train.batch_size)
        * one.changes.get("train.gradient_accumulation_steps", params.train.gradient_accumulation_steps)
        * launch_shape(one.changes.get("train.launch", params.train.launch), ROOT / "launch").processes
        for one in before.options
    }
    assert len(questions) == 1, "an optimizer step keeps its questions"


def test_a_small_disk_is_advised_too(tmp_path):
    before = ask(ROOT / "presets/vqav2-reference.yaml", device="A10G", host_memory=512, disk=125)
    assert not before.fits
    assert any("vision.store_dtype" in one.changes for one in before.options)


@pytest.mark.parametrize("dtype", StoreDtype)
def test_features_take_what_the_store_says(tmp_path, dtype):
    path = written(preset("vqav2-reference", **{"vision.store_dtype": dtype.value}), tmp_path)
    stages = ask(path, device="A10G", **BIG).stages
    store = Layout(123_287, 257, 768, dtype)
    assert stages[1].disk_bytes == store.images * store.image_bytes


def test_exit_codes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    reference = str(ROOT / "presets/vqav2-reference.yaml")
    assert main(["preflight", reference, "--device", "RTX 4090", "--host-memory", "192", "--disk", "500"]) == 0
    assert capsys.readouterr().out.startswith(f"VERDICT: {reference} fits: 4 x GeForce RTX 4090 of 24.0 GiB, 192.0 GiB")
    assert main(["preflight", reference, "--device", "RTX 4090", "--host-memory", "16", "--disk", "500"]) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"VERDICT: {reference} does not fit: 4 x GeForce RTX 4090 of 24.0 GiB, 16.0 GiB")
    assert second.startswith("does not fit: train: host memory")


GOLDEN = """\
VERDICT: presets/small.yaml fits: 16.0 GiB of host memory, 20.0 GiB of disk

                         disk       host  GPU, a rank    hours      cost
fetch-vqav2          6.20 MiB   1.10 GiB            -     0.00         -
extract-features     0.15 GiB   1.89 GiB            -     #.##         -
train                0.03 GiB   1.22 GiB            -     #.##         -
export               4.72 MiB   1.11 GiB            -        -         -
helm-eval            1.24 MiB   1.16 GiB            -     #.##         -
all                  0.19 GiB                             #.##         -

utilisation 0.75 (benchmarks/results/training_step.json: 0.79); more by --details
"""


def test_the_verdict_comes_first_then_the_table(capsys, monkeypatch, tmp_path):
    for name in ("presets", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[cache]\n    type = hardlink\n")
    monkeypatch.chdir(tmp_path)
    assert main(["preflight", "presets/small.yaml", "--host-memory", "16", "--disk", "20"]) == 0
    text = capsys.readouterr().out.splitlines(keepends=True)
    for line in (4, 5, 7, 8):
        text[line] = re.sub(r"\d\.\d\d(?= {9}-$)", "#.##", text[line], flags=re.M)
    assert "".join(text) == GOLDEN


def test_json_has_the_keys_it_had(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["presets/vqav2-1gpu.yaml", "--device", "T4", "--host-memory", "128", "--disk", "500", "--json"]
    assert main(["preflight", *arguments]) == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["params", "params_hash", "machine", "stages", "checks", "options", "lacks", "fits"]
    assert not found["fits"] and "Tesla T4 has no bfloat16" in found["lacks"][0]


@pytest.mark.parametrize(
    ("name", "device", "lines"),
    [
        ("vqav2-1gpu", "T4", ["Tesla T4 has no bfloat16, torch would emulate it slowly: name an A10 or newer, or "
                              "set vision.compute_dtype, train.compute_dtype, train.weights_dtype to float32, "
                              "train.rounding to nearest"]),
        ("vqav2-1gpu", "V100", ["the pinned PyTorch has no kernels for Tesla V100-SXM2-16GB: name a T4 or a newer device",
                                "Tesla V100-SXM2-16GB has no bfloat16"]),
        ("small", "P100", ["the pinned PyTorch has no kernels for Tesla P100-SXM2-16GB"]),
        ("small", "T4", []),
    ],
)  # fmt: skip
def test_what_a_device_cannot_do_stands_in_the_verdict(tmp_path, name, device, lines):
    changes = {"train.launch": "gpu"}
    if name == "small" and lines:
        changes["vision.compute_dtype"] = "bfloat16"
    prediction = ask(written(preset(name, **changes), tmp_path), device=device, **BIG)
    assert prediction.fits == (not lines) and len(prediction.lacks) == len(lines)
    text = as_text(prediction).splitlines()
    assert ("cannot run: 1 x" in text[0]) == bool(lines)
    for said, line in zip(text[1:], lines, strict=False):
        assert said.startswith(line) and len(said) < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "RTX 4080"], "'RTX 4080' is not known. The nearest known: GeForce RTX 4090"),
        (["--device", "H1OO"], "'H1OO' is not known. The nearest known: H100"),
        (["--device", "cpu"], "train.launch fsdp2 runs on GPUs"),
        ([], "--device is missing"),
        (["--device", "A10G", "--utilisation", "1.5"], "at most 1"),
        (["--device", "A10G", "--disk", "-1"], "--disk is -1.0; it must be a number above 0"),
        (["--device", "A10G", "--disk", "inf"], "--disk is inf; it must be a number above 0"),
        (["--device", "A10G", "--price", "nan"], "--price is nan; it must be a number above 0"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["preflight", str(ROOT / "presets/vqav2-reference.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_small_parameters_on_a_gpu_are_refused_in_one_line_that_helps(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["preflight", "presets/small.yaml", "--device", "H100"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "(train.launch: cpu)" in said
    advised = re.search("`vlm-vqa (.*)`", said)[1].split()
    assert main([*advised, "--host-memory", "128", "--disk", "500"]) == 0


def test_every_peak_has_a_memory_and_is_found_by_the_name_that_the_driver_prints():
    for name, peak in PEAKS.items():
        for printed in (name, f"NVIDIA {name}", name.lower().replace(" ", "-")):
            device = find_device(printed, on_cpu=False, launch="gpu")
            assert (device.name, device.peak) == (name, peak) and 14 * GIB < device.memory <= 180 * GIB
    assert find_device("NVIDIA A10G", on_cpu=False, launch="gpu").memory == 22.5 * GIB


TYPED = {
    "H100 80GB HBM3": ["H100", "h100-sxm", "H100 SXM5 80GB", "NVIDIA H100 80GB HBM3"], "H100 PCIe": ["H100-PCIe"],
    "H100 NVL": ["H100 NVL 94GB"], "H200": ["h200", "H200 SXM 141GB"], "B200": ["B200"],
    "A100-SXM4-40GB": ["A100", "A100 GPU"], "A100-SXM4-80GB": ["A100-80GB", "A100-SXM-80GB", "a100sxm80gb"],
    "A100-PCIE-80GB": ["a100 pcie 80gb"], "A100 80GB PCIe": ["A100 80GB PCIe"], "Tesla T4": ["T4", "NVIDIA T4"],
    "Tesla V100-SXM2-16GB": ["V100"], "Tesla V100-SXM2-32GB": ["V100-32GB"], "Tesla P100-SXM2-16GB": ["P100"], "L4": ["l4"],
    "L40S": ["L40S"], "A10": ["A10", "A10 24GB"], "A10G": ["A10G"], "RTX A6000": ["A6000", "RTX A6000 48 GB"],
    "RTX 6000 Ada Generation": ["RTX 6000 Ada", "RTX6000Ada"], "GeForce RTX 4090": ["4090", "rtx4090", "RTX 4090"],
    "GeForce RTX 3090": ["RTX-3090"], "GeForce RTX 5090": ["GeForce 5090"],
}  # fmt: skip


@pytest.mark.parametrize(("typed", "name"), [(typed, name) for name, all_ in TYPED.items() for typed in all_])
def test_names_that_people_type_are_found(typed, name):
    assert find_device(typed, on_cpu=False, launch="gpu").name == name


@pytest.mark.parametrize(
    "typed",
    ["", "RTX", "80GB", "SXM", "4", "RTX 4090 Laptop GPU", "RTX 3090 Ti", "A100 MIG 1g.5gb", "Quadro RTX 6000", "TPU"],
)
def test_another_device_is_not_taken_for_one_like_it(typed):
    with pytest.raises(UserError, match="is not known. The nearest known: .+"):
        find_device(typed, on_cpu=False, launch="gpu")


def test_extraction_and_training_may_run_on_other_devices(tmp_path):
    on_host = written(preset("vqav2-reference", **{"vision.launch": "cpu"}), tmp_path)
    extraction = ask(on_host, device="A10G", **BIG).stages[1]
    assert extraction.hours is None and not extraction.gpu and "not known" in extraction.facts["note"]
    with pytest.raises(UserError, match="vision.launch gpu runs on GPUs"):
        ask(written(preset("small", **{"vision.launch": "gpu"}), tmp_path))


def test_hours_and_cost_follow_rate_share_and_price():
    path = ROOT / "presets/vqav2-reference.yaml"
    one = ask(path, device="A10G", price=1.0, utilisation=0.2, **BIG)
    two = ask(path, device="A10G", price=3.0, utilisation=0.4, **BIG)
    for slow, fast in zip(one.stages[1:], two.stages[1:], strict=True):
        if slow.hours is not None:
            assert slow.hours == pytest.approx(2 * fast.hours)
            assert two.cost(fast) == pytest.approx(1.5 * one.cost(slow)) and one.cost(slow) == 4 * slow.hours
    train = one.stages[2]
    assert train.hours * 3600 == pytest.approx(
        (train.facts["flop"] + train.facts["flop_recomputed"]) / (70e12 * 0.2 * 4)
    )
