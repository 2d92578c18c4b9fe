"""Bytes that an optimizer step takes on a rank, part by part, and the moments at which most of them are there at once.

Measured on a CPU: proofs/real_shape.py (training within 6 %, of one process and of two of FSDP2), and benchmarks/memory.py
(one process, float32, within 4 %). DDP, FSDP2 and ZeRO are read in the sources of torch 2.14, accelerate 1.15 and
DeepSpeed 0.19.8.
"""

import math
from collections.abc import Iterable

from vlm_vqa.estimate.questions import Batch
from vlm_vqa.estimate.shapes import Model, Parameter, elements
from vlm_vqa.launch_file import Strategy
from vlm_vqa.params import Attention, Dtype, Optimizer, TrainParams

BLOCK, LEAST_8BIT, CHUNK = 256, 4096, 1 << 24
"""Elements of a scale, of the least 8-bit state, updated at once: `training.optimizer`'s, which takes seconds to import."""
Parts = dict[str, int]  # bytes, by what takes them
Moments = dict[str, Parts]  # what is there at once, by when that is


def total(parts: Parts) -> int:
    return sum(parts.values())


def copies(count: int, parts: Parts) -> Parts:
    return {what: count * size for what, size in parts.items()}


class Step:
    """An optimizer step under a launch; its methods return bytes of one rank."""

    def __init__(self, model: Model, train: TrainParams, strategy: Strategy, processes: int, gpu: bool):
        """Set bytes of a weight: as the optimizer updates it, as products take it, and as a rank holds it all the time."""
        self.model, self.train, self.strategy, self.gpu = model, train, strategy, gpu
        alone = strategy in (Strategy.SINGLE, Strategy.DDP)
        self.weight = 4 if train.weights_dtype is Dtype.FLOAT32 else 2
        self.compute = 4 if train.compute_dtype is Dtype.FLOAT32 else 2
        # DeepSpeed's masters come beside it.
        self.kept = self.compute if strategy.deepspeed else self.weight
        # Weights of 32 bits stay in the modules and are cast where a product wants 16 bits.
        self.autocast = alone and self.weight > self.compute
        self.seen = self.weight if self.autocast else self.compute
        self.share = 1 if alone else processes

    def updated(self) -> list[Parameter]:
        """Return what the optimizer updates; DeepSpeed joins parameters and gives each rank a flat piece."""
        found = [one for one in self.model.parameters if one.trained]
        if self.strategy.deepspeed:
            return [Parameter("piece", (-(-elements(found) // self.share),), True)]
        return found

    def held(self, parameters: Iterable[Parameter]) -> int:
        """Count the elements that the first rank holds: FSDP2 divides the rows of each parameter."""
        rows = self.share if self.strategy is Strategy.FSDP2 else 1
        return sum(-(-one.shape[0] // rows) * math.prod(one.shape[1:]) for one in parameters)

    def weights(self) -> Parts:
        held = -(-self.held(self.model.parameters) // (self.share if self.strategy is Strategy.ZERO3 else 1))
        return {"weights": held * self.kept, "masters": 4 * self.held(self.updated()) * self.strategy.deepspeed}

    def states(self) -> Parts:
        """The optimizer's, when all have begun (projector_steps); 8 bits but for small parameters and the embedding."""
        parts = self.updated()
        held = wide = self.held(parts)
        if self.train.optimizer is Optimizer.ADAMW_BNB_8BIT:
            wide = self.held(one for one in parts if one.elements < LEAST_8BIT or one.name == "embedding")
        return {"optimizer states": 2 * (4 * wide + (held - wide) + 4 * -(-(held - wide) // BLOCK))}

    def gradients(self) -> Parts:
        """Gradients, and DDP's copy of them; FSDP2 divides them among ranks after every batch."""
        copied = self.model.trained * self.weight * (self.strategy is Strategy.DDP)
        held = self.largest() if self.train.optimizer_in_backward else self.held(self.updated())
        return {"gradients": held * self.kept, "DDP's buckets": copied}

    def largest(self) -> int:
        """Count the elements of the largest parameter that a rank updates."""
        return max(self.held([one]) for one in self.updated())

    def gathered(self) -> Parts:
        """What a rank holds of the others' weights and gradients while it computes."""
        model, found = self.model, {}
        if self.strategy is Strategy.FSDP2:
            # This layer, the next and its way here.
            layers, trained = 3 * elements(model.one_layer), elements(one for one in model.one_layer if one.trained)
            found = {"gathered embedding": model.embedding * self.seen, "gathered layers": layers * self.seen}
            found["a layer's gradients under way"] = trained * self.weight
        elif self.strategy.deepspeed:
            # Its defaults: gradients under way, as computed and as sent in float32; ZeRO-3's weights, at most.
            bucket = 500_000_000 if self.gpu else min(500_000_000, model.trained)
            found["DeepSpeed's bucket"] = bucket * (4 if self.compute == 4 else 6)
            live = min(model.all, 1_000_000_000) * (self.strategy is Strategy.ZERO3)
            found["gathered weights"] = live * self.seen
        return found

    def layer_activations(self, one: Batch, last: bool = False) -> int:
        """Bytes that autograd keeps of a layer; exact for plain weights (tests/estimate/test_memory.py), else a bound.

        Of the last one keys and values are of all tokens, the rest is of supervised ones.
        """
        shape, size, every = self.model.language, self.compute, one.work.tokens
        width, inner, asked = shape.hidden_size, shape.intermediate_size, one.work.supervised if last else every
        queries, keys = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads))
        if self.train.compile and not last:
            # Its input, a scale a token and norm, and what products are of: all else is computed again.
            kept = every * (width * (4 if self.autocast else size) + 16 + size * (4 * width + queries + 3 * inner))
            return kept + (0 if self.train.attention_checkpointing else self.attention_activations(one))
        # Each of 4 norms computes in float32 and keeps its input, its output before the weight, and a scale a token; the
        # last layer's first is of all tokens, too.
        norms = sum(count * (2 * 4 * width + 4) + 4 * width for count in [asked] * 4 + [every] * last)
        # Autocast casts for each of queries, keys, values, gate, up anew.
        linear = asked * size * ((3 if self.autocast else 2) * width + queries + 4 * inner)
        linear += every * size * (2 if self.autocast else last) * width
        # Rotation by float32 angles makes float32 of queries and keys, which stay whole where only some are spread out.
        spread = (4 if self.autocast else size) * (asked * queries + every * keys) + every * size * keys
        scores = 0 if self.train.attention_checkpointing else self.attention_activations(one, last)
        return norms + linear + spread + scores

    def attention_activations(self, one: Batch, last: bool = False) -> int:
        """What of them is grids of queries, keys and values, and their scores."""
        shape, size = self.model.language, self.compute
        queries, keys = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads))
        # In the last layer no prefix attends to itself.
        asking, again = (one.width - one.prefix, 0) if last else (one.width, one.prefix)
        grids = size * one.rows * (asking * queries + 2 * (one.width + again) * keys)
        if self.train.attention is Attention.FLEX:
            return grids
        if self.train.compile and not last:
            # Weights twice, and of 16 bits each row's largest and sum; the mask cast, or the queries' grid.
            rest = one.rows * (one.width - one.prefix)
            own = 2 * (rest * one.width + one.prefix**2) if self.autocast else rest * queries * size
            sums = 8 * one.rows * one.width * shape.num_attention_heads * (size == 2)
            return grids + own + sums + one.pairs * shape.num_attention_heads * 2 * size
        # Of scores: tanh, float32 softmax, and the weights where they are of another type.
        dropped = 0 if self.train.dropout == 0 else (1 if self.gpu else size) + (size if size == 4 else 0)
        pairs = one.rows * asking * one.width if last else one.pairs
        return grids + pairs * shape.num_attention_heads * (8 + dropped)

    def activations(self, one: Batch) -> int:
        """What the forward pass leaves for the backward pass."""
        shape, tokens = self.model.language, one.work.tokens
        size = 4 if self.autocast or self.weight == self.compute == 4 else 2
        # The last norm, and the angles of positions.
        asked = one.work.supervised
        common = asked * 8 * shape.hidden_size + (tokens + asked) * 2 * size * shape.head_dim
        layers = tokens * shape.hidden_size * size * shape.num_hidden_layers
        if not self.train.gradient_checkpointing:
            layers = (shape.num_hidden_layers - 1) * self.layer_activations(one) + self.layer_activations(
                one, last=True
            )
        return layers + common + one.work.image_tokens * self.model.features * 4

    def layer_backward(self, one: Batch) -> int:
        """What the backward pass through a layer adds: its gradients, and activations if they are computed again."""
        shape, size, recomputes = self.model.language, self.compute, self.train.gradient_checkpointing
        again = self.layer_activations(one) if recomputes else 0
        again += self.attention_activations(one) if self.train.attention_checkpointing else 0
        mlp = one.work.tokens * (3 * shape.intermediate_size * size + 6 * 4 * shape.hidden_size)
        attention = one.pairs * shape.num_attention_heads * (8 + 2 * size) * (self.train.attention is Attention.EAGER)
        matrix = shape.hidden_size * shape.intermediate_size * (size + self.weight * (self.autocast or size == 4))
        cast = 2 * elements(self.model.one_layer) * (self.autocast and recomputes)
        return again + max(mlp, attention) + matrix + cast

    def logits(self, one: Batch) -> int:
        """Logits and their loss: product, tanh, float32 copy, log-probabilities; or the last two with gradients."""
        return one.work.supervised * self.model.vocabulary * ((12 if self.compute == 2 else 16) + 4 * self.autocast)

    def update(self) -> int:
        eight, largest = self.train.optimizer is Optimizer.ADAMW_BNB_8BIT, self.largest()
        if self.weight == 2:
            # Weights, gradient, moments, denominator, random bits; a CPU's 8-bit states are unpacked beside them.
            return min(CHUNK, largest) * (20 if self.gpu else 28)
        if self.gpu and not self.strategy.deepspeed:
            # torch updates all parameters in one go, over a list of denominators.
            return 4 * (largest if eight or self.train.optimizer_in_backward else self.held(self.updated()))
        return largest * (20 if eight and not self.strategy.deepspeed else 8)

    def moments(self, sample: Iterable[Batch]) -> Moments:
        """Return what a rank holds, of weights and what training makes of them, at the moments that take most."""
        one = max(sample, key=lambda b: self.activations(b) + max(self.logits(b), self.layer_backward(b)))
        model, done, backward = self.model, self.gradients(), {"a layer's backward pass": self.layer_backward(one)}
        held, saves = self.weights() | self.states(), self.train.gradient_checkpointing
        kept = held | self.gathered() | (done if self.train.gradient_accumulation_steps > 1 else {})
        kept |= {"activations": self.activations(one)}
        # Autocast's copies of weights stay until the forward pass ends or the backward pass has used them.
        head = {"16-bit output head": 2 * model.embedding * self.autocast}
        casts = {"16-bit weights": 2 * model.maps * self.autocast}
        # Gradients of a trained embedding are the head's, and those of its two look-ups, all dense.
        dense = {"embedding's gradients": 0 if model.freeze_embeddings else 3 * model.embedding * self.seen}
        # Blocks under 32 MiB that are freed on a CPU.
        freed = {"freed activations that malloc keeps": self.layer_backward(one) * (not self.gpu)}
        # Of FSDP2's rows pieces are sent, and states are let go before.
        whole = held | {"one whole parameter": 4 * model.embedding} if self.strategy.deepspeed else self.weights()
        return {
            "loss": kept | casts | head | {"logits and loss": self.logits(one)},
            "backward, last layer": kept | ({} if saves else casts) | head | backward,
            "backward, first layer": held | self.gathered() | done | backward | dense,
            "update": held | done | {"update": self.update()} | freed,
            "whole weights": whole,
        }

    def snapshot(self) -> Parts:
        """What one rank's checkpoint copies to the host: what is trained; DeepSpeed writes its own files without."""
        weights = {"weights": self.held(self.updated()) * self.kept}
        held = {} if self.strategy.deepspeed else weights | self.states()
        return {f"checkpoint: {what}": size for what, size in held.items()}

    def whole_weights(self) -> Parts:
        """What process 0's host has at the end: float32, each let go where it was; and again where adapters are merged."""
        targets = self.model.lora.targets if self.model.lora else ()
        adapted = elements(one for one in self.model.parameters if one.name in targets)
        return {"whole weights": 4 * self.model.all, "merged weights": 4 * adapted}
