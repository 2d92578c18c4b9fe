"""Bytes that an optimizer step takes on a rank, part by part, and the moments at which most of them are there at once.

What is measured: one process on a CPU (benchmarks/real_shape.py within 7 %; benchmarks/memory.py, float32, within 4 %).
DDP, FSDP2 and ZeRO, and what a GPU takes beside tensors, are read in the sources of torch 2.14, accelerate 1.15 and
DeepSpeed 0.19.8 or assumed, and say so.

Shapes: N tokens of a pass, B rows, P prefix, S widest row, M supervised, D hidden, I intermediate, A query heads x head
width, K key heads x head width, H query heads, L layers, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vlm_vqa.estimate.batches import Pass
from vlm_vqa.estimate.shapes import Model, Parameter
from vlm_vqa.params import Attention, Dtype, Optimizer, TrainParams
from vlm_vqa.training.launch_file import Strategy
from vlm_vqa.training.optimizer import BLOCK, CHUNK, HISTORY, LEAST_8BIT

MIB, GIB = 2**20, 2**30
HOST_BASE = round(1.1 * GIB)
"""Resident in a training process without any weights: Python, libraries and scratch; measured (torch 2.14.1, a CPU)."""
GPU_BASE, NCCL_BASE = GIB // 2, GIB // 2
"""CUDA's context and cuBLAS's workspaces; NCCL's buffers. Assumed: there was no GPU to measure."""
FRAGMENTATION = 0.05
"""Of what is allocated, lost between blocks of torch's allocator. Assumed."""
ZERO_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients under way, its default."""
ZERO_LIVE = 1_000_000_000
"""Elements of weights that ZeRO-3 keeps gathered at most, its default."""


class Item(NamedTuple):
    """One part of the memory or of the disk."""

    what: str
    bytes: int
    formula: str

    def on(self, count: int, processes: str = "processes") -> "Item":
        """Return what so many processes take."""
        if count == 1:
            return self
        return self._replace(bytes=count * self.bytes, formula=f"{count} {processes} x ({self.formula})")


class Moment(NamedTuple):
    """What is there at once."""

    name: str
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def moment(name: str, *items: Item | Iterable[Item]) -> Moment:
    """Return a moment of all items that take anything."""
    flat = [one for item in items for one in ([item] if isinstance(item, Item) else item)]
    return Moment(name, tuple(one for one in flat if one.bytes))


def times(what: str, *factors: tuple[int, str], note: str = "") -> Item:
    """Return an item that is a product, with its formula: `times("weights", (10, "elements"), (4, "bytes"))`."""
    product = 1
    for number, _ in factors:
        product *= number
    return Item(what, product, " x ".join(f"{number:,} {name}" for number, name in factors) + (note and f"; {note}"))


@dataclass(frozen=True)
class Step:
    """An optimizer step under a launch."""

    model: Model
    train: TrainParams
    strategy: Strategy
    processes: int
    gpu: bool

    @property
    def weight_bytes(self) -> int:
        """Of a weight that the optimizer updates."""
        return 4 if self.train.weights_dtype is Dtype.FLOAT32 else 2

    @property
    def compute_bytes(self) -> int:
        return 4 if self.train.compute_dtype is Dtype.FLOAT32 else 2

    @property
    def autocast(self) -> bool:
        """Weights of 32 bits stay in the modules and are cast where a product wants 16 bits."""
        mixed = self.weight_bytes == 4 and self.compute_bytes == 2
        return mixed and not (self.strategy is Strategy.FSDP2 or self.strategy.deepspeed)

    @property
    def model_bytes(self) -> int:
        """Of a weight as the modules see it, whole."""
        return self.weight_bytes if self.autocast else self.compute_bytes

    @property
    def share(self) -> int:
        """Processes that divide what the strategy divides."""
        return 1 if self.strategy in (Strategy.SINGLE, Strategy.DDP) else self.processes

    # --- what is there all the time ----------------------------------------------------------------------------------

    def weights(self) -> Iterator[Item]:
        model = self.model
        if self.strategy is Strategy.FSDP2:
            held = sum(one.held(self.processes) for one in model.parameters)
            yield times("weights", (held, f"of {model.all:,} elements"), (self.weight_bytes, "bytes"))
        elif self.strategy.deepspeed:
            held = -(-model.all // self.share) if self.strategy is Strategy.ZERO3 else model.all
            yield times("weights", (held, f"of {model.all:,} elements"), (self.compute_bytes, "bytes"))
            yield times("masters", (-(-model.trained // self.share), "trained elements"), (4, "bytes"))
        else:
            yield times("weights", (model.all, "elements"), (self.weight_bytes, "bytes"))

    def states(self) -> Item:
        """The optimizer's, as they are after the first step."""
        if self.strategy.deepspeed:
            # DeepSpeed joins parameters into flat pieces.
            pieces = [Parameter("piece", (-(-self.model.trained // self.share),), True, False)]
            return Item("optimizer states", *self._states(pieces, 1))
        return Item("optimizer states", *self._states([p for p in self.model.parameters if p.trained], self.share))

    def _states(self, parameters: list[Parameter], share: int) -> tuple[int, str]:
        def held(one: Parameter) -> int:
            return one.held(share) if share > 1 else one.elements

        elements = sum(map(held, parameters))
        if self.train.optimizer is Optimizer.ADAMW_TORCH:
            return 8 * elements + 4 * len(parameters), f"{elements:,} elements x 2 x 4 bytes"
        small = [one for one in parameters if one.elements < LEAST_8BIT or one.name == "embedding"]
        large = [one for one in parameters if one not in small]
        wide, narrow = sum(map(held, small)), sum(map(held, large))
        scales = sum(2 * 4 * -(-held(one) // BLOCK) for one in large)
        norms = 4 * HISTORY * len(parameters) * (self.train.percentile_clipping not in (0, 100))
        formula = f"{narrow:,} elements x 2 x 1 byte + {scales:,} of scales + {wide:,} elements x 2 x 4 bytes"
        # Two tables of 256 values serve all parameters.
        tables = 2 * 256 * 4 * bool(large)
        return 2 * narrow + scales + 8 * wide + norms + tables, formula

    def gradients(self) -> Iterator[Item]:
        """Gradients, and what DDP and DeepSpeed keep beside them; FSDP2 divides them among ranks after every pass."""
        model, size = self.model, self.weight_bytes
        if self.strategy is Strategy.FSDP2:
            held = sum(one.held(self.processes) for one in model.parameters if one.trained)
            yield times("gradients", (held, f"of {model.trained:,} elements"), (size, "bytes"))
        elif self.strategy.deepspeed:
            part = (-(-model.trained // self.share), f"of {model.trained:,} elements")
            yield times("gradients", part, (self.compute_bytes, "bytes"))
            bucket = ZERO_BUCKET if self.gpu else min(ZERO_BUCKET, model.trained)
            sent = self.compute_bytes + (4 if self.compute_bytes == 2 else 0)
            yield times("DeepSpeed's bucket", (bucket, "elements"), (sent, "bytes"), note="as computed and as sent")
        else:
            yield times("gradients", (model.trained, "elements"), (size, "bytes"))
            if self.strategy is Strategy.DDP:
                yield times("DDP's buckets", (model.trained, "elements"), (size, "bytes"))

    def gathered(self) -> Iterator[Item]:
        """What a rank holds of the others' weights while it computes."""
        model, size = self.model, self.model_bytes
        if self.strategy is Strategy.FSDP2:
            yield times("gathered embedding", (model.embedding, "elements"), (size, "bytes"))
            yield times(
                "gathered layers",
                (3, "this one, the next and its way here"),
                (model.layer, "elements"),
                (size, "bytes"),
            )
            trained = sum(one.elements for one in model._layer if one.trained)
            yield times("a layer's gradients under way", (trained, "elements"), (self.weight_bytes, "bytes"))
        if self.strategy is Strategy.ZERO3:
            yield times("gathered weights", (min(model.all, ZERO_LIVE), "elements"), (size, "bytes"), note="at most")

    # --- what a pass adds --------------------------------------------------------------------------------------------

    def casts(self) -> Item:
        """Weights in 16 bits, which autocast keeps until the forward pass ends or the backward pass has used them."""
        note = "autocast's copies"
        return times("16-bit weights", (self.model.maps if self.autocast else 0, "elements"), (2, "bytes"), note=note)

    def head_cast(self) -> Item:
        return times("16-bit output head", (self.model.embedding if self.autocast else 0, "elements"), (2, "bytes"))

    def layer_activations(self, one: Pass) -> int:
        """Bytes that autograd keeps of a layer; exact for plain weights (`tests/test_preflight.py`), else a bound."""
        shape, tokens, size = self.model.language, one.work.tokens, self.compute_bytes
        width, inner = shape.hidden_size, shape.intermediate_size
        queries, keys = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads))
        # Each of 4 norms computes in float32 and keeps its input, its output before the weight, and a scale a token.
        norms = 4 * (tokens * (2 * 4 * width + 4) + 4 * width)
        # Autocast casts for each of queries, keys, values, gate, up anew.
        linear = tokens * size * ((5 if self.autocast else 2) * width + queries + 4 * inner)
        # Rotation by float32 angles makes float32 of queries and keys. Only those behind prefixes are spread out, but they
        # are parts of tensors that stay whole.
        rotated = 4 if self.autocast else size
        spread = tokens * (rotated * (queries + keys) + size * keys)
        padded = one.rows * (one.prefix + (one.width - one.prefix)) * queries
        grids = size * (padded + 2 * one.rows * (one.width + one.prefix) * keys)
        return norms + linear + spread + grids + self.scores(one)

    def scores(self, one: Pass) -> int:
        """Bytes kept of attention scores: tanh, float32 softmax, and the weights where they are of another type."""
        if self.train.attention is Attention.FLEX:
            return 0
        size = self.compute_bytes
        dropped = 0 if self.train.dropout == 0 else (1 if self.gpu else size) + (size if size == 4 else 0)
        return one.pairs * self.model.language.num_attention_heads * (8 + dropped)

    def activations(self, one: Pass) -> Item:
        """What the forward pass leaves for the backward pass."""
        layers, tokens, width = self.model.language.num_hidden_layers, one.work.tokens, self.model.language.hidden_size
        head_dim = self.model.language.head_dim
        residual = 4 if self.weight_bytes == 4 and self.compute_bytes == 4 or self.autocast else 2
        common = (
            tokens * (2 * 4 * width + 2 * residual * head_dim) + one.work.image_tokens * self.model.feature_width * 4
        )
        if self.train.gradient_checkpointing:
            kept = layers * tokens * width * residual
            formula = f"{layers} layers x {tokens:,} tokens x {width:,} x {residual} bytes + {common:,}"
        else:
            each = self.layer_activations(one)
            kept = layers * each
            formula = f"{layers} layers x {each:,} for {tokens:,} tokens + {common:,}"
        return Item("activations", kept + common, formula)

    def one_layer(self, one: Pass) -> Item:
        """What the backward pass through a layer adds: its gradients, and activations if they are computed again."""
        shape, size = self.model.language, self.compute_bytes
        again = self.layer_activations(one) if self.train.gradient_checkpointing else 0
        mlp = one.work.tokens * (3 * shape.intermediate_size * size + 6 * 4 * shape.hidden_size)
        attention = one.pairs * shape.num_attention_heads * (8 + 2 * size) * (self.train.attention is Attention.EAGER)
        matrix = shape.hidden_size * shape.intermediate_size * (size + self.weight_bytes * (self.autocast or size == 4))
        cast = 2 * self.model.layer * (self.autocast and self.train.gradient_checkpointing)
        formula = (
            f"{again:,} recomputed + {max(mlp, attention):,} + {matrix:,} of a matrix + {cast:,} of 16-bit weights"
        )
        return Item("a layer's backward pass", again + max(mlp, attention) + matrix + cast, formula)

    def logits(self, one: Pass) -> Item:
        """Logits and their loss: product, tanh, float32 copy, log-probabilities; or the last two with gradients."""
        kept = 12 if self.compute_bytes == 2 else 16
        kept += 4 * self.autocast
        supervised = (one.work.supervised, "supervised tokens")
        return times("logits and loss", supervised, (self.model.vocabulary, "tokens"), (kept, "bytes"))

    def dense_embedding(self) -> Item:
        """Gradients of the trained embedding under way: the head's, and those of its two look-ups, all dense."""
        trained = self.model.embedding if self.model.parameters[0].trained else 0
        return times("embedding's gradients", (3, "uses"), (trained, "elements"), (self.model_bytes, "bytes"))

    # --- what an update adds -----------------------------------------------------------------------------------------

    def update(self) -> Item:
        """Temporary copies of the optimizer."""
        held = [
            one.held(self.share) if self.share > 1 else one.elements for one in self.model.parameters if one.trained
        ]
        if self.strategy.deepspeed:
            part = (-(-self.model.trained // self.share), "elements")
            return times("float32 gradients and their update", part, (8, "bytes"))
        largest = (max(held), "of the largest parameter")
        if self.weight_bytes == 2:
            # Weights, gradient, moments, denominator, random bits; a CPU's 8-bit states are unpacked beside them.
            return times("update", (min(CHUNK, max(held)), "elements at once"), (28 if not self.gpu else 20, "bytes"))
        if self.train.optimizer is Optimizer.ADAMW_BNB_8BIT:
            return times("update", largest, (4 if self.gpu else 20, "bytes"))
        if self.gpu:
            # torch updates all parameters in one go, over a list of denominators.
            return times("update", (sum(held), "elements"), (4, "bytes"))
        return times("update", largest, (8, "bytes"))

    def kept_by_malloc(self, one: Pass) -> Item:
        """Freed activations that stay with the process on a CPU: glibc keeps blocks under 32 MiB."""
        size = 0 if self.gpu else self.one_layer(one).bytes
        return Item("freed activations that malloc keeps", size, "as in a layer's backward pass")

    # --- beside the step ---------------------------------------------------------------------------------------------

    def snapshot(self) -> Iterator[Item]:
        """What one rank's checkpoint copies to the host; DeepSpeed writes its own files without."""
        if not self.strategy.deepspeed:
            (weights,) = self.weights()
            yield weights._replace(what="checkpoint: weights")
            yield self.states()._replace(what="checkpoint: optimizer states")

    def whole_weights(self) -> Iterator[Item]:
        """What process 0 copies to its host at the end: float32, and again where adapters are merged."""
        moved = self.gpu or self.weight_bytes != 4 or self.share > 1
        yield times("whole weights", (self.model.all if moved else 0, "elements"), (4, "bytes"))
        if self.model.lora is not None:
            adapted = sum(one.elements for one in self.model.parameters if one.name in self.model.lora.targets)
            yield times("merged weights", (adapted, "adapted elements"), (4, "bytes"))

    def gathered_parameter(self) -> Item:
        """The largest parameter, whole, on every rank."""
        size = self.model.embedding if self.share > 1 else 0
        return times(
            "one whole parameter", (size, "elements"), (4 if self.strategy.deepspeed else self.weight_bytes, "bytes")
        )


def rank_moments(step: Step, passes: Iterable[Pass]) -> list[Moment]:
    """Return what a rank holds, of weights and what training makes of them, at the moments of a step that take most."""

    def of_pass(one: Pass) -> int:
        return step.activations(one).bytes + max(step.logits(one).bytes, step.one_layer(one).bytes)

    one = max(passes, key=of_pass)
    several = step.train.gradient_accumulation_steps > 1
    always = [*step.weights(), step.states(), *step.gathered()]
    before = list(step.gradients()) if several else []
    done = list(step.gradients())
    held = [] if step.train.gradient_checkpointing else [step.casts()]
    return [
        moment("loss", always, before, step.activations(one), step.casts(), step.head_cast(), step.logits(one)),
        moment(
            "backward, last layer", always, before, step.activations(one), held, step.head_cast(), step.one_layer(one)
        ),
        moment("backward, first layer", always, done, step.one_layer(one), step.dense_embedding()),
        moment(
            "update",
            step.weights(),
            step.states(),
            step.gradients(),
            step.update(),
            step.kept_by_malloc(one),
        ),
    ]
