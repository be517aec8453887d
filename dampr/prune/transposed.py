"""Linear layers that keep their weight transposed, as transformers' ``Conv1D`` of GPT-2 does: ``nn.Linear`` for a
while, and back.

The type goes by its full name, so that transformers is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import inputs

_CONV1D = "transformers.pytorch_utils.Conv1D"


def find(model: nn.Module) -> dict[str, Any]:
    """Every such layer by its name."""
    return {name: layer for name, layer in model.named_modules() if is_conv1d(layer)}


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is such a one; a class of its own with gates on its weight is a subclass."""
    return any(f"{kind.__module__}.{kind.__qualname__}" == _CONV1D for kind in type(layer).__mro__[:3])


def to_linear(model: nn.Module) -> dict[str, Any]:
    """Put ``nn.Linear`` in the place of each; returns what was there, for :func:`back`.

    Parameters stay the same objects; what an optimizer knows of their elements does not fit any more.
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
    """Put ``layers`` in the place of the ``nn.Linear`` layers of these names,
    whose parameters and widths they take on.
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
