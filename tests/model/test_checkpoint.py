"""Starting from a whole PaliGemma: read as stock transformers reads it, and refused by what does not fit."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from tests.fake_hub import Hosted, lead_to, serve
from tests.tiny_model import INSTRUCTION, save_paligemma, write_adapter
from vlm_vqa.checks import check_start
from vlm_vqa.data.feature_store import FeatureStore, Layout
from vlm_vqa.errors import UserError
from vlm_vqa.features.writer import FeatureStoreWriter, Shard
from vlm_vqa.inference.generation import generate
from vlm_vqa.model import checkpoint
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.layout import Row, TokenLayout, visible
from vlm_vqa.model.vlm import build_processor, checkpoint_model, text_hidden, text_logits
from vlm_vqa.params import Dtype, LoraParams, Mask, ModelParams, Start, StoreDtype, VisionParams, load_params
from vlm_vqa.training.prepare import base_model

VISION = VisionParams("cpu", "checkpoint", None, 4, 24, 8, Dtype.FLOAT32, StoreDtype.FLOAT32)
QUESTION, ANSWER = "What color is the shape?", "red"


def start(folder):
    return ModelParams(start=Start.CHECKPOINT, checkpoint=str(folder))


def check(folder, **vision):
    check_start(SimpleNamespace(model=start(folder), vision=dataclasses.replace(VISION, **vision)))


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory):
    return save_paligemma(tmp_path_factory.mktemp("paligemma"))


@pytest.fixture(scope="module", params=["gemma2", "gemma"])
def either(request, paligemma, tmp_path_factory):
    """PaliGemma 2, then 1."""
    return paligemma if request.param == "gemma2" else save_paligemma(tmp_path_factory.mktemp("one"), kind="gemma")


@pytest.fixture
def copy(paligemma, tmp_path):
    return shutil.copytree(paligemma, tmp_path / "copy")


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def load(folder):
    """Return encoder, processor and model as the stages make them."""
    encoder = load_encoder(VISION, "cpu", start(folder))
    processor = build_processor(encoder.processor, checkpoint.load_tokenizer(start(folder), folder), encoder.num_tokens)
    return encoder, processor, checkpoint_model(start(folder), encoder.model.config, processor)


@pytest.mark.parametrize("mask", list(Mask))
def test_logits_before_the_first_step_are_stock_transformers(either, mask):
    stock = PaliGemmaForConditionalGeneration.from_pretrained(either, dtype=torch.float32, attn_implementation="eager")
    inputs = AutoProcessor.from_pretrained(either)(
        images=[picture()], text=[f"<image>{INSTRUCTION}\n{QUESTION}"], suffix=[ANSWER], return_tensors="pt"
    )
    inputs.pop("labels")
    if mask is Mask.IMAGE_PREFIX:
        inputs["token_type_ids"] = (inputs["input_ids"] != stock.config.image_token_id).long()
    elif mask is Mask.CAUSAL:
        del inputs["token_type_ids"]
    with torch.no_grad():
        expected = stock.eval()(**inputs).logits

    encoder, processor, model = load(either)
    assert model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    layout = TokenLayout(
        processor.tokenizer, mask=mask, instruction=INSTRUCTION, num_patches=4, text_length=64,
        image_token_id=processor.image_token_id,
    )  # fmt: skip
    batch = layout.collate([Row(0, (layout.tokenize(QUESTION, ANSWER),))])
    read = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"], inputs["input_ids"][:, :read])
    allowed = visible(batch["segment_ids"], batch["position_ids"], batch["bidirectional"])
    with torch.no_grad():
        features = encoder.encode([picture()])
        hidden = text_hidden(model.eval(), features, batch["input_ids"], batch["position_ids"], allowed)
        found = text_logits(model, hidden)
        packed = model(features, num_items_in_batch=None, **batch)["logits"]
    expected, supervised, largest = expected[0, :read], batch["labels"][0] >= 0, expected.abs().max()
    assert largest > 1
    assert (found[0] - expected).abs().max() < 1e-6 * largest
    assert (packed - expected[supervised]).abs().max() < 1e-6 * largest
    length = inputs["input_ids"].shape[1] - len(layout.tokenize(QUESTION, ANSWER).answer)
    asked = {name: value if name == "pixel_values" else value[:, :length] for name, value in inputs.items()}
    continued = stock.generate(**asked, max_new_tokens=5, do_sample=False)[0, length:].tolist()
    (answer,) = generate(model, layout, features, [layout.tokenize(QUESTION)], [0], 5)
    assert answer.tokens and answer.tokens == continued[: len(answer.tokens)]


def test_an_adapter_is_merged_where_training_starts_and_of_another_base_refused_before_any_stage(either, tmp_path):
    small, folder = load_params("presets/small.yaml"), tmp_path / "adapter"
    train = dataclasses.replace(small.train, lora=LoraParams(2, 3.0, 0.0, ("q_proj", "down_proj")))
    params = dataclasses.replace(small, model=start(either), vision=VISION, train=train)
    encoder, processor, model = load(either)
    merged = write_adapter(model, params, folder)
    adapted = dataclasses.replace(params, model=dataclasses.replace(params.model, adapter=str(folder)))
    check_start(adapted)
    found = base_model(adapted, encoder, processor).state_dict()
    assert not torch.equal(found["model.multi_modal_projector.linear.bias"], torch.zeros(32))
    for name, value in merged.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    assert checkpoint.start_hash(adapted.model) != checkpoint.start_hash(params.model)

    # Of the same shapes, with other weights.
    other = shutil.copytree(either, tmp_path / "other")
    for file in other.glob("*.safetensors"):
        save_file({n: v + 1 if "projector" in n else v for n, v in load_file(file).items()}, file, {"format": "pt"})
    moved = dataclasses.replace(adapted, model=dataclasses.replace(adapted.model, checkpoint=str(other)))
    for refuse in (lambda: check_start(moved), lambda: base_model(moved, encoder, processor)):
        with pytest.raises(UserError, match=r"model.adapter .* is of another base"):
            refuse()


def test_where_it_lies_does_not_matter(paligemma, copy):
    one, other = load(paligemma), load(copy)
    assert one[0].hash == other[0].hash and checkpoint.start_hash(start(paligemma)) == checkpoint.start_hash(
        start(copy)
    )
    assert str(copy) not in other[2].config.to_json_string() and one[2].config.to_dict() == other[2].config.to_dict()


def test_a_changed_checkpoint_has_another_hash(copy):
    whole = checkpoint.start_hash(start(copy))
    path = copy / "model-00003-of-00003.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    assert checkpoint.start_hash(start(copy)) != whole


def test_names_of_older_releases_are_read(paligemma, copy):
    def older(state):
        for name in [name for name in state if name.startswith("vision_tower.")]:
            state[name.replace("vision_tower.", "vision_tower.vision_model.")] = state.pop(name)

    change_weights(copy, older)
    check(copy)
    assert load_encoder(VISION, "cpu", start(copy)).hash == load_encoder(VISION, "cpu", start(paligemma)).hash


@pytest.mark.parametrize("stored", [True, False], ids=["with its head", "without the head that its config.json has"])
def test_the_pooling_head_that_no_paligemma_reads_is_left_out(paligemma, copy, stored):
    if stored:
        config = PaliGemmaConfig.from_pretrained(paligemma)
        config.vision_config.vision_use_head = True
        whole = PaliGemmaForConditionalGeneration.from_pretrained(paligemma, config=config)
        assert any("head" in name for name in whole.model.vision_tower.state_dict())
        shutil.rmtree(copy)
        whole.save_pretrained(copy)
        AutoProcessor.from_pretrained(paligemma).save_pretrained(copy)
    else:
        of(vision={"vision_use_head": True})(copy)
    check(copy)
    assert load(copy)[0].hash == load(paligemma)[0].hash


def test_a_siglip_alone_is_a_tower_with_or_without_its_texts_and_head(tmp_path):
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    config = SiglipConfig(vision_config={**vision, "image_size": 28, "patch_size": 14}, text_config=text)
    torch.manual_seed(0)
    whole = SiglipModel(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    whole.vision_model.save_pretrained(tmp_path / "tower")
    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    with torch.no_grad():
        expected = whole.vision_model(images([picture()], return_tensors="pt")["pixel_values"]).last_hidden_state
    hashes = set()
    for name in ("whole", "tower"):
        images.save_pretrained(tmp_path / name)
        encoder = load_encoder(dataclasses.replace(VISION, model=str(tmp_path / name)), "cpu")
        assert torch.equal(encoder.encode([picture()]), expected) and encoder.num_tokens == 4
        hashes.add(encoder.hash)
    assert len(hashes) == 1


def test_features_of_another_kind_of_tower_are_refused(paligemma, tmp_path):
    small = dataclasses.replace(VISION, model="small", num_patches=65, visual_embed_dim=128)
    layout = Layout(images=1, num_tokens=65, width=128, dtype=StoreDtype.FLOAT32)
    encoder = load_encoder(small, "cpu")
    writer = FeatureStoreWriter(tmp_path / "features", layout, {"encoder_hash": encoder.hash, "data_hash": "d"})
    writer.begin()
    shard = Shard(layout, 0)
    shard.add([1], encoder.encode([picture()]))
    writer.write(shard)
    writer.publish()
    FeatureStore(tmp_path / "features", {"encoder_hash": encoder.hash})
    with pytest.raises(UserError, match="another encoder|encoder_hash"):
        FeatureStore(tmp_path / "features", {"encoder_hash": load_encoder(VISION, "cpu", start(paligemma)).hash})


def test_of_a_hub_repository_the_check_reads_settings_and_its_name_stands_in_messages(paligemma, tmp_path, monkeypatch):
    revision = "0123456789abcdef0123456789abcdef01234567"
    remote = dataclasses.replace(start("google/paligemma2-tiny"), revision=revision)
    with serve() as hub:
        lead_to(hub, tmp_path / "home", monkeypatch)
        hosted = hub.hosted[f"models/{remote.checkpoint}"] = Hosted(paligemma, revision)
        check_start(SimpleNamespace(model=remote, vision=VISION))
        assert hub.asked_for("/config.json") and not hub.asked_for("/model-0000")
        assert load_encoder(VISION, "cpu", remote).hash == load_encoder(VISION, "cpu", start(paligemma)).hash
        assert hub.asked_for("/model-00003-of-00003.safetensors")
        hosted.gated = True
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
        with pytest.raises(
            UserError, match=f"^model.checkpoint '{remote.checkpoint}': this model is gated.*Accept its"
        ):
            checkpoint.folder_of(remote)


# --- what is refused ----------------------------------------------------------------------------------------------------


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    state = {}
    for path in folder.glob("*.safetensors"):
        state |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def without(part):
    def change(folder):
        def remove(state):
            for name in [name for name in state if part in name]:
                del state[name]

        change_weights(folder, remove)

    return change


def of(text=None, vision=None):
    """Return a change of config.json's parts."""

    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        change_config(folder, text_config=values["text_config"] | (text or {}))
        change_config(folder, vision_config=values["vision_config"] | (vision or {}))

    return change


