"""What the trace of a model's operators says of the layers that are to get gates, before they get any."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import inputs
from .units import Units
from .units.proof import added, retrace


def refused(
    model: nn.Module, units: Units, layers: dict[str, nn.Module], example_inputs: Any, whole: set[str], known: set[str]
) -> dict[str, str]:
    """Of these layers, by name, those that must not lose a channel that they write, and why.

    Left out is a layer that the example inputs do not reach in evaluation, one whose channels something reads that only
    training reaches, one whose width the code takes a number from, and one whose closed channels something adds up
    where they are not 0. Forward hooks look on, and are not traced.

    Args:
        model, units: the model without gates, and its trace.
        whole: of these layers (recurrent ones, attention) only whether they are reached: others know how they are cut.
        known: layers that were cut in a copy already.
    """
    found: dict[str, str] = {}
    free: dict[str, tuple[str, int]] = {}
    written: dict[str, set[int]] = {}
    protected = units.in_training_alone()
    for name, layer in layers.items():
        reason = unreached(name, layer, units)
        side = None if name in whole else _written(name, layer)
        if reason is None and side is not None and side[0] in units.alias:
            written[name] = set(units.classes(*side))
            reason = next((protected[c] for c in units.classes(*side) if c in protected), None)
            if reason is None and name not in known:
                free[name] = side
        if reason is not None:
            found[name] = reason
    with inputs.without_hooks(model):
        left = {name: classes for name, classes in written.items() if name not in found}
        return found | _followed(model, units, free, example_inputs) | _added(model, units, left, example_inputs)


def _added(model: nn.Module, units: Units, written: dict[str, set[int]], example_inputs: Any) -> dict[str, str]:
    """Layers whose closed channels would still count where activations are added up or multiplied with each other,
    as behind an exp.
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
    """The parameter, and its dimension, that a layer writes its channels with;
    None where its weight is no parameter.
    """
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
