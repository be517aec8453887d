"""Closed channels leave a plain model, and what they still contribute as constants moves into the biases of what
reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import inputs
from .graph import CannotCutError, Closed, Member, Side, Widths, channel_count, is_transposed, pads_with_zeros
from .modules import of_kind
from .units.proof import cut

CONSTANTS = "as constants other than 0"
Kept = dict[Side, Tensor]  # a side of a layer -> the channels that are left, by their indices in the original layer


class UnableError(RuntimeError):
    """Closed channels cannot stay, and cannot go; the message names the layer."""


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
        closed: of linear and convolution layers, and embeddings.
        norms: the closed channels of norms and factors, which go where a layer writes or reads them.
        samples: example inputs, on which constants are measured.
        kept: gets what is left of each side of a layer.
        notes: gets why closed channels of a layer stay, by its name.
        round_to: what the widths that layers write are multiples of, as far as closed channels last.

    Raises: UnableError where closed channels reach a layer with values that differ between rows, or the model does not
    run without them.
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
    # layers that write a width first: what is said of it is said of them
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
    """Classes that go, as a layer with gates asks for them. ``closed``: how many of its channels are."""

    layer: nn.Module
    closed: int
    classes: set[int]
    members: list[Member]


def _decide(
    widths: Widths, closed: Closed, notes: dict[str, str], names: dict[nn.Module, str], round_to: int
) -> list[_Going]:
    """What goes with the closed channels of each layer; adds to ``notes`` why others stay."""
    going: list[_Going] = []
    decided: set[int] = set()
    gone = _gone(widths, closed)
    for (layer, writes), channels in closed.items():
        labels = widths.classes(layer, writes)
        # a weight with groups has fewer columns than its layer reads
        labels = labels if max(channels) < len(labels) else []
        if labels and decided.issuperset(labels):
            continue  # another layer of the same width came first
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
    """Of each side with closed channels the classes that nobody writes or nobody reads, or why none of its width can
    go.

    Every side of a layer keeps a channel: where several widths are read side by side, the gates of the reader may close
    one of them.
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
    """How many channels to cut of a width, so that what is left is a multiple of ``round_to``, or all."""
    count = sum(one in dead for one in labels)
    return max(0, len(labels) - -(-(len(labels) - count) // round_to) * round_to)


class _Constant:
    """What the channels of a width that goes contribute to a layer that reads them, call by call."""

    def __init__(self, width: _Going, layer: Any, channels: list[int]) -> None:
        self.width, self.layer, self._channels = width, layer, channels
        self._rows: int = 0
        self._first: Tensor | None = None  # of what they contribute, (channels that the layer writes,)
        self._reads = self._contributes = self._varies = False

    def take(self, layer: nn.Module, args: Any) -> None:
        """A forward hook: what the layer reads in this call."""
        x, channels = args[0].data, self._channels
        recurrent = isinstance(layer, nn.RNNBase)
        along = -1 if recurrent or isinstance(layer, nn.Linear) else -(self.layer.weight.dim() - 1)
        read = x.movedim(along, -1)[..., channels].reshape(-1, len(channels))
        if recurrent or is_transposed(layer) or not len(read):
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
        """Whether there is something to fold.

        Raises CannotCutError where that cannot be, UnableError where it is no constant.
        """
        name = names[self.layer]
        # a kernel that moves apart adds up differently at each place
        if isinstance(self.layer, nn.RNNBase) or is_transposed(self.layer):
            if self._reads:
                raise CannotCutError(f"they reach {name!r} {CONSTANTS}")
            return False
        if not self._contributes and not (self.layer.weight.dim() > 2 and self._reads):
            return False
        if pads_with_zeros(self.layer):
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
        """Add it to the bias of the layer, of which these written channels are left."""
        layer = self.layer
        if layer.bias is None:
            layer.bias = nn.Parameter(
                layer.weight.new_zeros(layer.weight.shape[0]), requires_grad=layer.weight.requires_grad
            )
        assert self._first is not None
        with torch.no_grad():
            layer.bias.add_(self._first[left.to(self._first.device)].to(layer.bias.dtype))


def _measure(small: nn.Module, going: list[_Going], samples: list[Any]) -> list[_Constant]:
    """What each width that goes contributes to its readers, from one run on each sample."""
    readers = [(width, m.module, m.of(width.classes)) for width in going for m in width.members if not m.writes]
    found = [_Constant(width, layer, channels) for width, layer, channels in readers if channels]
    hooks = [one.layer.register_forward_pre_hook(one.take) for one in found]
    with inputs.removing(hooks):
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
    """Run a model; norms without parameters, whose size nothing else tells, take on that of what they read."""

    def resize(norm: Any, args: Any) -> None:
        x = args[0]
        unbatched = isinstance(norm, nn.modules.instancenorm._InstanceNorm) and x.dim() == norm._get_no_batch_dim()
        norm.num_features = x.shape[0 if unbatched else 1]

    bare = [m for m in of_kind(model, nn.modules.batchnorm._NormBase) if m.weight is None and m.running_mean is None]
    if not bare:
        inputs.without_arithmetic(model, sample, inputs.evaluate)
        return
    with inputs.removing([norm.register_forward_pre_hook(resize) for norm in bare]):
        inputs.evaluate(model, sample)
