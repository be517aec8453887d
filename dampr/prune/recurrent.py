"""Recurrent layers in compact: a smaller one in the place of a gated one,
and the gates of its output in the weights that read it.
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

from dampr.gates import Fixed, Gate
from dampr.nn import ScaledRNN
from dampr.nn.computed import computed
from dampr.nn.pruned.narrowed_rnn import in_parts, narrowed
from dampr.nn.rnn import GatedRecurrent

from . import inputs, noise
from .graph import CannotCutError
from .modules import by_name
from .tracing import channel_count, input_columns

Kept = dict[tuple[nn.Module, bool], Tensor]


@dataclass
class Units:
    """What is left of a recurrent layer.

    ``kept``: units by layer and direction; ``own``: which of these are no filling, where the widths are to be their
    own; ``readers``: the names of the layers that read it.
    """

    kept: list[Tensor]
    own: list[Tensor] | None
    readers: list[str]


def make_plain(
    model: nn.Module, samples: list[Any], atol: float, rtol: float
) -> tuple[Kept, dict[str, Units], dict[str, str]]:
    """Replace every gated recurrent layer of ``model`` by a plain one of equal widths, in place.

    A layer whose outputs are read by ``nn.Linear`` and recurrent layers alone becomes the smaller layer of
    ``compacted()``, and the columns of its readers are sliced and multiplied by the gates. Whether the model computes
    the same is tried on ``samples``; where it does not (a nonlinearity between them, a norm, a state from outside), the
    layer keeps its size.

    Returns what is left of each layer, of the smaller ones the units, and for layers with closed units that stay the
    reason.
    """
    kept: dict[tuple[str, bool], Tensor] = {}
    units: dict[str, Units] = {}
    notes: dict[str, str] = {}
    for name, layer in by_name(model, GatedRecurrent).items():
        plain = layer.to_dense()
        if isinstance(plain, nn.RNNBase) and not any(layer.closed_units()):
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
        {(_inside(model.get_submodule(name)), writes): features for (name, writes), features in kept.items()},
        units,
        notes,
    )


def _inside(layer: nn.Module) -> nn.Module:
    return layer.rnn if isinstance(layer, ScaledRNN) else layer


def _shrink(
    model: nn.Module, layer: GatedRecurrent, samples: list[Any], atol: float, rtol: float
) -> tuple[Tensor, list[str]]:
    """The features of ``layer`` that are left, and the names of the layers that read them."""
    reading = readers(model, layer, samples[0])
    unchanged = _proof(model, samples, atol, rtol)
    small, features, scale = layer._compacted(layer.equal_units())
    if not _put(model, layer, small, reading, features, scale, unchanged):
        raise CannotCutError(
            "something between it and the layers that read it is not only a choice of steps, or it is given a state"
        )
    return features, [name for name, module in model.named_modules() if module in reading]


def split(
    model: nn.Module, units: dict[str, Units], kept: Kept, samples: list[Any], atol: float, rtol: float
) -> tuple[dict[str, Units], Kept, dict[str, str]]:
    """Give every layer and direction the width of its own, in place, where that was asked for; the last step, for no
    tracer follows it.

    Returns what is left then, and for layers whose widths stay equal the reason.
    """
    units, kept, notes = dict(units), dict(kept), {}
    for name, found in units.items():
        if found.own is None:
            continue
        layer: Any = model.get_submodule(name)
        reading = [_inside(model.get_submodule(reader)) for reader in found.readers]
        unchanged = _proof(model, samples, atol, rtol)
        stacked = narrowed(layer, found.own)
        size = len(found.kept[0])
        features = torch.cat([row + i * size for i, row in enumerate(found.own[-(1 + layer.bidirectional) :])])
        if not _put(model, layer, stacked, reading, features, torch.ones(()), unchanged):
            filling = sum(len(row) - len(own) for row, own in zip(found.kept, found.own, strict=True))
            notes[name] = (
                f"{filling} closed units stay: the model does not take states of unequal widths, which are lists"
            )
            continue
        for side in [(layer, True), *((reader, False) for reader in reading)]:
            kept[side] = kept[side][features]
        kept |= {(stacked, writes): kept.pop((layer, writes)) for writes in (True, False) if (layer, writes) in kept}
        units[name] = Units([row[own] for row, own in zip(found.kept, found.own, strict=True)], None, found.readers)
    return units, kept, notes


def _proof(model: nn.Module, samples: list[Any], atol: float, rtol: float) -> Callable[[], bool]:
    """What tells whether ``model`` still computes on the samples what it computes now."""
    expected = [inputs.evaluate(model, sample) for sample in samples]

    def unchanged() -> bool:
        try:
            found = [inputs.evaluate(model, sample) for sample in samples]
        except Exception:  # whatever a model does with other shapes, or with a state that is a list
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
    """Put ``small`` in the place of ``layer``, with its features alone, times ``scale``, in what reads it;
    and back if that changed it.
    """
    whole = {(part, name): getattr(part, name) for reader in readers for part, name in input_columns(reader)}
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
    setattr(reader, name, weight)
    setattr(reader, "input_size" if isinstance(reader, nn.RNNBase) else "in_features", weight.shape[1])


def takes_parts(model: nn.Module, layer: nn.RNNBase, sample: Any) -> bool:
    """Whether a model runs with a :class:`dampr.nn.StackedRNN` in the place of ``layer``, whose states are lists."""
    unchanged = _proof(model, [sample], atol=1e-5, rtol=1e-5)
    parts = in_parts(layer)
    inputs.replace(model, {layer: parts})
    try:
        return unchanged()
    finally:
        inputs.replace(model, {parts: layer})


def why_not(model: nn.Module, layer: nn.RNNBase, sample: Any, gated: Callable[[nn.RNNBase, Gate], Any]) -> str | None:
    """Why units of a recurrent layer cannot be cut; None where they can, as a copy shows in which every other unit is
    closed.

    ``gated``: makes a gated layer of a copy of ``layer``, with these gates.
    """
    try:
        readers(model, layer, sample)
    except CannotCutError as error:
        return str(error)
    weight: Any = layer.weight_ih_l0
    if weight.is_meta:
        return None
    trial = inputs.twin(model)
    own: Any = dict(zip(model.modules(), trial.modules(), strict=True))[layer]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    gates = Fixed(torch.ones(GatedRecurrent.gates_for(layer), dtype=dtype, device=weight.device))
    inputs.replace(trial, {own: gated(own, gates)})
    gates.values.view(-1, channel_count(layer, True) // (1 + layer.bidirectional))[:, 1::2] = 0
    *_, notes = make_plain(trial, [sample], *inputs.tolerances(trial, [sample], None, None))
    return next((note.partition(" stay: ")[2] for note in notes.values()), None)


def readers(model: nn.Module, layer: nn.RNNBase, sample: Any) -> list[nn.Module]:
    """The layers that read what ``layer`` gives, wherever in the model. Raises CannotCutError unless all of it is read
    by such layers.

    Autograd follows it: only what ``layer`` gives requires a gradient, and every reader detaches its input.
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

    hooks: list[Any] = [layer.register_forward_hook(mark)]
    for module in model.modules():
        if module is not layer and (_is_linear(module) or isinstance(module, nn.RNNBase)):
            hooks.append(module.register_forward_pre_hook(read, with_kwargs=True))
    with (
        inputs.removing(hooks),
        inputs.evaluating(model),
        inputs.frozen(model),
        noise.same(model),
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
    size = channel_count(layer, True)
    readers = [module for module, always in found.items() if always]
    for reader in readers:
        if (name := computed(reader)) is not None:
            raise CannotCutError(
                f"the {name} of {type(reader).__name__} {names[reader]!r} is computed from other tensors"
            )
        width = reader.input_size if isinstance(reader, nn.RNNBase) else reader.in_features
        if width != size:
            raise CannotCutError(
                f"{type(reader).__name__} {names[reader]!r} reads {width} features, not the {size} of the layer alone"
            )
    return readers


def _leaf(t: Any) -> Any:
    return t.detach().requires_grad_() if isinstance(t, Tensor) else t
