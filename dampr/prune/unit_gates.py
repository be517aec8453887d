"""Gates on the weights that read a unit: how :func:`dampr.convert` prunes models whose layers have no gated
counterpart.

In the code below a class is an integer that stands for units which can be cut only together (:mod:`.units`);
``class_id`` is a single one.

:mod:`.unit_search` finds where gates can be, :func:`only` drops what the arguments of convert leave out,
:func:`put_in` puts the gates there, and :func:`left_out` says why other layers have none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dampr.gates import Gate
from dampr.nn import open_statistics
from dampr.nn.parameter import GatedParameter, is_on, put_on, take_off

from . import filters, second_opinion
from .filters import Filter
from .layers.registry import channel_count, kind_of
from .modules import by_name
from .open_norms import in_one_vector
from .unit_search import Placement
from .units import Units
from .units.groups import Group

UNSAID = "include or exclude leaves it out, or it is alone in its width"  # the reason if no step gave another


def only(model: nn.Module, units: Units, placement: Placement, include: Filter, exclude: Filter) -> Placement:
    """Return ``placement`` without the gate vectors that the arguments of convert leave out.

    A vector stays if the layers that write its classes (as in :func:`wanted`), and the norms over them, are included
    and not excluded.

    Args:
        model: the plain model.
        units: its partition into classes.
        placement: where gates can be; not changed.
        include, exclude: as in :func:`dampr.convert`.
    """
    kept = set(wanted(model, units, placement.classes(), include, exclude))
    for name, norm in placement.norms.items():
        if not filters.wanted(above(model, name), include, exclude):
            kept.difference_update(norm.classes)
    vectors = [group for group in placement.groups if kept.issuperset(group.classes)]
    norms = in_one_vector(placement.norms, (group.classes for group in vectors))
    return replace(placement, groups=vectors, norms=norms)


def above(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the module ``name`` and of the modules that contain it, from the inside out.

    The model itself is left out, unless ``name`` is "", which names it.
    """
    parts = name.split(".") if name else []
    paths = [".".join(parts[:count]) for count in range(len(parts), 0, -1)] or [""]
    return [(path, model.get_submodule(path)) for path in paths]


def wanted(model: nn.Module, units: Units, classes: list[int], include: Filter, exclude: Filter) -> list[int]:
    """Return those of ``classes`` that the arguments ``include`` and ``exclude`` of convert leave.

    A class stays if at least one of the layers that write it is included, and none of them is excluded. If no layer
    writes the class, all layers that have it count instead.

    Args:
        model: the plain model.
        units: its partition into classes.
        classes: the classes to filter; returned as they are if both filters are None.
        include, exclude: as in :func:`dampr.convert`.
    """
    if include is None and exclude is None:
        return classes

    @functools.cache
    def judged(name: str) -> tuple[bool, bool]:
        """Return whether the module of a parameter is included, and whether it is not excluded."""
        modules = above(model, name.rpartition(".")[0])
        return filters.wanted(modules, include, None), filters.wanted(modules, None, exclude)

    kept = []
    for class_id in classes:
        members = [
            m for m in units.members[class_id] if units.written[units.first_unit(m.name, m.dim) + m.indices].any()
        ]
        matrices = [m for m in members if len(units.origin[m.name]) > 1] or members or units.members[class_id]
        verdicts = [judged(m.name) for m in matrices]
        if any(included for included, _ in verdicts) and all(allowed for _, allowed in verdicts):
            kept.append(class_id)
    return kept


