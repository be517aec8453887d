"""convert: replaces dense layers of a model by gated ones, in the same model object; after an error the model is as it
was.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, cast, get_args

import torch
from torch import nn

from dampr import _checks, names
from dampr.gates import DependencyGenerator, Gate, make_gate
from dampr.gates.draws import share_generator
from dampr.nn.base import VECTOR_GRANULARITIES, Granularity
from dampr.nn.computed import settled
from dampr.nn.parameter import gated_parameters

from . import graph, heads, inputs, rectified, transformer, unit_gates, wrapped
from .convert_checks import (
    ConversionError,
    StuckError,
    UnprovenError,
    check_called,
    check_copies,
    check_half,
    check_none_stuck,
    check_unchanged,
    constants_left,
    may_leave_constants,
    recorded,
)
from .filters import Filter
from .inputs import Model
from .layer_gates import device_of, draws_each, gate_count, gated_layer, is_double, is_generator, precise
from .layer_plan import (
    LayerPlan,
    check_left,
    check_streams,
    choose,
    gated_classes,
    idle,
    leave_out,
    leave_out_shared,
    multiplies_beside,
    name_others,
    place,
    place_streams,
    say_why,
    share_of_layers,
)
from .sight import look, with_open_norms
from .unit_search import Placement
from .units import Units, remembering
from .units.groups import left_at_half, share_of_macs

# Gated layers have fused kernels, so they are taken unless gates on parameters reach more of the multiply-accumulates
# of the model by at least this share.
WORTH = 0.001

# Gates on parameters are also taken if, with half of every width closed, they leave less of the multiply-accumulates
# of the model by at least this share.
WORTH_HALF = 0.05


@settled
def convert(
    model: Model,
    example_inputs: Any = None,
    *,
    gate: names.Family | type[Gate] | Callable[..., Any] = "hard_concrete",
    granularity: Granularity = "output",
    per_sample: bool | None = None,
    include: Filter = None,
    exclude: Filter = None,
    tie: bool = True,
    residual: bool = False,
) -> Model:
    """Replace dense layers of ``model`` by gated ones, in place, keeping their parameters (and any optimizer that holds
    them) valid.

    Args:
        model: any module; layers whose type is exactly ``nn.Linear`` or ``nn.Conv1d`` to 3d are replaced, and for
            output gates ``nn.Embedding`` (its columns), ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` (their units) and
            ``nn.MultiheadAttention`` (its heads); of recurrent layers those whose outputs linear and recurrent layers
            alone read. (A bare layer cannot change in place: use what is returned.) An
            ``nn.TransformerEncoderLayer`` or ``nn.TransformerDecoderLayer`` around such layers becomes the gated one of
            :mod:`dampr.nn`, which has no fused path; output gates are then on its heads and on its feed-forward
            neurons.
        gate, granularity, per_sample: as in :class:`dampr.nn.GatedLinear` and :class:`dampr.nn.GatedConv2d`. Also a
            function of (number of gates, device), such as ``functools.partial(HardConcrete, preset="median")``.
            ``"dep_l0"`` makes one generator for all layers, in the order in which the example inputs reach them, with
            ``init_scale=0``, so that every gate starts open; ``functools.partial(DependencyGenerator,
            direction="backward")`` makes another. Published is ``init_scale=1``, which would close 7 % of the gates at
            once. ``per_sample=None``: as the family was published, which is a draw per sample for ``"dep_l0"`` (in the
            layers that can: not recurrent ones, not heads of linear layers, not with ``residual=True``), else one per
            call.
        include, exclude: name globs ("encoder.*") and types; None includes everything and excludes nothing. What hits a
            transformer layer hits its parts. With example inputs, an excluded layer keeps its width, so layers that
            write the same width (a sum, say) get no gates either.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, or :class:`dampr.Several` of
            these for a model that takes several ways. With them, output gates go into
            the BatchNorm that follows a layer (in all that read a residual stream), which computes the ``nn.ReLU`` that
            alone reads it, if there is one (a :class:`dampr.nn.AbsorbedReLU` then stands there), leave out layers whose
            channels nothing can cut (the classifier, what a LayerNorm reads, a layer that is called twice, one whose
            outputs are viewed as heads: tried in a copy), and before the function returns it is proven that evaluation
            outputs are unchanged (to rounding) and that no gated layer's weight is read without calling the layer.
            Needed by models that have both convolutions and BatchNorms, for output gates.
        tie: with example inputs, layers whose outputs are added up share one gate vector, because a channel of the sum
            can be cut only where all of them close it. False: each has gates of its own.
        residual: with example inputs, output gates also for widths that norms count, above all the residual stream of a
            transformer: one gate vector for all norms of the stream, drawn once per call of each. Where LayerNorms
            alone read it, the gates are in these (``GatedLayerNorm(statistics="open")``). Else they are on the
            parameters that read the stream, and norms of any type count open units only
            (:class:`dampr.nn.OpenStatistics`). A stream that is the model's input or output is left out. Half of its
            channels are cut in a copy to see that they can be.

    With example inputs, output gates, one draw per call and ties, the model's operators are traced too
    (:func:`dampr.prune.units.trace_units`). Where gates on the parameters that read units
    (:class:`dampr.nn.GatedParameter`) reach more of the multiply-accumulates than gated layers would, or gated layers
    would not compact as foretold, the model gets those instead, whatever its layers are; numbers that code keeps beside
    parameters and that follow a width are then in its attribute ``dampr_sizes``.

    In a process group of several ranks the gates get a generator that all ranks have (:func:`dampr.gate_generator`), so
    that they draw the same gates. Convert before the model is wrapped (DistributedDataParallel) or sharded
    (``fully_shard``).

    Returns: ``model``. Its attribute ``dampr_skipped`` says of each layer that was left out why.

    Raises: ConversionError when nothing matches, ``residual=True`` finds no such width, outputs changed, a layer is
    bypassed or the model cannot be traced; ValueError or TypeError that names the argument; what the model itself
    raises on the example inputs. Whatever is raised, the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.80}: expected a torch.nn.Module")
    if example_inputs is not None and "_orig_mod" in model._modules:
        raise TypeError("model is what torch.compile returned: expected the module itself; convert it, then compile")
    if "_orig_mod" not in model._modules:
        wrapped.check_bare(model, "gates are new parameters of it")
    if next(gated_parameters(model), None) is not None:
        raise ConversionError(
            "model has gates on its parameters already: expected one without, which is converted once"
        )
    if isinstance(gate, Gate):
        raise TypeError(
            f"gate={type(gate).__name__} instance: expected a family's name or a class, because each layer gets a "
            "gate of its own"
        )
    if isinstance(granularity, torch.Tensor):
        raise TypeError(
            "granularity: got a tensor, which is of one weight (from_dense takes it); expected a name or (rows, cols)"
        )
    if not isinstance(gate, str) and not callable(gate):
        raise TypeError(
            f"gate={gate!r:.80}: expected a family's name, a subclass of dampr.gates.Gate or a function that makes one"
        )
    if isinstance(granularity, tuple):
        _checks.block_count("granularity", granularity, 1, 1)
    else:
        _checks.one_of("granularity", granularity, get_args(names.Granularity))
    for name, switch in (
        ("tie", tie),
        ("residual", residual),
        ("per_sample", False if per_sample is None else per_sample),
    ):
        _checks.flag(name, switch)
    if residual and (granularity != "output" or per_sample or example_inputs is None):
        given = (
            f"granularity={granularity!r}, per_sample={per_sample}, "
            f"example_inputs{'=None' if example_inputs is None else ' given'}"
        )
        raise ValueError(
            f"residual=True with {given}: expected granularity 'output', one draw per call, and example inputs"
        )
    if example_inputs is not None and any(t.is_meta for t in itertools.chain(model.parameters(), model.buffers())):
        raise ConversionError(
            "model is on the meta device, so it has no outputs on example_inputs: expected a model with values, or "
            "example_inputs=None"
        )
    scripted = next((name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if example_inputs is not None and scripted is not None:
        raise ConversionError(
            f"model{'.' * bool(scripted)}{scripted} is of torch.jit, whose operators cannot be followed: expected the "
            "module that it was made of"
        )
    if example_inputs is not None:
        inputs.check(example_inputs)
    quiet = nullcontext() if example_inputs is None else inputs.quiet(model, example_inputs)
    with inputs.unsynced(model), quiet, remembering():
        return cast(
            Model,
            _ready(_with_gates(model, gate, granularity, per_sample, include, exclude, example_inputs, tie, residual)),
        )


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
    """What :func:`convert` does once its arguments are checked; ``per_sample`` may still be None."""
    each = draws_each(gate, granularity, residual) if per_sample is None else per_sample
    before = None
    if example_inputs is not None:
        with inputs.unfused():
            before = inputs.comparable(model, example_inputs)
        check_copies(model, example_inputs)
    chosen, skipped = choose(model, gate, granularity, bool(per_sample), include, exclude)
    plan, untraced = None, None
    seen = look(model, example_inputs) if granularity in VECTOR_GRANULARITIES and example_inputs is not None else None
    try:
        plan = place(model, chosen, granularity, example_inputs, tie, seen)
    except graph.TracingError as error:
        untraced = error
    useless = {} if plan is None else idle(plan)
    by_units = None
    may_have_units = seen is not None and granularity == "output" and tie and not per_sample and not residual
    if seen is not None and may_have_units:
        placement = unit_gates.only(model, seen.units, seen.placement, include, exclude)
        if placement.groups:
            by_units = functools.partial(
                _convert_by_units, model, seen.units, placement, gate, before or [], example_inputs
            )
            # The Hugging Face integration saves models with gated layers, so attentions that it knows keep these.
            known = plan is not None and bool(heads.find(model))
            share = share_of_macs(seen.units, placement.classes())
            reached = 0.0 if plan is None else share_of_layers(seen.units, plan)
            exact = plan is None or share < reached - WORTH or not multiplies_beside(seen.units, plan, model)
            more = share > reached + WORTH * (plan is not None)
            more = more or bool(useless) or (plan is not None and _cut_more(seen.units, placement, plan))
            if not known and (more or not exact):
                return by_units()
    if plan is None:
        raise ConversionError(str(untraced)) from untraced
    plan.skipped |= skipped
    plan.skipped |= useless
    plan.layers = {name: layer for name, layer in plan.layers.items() if name not in useless}
    if seen is not None and granularity == "output" and exclude is not None:
        leave_out_shared(plan, model, seen.units, exclude)
    if seen is not None and granularity == "output" and not residual:
        name_others(plan, model, seen, include, exclude)
    if residual:
        place_streams(plan, model, gate, include, exclude, example_inputs)
        by_norms = (
            None
            if seen is None or not tie
            else _streams_by_units(seen.units, plan, model, include, exclude, example_inputs)
        )
        if by_norms is not None:
            return _convert_by_units(model, *by_norms, gate, before or [], example_inputs)
        check_streams(plan, model)
    if not plan.layers and seen is not None and may_have_units and by_units is None:
        by_norms = _streams_by_units(seen.units, plan, model, include, exclude, example_inputs)
        if by_norms is not None:  # some widths can be cut once norms count open units only
            return _convert_by_units(model, *by_norms, gate, before or [], example_inputs)
        say_why(plan, unit_gates.left_out(model, seen.units, placement))
    check_left(plan, model, include, exclude)
    units = seen.units if seen is not None else None
    try:
        return put_in(
            *(model, plan, gate, granularity, each, before, example_inputs),
            by_units is not None,
            units=units,
            finite=seen is not None and seen.placement.finite,
        )
    except UnprovenError:
        if by_units is None:
            raise
    except StuckError as error:
        leave_out(plan, model, error.reasons)
        check_left(plan, model, include, exclude)
        return put_in(model, plan, gate, granularity, each, before, example_inputs, look_for_stuck=False)
    return by_units()


def _cut_more(units: Units, placement: Placement, plan: LayerPlan) -> bool:
    """Whether gates on parameters would close much more than those of a plan of layers.

    This happens, for example, if a layer between gated ones has channels of a class of its own.
    """
    in_layers, whole = gated_classes(units, plan)
    closed = itertools.chain.from_iterable(in_layers.values())
    return not whole and left_at_half(units, placement.classes()) < left_at_half(units, closed) - WORTH_HALF


def _streams_by_units(
    units: Units, plan: LayerPlan, model: nn.Module, include: Filter, exclude: Filter, example_inputs: Any
) -> tuple[Units, Placement] | None:
    """Gates on the parameters that read units, if with norms of open units they reach more residual widths than
    ``plan``.

    Returns: the units and the placement of the gates; None if the gates of the plan reach as many.
    """
    counted = {one for _, line in units.counted for one in units.label[line].tolist()}.difference(units.fixed)
    by_layers = {one for name, line in units.counted if name in plan.layers for one in units.label[line].tolist()}
    in_layers, whole = gated_classes(units, plan)
    if whole and by_layers.issuperset(counted):
        return None
    opened, placement = with_open_norms(model, units, example_inputs)
    placement = unit_gates.only(model, opened, placement, include, exclude)
    by_units = [one for one in placement.classes() if one in counted]
    more = len(by_units) - len(by_layers)
    if not more and by_units and not whole:  # attention that gated layers do not know, say
        closed = itertools.chain(by_layers, *in_layers.values())
        more = int(left_at_half(opened, placement.classes()) < left_at_half(opened, closed) - WORTH_HALF)
    return (opened, placement) if more > 0 else None


def _ready(model: nn.Module) -> nn.Module:
    """Give the gates of a converted model the generator that all ranks share, if there are several; returns
    ``model``.
    """
    share_generator(model)
    return model


def put_in(
    model: nn.Module,
    plan: LayerPlan,
    gate: Any,
    granularity: Granularity,
    each: bool,
    before: list[torch.Tensor] | None,
    example_inputs: Any,
    prove: bool = False,
    look_for_stuck: bool = True,
    units: Units | None = None,
    finite: bool = False,
) -> nn.Module:
    """Put the gated layers of ``plan`` into ``model`` and check it; after an error the model is as it was.

    Args:
        each: whether gates are drawn for each sample.
        before: the outputs of the model without gates; None if there are no example inputs.
        prove: raise UnprovenError if closing half of the gates does not compact as foretold.
        look_for_stuck: raise StuckError if closed channels of some layers could never be cut.
        units: the units of the model if they are known.
        finite: whether the outputs of the model stay finite with parameters as they are after training.

    Returns: ``model``; if it is a gated layer itself, the new layer.
    """
    gates, in_its_precision = _generated(gate, plan, model, granularity), precise(gate, model)
    values = {p: p.data for name in plan.layers for p in model.get_submodule(name).parameters()}
    gated: dict[str, Any] = {}
    adopted: dict[nn.Module, Any] = {}
    relus: dict[nn.Module, nn.Module] = {}
    try:
        for name, layer in plan.layers.items():
            shared = gated.get(plan.shared_with.get(name, ""))
            own = gates.get(name, in_its_precision) if shared is None else shared.gate
            if not isinstance(own, Gate) and next(itertools.chain(layer.parameters(), layer.buffers()), None) is None:
                # A norm without parameters does not say on which device the gate belongs.
                own = make_gate(own, gate_count(layer, granularity), device_of(model))
            gated[name] = gated_layer(layer, own, granularity, each, plan.heads.get(name))
            if name in plan.weights_per_gate:
                gated[name].weights_per_gate = plan.weights_per_gate[name]
        if "" in gated:
            bare: nn.Module = gated[""]
            return bare
        if before is not None:
            relus = rectified.fuse_relu(model, {plan.layers[name]: gated[name] for name in gated}, example_inputs)
        inputs.replace(model, relus | {plan.layers[name]: gated[name] for name in gated})
        adopted = transformer.adopt(model)
        if before is not None:
            with recorded(gated) as called:
                check_unchanged(model, gated, before, example_inputs)
            check_called(model, gated, example_inputs, called)
        if before is not None and granularity == "output":
            constants = "some" if any(may_leave_constants(module) for module in model.modules()) else "none"
            trained = (
                inputs.as_trained(model, example_inputs, finite) if units is not None or constants == "some" else model
            )
            if units is not None:
                constants = constants_left(trained, units, list(gated_classes(units, plan)[0].values()), example_inputs)
            # Gates on parameters cannot be drawn per sample, so for such draws check_half decides on the gated layers.
            if constants == "stuck" and prove and not each:
                raise UnprovenError("closed channels would be more than constants where layers read them")
            if constants != "none" and prove:
                check_half(trained, example_inputs)
            elif constants != "none" and look_for_stuck:
                check_none_stuck(trained, example_inputs)
    except BaseException:
        for layer, kind in adopted.items():
            layer.__class__ = kind
        inputs.replace(
            model, {new: old for old, new in relus.items()} | {gated[name]: plan.layers[name] for name in gated}
        )
        for parameter, value in values.items():
            parameter.data = value
        raise
    model.dampr_skipped = plan.skipped  # type: ignore[assignment]
    return model


def _generated(gate: Any, plan: LayerPlan, model: nn.Module, granularity: Granularity) -> dict[str, Gate]:
    """Layer -> its gate, all from one Dep-L0 generator, if ``gate`` asks for that; else empty."""
    if not is_generator(gate):
        return {}
    options = {"init_scale": 0.0, **getattr(gate, "keywords", {})}
    names = sorted((name for name in plan.layers if name not in plan.shared_with), key=plan.order.index)
    counts = [
        plan.heads[name].heads if name in plan.heads else gate_count(plan.layers[name], granularity) for name in names
    ]
    generator = DependencyGenerator(counts, device=device_of(model), **options)
    if is_double(model):
        generator.double()
    return dict(zip(names, generator.gates(), strict=True))


def _convert_by_units(
    model: nn.Module, units: Units, placement: Placement, gate: Any, before: list[torch.Tensor], example_inputs: Any
) -> nn.Module:
    """Put gates on the parameters that read units and check the outputs; after an error the model is as it was."""
    vectors: Iterator[Gate] | None = None
    if is_generator(gate):
        options = {"init_scale": 0.0, **getattr(gate, "keywords", {})}
        vectors = iter(
            DependencyGenerator([len(g.classes) for g in placement.groups], device=device_of(model), **options).gates()
        )

    def make(count: int) -> Gate:
        return next(vectors) if vectors is not None else make_gate(gate, count, device_of(model))

    with unit_gates.put_in(model, units, placement, make) as gated:
        check_unchanged(model, gated, before, example_inputs)
    model.dampr_sizes = [list(size) for size in placement.sizes]  # type: ignore[assignment]
    model.dampr_within = sorted(units.within)  # type: ignore[assignment]
    model.dampr_skipped = unit_gates.left_out(model, units, placement)  # type: ignore[assignment]
    return model
