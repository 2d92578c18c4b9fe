"""Every preset is a valid params.yaml whose launch file exists; the reference recipe is kept to the letter."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from vlm_vqa.estimate.predict import Asked, predict
from vlm_vqa.estimate.shapes import model_of, vision_of
from vlm_vqa.model.flops import class_tokens
from vlm_vqa.params import PROJECTIONS, Dtype, ValidationParams, load_params
from vlm_vqa.training.launch import read_launch

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_valid_and_its_launch_is_one_that_accelerate_reads(path):
    launch = ROOT / "launch" / f"{load_params(path).train.launch}.yaml"
    config = load_config_from_file(str(launch))
    # accelerate fills in what a file leaves out and refuses what it does not know.
    assert config.num_processes == read_launch(launch.stem, launch.parent).processes


HASHES = {
    "paligemma2-vqav2": ("a7688689e0e344e49924cf943a4fc684255bf85d87a7c335a93e22cdce2f8ce6",
                         "3afd6cf31229808ebdd94afb74ad9ee3fba2668d55fdbe2519dd75728d841156",
                         "2f47612efd3b0a37df6a138bde1e5961a4b93aea11df882ea05c5b2a77b8e5d2",
                         "821fbf23e022c1c9a310e9f3933f8ec7311dd9349b2208488e2b737af586d548"),
    "small": ("9d3ae9809852684b06707d05eaf77a3a70b6ac6600277feba1acbbd33057428e",
              "9cf376782b735e6dc0f3b4125a757a17f96f1c1157b1f6be337ccb9af608337a",
              "c3a13290012d72675a4c7bd5088f9c84a83e8c5c57d36ee57eecd6a25dc8a9c6",
              "80311c756b12deda58e21958625ef515f1dc4f54af6012c282e2a8a62f7a5a93"),
    "vqav2-1gpu": ("56b7ae40d2b28b1a638f85b5bdf5bb1246427c80f3517fb313930d11150783eb",
                   "ba4d2cb38a6399fb260f5728163a2923e4919381c9028e5e9bf45cf11034bb2d",
                   "7ddf2bce18d8d2929b0ee9bc61d41e7aff2166d333548bc7d71be273d1e0db72",
                   "26b439d8e61b8f7487dbc2fd197afe87ab211966ead9dda15ba88879c72aeafe"),
    "vqav2-lora": ("9ae8d44277c16280e35995394c529b1b4f54a1439d150edfc4679de87caebc30",
                   "e63cb80e5f53c13859a96220b55cbec4763ba4b9a873a836b0fe39f700fdff30",
                   "a7510a1e0222a466db96803f0aaae7b840a1e95057321d1b9aeffae857d450ad",
                   "87c0861726ecfb92ab6a69be367a7a53725b0dc1d0a217f54ded949b703f3bfa"),
    "vqav2-reference": ("6fd70ba50253e8f5b5c857b000f514015ceab01dbff88205ffd760fa06cf07ab",
                        "1c819a32244a67dba20d31032bdcfd8d252a287905e18ea792cf55c9543401ad",
                        "4e5cb83cb1fd8252248db5e0fdaacf507a51d545ce29e9c98457aeb5b9e6a683",
                        "aaba864b3e2a1fce50686db70b7d3443052993869648f38f96d0a005014c640f"),
    "vqav2": ("d206a19435702f999ebfeba1093008a3f37359e6cb09d457df80910a91e5173d",
              "fd6d506555ff24c36c878b3e2731b944f0c35038989063f74d4dc482356730f4",
              "dccff200349959d2965947952db55afd5fd4ade9bcc7764790d2c33ec1057f77",
              "fbd7323df6322a5f453fdd7d900971de934aa0106b768f5a5fba6ecdf000ff3f"),
}  # fmt: skip
"""Without validation, rates and a launch of the evaluation, as all were before there were any."""
NOW = {
    "paligemma2-vqav2": ("aa29eb55558d09135c6d81d3876dfdfc06b15f43c982608556884ff2c15ae054",
                         "0fceb833ecc20452f025da7b65cd8c7df007f6acbfb725c9e0b0aa0db87e1e68",
                         "d8477779ef768fe9d5a4181e54f3caa55b450f97d0cd502278d2d6c1af3a6c97",
                         "22caad96c4cf29f15df53873281caa4f60622f06477b365fe6e2a7a23932fe78"),
    "small": ("9427a17ab107135a584fb3ae87e8ecf9fcfee0256ff9283d71848b28e315613b",
              "acd8b0a036500296371517f7598243e4939756489de4944d039d72421f76bbf6",
              "4bf06f6e47a3f358cb92f8809881ddb938e967e0eea788f67f66c1a06462d656",
              "c2edb6d43e5ff7345853cd07d325c49fda63ef77c36d4fbb3a3192440f73a92b"),
    "vqav2-1gpu": ("ec600481d9eaa7afdcf113745c7e261a22e6017d260dd6ab40bb1f73f350524b",
                   "92901fca5df91e995b44fd36a991141f836de10628eec78cae4641891de67686",
                   "b8ece82e297f1a511448daabffbd6fdcf77df4fbd1651ea9620eb2f41c3e47eb",
                   "21609845b5364d1d5a8ba42bed13857a0480f6d821590ec1bd01363016e4f4ae"),
    "vqav2-lora": ("378e2ee4e5d4d924bfbab54730ecc684f7a1b245cc5dcd2bed0d8400c123d0f6",
                   "a2be16b65a02276eef0302370889602004e7296080635f3b040bd9c016675000",
                   "42dfc6ef8dbc8d6ed96e56b1a7cae3fc7612b405e309a0a922ffd035395b5680",
                   "0a2b117f7dd954ccfc115bc00e39d62fa6ada6cf2bb2ff85e0fffce40fc9162a"),
    "vqav2": ("53fc1452b4c9703e709e59a78de55da09f9724c44fb34da06249be2ebb4f6668",
              "16c1c1011c6db7ed0d4d9bb77a3335f3b8aa8978dd0c1ad0726e034e7c971428",
              "77086eadfd533d4cbebd85dfd3da9de70bb7322709edec755f9e3a216b2c5f58",
              "ea2dc24b6e0d06bcfffa7560f9aa1457b6dd150a509c001b7d299b61d7714671"),
    "vqav2-reference": ("7dc31cea1bfd9128fc51793179ccfae3f07e20c554820f0cef36b57a882505ee",
                       "1c819a32244a67dba20d31032bdcfd8d252a287905e18ea792cf55c9543401ad",
                       "4e5cb83cb1fd8252248db5e0fdaacf507a51d545ce29e9c98457aeb5b9e6a683",
                       "aaba864b3e2a1fce50686db70b7d3443052993869648f38f96d0a005014c640f"),
}  # fmt: skip


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_its_hashes_are_those_under_which_runs_are_stored(path):
    """Runs, weights and checkpoints are found by them: a change of these lines loses what users have trained."""
    params = load_params(path)
    one_rate = dataclasses.replace(params.train, projector_learning_rate=None)
    one_process = dataclasses.replace(params.evaluation, launch=None, compute_dtype=Dtype.FLOAT32)
    before = dataclasses.replace(params, validation=ValidationParams(), train=one_rate, evaluation=one_process)
    for one, expected in ((before, HASHES), (params, NOW)):
        found = one.hash(), one.training_hash(), one.recipe_hash(1), one.recipe_hash(4)
        assert found == expected[path.stem]


FULL = [path for path in PRESETS if path.stem != "small"]


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_its_towers_are_the_real_ones(path):
    params = load_params(path)
    vision, model = vision_of(params), model_of(params)
    # 224 pixels in patches of 14, and a DINOv2's class token.
    assert params.vision.num_patches == (224 // vision.patch_size) ** 2 + class_tokens(vision)
    assert params.vision.visual_embed_dim == vision.hidden_size
    with torch.device("meta"):
        gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=model.vocabulary, **dataclasses.asdict(model.language)))
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


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_its_validation_costs_less_than_a_twentieth_of_its_training(path, clean_checkout):
    device = None if path.stem == "small" else "RTX 4090"
    facts = predict(path, Asked(device=device, host_memory=256, disk=500)).stages[2].facts
    assert facts.get("flop_of_validation", 0) < 0.05 * (facts["flop"] + facts["flop_recomputed"])
    assert ("validations" in facts) == (path.stem != "vqav2-reference")


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
    launch = yaml.safe_load((ROOT / f"launch/{params['train.launch']}.yaml").read_text())
    assert launch["distributed_type"] == "FSDP" and launch["num_processes"] == 4
    assert launch["fsdp_config"]["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
