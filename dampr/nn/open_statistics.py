"""OpenStatistics: a norm, of whatever type, that counts only the elements whose gates are open."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dampr import reference
from dampr.gates import Gate

from .base import KeepsIndex

CHILD = "open_statistics"  # the name under which a norm has it


class OpenStatistics(KeepsIndex, nn.Module):
    """Hooks around a norm that keep elements with closed gates out of its statistics.

    ``dampr.convert(residual=True)`` puts it on norms over widths whose units have gates where they are read
    (:class:`dampr.nn.GatedParameter`). The norm then computes for the open elements what a norm of these alone
    computes, so that the closed ones can be cut. What it gives for closed elements is read by nothing.

    Args:
        gate: shared with the parameters that read what the norm gives.
        index: int64, the gate of each element that is normalised, or -1 for one that has none.
        dim: the dimension of the input that is normalised.
        centred: whether the norm subtracts the mean, as LayerNorm does and RMSNorm does not.
        whole: whether its statistics are of all dimensions but the first, as those of GroupNorm with one group.

    Elements count while their gate is not exactly 0. That is a step, so gates get no gradient here.
    Equal to the bare norm, to the bit, while all are open.
    """

    index: Tensor

    def __init__(self, gate: Gate, index: Tensor, dim: int = -1, *, centred: bool, whole: bool = False) -> None:
        super().__init__()
        self.gate = gate
        self.dim, self.centred, self.whole = dim, centred, whole
        self.register_buffer("index", index, persistent=False)
        self._factor: Tensor | None = None  # of the call that is running

    def before(self, norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook: what to normalise in the place of the first argument."""
        z = self.gate().detach()
        opened = reference.along(torch.cat([z, z.new_ones(1)])[self.index] != 0, args[0], self.dim)
        dims = tuple(range(1, args[0].dim())) if self.whole else (self.dim,)
        spread, self._factor = of_open(args[0], opened, dims, centred=self.centred)
        return (spread, *args[1:])

    def after(self, norm: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """A forward hook: the result without the factor of :func:`of_open`, which a bias has not."""
        assert self._factor is not None
        factor, self._factor = self._factor.to(y.dtype), None
        bias = getattr(norm, "bias", None)
        if not isinstance(bias, Tensor):
            return y / factor
        return y / factor + reference.along(bias * (1 - 1 / factor), y, self.dim).to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, centred={self.centred}, whole={self.whole}, gated={int((self.index >= 0).sum())} of "
            f"{len(self.index)}"
        )


def of_open(x: Tensor, is_open: Tensor, dims: tuple[int, ...], *, centred: bool = True) -> tuple[Tensor, Tensor]:
    """What to normalise in the place of x, so that its open elements alone count, and the factor by which the result is
    too large.

    Args:
        is_open: bool; broadcasts to ``x``, and varies along dimensions among ``dims`` alone.
        dims: the normalised dimensions.
        centred: whether the norm subtracts the mean.

    With k of D open, closed elements are 0, or hold the mean of the others where a mean is subtracted: they make the
    mean of squares k / D of theirs. The factor sqrt(D / k) makes it theirs, so that eps counts as in a norm of k; a
    gain
    divided by it undoes it. Where all are open this is x, to the bit, and 1.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    opened, k = is_open.to(x.dtype), is_open.sum().clamp(min=1).to(wide)
    factor = (is_open.numel() / k).sqrt().to(x.dtype)
    spread = x * (opened * factor)
    if not centred:
        return spread, factor
    count = k * (math.prod([x.shape[d] for d in dims]) // is_open.numel())
    mean = (spread.sum(dims, keepdim=True, dtype=wide) / count).to(x.dtype)
    return torch.addcmul(spread, mean, 1 - opened), factor  # torch.where would be slower on a CPU


def put_on(norm: nn.Module, statistics: OpenStatistics) -> None:
    """Have a norm count open elements only."""
    norm.add_module(CHILD, statistics.train(norm.training))
    norm.register_forward_pre_hook(statistics.before)
    norm.register_forward_hook(statistics.after)


def take_off(norm: nn.Module) -> None:
    """The bare norm again."""
    statistics = norm._modules.pop(CHILD)
    for hooks in (norm._forward_pre_hooks, norm._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is statistics]:
            del hooks[key]


def norms_with_open_statistics(model: nn.Module) -> Iterator[tuple[str, nn.Module, OpenStatistics]]:
    """(name, norm, statistics) of every norm that has such hooks."""
    for name, norm in list(model.named_modules()):
        statistics = norm._modules.get(CHILD)
        if isinstance(statistics, OpenStatistics):
            yield name, norm, statistics
