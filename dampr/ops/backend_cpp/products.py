"""The matrix products of linear layers: torch's own, or oneDNN's where torch asks MKL and that is the slower of the two.

On processors of AMD with AVX-512, float32 products take MKL longer than oneDNN, which torch brings along for its convolutions ("dampr,
torch's products" in docs/performance.md). Evaluation stays on torch's path, so that a fresh layer equals the dense one to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.gate_args import Maybe

from .axis import transpose

# With fewer multiply-adds, or fewer rows of x for each weight, what oneDNN does before it multiplies takes longer than it saves.
WORK, ROWS = 2**24, 32
FASTER = (
    _C.vendor() == "amd"
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and torch.backends.mkl.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def by_onednn(M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether the products of x (M, K) and a weight (N, K) are oneDNN's; none is under ``torch.backends.mkldnn.flags(enabled=False)``."""
    large = M >= ROWS and M * N * K >= WORK
    return FASTER and large and dtype == torch.float32 and torch._C._get_mkldnn_enabled()  # type: ignore[attr-defined]


def described(M: int, N: int, K: int, dtype: torch.dtype, drawn: bool) -> str:
    """Whose products a layer takes, for :func:`dampr.explain`."""
    if not by_onednn(M, N, K, dtype):
        return "torch's products"
    return "oneDNN's products, faster here than MKL's" if drawn else "torch's product, oneDNN's in the backward"


def linear(x: Tensor, weight: Tensor, bias: Maybe, drawn: bool) -> Tensor:
    """x W^T + b; x: (..., K), weight: (N, K). ``drawn``: whether gates are, which they are in training alone."""
    n, k = weight.shape
    if drawn and by_onednn(x.numel() // max(1, k), n, k, x.dtype):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def to_inputs(dy: Tensor, weight: Tensor) -> Tensor:
    """dy W, the gradient of x; dy: (M, N), weight: (N, K)."""
    n, k = weight.shape
    if by_onednn(dy.shape[0], n, k, dy.dtype):
        return _onednn(dy, weight.t(), None)
    return dy @ weight


def to_weight(dy: Tensor, x: Tensor, passing: bool) -> Tensor:
    """dy^T x, the gradient of the weight; dy: (M, N), x: (M, K). ``passing``: nobody needs what is in the memory of :func:`.host.new`.

    oneDNN wants what it multiplies from the left to lie in rows.
    """
    m, n = dy.shape
    if not by_onednn(m, n, x.shape[1], dy.dtype):
        return dy.t() @ x
    return _onednn(transpose(dy, passing and m <= 2 * x.shape[1]), x.t(), None)  # memory that stays is about as large as the weight


def _onednn(x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # it is read as if it were
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
