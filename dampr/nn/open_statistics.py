"""Hooks that make norms count only the elements whose gates are open: of activations (:class:`OpenStatistics`), and of
the weights of a layer that standardises them (:class:`OpenWeight`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dampr import reference
from dampr.gates import Gate
from dampr.nn.called import first_argument, with_first

from . import parameter
from .base import KeepsIndex
from .parameter import OPEN_STATISTICS as CHILD  # the name under which a norm has it


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
        correction: as in ``torch.var``: 1 if the norm divides by the unbiased standard deviation, else 0; None if it
            divides by nothing that counts elements.
        offset: the name of the parameter that the norm adds at the end.

    An element counts if its gate is not exactly 0. This is a step function, so gates get no gradient here. While all
    are open, the result equals that of the bare norm to the bit.
    """

    index: Tensor
    correction: int | None = 0  # files of earlier versions have neither
    offset = "bias"
    owned = ""  # the name of the weight that it counts the columns of; empty for a norm of activations

    def __init__(
        self,
        gate: Gate,
        index: Tensor,
        dim: int = -1,
        *,
        centred: bool,
        whole: bool = False,
        correction: int | None = 0,
        offset: str = "bias",
    ) -> None:
        super().__init__()
        self.gate = gate
        self.dim, self.centred, self.whole, self.correction, self.offset = dim, centred, whole, correction, offset
        self.register_buffer("index", index, persistent=False)
        self._factor: Tensor | None = None  # set by ``before`` and used up by ``after`` of the same call

    def before(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> tuple[Any, ...]:
        """Forward pre-hook: replace the first argument of the norm by what :func:`of_open` makes of it.

        Returns: (args, kwargs), or args alone for a hook that gets no keywords, as in files of earlier versions.
        """
        x = first_argument(args, kwargs or {})
        spread, self._factor = self._of_open(x, self.dims(x.dim()))
        return (spread, *args[1:]) if kwargs is None else with_first(args, kwargs, spread)

    def _of_open(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """:func:`of_open` with the gates of this module."""
        z = self.gate().detach()
        opened = reference.along(torch.cat([z, z.new_ones(1)])[self.index] != 0, x, self.dim)
        return of_open(x, opened, dims, centred=self.centred, correction=self.correction)

    def dims(self, rank: int) -> tuple[int, ...]:
        """The dimensions that the statistics of a tensor of this rank run over."""
        return tuple(range(1, rank)) if self.whole else (self.dim % rank,)

    def as_read(self, name: str, value: Tensor) -> Tensor:
        """What the forward of the norm reads for its parameter ``name``: ``value`` itself."""
        return value

    def after(self, norm: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """Forward hook: divide the output by the factor of :func:`of_open`, except for the bias, which the factor did
        not multiply.
        """
        assert self._factor is not None
        factor, self._factor = self._factor.to(y.dtype), None
        bias = getattr(norm, self.offset, None)
        if not isinstance(bias, Tensor):
            return y / factor
        return y / factor + reference.along(bias * (1 - 1 / factor), y, self._channels()).to(y.dtype)

    def _channels(self) -> int:
        """The dimension of the output along which the bias changes."""
        return self.dim

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, centred={self.centred}, whole={self.whole}, gated={int((self.index >= 0).sum())} of "
            f"{len(self.index)}"
        )


class OpenWeight(OpenStatistics):
    """Hooks around a layer that standardises its weight (Qiao et al. 2019), which leave columns with closed gates out
    of the statistics.

    While the forward of the layer runs, it reads a weight of which closed columns have the mean of the open ones, so
    that they are 0 when standardised. For open columns the layer then computes what a layer with these alone would.

    Args:
        gate: the gates, shared with the parameters that read the units.
        index: int64, the gate of each index of dimension ``dim``, or -1 for none.
        dim: the dimension of the weight with its columns.
        over: the dimensions of the weight that the statistics run over.
        owned: the name of the weight.
        channels: the dimension of the output with what the layer writes.
        centred, correction, offset: as in :class:`OpenStatistics`.
    """

    def __init__(
        self,
        gate: Gate,
        index: Tensor,
        dim: int,
        *,
        over: tuple[int, ...],
        owned: str,
        channels: int,
        centred: bool,
        correction: int | None = 0,
        offset: str = "bias",
    ) -> None:
        super().__init__(gate, index, dim, centred=centred, correction=correction, offset=offset)
        self.over, self.owned, self.channels = over, owned, channels
        self._runs = False

    def before(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> tuple[Any, ...]:
        """Forward pre-hook: from now on, reading the weight gives what :func:`of_open` makes of it."""
        self._runs, self._factor = True, None
        return args if kwargs is None else (args, kwargs)

    def as_read(self, name: str, value: Tensor) -> Tensor:
        """What the forward of the layer reads for its parameter ``name``, which is ``value``."""
        if name != self.owned or not self._runs:
            return value
        spread, self._factor = self._of_open(value, self.dims(value.dim()))
        return spread

    def after(self, norm: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """Forward hook: divide the output by the factor of :func:`of_open`, except for the bias.

        It is called after a forward that raised too, without an output.
        """
        self._runs = False
        return super().after(norm, args, y) if self._factor is not None and isinstance(y, Tensor) else y

    def dims(self, rank: int) -> tuple[int, ...]:
        return self.over

    def _channels(self) -> int:
        return self.channels


def of_open(
    x: Tensor, is_open: Tensor, dims: tuple[int, ...], *, centred: bool = True, correction: int | None = 0
) -> tuple[Tensor, Tensor]:
    """(a tensor to normalise in place of x so that only open elements count, the factor by which the result is too
    large).

    Args:
        x: the input of the norm.
        is_open: bool; broadcasts to ``x`` and varies only along dimensions in ``dims``.
        dims: the normalised dimensions.
        centred: whether the norm subtracts the mean.
        correction: as in :class:`OpenStatistics`.

    With k of D elements open, closed elements are replaced by 0, or by the mean of the open ones if the norm subtracts
    the mean. The mean of squares over all D is then k / D times that of the open ones. Multiplying x by sqrt(D / k)
    corrects this, so eps has the same weight as in a norm of k elements; afterwards the gain is divided by the factor.
    If all are open, the result is x to the bit, and 1.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    opened, k = is_open.to(x.dtype), is_open.sum().clamp(min=1).to(wide)
    each = math.prod([x.shape[d] for d in dims]) // is_open.numel()  # elements that one gate opens
    if correction:
        left = (k * each - correction).clamp(min=1)  # one element alone has no unbiased deviation
        factor = ((is_open.numel() * each - correction) / left).sqrt().to(x.dtype)
    else:
        factor = (is_open.numel() / k).sqrt().to(x.dtype) if correction == 0 else x.new_ones(())
    spread = x * (opened * factor)
    if not centred:
        return spread, factor
    count = k * each
    mean = (spread.sum(dims, keepdim=True, dtype=wide) / count).to(x.dtype)
    return torch.addcmul(spread, mean, 1 - opened), factor  # torch.where would be slower on a CPU


def put_on(norm: nn.Module, statistics: OpenStatistics) -> None:
    """Make ``norm`` count only open elements."""
    norm.add_module(CHILD, statistics.train(norm.training))
    if isinstance(statistics, OpenWeight):
        parameter.give_property(norm, statistics.owned)
    norm.register_forward_pre_hook(statistics.before, with_kwargs=True)
    norm.register_forward_hook(statistics.after, always_call=isinstance(statistics, OpenWeight))


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
