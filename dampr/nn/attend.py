"""How plain and gated multi-head attention attend: masks, scores and the last projection, for any choice of heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sequence_first(
    call: Callable[..., Any], batch_first: bool, query: Tensor, key: Tensor, value: Tensor, *how: Any
) -> Any:
    """``call`` on tensors whose first dimension is the sequence; the same tensor three times stays one tensor."""
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
    return f"query, key and value have the shapes {', '.join(str(tuple(t.shape)) for t in tensors)}"


def as_batch(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs of one sample as a batch of one."""
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
    """What ``torch.nn.functional.multi_head_attention_forward`` does before the last projection, for ``heads`` of
    ``layer.num_heads``.

    Inputs are (L, N, E), (S, N, kdim) and (S, N, vdim), with the masks of ``nn.MultiheadAttention``. Returns what the
    heads say, (N, heads, L, head_dim), and their attention weights, (N, heads, L, S), or None where they are not
    needed.
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
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    heads: Sequence[int],
    sizes: tuple[int, int, int, int],
    more: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one that is added to scores, (N or 1, heads or 1, L or 1, S + more); None without any.

    Args: the masks of ``nn.MultiheadAttention``; ``sizes`` = (N, num_heads, L, S); ``more`` keys at the end, which no
    mask hides.
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
    """The last projection of (N, heads, L, head_dim), on sequences first,
    and the attention weights as the caller wants them.
    """
    output = F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj.weight, out_proj.bias)
    if weights is not None and average:
        weights = weights.mean(1)
    return (output, weights) if batched else (output.squeeze(1), None if weights is None else weights.squeeze(0))