@contextmanager
def put_in(
    model: nn.Module, units: Units, placement: Placement, make: Callable[[int], Gate]
) -> Iterator[dict[str, GatedParameter]]:
    """Put the gates of a placement on ``model``; as a context manager, it yields name -> gated parameter.

    If the block raises, the model is restored.

    Args:
        model: the plain model; changed in place.
        units: its partition into classes.
        placement: what gets gates.
        make: makes a gate vector from a number of gates.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[int, dict[tuple[nn.Module, str], None]] = {}  # the places of each parameter; a module may have two names
    for name, p in parameters.items():
        path, _, attribute = name.rpartition(".")
        tied.setdefault(id(p), {})[model.get_submodule(path), attribute] = None
    values = {p: p.data for p in parameters.values()}
    done: dict[tuple[nn.Module, str], None] = {}
    counting: list[nn.Module] = []
    try:
        for group in placement.groups:
            gate = make(len(group.classes))
            saved = _weights_per_class(units, group, parameters)
            for (name, dim), columns in group.columns.items():
                for later, (module, attribute) in enumerate(tied[id(parameters[name])]):
                    index, device = torch.from_numpy(columns), parameters[name].device
                    gates = GatedParameter(gate, dim, index, weights_per_gate=saved, device=device)
                    # if several parameters share gates, the first one holds what closing a gate saves
                    saved = torch.zeros_like(saved)
                    done[module, attribute] = None
                    put_on(module, attribute, gates.train(module.training), divided=not later)
            number = {class_id: at for at, class_id in enumerate(group.classes)}
            for name, norm in placement.norms.items():
                index = torch.tensor(
                    [number.get(class_id, -1) for class_id in norm.classes], device=next(model.parameters()).device
                )
                if int(index.max()) >= 0:
                    module = model.get_submodule(name)
                    open_statistics.put_on(module, norm.statistics(gate, index))
                    counting.append(module)
        yield by_name(model, GatedParameter)
    except BaseException:
        for norm_module in counting:
            open_statistics.take_off(norm_module)
        for module, attribute in done:
            if is_on(module, attribute):
                take_off(module, attribute, folded=False)
        for p, value in values.items():
            p.data = value
        raise


def left_out(
    model: nn.Module, units: Units, placement: Placement, gated: Collection[int] | None = None
) -> dict[str, str]:
    """Return name of a layer with a weight matrix -> why what it writes has no gates.

    Args:
        model: the plain model.
        units: its partition into classes.
        placement: where gates can be.
        gated: the classes with gates; None: those of ``placement``.
    """
    gated = set(placement.classes() if gated is None else gated)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    reasons: dict[str, str] = {}
    with_gates: set[str] = set()  # a layer may have several weights
    for name, origin in units.alias.items():
        if len(units.origin[origin]) < 2 and (name not in parameters or parameters[name].dim() < 2):
            continue
        owner = name.rpartition(".")[0]
        path = name.partition(".parametrizations.")[0] if ".parametrizations." in name else owner
        absent = second_opinion.unreached(owner, model.get_submodule(owner), units)
        written = [units.classes(name, dim) for dim in _written(model, units, name)]
        if absent is not None:
            reasons[path] = absent
        elif written and all(gated.isdisjoint(classes) for classes in written):
            reasons[path] = str(_known(units, placement, written[0]) or _unreadable(model, units, written[0]) or UNSAID)
        elif written:
            with_gates.add(path)
        elif name in parameters and (reason := _unwritten(model.get_submodule(path), units, placement, gated, origin)):
            reasons[path] = reason
    return {path: reason for path, reason in reasons.items() if path not in with_gates}


def _written(model: nn.Module, units: Units, name: str) -> list[int]:
    """Return the dimensions of a tensor whose units its layer writes.

    Of a weight that several layers have, it is the one side that this layer writes.

    Args:
        model: the plain model.
        units: its partition into classes.
        name: the name of the tensor in this layer, one of ``units.alias``.
    """
    path, _, attribute = name.rpartition(".")
    kind, origin = kind_of(model.get_submodule(path)), units.alias[name]
    dims = [dim for dim, *_ in units.origin[origin] if units.is_row(name, dim)]
    if attribute == "weight" and (kind.reads or kind.reads_indices) and list(units.alias.values()).count(origin) > 1:
        return [dim for dim in dims if dim == kind.weight_dim(True)] or dims
    return dims


def _unwritten(layer: nn.Module, units: Units, placement: Placement, gated: set[int], origin: str) -> str | None:
    """Return why a layer has no gates of whose parameter the trace saw no unit written.

    Args:
        layer: the layer.
        units: the partition of the model into classes.
        placement: where gates can be.
        gated: the classes with gates.
        origin: the name of the parameter in ``units.origin``.

    Returns: the reason; None if the parameter does not give one, for example because it has gates.
    """
    if kind_of(layer).reads and channel_count(layer, True) == 1:
        return "it has one channel"
    if any(units.is_column(origin, dim) for dim, *_ in units.origin[origin]):
        return None
    classes = [class_id for dim, *_ in units.origin[origin] for class_id in units.classes(origin, dim)]
    if not gated.isdisjoint(classes):
        return None
    reason = _known(units, placement, classes)
    return str(reason) if reason is not None else None


def _known(units: Units, placement: Placement, classes: list[int]) -> Any:
    """Return the first reason that is known against gates on one of ``classes``: words or a ``Reason``; None if none
    is.

    Args:
        units: the partition of the model into classes.
        placement: where gates can be; its reasons come first.
        classes: the classes, in the order in which they are looked up.
    """
    reasons = (placement.refused.get(class_id) or units.reason(class_id) for class_id in classes)
    return next((reason for reason in reasons if reason is not None), None)


def _unreadable(model: nn.Module, units: Units, classes: list[int]) -> str | None:
    """Return why no gate on a parameter can close ``classes``, which are free to be cut; None if one can."""
    summed = set(units.label[units.summed].tolist())
    if not summed.isdisjoint(classes):
        return "a sum reads it that no weight is in"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, dim, indices in (m for class_id in classes for m in units.members[class_id]):
        if name not in parameters and units.columns[units.first_unit(name, dim) + indices].any():
            return f"{name!r} reads it, which can have no gates"
    return None


def _weights_per_class(units: Units, group: Group, parameters: dict[str, nn.Parameter]) -> Tensor:
    """Return the number of parameters that are cut with each class of the group, float32 (classes,).

    Args:
        units: the partition of the model into classes.
        group: the classes.
        parameters: name -> parameter; buffers do not count.
    """

    def parameters_cut(class_id: int) -> float:
        """Return the number of parameters that are cut with one class."""
        members = [(m, parameters[m.name]) for m in units.members[class_id] if m.name in parameters]
        return float(sum(len(m.indices) * p.numel() / p.shape[m.dim] for m, p in members))

    return torch.tensor([parameters_cut(class_id) for class_id in group.classes])
