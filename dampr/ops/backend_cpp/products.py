"""The matrix products of linear layers: by torch, or by oneDNN where torch would call MKL and MKL is slower.

On AMD processors with AVX-512, MKL takes longer for float32 products than oneDNN, which torch ships for its
convolutions ("dampr, torch's products" in docs/performance.md). In evaluation, torch's products are always used, so
that a fresh layer equals the dense one to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops._torch import is_onednn_enabled, onednn_linear

from .axis import transpose

# With fewer multiply-adds, or fewer rows of x, oneDNN takes longer to prepare a product than it saves.
WORK, ROWS = 2**24, 32
_onednn: Any = onednn_linear
FASTER = (
    _C.vendor() == "amd"
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and torch.backends.mkl.is_available()
    and _onednn is not None
)


def by_onednn(M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes the products of x (M, K) and a weight (N, K).

    It does not under ``torch.backends.mkldnn.flags(enabled=False)``.
    """
    large = M >= ROWS and M * N * K >= WORK
    return FASTER and large and dtype == torch.float32 and is_onednn_enabled()


def described(M: int, N: int, K: int, dtype: torch.dtype, drawn: bool) -> str:
    """Which library computes the products of a layer, in words for :func:`dampr.explain`."""
    if not by_onednn(M, N, K, dtype):
        return "torch's products"
    return "oneDNN's products, faster here than MKL's" if drawn else "torch's product, oneDNN's in the backward"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """x W^T + b, by oneDNN or by torch; x: (..., K), weight: (N, K)."""
    if onednn:
        return _onednn(
            x, weight, None if bias is None else bias.contiguous()
        )  # oneDNN reads it as if it were contiguous
    return F.linear(x, weight, bias)


def to_inputs(dy: Tensor, weight: Tensor, onednn: bool) -> Tensor:
    """dy W, the gradient of x; dy: (M, N), weight: (N, K)."""
    return _onednn(dy, weight.t(), None) if onednn else dy @ weight


def to_weight(dy: Tensor, x: Tensor, onednn: bool, in_scratch: bool) -> Tensor:
    """dy^T x, (N, K), the gradient of the weight; dy: (M, N), x: (M, K).

    in_scratch: whether the copy of dy^T may be in :data:`.host.scratch`. oneDNN needs such a copy, because its left
    operand must have contiguous rows.
    """
    if not onednn:
        return dy.t() @ x
    in_scratch = in_scratch and dy.shape[0] <= 2 * x.shape[1]  # memory that stays is about as large as the weight
    return _onednn(transpose(dy, in_scratch), x.t(), None)
