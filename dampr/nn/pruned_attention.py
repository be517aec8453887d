"""PrunedMultiheadAttention, what is left of a gated one without its closed heads, and how both attend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dampr import _checks

Maybe = Tensor | None


class PrunedMultiheadAttention(nn.Module):
    """An ``nn.MultiheadAttention(embed_dim, num_heads)`` of which only some heads are there:
    what is left of a gated one.

    Args:
        embed_dim ... dtype: those of the whole layer.
        heads: which of its heads are there, increasing, at least one.
        head_dim: how wide a head is; None: embed_dim / num_heads.
            Another where channels of what it reads and writes were cut.

    Called as the whole layer is. A mask for each head has all of the whole layer's heads; attention weights are those
    of the heads that are there, and their mean. Parameters have the names of ``nn.MultiheadAttention``, and the rows
    and columns of these heads alone.

    Raises: ValueError that names the argument.
    """

    _qkv_same_embed_dim = False  # an nn.TransformerEncoderLayer around it asks before it takes its fused path

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
        embed_dim, num_heads = (
            _checks.positive_int("embed_dim", embed_dim),
            _checks.positive_int("num_heads", num_heads),
        )
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
        """What its constructor takes for such a layer, as plain data."""
        return {**attention_arguments(self), "heads": self.heads, "head_dim": self.head_dim}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Maybe = None,
        need_weights: bool = True,
        attn_mask: Maybe = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Maybe]:
        how = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        return sequence_first(self._call, self.batch_first, query, key, value, *how)

    def _call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Maybe,
        need: bool,
        mask: Maybe,
        average: bool,
        causal: bool,
    ) -> Any:
        batched = query.dim() == 3
        if not batched:
            query, key, value, padding = as_batch(query, key, value, padding)
        heads, weights = attend(self, self.heads, query, key, value, padding, need, mask, causal)
        return joined(self.out_proj, heads, weights, average, batched)

    def extra_repr(self) -> str:
        own = "" if self.embed_dim == self.num_heads * self.head_dim else f", head_dim={self.head_dim}"
        return f"{self.embed_dim}, num_heads={self.num_heads}, heads={self.heads}{own}"


def attention_arguments(layer: Any) -> dict[str, Any]:
    """What the constructor of ``layer``, an ``nn.MultiheadAttention`` or what gates made of it,
    was given of what they share.
    """
    names = "embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first"
    given = {name: getattr(layer, name) for name in names}
    return given | {"bias": layer.in_proj_bias is not None, "add_bias_kv": layer.bias_k is not None}


def sequence_first(
    call: Callable[..., Any], batch_first: bool, query: Tensor, key: Tensor, value: Tensor, *how: Any
) -> Any:
    """``call`` on tensors whose first dimension is the sequence; the same tensor three times stays one tensor."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise TypeError(
            "query: got a nested tensor, expected padded ones and a key_padding_mask (gates rule out torch's fused "
            "path)"
        )
    if not batch_first or query.dim() != 3:
        return call(query, key, value, *how)
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    v = k if value is key else value.transpose(0, 1)
    output, weights = call(q, k, v, *how)
    return output.transpose(0, 1), weights


def as_batch(query: Tensor, key: Tensor, value: Tensor, padding: Maybe) -> tuple[Tensor, Tensor, Tensor, Maybe]:
    q = query.unsqueeze(1)
    k = q if key is query else key.unsqueeze(1)
    return q, k, k if value is key else value.unsqueeze(1), None if padding is None else padding.unsqueeze(0)


