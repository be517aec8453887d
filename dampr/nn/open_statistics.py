"""OpenStatistics: hooks that make any norm over channels count only the elements whose gates are open."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dampr import reference
from dampr.gates import Gate
from dampr.nn.called import first_argument, with_first

from .base import KeepsIndex

CHILD = "open_statistics"  # the name under which a norm has it


class OpenStatistics(KeepsIndex, nn.Module):
    """Hooks around a norm that leave elements with closed gates out of its statistics.

    ``dampr.convert(residual=True)`` puts them on a norm over a width whose units have gates in the parameters that read
    it (:class:`dampr.nn.GatedParameter`). For open elements the norm then computes what a norm of these alone would
    compute, so the closed ones can be cut. Its output for closed elements is read by weights that are 0 there.

    Args:
        gate: the gates, shared with the parameters that read the output of the norm.
        index: int64, the gate of each normalised element, or -1 for an element without one.
        dim: the dimension of the input that is normalised.
        centred: whether the norm subtracts the mean, as LayerNorm does and RMSNorm does not.
        whole: whether its statistics are taken over all dimensions but the first, as in GroupNorm with one group.

    An element counts if its gate is not exactly 0. This is a step function, so gates get no gradient here. While all
    are open, the result equals that of the bare norm to the bit.
    """

    index: Tensor

    def __init__(self, gate: Gate, index: Tensor, dim: int = -1, *, centred: bool, whole: bool = False) -> None:
        super().__init__()
        self.gate = gate
        self.dim, self.centred, self.whole = dim, centred, whole
        self.register_buffer("index", index, persistent=False)
        self._factor: Tensor | None = None  # set by ``before`` and used up by ``after`` of the same call

    def before(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> tuple[Any, ...]:
        """Forward pre-hook: replace the first argument of the norm by what :func:`of_open` makes of it.

        Returns: (args, kwargs), or args alone for a hook that gets no keywords, as in files of earlier versions.
        """
        x = first_argument(args, kwargs or {})
        z = self.gate().detach()
        opened = reference.along(torch.cat([z, z.new_ones(1)])[self.index] != 0, x, self.dim)
        dims = tuple(range(1, x.dim())) if self.whole else (self.dim,)
        spread, self._factor = of_open(x, opened, dims, centred=self.centred)
        return (spread, *args[1:]) if kwargs is None else with_first(args, kwargs, spread)

    def after(self, norm: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """Forward hook: divide the output by the factor of :func:`of_open`, except for the bias, which the factor did
        not multiply.
        """
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
    """(a tensor to normalise in the place of x so that only open elements count, the factor by which the result is too
    large).

    Args:
        x: the input of the norm.
        is_open: bool; broadcasts to ``x`` and varies only along dimensions in ``dims``.
        dims: the normalised dimensions.
        centred: whether the norm subtracts the mean.

    With k of D elements open, closed elements are replaced by 0, or by the mean of the open ones if the norm subtracts
    the mean. The mean of squares over all D is then k / D times that of the open ones. Multiplying x by sqrt(D / k)
    corrects this, so eps has the same weight as in a norm of k elements; afterwards the gain is divided by the factor.
    If all are open, the result is x to the bit, and 1.
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
    """Make ``norm`` count only open elements."""
    norm.add_module(CHILD, statistics.train(norm.training))
    norm.register_forward_pre_hook(statistics.before, with_kwargs=True)
    norm.register_forward_hook(statistics.after)


def take_off(norm: nn.Module) -> None:
    """Remove the hooks that :func:`put_on` registered."""
    statistics = norm._modules.pop(CHILD)
    for hooks in (norm._forward_pre_hooks, norm._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is statistics]:
            del hooks[key]


def norms_with_open_statistics(model: nn.Module) -> Iterator[tuple[str, nn.Module, OpenStatistics]]:
    """(name, norm, statistics) for every norm in ``model`` with such hooks."""
    for name, norm in list(model.named_modules()):
        statistics = norm._modules.get(CHILD)
        if isinstance(statistics, OpenStatistics):
            yield name, norm, statistics
