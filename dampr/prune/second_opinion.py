"""Ask the trace of a model's operators about layers that are to get gates: which of them must not have any, and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .layers.recurrent import unit_columns
from .layers.registry import kind_of
from .units import Units, unseen
from .units.proof import added, retrace


def refused(
    model: nn.Module, units: Units, layers: dict[str, nn.Module], example_inputs: Any, whole: set[str], known: set[str]
) -> dict[str, str]:
    """name -> reason, for those of ``layers`` that must not lose a channel that they write.

    These are layers that the example inputs do not reach in evaluation; layers whose channels are read by something
    that only training reaches; layers whose width enters a number that the code computes; and layers whose closed
    channels are not 0 where they are added up.

    Args:
        model: the model without gates.
        units: its trace.
        layers: name -> layer.
        example_inputs: the inputs.
        whole: those of the layers (recurrent ones, attention) that are only checked for being reached, because other
            code knows how they are cut.
        known: those of the layers that were cut in a copy already.
    """
    found: dict[str, str] = {}
    free: dict[str, tuple[str, int]] = {}
    written: dict[str, set[int]] = {}
    protected = unseen.protected(units, dict(model.named_parameters()))
    for name, layer in layers.items():
        reason = unreached(name, layer, units)
        side = None if name in whole else _written(name, layer)
        if reason is None and side is not None and side[0] in units.alias:
            written[name] = set(units.classes(*side))
            reason = _why(protected, units, [side])
            if reason is None and name not in known:
                free[name] = side
        elif reason is None and kind_of(layer).recurrent:
            reason = _why(protected, units, [(f"{name}.{own}".lstrip("."), 1) for own in unit_columns(layer)])
        if reason is not None:
            found[name] = reason
    left = {name: classes for name, classes in written.items() if name not in found}
    return found | _followed(model, units, free, example_inputs) | _added(model, units, left, example_inputs)


def _why(protected: dict[int, str], units: Units, sides: Iterable[tuple[str, int]]) -> str | None:
    """Why a layer must keep what it writes; None if no class of ``sides``, (parameter, dimension), is protected."""
    known = (units.classes(name, dim) for name, dim in sides if name in units.alias)
    return next((protected[one] for classes in known for one in classes if one in protected), None)


def _added(model: nn.Module, units: Units, written: dict[str, set[int]], example_inputs: Any) -> dict[str, str]:
    """name -> reason, for layers whose closed channels are not 0 where activations are added up or multiplied.

    This happens behind an exp, for example. ``written``: name -> the classes that the layer writes.
    """
    summed = set(units.label[units.summed].tolist())
    classes = {one for own in written.values() for one in own if one in summed}
    if not classes:
        return {}
    try:
        found = added(model, units, classes, example_inputs)
    except Exception:  # a model that cannot be copied, or that needs some of its values
        return {}
    reason = "its closed channels would not be 0 where activations are added up or multiplied with each other"
    return {name: reason for name, own in written.items() if not own.isdisjoint(found)}


def _written(name: str, layer: nn.Module) -> tuple[str, int] | None:
    """(parameter, dimension) with which a layer writes its channels; None if its weight is not a parameter."""
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return None
    return f"{name}.weight" if name else "weight", kind_of(layer).weight_dim(True)


def unreached(name: str, layer: nn.Module, units: Units) -> str | None:
    """Why the example inputs do not reach a layer in evaluation, where results are compared; None if they do."""
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


def _followed(model: nn.Module, units: Units, free: dict[str, tuple[str, int]], example_inputs: Any) -> dict[str, str]:
    """Layers without half of whose channels the model does not run, or computes another function."""
    wanted = {one for side in free.values() for one in units.classes(*side)}
    clusters = [cluster for cluster in units.clusters if wanted & set(cluster)]
    try:
        differs = retrace(model, units, example_inputs, clusters)
    except Exception:  # a model that cannot be copied, which convert alone does not have to
        return {}
    found = {}
    for name, side in free.items():
        reason = next((differs[one].text for one in units.classes(*side) if one in differs), None)
        if reason is not None:
            found[name] = reason
    return found