def attend(
    layer: Any,
    heads: Sequence[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Maybe,
    need_weights: bool,
    attn_mask: Maybe,
    is_causal: bool,
) -> tuple[Tensor, Maybe]:
    """What ``torch.nn.functional.multi_head_attention_forward`` does before the last projection,
    for ``heads`` of ``layer.num_heads``.

    Inputs are (L, N, E), (S, N, kdim) and (S, N, vdim), with the masks of ``nn.MultiheadAttention``. Returns what the
    heads say, (N, heads, L, head_dim), and their attention weights, (N, heads, L, S),
    or None where they are not needed.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "is_causal=True with attn_mask=None: expected the causal mask as well, of which is_causal is only a hint"
        )
    causal = is_causal and key_padding_mask is None and not need_weights
    q, k, v = _project(layer, query, key, value)
    samples, more = query.shape[1], 0
    if layer.bias_k is not None and layer.bias_v is not None:
        k, v, more = (
            torch.cat([k, layer.bias_k.expand(1, samples, -1)]),
            torch.cat([v, layer.bias_v.expand(1, samples, -1)]),
            more + 1,
        )
    if layer.add_zero_attn:
        k, v, more = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1)), more + 1
    sizes = samples, layer.num_heads, query.shape[0], key.shape[0]
    mask = _mask(None if causal else attn_mask, key_padding_mask, heads, sizes, more, q.dtype)
    q, k, v = (t.unflatten(2, (len(heads), layer.head_dim)).permute(1, 2, 0, 3) for t in (q, k, v))
    dropout = layer.dropout if layer.training else 0.0
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
    scores = q * layer.head_dim**-0.5 @ k.transpose(2, 3)
    weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
    return weights @ v, weights


def _project(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of all heads of ``layer``, in as few products as there are different inputs."""
    bias = layer.in_proj_bias
    if layer.in_proj_weight is None:
        weights = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    elif query is key and key is value:
        q, k, v = F.linear(query, layer.in_proj_weight, bias).chunk(3, -1)
        return q, k, v
    else:
        weights = layer.in_proj_weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, weight, b) for x, weight, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _mask(
    attn_mask: Maybe,
    key_padding_mask: Maybe,
    heads: Sequence[int],
    sizes: tuple[int, int, int, int],
    more: int,
    dtype: torch.dtype,
) -> Maybe:
    """Both masks as one that is added to scores, (N or 1, heads or 1, L or 1, S + more); None without any.

    Args: the masks of ``nn.MultiheadAttention``; ``sizes`` = (N, num_heads, L, S); ``more`` keys at the end,
    which no mask hides.
    """
    samples, num_heads, queries, keys = sizes
    found = []
    if attn_mask is not None:
        if attn_mask.shape not in ((queries, keys), (samples * num_heads, queries, keys)):
            expected = f"({queries}, {keys}) or ({samples * num_heads}, {queries}, {keys})"
            raise RuntimeError(f"attn_mask.shape={tuple(attn_mask.shape)}: expected {expected}")
        shaped = attn_mask.view(-1, 1 if attn_mask.dim() == 2 else num_heads, queries, keys)
        found.append(shaped if attn_mask.dim() == 2 or len(heads) == num_heads else shaped[:, list(heads)])
    if key_padding_mask is not None:
        if key_padding_mask.shape != (samples, keys):
            raise RuntimeError(f"key_padding_mask.shape={tuple(key_padding_mask.shape)}: expected ({samples}, {keys})")
        found.append(key_padding_mask.view(samples, 1, 1, keys))
    added = [
        torch.zeros_like(m, dtype=dtype).masked_fill(m, float("-inf")) if m.dtype == torch.bool else m.to(dtype)
        for m in found
    ]
    if not added:
        return None
    mask = added[0] if len(added) == 1 else added[0] + added[1]
    return F.pad(mask, (0, more)) if more else mask


def joined(out_proj: nn.Linear, heads: Tensor, weights: Maybe, average: bool, batched: bool) -> tuple[Tensor, Maybe]:
    """The last projection of (N, heads, L, head_dim), on sequences first,
    and the attention weights as the caller wants them.
    """
    output = F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj.weight, out_proj.bias)
    if weights is not None and average:
        weights = weights.mean(1)
    return (output, weights) if batched else (output.squeeze(1), None if weights is None else weights.squeeze(0))
