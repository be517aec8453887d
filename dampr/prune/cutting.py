"""Cuts closed channels out of a plain model.

A closed channel may still contribute a constant to the layers that read it; this moves into their biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dampr.nn.called import first_argument

from . import hooks, inputs
from .graph import Closed, Member, Side, Widths
from .layers.base import CannotCutError
from .layers.registry import channel_count, kind_of
from .modules import of_kind
from .units.proof import cut

CONSTANTS = "as constants other than 0"
Kept = dict[Side, Tensor]  # a side of a layer -> the channels that are left, by their indices in the original layer


class UnableError(RuntimeError):
    """Raised if closed channels can neither stay nor be cut; the message names the layer."""


def cut_closed(
    small: nn.Module,
    closed: Closed,
    norms: dict[nn.Module, set[int]],
    samples: list[Any],
    kept: Kept,
    notes: dict[str, str],
    round_to: int,
) -> None:
    """Cut closed channels of ``small``, in place.

    Args:
        small: a model without gates.
        closed: the closed channels of linear and convolution layers and embeddings.
        norms: the closed channels of norms and factors. They are cut in the layer that writes or reads them.
        samples: example inputs, on which constants are measured.
        kept: filled with what is left of each side of a layer.
        notes: filled with the reason, by the name of the layer, where closed channels stay.
        round_to: the number of channels that a layer writes becomes a multiple of it, by keeping closed channels.

    Raises: UnableError if closed channels reach a layer with values that differ between rows, or the model does not run
    without them.
    """
    names = {module: name for name, module in small.named_modules()}
    widths = Widths(small, samples[0])
    for norm, channels in norms.items():
        around = widths.around(norm)
        for side in around:
            closed[side] = closed.get(side, set()) | channels
        if not around:
            notes[names[norm]] = (
                f"{len(channels)} closed channels stay: no layer alone writes or reads what this norm gates"
            )
    for layer, factor in widths.multiplied.items():
        if (layer, True) in closed:
            closed[factor, True] = closed.get((factor, True), set()) | closed[layer, True]
    # Sides that layers write come first, so that notes on a width name a layer that writes it.
    closed = dict(sorted(closed.items(), key=lambda item: not item[0][1]))
    going = _decide(widths, closed, notes, names, round_to)
    constants = _measure(small, going, samples)
    left: list[_Going] = []
    to_fold: list[_Constant] = []
    for width in going:
        try:
            to_fold += [one for one in constants if one.width is width and one.is_constant(names)]
            left.append(width)
        except CannotCutError as error:
            notes[names[width.layer]] = f"{width.closed} closed channels stay: {error}"
    if left:
        _cut(small, widths, left, to_fold, kept, names, samples[0])


@dataclass(eq=False)
class _Going:
    """The classes that are cut on behalf of one layer with closed channels.

    Attributes:
        layer: this layer.
        closed: how many of its channels are closed.
        classes: the classes that are cut.
        members: the sides of layers that have channels of its width.
    """

    layer: nn.Module
    closed: int
    classes: set[int]
    members: list[Member]


def _decide(
    widths: Widths, closed: Closed, notes: dict[str, str], names: dict[nn.Module, str], round_to: int
) -> list[_Going]:
    """Decide which classes are cut for each layer with closed channels.

    Args:
        widths: the widths of the plain model.
        closed: (layer, whether it writes them) -> the closed channels.
        notes: gets name of a layer -> why closed channels of it stay.
        names: layer -> its name.
        round_to: see :func:`dampr.compact`.
    """
    going: list[_Going] = []
    decided: set[int] = set()
    gone = _gone(widths, closed)
    for (layer, writes), channels in closed.items():
        labels = widths.classes(layer, writes)
        # a weight with groups has fewer columns than its layer reads
        labels = labels if max(channels) < len(labels) else []
        if labels and decided.issuperset(labels):
            continue  # decided for another layer of the same width
        found = gone[layer, writes]
        reason, dead = str(found), set[int]()
        if isinstance(found, set):
            reason, dead = "other layers of its width still use them", found
            if writes and len(dead) > (most := _most(labels, dead, round_to)):
                dead = set([one for one in labels if one in dead][:most])
                reason = f"the width is a multiple of {round_to}"
            going.append(_Going(layer, len(channels), dead - decided, widths.members(layer, writes)))
            decided.update(labels)
        staying = sum(labels[channel] not in dead for channel in channels) if labels else len(channels)
        if staying:
            notes[names[layer]] = f"{staying} closed channels stay: {reason}"
    return [width for width in going if width.classes]


def _gone(widths: Widths, closed: Closed) -> dict[Side, set[int] | CannotCutError]:
    """For each side with closed channels, the classes that no layer writes or no layer reads any more, or why none can
    be cut.

    Every side of a layer keeps a channel. Without this a side could become empty: a layer that reads several widths
    side by side may have closed all channels of one of them.
    """
    found: dict[Side, set[int] | CannotCutError] = {}
    every: set[int] = set()
    sides: dict[Side, None] = {}
    for layer, writes in closed:
        try:
            if layer not in widths:
                raise CannotCutError(widths.why_absent(layer))
            found[layer, writes] = own = widths.removable(layer, writes, closed)
            every |= own
            sides |= dict.fromkeys(member.side for member in widths.members(layer, writes))
        except CannotCutError as error:
            found[layer, writes] = error
    stay = widths.last(sides, every)
    return {side: own - stay if isinstance(own, set) else own for side, own in found.items()}


def _most(labels: list[int], dead: set[int], round_to: int) -> int:
    """The largest number of channels that can be cut of a width so that a multiple of ``round_to``, or the whole, is
    left.

    Args:
        labels: the class of each channel.
        dead: the classes that could go.
    """
    count = sum(one in dead for one in labels)
    return max(0, len(labels) - -(-(len(labels) - count) // round_to) * round_to)


class _Constant:
    """What the channels that are cut contribute to one layer that reads them, measured over several calls.

    Args:
        width: the classes that are cut.
        layer: the layer that reads them.
        channels: the indices of the channels that are cut, as the layer reads them.
    """

    def __init__(self, width: _Going, layer: Any, channels: list[int]) -> None:
        self.width, self.layer, self._channels = width, layer, channels
        self._kind = kind_of(layer)
        self._rows: int = 0
        self._first: Tensor | None = None  # what they contribute to the first row, (channels that the layer writes,)
        self._reads = self._contributes = self._varies = False

    def take(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the layer: record what the channels contribute to its outputs in this call."""
        x, channels = first_argument(args, kwargs).data, self._channels
        read = x.movedim(self._kind.input_axis(self.layer), -1)[..., channels].reshape(-1, len(channels))
        if not self._kind.gemm or not len(read):
            self._reads |= bool(read.any())
            return
        weight = self.layer.weight.detach()
        self._reads |= bool(read[:, weight[:, channels].transpose(0, 1).flatten(1).any(1)].any())
        wide = torch.promote_types(weight.dtype, torch.float32)
        columns = weight[:, channels].flatten(2).sum(2) if weight.dim() > 2 else weight[:, channels]
        rows = read.to(wide) @ columns.t().to(wide)
        self._first = rows[0] if self._first is None else self._first
        self._rows += len(rows)
        self._contributes |= bool(rows.any())
        self._varies |= not torch.allclose(rows, self._first.expand_as(rows), rtol=1e-5, atol=1e-6)

    def is_constant(self, names: dict[nn.Module, str]) -> bool:
        """Whether they contribute a constant other than 0, which has to be folded into the bias.

        Raises: CannotCutError if a bias cannot hold it, so the channels have to stay; UnableError if it differs between
        rows.
        """
        name = names[self.layer]
        # A transposed convolution adds up other products at each position, so what it computes is not a constant.
        if not self._kind.gemm:
            if self._reads:
                raise CannotCutError(f"they reach {name!r} {CONSTANTS}")
            return False
        if not self._contributes and not (self.layer.weight.dim() > 2 and self._reads):
            return False
        if self._kind.pads(self.layer):
            raise CannotCutError(
                f"they reach {name!r} {CONSTANTS}, which a bias cannot make up for at its padded border; gates after "
                "a norm "
                "(where dampr.convert puts them) leave no such constants"
            )
        if self._varies or self._rows == 1:
            raise UnableError(
                f"{name}: closed units reach it with values that differ between rows, so they cannot be cut"
            )
        return True

    def fold(self, left: Tensor) -> None:
        """Add the constant to the bias of the layer, which gets one if it has none.

        ``left``: bool, (channels that the layer wrote,), those that it still writes.
        """
        layer = self.layer
        if layer.bias is None:
            layer.bias = nn.Parameter(
                layer.weight.new_zeros(layer.weight.shape[0]), requires_grad=layer.weight.requires_grad
            )
        assert self._first is not None
        with torch.no_grad():
            layer.bias.add_(self._first[left.to(self._first.device)].to(layer.bias.dtype))


