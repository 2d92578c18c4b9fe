"""Ways to compute loss and gradients of the same questions from the same features and the same weights.

    reference           Hugging Face's PaliGemma as it stands: a row a question, padded to 257 + 64, logits everywhere
    dynamic             the same, padded to the longest row of the micro-batch, as nanoVLM and LLaVA do
    supervised_logits   the same as reference, logits at supervised positions only
    dynamic_supervised  both
    ours                `VlmForTraining`: the questions of an image share a row, no padding, logits and the last layer at
                        supervised positions only
    whole_last_layer    the same, the last layer at all positions
    recomputed_scores   ours, attention's scores computed a second time in the backward pass
    recomputed_layers   ours, all layers computed a second time there
    compiled            ours, its layers but the last compiled by torch, as the presets train

All use the image-prefix mask; for the stock class that is `token_type_ids` 0 at image tokens and 1 at text. The stock class
has a module in place of its vision tower that hands the given features on. Every loss is the sum over supervised tokens,
divided by those of the whole step, which the Trainer tells Hugging Face's loss too (`num_items_in_batch`): so the sum of the
micro-batches is one number, the same for all recipes.

Shapes: B rows, S tokens of a row, D hidden width.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, PaliGemmaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks import measure
from benchmarks.workload import Workload
from vlm_vqa.model.layout import IGNORED, QuestionTokens, Row, TokenLayout
from vlm_vqa.model.vlm import VlmForTraining, compile_layers, initial_model, recompute_scores, text_logits
from vlm_vqa.params import LanguageConfig, LanguageParams
from vlm_vqa.training.sampler import divide


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass."""

    inputs: dict[str, Tensor]
    positions: int
    """Token positions that the linear layers see: real tokens, and padding where there is any."""


@dataclass(frozen=True)
class Recipe:
    """A way to compute the step."""

    model: nn.Module
    batches: list[MicroBatch]
    loss: Callable[[dict[str, Tensor]], Tensor]
    dtype: torch.dtype = torch.float32
    """bfloat16 computes by autocast."""
    switch: Callable[[bool], None] = lambda on: None
    """Switches on, and off again, what the model is to do otherwise than by itself."""

    def run(self, batches: Sequence[MicroBatch] | None = None) -> float:
        """Leave the gradients of `batches` (by default the whole step) in the parameters; return the loss."""
        self.model.zero_grad(set_to_none=True)
        total = 0.0
        for batch in self.batches if batches is None else batches:
            with self.forward():
                loss = self.loss(batch.inputs)
            loss.backward()
            total += loss.item()
        return total

    @contextmanager
    def forward(self) -> Generator[None]:
        """Switch on what a forward pass is to run with."""
        self.switch(True)
        with torch.autocast(measure.device().type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            yield
        self.switch(False)

    @property
    def positions(self) -> int:
        """Token positions of the whole step."""
        return sum(batch.positions for batch in self.batches)


def build_model(shape: LanguageConfig, vocabulary: int, workload: Workload) -> VlmForTraining:
    """Return our model with random float32 weights of this shape, on the benchmarks' device.

    Args:
        vocabulary: embedding rows, whatever the tokenizer's size.
    """
    encoder = Dinov2Config(hidden_size=workload.features.shape[-1], num_hidden_layers=1, num_attention_heads=1)
    language = LanguageParams("random", None, vocabulary, shape)
    model = initial_model(language, encoder, workload.processor, seed=0)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.to(measure.device())


def stock_model(model: VlmForTraining) -> PaliGemmaForConditionalGeneration:
    """Return Hugging Face's class with the very parameters of `model`, so that both fill the same gradients."""
    with torch.device("meta"):
        config = copy.deepcopy(model.config)
        stock = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager")
    stock.model.vision_tower = GivenFeatures()
    stock.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    # Rotary frequencies and the like are in no state dict.
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        stock.get_submodule(module)._buffers[leaf] = buffer
    stock.tie_weights()
    used = {layer.self_attn.config._attn_implementation for layer in stock.model.language_model.layers}
    assert used == {"eager"}, f"the reference attends by {used}"
    assert {id(one) for one in stock.parameters()} == {id(one) for one in model.parameters()}
    return stock.train()


class GivenFeatures(nn.Module):
    """Stands where the vision tower does, and returns the features that come as `pixel_values`."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Return float [B, T, E] as it came."""
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)


def reference(stock: PaliGemmaForConditionalGeneration, workload: Workload, **options: Any) -> Recipe:
    """The reference recipe: fixed padding, logits at all positions, Hugging Face's loss."""
    return Recipe(stock, list(_stock_batches(workload, fixed=True)), _full_logits_loss(stock, workload), **options)


def dynamic(stock: PaliGemmaForConditionalGeneration, workload: Workload, **options: Any) -> Recipe:
    """The reference with padding to the longest row of the micro-batch."""
    return Recipe(stock, list(_stock_batches(workload, fixed=False)), _full_logits_loss(stock, workload), **options)


def supervised_logits(stock: PaliGemmaForConditionalGeneration, workload: Workload, **options: Any) -> Recipe:
    """The reference with logits at supervised positions only."""
    return Recipe(stock, list(_stock_batches(workload, fixed=True)), _supervised_loss(stock, workload), **options)


