"""Multi-head attention in parts that plain and gated layers share: masks, scores and the last projection.

It works for any choice of the heads, so an attention that has lost heads runs on the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sequence_first(
    call: Callable[..., Any], batch_first: bool, query: Tensor, key: Tensor, value: Tensor, *how: Any
) -> Any:
    """Call ``call`` on tensors of shape (sequence, batch, features), and transpose its output back if ``batch_first``.

    If query, key and value are one object, they stay one, because attention then projects them in one product.

    Raises: TypeError for nested tensors; ValueError unless all three have two dimensions, or all three.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        raise TypeError(
            "query: got a nested tensor, expected padded ones and a key_padding_mask (gates rule out torch's fused "
            "path)"
        )
    dims = query.dim(), key.dim(), value.dim()
    if dims not in ((2, 2, 2), (3, 3, 3)):
        raise ValueError(f"{_shapes(query, key, value)}: expected two dimensions of each, or three")
    if not batch_first or query.dim() != 3:
        return call(query, key, value, *how)
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    v = k if value is key else value.transpose(0, 1)
    output, weights = call(q, k, v, *how)
    return output.transpose(0, 1), weights


def _shapes(*tensors: Tensor) -> str:
    """The shapes of query, key and value, for a message."""
    return f"query, key and value have the shapes {', '.join(str(tuple(t.shape)) for t in tensors)}"


def as_batch(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value and padding mask of one sample as a batch of one: (L, E) becomes (L, 1, E)."""
    q = query.unsqueeze(1)
    k = q if key is query else key.unsqueeze(1)
    return q, k, k if value is key else value.unsqueeze(1), None if padding is None else padding.unsqueeze(0)


def attend(
    layer: Any,
    heads: Sequence[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """The part of ``torch.nn.functional.multi_head_attention_forward`` in front of the last projection, for some heads.

    Args:
        layer: an attention with the attributes of ``nn.MultiheadAttention``; its projections have the rows of ``heads``
            alone.
        heads: the indices of these heads among ``layer.num_heads``.
        query, key, value: (L, N, E), (S, N, kdim) and (S, N, vdim).
        key_padding_mask, need_weights, attn_mask, is_causal: as in ``nn.MultiheadAttention``; masks for each head have
            all ``layer.num_heads``.

    Returns: (outputs of the heads (N, heads, L, head_dim), their attention weights (N, heads, L, S) or None if these
    are not needed).

    Raises: RuntimeError and ValueError for masks and shapes that do not fit.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "is_causal=True with attn_mask=None: expected the causal mask as well, of which is_causal is only a hint"
        )
    if key.shape[:2] != value.shape[:2] or key.shape[1] != query.shape[1]:
        raise ValueError(f"{_shapes(query, key, value)}: expected (L, N, E), (S, N, kdim), (S, N, vdim)")
    causal = is_causal and key_padding_mask is None and not need_weights
    q, k, v = _project(layer, query, key, value)
    samples, more = query.shape[1], 0
    if layer.bias_k is not None and layer.bias_v is not None:
        k = torch.cat([k, layer.bias_k.expand(1, samples, -1)])
        v = torch.cat([v, layer.bias_v.expand(1, samples, -1)])
        more = more + 1
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
    """q, k and v of all heads of ``layer``, in one product if the three inputs are one tensor."""
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
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    heads: Sequence[int],
    sizes: tuple[int, int, int, int],
    more: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one tensor to add to scores, (N or 1, heads or 1, L or 1, S + more); None if there is none.

    Args:
        attn_mask, key_padding_mask: as in ``nn.MultiheadAttention``.
        heads: the indices of the heads.
        sizes: (N, num_heads, L, S).
        more: how many keys were appended that no mask hides.
        dtype: the dtype of the scores.
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


def joined(
    out_proj: nn.Linear, heads: Tensor, weights: Tensor | None, average: bool, batched: bool
) -> tuple[Tensor, Tensor | None]:
    """The last projection of the heads' outputs (N, heads, L, head_dim), and the attention weights.

    Args:
        out_proj: the last projection.
        heads: the outputs of the heads.
        weights: the attention weights of all heads, or None.
        average: whether to average them over heads.
        batched: whether the caller gave a batch; else the batch dimension is removed.

    Returns: (output (L, N, E), weights (N, L, S) or (N, heads, L, S)).
    """
    output = F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj.weight, out_proj.bias)
    if weights is not None and average:
        weights = weights.mean(1)
    return (output, weights) if batched else (output.squeeze(1), None if weights is None else weights.squeeze(0))
