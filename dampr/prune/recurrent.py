"""Recurrent layers in compact: each gated one is replaced by a smaller plain one.

The gates of its outputs are multiplied into the weights of the layers that read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from dampr.gates import Fixed
from dampr.nn import ScaledRNN
from dampr.nn.computed import computed
from dampr.nn.pruned.narrowed_rnn import in_parts, narrowed
from dampr.nn.rnn import GatedRecurrent

from . import hooks, inputs
from .graph import CannotCutError
from .layers.recurrent import without_factors
from .layers.registry import channel_count, kind_of
from .modules import by_name
from .restore import as_it_was

Kept = dict[tuple[nn.Module, bool], Tensor]


@dataclass
class Units:
    """The units that are left of a recurrent layer.

    Attributes:
        kept: for each layer and direction, the indices of the units that are left. All have the same length, so some
            closed units may be among them.
        own: for each layer and direction, the positions in ``kept`` of the units that are open, if the widths are to be
            unequal; else None.
        readers: the names of the layers that read it.
    """

    kept: list[Tensor]
    own: list[Tensor] | None
    readers: list[str]


def make_plain(
    model: nn.Module, samples: list[Any], atol: float, rtol: float
) -> tuple[Kept, dict[str, Units], dict[str, str]]:
    """Replace every gated recurrent layer of ``model`` by a plain recurrent layer, in place.

    The plain layer has one hidden size for all its layers and directions ("equal widths"): that of the layer and
    direction with the most open units. These steps are tried for each gated layer, until one leaves the outputs of the
    model on ``samples`` as they were:

    1. If only ``nn.Linear`` and recurrent layers read the gated layer: make it smaller, slice the columns of its
       readers, and multiply these columns by the gates.
    2. If outputs change because of a nonlinearity before the readers: make it smaller, and multiply its outputs by the
       gates (:class:`dampr.nn.ScaledRNN`).
    3. If outputs change even then (because of a norm, or because the caller passes in a state): replace it by a plain
       layer of the original size.

    Args:
        model: the model with gates.
        samples: example inputs; the outputs on all of them are compared.
        atol, rtol: how far outputs may differ.

    Returns: (kept, units, notes). kept: (plain layer, whether it is its output side) -> the indices of the features
    that are left, int64. units: name of each layer that became smaller -> its :class:`Units`. notes: name of each layer
    whose closed units stay -> why.
    """
    kept: dict[tuple[str, bool], Tensor] = {}
    units: dict[str, Units] = {}
    notes: dict[str, str] = {}
    for name, layer in by_name(model, GatedRecurrent).items():
        plain = layer.to_dense()
        if kind_of(plain).recurrent and not any(layer.closed_units()):
            inputs.replace(model, {layer: plain})
            continue
        try:
            features, readers = _shrink(model, layer, samples, atol, rtol)
            kept |= {(name, True): features, **{(reader, False): features for reader in readers}}
            equal, own = layer.equal_units(), layer.kept_units()
            unequal = len({len(row) for row in own}) > 1
            within = [torch.isin(row, mine).nonzero().flatten() for row, mine in zip(equal, own, strict=True)]
            units[name] = Units(equal, within if unequal else None, readers)
        except CannotCutError as error:
            inputs.replace(model, {layer: plain})
            if any(layer.closed_units()):
                notes[name] = f"{sum(map(len, layer.closed_units()))} closed units stay: {error}"
    return (
        {(without_factors(model.get_submodule(name)), writes): features for (name, writes), features in kept.items()},
        units,
        notes,
    )


def _shrink(
    model: nn.Module, layer: GatedRecurrent, samples: list[Any], atol: float, rtol: float
) -> tuple[Tensor, list[str]]:
    """Replace ``layer`` by the smaller one, in place.

    Returns: the features that are left of its outputs, and the names of the layers that read them.

    Raises: CannotCutError if the model would compute something else; it is as it was then.
    """
    reading = readers(model, layer, samples[0])
    unchanged = _proof(model, samples, atol, rtol)
    units = layer.equal_units()
    small, features, scale = layer._compacted(units)
    fits = _put(model, layer, small, reading, features, scale, unchanged)
    if not fits and not bool((scale == 1).all()):  # a nonlinearity in between lets no factor through
        scaled = ScaledRNN(small, layer._scales(units)).train(layer.training)
        fits = _put(model, layer, scaled, reading, features, torch.ones_like(scale), unchanged)
    if not fits:
        raise CannotCutError(
            "something between it and the layers that read it is not only a choice of steps, or it is given a state"
        )
    return features, [name for name, module in model.named_modules() if module in reading]


def split(
    model: nn.Module, units: dict[str, Units], kept: Kept, samples: list[Any], atol: float, rtol: float
) -> tuple[dict[str, Units], Kept, dict[str, str]]:
    """Give each layer and direction of a recurrent layer a width of its own, in place, if that was asked for.

    This is the last step of compact, because no tracer can follow the result.

    Returns: ``units`` and ``kept`` as they are then, and a note for each layer whose widths stay equal.
    """
    units, kept, notes = dict(units), dict(kept), {}
    for name, found in units.items():
        if found.own is None:
            continue
        layer: Any = model.get_submodule(name)
        if isinstance(layer, ScaledRNN):
            notes[name] = f"{_filling(found)} closed units stay: its outputs have factors, in rows of equal length"
            continue
        reading = [without_factors(model.get_submodule(reader)) for reader in found.readers]
        unchanged = _proof(model, samples, atol, rtol)
        stacked = narrowed(layer, found.own)
        size = len(found.kept[0])
        features = torch.cat([row + i * size for i, row in enumerate(found.own[-(1 + layer.bidirectional) :])])
        if not _put(model, layer, stacked, reading, features, torch.ones(()), unchanged):
            notes[name] = (
                f"{_filling(found)} closed units stay: the model does not take states of unequal widths, which are "
                "lists"
            )
            continue
        for side in [(layer, True), *((reader, False) for reader in reading)]:
            kept[side] = kept[side][features]
        kept |= {(stacked, writes): kept.pop((layer, writes)) for writes in (True, False) if (layer, writes) in kept}
        units[name] = Units([row[own] for row, own in zip(found.kept, found.own, strict=True)], None, found.readers)
    return units, kept, notes


def _filling(units: Units) -> int:
    """How many closed units are left so that all widths are equal."""
    assert units.own is not None
    return sum(len(row) - len(own) for row, own in zip(units.kept, units.own, strict=True))


def _proof(model: nn.Module, samples: list[Any], atol: float, rtol: float) -> Callable[[], bool]:
    """A function that returns whether ``model`` still computes on the samples what it computes now, to ``atol`` and
    ``rtol``.
    """
    expected = [inputs.evaluate(model, sample) for sample in samples]

    def unchanged() -> bool:
        try:
            found = [inputs.evaluate(model, sample) for sample in samples]
        except Exception:  # a model may raise anything for other shapes, or a state that is a list
            return False
        return not any(inputs.differ(a, b, rtol, atol) for a, b in zip(expected, found, strict=True))

    return unchanged


def _put(
    model: nn.Module,
    layer: nn.Module,
    small: nn.Module,
    readers: list[nn.Module],
    features: Tensor,
    scale: Tensor,
    unchanged: Callable[[], bool],
) -> bool:
    """Replace ``layer`` by ``small``, and cut and scale the columns of its readers; undo this if the outputs change.

    Args:
        features: the columns that are left of each reader.
        scale: the factor of each of these columns.
        unchanged: tells whether the outputs are still the same.

    Returns: whether ``small`` stays.
    """
    columns = [place for reader in readers for place in kind_of(reader).input_columns(reader)]
    whole = {(part, name): getattr(part, name) for part, name in columns}
    inputs.replace(model, {layer: small})
    for (part, name), weight in whole.items():
        narrow = (weight.detach()[:, features] * scale).to(weight.dtype)
        _set_columns(part, name, nn.Parameter(narrow, requires_grad=weight.requires_grad))
    if unchanged():
        return True
    inputs.replace(model, {small: layer})
    for (part, name), weight in whole.items():
        _set_columns(part, name, weight)
    return False


def _set_columns(reader: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Set the weight ``name`` of a reader, and its attribute with the number of features that it reads."""
    setattr(reader, name, weight)
    setattr(reader, kind_of(reader).size_read, weight.shape[1])


