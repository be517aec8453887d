"""Where gated layers would go in a model: which layers get gates, which share them, and why others get none."""

from __future__ import annotations

import itertools
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
from .layer_gates import NORMS, OUTPUT_ONLY, REPLACEMENT, starts_at_one
from .modules import of_kind
from .sight import Sight
from .structure import plain_copy
from .units import Units
from .units.groups import share_of_macs

NO_GATES = "no gates for its width: "


@dataclass
class LayerPlan:
    """What is replaced, by name; which of these share the gate of which; what a gate in a norm saves; what is left out,
    and why.

    ``order``: names in the order of calls, from the graph ``widths``. ``heads``: which of these layers project the
    heads of an attention.
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
    """Layers to replace by their first name, and why others of their kind are not.

    A layer that has several names, or is a part of a transformer layer, is excluded by any of these.
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
    """Why a layer cannot have such gates; None where it can."""
    if (name := computed(layer)) is not None:
        how = (
            "torch.nn.utils.parametrize"
            if parametrize.is_parametrized(layer)
            else "weight_norm, spectral_norm or prune"
        )
        return f"its {name} is computed from other tensors ({how}); wrap the gated layer instead"
    if granularity != "output" and type(layer) in OUTPUT_ONLY:
        return f"{type(layer).__name__} has gates on its {OUTPUT_ONLY[type(layer)]}, with granularity='output'"
    if not isinstance(layer, nn.RNNBase):
        return None
    if per_sample:
        return f"{type(layer).__name__} draws its gates once per call, expected per_sample=False"
    if not layer.proj_size and not starts_at_one(gate):
        return f"fresh gates of {gate!r} are not 1, and nothing in {type(layer).__name__} can make up for them"
    return None


def _is_parametrized(layer: nn.Module) -> bool:
    """Whether torch.nn.utils.parametrize has made a class of its own of a layer that would get gates."""
    return parametrize.is_parametrized(layer) and type(layer).__bases__[0] in REPLACEMENT


def place(
    model: nn.Module,
    chosen: dict[str, nn.Module],
    granularity: Granularity,
    example_inputs: Any,
    tie: bool,
    sight: Sight | None,
) -> LayerPlan:
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
        convolution = next((name for name, layer in chosen.items() if isinstance(layer, nn.modules.conv._ConvNd)), None)
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
    gates: dict[nn.Module, str] = {}  # whose outputs are gated, and the name of the layer that holds the gate
    factors = _factors(chosen, widths)
    wanted = {
        n: layer for n, layer in chosen.items() if not isinstance(layer, nn.MultiheadAttention) and n not in plan.heads
    }
    reasons = {n: factors.get(n) or _why_not(layer, widths, tie, model, example_inputs) for n, layer in wanted.items()}
    free = {n: chosen[n] for n, reason in reasons.items() if reason is None and not isinstance(chosen[n], nn.RNNBase)}
    found: dict[str, str | None] = {}
    if sight is not None:
        found = {n: sight.why_not(m, n) for n, m in free.items() if second_opinion.unreached(n, m, sight.units) is None}
    plan.skipped = {n: reason for n, reason in (reasons | found).items() if reason}
    judged = {n: layer for n, layer in chosen.items() if n not in plan.skipped or n in factors}
    whole = {n for n in judged if n not in wanted or isinstance(judged[n], nn.RNNBase)}
    known = {n for n, reason in found.items() if reason == ""}
    plan.skipped |= second_opinion.refused(widths.traced, widths.units, judged, example_inputs, whole, known)
    for name, layer in chosen.items():
        if name in plan.skipped:
            continue
        if name not in wanted:
            plan.layers[name] = layer
            continue
        places = [names[norm] for norm in _norms_after(layer, widths)] or [name]
        gates[layer] = places[0]
        for place in places:
            plan.layers[place] = model.get_submodule(place)
            if place != places[0]:
                plan.shared_with[place] = places[0]
        if places != [name]:
            own = sum(p.numel() for p in layer.parameters(recurse=False)) / graph.channel_count(layer, True)
            plan.weights_per_gate[places[0]] = own + 2
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


