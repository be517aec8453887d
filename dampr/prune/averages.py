"""Copies of a model that average its weights (``torch.optim.swa_utils.AveragedModel``),
through a plan's changes of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from dampr.gates import Gate, ranks

from . import inputs, noise
from .compact import compact
from .shrinker import Copies, copies_of
from .summary import gated_layers


def convert_copies(ema: Copies, model: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> None:
    """Put gates into copies of a model that has just got its own, with the values that these have."""
    for one in copies_of(ema):
        if not gated_layers(one):
            with noise.kept(one):
                become(one, convert(one))
            take_gates(one, model)


def resemble(ema: Copies, model: nn.Module) -> None:
    """Make copies of what ``model`` is now: its gates, its widths and, until a state is loaded, its values."""
    for one in copies_of(ema):
        twin = copy.deepcopy(model).train(one.training)
        vars(one).clear()
        vars(one).update(vars(twin))
        one.__class__ = type(twin)


def take_gates(one: nn.Module, model: nn.Module) -> None:
    """Copies of the gates of ``model``, which has gated layers of the same names, for ``one``."""
    layers = gated_layers(one)
    made: dict[Gate, Gate] = {}
    wanted: dict[nn.Module, nn.Module] = {}
    for name, layer in gated_layers(model).items():
        wanted[layers[name].gate] = made.setdefault(layer.gate, copy.deepcopy(layer.gate))
    inputs.replace(one, wanted)


def compact_copies(ema: Copies, model: nn.Module, example_inputs: Any) -> None:
    """Compact copies of a model whose gates are decided, to the same widths."""
    for one in copies_of(ema):
        take_gates(one, model)
        become(one, compact(one, example_inputs=example_inputs, round_to=1))


def become(model: Any, small: Any) -> None:
    """Make ``model``, the object that others hold, out of what ``small`` is made of."""
    if model is small:
        return
    for kind in ("_modules", "_parameters", "_buffers"):
        held = getattr(model, kind)
        held.clear()
        held.update(getattr(small, kind))
    model.__class__ = type(small)  # without the properties that gates on its own parameters are
    ranks.watch(model)
    manifest = getattr(small, "dampr_manifest", None)
    if manifest is not None:
        for attribute in manifest.get("sizes", {}).get("", {}):
            setattr(model, attribute, getattr(small, attribute))
        model.dampr_manifest = manifest
