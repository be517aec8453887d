"""A layout says which indices of which tensors of a gated model are left after closed units have left it.

:func:`moved` brings a model from one layout to another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dampr.gates import Gate
from dampr.gates.selected import SelectedGate, whole

from . import noise
from .expand import FILLED_WITH_ONE, kept_dims
from .layers.registry import kind_of
from .places import Places
from .units.numbers import set_number
from .units.proof import follow_all


class Sized(NamedTuple):
    """A number, or an index of gates, that a module keeps beside its parameters.

    Attributes:
        whole: its value in the whole model.
        now: its value in the layout.
    """

    whole: Any
    now: Any


@dataclass
class Layout:
    """What is left of a model. Every index is an index in the whole model.

    Attributes:
        tensors: name of a parameter or buffer -> for each dimension (its size in the whole model, the indices that are
            left), or None if all are left.
        gates: gated layer -> the indices of the gates that are left, for layers with one gate for each channel.
        sizes: module -> attribute -> its values in the whole model and in the layout.
    """

    tensors: dict[str, list[Places]] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, dict[str, Sized]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors)


WHOLE = Layout()


Shelf = dict[str, Tensor]  # name of a tensor -> the elements that have left it, flat, on the host


def moved(
    model: nn.Module, before: Layout, after: Layout, shelf: Shelf | None = None
) -> dict[str, tuple[list[Places], list[Places]]]:
    """Bring ``model`` from layout ``before`` to layout ``after``, in place.

    Parameters stay the same objects, with other data and gradients.

    Args:
        model: in layout ``before``.
        before, after: the layouts.
        shelf: keeps the elements that leave, and gives back those that return. None: elements that leave are lost, and
            those that return are 0 (1 in variances).

    Returns: name of each tensor that changed -> its dimensions in ``before`` and in ``after``.
    """
    changed = _changed(before, after)
    seen: set[int] = set()
    modules: dict[nn.Module, None] = {}
    for name, (old, new) in changed.items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        modules[module] = None
        held: Any = module._parameters.get(own)
        if id(held) in seen:
            continue
        fill = float(own in FILLED_WITH_ONE)
        if held is None:
            buffers: dict[str, Any] = module._buffers
            buffers[own] = exchanged(buffers[own], old, new, shelf, name, fill)
            continue
        seen.add(id(held))
        gradient, held.grad = held.grad, None
        give_data(held, exchanged(held.detach(), old, new, shelf, name, fill))
        held.grad = None if gradient is None else resized(gradient, old, new)
    _set_sizes(model, before, after, indices=True)
    _select(model, before, after)
    with noise.kept(model):
        # _set_sizes sets the sizes of recurrent layers, from the layout.
        follow_all(model, [module for module in modules if not kind_of(module).recurrent])
    _set_sizes(model, before, after, indices=False)
    return changed


def exchanged(
    t: Tensor, before: list[Places], after: list[Places], shelf: Shelf | None, key: str, fill: float = 0.0
) -> Tensor:
    """As :func:`resized`, but elements that leave are put on the shelf, and elements that return are taken from it.

    ``key``: the name of the tensor on the shelf.
    """
    if shelf is None:
        return resized(t, before, after, fill)
    every: list[Places] = [None] * len(before)
    whole_t = resized(t, before, every, fill)
    stored = shelf.pop(key, None)
    if stored is not None:
        whole_t[~_inside(whole_t.shape, before, t.device)] = stored.to(whole_t)
    outside = ~_inside(whole_t.shape, after, t.device)
    if bool(outside.any()):
        shelf[key] = whole_t[outside].cpu()
    return resized(whole_t, every, after, fill)


def _inside(shape: Sequence[int], places: list[Places], device: torch.device) -> Tensor:
    """Which elements of a whole tensor are in a layout: bool, of ``shape``."""
    inside = torch.ones(tuple(shape), dtype=torch.bool, device=device)
    for dim, place in enumerate(places):
        if place is not None:
            gone = torch.ones(place[0], dtype=torch.bool, device=device)
            gone[place[1].to(device)] = False
            inside.index_fill_(dim, gone.nonzero().flatten(), False)
    return inside


def _set_sizes(model: nn.Module, before: Layout, after: Layout, indices: bool) -> None:
    """Set the attributes that ``sizes`` lists to their values in ``after``: those that hold an index of gates
    (``indices``), or all others.
    """
    for name in {*before.sizes, *after.sizes}:
        for attribute, size in (before.sizes.get(name, {}) | after.sizes.get(name, {})).items():
            now = after.sizes.get(name, {}).get(attribute)
            value = size.whole if now is None else now.now
            module = model.get_submodule(name)
            if isinstance(value, Tensor) == indices:
                set_number(
                    module, attribute, value.to(getattr(module, attribute).device, copy=True) if indices else value
                )


def _changed(before: Layout, after: Layout) -> dict[str, tuple[list[Places], list[Places]]]:
    """The tensors whose layout differs, with their dimensions in ``before`` and in ``after``, lists of equal length."""
    found = {}
    for name in {**before.tensors, **after.tensors}:
        old, new = before.tensors.get(name, []), after.tensors.get(name, [])
        count = max(len(old), len(new))
        pair = [*old, *[None] * (count - len(old))], [*new, *[None] * (count - len(new))]
        if any(not _same(a, b) for a, b in zip(*pair, strict=True)):
            found[name] = pair
    return found


def _same(a: Places, b: Places) -> bool:
    """Whether the same indices of a dimension are left in two layouts."""
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a[1], b[1]))


def _select(model: nn.Module, before: Layout, after: Layout) -> None:
    """Give the layers whose gates differ between the layouts a gate module with the gates that are left in
    ``after``.
    """
    wanted: dict[Gate, Tensor | None] = {}
    for name in {*before.gates, *after.gates}:
        layer: Any = model.get_submodule(name)
        wanted[layer.gate] = after.gates.get(name)
    chosen: dict[nn.Module, nn.Module] = {}
    for gate, kept in wanted.items():
        source = whole(gate)
        every = kept is None or len(kept) == source.num_gates
        chosen[gate] = source if every else SelectedGate(source, kept)  # type: ignore[arg-type]
    for module in model.modules():
        own: Any = module._modules.get("gate")
        if own in chosen:
            module._modules["gate"] = chosen[own]


def resized(t: Tensor, before: Sequence[Places], after: Sequence[Places], fill: float = 0.0) -> Tensor:
    """``t``, which is in layout ``before``, in layout ``after``; elements that ``t`` does not have are ``fill``.

    The memory format channels_last is kept.
    """
    last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    for dim, (old, new) in enumerate(zip(before, after, strict=True)):
        if not _same(old, new):
            t = _along(t, dim, old, new, fill)
    return t.contiguous(memory_format=torch.channels_last) if last else t


def _along(t: Tensor, dim: int, old: Places, new: Places, fill: float) -> Tensor:
    """Bring dimension ``dim`` of ``t`` from the indices ``old`` to the indices ``new``; see :func:`resized`."""
    size = (old or new or (0,))[0]
    have, want = (torch.arange(size) if places is None else places[1] for places in (old, new))
    where = torch.full((size,), -1)
    where[have] = torch.arange(len(have))
    source = where[want].to(t.device)
    there = source >= 0
    if bool(there.all()):
        return t.index_select(dim, source)
    shape = [*t.shape[:dim], len(want), *t.shape[dim + 1 :]]
    return t.new_full(shape, fill).index_copy(dim, there.nonzero().flatten(), t.index_select(dim, source[there]))


@torch.no_grad()
def give_data(parameter: Tensor, data: Tensor) -> None:
    """Give ``parameter`` other data, of any shape; it stays the same object.

    While a graph of an earlier step exists (a loss that is still referenced, say), it has a node for the parameter with
    the old shape, and the next graph would use that node again. torch makes a new node when the dtype changes, so the
    dtype is changed for a moment.
    """
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data


def move_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    changed: Mapping[str, tuple[list[Places], list[Places]]],
    shapes: Mapping[str, Sequence[int]],
    shelf: Shelf,
) -> None:
    """Bring the optimizer state of parameters that :func:`moved` has changed to the new layout.

    Args:
        optimizer: the optimizer.
        model: in the new layout.
        changed: what :func:`moved` returned.
        shapes: the shapes of the parameters before.
        shelf: as for :func:`moved`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    done: set[int] = set()
    for name, (old, new) in changed.items():
        held = parameters.get(name)
        if held is None or id(held) in done:
            continue
        done.add(id(held))
        for key, value in optimizer.state.get(held, {}).items():
            dims = kept_dims(value.shape, shapes[name]) if isinstance(value, Tensor) and value.numel() > 1 else None
            if dims is None and isinstance(value, Tensor) and tuple(value.shape) == tuple(shapes[name]):
                dims = list(range(value.dim()))  # a parameter of one element now, which may get more
            if dims is not None:
                sides: list[list[Places]] = [
                    [None if d is None or d >= len(side) else side[d] for d in dims] for side in (old, new)
                ]
                optimizer.state[held][key] = exchanged(value, sides[0], sides[1], shelf, f"{name}:{key}")


def same_layout(kept: Mapping[str, dict[int, tuple[int, Tensor]]]) -> dict[str, list[Places]]:
    """For each tensor, a dict of dimension -> (size, indices left) as a list with an entry for each dimension up to the
    last in the dict.
    """
    return {name: [dims.get(d) for d in range(max(dims) + 1)] for name, dims in kept.items() if dims}


def left_of(
    gone: Mapping[str, Mapping[int, Sequence[int]]], shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[Places]]:
    """As :func:`same_layout`, from the indices that are ``gone`` (tensor -> dimension -> indices) and the ``shapes`` of
    the whole model.
    """
    kept: dict[str, dict[int, tuple[int, Tensor]]] = defaultdict(dict)
    for name, dims in gone.items():
        for dim, lost in dims.items():
            left = torch.ones(shapes[name][dim], dtype=torch.bool)
            left[list(lost)] = False
            kept[name][dim] = shapes[name][dim], left.nonzero().flatten()
    return same_layout(kept)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer by each of its names."""
    return {name: tuple(t.shape) for name, t in _named(model)}


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer, under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