def place_streams(
    plan: LayerPlan, model: nn.Module, gate: Any, include: Filter, exclude: Filter, example_inputs: Any
) -> None:
    """Add the norms of residual streams, the first of each with the gate,
    and say what the layers that write these have to do with it.
    """
    plain = plain_copy(model, example_inputs) if any(of_kind(model, GatedLayer)) else model
    names = {module: name for name, module in reversed(list(plain.named_modules(remove_duplicate=False)))}
    owners = transformer.owners(model)
    found, why = streams.find(
        plain, plan.widths if plain is model and plan.widths else graph.Widths(plain, example_inputs)
    )
    for stream in found:
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
            why |= dict.fromkeys(stream.norms, reason)
            continue
        plan.layers |= places
        plan.shared_with |= dict.fromkeys(others, first)
        # these count for themselves
        in_others = sum(p.numel() for norm in stream.norms[1:] for p in norm.parameters()) / stream.width
        plan.weights_per_gate[first] = stream.weights_per_channel(plain) - in_others
        written = {names[layer] for layer in stream.writers} & plan.skipped.keys()
        plan.skipped |= dict.fromkeys(
            written, f"its outputs are the residual stream, whose gates are in {first!r} and its other norms"
        )
    plan.skipped |= {names[norm]: f"{NO_GATES}{reason}" for norm, reason in why.items()}


def _why_not(layer: nn.Module, widths: graph.Widths, tie: bool, model: nn.Module, example_inputs: Any) -> str | None:
    """Why a layer gets no gates on its outputs; None where it does."""
    if isinstance(layer, nn.RNNBase):
        return recurrent.why_not(
            model, layer, example_inputs, lambda own, gates: REPLACEMENT[type(own)].from_dense(own, gate=gates)
        )
    if graph.is_depthwise(layer):
        return "a depthwise convolution has the channels of the layer before it"
    if layer not in widths:
        return widths.why_absent(layer) if layer in widths.called() else None  # what is not called is judged later
    if widths.reaches_output(layer):
        return "its outputs are the model's own"
    norms, alone = widths.norms_reading(layer)
    weight = next((name for norm in norms if (name := computed(norm)) is not None), None)
    if weight is not None:
        return f"the {weight} of a BatchNorm that reads it is computed from other tensors"
    if norms and not (alone and (tie or len(norms) == 1)):
        others = "other layers read it too" if not alone else "with tie=False these cannot share its gates"
        return f"{len(norms)} BatchNorms make constants of its closed channels, and {others}"
    return widths.why_not(layer)


def _factors(chosen: dict[str, nn.Module], widths: graph.Widths) -> dict[str, str]:
    """Of two layers whose outputs are multiplied channel by channel, the one that needs no gates, and why."""
    names = {layer: name for name, layer in chosen.items()}
    found: dict[str, str] = {}
    for layer, factor in widths.multiplied.items():
        if layer in names and factor in names and names[layer] not in found:
            found[names[factor]] = f"its outputs only multiply those of {names[layer]!r}, whose gates close both"
    return found


def _has_channels(layer: nn.Module, widths: graph.Widths) -> bool:
    """Whether the channels that a layer writes are those of its weight."""
    return layer in widths and not isinstance(layer, nn.RNNBase)


def _norms_after(layer: nn.Module, widths: graph.Widths) -> list[nn.Module]:
    """The norms whose gates switch the outputs of ``layer`` off;
    none where they are better switched off in the layer.
    """
    norms = widths.norms_reading(layer)[0] if _has_channels(layer, widths) else []
    return norms if all(type(norm) in NORMS and computed(norm) is None for norm in norms) else []


