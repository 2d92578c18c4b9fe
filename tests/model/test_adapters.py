"""Adapters in peft's own format: written for peft, read as peft writes them, and refused by name where they do not fit."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.tiny_model import tiny_base, write_adapter
from vlm_vqa.errors import UserError
from vlm_vqa.model.adapters import (
    CONFIG_FILE,
    FACTS_FILE,
    WEIGHTS_FILE,
    check_adapter,
    merge_adapter,
)
from vlm_vqa.model.vlm import hash_weights, trained_state
from vlm_vqa.params import PROJECTIONS, LoraParams, ModelParams, Start, load_params


@pytest.fixture
def made(tiny, tmp_path):
    """Return a function that writes an adapter of `tiny`'s base: (folder, merged weights)."""

    def write(name="adapter", targets=("q_proj", "down_proj"), seed=0, **start):
        params = load_params("presets/small.yaml")
        lora = LoraParams(rank=2, alpha=3.0, dropout=0.1, targets=targets)
        train = dataclasses.replace(params.train, lora=lora)
        params = dataclasses.replace(params, train=train, model=ModelParams(**start))
        return tmp_path / name, write_adapter(tiny_base(tiny), params, tmp_path / name, seed)

    return write


def logits(model, tiny, mask="image-prefix"):
    """Return a stock model's logits of a prompt, marked as `mask` is for stock classes."""
    ids = torch.tensor([[tiny.processor.image_token_id] * tiny.num_patches + [5, 7, 11, 13]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    kinds = {"image-prefix": (ids != ids[0, 0]).long(), "prefix-lm": torch.zeros_like(ids), "causal": None}[mask]
    with torch.no_grad():
        return model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, token_type_ids=kinds
        ).logits


def stock_with(tiny, weights):
    model = copy.deepcopy(tiny.stock)
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("mask", ["image-prefix", "prefix-lm", "causal"])
def test_peft_puts_two_adapters_on_one_base_and_each_is_its_merged_model(made, tiny, mask):
    """With all targets and with some, nothing missing, nothing left over, and the tower as it was."""
    adapters = {"one": made("one", PROJECTIONS), "two": made("two", ("v_proj",), seed=1)}
    with warnings.catch_warnings():
        # So peft tells what is missing.
        warnings.simplefilter("error", UserWarning)
        joined = PeftModel.from_pretrained(copy.deepcopy(tiny.stock), adapters["one"][0], adapter_name="one")
        found = joined.load_adapter(adapters["two"][0], "two")
    assert not found.missing_keys and not found.unexpected_keys
    assert not [name for name, _ in joined.named_parameters() if "vision_tower" in name and "lora_" in name]
    for name, (_, merged) in adapters.items():
        joined.set_adapter(name)
        expected = logits(stock_with(tiny, merged), tiny, mask)
        torch.testing.assert_close(logits(joined, tiny, mask), expected, rtol=0, atol=1e-5)
        assert (expected - logits(tiny.stock, tiny, mask)).abs().max() > 0.1


def test_an_adapter_is_the_same_bytes_twice_and_says_what_it_is_of(made, tiny, tmp_path):
    (one, merged), (two, _) = made("one", PROJECTIONS), made("two", PROJECTIONS)
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted([CONFIG_FILE, WEIGHTS_FILE, FACTS_FILE])
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    facts = json.loads((one / FACTS_FILE).read_text())
    assert facts["base_hash"] == hash_weights(trained_state(tiny.stock))
    assert (facts["weights_hash"], facts["mask"]) == (hash_weights(merged), "image-prefix")
    assert str(tmp_path) not in (one / CONFIG_FILE).read_text()


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({}, (None, None)),
        ({"start": Start.CHECKPOINT, "checkpoint": "google/x", "revision": "0" * 40}, ("google/x", "0" * 40)),
        ({"start": Start.CHECKPOINT, "checkpoint": "./models/base"}, (None, None)),
        (
            {"start": Start.CHECKPOINT, "checkpoint": "google/x", "revision": "0" * 40, "adapter": "first"},
            (None, None),
        ),
    ],
)
def test_the_base_is_named_where_it_has_a_name(made, start, expected):
    config = json.loads((made(**start)[0] / CONFIG_FILE).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == expected


def test_merged_into_its_base_it_is_the_model_that_was_trained(made, tiny):
    folder, merged = made()
    for model in (copy.deepcopy(tiny.stock), tiny_base(tiny)):
        trained = {name: one.requires_grad for name, one in model.named_parameters()}
        mode = model.training
        merge_adapter(model, folder, "base")
        assert hash_weights(trained_state(model)) == hash_weights(merged)
        assert {name: one.requires_grad for name, one in model.named_parameters()} == trained
        assert model.training is mode and not hasattr(model, "peft_config")


def test_an_adapter_that_peft_itself_has_saved_is_merged(tiny, tmp_path):
    settings = {"r": 3, "use_rslora": True, "init_lora_weights": False}
    config = LoraConfig(target_modules=r".*language_model.*\.(q_proj|up_proj)", **settings)
    theirs = get_peft_model(copy.deepcopy(tiny.stock), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = copy.deepcopy(tiny.stock)
    merge_adapter(model, tmp_path / "theirs", "base")
    torch.testing.assert_close(logits(model, tiny), logits(theirs.eval(), tiny), rtol=0, atol=1e-5)

    # A list of names means the tower's layers, too, whose features were made without it.
    theirs = get_peft_model(copy.deepcopy(tiny.stock), LoraConfig(target_modules=["q_proj"], **settings))
    theirs.save_pretrained(str(tmp_path / "all"))
    with pytest.raises(
        UserError, match=r"it changes model.vision_tower.*q_proj.*features are of the checkpoint's own tower"
    ):
        merge_adapter(model, tmp_path / "all", "base")


def test_an_adapter_of_another_base_is_refused_by_name(made, tiny):
    folder, _ = made()
    other = copy.deepcopy(tiny.stock)
    other.model.language_model.norm.weight.data[0] += 1e-3
    before = hash_weights(trained_state(other))
    with pytest.raises(
        UserError, match=r"adapter' is of another base: .*'other' has " + before[:12] + ".*vlm-vqa base"
    ):
        merge_adapter(other, folder, "other")
    assert hash_weights(trained_state(other)) == before
    # Without our own file, shapes still tell.
    (folder / FACTS_FILE).unlink()
    config = copy.deepcopy(tiny.stock.config)
    config.text_config.head_dim = 16
    with pytest.raises(
        UserError, match=r"is no adapter of model.checkpoint 'other' \(RuntimeError: size mismatch for .*q_proj"
    ):
        check_adapter(folder, config, "other")
    config.text_config.head_dim, config.text_config.num_hidden_layers = 8, 1
    with pytest.raises(UserError, match=r"has no place for .*layers\.1\."):
        check_adapter(folder, config, "other")


def with_config(**changes):
    def change(folder):
        path = folder / CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def with_weights(change):
    def apply(folder):
        weights = load_file(folder / WEIGHTS_FILE)
        change(weights)
        save_file(weights, folder / WEIGHTS_FILE)

    return apply


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()


A_LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight"
WRONG = {
    "pickled": (pickled, "adapter_model.safetensors must be there.*Pickled weights"),
    "no settings": (lambda folder: (folder / CONFIG_FILE).unlink(), "adapter_config.json .*must be there"),
    "no JSON": (lambda folder: (folder / CONFIG_FILE).write_text("[" * 10**5), "adapter_config.json is no JSON object"),
    "a list": (lambda folder: (folder / CONFIG_FILE).write_text("[1]"), "adapter_config.json is no JSON object"),
    "torn": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"torn"), "is no adapter of .*Safetensor"),
    "another kind": (with_config(peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
    "DoRA": (with_config(use_dora=True), "use_dora is True, and such"),
    "PiSSA": (with_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa', and such"),
    "biases": (with_config(bias="all"), "bias is 'all', and such"),
    "code": (with_config(megatron_config={}, megatron_core="os"), "megatron_.* is .*, and such"),
    "unknown": (with_config(auto_map={"AutoModel": "x--y.Z"}), "auto_map is .*, and such"),
    "no number": (with_config(r="8"), "is no adapter of"),
    "no layer": (with_config(target_modules="nothing"), "is no adapter of .*[Tt]arget modules"),
    "rank": (with_config(r=4), "is no adapter of .*size mismatch for .*lora_A"),
    "a layer less": (with_weights(lambda weights: weights.pop(A_LAYER)), r"it lacks .*layers\.0\.self_attn\.q_proj\.lora_B"),
    "no projector": (
        with_weights(lambda weights: [weights.pop(name) for name in [*weights] if "projector" in name]),
        "is no adapter of .*multi_modal_projector",
    ),
    "one more": (
        with_weights(lambda weights: weights.update({A_LAYER.replace("q_proj", "x"): weights[A_LAYER].clone()})),
        r"has no place for model.language_model.layers.0.self_attn.x",
    ),
    "the tower's": (
        with_weights(lambda weights: weights.update({"base_model.model.model.vision_tower.x.lora_A.weight": torch.ones(1)})),
        r"it changes model.vision_tower.x.lora_A.weight",
    ),
    "the embedding's": (
        with_weights(lambda weights: weights.update({"base_model.model.lm_head.weight": torch.ones(1)})),
        r"it changes lm_head.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_adapter_of_this_model_is_refused_by_name_before_anything_is_merged(made, tiny, name):
    folder, _ = made()
    (folder / FACTS_FILE).unlink()
    change, message = WRONG[name]
    change(folder)
    before = hash_weights(tiny.stock.state_dict())
    with pytest.raises(UserError, match=f"(?s)model.adapter '{folder}'.*{message}") as error:
        check_adapter(folder, tiny.stock.config, "base")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        merge_adapter(tiny.stock, folder, "base")
    assert hash_weights(tiny.stock.state_dict()) == before


def test_damage_and_numbers_that_are_none_are_found(made, tiny):
    folder, _ = made()
    with_weights(lambda weights: weights[A_LAYER].mul_(float("nan")))(folder)
    with pytest.raises(UserError, match=f"{WEIGHTS_FILE}: damaged"):
        check_adapter(folder, tiny.stock.config, "base")
    (folder / FACTS_FILE).unlink()
    check_adapter(folder, tiny.stock.config, "base")
    with pytest.raises(UserError, match="NaNs"):
        merge_adapter(copy.deepcopy(tiny.stock), folder, "base")
