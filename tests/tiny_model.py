"""A tiny model of the real classes, with the weights of one stock PaliGemma shared by all forms of it."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)

from vlm_vqa.model.adapters import add_adapters, merge_adapters, projector_of, save_adapter
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.model.layout import TokenLayout
from vlm_vqa.model.vlm import (
    TRAINING_FILE,
    VISION_PREFIX,
    build_processor,
    hash_weights,
    initial_model,
    save_trained,
    train_tokenizer,
    trained_state,
)
from vlm_vqa.params import LanguageConfig, LanguageParams, Mask, load_params
from vlm_vqa.sealed import write_folder

INSTRUCTION = "Answer in one word."
TEXTS = ["What color is the shape?", "Is there a red circle?", "How many dogs are there?", "yes", "no", INSTRUCTION]


@pytest.fixture(scope="session")
def tiny():
    """Namespace: `stock`, `training` (same weights), `processor`, `encoder_config`, `layout(mask)`, `num_patches`."""
    tokenizer = train_tokenizer(TEXTS, 300)
    images = BitImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False)
    encoder_config = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    num_patches = 5
    processor = build_processor(images, tokenizer, num_patches)
    shape = LanguageConfig(32, 64, 2, 4, 2, 8)
    language = LanguageParams("random", None, 300, shape)
    training = initial_model(language, encoder_config, processor, seed=1)
    torch.nn.init.normal_(training.model.multi_modal_projector.linear.weight, std=0.3)
    stock = PaliGemmaForConditionalGeneration._from_config(copy.deepcopy(training.config), attn_implementation="eager")
    tower = Dinov2Model(encoder_config)
    state = training.state_dict() | {f"{VISION_PREFIX}{name}": value for name, value in tower.state_dict().items()}
    stock.load_state_dict(state)
    return SimpleNamespace(
        stock=stock.eval(), training=training, processor=processor, encoder_config=encoder_config,
        num_patches=num_patches, language=language,
        layout=lambda mask: TokenLayout(
            tokenizer, mask=Mask(mask), instruction=INSTRUCTION, num_patches=num_patches, text_length=64,
            image_token_id=processor.image_token_id,
        ),
    )  # fmt: skip


class GivenFeatures:
    """Features [N, T, D] in memory, by place, as `Collator` takes them."""

    live = False

    def __init__(self, features):
        self.features = features

    def inputs(self, image_ids):
        return {"features": self.features[list(image_ids)]}

    def of(self, inputs):
        return inputs["features"]


def tiny_base(tiny):
    """Return another training model with the weights of `tiny`."""
    model = initial_model(tiny.language, tiny.encoder_config, tiny.processor, seed=1)
    model.load_state_dict(tiny.training.state_dict())
    return model


def write_adapter(model, params, folder, seed=0):
    """Write an adapter of a training model as a training with these parameters leaves one; return the merged weights."""
    generator = torch.Generator().manual_seed(seed)
    projector = projector_of(model)
    add_adapters(model, params.train.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    merged = merge_adapters(weights, params.train.lora)
    save_adapter(folder, weights, projector, params, hash_weights(merged))
    return merged


def write_trained(tiny, folder, mask):
    """Write what a training with this mask leaves; return (folder, encoder, params)."""
    save_trained(tiny.training.config, trained_state(tiny.training), folder)
    tiny.processor.save_pretrained(folder)
    write_folder(folder / TRAINING_FILE, {"weights_hash": hash_weights(trained_state(tiny.training))})
    tower = Dinov2Model(tiny.encoder_config)
    state = tiny.stock.state_dict()
    tower.load_state_dict({k.removeprefix(VISION_PREFIX): v for k, v in state.items() if k.startswith(VISION_PREFIX)})
    encoder = Encoder(tower.eval(), tiny.processor.image_processor, "hash", tiny.num_patches)
    params = load_params("presets/small.yaml")
    prompt = dataclasses.replace(params.prompt, mask=Mask(mask), instruction=INSTRUCTION, text_length=64)
    vision = dataclasses.replace(params.vision, num_patches=tiny.num_patches)
    return folder, encoder, dataclasses.replace(params, prompt=prompt, vision=vision)


def save_paligemma(folder, texts=TEXTS, vocabulary=300, kind="gemma2"):
    """Write a tiny PaliGemma 2 (or 1: `gemma`) with stock code alone, as the hub has it: bfloat16, in several files."""
    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, train_tokenizer(list(texts), vocabulary))
    gemma = {
        "model_type": kind, "vocab_size": len(processor.tokenizer) + 63, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "initializer_range": 0.1,
    } | ({"query_pre_attn_scalar": 8} if kind == "gemma2" else {})  # fmt: skip
    siglip = {
        "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = PaliGemmaConfig(
        text_config=gemma, vision_config=siglip, projection_dim=32, image_token_index=processor.image_token_id
    )
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB")
    processor.save_pretrained(folder)
    return folder
