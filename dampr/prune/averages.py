"""Keep averaged copies of a model (``torch.optim.swa_utils.AveragedModel``) in step with what a plan does to the
model.
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
    """Turn ``model`` into ``small`` in place, because other code holds ``model``."""
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
