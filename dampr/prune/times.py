"""Where compaction gained time: each layer before and after, on this device, and why one gained nothing."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dampr import _progress
from dampr.nn import PrunedMultiheadAttention, ScaledRNN, StackedRNN

from . import graph, inputs
from .latency import calls_of, seconds_of
from .modules import by_name, of_kind
from .wrapped import sees_through

_TIMED = (*graph.GEMMS, nn.RNNBase, nn.MultiheadAttention, PrunedMultiheadAttention)
GAIN = 0.95  # a layer that takes more than this share of its time before has gained nothing


@dataclass(frozen=True)
class LayerTime:
    """One layer: parameters and seconds of its calls in an evaluation pass, gated and compacted;
    ``note``: why it gained nothing.
    """

    name: str
    params: tuple[int, int]
    seconds: tuple[float, float]
    note: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@sees_through
def layer_times(model: nn.Module, small: nn.Module, example_inputs: Any) -> list[LayerTime]:
    """Time the layers of ``small``, which ``model`` was compacted to, beside those that they were.

    Each is called with what it is called with on the example inputs, alone, in evaluation mode; a gated layer
    multiplies its gates each time, as it does in training. On a GPU the calls are launched one after the other and
    waited for together.

    Args:
        model: gated; not changed.
        small: what :func:`dampr.compact` made of it, with its manifest.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns: linear, convolution, recurrent and attention layers in the order of ``small``.

    Raises: ValueError where ``small`` has no manifest; what the models raise on the example inputs.
    """
    manifest = getattr(small, "dampr_manifest", None)
    if not isinstance(manifest, dict):
        raise ValueError(f"small={type(small).__name__}: expected the dampr_manifest that dampr.compact leaves")
    whole = (nn.MultiheadAttention, PrunedMultiheadAttention, ScaledRNN, StackedRNN)
    inside = {part for layer in of_kind(small, whole) for part in layer.modules() if part is not layer}
    names = [name for name, layer in by_name(small, (*_TIMED, *whole)).items() if layer not in inside]
    pairs = {name: (_counterpart(model, name), small.get_submodule(name)) for name in names}
    pairs = {name: pair for name, pair in pairs.items() if pair[0] is not None}
    times = [
        _times(net, [pair[side] for pair in pairs.values()], example_inputs) for side, net in enumerate((model, small))
    ]
    kept = manifest.get("closed_but_kept", {})
    rows = []
    for (name, pair), before, after in zip(pairs.items(), *times, strict=True):
        params = tuple(sum(p.numel() for n, p in layer.named_parameters() if "gate" not in n) for layer in pair)
        rows.append(LayerTime(name, params, (before, after), _why_nothing(params, before, after, kept.get(name, ""))))
    return rows


def _counterpart(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _times(net: nn.Module, layers: list[nn.Module], example_inputs: Any) -> list[float]:
    calls = calls_of(layers, net, example_inputs)
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    with inputs.evaluating(net), torch.no_grad():
        return [
            sum(seconds_of(functools.partial(layer, *args, **kwargs), device) for args, kwargs in calls[layer])
            for layer in _progress.track(layers, "timing layers")
        ]


def _why_nothing(params: tuple[int, ...], before: float, after: float, kept: str) -> str:
    if after <= GAIN * before:
        return ""
    if params[0] == params[1]:
        return kept or "nothing that it reads or writes was cut"
    return "smaller, but its time is not in its arithmetic: at this size calls and memory traffic take it"
