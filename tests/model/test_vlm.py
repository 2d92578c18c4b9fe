"""Where Gemma 2 comes from: a local folder, whose weights are kept, or a clear refusal."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor, Gemma2ForCausalLM

from tests.tiny_model import TEXTS
from vlm_vqa.errors import UserError
from vlm_vqa.model.vlm import build_processor, initial_model, load_tokenizer, random_config, train_tokenizer
from vlm_vqa.params import LanguageParams


@pytest.fixture
def folder(tiny, tmp_path):
    """A Gemma 2 as people have it on disk, and the model that was written there."""
    tokenizer = train_tokenizer(TEXTS, 300)
    torch.manual_seed(5)
    gemma = Gemma2ForCausalLM(random_config(tiny.language.config, tokenizer))
    gemma.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, gemma


def load(folder, tiny):
    language = LanguageParams(str(folder), None, None, None)
    processor = build_processor(BitImageProcessor(), load_tokenizer(language, []), tiny.num_patches)
    return initial_model(language, tiny.encoder_config, processor, seed=0), processor


def test_a_local_folder_is_loaded_whole_and_grows_by_the_processors_tokens(folder, tiny):
    path, gemma = folder
    model, processor = load(path, tiny)
    text = model.model.language_model
    words = gemma.config.vocab_size
    assert text.embed_tokens.weight.shape[0] == len(processor.tokenizer) > words
    assert torch.equal(text.embed_tokens.weight[:words], gemma.model.embed_tokens.weight)
    new = text.embed_tokens.weight[words:]
    assert torch.equal(new, gemma.model.embed_tokens.weight.mean(dim=0).expand_as(new))
    for name, value in gemma.model.layers.state_dict().items():
        assert torch.equal(text.layers.state_dict()[name], value), name
    assert model.lm_head.weight is text.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert str(path) not in model.config.to_json_string()


def test_a_model_that_is_no_gemma_2_is_refused(folder, tiny):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    with pytest.raises(UserError, match="is a gemma; it must be a Gemma 2"):
        load(path, tiny)


def test_weights_that_are_missing_are_not_made_up(folder, tiny):
    path, _ = folder
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks the weights.*layers.1.mlp.up_proj"):
        load(path, tiny)


@pytest.mark.parametrize("missing", ["everything", "model.safetensors", "config.json"])
def test_what_is_not_there_is_named(folder, tiny, missing):
    path, _ = folder
    if missing == "everything":
        path = path / "none"
    else:
        (path / missing).unlink()
    with pytest.raises(UserError, match=f"language.model '{path}' cannot be loaded"):
        load(path, tiny)
