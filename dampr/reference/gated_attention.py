"""Attention whose heads have gates, sample by sample, head by head and query by query.

Vaswani et al. 2017, section 3.2.2, with a gate z_h on what head h contributes::

    y = sum over h of z_h softmax(q_h k_h^T / sqrt(d) + mask) v_h W_o,h^T + b_o
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with gated heads, differentiable in every argument.

    Args:
        q, k, v: after their projections, (N, L, H d), (N, S, H d) and (N, S, H d).
        z: gates, (H,), or (N, H) for gates of each sample.
        out_weight, out_bias: the output projection, (E, H d) and (E,).
        mask: added to the scores, broadcasts to (N, H, L, S).

    Returns: y (N, L, E) and the attention weights (N, H, L, S), without gates.
    """
    samples, queries = q.shape[:2]
    heads = z.shape[-1]
    width = q.shape[2] // heads
    outputs, found = [], []
    for n in range(samples):
        rows = torch.zeros(queries, out_weight.shape[0], dtype=q.dtype, device=q.device)
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            steps = []
            for i in range(queries):
                scores = k[n, :, own] @ q[n, i, own] * width**-0.5
                if mask is not None:
                    scores = scores + mask.expand(samples, heads, queries, k.shape[1])[n, h, i]
                steps.append(torch.softmax(scores, dim=0))
            weights = torch.stack(steps)
            gate = z[h] if z.dim() == 1 else z[n, h]
            rows = rows + gate * (weights @ v[n, :, own]) @ out_weight[:, own].t()
            found.append(weights)
        outputs.append(rows if out_bias is None else rows + out_bias)
    return torch.stack(outputs), torch.stack(found).view(samples, heads, queries, k.shape[1])
