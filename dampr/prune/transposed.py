"""Linear layers that store their weight transposed, like the ``Conv1D`` of transformers' GPT-2: replaces them by
``nn.Linear`` for a while, and puts them back.

The class is found by its full name, so that transformers is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import inputs
from .layers.linear import TransposedLinear
from .layers.registry import kind_of


def find(model: nn.Module) -> dict[str, Any]:
    """Every such layer by its name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(kind_of(layer), TransposedLinear)}


def to_linear(model: nn.Module) -> dict[str, Any]:
    """Replace each such layer by an ``nn.Linear``. Returns the replaced layers by name, for :func:`back`.

    Parameters stay the same objects, but are transposed, so an optimizer's state no longer fits their elements.
    """
    found = find(model)
    linear: dict[nn.Module, nn.Module] = {}
    for layer in found.values():
        new = nn.Linear(layer.nx, layer.nf, device="meta", dtype=layer.weight.dtype)
        layer.weight.data = layer.weight.data.t().contiguous()
        new.weight, new.bias = layer.weight, layer.bias
        linear[layer] = new.train(layer.training)
    inputs.replace(model, linear)
    return found


def back(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Put ``layers`` back in place of the ``nn.Linear`` layers of these names; they take over those layers'
    parameters and widths.
    """
    transposed: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = linear.weight.data.t().contiguous()
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.nx, layer.nf = linear.in_features, linear.out_features
        transposed[linear] = layer.train(linear.training)
    inputs.replace(model, transposed)
