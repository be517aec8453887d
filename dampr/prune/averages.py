"""Keep averaged copies of a model (``torch.optim.swa_utils.AveragedModel``) in step with what a plan does to the
model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from dampr.gates import Gate, ranks

from . import hooks, inputs, noise
from .compact import compact
from .shrinker import Copies, copies_of
from .summary import gated_layers

_TABLES = {"_modules", "_parameters", "_buffers"}


def convert_copies(ema: Copies, model: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> None:
    """Convert the copies of a model that has just got gates; their gates get the values of the model's."""
    for one in copies_of(ema):
        if not gated_layers(one):
            with noise.kept(one):
                become(one, convert(one))
            take_gates(one, model)


def resemble(ema: Copies, model: nn.Module) -> None:
    """Make the copies like ``model`` is now, with its gates, widths and values, before a saved state is loaded into
    them.
    """
    for one in copies_of(ema):
        twin = copy.deepcopy(model).train(one.training)
        vars(one).clear()
        vars(one).update(vars(twin))
        one.__class__ = type(twin)


def take_gates(one: nn.Module, model: nn.Module) -> None:
    """Give ``one``, a copy with gated layers of the same names, copies of the gates of ``model``."""
    layers = gated_layers(one)
    made: dict[Gate, Gate] = {}
    wanted: dict[nn.Module, nn.Module] = {}
    for name, layer in gated_layers(model).items():
        wanted[layers[name].gate] = made.setdefault(layer.gate, copy.deepcopy(layer.gate))
    inputs.replace(one, wanted)


def compact_copies(ema: Copies, model: nn.Module, example_inputs: Any) -> None:
    """Compact the copies of a model with the gates of ``model``, so that they get the same widths."""
    for one in copies_of(ema):
        take_gates(one, model)
        become(one, compact(one, example_inputs=example_inputs, round_to=1))


def become(model: Any, small: Any) -> None:
    """Turn ``model`` into ``small`` in place, because other code holds ``model``.

    Attributes stay, except sizes and what holds parts of the model, such as a list of its layers. So do the hooks of
    layers and parameters, and their handles.
    """
    if model is small:
        return
    hooks.share_by_name(model, small)
    held, own = vars(model), vars(small)
    manifest = own.get("dampr_manifest", {})
    sizes = {name.partition(".")[0] for name in manifest.get("sizes", {}).get("", {})}
    sizes.update(getattr(model, "__constants__", ()))  # those of a layer of torch with layers in it
    parts = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for name in held.keys() & own.keys() - _TABLES:
        if name in sizes or any(id(leaf) in parts for leaf in pytree.tree_leaves(held[name])):
            held[name] = own[name]
    for kind in _TABLES:
        held[kind].clear()
        held[kind].update(own[kind])
    model.__class__ = type(small)  # without the properties that gates on its own parameters are
    ranks.watch(model)
    if manifest:
        model.dampr_manifest = manifest
