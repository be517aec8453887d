"""PrunedMultiheadAttention: the plain layer that compaction makes of an attention with closed heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks

from ..attend import as_batch, attend, joined, sequence_first


class PrunedMultiheadAttention(nn.Module):
    """An ``nn.MultiheadAttention(embed_dim, num_heads)`` that has only some of its heads.

    Args:
        embed_dim ... dtype: those of the attention with all heads.
        heads: the indices of the heads that it has, increasing, at least one.
        head_dim: the width of a head; None: embed_dim / num_heads. It differs if channels of the input and output were
            cut too.

    It is called like the attention with all heads. A mask for each head has entries for all ``num_heads``; attention
    weights are those of the heads that are left, and their mean. Parameters have the names of
    ``nn.MultiheadAttention``, with the rows and columns of these heads alone.

    Raises: ValueError that names the argument.
    """

    _qkv_same_embed_dim = False  # keeps an nn.TransformerEncoderLayer around it from its fused path

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        heads: Sequence[int],
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.heads = tuple(_checks.positive_int("heads", head, least=0) for head in _checks.items("heads", heads))
        embed_dim = _checks.positive_int("embed_dim", embed_dim)
        num_heads = _checks.positive_int("num_heads", num_heads)
        if (
            not self.heads
            or list(self.heads) != sorted(set(self.heads))
            or not 0 <= self.heads[0] <= self.heads[-1] < num_heads
        ):
            raise ValueError(f"heads={heads!r:.80}: expected increasing integers in [0, {num_heads}), at least one")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: expected a divisor of embed_dim={embed_dim}, or a head_dim")
        head_dim = None if head_dim is None else _checks.positive_int("head_dim", head_dim)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim or embed_dim // num_heads
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        width = len(self.heads) * self.head_dim
        packed = self.kdim == self.vdim == embed_dim

        def parameter(there: bool, *shape: int) -> nn.Parameter | None:
            """An uninitialised parameter; None unless it is ``there``."""
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if there else None

        self.in_proj_weight = parameter(packed, 3 * width, embed_dim)
        self.q_proj_weight = parameter(not packed, width, embed_dim)
        self.k_proj_weight = parameter(not packed, width, self.kdim)
        self.v_proj_weight = parameter(not packed, width, self.vdim)
        self.in_proj_bias = parameter(bias, 3 * width)
        self.bias_k = parameter(add_bias_kv, 1, 1, width)
        self.bias_v = parameter(add_bias_kv, 1, 1, width)
        self.out_proj = nn.Linear(width, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in ``nn.MultiheadAttention``, for the sizes that are left."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for row in (self.bias_k, self.bias_v):
            if row is not None:
                nn.init.xavier_normal_(row)

    @property
    def bias(self) -> bool:
        """Whether the projections have biases."""
        return self.in_proj_bias is not None

    @property
    def add_bias_kv(self) -> bool:
        """Whether keys and values are extended by a learned one."""
        return self.bias_k is not None

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor for a layer like this one, as plain data."""
        return {**attention_arguments(self), "heads": self.heads, "head_dim": self.head_dim}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        how = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        return sequence_first(self._call, self.batch_first, query, key, value, *how)

    def _call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        need: bool,
        mask: Tensor | None,
        average: bool,
        causal: bool,
    ) -> Any:
        """The forward on (sequence, batch, features)."""
        batched = query.dim() == 3
        if not batched:
            query, key, value, padding = as_batch(query, key, value, padding)
        heads, weights = attend(self, self.heads, query, key, value, padding, need, mask, causal)
        return joined(self.out_proj, heads, weights, average, batched)

    def extra_repr(self) -> str:
        own = "" if self.embed_dim == self.num_heads * self.head_dim else f", head_dim={self.head_dim}"
        return f"{self.embed_dim}, num_heads={self.num_heads}, heads={self.heads}{own}"


def attention_arguments(layer: Any) -> dict[str, Any]:
    """The constructor's arguments that ``nn.MultiheadAttention`` and the layers made of it share, read off
    ``layer``.
    """
    names = "embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first"
    given = {name: getattr(layer, name) for name in names}
    return given | {"bias": layer.in_proj_bias is not None, "add_bias_kv": layer.bias_k is not None}
