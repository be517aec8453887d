"""Gather entries of one dimension, scatter them among zeros, list the open gates, and transpose matrices: calls of
``axis.h`` in csrc.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.gate_args import GateArgs

from .host import CODES, scratch


def open_gates(gate: GateArgs, multiple: int, share: float) -> Tensor | None:
    """The indices of the open gates, int32, increasing; None if their number exceeds ``share`` times that of all gates.

    Closed gates fill the list up to a ``multiple`` of that many entries, because vendors' kernels work in blocks.
    """
    log_alpha = gate.log_alpha.contiguous()
    seed = 0 if gate.seed is None else gate.seed.data_ptr()
    n, args = log_alpha.numel(), (gate.spec, CODES[log_alpha.dtype], log_alpha.data_ptr(), seed)
    length = min(n, -(max(1, _C.open_gates(*args, n)) // -multiple) * multiple)
    if length > share * n:
        return None
    places = torch.empty(length, dtype=torch.int32)
    _C.open_gates(*args, n, places.data_ptr(), length)
    return places


def gather(x: Tensor, places: Tensor, dim: int, channels_last: bool = False) -> Tensor:
    """``x`` with only the entries ``places`` of dimension ``dim``, contiguous; or in channels last, for images and
    weights.
    """
    return _move(_C.pick, x, x.shape[dim], places, places.numel(), dim, channels_last)


def scatter(x: Tensor, places: Tensor, size: int, dim: int, channels_last: bool = False) -> Tensor:
    """The inverse of :func:`gather`: ``size`` entries in dimension ``dim``, those of ``x`` at ``places`` and zeros
    elsewhere.
    """
    return _move(_C.place, x, size, places, size, dim, channels_last)


def transpose(x: Tensor, in_scratch: bool = False) -> Tensor:
    """x (rows, n) as a contiguous (n, rows), several times as fast as torch's copy.

    ``in_scratch``: the result is in :data:`.host.scratch`.
    """
    x = x.contiguous()
    rows, n = x.shape
    shape = torch.Size((n, rows))
    out = scratch.views[shape, None, x.dtype] if in_scratch else torch.empty(shape, dtype=x.dtype)
    _C.transpose(CODES[x.dtype], x.data_ptr(), rows, n, out.data_ptr(), torch.get_num_threads())
    return out


def _move(how: object, x: Tensor, size: int, places: Tensor, left: int, dim: int, channels_last: bool) -> Tensor:
    """Call ``how``, the gather or scatter of C++, on x (outer, ?, inner); returns (outer, left, inner).

    ``size``: the number of entries of the dimension that ``places`` index.
    """
    if channels_last:
        x, dim = x.permute(0, 2, 3, 1), {0: 0, 1: 3}[dim]
    x = x.contiguous()
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    out = x.new_empty((*before, left, *after))
    args = (
        CODES[x.dtype],
        x.data_ptr(),
        before.numel(),
        size,
        after.numel(),
        places.data_ptr(),
        places.numel(),
        out.data_ptr(),
    )
    how(*args, torch.get_num_threads())  # type: ignore[operator]
    return out.permute(0, 3, 1, 2) if channels_last else out
