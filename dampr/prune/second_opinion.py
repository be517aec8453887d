"""What the trace of a model's operators says of the layers that are to get gates, before they get any."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from dampr.nn import GatedLayer

from . import inputs
from .structure import plain_copy
from .units import Units, trace_units
from .units.proof import retrace


def refused(
    model: nn.Module,
    layers: dict[str, nn.Module],
    example_inputs: Any,
    whole: Iterable[str] = (),
    units: Units | None = None,
    known: Iterable[str] = (),
) -> dict[str, str]:
    """Of these layers of ``model``, by name, those that must not lose a channel that they write, and why.

    Left out is a layer that the example inputs do not reach in evaluation, one whose channels something reads that only training
    reaches, and one whose width the code takes a number from. What is said of the layers ``whole`` (recurrent ones, attention) is only
    whether they are reached: others know how these are cut.

    Forward hooks look on, and are not traced. A model that cannot be traced is not judged: the result is empty. ``units`` of the model,
    where they are known; ``known``: layers that were cut in a copy already.
    """
    with inputs.without_hooks(model):
        return _judged(model, layers, example_inputs, set(whole), units, set(known))


def _judged(
    model: nn.Module, layers: dict[str, nn.Module], example_inputs: Any, whole: set[str], seen: Units | None, known: set[str]
) -> dict[str, str]:
    try:
        plain = plain_copy(model, example_inputs) if any(isinstance(m, GatedLayer) for m in model.modules()) else model
        units = trace_units(plain, example_inputs) if seen is None else seen
    except Exception:  # whatever a model does that the tracer cannot follow; convert has other eyes
        return {}
    found = {name: reason for name in whole if (reason := unreached(name, layers[name], units)) is not None}
    sides = {name: _written(name, layer) for name, layer in layers.items() if name not in found and name not in whole}
    protected = _read_in_training_only(units)
    for name, side in sides.items():
        reason = unreached(name, layers[name], units)
        if reason is None and side is not None and side[0] in units.alias:
            reason = next((protected[c] for c in units.classes(*side) if c in protected), None)
        if reason is not None:
            found[name] = reason
    free = {n: side for n, side in sides.items() if side is not None and side[0] in units.alias and n not in found and n not in known}
    return found | _followed(plain, units, free, example_inputs)


def _written(name: str, layer: nn.Module) -> tuple[str, int] | None:
    """The parameter, and its dimension, that a layer writes its channels with; None where its weight is no parameter."""
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return None
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return f"{name}.weight" if name else "weight", int(transposed or isinstance(layer, nn.Embedding))


def unreached(name: str, layer: nn.Module, units: Units) -> str | None:
    """Why the example inputs do not get to a layer where results are compared; None where they do."""
    prefix = f"{name}." if name else ""
    modes: set[bool] = set()
    for own, _ in layer.named_parameters():
        modes |= units.reached.get(units.alias.get(prefix + own, ""), set())
    if False in modes:
        return None
    if modes:
        return "example_inputs reach the layer in training alone, so what compact leaves could not be compared"
    untraced = f" (which could not be traced: {units.failed[True]})" if True in units.failed else ""
    return f"example_inputs do not reach the layer, in evaluation or in training{untraced}"


def _read_in_training_only(units: Units) -> dict[int, str]:
    """The classes that have a member in what evaluation does not reach, and its name: compact would not cut it."""
    found: dict[int, str] = {}
    for name, modes in units.reached.items():
        if modes == {True}:
            for dim, _, _ in units.origin[name]:
                found |= dict.fromkeys(units.classes(name, dim), f"{name!r}, which only training reaches, shares its width")
    return found


def _followed(model: nn.Module, units: Units, free: dict[str, tuple[str, int]], example_inputs: Any) -> dict[str, str]:
    """Layers without half of whose channels the model does not run, or computes another function."""
    wanted = {one for side in free.values() for one in units.classes(*side)}
    families = [family for family in units.families if wanted & set(family)]
    try:
        differs = retrace(model, units, example_inputs, families)
    except Exception:  # a model that cannot be copied, which convert alone does not have to
        return {}
    found = {}
    for name, side in free.items():
        reason = next((differs[one].text for one in units.classes(*side) if one in differs), None)
        if reason is not None:
            found[name] = reason
    return found