def takes_parts(model: nn.Module, layer: nn.RNNBase, sample: Any) -> bool:
    """Whether a model runs with a :class:`dampr.nn.StackedRNN`, whose states are lists, in place of ``layer``."""
    unchanged = _proof(model, [sample], atol=1e-5, rtol=1e-5)
    parts = in_parts(layer)
    inputs.replace(model, {layer: parts})
    try:
        return unchanged()
    finally:
        inputs.replace(model, {parts: layer})


def why_not(model: nn.Module, layer: nn.RNNBase, sample: Any) -> str | None:
    """Why the units of a recurrent layer cannot be cut; None if they can."""
    try:
        readers(model, layer, sample)
    except CannotCutError as error:
        return str(error)
    weight: Any = layer.weight_ih_l0
    return None if weight.is_meta else _why_not_half(model, layer, sample)


def _why_not_half(model: nn.Module, layer: nn.RNNBase, sample: Any) -> str | None:
    """Close every other unit of the layer in a copy of the model; returns why the copy cannot lose these units, or
    None.
    """
    trial = inputs.twin(model)
    own: Any = dict(zip(model.modules(), trial.modules(), strict=True))[layer]
    weight: Any = own.weight_ih_l0
    dtype = torch.promote_types(weight.dtype, torch.float32)
    gates = Fixed(torch.ones(GatedRecurrent.gates_for(own), dtype=dtype, device=weight.device))
    inputs.replace(trial, {own: kind_of(own).gated(own, gates, "output", per_sample=False)})
    gates.values.view(-1, channel_count(own, True) // (1 + own.bidirectional))[:, 1::2] = 0
    *_, notes = make_plain(trial, [sample], *inputs.tolerances(trial, [sample], None, None))
    return next((note.partition(" stay: ")[2] for note in notes.values()), None)


def readers(model: nn.Module, layer: nn.RNNBase, sample: Any) -> list[nn.Module]:
    """The layers that read the outputs of ``layer``, anywhere in the model.

    They are found with autograd: only the outputs of ``layer`` require a gradient, and every reader detaches its input.

    Raises: CannotCutError if anything but linear and recurrent layers reads the outputs.
    """
    found: dict[nn.Module, bool] = {}
    refused: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def mark(module: nn.Module, args: Any, output: Any) -> Any:
        found.setdefault(layer, True)
        if isinstance(output[0], PackedSequence):
            return output[0]._replace(data=_leaf(output[0].data)), pytree.tree_map(_leaf, output[1])
        return pytree.tree_map(_leaf, output)

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *states = [*args, *kwargs.values()]
        if any(t.requires_grad for t in pytree.tree_leaves(states) if isinstance(t, Tensor)):
            refused.append(f"its state is given to {names[module]!r}")
        values = x.data if isinstance(x, PackedSequence) else x
        if values.requires_grad != found.setdefault(module, values.requires_grad):
            refused.append(f"{names[module]!r} reads other things too")
        x = x._replace(data=values.detach()) if isinstance(x, PackedSequence) else x.detach()
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): x})

    handles: list[Any] = [layer.register_forward_hook(mark)]
    for module in model.modules():
        if module is not layer and (_is_linear(module) or kind_of(module).recurrent):
            handles.append(module.register_forward_pre_hook(read, with_kwargs=True))
    with (
        hooks.removing(handles),
        as_it_was(model),
        inputs.evaluating(model),
        inputs.frozen(model),
        torch.enable_grad(),
    ):
        results = inputs.tensors(inputs.call(model, sample))
    if found.pop(layer, None) is None:
        raise CannotCutError("example_inputs do not reach the layer")
    if any(t.requires_grad for t in results):
        raise CannotCutError("its output gets to the model's own without a linear or recurrent layer that reads it")
    if refused:
        raise CannotCutError(refused[0])
    return _checked(found, layer, names)


def _is_linear(module: nn.Module) -> bool:
    """Whether a layer is exactly ``nn.Linear``, or would be but for a parametrization."""
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and parametrize.is_parametrized(module))


def _checked(found: dict[nn.Module, bool], layer: nn.RNNBase, names: dict[nn.Module, str]) -> list[nn.Module]:
    """The readers among the layers of ``found``.

    ``found``: layer -> whether it reads the outputs. Raises: CannotCutError if the weight of a reader is computed, or
    it reads other features too.
    """
    size = channel_count(layer, True)
    readers = [module for module, always in found.items() if always]
    for reader in readers:
        if (name := computed(reader)) is not None:
            raise CannotCutError(
                f"the {name} of {type(reader).__name__} {names[reader]!r} is computed from other tensors"
            )
        width = channel_count(reader, False)
        if width != size:
            raise CannotCutError(
                f"{type(reader).__name__} {names[reader]!r} reads {width} features, not the {size} of the layer alone"
            )
    return readers


def _leaf(t: Any) -> Any:
    """``t`` as a leaf of a new graph that requires a gradient; what is not a tensor is returned as it is."""
    return t.detach().requires_grad_() if isinstance(t, Tensor) else t
