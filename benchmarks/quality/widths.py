"""Widths of a network at a target cost: for a network that is narrow from the start, and for one that is cut to the
same widths by L1 norm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dampr.prune.measure import count_macs

from .tasks import Task

Widths = tuple[int, ...]
TOLERANCE = 0.01
"""How far below its target a network may be."""
_IN_BLOCKS = (nn.GRU, nn.MultiheadAttention)
"""Layers that stack a weight for each of their parts: a dimension is (parts, width).

Elsewhere it is (width, pixels), as Flatten has it.
"""


def macs(task: Task, widths: Widths) -> int:
    """The multiply-accumulates of one example at these widths."""
    return _macs(task.name, task, widths)


@functools.lru_cache(maxsize=100_000)
def _macs(name: str, task: Task, widths: Widths) -> int:
    with torch.random.fork_rng(devices=[]):
        return count_macs(task.build(widths), task.example())


def narrow_widths(task: Task, share: float) -> Widths:
    """Widths whose cost is at most the target and at most 1 % below it: all are scaled alike, then one width is
    adjusted to use up the rest.

    If several fit, the most uniform ones are taken. Raises ValueError if none fit.
    """
    if share >= 1:
        return task.widths
    target = share * macs(task, task.widths)
    scale = _scale(task, target)
    found = {widths for near in _near(scale) for widths in _adjusted(task, _scaled(task, near), target)}
    fitting = [w for w in found if (1 - TOLERANCE) * target <= macs(task, w) <= target]
    if not fitting:
        raise ValueError(
            f"task={task.name!r}, share={share}: no widths within {TOLERANCE:.0%} below {target:.0f} "
            "multiply-accumulates"
        )
    return min(fitting, key=lambda w: (_unevenness(task, w, scale), w))


def _near(scale: float) -> list[float]:
    """A few scales around this one."""
    return [scale * (1 + step / 100) for step in range(-12, 13, 2)]


def _scaled(task: Task, scale: float) -> Widths:
    """The task's widths, scaled and rounded to their multiples."""
    return tuple(
        max(1, round(scale * width / unit)) * unit for width, unit in zip(task.widths, task.multiples, strict=True)
    )


def _scale(task: Task, target: float) -> float:
    """The largest scale whose cost is within the target, to one part in a thousand."""
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if macs(task, _scaled(task, middle)) <= target else (low, middle)
    return low


def _adjusted(task: Task, widths: Widths, target: float) -> Iterator[Widths]:
    """Variants of ``widths`` in which one width is as large as the target allows with the others as they are."""
    for place, unit in enumerate(task.multiples):
        low, high = 0, task.widths[place] // unit
        while low < high:
            middle = (low + high + 1) // 2
            fits = macs(task, _with(widths, place, middle * unit)) <= target
            low, high = (middle, high) if fits else (low, middle - 1)
        if low:
            yield _with(widths, place, low * unit)


def _with(widths: Widths, place: int, value: int) -> Widths:
    """``widths`` with one of them replaced."""
    return (*widths[:place], value, *widths[place + 1 :])


def _unevenness(task: Task, widths: Widths, scale: float) -> float:
    """The largest factor (as a logarithm) by which a width is off the scale, beyond what rounding to one unit
    explains.
    """
    return max(
        abs(math.log(w / (scale * full))) - unit / (scale * full)
        for w, full, unit in zip(widths, task.widths, task.multiples, strict=True)
    )


def cut_by_l1(model: nn.Module, task: Task, widths: Widths) -> nn.Module:
    """A network of these widths with the units of ``model`` whose weights have the largest L1 norms, and with their
    weights.

    A unit's weights are all rows that compute it: a channel of a residual stream counts in every layer that writes the
    stream. If a width is divided into heads, each head keeps equally many units.
    """
    owners = _owners(task)
    kept = [
        _largest(_norms(model, owners, place, task.widths[place]), width, unit)
        for place, (width, unit) in enumerate(zip(widths, task.multiples, strict=True))
    ]
    state = dict(model.state_dict())
    for name, dims in owners.items():
        for dim, place in enumerate(dims):
            if place is not None:
                index = _expanded(model, name, state[name].shape[dim], task.widths[place], kept[place])
                state[name] = state[name].index_select(dim, index)
    small = task.build(widths)
    small.load_state_dict(state)
    return small


def _owners(task: Task) -> dict[str, list[int | None]]:
    """For each tensor of the network, the number of the width that each dimension grows with, or None; found by
    building the network a little wider.
    """
    with torch.random.fork_rng(devices=[]):
        dense = {name: value.shape for name, value in task.build(task.widths).state_dict().items()}
        owners: dict[str, list[int | None]] = {name: [None] * len(shape) for name, shape in dense.items()}
        for place, unit in enumerate(task.multiples):
            wider = task.build(_with(task.widths, place, task.widths[place] + unit)).state_dict()
            for name, shape in dense.items():
                for dim, size in enumerate(shape):
                    if wider[name].shape[dim] != size:
                        owners[name][dim] = place
    return owners


def _norms(model: nn.Module, owners: dict[str, list[int | None]], place: int, width: int) -> Tensor:
    """The L1 norms of the units of one width, summed over all matrices and filters whose rows compute them."""
    norms = torch.zeros(width)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and owners[name][0] == place:
            rows = weight.detach().abs().flatten(1).sum(1)
            norms += rows.view(-1, width).sum(0) if _in_blocks(model, name) else rows.view(width, -1).sum(1)
    return norms


def _largest(norms: Tensor, count: int, groups: int) -> Tensor:
    """The indices of the ``count`` largest norms, equally many in each group, ascending."""
    by_group = norms.view(groups, -1)
    found = by_group.topk(count // groups, dim=1).indices + torch.arange(groups)[:, None] * by_group.shape[1]
    return found.flatten().sort().values


def _expanded(model: nn.Module, name: str, size: int, width: int, kept: Tensor) -> Tensor:
    """The indices of the kept units in a dimension that has several elements for each unit."""
    index = torch.arange(size)
    places = index.view(-1, width)[:, kept] if _in_blocks(model, name) else index.view(width, -1)[kept]
    return places.flatten()


def _in_blocks(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a layer that stacks the weights of several parts, such as a GRU's three."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), _IN_BLOCKS)


def describe(widths: Sequence[int]) -> str:
    """The widths as text, such as "20-50-500"."""
    return "-".join(map(str, widths))
