"""The language model's last layer at the supervised positions alone: nobody reads what it would make of the others.

Its keys and values are of all positions; its queries, output projection and MLP are of the supervised ones. Loss and
gradients are those of the whole layer. Who hands no `Asked` on gets that: generation, for instance.

Shapes: N packed tokens, M asked ones, D hidden width, H heads, C head width.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma2.modeling_gemma2 import rotate_half

from vlm_vqa.model.attention import PackedRows

Rotations = tuple[Tensor, Tensor]  # cosines and sines [1, N, C] of positions


@dataclass(frozen=True)
class Asked:
    places: Tensor  # int64 [M], places of packed tokens
    mask: PackedRows | BlockMask  # which of all tokens these see


class _Layer(nn.Module):
    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Rotations, asked: Asked | None = None, **options: Any
    ) -> Tensor:
        """Return [1, M, D] of [1, N, D]."""
        if asked is None:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **options)
        # A Gemma's mask comes as `rows`.
        options |= {"attention_mask": asked.mask, "rows": None}
        options["keys"] = self.input_layernorm(hidden_states), position_embeddings
        cosines, sines = (one.index_select(1, asked.places) for one in position_embeddings)
        hidden_1MD = hidden_states.index_select(1, asked.places)
        return super().forward(hidden_1MD, position_embeddings=(cosines, sines), **options)


class _Attention(nn.Module):
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Rotations,
        attention_mask: Any,
        keys: tuple[Tensor, Rotations] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return [1, M, D] for queries of [1, M, D], on keys and values of `keys`: states [1, N, D] and their rotations."""
        if keys is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **options)
        states, rotations = keys
        query = _rotated(self._heads(self.q_proj(hidden_states)), position_embeddings)
        key, value = _rotated(self._heads(self.k_proj(states)), rotations), self._heads(self.v_proj(states))
        attended, _ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            softcap=getattr(self, "attn_logit_softcapping", None),
            # Under 128 queries flex attention takes its kernel for decoding, of which some sizes do not compile.
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        )
        return self.o_proj(attended.flatten(2)), None

    def _heads(self: Any, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _rotated(states_1HNC: Tensor, rotations: Rotations) -> Tensor:
    cosines, sines = (one.unsqueeze(1) for one in rotations)
    return states_1HNC * cosines + rotate_half(states_1HNC) * sines


_STOCK: dict[type, type] = {
    modeling_gemma2.Gemma2DecoderLayer: _Layer,
    modeling_gemma.GemmaDecoderLayer: _Layer,
    modeling_gemma2.Gemma2Attention: _Attention,
    modeling_gemma.GemmaAttention: _Attention,
}
NARROW: dict[type, Any] = {
    stock: type(stock.__name__, (part, stock), {"__module__": __name__}) for stock, part in _STOCK.items()
}
# Where pickle looks for them: process 0 sends the others the model's shape.
globals().update({one.__name__: one for one in NARROW.values()})


def narrow(layer: nn.Module) -> None:
    """Let a decoder layer of Gemma 2, or of a Gemma, take `asked`; the names of its class and of its weights stay."""
    for module in (layer, layer.self_attn):
        module.__class__ = NARROW[type(module)]
