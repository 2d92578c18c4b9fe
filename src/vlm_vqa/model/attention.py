"""Gemma 2's attention over packed rows, in plain torch or by flex_attention.

The tokens of all rows stand one after another in a single sequence, without padding, so that the linear layers compute real
tokens only: first the prefixes of all rows, then what follows them, row by row. Under `eager` prefixes, all of one length,
attend to themselves; the rest of each row is laid out in a grid as wide as the longest and attends to its prefix and itself.
`flex_attention` stays packed; a block mask leaves out the blocks in which nobody sees anybody. Both are the same function.
Hugging Face's eager gives the same values; this one saves passes over the scores, the largest tensor, and copies of keys.

Shapes: B rows, S tokens of the longest row, P tokens of a prefix, R = S - P, N packed tokens (those of all rows, no
padding), X = N - B P, H query heads, G query heads a key head, C head width, Q queries, K keys.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_vqa.model.layout import PREFIX_SEGMENT, additive_mask, visible
from vlm_vqa.params import Attention

ROW_ATTENTION = "vlm_vqa_rows"  # name under which transformers knows `row_attention`
RECOMPUTES = "recomputes_scores"
"""Attribute of an attention module that keeps no scores for the backward pass; see `train.attention_checkpointing`."""
IMPLEMENTATION = {Attention.EAGER: ROW_ATTENTION, Attention.FLEX: "flex_attention"}


@dataclass(frozen=True)
class PackedRows:
    """Where packed tokens stand in their rows, and who sees whom there. Masks hold 0 or the type's lowest value."""

    prefix: int  # P: the first B x P packed tokens are prefixes that see nothing beyond themselves; 0 where they do
    prefix_mask_11PP: Tensor
    rest_places_X: Tensor  # int64, place b * R + r of each token after the prefixes; every real place once
    rest_mask_B1RS: Tensor
    asked_M: Tensor | None = None
    """int64, which of the X tokens the queries are of; None: they are of all N packed ones."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Return [1, N, H, C] for packed queries [1, H, N, C] and keys and values [1, H / G, N, C]; or M for N queries."""
        places, whole, start = self.rest_places_X, self.asked_M is None, len(self.rest_mask_B1RS) * self.prefix
        query_places = places if self.asked_M is None else places[self.asked_M]
        rest_query = self._spread(query[:, :, start if whole else 0 :], query_places)
        rest_key, rest_value = (self._spread(states[:, :, start:], places) for states in (key, value))
        prefix_key, prefix_value = (self._prefixes(states) for states in (key, value))
        keys, values = torch.cat([prefix_key, rest_key], dim=2), torch.cat([prefix_value, rest_value], dim=2)
        rest_BRHC = _attend(rest_query, keys, values, self.rest_mask_B1RS, **options)
        rest_XHC = rest_BRHC.flatten(0, 1).index_select(0, query_places)
        if not (self.prefix and whole):
            return rest_XHC[None]
        prefix_BPHC = _attend(self._prefixes(query), prefix_key, prefix_value, self.prefix_mask_11PP, **options)
        return torch.cat([prefix_BPHC.flatten(0, 1), rest_XHC])[None]

    def _prefixes(self, packed_1HNC: Tensor) -> Tensor:
        """Return [B, H, P, C]."""
        rows = len(self.rest_mask_B1RS)
        return packed_1HNC[0, :, : rows * self.prefix].unflatten(1, (rows, self.prefix)).transpose(0, 1)

    def _spread(self, packed_1HXC: Tensor, places_X: Tensor) -> Tensor:
        """Return [B, H, R, C], zero where no token stands."""
        rows, _, width, _ = self.rest_mask_B1RS.shape
        rest_XHC = packed_1HXC[0].transpose(0, 1)
        grid = rest_XHC.new_zeros(rows * width, *rest_XHC.shape[1:]).index_copy(0, places_X, rest_XHC)
        return grid.unflatten(0, (rows, width)).transpose(1, 2)


