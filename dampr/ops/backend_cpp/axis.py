"""Entries of one dimension, picked out or put back among zeros, which gates are open, and matrices transposed:
``axis.h`` of csrc.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.gate_args import GateArgs

from .host import CODES, scratch


def open_gates(gate: GateArgs, multiple: int, share: float) -> Tensor | None:
    """The numbers of the open gates in order, int32, filled up with closed ones to a ``multiple``;
    None if more than ``share`` of all.
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
    """x with the entries ``places`` of ``dim`` only, contiguous or, of images and their weights, ``channels_last``."""
    return _move(_C.pick, x, x.shape[dim], places, places.numel(), dim, channels_last)


def scatter(x: Tensor, places: Tensor, size: int, dim: int, channels_last: bool = False) -> Tensor:
    """What :func:`gather` takes out of: ``size`` entries, zeros where ``places`` says nothing."""
    return _move(_C.place, x, size, places, size, dim, channels_last)


def transpose(x: Tensor, in_scratch: bool = False) -> Tensor:
    """x (rows, n) as a contiguous (n, rows), many times as fast as torch's own copy.

    ``in_scratch``: it is one of :data:`.host.scratch`.
    """
    x = x.contiguous()
    rows, n = x.shape
    shape = torch.Size((n, rows))
    out = scratch.views[shape, None, x.dtype] if in_scratch else torch.empty(shape, dtype=x.dtype)
    _C.transpose(CODES[x.dtype], x.data_ptr(), rows, n, out.data_ptr(), torch.get_num_threads())
    return out


def _move(how: object, x: Tensor, size: int, places: Tensor, left: int, dim: int, channels_last: bool) -> Tensor:
    """x (outer, ?, inner) -> (outer, left, inner),
    as ``how`` moves them between that and an axis of ``size`` entries.
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