def images(**settings):
    """Return a change of the image processor."""

    def change(folder):
        path = folder / "processor_config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"image_processor": values["image_processor"] | settings}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no model's config.json is there"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: change_config(folder, model_type="llava"), "is a 'llava' model; only the class PaliGemma"),
        (lambda folder: change_config(folder, vision_config=None), "has the vision tower None"),
        (of(vision={"model_type": "clip_vision_model"}), "has the vision tower 'clip_vision_model'"),
        (of(text={"model_type": "gemma3_text"}), "has the language model 'gemma3_text' .*this reads gemma2 and gemma"),
        (lambda folder: change_config(folder, tie_word_embeddings=False), "has an output head of its own"),
        (without("multi_modal_projector"), "lacks 2 weights of its multi_modal_projector"),
        (without("vision_tower"), "lacks 21 weights of its vision_tower"),
        (without("layers.1.mlp.up_proj"), "lacks 1 weights of its language_model.*layers.1.mlp.up_proj"),
        (of(text={"vocab_size": 1000}), r"embed_tokens.weight of shape \(\d+, 32\).* says \(1000, 32\)"),
        (lambda folder: change_config(folder, image_token_index=7), "has 7 for an image's token .*its tokenizer 300"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
        (images(size={"height": 56, "width": 56}), "images to 56 x 56 pixels, but a SigLIP sees one size, 28"),
        (images(image_processor_type="BitImageProcessor"), "processor 'BitImageProcessor'; a siglip_vision_model needs"),
        (lambda folder: (folder / "processor_config.json").unlink(), "preprocessor_config.json cannot be read"),
        (lambda folder: (folder / "model-00002-of-00003.safetensors").write_bytes(b"x" * 99), "safetensors cannot be read"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(copy, change, message):
    check(copy)
    change(copy)
    with pytest.raises(UserError, match=f"model.checkpoint (is )?'{copy}'.*{message}"):
        check(copy)


def test_a_tokenizer_of_more_tokens_than_the_embedding_is_refused(copy):
    change_weights(copy, lambda state: state.update(shrink(state)))
    of(text={"vocab_size": 1400})(copy)
    with pytest.raises(UserError, match=r"has a tokenizer of 1\d\d\d tokens, but an embedding of 1400"):
        check(copy)


def shrink(state):
    name = "language_model.model.embed_tokens.weight"
    return {name: state[name][:1400].clone()}


def test_the_tokens_that_params_name_are_checked_without_weights(paligemma):
    with pytest.raises(UserError, match=r"vision.num_patches is 257, .*Set vision.num_patches: 4"):
        check(paligemma, num_patches=257)


def test_a_folder_that_the_stages_write_is_refused_with_what_to_do(paligemma, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(paligemma, "models/export")
    (tmp_path / "link").symlink_to("models/export")
    for name in ("models/export", "link"):
        with pytest.raises(UserError, match=f"cp -rL {name} starts/first.*set model.checkpoint to starts/first"):
            check(name)
    shutil.copytree("models/export", "starts/first")
    check("starts/first")
