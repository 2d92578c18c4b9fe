"""What a training starts from: questions as examples, the processor made for them, the model before its first step."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast

from vlm_vqa.data.held_out import divide
from vlm_vqa.data.records import load_questions
from vlm_vqa.hf_hub import SETTINGS
from vlm_vqa.launch_file import Strategy, read_launch
from vlm_vqa.model import checkpoint
from vlm_vqa.model.adapters import add_adapters, merge_adapter
from vlm_vqa.model.encoder import Encoder
from vlm_vqa.model.layout import TokenLayout
from vlm_vqa.model.vlm import (
    VlmForTraining,
    build_processor,
    checkpoint_model,
    freeze_embeddings,
    initial_model,
    load_tokenizer,
    set_attention,
    set_dropout,
)
from vlm_vqa.params import Answers, Params, Start
from vlm_vqa.training.dataset import QuestionDataset
from vlm_vqa.training.launch import Launch

RECORDS, FEATURES = Path("data/records"), Path("data/features")
"""Where the two stages before have written, from the project's folder."""


def prepare(params: Params, encoder: Encoder) -> tuple[QuestionDataset, TokenLayout, PaliGemmaProcessor]:
    """Load the training questions, and build tokenizer, processor and layout for them."""
    data, tokenizer = examples(params)
    processor = build_processor(encoder.processor, tokenizer, params.vision.num_patches)
    data.layout.image_token_id = processor.image_token_id
    return data, data.layout, processor


def examples(params: Params, folder: Path = RECORDS) -> tuple[QuestionDataset, PreTrainedTokenizerFast]:
    """Load the questions to train on from the records in `folder`, and the tokenizer, which knows no image token yet."""
    records = load_questions(folder, "train")
    if params.model.start is Start.CHECKPOINT:
        tokenizer = checkpoint.load_tokenizer(params.model, checkpoint.folder_of(params.model, SETTINGS))
    else:
        taught = records["multiple_choice_answer"]
        if params.train.answers is Answers.DRAWN:
            taught = [answer for answers in records["answers"] for answer in answers]
        tokenizer = load_tokenizer(params.language, [params.prompt.instruction, *records["question"], *taught])
    prompt, patches = params.prompt, params.vision.num_patches
    how = {"instruction": prompt.instruction, "text_length": prompt.text_length, "num_patches": patches}
    layout = TokenLayout(tokenizer, mask=prompt.mask, **how, image_token_id=-1)
    trained, _ = divide(records, params, folder)
    return QuestionDataset(trained, layout, params.prompt.too_long, params.train.answers, params.seed), tokenizer


def base_model(params: Params, encoder: Encoder, processor: PaliGemmaProcessor) -> VlmForTraining:
    """Return the model that training starts from, float32; rounded to 16 bits where training begins with that."""
    train, start = params.train, params.model
    if start.start is Start.CHECKPOINT:
        model = checkpoint_model(start, encoder.model.config, processor)
    else:
        model = initial_model(params.language, encoder.model.config, processor, params.seed)
    if start.adapter is not None:
        merge_adapter(model, Path(start.adapter).expanduser(), str(start.checkpoint))
    # DeepSpeed makes its float32 masters of a model that it has cast to its compute type.
    cast = train.compute_dtype if read_launch(train.launch).strategy.deepspeed else train.weights_dtype
    return model.to(getattr(torch, cast.value)).to(torch.float32)


def model_to_train(params: Params, encoder: Encoder, processor: PaliGemmaProcessor) -> VlmForTraining:
    """Return the model that the parameters describe: weights before the first step, and what of it is trained."""
    model = base_model(params, encoder, processor)
    set_dropout(model, params.train.dropout)
    set_attention(model, params.train.attention)
    if params.train.freeze_embeddings:
        freeze_embeddings(model)
    if params.train.lora is not None:
        add_adapters(model, params.train.lora)
    return model


def build_once(build: Callable[[], VlmForTraining], running: Launch) -> VlmForTraining:
    """Build a model on process 0; the others of a launch get its shape, and the trainer or DDP gives them its weights.

    So weights are read and drawn once. DeepSpeed divides what each process brings: there all build it.
    """
    if running.processes == 1 or running.strategy.deepspeed:
        return build()
    model = build() if running.main else None
    shape: list[Any] = [None if model is None else shape_of(model)]
    distributed.broadcast_object_list(shape)
    if model is not None:
        return model
    (model,) = shape
    return model if running.strategy is Strategy.FSDP2 else make_room(model, running.device)


def shape_of(model: VlmForTraining) -> VlmForTraining:
    """Return a copy whose parameters have shape and type alone; buffers, which nobody sends, are real."""
    return copy.deepcopy(
        model, {id(one): nn.Parameter(one.to("meta"), one.requires_grad) for one in model.parameters()}
    )


def make_room(model: VlmForTraining, device: torch.device | str) -> VlmForTraining:
    """Give parameters that have but shapes room on `device`, for whatever fills it."""
    model._apply(lambda one: torch.empty_like(one, device=device) if one.is_meta else one)
    model.tie_weights()
    return model
