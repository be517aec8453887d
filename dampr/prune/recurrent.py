"""Recurrent layers in compact: a smaller one in the place of a gated one, and the gates of its output in the weights that read it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from dampr.nn import ScaledRNN
from dampr.nn.rnn import _GatedRecurrent

from . import inputs
from .graph import CannotCutError
from .tracing import channel_count, input_columns

Kept = dict[tuple[nn.Module, bool], Tensor]


def make_plain(model: nn.Module, samples: list[Any], atol: float, rtol: float) -> tuple[Kept, dict[str, Tensor], dict[str, str]]:
    """Replace every gated recurrent layer of ``model`` by a plain one, in place.

    A layer whose outputs are read by ``nn.Linear`` and recurrent layers alone becomes the smaller layer of ``compacted()``, and the columns
    of its readers are sliced and multiplied by the gates. Whether the model computes the same is tried on ``samples``; where it does not (a
    nonlinearity between them, a norm, a state from outside), the layer keeps its size.

    Returns what is left of each layer, of the smaller ones the units by layer and direction, and for layers with closed units that stay the
    reason.
    """
    kept: dict[tuple[str, bool], Tensor] = {}
    units: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, _GatedRecurrent)]:
        plain = layer.to_dense()
        if isinstance(plain, nn.RNNBase) and not any(layer.closed_units()):
            inputs.replace(model, {layer: plain})
            continue
        try:
            features, readers = _shrink(model, layer, samples, atol, rtol)
            kept |= {(name, True): features, **{(reader, False): features for reader in readers}}
            units[name] = layer.kept_units()
        except CannotCutError as error:
            inputs.replace(model, {layer: plain})
            if any(layer.closed_units()):
                notes[name] = f"{sum(map(len, layer.closed_units()))} closed units stay: {error}"
    return {(_inside(model.get_submodule(name)), writes): features for (name, writes), features in kept.items()}, units, notes


def _inside(layer: nn.Module) -> nn.Module:
    return layer.rnn if isinstance(layer, ScaledRNN) else layer


def _shrink(model: nn.Module, layer: _GatedRecurrent, samples: list[Any], atol: float, rtol: float) -> tuple[Tensor, list[str]]:
    """The features of ``layer`` that are left, and the names of the layers that read them."""
    reading = readers(model, layer, samples[0])
    expected = [inputs.evaluate(model, sample) for sample in samples]
    small, features, scale = layer.compacted()
    own = {(reader, name): getattr(reader, name) for reader in reading for name in input_columns(reader)}
    inputs.replace(model, {layer: small})
    for (reader, name), weight in own.items():
        narrow = (weight.detach()[:, features] * scale).to(weight.dtype)
        setattr(reader, name, nn.Parameter(narrow, requires_grad=weight.requires_grad))
    _resize(reading, len(features))
    try:
        same = not any(
            inputs.differ(before, inputs.evaluate(model, sample), rtol, atol) for before, sample in zip(expected, samples, strict=True)
        )
    except RuntimeError:
        same = False
    if same:
        return features, [name for name, module in model.named_modules() if module in reading]
    inputs.replace(model, {small: layer})
    for (reader, name), weight in own.items():
        setattr(reader, name, weight)
    _resize(reading, layer._directions * layer._width)
    raise CannotCutError("something between it and the layers that read it is not only a choice of steps, or it is given a state")


def _resize(readers: list[nn.Module], size: int) -> None:
    for reader in readers:
        setattr(reader, "input_size" if isinstance(reader, nn.RNNBase) else "in_features", size)


def why_not(model: nn.Module, layer: nn.RNNBase, sample: Any) -> str | None:
    """Why units of a recurrent layer cannot be cut; None where they can."""
    try:
        readers(model, layer, sample)
    except CannotCutError as error:
        return str(error)
    return None


def readers(model: nn.Module, layer: nn.RNNBase, sample: Any) -> list[nn.Module]:
    """The layers that read what ``layer`` gives, wherever in the model. Raises CannotCutError unless all of it is read by such layers.

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
        if module is not layer and (type(module) is nn.Linear or isinstance(module, nn.RNNBase)):
            hooks.append(module.register_forward_pre_hook(read, with_kwargs=True))
    with inputs.removing(hooks), inputs.evaluating(model), _frozen(model), torch.enable_grad():
        results = inputs.tensors(inputs.call(model, sample))
    if found.pop(layer, None) is None:
        raise CannotCutError("example_inputs do not reach the layer")
    if any(t.requires_grad for t in results):
        raise CannotCutError("its output gets to the model's own without a linear or recurrent layer that reads it")
    if refused:
        raise CannotCutError(refused[0])
    return _checked(found, layer, names)


def _checked(found: dict[nn.Module, bool], layer: nn.RNNBase, names: dict[nn.Module, str]) -> list[nn.Module]:
    size = channel_count(layer, True)
    readers = [module for module, always in found.items() if always]
    for reader in readers:
        width = reader.input_size if isinstance(reader, nn.RNNBase) else reader.in_features
        if width != size:
            raise CannotCutError(f"{type(reader).__name__} {names[reader]!r} reads {width} features, not the {size} of the layer alone")
    return readers


def _leaf(t: Any) -> Any:
    return t.detach().requires_grad_() if isinstance(t, Tensor) else t


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