def packed_mask(
    attention: str,
    prefix_places: Tensor,
    rest_places: Tensor,
    segment_ids: Tensor,
    position_ids: Tensor,
    bidirectional: Tensor,
    asked: Tensor,
    closed_prefix: bool,
    dtype: torch.dtype,
) -> tuple["PackedRows | BlockMask", "PackedRows | BlockMask"]:
    """Return what every layer is given as its attention mask, and the same for the queries of `asked` tokens alone.

    Args:
        attention: the model's attention implementation, one of `IMPLEMENTATION`'s values.
        prefix_places: int64 [B, P]; rest_places: int64 [X]; segment_ids, position_ids: int64 [B, S]; bidirectional: bool
            [B, S]; as `TokenLayout.collate` gives them.
        asked: int64 [M], places of packed tokens, none of a closed prefix.
        closed_prefix: nothing in a prefix sees what follows it.
        dtype: of the scores.
    """
    places_N = torch.cat([prefix_places.flatten(), rest_places])
    if attention == IMPLEMENTATION[Attention.FLEX]:
        every, grids = torch.arange(len(places_N), device=places_N.device), (segment_ids, position_ids, bidirectional)
        return _block_mask(places_N, every, *grids), _block_mask(places_N, asked, *grids)
    assert attention == ROW_ATTENTION, f"attention {attention!r} cannot read packed rows"
    mask = additive_mask(visible(segment_ids, position_ids, bidirectional), dtype)
    width = segment_ids.shape[1]
    prefix = prefix_places.shape[1] if closed_prefix else 0
    rest = rest_places if closed_prefix else places_N
    row = rest // width
    # Prefixes differ in no way that a mask could see.
    rows = PackedRows(
        prefix=prefix,
        prefix_mask_11PP=mask[:1, :, :prefix, :prefix],
        rest_places_X=row * (width - prefix) + (rest - row * width - prefix),
        rest_mask_B1RS=mask[:, :, prefix:],
    )
    return rows, replace(rows, asked_M=asked - len(mask) * prefix)


def _block_mask(places_N: Tensor, queries: Tensor, *grids: Tensor) -> BlockMask:
    row = places_N // grids[0].shape[1]
    segment, position, block = (grid.flatten()[places_N] for grid in grids)

    def sees(_batch: Tensor, _head: Tensor, number: Tensor, key: Tensor) -> Tensor:
        """`layout.visible`, token by token; packed rows hold no padding."""
        query = queries[number]
        same_row = (row[query] == row[key]) & ((segment[key] == PREFIX_SEGMENT) | (segment[key] == segment[query]))
        return same_row & ((position[key] <= position[query]) | (block[query] & block[key]))

    return create_block_mask(sees, B=None, H=None, Q_LEN=len(queries), KV_LEN=len(places_N), device=places_N.device)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedRows | Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    rows: PackedRows | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as Gemma 2 does; transformers calls this for every layer. Return [1, N, H, C] or [B, Q, H, C], and no weights.

    Args:
        query: [1, H, N, C]; key, value: [1, H / G, N, C], packed, with `PackedRows`; or padded, [B, H, Q, C] and
            [B, H / G, K, C], with an additive mask [B, 1, Q, K].
        rows: the packed rows, where the model takes no mask of that kind (a Gemma 1).
    """
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "dropout": dropout if module.training else 0.0}
    mask = attention_mask if rows is None else rows
    assert mask is not None, "transformers has lost the mask"
    if not isinstance(mask, PackedRows):
        return _attend(query, key, value, mask, **options), None
    if getattr(module, RECOMPUTES, False):
        return checkpoint(mask.attend, query, key, value, use_reentrant=False, **options), None
    return mask.attend(query, key, value, **options), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask_B1QK: Tensor, scaling: float, softcap: float | None, dropout: float
) -> Tensor:
    """Return [B, Q, H, C]; few passes go over the scores, some of them in place."""
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    # The query heads of one key head are more queries of it: no copy of keys and values for each.
    folded = (batch, key_heads, heads // key_heads * queries)
    scores = (query * (scaling / (softcap or 1.0))).reshape(*folded, width) @ key.transpose(-1, -2)
    if softcap is not None:
        scores.tanh_()
    scores = scores.view(batch, key_heads, heads // key_heads, queries, keys)
    scores = torch.add(mask_B1QK[:, :, None].to(scores.dtype), scores, alpha=softcap or 1.0)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout)
    attended = weights.view(*folded, keys) @ value
    return attended.view(batch, heads, queries, width).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(ROW_ATTENTION, row_attention)