def dynamic_supervised(stock: PaliGemmaForConditionalGeneration, workload: Workload, **options: Any) -> Recipe:
    """Dynamic padding and logits at supervised positions only."""
    return Recipe(stock, list(_stock_batches(workload, fixed=False)), _supervised_loss(stock, workload), **options)


def ours(model: VlmForTraining, workload: Workload, tokens: int | None = None, **options: Any) -> Recipe:
    """Our training step: rows share their image over the whole step.

    Args:
        tokens: see `pack`.
    """
    layout = workload.layout
    batches = [
        MicroBatch(
            _on_device(
                {
                    "image_features": workload.features[[row.image_id for row in rows]],
                    **layout.collate(rows),
                }
            ),
            sum(row_tokens(layout, row) for row in rows),
        )
        for rows in pack(workload, tokens)
    ]
    supervised = workload.supervised
    return Recipe(model, batches, lambda inputs: model(**inputs, num_items_in_batch=supervised)["loss"], **options)


def whole_last_layer(model: VlmForTraining, workload: Workload, **options: Any) -> Recipe:
    """Ours with a last layer that computes all positions."""
    return ours(model, workload, switch=lambda on: setattr(model, "narrow_last_layer", not on), **options)


def recomputed_scores(model: VlmForTraining, workload: Workload, **options: Any) -> Recipe:
    """Ours with train.attention_checkpointing."""
    return ours(model, workload, switch=lambda on: recompute_scores(model, on), **options)


def recomputed_layers(model: VlmForTraining, workload: Workload, **options: Any) -> Recipe:
    """Ours with train.gradient_checkpointing."""

    def switch(on: bool) -> None:
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()

    return ours(model, workload, switch=switch, **options)


def compiled(model: VlmForTraining, workload: Workload, **options: Any) -> Recipe:
    """Ours with train.compile."""
    layers: list[Any] = list(model.model.language_model.layers)[:-1]
    calls: list[Any] = []

    def switch(on: bool) -> None:
        if not calls:
            compile_layers(model)
            calls.extend(layer._compiled_call_impl for layer in layers)
        for layer, call in zip(layers, calls, strict=True):
            layer._compiled_call_impl = call if on else None

    return ours(model, workload, switch=switch, **options)


def pack(workload: Workload, tokens: int | None = None) -> list[list[Row]]:
    """Divide the step's rows into micro-batches of about equal size, as training does.

    Args:
        tokens: real tokens that decide how many micro-batches there are; by default the positions of a micro-batch of the
            reference.
    """
    layout = workload.layout
    rows = sorted(workload.rows, key=lambda row: row_tokens(layout, row), reverse=True)
    lengths = [row_tokens(layout, row) for row in rows]
    sizes = divide(
        lengths, -(-sum(lengths) // (tokens or workload.micro_batch * (layout.num_patches + layout.text_length)))
    )
    left = iter(rows)
    return [list(islice(left, size)) for size in sizes]


def row_tokens(layout: TokenLayout, row: Row) -> int:
    """Count the tokens that a row really holds; `<eos>` is predicted but not read."""
    return layout.num_patches + len(layout.prefix) + sum(len(tokens.read) for tokens in row.questions)


def _stock_batches(workload: Workload, *, fixed: bool) -> Iterator[MicroBatch]:
    """Yield what the stock class takes: a row a question, padded on the right."""
    layout = workload.layout
    for start in range(0, len(workload.questions), workload.micro_batch):
        questions = workload.questions[start : start + workload.micro_batch]
        longest = max(layout.text_tokens(tokens) for _, tokens in questions)
        width = layout.num_patches + (layout.text_length if fixed else longest)
        columns = [_stock_row(layout, tokens, width) for _, tokens in questions]
        inputs = {name: torch.tensor([column[name] for column in columns]) for name in columns[0]}
        features = workload.features[[image for image, _ in questions]]
        yield MicroBatch(_on_device({"pixel_values": features, **inputs}), len(questions) * width)


def _stock_row(layout: TokenLayout, tokens: QuestionTokens, width: int) -> dict[str, list[int]]:
    """Return one padded row; `labels` stand at the tokens themselves, the stock loss shifts them."""
    prompt = [layout.image_token_id] * layout.num_patches + layout.prefix + tokens.prompt
    ids = prompt + tokens.answer
    padding = width - len(ids)
    return {
        "input_ids": ids + [layout.pad_id] * padding,
        "attention_mask": [1] * len(ids) + [0] * padding,
        "token_type_ids": [0] * layout.num_patches + [1] * (width - layout.num_patches),
        "labels": [IGNORED] * len(prompt) + tokens.answer + [IGNORED] * padding,
    }


def _full_logits_loss(stock: PaliGemmaForConditionalGeneration, workload: Workload) -> Callable:
    supervised = workload.supervised

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        # Without a cache, as the Trainer does it.
        return stock(**inputs, num_items_in_batch=supervised, use_cache=False).loss

    return loss


def _supervised_loss(stock: PaliGemmaForConditionalGeneration, workload: Workload) -> Callable:
    supervised = workload.supervised

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        inputs = dict(inputs)
        labels_BS = inputs.pop("labels")[:, 1:]
        hidden_BSD = stock.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        keep = labels_BS != IGNORED
        logits = text_logits(stock, hidden_BSD[keep]).float()
        return nn.functional.cross_entropy(logits, labels_BS[keep], reduction="sum") / supervised

    return loss


def _on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    device = measure.device()
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
