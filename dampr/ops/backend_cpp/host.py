"""What every launcher uses: addresses, dtype codes, memory."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
WIDE = dict.fromkeys(CODES, torch.float32) | {torch.float64: torch.float64}  # what gates beside each are computed in
MOST_VIEWS = 64


def ptr(t: Tensor | None) -> int:
    """The address of a tensor, 0 for none; whoever asks holds on to the tensor while the extension works."""
    return 0 if t is None else t.data_ptr()


class _Views(dict[tuple[torch.Size, tuple[int, ...] | None, torch.dtype], Tensor]):
    """Tensors by shape, stride (of a dense one; None: contiguous) and dtype, all on one piece of memory.

    One that is missing is made. A large allocation is fresh memory, which is cleared page by page when it is first
    written: 4 MB take longer than multiplying as much. The tensors of that memory stay too: making one takes four
    operators, 50 us beside a cold cache.
    """

    memory: Tensor | None = None

    def __missing__(self, key: tuple[torch.Size, tuple[int, ...] | None, torch.dtype]) -> Tensor:
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
    """``scratch.views[shape, stride, dtype]``: an empty tensor, valid until this thread asks for another one."""

    def __init__(self) -> None:
        self.views = _Views()


scratch = _Scratch()


def new(shape: torch.Size, dtype: torch.dtype, in_scratch: bool) -> Tensor:
    """An empty tensor. ``in_scratch``: one of :data:`scratch`."""
    return scratch.views[shape, None, dtype] if in_scratch else torch.empty(shape, dtype=dtype)
