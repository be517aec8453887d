"""Examines a model for convert before any gate is placed: its units, and which of these can be cut in a copy.

A class is an integer that stands for units which can be cut only together (:mod:`.units`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dampr.nn import GatedLayer

from . import open_norms, unit_search
from .layers.registry import kind_of
from .modules import of_kind
from .unit_search import Placement
from .units import Units, trace_units
from .units.groups import share_of_macs


@dataclass
class Sight:
    """The units of a model without gates, and what was tried with them.

    Attributes:
        units: the partition into classes.
        placement: the classes that may have gates, and why others may not.
        tied: names of the parameters that several modules share.
    """

    units: Units
    placement: Placement
    tied: set[str]

    def why_not(self, layer: nn.Module, name: str) -> str | None:
        """Say what came of the try to cut the channels that ``layer`` (called ``name``) writes.

        Returns: why they cannot be cut; "" (a reason of no words) if the cut was tried and works; None if it was not
        tried.
        """
        units, placement = self.units, self.placement
        weight, dim = f"{name}.weight".lstrip("."), kind_of(layer).weight_dim(True)
        written = units.classes(weight, dim)
        classes = set(written)
        refused = self._refused(classes) or self._normed(classes)
        if refused is not None:
            return refused
        if not classes or not classes.issubset(placement.classes()):
            return None
        if units.is_column(weight, dim):
            return "other code reads its weight too, so gates on its outputs would not reach that"
        tied = next((m.name for class_id in classes for m in units.members[class_id] if m.name in self.tied), None)
        if tied is not None:
            return f"several modules have {tied!r}, which has its width"
        if (counted := self._counted(classes)) is not None:
            return counted
        if len(classes) < len(written):
            return (
                f"its {len(written)} channels can only go in {len(classes)} sets, as heads do, which have no gates in "
                "layers"
            )
        return ""

    def why_not_read(self, layer: nn.Module, name: str) -> str | None:
        """Say why the channels that ``layer`` (called ``name``) reads cannot be cut although the trace found no reason.

        Returns: the reason; None if they can be cut, and also if the trace itself found a reason.
        """
        weight, dim = f"{name}.weight".lstrip("."), kind_of(layer).weight_dim(False)
        classes = set(self.units.classes(weight, dim))
        if self.units.is_row(weight, dim):
            return "other code reads its weight too, so gates on its inputs would not reach that"
        if not classes.isdisjoint(self.units.label[self.units.summed].tolist()):
            return "a sum reads what it reads too, and no weight is in that"
        return self._refused(classes) or self._normed(classes) or self._counted(classes)

    def _normed(self, classes: set[int]) -> str | None:
        """Return why gates on the outputs of a layer do not close ``classes`` although a norm can count open ones only.

        None if no norm counts them.
        """
        norm = next((name for name, n in self.placement.norms.items() if not classes.isdisjoint(n.classes)), None)
        return (
            None if norm is None else f"{norm!r} counts its channels, so only gates on what reads them can close these"
        )

    def _counted(self, classes: set[int]) -> str | None:
        """Return why code beside the layers needs the width of ``classes``; None if none is known to."""
        places = {(m.name, m.dim) for class_id in classes for m in self.units.members[class_id]}
        code = next(
            (size for size in self.placement.read if (self.units.alias[size.parameter], size.dim) in places), None
        )
        return (
            None
            if code is None
            else f"something beside its layers has that width ({f'{code.module}.{code.attribute}'.lstrip('.')})"
        )

    def _refused(self, classes: Iterable[int]) -> str | None:
        """Return why one of ``classes`` was refused when it was tried; None if none was."""
        return next(
            (self.placement.refused[class_id] for class_id in classes if class_id in self.placement.refused), None
        )


class SightWarning(RuntimeWarning):
    """What a model computes could not be read off its operators, so less of it can be pruned."""


def look(model: nn.Module, example_inputs: Any) -> Sight | None:
    """Trace a model and try which gates it can have.

    Args:
        model: the model; not changed.
        example_inputs: the inputs of the trace.

    Returns: None if the model has gates already, or if the tracer cannot follow it (then with a warning).
    """
    if any(of_kind(model, GatedLayer)):
        return None
    try:
        units, placement = _placed(model, example_inputs)
        return Sight(units, placement, _tied(model, units))
    except Exception as error:  # whatever a model does that the tracer cannot follow; others look too
        _say(model, error)
        return None


def _say(model: nn.Module, error: Exception) -> None:
    """Warn that the model cannot be traced, and why."""
    warnings.warn(
        f"the operators of {type(model).__name__} could not be followed ({type(error).__name__}: {error}): "
        "only what its layers show can be pruned",
        SightWarning,
        stacklevel=2,
    )


def _placed(model: nn.Module, example_inputs: Any) -> tuple[Units, Placement]:
    """Return the units of a model, and the classes that may have gates.

    If no whole group of some grouped convolution can be cut, as around a shuffle of channels, a second trace takes the
    channels in the same place of every group as one unit. The trace with more multiply-accumulates in reach is
    returned.
    """
    units, placement = _placed_within(model, example_inputs)
    gated = set(placement.classes())
    within = [name for name in sorted(units.in_groups) if gated.isdisjoint(units.classes(name, 0))]
    if within:
        other, others = _placed_within(model, example_inputs, within)
        if share_of_macs(other, others.classes()) > share_of_macs(units, placement.classes()):
            return other, others
    return units, placement


def _placed_within(model: nn.Module, example_inputs: Any, within: Iterable[str] = ()) -> tuple[Units, Placement]:
    """Return the units of a model and the classes that may have gates, from one trace.

    Norms and layers that standardise their weights count only open units, so what they count may have gates; but for
    the widths of residual streams.

    Args:
        model: the model; not changed.
        example_inputs: the inputs of the trace.
        within: names of the weights of grouped convolutions whose groups all lose the same channels.

    Raises: what the model raises.
    """
    units = trace_units(model, example_inputs, within=within)
    norms = open_norms.find(model, units, example_inputs, streams=False)
    units = units.with_open_statistics(norms)
    return units, unit_search.place(model, units, example_inputs, norms)


def with_open_norms(model: nn.Module, units: Units, example_inputs: Any) -> tuple[Units, Placement]:
    """Return units and placement if norms may count only open units, so that the widths that they normalise may have
    gates too.

    If the tracer cannot follow the model then, no class may have gates, with a warning.

    Args:
        model: the model; not changed.
        units: its partition into classes, without norms that count only open units.
        example_inputs: the inputs.

    Returns: (the partition with these norms, the placement); ``units`` itself and an empty placement after a warning.
    """
    try:
        return _placed_with_open_norms(model, units, example_inputs)
    except Exception as error:  # whatever a model does that the tracer cannot follow; others look too
        _say(model, error)
        return units, Placement([])


def _placed_with_open_norms(model: nn.Module, units: Units, example_inputs: Any) -> tuple[Units, Placement]:
    """Return what :func:`with_open_norms` does, but raise what the model raises."""
    norms = open_norms.find(model, units, example_inputs)
    opened = units.with_open_statistics(norms)
    return opened, unit_search.place(model, opened, example_inputs, norms)


def _tied(model: nn.Module, units: Units) -> set[str]:
    """Return the parameters that several modules share, by their names in ``units.origin``."""
    owners: dict[str, set[nn.Module]] = {}
    for alias, name in units.alias.items():
        owners.setdefault(name, set()).add(model.get_submodule(alias.rpartition(".")[0]))
    return {name for name, modules in owners.items() if len(modules) > 1}
