"""What a case is made of: tensors of every layout, dtype and content, and values that no argument expects."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Draw(random.Random):
    """All that is random in a case follows from its seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def chance(self, share: float) -> bool:
        return self.random() < share

    def size(self, least: int = 0) -> int:
        """Small, with 0, 1 and primes among them, and a few beyond a vector register or a tile."""
        return max(least, self.choice((0, 1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33)))

    def dtype(self) -> torch.dtype:
        return self.choice((torch.float32, *FLOATS))

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, hostile: float = 0.1) -> Tensor:
        """Normal numbers in some memory layout; with the chance ``hostile``, NaN,
        infinities and very large numbers among them.
        """
        t = torch.randn(shape, generator=self.torch).to(dtype)
        if t.numel() and self.chance(hostile):
            flat = t.reshape(-1)
            for _ in range(self.randint(1, 3)):
                flat[self.randrange(t.numel())] = self.choice(
                    (math.nan, math.inf, -math.inf, torch.finfo(dtype).max, torch.finfo(dtype).tiny)
                )
        return self.laid_out(t)

    def laid_out(self, t: Tensor) -> Tensor:
        how = self.choice(("plain", "plain", "transposed", "sliced", "offset", "strided", "expanded"))
        if how == "transposed" and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if how == "sliced" and t.dim():
            return torch.cat((t, torch.full_like(t, math.nan)), -1)[..., : t.shape[-1]]
        if how == "offset":
            return torch.cat((t.new_full((1,), math.nan), t.reshape(-1)))[1:].view(t.shape)
        if how == "strided" and t.dim():
            return torch.stack((t, torch.full_like(t, math.nan)), -1)[..., 0]
        if how == "expanded" and t.dim() and t.shape[0] > 1:
            return t[:1].expand(t.shape)
        return t


class Anything:
    def __repr__(self) -> str:
        return "Anything()"


def nonsense(draw: Draw) -> Any:
    """A value that hardly any argument expects."""
    plain = (
        None,
        -1,
        0,
        2**45,
        2**63,
        2**70,
        -(2**70),
        math.nan,
        math.inf,
        1.5,
        True,
        False,
        "",
        "nonsense",
        b"x",
        [],
        (),
        {},
        {1: 2},
    )
    plain += (
        [1, 2, 3],
        (1, -1),
        ("a", "b"),
        (0, 0),
        (2**62, 2**62),
        1j,
        torch.float32,
        torch.device("meta"),
        Anything(),
        Anything,
        print,
    )
    made = (
        lambda: torch.randn(3),
        lambda: torch.randn(2, 3),
        lambda: torch.empty(0),
        lambda: torch.tensor(2.0),
        lambda: torch.tensor(3),
        lambda: torch.tensor([1, 2]),
        lambda: torch.tensor([True]),
        lambda: torch.randn(2, dtype=torch.complex64),
        lambda: torch.full((4,), math.nan),
        lambda: torch.empty(3, 3, device="meta"),
        lambda: torch.randn(2, 2).to_sparse(),
        lambda: torch.nn.Linear(2, 2),
        lambda: torch.nn.Sequential(),
        lambda: torch.randn(1, 1, 1, 1, 1, 1),
        lambda: torch.tensor([-1]),
        lambda: torch.randn(3).half(),
        lambda: torch.tensor([2**40]),
    )
    return draw.choice(plain) if draw.chance(0.55) else draw.choice(made)()
