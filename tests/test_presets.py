"""Every preset is a valid params.yaml whose launch file exists; the reference recipe is kept to the letter."""

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from vlm_vqa.estimate.predict import Asked, predict
from vlm_vqa.estimate.shapes import GEMMA_VOCABULARY, LANGUAGE, VISION
from vlm_vqa.params import PROJECTIONS, load_params
from vlm_vqa.training.launch import read_launch

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_valid_and_its_launch_is_one_that_accelerate_reads(path):
    launch = ROOT / "launch" / f"{load_params(path).train.launch}.yaml"
    config = load_config_from_file(str(launch))
    # accelerate fills in what a file leaves out and refuses what it does not know.
    assert config.num_processes == read_launch(launch.stem, launch.parent)["num_processes"]


FULL = [path for path in PRESETS if path.stem.startswith("vqav2")]


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_its_towers_are_the_real_ones(path):
    params = load_params(path)
    vision, (language, vocabulary) = VISION[params.vision.model], (LANGUAGE[params.language.model], GEMMA_VOCABULARY)
    # 224 pixels in patches of 14, and the class token.
    assert params.vision.num_patches == (224 // vision.patch_size) ** 2 + 1
    assert params.vision.visual_embed_dim == vision.hidden_size
    with torch.device("meta"):
        gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=vocabulary, **dataclasses.asdict(language)))
        layer = next(iter(gemma.model.layers))
    assert {type(layer).__name__} == {"Gemma2DecoderLayer"}
    linear = {name.rpartition(".")[2] for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear == set(PROJECTIONS)
    # The longest row fits Gemma 2's window.
    longest = params.vision.num_patches + params.train.questions_per_row * params.prompt.text_length
    assert longest <= gemma.config.sliding_window


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_it_fits_the_gpus_that_it_is_for(path, clean_checkout):
    """By `vlm-vqa preflight`'s formulas; no GPU was measured."""
    asked = Asked(device="RTX 4090", host_memory=256, disk=500)
    assert predict(path, asked).fits
    assert not predict(path, asked._replace(disk=20)).fits


def test_the_reference_recipe():
    params = load_params(ROOT / "presets/vqav2-reference.yaml").flat()
    recipe = {
        "batch_size": 6, "gradient_accumulation_steps": 10, "learning_rate": 1e-5, "weight_decay": 1e-4, "dropout": 0.1,
        "optimizer": "adamw_bnb_8bit", "block_wise": True, "percentile_clipping": 95, "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.01, "max_grad_norm": 1.0, "num_train_epochs": 1,
    }  # fmt: skip
    assert {name: params[f"train.{name}"] for name in recipe} == recipe
    assert (params["vision.model"], params["language.model"]) == ("facebook/dinov2-base", "google/gemma-2-2b-it")
    assert (params["vision.num_patches"], params["vision.visual_embed_dim"]) == (257, 768)
    assert (params["prompt.text_length"], params["prompt.mask"]) == (64, "prefix-lm")
    launch = read_launch(params["train.launch"], ROOT / "launch")
    assert launch["distributed_type"] == "FSDP" and launch["num_processes"] == 4
    assert launch["fsdp_config"]["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
