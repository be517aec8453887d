"""Check, by the trace of a model's operators, which of the layers that are to get gates must not have any, and why.

A class is an integer that stands for units which can be cut only together (:mod:`.units`).
"""

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
    """Find the layers that must not get gates, because none of their output channels may be cut.

    A layer is refused if

    - the example inputs do not reach it in evaluation,
    - something that only training reaches reads its output channels,
    - a copy of the model in which half of its output channels are cut does not run, or computes another function (its
      width enters a number that the code computes, say), or
    - its closed channels are not 0 where activations are added up.

    Args:
        model: the model without gates.
        units: the units that a trace of ``model`` found.
        layers: name -> layer that is to get gates.
        example_inputs: the example inputs of ``model``.
        whole: the names of layers (recurrent ones, attention) whose cut is the matter of other code. Of these it is
            checked whether the example inputs reach them; of recurrent layers also what only training reads.
        known: the names of layers whose cut was tried in a copy before; the third check leaves them out.

    Returns: name of a refused layer -> the reason, in words.
    """
    reasons: dict[str, str] = {}
    free: dict[str, tuple[str, int]] = {}  # layers for the third check -> (parameter, dimension) of their channels
    written: dict[str, set[int]] = {}  # layer -> the classes of its output channels
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
            reason = _why(
                protected, units, [(f"{name}.{attribute}".lstrip("."), 1) for attribute in unit_columns(layer)]
            )
        if reason is not None:
            reasons[name] = reason
    kept = {name: classes for name, classes in written.items() if name not in reasons}
    return reasons | _followed(model, units, free, example_inputs) | _added(model, units, kept, example_inputs)


def _why(protected: dict[int, str], units: Units, sides: Iterable[tuple[str, int]]) -> str | None:
    """Return the reason why a class of one of ``sides`` is protected; None if no class is.

    Args:
        protected: class -> why it may not be cut.
        units: the units of the model.
        sides: pairs (parameter, dimension) of the channels that a layer writes.
    """
    known = (units.classes(name, dim) for name, dim in sides if name in units.alias)
    return next((protected[class_id] for classes in known for class_id in classes if class_id in protected), None)


def _added(model: nn.Module, units: Units, written: dict[str, set[int]], example_inputs: Any) -> dict[str, str]:
    """Find the layers whose closed channels are not 0 where activations are added up or multiplied, as after an exp.

    Args:
        model: the model without gates.
        units: its units.
        written: name of a layer -> the classes of its output channels.
        example_inputs: the inputs of the model.

    Returns: name of a layer -> the reason; {} for a model that cannot be copied, or that needs some of its values.
    """
    summed = set(units.label[units.summed].tolist())
    classes = {class_id for layer_classes in written.values() for class_id in layer_classes if class_id in summed}
    if not classes:
        return {}
    try:
        nonzero = added(model, units, classes, example_inputs)
    except Exception:  # a model that cannot be copied, or that needs some of its values
        return {}
    reason = "its closed channels would not be 0 where activations are added up or multiplied with each other"
    return {name: reason for name, layer_classes in written.items() if not layer_classes.isdisjoint(nonzero)}


def _written(name: str, layer: nn.Module) -> tuple[str, int] | None:
    """Return (parameter, dimension) with which a layer called ``name`` writes its channels; None if its weight is not a
    parameter.
    """
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return None
    return f"{name}.weight" if name else "weight", kind_of(layer).weight_dim(True)


def unreached(name: str, layer: nn.Module, units: Units) -> str | None:
    """Return why the example inputs do not reach a layer in evaluation, where results are compared; None if they do.

    Args:
        name: the name of the layer; "" for the model.
        layer: the layer.
        units: the units of the model.
    """
    prefix = f"{name}." if name else ""
    modes: set[bool] = set()
    for attribute, _ in layer.named_parameters():
        modes |= units.reached.get(units.alias.get(prefix + attribute, ""), set())
    if False in modes:
        return None
    if modes:
        return "example_inputs reach the layer in training alone, so what compact leaves could not be compared"
    untraced = f" (which could not be traced: {units.failed[True]})" if True in units.failed else ""
    return f"example_inputs do not reach the layer, in evaluation or in training{untraced}"


def _followed(model: nn.Module, units: Units, free: dict[str, tuple[str, int]], example_inputs: Any) -> dict[str, str]:
    """Find the layers whose channels a copy of the model cannot do without.

    Half of the channels are cut in the copy, which is traced (:func:`.units.proof.retrace`). The layer fails if the
    copy does not run or computes another function.

    Args:
        model: the model without gates.
        units: its units.
        free: name of a layer -> (parameter, dimension) of the channels that it writes.
        example_inputs: the inputs of the model.

    Returns: name of a layer -> the reason; {} for a model that cannot be copied.
    """
    wanted = {class_id for side in free.values() for class_id in units.classes(*side)}
    clusters = [cluster for cluster in units.clusters if wanted & set(cluster)]
    try:
        differs = retrace(model, units, example_inputs, clusters)
    except Exception:  # a model that cannot be copied, which convert alone does not have to
        return {}
    reasons = {}
    for name, side in free.items():
        reason = next((differs[class_id].text for class_id in units.classes(*side) if class_id in differs), None)
        if reason is not None:
            reasons[name] = reason
    return reasons
