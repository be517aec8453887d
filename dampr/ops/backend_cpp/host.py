"""What every launcher uses: addresses, dtype codes, memory."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from dampr.ops.gate_args import Maybe

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_kept = threading.local()


def ptr(t: Maybe) -> int:
    """The address of a tensor, 0 for none; whoever asks holds on to the tensor while the extension works."""
    return 0 if t is None else t.data_ptr()


def contiguous(*tensors: Maybe) -> list[Maybe]:
    """To be held on to while the extension works with their addresses."""
    return [None if t is None else t.contiguous() for t in tensors]


def new(shape: torch.Size, dtype: torch.dtype, passing: bool) -> Tensor:
    """An empty tensor. ``passing``: one that no caller will see, used up before the next such; its memory stays with the thread.

    A large allocation is fresh memory, which is cleared page by page when it is first written: 4 MB take longer than multiplying as much.
    """
    if not passing:
        return torch.empty(shape, dtype=dtype)
    kept: Tensor | None = getattr(_kept, "memory", None)
    size = shape.numel() * dtype.itemsize
    if kept is None or kept.numel() < size:
        kept = _kept.memory = torch.empty(size, dtype=torch.uint8)
    return kept[:size].view(dtype).view(shape)


def product(raw: Tensor, like: Tensor, in_place: bool) -> Tensor:
    """Where ``raw`` times gates goes, in the dtype of ``like``: over ``raw`` where allowed, so that no new memory is touched."""
    return raw if in_place and raw.dtype == like.dtype else torch.empty_like(like)
