"""What every launcher uses: addresses, dtype codes, memory."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from dampr.ops.gate_args import Maybe

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
MOST_VIEWS = 64
_kept = threading.local()  # memory, and the tensors made of it


def ptr(t: Maybe) -> int:
    """The address of a tensor, 0 for none; whoever asks holds on to the tensor while the extension works."""
    return 0 if t is None else t.data_ptr()


def new(shape: torch.Size, dtype: torch.dtype, passing: bool, stride: tuple[int, ...] | None = None) -> Tensor:
    """An empty tensor. ``passing``: one that no caller will see, used up before the next such; its memory stays with the thread. Such a one
    may have a ``stride`` of its own, as long as it is dense.

    A large allocation is fresh memory, which is cleared page by page when it is first written: 4 MB take longer than multiplying as much.
    The tensors of that memory stay too: making one takes four operators, 50 us beside a cold cache.
    """
    if not passing:
        return torch.empty(shape, dtype=dtype)
    views: dict[Any, Tensor] | None = getattr(_kept, "views", None)
    if views is None:
        views = _kept.views = {}
    view = views.get((shape, stride, dtype))
    return _passing(views, shape, dtype, stride) if view is None else view


def _passing(views: dict[Any, Tensor], shape: torch.Size, dtype: torch.dtype, stride: tuple[int, ...] | None) -> Tensor:
    size = shape.numel() * dtype.itemsize
    kept: Tensor | None = getattr(_kept, "memory", None)
    if kept is None or kept.numel() < size or len(views) >= MOST_VIEWS:
        views.clear()
    with torch.inference_mode(False):
        if kept is None or kept.numel() < size:
            kept = _kept.memory = torch.empty(size, dtype=torch.uint8)
        view = kept[:size].view(dtype).view(shape)
        views[shape, stride, dtype] = view = view if stride is None else view.as_strided(shape, stride)
    return view


def product(raw: Tensor, like: Tensor, in_place: bool) -> Tensor:
    """Where ``raw`` times gates goes, in the dtype of ``like``: over ``raw`` where allowed, so that no new memory is touched."""
    return raw if in_place and raw.dtype == like.dtype else torch.empty_like(like)