def _measure(small: nn.Module, going: list[_Going], samples: list[Any]) -> list[_Constant]:
    """Measure what each width that is cut contributes to its readers, with one run on each sample."""
    readers = [(width, m.module, m.of(width.classes)) for width in going for m in width.members if not m.writes]
    found = [_Constant(width, layer, channels) for width, layer, channels in readers if channels]
    handles = [one.layer.register_forward_pre_hook(one.take, with_kwargs=True) for one in found]
    with hooks.removing(handles):
        for sample in samples if found else ():
            inputs.evaluate(small, sample)
    return found


def _cut(
    small: nn.Module,
    widths: Widths,
    going: list[_Going],
    constants: list[_Constant],
    kept: Kept,
    names: dict[nn.Module, str],
    sample: Any,
) -> None:
    """Cut the classes of ``going`` out of ``small``, fold the constants into biases, and run the model on ``sample``.

    Args:
        small: the model; changed in place.
        widths: its widths.
        going: the classes to cut.
        constants: what the cut channels contribute to the layers that read them.
        kept: gets (layer, whether it is the output side) -> the indices of the channels that are left, int64.
        names: layer -> its name, for the error.
        sample: an example input.

    Raises: UnableError if the model does not run.
    """
    classes = {one for width in going for one in width.classes}

    def left(side: Side) -> Tensor:
        found = torch.ones(channel_count(*side), dtype=torch.bool)
        found[[channel for channel, one in enumerate(widths.classes(*side)) if one in classes]] = False
        return found

    for side in dict.fromkeys(m.side for width in going for m in width.members):
        stay = left(side)
        kept[side] = kept.get(side, torch.arange(len(stay)))[stay]
    rows = [left((one.layer, True)) for one in constants]
    cut(small, widths.units, sorted(classes))
    for one, stay in zip(constants, rows, strict=True):
        one.fold(stay)
    try:
        follow_inputs(small, sample)
    except RuntimeError as error:
        layers = ", ".join(names[width.layer] for width in going)
        raise UnableError(
            f"{layers}: without its closed channels the model does not run, so something beside its layers has that "
            f"width ({error}); "
            "exclude the layer"
        ) from error


def follow_inputs(model: nn.Module, sample: Any) -> None:
    """Run a model once, and set the size of norms that have no tensors to the number of channels that they read."""

    def resize(norm: Any, args: Any, kwargs: dict[str, Any]) -> None:
        x = first_argument(args, kwargs)
        unbatched = isinstance(norm, nn.modules.instancenorm._InstanceNorm) and x.dim() == norm._get_no_batch_dim()
        norm.num_features = x.shape[0 if unbatched else 1]

    bare = [m for m in of_kind(model, nn.modules.batchnorm._NormBase) if m.weight is None and m.running_mean is None]
    if not bare:
        inputs.without_arithmetic(model, sample, inputs.evaluate)
        return
    with hooks.removing([norm.register_forward_pre_hook(resize, with_kwargs=True) for norm in bare]):
        inputs.evaluate(model, sample)
