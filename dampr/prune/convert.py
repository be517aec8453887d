"""convert: gated layers in the place of dense ones, in the same model object, or no change at all."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from dampr import _checks
from dampr.gates import DependencyGenerator, Gate, make_gate
from dampr.gates.draws import share_generator
from dampr.nn import (
    GatedBatchNorm1d,
    GatedBatchNorm2d,
    GatedBatchNorm3d,
    GatedConv1d,
    GatedConv2d,
    GatedConv3d,
    GatedEmbedding,
    GatedGRU,
    GatedHeads,
    GatedLayer,
    GatedLayerNorm,
    GatedLinear,
    GatedLSTM,
    GatedMultiheadAttention,
    GatedRNN,
    GatedSyncBatchNorm,
)
from dampr.nn.base import VECTOR_GRANULARITIES, Granularity
from dampr.nn.computed import computed, settled

from . import filters, graph, heads, inputs, rectified, recurrent, second_opinion, streams, transformer, transposed, unit_gates, wrapped
from .convert_checks import (
    ConversionError,
    StuckError,
    UnprovenError,
    check_called,
    check_half,
    check_none_stuck,
    check_unchanged,
    constants_left,
    may_leave_constants,
)
from .filters import Filter
from .inputs import Model
from .sight import Sight, look, with_open_norms
from .structure import plain_copy
from .unit_gates import Placement
from .units import Units, remembering
from .units.groups import share_of_macs

_REPLACEMENT: dict[type, Any] = {
    nn.Linear: GatedLinear,
    nn.Conv1d: GatedConv1d,
    nn.Conv2d: GatedConv2d,
    nn.Conv3d: GatedConv3d,
    nn.MultiheadAttention: GatedMultiheadAttention,
    nn.Embedding: GatedEmbedding,
    nn.LSTM: GatedLSTM,
    nn.GRU: GatedGRU,
    nn.RNN: GatedRNN,
}
_OUTPUT_ONLY = {nn.MultiheadAttention: "heads", nn.Embedding: "columns", nn.LSTM: "units", nn.GRU: "units", nn.RNN: "units"}
_NORMS: dict[type, Any] = {
    nn.BatchNorm1d: GatedBatchNorm1d,
    nn.BatchNorm2d: GatedBatchNorm2d,
    nn.BatchNorm3d: GatedBatchNorm3d,
    nn.SyncBatchNorm: GatedSyncBatchNorm,
}
_GATED: dict[type, Any] = {**_REPLACEMENT, **_NORMS, nn.LayerNorm: GatedLayerNorm}


WORTH = 0.001  # of a model's multiply-accumulates: gated layers, which have fused kernels, are taken unless others reach that much more

_NO_GATES = "no gates for its width: "


@settled
def convert(
    model: Model,
    example_inputs: Any = None,
    *,
    gate: str | type[Gate] | Callable[..., Any] = "hard_concrete",
    granularity: Granularity = "output",
    per_sample: bool | None = None,
    include: Filter = None,
    exclude: Filter = None,
    tie: bool = True,
    residual: bool = False,
) -> Model:
    """Replace dense layers of ``model`` by gated ones, in place, keeping their parameters (and any optimizer that holds them) valid.

    Args:
        model: any module; layers whose type is exactly ``nn.Linear`` or ``nn.Conv1d`` to 3d are replaced, and for output gates
            ``nn.Embedding`` (its columns), ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` (their units) and ``nn.MultiheadAttention`` (its heads);
            of recurrent layers those whose outputs linear and recurrent layers alone read. (A bare layer cannot change in place: use what
            is returned.) An
            ``nn.TransformerEncoderLayer`` or ``nn.TransformerDecoderLayer`` around such layers becomes the gated one of :mod:`dampr.nn`,
            which has no fused path; output gates are then on its heads and on its feed-forward neurons.
        gate, granularity, per_sample: as in :class:`dampr.nn.GatedLinear` and :class:`dampr.nn.GatedConv2d`. Also a function of
            (number of gates, device), such as ``functools.partial(HardConcrete, preset="median")``. ``"dep_l0"`` makes one generator for
            all layers, in the order in which the example inputs reach them, with ``init_scale=0``, so that every gate starts open;
            ``functools.partial(DependencyGenerator, direction="backward")`` makes another. Published is ``init_scale=1``, which would
            close 7 % of the gates at once. ``per_sample=None``: as the family was published, which is a draw per sample for ``"dep_l0"``
            (in the layers that can: not recurrent ones, not heads of linear layers, not with ``residual=True``), else one per call.
        include, exclude: name globs ("encoder.*") and types; None includes everything and excludes nothing. What hits a transformer layer
            hits its parts.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them, output gates go into the BatchNorm that
            follows a layer (in all that read a residual stream), which takes in the ``nn.ReLU`` that alone reads it, if there is one (a
            :class:`dampr.nn.TakenReLU` then stands there), leave out layers whose channels nothing can cut (the classifier, what a
            LayerNorm reads, a layer that is called twice, one whose outputs are viewed as heads: tried in a copy), and before the function
            returns it is proven that evaluation outputs are unchanged (to rounding) and that no gated layer's weight is read without
            calling the layer. Needed by models that have both convolutions and BatchNorms, for output gates.
        tie: with example inputs, layers whose outputs are added up share one gate vector, because a channel of the sum can be cut only
            where all of them close it. False: each has gates of its own.
        residual: with example inputs, output gates also for widths that norms count, above all the residual stream of a
            transformer: one gate vector for all norms of the stream, drawn once per call of each. Where LayerNorms alone
            read it, the gates are in these (``GatedLayerNorm(statistics="open")``). Else they are on the parameters that
            read the stream, and norms of any type count open units only (:class:`dampr.nn.OpenStatistics`). A stream that
            is the model's input or output is left out. Half of its channels are cut in a copy to see that they can be.

    With example inputs, output gates, one draw per call and ties, the model's operators are traced too
    (:func:`dampr.prune.units.trace_units`). Where gates on the parameters that read units (:class:`dampr.nn.GatedParameter`) reach more of
    the multiply-accumulates than gated layers would, or gated layers would not compact as foretold, the model gets those instead, whatever
    its layers are; numbers that code keeps beside parameters and that follow a width are then in its attribute ``dampr_sizes``.

    In a process group of several ranks the gates get a generator that all ranks have (:func:`dampr.gate_generator`), so that they draw the
    same gates. Convert before the model is wrapped (DistributedDataParallel) or sharded (``fully_shard``).

    Returns: ``model``. Its attribute ``dampr_skipped`` says of each layer that was left out why.

    Raises: ConversionError when nothing matches, ``residual=True`` finds no such width, outputs changed, a layer is bypassed or
    the model cannot be traced; ValueError or TypeError that names the argument; what the model itself raises on the example
    inputs. Whatever is raised, the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.80}: expected a torch.nn.Module")
    if example_inputs is not None and "_orig_mod" in model._modules:
        raise TypeError("model is what torch.compile returned: expected the module itself; convert it, then compile")
    if "_orig_mod" not in model._modules:
        wrapped.check_bare(model, "gates are new parameters of it")
    if isinstance(gate, Gate):
        raise TypeError(
            f"gate={type(gate).__name__} instance: expected a family's name or a class, because each layer gets a gate of its own"
        )
    if isinstance(granularity, torch.Tensor):
        raise TypeError("granularity: got a tensor, which is of one weight (from_dense takes it); expected a name or (rows, cols)")
    if not isinstance(gate, str) and not callable(gate):
        raise TypeError(f"gate={gate!r:.80}: expected a family's name, a subclass of dampr.gates.Gate or a function that makes one")
    if isinstance(granularity, tuple):
        _checks.block_count("granularity", granularity, 1, 1)
    else:
        _checks.one_of("granularity", granularity, ("output", "input", "weight"))
    for name, switch in (("tie", tie), ("residual", residual), ("per_sample", False if per_sample is None else per_sample)):
        _checks.flag(name, switch)
    if residual and (granularity != "output" or per_sample or example_inputs is None):
        given = f"granularity={granularity!r}, per_sample={per_sample}, example_inputs{'=None' if example_inputs is None else ' given'}"
        raise ValueError(f"residual=True with {given}: expected granularity 'output', one draw per call, and example inputs")
    if example_inputs is not None and any(t.is_meta for t in itertools.chain(model.parameters(), model.buffers())):
        raise ConversionError(
            "model is on the meta device, so it has no outputs on example_inputs: expected a model with values, or example_inputs=None"
        )
    if example_inputs is not None:
        inputs.check(example_inputs)
    with inputs.unsynced(model), remembering():
        return cast(Model, _ready(_with_gates(model, gate, granularity, per_sample, include, exclude, example_inputs, tie, residual)))


def _with_gates(
    model: nn.Module,
    gate: Any,
    granularity: Granularity,
    per_sample: bool | None,
    include: Filter,
    exclude: Filter,
    example_inputs: Any,
    tie: bool,
    residual: bool,
) -> nn.Module:
    """:func:`convert` of arguments that are checked."""
    each = _draws_each(gate, granularity, residual) if per_sample is None else per_sample
    before = None
    if example_inputs is not None:
        with inputs.same_noise(model), inputs.unfused():
            before = inputs.comparable(model, example_inputs)
    chosen, skipped = _choose(model, gate, granularity, bool(per_sample), include, exclude)
    plan, untraced = None, None
    seen = look(model, example_inputs) if granularity in VECTOR_GRANULARITIES and example_inputs is not None else None
    try:
        plan = _place(model, chosen, granularity, example_inputs, tie, seen)
    except graph.TracingError as error:
        untraced = error
    by_units = None
    may_have_units = seen is not None and granularity == "output" and tie and not per_sample and not residual
    if seen is not None and may_have_units:
        placement = unit_gates.only(model, seen.units, seen.placement, include, exclude)
        if placement.groups:
            by_units = functools.partial(_convert_by_units, model, seen.units, placement, gate, before or [], example_inputs)
            known = plan is not None and bool(heads.find(model))  # models of transformers, whose folders and configs follow gated layers
            share = share_of_macs(seen.units, placement.classes())
            reached = 0.0 if plan is None else _reached(seen.units, plan)
            exact = plan is None or share < reached - WORTH or not _multiplies_beside(seen.units, plan, model)
            if not known and (share > reached + WORTH * (plan is not None) or not exact):
                return by_units()
    if plan is None:
        raise ConversionError(str(untraced)) from untraced
    plan.skipped |= skipped
    if residual:
        _place_streams(plan, model, gate, include, exclude, example_inputs)
        by_norms = None if seen is None or not tie else _streams_by_units(seen.units, plan, model, include, exclude, example_inputs)
        if by_norms is not None:
            return _convert_by_units(model, *by_norms, gate, before or [], example_inputs)
        _check_streams(plan, model)
    if not plan.layers and seen is not None and may_have_units and by_units is None:
        by_norms = _streams_by_units(seen.units, plan, model, include, exclude, example_inputs)
        if by_norms is not None:  # widths that nothing but norms stand in the way of
            return _convert_by_units(model, *by_norms, gate, before or [], example_inputs)
        _say_why(plan, unit_gates.left_out(model, seen.units, placement))
    _check_left(plan, model, include, exclude)
    units = seen.units if seen is not None else None
    try:
        return _convert_by_layers(model, plan, gate, granularity, each, before, example_inputs, by_units is not None, units=units)
    except UnprovenError:
        if by_units is None:
            raise
    except StuckError as error:
        _leave_out(plan, model, error.reasons)
        _check_left(plan, model, include, exclude)
        return _convert_by_layers(model, plan, gate, granularity, each, before, example_inputs, look_for_stuck=False)
    return by_units()


def _streams_by_units(
    units: Units, plan: _Plan, model: nn.Module, include: Filter, exclude: Filter, example_inputs: Any
) -> tuple[Units, Placement] | None:
    """Gates on the parameters that read units, where these and norms of open units reach more residual widths than a plan of layers."""
    opened, placement = with_open_norms(model, units, example_inputs)
    placement = unit_gates.only(model, opened, placement, include, exclude)
    by_layers = {one for name, line in units.counted if name in plan.layers for one in units.label[line].tolist()}
    by_units = [one for one in placement.classes() if one in units.statistics]
    more = len(by_units) - len(by_layers)
    if not more and by_units and not heads.find(model):  # attention that gated layers do not know, say
        more = int(share_of_macs(opened, placement.classes()) > _reached(opened, plan) + WORTH)
    return (opened, placement) if more > 0 else None


def _say_why(plan: _Plan, why: dict[str, str]) -> None:
    """Add what the units of a model say of layers to what a plan says of them."""
    said = {name: reason for name, reason in why.items() if reason != unit_gates.UNSAID}  # of classes that convert does not know
    both = {name: f"{said[name]}; as a layer, {r}" for name, r in plan.skipped.items() if said.get(name, r) != r}
    plan.skipped |= said | {name: r for name, r in plan.skipped.items() if name in said} | both


def _check_streams(plan: _Plan, model: nn.Module) -> None:
    """Raise where no norm of a plan, or of the model, counts open elements only."""
    planned = any(type(layer) is nn.LayerNorm for layer in plan.layers.values())
    if not planned and not any(getattr(module, "statistics", None) == "open" for module in model.modules()):
        reasons = {name: reason for name, reason in plan.skipped.items() if _NO_GATES in reason}
        raise ConversionError(f"residual=True: no width that norms read can have gates {reasons or ''}".rstrip())


def _check_left(plan: _Plan, model: nn.Module, include: Filter, exclude: Filter) -> None:
    if not plan.layers:
        who = "; its Conv1D layers are known to dampr.integrations.huggingface" if transposed.find(model) else ""
        reasons = f"no layer of {type(model).__name__} is left to convert {plan.skipped or ''}".rstrip()
        raise ConversionError(f"include={include!r}, exclude={exclude!r}: {reasons}{who}")


def _leave_out(plan: _Plan, model: nn.Module, reasons: dict[str, str]) -> None:
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


def _ready(model: nn.Module) -> nn.Module:
    """A converted model, whose gates draw alike on all ranks."""
    share_generator(model)
    return model


def _convert_by_layers(
    model: nn.Module,
    plan: _Plan,
    gate: Any,
    granularity: Granularity,
    each: bool,
    before: list[torch.Tensor] | None,
    example_inputs: Any,
    prove: bool = False,
    look_for_stuck: bool = True,
    units: Units | None = None,
) -> nn.Module:
    """Put gated layers in; whatever is raised, the model is as it was.

    ``prove``: raise where half of them cannot be cut as foretold; ``look_for_stuck``: where closed channels of some could never go.
    ``units``: of the model, where they are known.
    """
    gates, in_its_precision = _generated(gate, plan, model, granularity), _precise(gate, model)
    values = {p: p.data for name in plan.layers for p in model.get_submodule(name).parameters()}
    gated: dict[str, Any] = {}
    adopted: dict[nn.Module, Any] = {}
    relus: dict[nn.Module, nn.Module] = {}
    try:
        for name, layer in plan.layers.items():
            shared = gated.get(plan.shared_with.get(name, ""))
            own = gates.get(name, in_its_precision) if shared is None else shared.gate
            if not isinstance(own, Gate) and next(itertools.chain(layer.parameters(), layer.buffers()), None) is None:
                own = make_gate(own, _gate_count(layer, granularity), _device(model))  # a norm without gain does not know where it is
            gated[name] = _gated(name, layer, own, granularity, each, plan.heads.get(name))
            if name in plan.weights_per_gate:
                gated[name].weights_per_gate = plan.weights_per_gate[name]
        if "" in gated:
            bare: nn.Module = gated[""]
            return bare
        if before is not None:
            relus = rectified.take_in(model, {plan.layers[name]: gated[name] for name in gated}, example_inputs)
        inputs.replace(model, relus | {plan.layers[name]: gated[name] for name in gated})
        adopted = transformer.adopt(model)
        if before is not None:
            check_unchanged(model, gated, before, example_inputs)
            check_called(model, gated, example_inputs)
        if before is not None and granularity == "output":
            constants = "some" if any(may_leave_constants(module) for module in model.modules()) else "none"
            if units is not None:
                constants = constants_left(model, units, list(_gated_classes(units, plan)[0].values()), example_inputs)
            if constants == "stuck" and prove:
                raise UnprovenError("closed channels would be more than constants where layers read them")
            if constants != "none" and prove:
                check_half(model, example_inputs)
            elif constants != "none" and look_for_stuck:
                check_none_stuck(model, example_inputs)
    except BaseException:
        for layer, kind in adopted.items():
            layer.__class__ = kind
        inputs.replace(model, {new: old for old, new in relus.items()} | {gated[name]: plan.layers[name] for name in gated})
        for parameter, value in values.items():
            parameter.data = value
        raise
    model.dampr_skipped = plan.skipped  # type: ignore[assignment]
    return model


def _gated_classes(units: Units, plan: _Plan) -> tuple[dict[str, list[int]], list[str]]:
    """Of each gated layer the class that each gate closes, and the names of what loses whole heads or units of a state."""
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


def _reached(units: Units, plan: _Plan) -> float:
    """The share of the multiply-accumulates that gated layers can bring down."""
    classes, whole = _gated_classes(units, plan)
    closed = itertools.chain.from_iterable(classes.values())
    total = sum(product.macs for product in units.products)
    inside = sum(p.macs for p in units.products if _is_inside(p.module, whole))
    return share_of_macs(units, closed) + (inside / total if total else 0.0)


def _is_inside(name: str, names: list[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in names)


def _multiplies_beside(units: Units, plan: _Plan, model: nn.Module) -> bool:
    """Whether code beside layers multiplies what gated layers close: the cost of gated layers is read off layers."""
    gated, whole = _gated_classes(units, plan)
    classes = set(itertools.chain.from_iterable(gated.values()))
    layers = (*graph.GEMMS, nn.RNNBase, nn.MultiheadAttention)
    beside = [p for p in units.products if not _is_inside(p.module, whole) and not isinstance(model.get_submodule(p.module), layers)]
    return any(not classes.isdisjoint(units.label[line].tolist()) for p in beside for line in p.factors)


def _convert_by_units(
    model: nn.Module, units: Units, placement: Placement, gate: Any, before: list[torch.Tensor], example_inputs: Any
) -> nn.Module:
    """Put gates on the parameters that read units; whatever is raised, the model is as it was."""
    vectors: Iterator[Gate] | None = None
    if _is_generator(gate):
        options = {"init_scale": 0.0, **getattr(gate, "keywords", {})}
        vectors = iter(DependencyGenerator([len(g.classes) for g in placement.groups], device=_device(model), **options).gates())

    def make(count: int) -> Gate:
        return next(vectors) if vectors is not None else make_gate(gate, count, _device(model))

    with unit_gates.put_in(model, units, placement, make) as gated:
        check_unchanged(model, gated, before, example_inputs)
    model.dampr_sizes = [list(size) for size in placement.sizes]  # type: ignore[assignment]
    model.dampr_within = sorted(units.within)  # type: ignore[assignment]
    model.dampr_skipped = unit_gates.left_out(model, units, placement)  # type: ignore[assignment]
    return model


@dataclass
class _Plan:
    """What is replaced, by name; which of these share the gate of which; what a gate in a norm saves; what is left out, and why.

    ``order``: names in the order of calls, from the graph ``widths``. ``heads``: which of these layers project the heads of an attention.
    """

    layers: dict[str, nn.Module]
    shared_with: dict[str, str]
    weights_per_gate: dict[str, float]
    skipped: dict[str, str]
    order: list[str]
    widths: graph.Widths | None = None
    heads: dict[str, heads.Attention] = field(default_factory=dict)


def _place(
    model: nn.Module,
    chosen: dict[str, nn.Module],
    granularity: Granularity,
    example_inputs: Any,
    tie: bool,
    sight: Sight | None,
) -> _Plan:
    plan = _Plan(dict(chosen), {}, {}, {}, list(chosen))
    if granularity == "input" and sight is not None:
        plan.skipped = {name: reason for name, layer in chosen.items() if (reason := sight.why_not_read(layer, name)) is not None}
        plan.layers = {name: layer for name, layer in chosen.items() if name not in plan.skipped}
    if granularity != "output":
        return plan
    attentions = heads.parts(model)
    plan.heads = {name: attentions[layer] for name, layer in chosen.items() if layer in attentions}
    if example_inputs is None:
        convolution = next((name for name, layer in chosen.items() if isinstance(layer, nn.modules.conv._ConvNd)), None)
        if convolution and any(type(m) in _NORMS for m in model.modules()):
            raise ValueError(
                f"example_inputs=None: expected them, to find the BatchNorm that the gates of layer {convolution!r} belong after"
            )
        return plan
    plain = plain_copy(model, example_inputs) if any(isinstance(m, GatedLayer) for m in model.modules()) else None
    widths = graph.Widths(model, example_inputs, sight.units if sight is not None else None, plain)
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    plan.layers, plan.order, plan.widths = {}, [names[module] for module in widths.called()], widths
    gates: dict[nn.Module, str] = {}  # whose outputs are gated, and the name of the layer that holds the gate
    factors = _factors(chosen, widths)
    wanted = {n: layer for n, layer in chosen.items() if not isinstance(layer, nn.MultiheadAttention) and n not in plan.heads}
    reasons = {n: factors.get(n) or _why_not(layer, widths, tie, model, example_inputs) for n, layer in wanted.items()}
    free = [n for n, reason in reasons.items() if reason is None and not isinstance(chosen[n], nn.RNNBase)]
    found = {n: sight.why_not(chosen[n], n) for n in free} if sight is not None else {}
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
            together = [gates[other] for other in widths.written_together(layer) if other in gates] if _has_channels(layer, widths) else []
            if together and together[0] != place:
                plan.shared_with[place] = together[0]
    return plan


def _place_streams(plan: _Plan, model: nn.Module, gate: Any, include: Filter, exclude: Filter, example_inputs: Any) -> None:
    """Add the norms of residual streams, the first of each with the gate, and say what the layers that write these have to do with it."""
    plain = plain_copy(model, example_inputs) if any(isinstance(m, GatedLayer) for m in model.modules()) else model
    names = {module: name for name, module in reversed(list(plain.named_modules(remove_duplicate=False)))}
    owners = transformer.owners(model)
    found, why = streams.find(plain, plan.widths if plain is model and plan.widths else graph.Widths(plain, example_inputs))
    for stream in found:
        places = {names[norm]: model.get_submodule(names[norm]) for norm in stream.norms}
        first, *others = places
        gated = [name for name, norm in places.items() if isinstance(norm, GatedLayer)]
        left_out = [name for name, norm in places.items() if not filters.wanted([(name, norm), *owners.get(norm, [])], include, exclude)]
        reason = f"{gated[0]!r} has gates already" if gated else f"{left_out[0]!r} is left out" if left_out else None
        bare = next((name for name, norm in places.items() if norm.weight is None), None)
        if bare is not None and not _starts_at_one(gate):
            reason = reason or f"fresh gates of {gate!r} are not 1, and {bare!r} has no gain that could make up for them"
        reason = reason or streams.why_not(plain, stream, example_inputs)
        if reason is not None:
            why |= dict.fromkeys(stream.norms, reason)
            continue
        plan.layers |= places
        plan.shared_with |= dict.fromkeys(others, first)
        in_others = sum(p.numel() for norm in stream.norms[1:] for p in norm.parameters()) / stream.width  # these count for themselves
        plan.weights_per_gate[first] = stream.weights_per_channel(plain) - in_others
        written = {names[layer] for layer in stream.writers} & plan.skipped.keys()
        plan.skipped |= dict.fromkeys(written, f"its outputs are the residual stream, whose gates are in {first!r} and its other norms")
    plan.skipped |= {names[norm]: f"{_NO_GATES}{reason}" for norm, reason in why.items()}


def _why_not(layer: nn.Module, widths: graph.Widths, tie: bool, model: nn.Module, example_inputs: Any) -> str | None:
    """Why a layer gets no gates on its outputs; None where it does."""
    if isinstance(layer, nn.RNNBase):
        return recurrent.why_not(model, layer, example_inputs)
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
    """The norms whose gates switch the outputs of ``layer`` off; none where they are better switched off in the layer."""
    norms = widths.norms_reading(layer)[0] if _has_channels(layer, widths) else []
    return norms if all(type(norm) in _NORMS and computed(norm) is None for norm in norms) else []


def _choose(
    model: nn.Module, gate: Any, granularity: Granularity, per_sample: bool, include: Filter, exclude: Filter
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers to replace by their first name, and why others of their kind are not.

    A layer that has several names, or is a part of a transformer layer, is excluded by any of these.
    """
    names: dict[nn.Module, list[tuple[str, nn.Module]]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if type(layer) in _REPLACEMENT or _is_parametrized(layer):
            names.setdefault(layer, []).append((name, layer))
    chosen, skipped, owners, attentions = {}, {}, transformer.owners(model), heads.parts(model)
    for layer, aliases in names.items():
        attention = attentions.get(layer)
        above = owners.get(layer, []) + ([(attention.name, attention.module)] if attention else [])
        if not filters.wanted(aliases + above, include, exclude):
            continue
        reason = _unfit(layer, gate, granularity, per_sample) or transformer.left_out(layer, owners.get(layer, []), granularity)
        reason = reason or heads.left_out(layer, attention, granularity, per_sample)
        if reason is None:
            chosen[aliases[0][0]] = layer
        else:
            skipped[aliases[0][0]] = reason
    return chosen, skipped


def _unfit(layer: nn.Module, gate: Any, granularity: Granularity, per_sample: bool) -> str | None:
    """Why a layer cannot have such gates; None where it can."""
    if (name := computed(layer)) is not None:
        how = "torch.nn.utils.parametrize" if parametrize.is_parametrized(layer) else "weight_norm, spectral_norm or prune"
        return f"its {name} is computed from other tensors ({how}); wrap the gated layer instead"
    if granularity != "output" and type(layer) in _OUTPUT_ONLY:
        return f"{type(layer).__name__} has gates on its {_OUTPUT_ONLY[type(layer)]}, with granularity='output'"
    if not isinstance(layer, nn.RNNBase):
        return None
    if per_sample:
        return f"{type(layer).__name__} draws its gates once per call, expected per_sample=False"
    if not layer.proj_size and not _starts_at_one(gate):
        return f"fresh gates of {gate!r} are not 1, and nothing in {type(layer).__name__} can make up for them"
    return None


def _is_parametrized(layer: nn.Module) -> bool:
    """Whether torch.nn.utils.parametrize has made a class of its own of a layer that would get gates."""
    return parametrize.is_parametrized(layer) and type(layer).__bases__[0] in _REPLACEMENT


def _starts_at_one(gate: Any) -> bool:
    """Whether fresh gates are 1 in evaluation."""
    return _is_generator(gate) or bool((make_gate(gate, 1).deterministic() == 1).all())


def _is_generator(gate: Any) -> bool:
    return gate == "dep_l0" or getattr(gate, "func", gate) is DependencyGenerator


def _draws_each(gate: Any, granularity: Granularity, residual: bool) -> bool:
    """Whether the family is published with a draw per sample, and such gates can have one."""
    return _is_generator(gate) and granularity in VECTOR_GRANULARITIES and not residual


def _generated(gate: Any, plan: _Plan, model: nn.Module, granularity: Granularity) -> dict[str, Gate]:
    """The gates of all layers from one generator where ``gate`` asks for that, by the layers' names; else nothing."""
    if not _is_generator(gate):
        return {}
    options = {"init_scale": 0.0, **getattr(gate, "keywords", {})}
    names = sorted((name for name in plan.layers if name not in plan.shared_with), key=plan.order.index)
    counts = [plan.heads[name].heads if name in plan.heads else _gate_count(plan.layers[name], granularity) for name in names]
    generator = DependencyGenerator(counts, device=_device(model), **options)
    if _is_double(model):
        generator.double()
    return dict(zip(names, generator.gates(), strict=True))


def _precise(gate: Any, model: nn.Module) -> Any:
    """``gate`` in float64 where the model is, because float32 is less exact than compaction is."""
    return (lambda count, device=None: make_gate(gate, count, device).double()) if _is_double(model) else gate


def _is_double(model: nn.Module) -> bool:
    return any(p.dtype == torch.float64 for p in model.parameters())


def _device(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters()), None)


def _gate_count(layer: nn.Module, granularity: Granularity) -> int:
    kind = _GATED[type(layer)]
    count: int = kind.gates_for(layer, granularity)
    return count


def _gated(
    name: str, layer: nn.Module, gate: Any, granularity: Granularity, per_sample: bool, of_heads: heads.Attention | None
) -> nn.Module:
    how: dict[str, Any] = {"gate": gate, "per_sample": per_sample, "granularity": granularity}
    if isinstance(layer, nn.RNNBase):
        del how["per_sample"]
    if isinstance(layer, (*_NORMS, nn.LayerNorm, nn.MultiheadAttention, nn.RNNBase)):
        del how["granularity"]
        how |= {"statistics": "open"} if isinstance(layer, nn.LayerNorm) else {}
    kind = _GATED[type(layer)]
    if of_heads is not None:
        kind, how = GatedHeads, {"gate": gate, "heads": of_heads.heads, "weights_per_gate": of_heads.weights_per_head()}
    gated: nn.Module = kind.from_dense(layer, **how)
    inputs.keep_hooks(layer, gated)
    return gated
