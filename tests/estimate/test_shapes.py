"""The towers' shapes, against the real modules."""

import dataclasses
import json

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    PaliGemmaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.tiny_model import save_paligemma
from vlm_vqa.errors import UserError
from vlm_vqa.estimate.shapes import VISION, Model, model_of, tower_parameters, vision_of
from vlm_vqa.model.adapters import add_adapters
from vlm_vqa.model.encoder import SMALL_ENCODER
from vlm_vqa.model.vlm import VlmForTraining, freeze_embeddings
from vlm_vqa.params import LoraParams

LORA = LoraParams(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj"))


def real_model(model: Model) -> VlmForTraining:
    """Return the real class of a shape, without storage."""
    text = Gemma2Config(**dataclasses.asdict(model.language), vocab_size=model.vocabulary)
    config = PaliGemmaConfig(
        text_config=text.to_dict(),
        vision_config=Dinov2Config(hidden_size=model.features).to_dict(),
        projection_dim=text.hidden_size,
        hidden_size=text.hidden_size,
        vocab_size=model.vocabulary,
    )
    with torch.device("meta"):
        return VlmForTraining._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_are_those_of_the_real_gemma_2_2b(frozen, lora, preset):
    known = model_of(preset("vqav2-reference"))
    model = Model(known.language, known.vocabulary, known.features, frozen, lora)
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
    assert model.trained == sum(one.numel() for one in real.parameters() if one.requires_grad)


def test_the_processor_adds_as_many_tokens_as_the_shapes_say(tiny):
    added = [
        one for one in tiny.processor.tokenizer.added_tokens_encoder if one.startswith(("<loc", "<seg", "<image>"))
    ]
    assert len(added) == 1_153


@pytest.mark.parametrize("shape", [*VISION.values(), Dinov2Config(hidden_size=24, mlp_ratio=2, image_size=28)])
def test_the_encoders_parameters_are_those_of_the_real_one(shape):
    with torch.device("meta"):
        if isinstance(shape, Dinov2Config):
            real = Dinov2Model(shape)
        else:
            real = SiglipVisionModel(SiglipVisionConfig(**shape.to_dict() | {"vision_use_head": False}))
    assert tower_parameters(shape) == sum(one.numel() for one in real.parameters())


def test_the_small_encoders_shape_is_its_configs_and_checked(preset):
    params = preset("small")
    config = json.loads((SMALL_ENCODER / "config.json").read_text())
    names = "hidden_size num_hidden_layers num_attention_heads mlp_ratio image_size patch_size num_channels".split()
    assert all(getattr(vision_of(params), name) == config[name] for name in names)
    with pytest.raises(UserError, match="visual_embed_dim is 768.*128 wide"):
        vision_of(dataclasses.replace(params, vision=dataclasses.replace(params.vision, visual_embed_dim=768)))


def test_a_local_folder_is_read(tmp_path, preset):
    Gemma2Config(hidden_size=48, num_hidden_layers=2, vocab_size=100).save_pretrained(tmp_path)
    params = preset("vqav2-reference", **{"language.model": str(tmp_path), "language.revision": None})
    model = model_of(params)
    assert (model.language.hidden_size, model.vocabulary) == (48, 100 + 1_153)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama'; language.model must be a gemma2"):
        model_of(params)


def test_a_local_checkpoint_is_read_with_the_defaults_of_what_it_leaves_out(tmp_path, preset):
    folder = save_paligemma(tmp_path / "paligemma")
    config = json.loads((folder / "config.json").read_text())
    # As google/paligemma2-3b-pt-224's own file, which says nothing of these.
    del config["text_config"]["head_dim"], config["vision_config"]["image_size"]
    (folder / "config.json").write_text(json.dumps(config))
    changes = {"model.checkpoint": str(folder), "model.revision": None, "vision.visual_embed_dim": 24}
    params = preset("paligemma2-vqav2", **changes)
    tower = vision_of(params)
    assert (tower.hidden_size, tower.num_hidden_layers, tower.intermediate_size) == (24, 1, 40)
    assert (tower.image_size, tower.patch_size) == (224, 14)
    model = model_of(params)
    assert (model.language.hidden_size, model.language.head_dim) == (32, 256)
    assert model.vocabulary == config["text_config"]["vocab_size"], "the processor's tokens are among them"
    with pytest.raises(
        UserError, match="model.checkpoint 'google/paligemma-3b-pt-896': preflight knows.*paligemma2-3b"
    ):
        model_of(preset("paligemma2-vqav2", **{"model.checkpoint": "google/paligemma-3b-pt-896"}))


def test_an_unknown_hub_id_is_named(preset):
    params = preset("vqav2-reference", **{"language.model": "google/gemma-2-9b"})
    with pytest.raises(UserError, match="google/gemma-2-9b.*Download it"):
        model_of(params)
