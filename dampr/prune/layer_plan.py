"""Where convert puts gates in a model: which layers get gates, which layers share them, and why others get none.

A class is an integer that stands for units which can be cut only together (:mod:`.units`). ``include`` and ``exclude``
are the arguments of :func:`dampr.convert`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from dampr.nn import GatedLayer
from dampr.nn.base import Granularity
from dampr.nn.computed import computed

from . import filters, graph, heads, recurrent, second_opinion, streams, transformer, transposed, unit_gates
from .convert_checks import ConversionError
from .filters import Filter
from .layer_gates import NORMS, REPLACEMENT, starts_at_one
from .layers.convolution import CONVOLUTIONS, is_depthwise
from .layers.recurrent import unit_columns
from .layers.registry import channel_count, counted_in, kind_of
from .modules import has_own_forward, is_exactly, of_kind
from .sight import Sight
from .structure import plain_copy
from .units import Units
from .units.groups import is_inside, share_of_macs

NO_GATES = "no gates for its width: "


@dataclass
class LayerPlan:
    """Which layers of a model are replaced by gated ones. Layers go by their names.

    Attributes:
        layers: the layers that are replaced.
        shared_with: layer -> the layer whose gate it uses too.
        weights_per_gate: norm with gates -> how many weights one gate saves; other layers know this themselves.
        skipped: layer that is left out -> why.
        order: all layers in the order in which they were first called.
        widths: the widths of the model; None if it was not traced.
        heads: those of the layers that project the heads of an attention -> this attention.
    """

    layers: dict[str, nn.Module]
    shared_with: dict[str, str]
    weights_per_gate: dict[str, float]
    skipped: dict[str, str]
    order: list[str]
    widths: graph.Widths | None = None
    heads: dict[str, heads.Attention] = field(default_factory=dict)


def choose(
    model: nn.Module, gate: Any, granularity: Granularity, per_sample: bool, include: Filter, exclude: Filter
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Choose the layers to replace, from their types and the arguments of convert alone.

    If ``exclude`` matches any name of a layer, or a transformer layer or attention around it, the layer is left out.

    Args:
        model: the model; not changed.
        gate, granularity, per_sample, include, exclude: the arguments of :func:`dampr.convert`.

    Returns: first name -> layer, and for layers that cannot have such gates, first name -> why.
    """
    names: dict[nn.Module, list[tuple[str, nn.Module]]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if type(layer) in REPLACEMENT or _is_parametrized(layer):
            names.setdefault(layer, []).append((name, layer))
    chosen, skipped, owners, attentions = {}, {}, transformer.owners(model), heads.parts(model)
    for layer, aliases in names.items():
        attention = attentions.get(layer)
        above = owners.get(layer, []) + ([(attention.name, attention.module)] if attention else [])
        if not filters.wanted(aliases + above, include, exclude):
            continue
        reason = _unfit(layer, gate, granularity, per_sample) or transformer.left_out(
            layer, owners.get(layer, []), granularity
        )
        reason = reason or heads.left_out(layer, attention, granularity, per_sample)
        if reason is None:
            chosen[aliases[0][0]] = layer
        else:
            skipped[aliases[0][0]] = reason
    return chosen, skipped


def _unfit(layer: nn.Module, gate: Any, granularity: Granularity, per_sample: bool) -> str | None:
    """Return why a layer cannot have gates of this kind and granularity; None if it can.

    Args:
        layer: the layer.
        gate, granularity, per_sample: the arguments of :func:`dampr.convert`.
    """
    if has_own_forward(layer):
        return "its forward was set on the object, and no layer with gates computes that"
    if any(p.is_complex() for p in layer.parameters(recurse=False)):
        return "its weights are complex, and layers with gates compute with real ones"
    if (name := computed(layer)) is not None:
        how = (
            "torch.nn.utils.parametrize"
            if parametrize.is_parametrized(layer)
            else "weight_norm, spectral_norm or prune"
        )
        return f"its {name} is computed from other tensors ({how}); wrap the gated layer instead"
    if granularity != "output" and kind_of(layer).gated_parts:
        return f"{type(layer).__name__} has gates on its {kind_of(layer).gated_parts}, with granularity='output'"
    if not kind_of(layer).recurrent:
        return None
    if per_sample:
        return f"{type(layer).__name__} draws its gates once per call, expected per_sample=False"
    if not layer.proj_size and not starts_at_one(gate):
        return f"fresh gates of {gate!r} are not 1, and nothing in {type(layer).__name__} can make up for them"
    return None


def _is_parametrized(layer: nn.Module) -> bool:
    """Return whether a layer would get gates but for torch.nn.utils.parametrize, which replaced its type by a
    subclass.
    """
    return parametrize.is_parametrized(layer) and type(layer).__bases__[0] in REPLACEMENT


def place(
    model: nn.Module,
    chosen: dict[str, nn.Module],
    granularity: Granularity,
    example_inputs: Any,
    tie: bool,
    sight: Sight | None,
) -> LayerPlan:
    """Plan where the gates of the layers ``chosen`` go, and which of these layers are left out after all.

    Without example inputs, or with another granularity than "output", each layer gets its own gates.

    Args:
        model: the model; not changed.
        chosen: name -> layer, as :func:`choose` returns them.
        granularity: what one gate multiplies.
        example_inputs: the inputs by which the model is followed; None if there are none.
        tie: whether layers whose outputs are added up share their gates.
        sight: what tracing the units of the model showed; None if they were not traced.

    Raises: ValueError if a convolution needs example inputs to find the BatchNorm after it, and there are none; what
    following the model raises.
    """
    plan = LayerPlan(dict(chosen), {}, {}, {}, list(chosen))
    if granularity == "input" and sight is not None:
        plan.skipped = {
            name: reason for name, layer in chosen.items() if (reason := sight.why_not_read(layer, name)) is not None
        }
        plan.layers = {name: layer for name, layer in chosen.items() if name not in plan.skipped}
    if granularity != "output":
        return plan
    attentions = heads.parts(model)
    plan.heads = {name: attentions[layer] for name, layer in chosen.items() if layer in attentions}
    if example_inputs is None:
        convolution = next((name for name, layer in chosen.items() if isinstance(layer, CONVOLUTIONS)), None)
        if convolution and any(type(m) in NORMS for m in model.modules()):
            raise ValueError(
                f"example_inputs=None: expected them, to find the BatchNorm that the gates of layer {convolution!r} "
                "belong after"
            )
        return plan
    plain = plain_copy(model, example_inputs) if any(of_kind(model, GatedLayer)) else None
    widths = graph.Widths(model, example_inputs, sight.units if sight is not None else None, plain)
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    plan.layers, plan.order, plan.widths = {}, [names[module] for module in widths.called()], widths
    by_channel = {n: layer for n, layer in chosen.items() if not kind_of(layer).attends and n not in plan.heads}
    plan.skipped = _refused(model, chosen, by_channel, widths, tie, example_inputs, sight)
    gates = _enter(plan, model, chosen, by_channel, widths)
    if tie:
        for layer, place in gates.items():
            together = (
                [gates[other] for other in widths.written_together(layer) if other in gates]
                if _has_channels(layer, widths)
                else []
            )
            if together and together[0] != place:
                plan.shared_with[place] = together[0]
    return plan


def _refused(
    model: nn.Module,
    chosen: dict[str, nn.Module],
    by_channel: dict[str, nn.Module],
    widths: graph.Widths,
    tie: bool,
    example_inputs: Any,
    sight: Sight | None,
) -> dict[str, str]:
    """Find the layers of ``chosen`` that get no gates after all, and why.

    Args:
        model, chosen, tie, example_inputs, sight: as for :func:`place`.
        by_channel: those of ``chosen`` that lose single channels or units, not heads of an attention.
        widths: the widths of the model.

    Returns: name -> the reason.
    """
    factors = _factors(chosen, widths)
    reasons = {
        n: factors.get(n) or _why_not(layer, widths, tie, model, example_inputs) for n, layer in by_channel.items()
    }
    free = {n: chosen[n] for n, reason in reasons.items() if reason is None and not kind_of(chosen[n]).recurrent}
    tried: dict[str, str | None] = {}  # what came of a cut: why it fails, "" if it works, None if it was not tried
    if sight is not None:
        tried = {n: sight.why_not(m, n) for n, m in free.items() if second_opinion.unreached(n, m, sight.units) is None}
    skipped = {n: reason for n, reason in (reasons | tried).items() if reason}
    judged = {n: layer for n, layer in chosen.items() if n not in skipped or n in factors}
    # attentions and recurrent layers, whose cut other code judges; and layers whose cut was tried above
    whole = {n for n in judged if n not in by_channel or kind_of(judged[n]).recurrent}
    known = {n for n, reason in tried.items() if reason == ""}
    return skipped | second_opinion.refused(widths.traced, widths.units, judged, example_inputs, whole, known)


def _enter(
    plan: LayerPlan,
    model: nn.Module,
    chosen: dict[str, nn.Module],
    by_channel: dict[str, nn.Module],
    widths: graph.Widths,
) -> dict[nn.Module, str]:
    """Enter the layers that are not skipped into ``plan``, with gates in them or in the norms after them.

    Args:
        plan: the plan, with all layers that are skipped; changed in place.
        model, chosen, by_channel, widths: as for :func:`_refused`.

    Returns: layer whose outputs are gated -> name of the layer, or the first norm, that holds the gate.
    """
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    gates: dict[nn.Module, str] = {}
    for name, layer in chosen.items():
        if name in plan.skipped:
            continue
        if name not in by_channel:
            plan.layers[name] = layer
            continue
        places = [names[norm] for norm in _norms_after(layer, widths)] or [name]
        gates[layer] = places[0]
        for place in places:
            plan.layers[place] = model.get_submodule(place)
            if place != places[0]:
                plan.shared_with[place] = places[0]
        if places != [name]:
            weights_per_channel = sum(p.numel() for p in layer.parameters(recurse=False)) / channel_count(layer, True)
            plan.weights_per_gate[places[0]] = weights_per_channel + 2  # a norm has a gain and a bias
    return gates


def place_streams(
    plan: LayerPlan, model: nn.Module, gate: Any, include: Filter, exclude: Filter, example_inputs: Any
) -> None:
    """Add the norms of residual streams to ``plan``; the first norm of each stream holds the gate of all.

    Layers that write a stream, and norms whose stream gets no gates, get a reason in ``plan.skipped``.

    Args:
        plan: the plan; changed in place.
        model: the model.
        gate, include, exclude: the arguments of :func:`dampr.convert`.
        example_inputs: the inputs by which the model is followed.
    """
    plain = plain_copy(model, example_inputs) if any(of_kind(model, GatedLayer)) else model
    names = {module: name for name, module in reversed(list(plain.named_modules(remove_duplicate=False)))}
    owners = transformer.owners(model)
    found_streams, refused = streams.find(
        plain, plan.widths if plain is model and plan.widths else graph.Widths(plain, example_inputs)
    )
    for stream in found_streams:
        places = {names[norm]: model.get_submodule(names[norm]) for norm in stream.norms}
        first, *others = places
        gated = [name for name, norm in places.items() if isinstance(norm, GatedLayer)]
        left_out = [
            name
            for name, norm in places.items()
            if not filters.wanted([(name, norm), *owners.get(norm, [])], include, exclude)
        ]
        reason = f"{gated[0]!r} has gates already" if gated else f"{left_out[0]!r} is left out" if left_out else None
        bare = next((name for name, norm in places.items() if norm.weight is None), None)
        if bare is not None and not starts_at_one(gate):
            reason = (
                reason or f"fresh gates of {gate!r} are not 1, and {bare!r} has no gain that could make up for them"
            )
        reason = reason or streams.why_not(plain, stream, example_inputs)
        if reason is not None:
            refused |= dict.fromkeys(stream.norms, reason)
            continue
        plan.layers |= places
        plan.shared_with |= dict.fromkeys(others, first)
        # The other norms count their own parameters.
        in_others = sum(p.numel() for norm in stream.norms[1:] for p in norm.parameters()) / stream.width
        plan.weights_per_gate[first] = stream.weights_per_channel(plain) - in_others
        written = {names[layer] for layer in stream.writers} & plan.skipped.keys()
        plan.skipped |= dict.fromkeys(
            written, f"its outputs are the residual stream, whose gates are in {first!r} and its other norms"
        )
    plan.skipped |= {names[norm]: f"{NO_GATES}{reason}" for norm, reason in refused.items()}


def _why_not(layer: Any, widths: graph.Widths, tie: bool, model: nn.Module, example_inputs: Any) -> str | None:
    """Return why a layer gets no gates on its outputs; None if it gets some, or if it is judged later.

    Args:
        layer: the layer.
        widths: the widths of the model.
        tie: whether layers and norms may share gates.
        model: the model.
        example_inputs: the inputs by which the model is followed.
    """
    if kind_of(layer).recurrent:
        return recurrent.why_not(model, layer, example_inputs)
    if is_depthwise(layer):
        return "a depthwise convolution has the channels of the layer before it"
    if layer not in widths:  # a layer that is not called is judged later
        return widths.why_absent(layer) if layer in widths.called() else None
    if widths.reaches_output(layer):
        return "its outputs are the model's own"
    norms, no_others = widths.norms_reading(layer)
    weight = next((name for norm in norms if (name := computed(norm)) is not None), None)
    if weight is not None:
        return f"the {weight} of a BatchNorm that reads it is computed from other tensors"
    if norms and not (no_others and (tie or len(norms) == 1)):
        others = "other layers read it too" if not no_others else "with tie=False these cannot share its gates"
        return f"{len(norms)} BatchNorms make constants of its closed channels, and {others}"
    return widths.why_not(layer)


def _factors(chosen: dict[str, nn.Module], widths: graph.Widths) -> dict[str, str]:
    """Find pairs of layers whose outputs are multiplied channel by channel. The gates of the first layer close the
    channels of both.

    Args:
        chosen: name -> layer; both layers of a pair are among them.
        widths: the widths of the model.

    Returns: the name of each second layer -> why it needs no gates.
    """
    names = {layer: name for name, layer in chosen.items()}
    reasons: dict[str, str] = {}
    for layer, factor in widths.multiplied.items():
        if layer in names and factor in names and names[layer] not in reasons:
            reasons[names[factor]] = f"its outputs only multiply those of {names[layer]!r}, whose gates close both"
    return reasons


def _has_channels(layer: nn.Module, widths: graph.Widths) -> bool:
    """Return whether ``widths`` knows the channels that a layer writes, one for each index of its weight."""
    return layer in widths and not kind_of(layer).recurrent


def _norms_after(layer: nn.Module, widths: graph.Widths) -> list[nn.Module]:
    """Return the BatchNorms that get the gates on the outputs of ``layer``.

    Empty if the layer itself gets the gates, because no norm reads it or one of the norms cannot have gates.
    """
    norms = widths.norms_reading(layer)[0] if _has_channels(layer, widths) else []
    return norms if all(is_exactly(norm, NORMS) and computed(norm) is None for norm in norms) else []


def leave_out(plan: LayerPlan, model: nn.Module, reasons: dict[str, str]) -> None:
    """Take layers out of a plan, and with them all layers that are added to them.

    Args:
        plan: the plan, of a model that was traced; changed in place.
        model: the model.
        reasons: name of a layer to take out -> why.
    """
    assert plan.widths is not None
    for name, reason in reasons.items():
        gated = model.get_submodule(name)
        before = plan.widths.layer_before(gated) if kind_of(gated).batch_statistics else gated
        together = plan.widths.written_together(before or gated)
        for place, planned in list(plan.layers.items()):
            if (plan.widths.layer_before(planned) if kind_of(planned).batch_statistics else planned) in together:
                del plan.layers[place]
                plan.shared_with.pop(place, None)
                plan.weights_per_gate.pop(place, None)
        names = {layer: name for name, layer in model.named_modules()}
        plan.skipped |= {names[layer]: reason for layer in together}


def idle(plan: LayerPlan) -> dict[str, str]:
    """Find the norms of a plan whose gates would cut nothing, because no layer alone writes or reads what they
    multiply.

    Norms that share gates are found only if that holds for all of them.

    Returns: name of a norm -> why; {} for a model that was not traced.
    """
    if plan.widths is None:
        return {}
    vectors = defaultdict[str, list[str]](list)
    for name in plan.layers:
        vectors[plan.shared_with.get(name, name)].append(name)
    reasons: dict[str, str] = {}
    for names in vectors.values():
        layers = [plan.layers[name] for name in names]
        if all(kind_of(layer).batch_statistics and not plan.widths.around(layer) for layer in layers):
            reasons |= dict.fromkeys(names, "no layer alone writes or reads what this norm gates")
    return reasons


def leave_out_shared(plan: LayerPlan, model: nn.Module, units: Units, exclude: Filter) -> None:
    """Take layers out of a plan whose width an excluded layer writes too, because that would be cut with them.

    Args:
        plan: the plan; changed in place.
        model: the model.
        units: its partition into classes.
        exclude: the argument of :func:`dampr.convert`.
    """
    reason = "exclude leaves out a layer that writes its width too"
    for name, classes in gated_classes(units, plan)[0].items():
        if name in plan.layers and len(unit_gates.wanted(model, units, classes, None, exclude)) < len(classes):
            leave_out(plan, model, {name: reason})


def gated_classes(units: Units, plan: LayerPlan) -> tuple[dict[str, list[int]], list[str]]:
    """Find what the gates of a plan close.

    Args:
        units: the partition of the model into classes.
        plan: the plan.

    Returns: (name of a gated layer -> the class that each of its gates closes, in order; the names of the attentions
    that lose whole heads and of the layers that lose units of a recurrent state).
    """
    classes: dict[str, list[int]] = {}
    whole: list[str] = []
    for name, layer in plan.layers.items():
        if name in plan.heads:
            whole.append(plan.heads[name].name)
        elif kind_of(layer).gates_units:
            whole.append(name)
        else:
            named = [f"{name}.{attribute}".lstrip(".") for attribute in ("weight", "running_mean")]
            weight = next((attribute for attribute in named if attribute in units.alias), None)
            if weight is not None:
                classes[name] = units.classes(weight, kind_of(layer).weight_dim(True))
    return classes, whole


def share_of_layers(units: Units, plan: LayerPlan) -> float:
    """Return the share, 0 to 1, of the multiply-accumulates of the model that the gates of a plan can save."""
    classes, whole = gated_classes(units, plan)
    closed = itertools.chain(*classes.values(), _recurrent_classes(units, plan))
    return share_of_macs(units, closed, whole)


def _recurrent_classes(units: Units, plan: LayerPlan) -> Iterator[int]:
    """Yield the classes that the gates of recurrent layers close: those of the outputs of each layer and direction."""
    for name, layer in plan.layers.items():
        for attribute in unit_columns(layer) if kind_of(layer).recurrent else ():
            if (full := f"{name}.{attribute}".lstrip(".")) in units.alias:
                yield from units.classes(full, 1)


def multiplies_beside(units: Units, plan: LayerPlan, model: nn.Module) -> bool:
    """Return whether code outside of layers multiplies channels that the gates of a plan close.

    The cost of a model with gated layers misses such products, because it is computed from layers.
    """
    gated, whole = gated_classes(units, plan)
    classes = set(itertools.chain.from_iterable(gated.values()))
    counted = {layer for _, layer, _ in counted_in(model)}
    products_beside = [
        product
        for product in units.products
        if not is_inside(product.module, whole) and model.get_submodule(product.module) not in counted
    ]
    return any(
        not classes.isdisjoint(units.label[factor].tolist())
        for product in products_beside
        for factor in product.factors
    )


def say_why(plan: LayerPlan, why: dict[str, str]) -> None:
    """Add to ``plan.skipped`` the reasons that the units of the model give.

    A layer that has a reason already gets both.

    Args:
        plan: the plan; changed in place.
        why: name of a layer -> the reason.
    """
    # UNSAID says only that no step gave a reason, so it adds nothing.
    told = {name: reason for name, reason in why.items() if reason != unit_gates.UNSAID}
    combined = {name: f"{told[name]}; as a layer, {r}" for name, r in plan.skipped.items() if told.get(name, r) != r}
    plan.skipped |= told | {name: r for name, r in plan.skipped.items() if name in told} | combined


def name_others(plan: LayerPlan, model: nn.Module, sight: Sight, include: Filter, exclude: Filter) -> None:
    """Add to ``plan.skipped`` the layers of types that the plan does not know, for example of classes derived from
    torch's, or that the filters leave out, if what they write gets no gates.

    Args:
        plan: the plan; changed in place.
        model: the model.
        sight: what tracing its units showed.
        include, exclude: the arguments of :func:`dampr.convert`.
    """
    closed, whole = gated_classes(sight.units, plan)
    known = [*whole, *plan.layers, *plan.skipped]
    gated = set(itertools.chain.from_iterable(closed.values()))
    for name, reason in unit_gates.left_out(model, sight.units, sight.placement, gated).items():
        wanted = not name or filters.wanted(unit_gates.above(model, name), include, exclude)
        if not wanted or (name and not is_inside(name, known)):
            kind = type(model.get_submodule(name)).__name__
            unsaid = f"no layer with gates stands for a {kind}" if wanted else "include or exclude leaves it out"
            plan.skipped[name] = unsaid if reason == unit_gates.UNSAID or not wanted else reason


def check_streams(plan: LayerPlan, model: nn.Module) -> None:
    """Raise ConversionError if neither the plan nor the model has a norm whose statistics count open channels only."""
    planned = any(type(layer) is nn.LayerNorm for layer in plan.layers.values())
    if not planned and not any(getattr(module, "statistics", None) == "open" for module in model.modules()):
        reasons = {name: reason for name, reason in plan.skipped.items() if NO_GATES in reason}
        raise ConversionError(f"residual=True: no width that norms read can have gates {reasons or ''}".rstrip())


def check_left(plan: LayerPlan, model: nn.Module, include: Filter, exclude: Filter) -> None:
    """Raise ConversionError if the plan replaces no layer."""
    if not plan.layers:
        who = "; its Conv1D layers are known to dampr.integrations.huggingface" if transposed.find(model) else ""
        reasons = f"no layer of {type(model).__name__} is left to convert {plan.skipped or ''}".rstrip()
        raise ConversionError(f"include={include!r}, exclude={exclude!r}: {reasons}{who}")
