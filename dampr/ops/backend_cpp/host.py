"""Helpers of all calls of the C++ extension: addresses, dtype codes, and memory for temporary tensors."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# dtype of a tensor -> dtype in which gates beside it are computed
WIDE = dict.fromkeys(CODES, torch.float32) | {torch.float64: torch.float64}
MOST_VIEWS = 64


def ptr(t: Tensor | None) -> int:
    """The address of a tensor; 0 for None. The caller has to keep the tensor alive while C++ uses the address."""
    return 0 if t is None else t.data_ptr()


class _Views(dict[tuple[torch.Size, tuple[int, ...] | None, torch.dtype], Tensor]):
    """Temporary tensors by (shape, stride, dtype), all of them views of one block of memory; stride None means
    contiguous.

    A missing one is made. A large new allocation is slow, because the system clears its pages when they are first
    written: 4 MB take longer than multiplying as much. The views are kept too: making one takes four operators, 50 us
    if the caches are cold.
    """

    memory: Tensor | None = None

    def __missing__(self, key: tuple[torch.Size, tuple[int, ...] | None, torch.dtype]) -> Tensor:
        """Make and keep the view of the memory for ``key``, (shape, stride or None, dtype). Memory that is too small is
        replaced, and with it all views.
        """
        shape, stride, dtype = key
        size = shape.numel() * dtype.itemsize
        if self.memory is None or self.memory.numel() < size or len(self) >= MOST_VIEWS:
            self.clear()
        with torch.inference_mode(False):
            if self.memory is None or self.memory.numel() < size:
                self.memory = torch.empty(size, dtype=torch.uint8)
            view = self.memory[:size].view(dtype).view(shape)
            self[key] = view = view if stride is None else view.as_strided(shape, stride)
        return view


class _Scratch(threading.local):
    """Temporary memory of one thread.

    ``scratch.views[shape, stride, dtype]`` is an uninitialised tensor. It is valid until this thread asks for the next
    one.
    """

    def __init__(self) -> None:
        self.views = _Views()


scratch = _Scratch()


def new(shape: torch.Size, dtype: torch.dtype, in_scratch: bool) -> Tensor:
    """An uninitialised tensor; ``in_scratch``: from :data:`scratch`."""
    return scratch.views[shape, None, dtype] if in_scratch else torch.empty(shape, dtype=dtype)