def leave_out(plan: LayerPlan, model: nn.Module, reasons: dict[str, str]) -> None:
    """Take layers, and all that are added to them, out of a plan."""
    assert plan.widths is not None
    for name, reason in reasons.items():
        gated = model.get_submodule(name)
        before = plan.widths.layer_before(gated) if isinstance(gated, nn.modules.batchnorm._BatchNorm) else gated
        together = plan.widths.written_together(before or gated)
        for place, own in list(plan.layers.items()):
            norm = isinstance(own, nn.modules.batchnorm._BatchNorm)
            if (plan.widths.layer_before(own) if norm else own) in together:
                del plan.layers[place]
                plan.shared_with.pop(place, None)
                plan.weights_per_gate.pop(place, None)
        names = {layer: name for name, layer in model.named_modules()}
        plan.skipped |= {names[layer]: reason for layer in together}


def gated_classes(units: Units, plan: LayerPlan) -> tuple[dict[str, list[int]], list[str]]:
    """Of each gated layer the class that each gate closes,
    and the names of what loses whole heads or units of a state.
    """
    classes: dict[str, list[int]] = {}
    whole: list[str] = []
    for name, layer in plan.layers.items():
        if name in plan.heads:
            whole.append(plan.heads[name].name)
        elif isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)):
            whole.append(name)
        else:
            named = [f"{name}.{own}".lstrip(".") for own in ("weight", "running_mean")]
            weight = next((own for own in named if own in units.alias), None)
            if weight is not None:
                classes[name] = units.classes(weight, int(isinstance(layer, nn.Embedding)))
    return classes, whole


def share_of_layers(units: Units, plan: LayerPlan) -> float:
    """The share of the multiply-accumulates that gated layers can bring down."""
    classes, whole = gated_classes(units, plan)
    closed = itertools.chain.from_iterable(classes.values())
    total = sum(product.macs for product in units.products)
    inside = sum(p.macs for p in units.products if _is_inside(p.module, whole))
    return share_of_macs(units, closed) + (inside / total if total else 0.0)


def _is_inside(name: str, names: list[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in names)


def multiplies_beside(units: Units, plan: LayerPlan, model: nn.Module) -> bool:
    """Whether code beside layers multiplies what gated layers close: the cost of gated layers is read off layers."""
    gated, whole = gated_classes(units, plan)
    classes = set(itertools.chain.from_iterable(gated.values()))
    layers = (*graph.GEMMS, nn.RNNBase, nn.MultiheadAttention)
    beside = [
        p
        for p in units.products
        if not _is_inside(p.module, whole) and not isinstance(model.get_submodule(p.module), layers)
    ]
    return any(not classes.isdisjoint(units.label[line].tolist()) for p in beside for line in p.factors)


def say_why(plan: LayerPlan, why: dict[str, str]) -> None:
    """Add what the units of a model say of layers to what a plan says of them."""
    # of classes that convert does not know
    said = {name: reason for name, reason in why.items() if reason != unit_gates.UNSAID}
    both = {name: f"{said[name]}; as a layer, {r}" for name, r in plan.skipped.items() if said.get(name, r) != r}
    plan.skipped |= said | {name: r for name, r in plan.skipped.items() if name in said} | both


def check_streams(plan: LayerPlan, model: nn.Module) -> None:
    """Raise where no norm of a plan, or of the model, counts open elements only."""
    planned = any(type(layer) is nn.LayerNorm for layer in plan.layers.values())
    if not planned and not any(getattr(module, "statistics", None) == "open" for module in model.modules()):
        reasons = {name: reason for name, reason in plan.skipped.items() if NO_GATES in reason}
        raise ConversionError(f"residual=True: no width that norms read can have gates {reasons or ''}".rstrip())


def check_left(plan: LayerPlan, model: nn.Module, include: Filter, exclude: Filter) -> None:
    if not plan.layers:
        who = "; its Conv1D layers are known to dampr.integrations.huggingface" if transposed.find(model) else ""
        reasons = f"no layer of {type(model).__name__} is left to convert {plan.skipped or ''}".rstrip()
        raise ConversionError(f"include={include!r}, exclude={exclude!r}: {reasons}{who}")
