"""compact: replaces a gated model by a smaller plain one, and compares their outputs on the example inputs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dampr import _checks
from dampr._version import __version__
from dampr.gates import ranks
from dampr.nn import AbsorbedReLU, GatedLayer, GatedLayerNorm, GatedResidual, Scale, ScaledRNN
from dampr.nn.called import first_argument
from dampr.nn.computed import settled, wake
from dampr.nn.rnn import GatedRecurrent

from . import cutting, graph, heads, hooks, inputs, recurrent, streams, transformer, unit_compact
from .expand import Optimizers, carry_over, check_state, check_trains, expand, optimizers_of
from .inputs import Model
from .layers.base import CannotCutError
from .layers.norm import counts_open, without_activation
from .layers.registry import channel_count, kind_of
from .modules import by_name, of_kind
from .unit_structure import has_unit_gates
from .wrapped import check_gates, check_values, sees_through


class CompactionError(RuntimeError):
    """Raised if the compacted model does not compute what the gated one computes; no model was changed."""


@sees_through
@settled
def compact(
    model: Model,
    example_inputs: Any,
    *,
    optimizer: Optimizers = None,
    round_to: int = 1,
    atol: float | None = None,
    rtol: float | None = None,
) -> Model:
    """A smaller plain model without gates that computes what ``model`` computes in evaluation mode.

    Gate values are folded into the weights, closed units are cut out with everything that depends on them, and what
    a closed unit still contributes as a constant (the half of a sigmoid, the shift of a BatchNorm) moves into the bias
    of the layer that reads it. A recurrent layer becomes the smaller one of its ``compacted()`` where linear and
    recurrent layers alone read it (with ``widths="own"`` a :class:`dampr.nn.StackedRNN`, where the model takes its
    states as lists), attention and transformer layers do so anywhere. A weight of a gated layer that is computed from
    other tensors (``torch.nn.utils.parametrize``, ``weight_norm``, ``spectral_norm``, ``prune``) becomes a parameter
    with the value that it has; other layers keep what computes their weights, and their width. Then both models run on
    the example inputs, and on the same inputs with a little noise, and their
    outputs are compared.

    Args:
        model: a model with gated layers; it is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        optimizer: what trains ``model``, one or several; afterwards it trains the new model, with what is left of its
            state, in the same groups. Gates that were not 1 are in the new weights and not in the state.
        round_to: widths are multiples of it (tensor cores like 8 or 16), as far as closed channels last to fill them
            up; they stay zero. Not so a residual stream, for its LayerNorms would count what fills it up: there
            ``Budget.finalize(round_to=8)`` rounds.
        atol, rtol: how far outputs may differ: |masked - compacted| <= atol + rtol |masked|; infinities and NaN have to
            be in the same places. None: by the lowest precision in which the model computes (float32 1e-5, float64
            1e-9, float16 4e-3, bfloat16 3e-2), and for ``atol`` that times the largest output.

    Returns: a new model of plain ``torch.nn`` layers (where these have no form for what is left, of the plain ones of
    ``dampr.nn``, such as :class:`dampr.nn.PrunedMultiheadAttention`), in the training mode of ``model`` and with the
    hooks of its layers. Its attribute ``dampr_manifest`` (plain data) lists the kept indices of each layer and bare
    parameter, and why a closed unit could not be cut.

    Raises: CompactionError naming the first layer that differs; ValueError for an optimizer whose state cannot be cut,
    or that has no parameter of the model; TypeError or ValueError that names the argument.
    """
    _checks.module("model", model)
    inputs.check(example_inputs)
    optimizers = optimizers_of(optimizer)
    for one in optimizers:
        check_state(one)
        check_trains(one, model)
    round_to = _checks.positive_int("round_to", round_to)
    gated = by_name(model, GatedLayer)
    if not gated:
        raise ValueError(f"model={type(model).__name__}: expected gated layers in it (dampr.convert puts them there)")
    check_gates(model)
    check_values(model)
    if hasattr(model, "dampr_layout"):
        if optimizers:
            raise ValueError("model: closed units have left it; expected shrinker.expand(optimizer) before")
        model = expand(model)
    if "" in gated:
        raise ValueError("model is a gated layer itself: nothing around it could be cut; use its to_dense()")
    for name, bound in (("atol", atol), ("rtol", rtol)):
        if bound is not None:
            _checks.number(name, bound, 0)
    samples = inputs.samples(model, example_inputs)
    masked = [inputs.comparable(model, sample) for sample in samples]
    atol, rtol = inputs.tolerances(model, samples, atol, rtol, masked)
    if has_unit_gates(model):
        try:
            whole, kept, manifest = unit_compact.compacted(model, example_inputs, round_to)
        except cutting.UnableError as error:
            raise CompactionError(str(error)) from error
        difference = _prove(model, whole, kept, samples, masked, atol, rtol)
        wake(whole)
        ranks.unwatch(whole)
        whole.dampr_manifest = manifest | {"max_abs_difference": difference}  # type: ignore[assignment]
        for one in optimizers:
            carry_over(one, model, whole)
        return cast(Model, whole)
    small: nn.Module = inputs.copied(model, example_inputs)
    open_branches(small)
    small, neurons, left, notes = transformer.make_plain(small, samples, atol, rtol)
    closed: graph.Closed = {}
    norms: dict[nn.Module, set[int]] = {}
    dense: dict[Any, nn.Module] = {}
    opened: dict[nn.Module, Tensor] = {}
    for name, layer in small.named_modules():
        if not isinstance(layer, GatedLayer) or isinstance(layer, GatedRecurrent):
            continue
        if counts_open(layer):
            plain = dense[layer] = layer._whole()
            opened[plain] = layer.gate.is_open()
            continue
        plain = dense[layer] = layer.to_dense()
        plain = without_activation(plain)
        kind = kind_of(plain)
        for writes, channels in zip((True, False), layer.closed_channels(), strict=True):
            if channels and kind.gates_values:
                norms[plain] = channels
            elif channels and kind.reads_indices and not writes:
                notes[name] = f"{len(channels)} closed rows stay: the caller's indices count them"
            elif channels:
                closed[plain, writes] = channels
    open_heads, head_notes = heads.open_heads(small)
    for absorbed in of_kind(small, AbsorbedReLU):
        dense[absorbed] = nn.ReLU(absorbed.inplace).train(absorbed.training)
        hooks.share(absorbed, dense[absorbed])
    inputs.replace(small, dense)
    _match_dtype(
        small,
        [p for layer, p in dense.items() if isinstance(layer, GatedLayerNorm) and layer.weight is None],
        samples[0],
    )
    in_heads, cut_heads = heads.cut(small, open_heads)
    kept, units, recurrent_notes = recurrent.make_plain(small, samples, atol, rtol)
    kept, notes = neurons | in_heads | kept, notes | head_notes | recurrent_notes
    if norms or closed:
        try:
            cutting.cut_closed(small, closed, norms, samples, kept, notes, round_to)
        except cutting.UnableError as error:
            raise CompactionError(str(error)) from error
    try:
        in_streams, parameters = streams.cut_closed(small, opened, samples[0], round_to, notes)
    except CannotCutError as error:
        raise CompactionError(str(error)) from error
    units, kept, unequal_notes = recurrent.split(small, units, kept | in_streams, samples, atol, rtol)
    notes |= unequal_notes
    ones = [m for m in of_kind(small, Scale) if bool((m.scale == 1).all())]
    inputs.replace(small, {module: nn.Identity().train(module.training) for module in ones})
    difference = _prove(model, small, kept, samples, masked, atol, rtol)
    manifest = _manifest(model, small, kept, left | cut_heads, units, notes, difference)
    small.dampr_manifest = manifest | ({"parameters": parameters} if parameters else {})  # type: ignore[assignment]
    wake(small)
    ranks.unwatch(small)
    for one in optimizers:
        carry_over(one, model, small)
    return cast(Model, small)


Kept = dict[tuple[nn.Module, bool], Tensor]  # (layer, writes) -> kept channels, by their indices in the original layer


def open_branches(small: nn.Module) -> None:
    """Replace gated residual sums by plain ones, in place, the outer before the inner.

    Gates of layers inside of the branches stay.
    """
    while (residual := next(iter(of_kind(small, GatedResidual)), None)) is not None:
        inputs.replace(small, {residual: residual.without_gate()})


def _match_dtype(small: nn.Module, norms: list[nn.Module], sample: Any) -> None:
    """Give norms whose gain was made from gates alone the dtype of their input, as torch's kernels expect.

    Such a norm had no parameters, so its gain has the dtype of the gates.
    """

    def match(norm: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        norm.to(first_argument(args, kwargs).dtype)

    if norms:
        with hooks.removing([norm.register_forward_pre_hook(match, with_kwargs=True) for norm in norms]):
            inputs.evaluate(small, sample)


def _prove(
    model: nn.Module,
    small: nn.Module,
    kept: Kept,
    samples: list[Any],
    masked: list[list[Tensor]],
    atol: float,
    rtol: float,
) -> float:
    """Compare the outputs of ``small``, run as a user runs it, with those of ``model``.

    Args:
        kept: what is left on each side of each layer, to compare layers if outputs differ.
        samples: the inputs.
        masked: the outputs of ``model`` for each of them.
        atol, rtol: how far outputs may differ.

    Returns: the largest difference.

    Raises: CompactionError if a difference is too large; it names the first layer whose output differs.
    """
    largest = 0.0
    for sample, expected in zip(samples, masked, strict=True):
        try:
            compacted = inputs.evaluate(small, sample)
        except RuntimeError as error:
            raise CompactionError(f"the compacted model does not run ({error})") from error
        shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in compacted]
        if shapes[0] != shapes[1]:
            raise CompactionError(f"output shapes changed from {shapes[0]} to {shapes[1]}")
        difference = inputs.gap(expected, compacted)
        largest = max(largest, difference)
        if not inputs.differ(expected, compacted, rtol, atol):
            continue
        first = _first_difference(model, small, kept, sample, atol, rtol)
        where = (
            f"layer {first!r} is the first whose output differs"
            if first is not None
            else "no single layer's output does"
        )
        raise CompactionError(
            f"{where}; the model's outputs differ by up to {difference:.3g} (atol={atol:g}, rtol={rtol:g})"
        )
    return largest


def _first_difference(
    model: nn.Module, small: nn.Module, kept: Kept, sample: Any, atol: float, rtol: float
) -> str | None:
    """The first layer of ``small`` whose output differs from what the layer of this name in ``model`` computes; None if
    there is none.
    """
    before, after = _layer_outputs(model, sample), _layer_outputs(small, sample)
    for name, out in after.items():
        layer, expected = small.get_submodule(name), before.get(name)
        if expected is None:
            continue
        indices = kept.get((layer, True))
        if indices is not None:
            along = -1 if kind_of(layer).writes_last else 1
            expected = expected.index_select(along, indices.to(expected.device))
        if inputs.differ([expected], [out], rtol, atol):
            return name
    return None


def _layer_outputs(model: nn.Module, sample: Any) -> dict[str, Tensor]:
    """The output of the first call of each layer that has a weight, in the order of these calls: name -> output."""
    layers: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                layers.setdefault(name, out.detach())

        return hook

    handles = [
        module.register_forward_hook(keep(name)) for name, module in model.named_modules() if hasattr(module, "weight")
    ]
    with hooks.removing(handles):
        inputs.evaluate(model, sample)
    return layers


def _manifest(
    model: nn.Module,
    small: nn.Module,
    kept: Kept,
    heads: dict[str, tuple[int, list[int]]],
    units: dict[str, recurrent.Units],
    notes: dict[str, str],
    difference: float,
) -> dict[str, Any]:
    """The manifest of a compacted model: plain data.

    Args:
        model, small: the model before and after.
        kept: (layer, writes) -> the channels that are left.
        heads: attention -> (how many heads it had, those that are left).
        units: recurrent layer -> the units that are left.
        notes: layer -> why closed units stay.
        difference: the largest difference of outputs.
    """
    names = {module: name for name, module in small.named_modules()}
    names |= {module.rnn: name for module, name in names.items() if isinstance(module, ScaledRNN)}
    layers: dict[str, dict[str, Any]] = {}
    for name, (count, left) in heads.items():
        if len(left) < count:
            layers[name] = {"heads": {"before": count, "kept": left}}
    for (module, writes), indices in kept.items():
        if module not in names:
            continue  # a Scale whose factors were all 1 was removed
        before = channel_count(_counterpart(model, names[module]), writes)
        entry = layers.setdefault(names[module], {})
        entry["out" if writes else "in"] = {"before": before, "kept": indices.tolist()}
        if (groups := getattr(_counterpart(model, names[module]), "groups", 1)) != getattr(module, "groups", 1):
            entry["groups"] = groups  # a depthwise convolution of one channel looks like any other
    for name, found in units.items():
        layers[name]["units"] = {
            "before": _counterpart(model, name)._width,
            "kept": [row.tolist() for row in found.kept],
        }
    return {
        "dampr": __version__,
        "torch": torch.__version__,
        "layers": layers,
        "closed_but_kept": notes,
        "max_abs_difference": difference,
    }


def _counterpart(model: nn.Module, name: str) -> Any:
    """The layer of the gated ``model`` that became the layer ``name`` of the compacted one.

    A gated norm that also computes its activation became a Sequential of two layers, so its name is that of the
    Sequential.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(name.rpartition(".")[0])
