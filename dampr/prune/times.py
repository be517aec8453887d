"""Where compaction gained time: each layer timed before and after, on this device, with a reason if it gained none."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dampr import _progress
from dampr.nn import PrunedMultiheadAttention, ScaledRNN, StackedRNN

from . import inputs
from .latency import calls_of, seconds_of
from .layers.registry import kind_of
from .modules import of_kind
from .wrapped import sees_through

GAIN = 0.95  # a layer has gained time if it takes at most this share of its time before compaction


@dataclass(frozen=True)
class LayerTime:
    """The times of one layer, gated and compacted.

    Attributes:
        name: its name in the compacted model.
        params: the number of its parameters without gates, (gated, compacted).
        seconds: the time of all its calls in one evaluation pass, (gated, compacted).
        note: why it gained no time; empty if it did.
    """

    name: str
    params: tuple[int, int]
    seconds: tuple[float, float]
    note: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@sees_through
def layer_times(model: nn.Module, small: nn.Module, example_inputs: Any) -> list[LayerTime]:
    """Time the layers of ``small`` and the layers of ``model`` from which they were compacted.

    Each layer is called alone, in evaluation mode, with the arguments that it gets on the example inputs. A gated layer
    multiplies its gates in each call, as it does in training. On a GPU, the calls are launched one after the other and
    the host waits once, at the end.

    Args:
        model: the gated model; not changed.
        small: what :func:`dampr.compact` made of it, with its manifest.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns: linear, convolution, recurrent and attention layers in the order of ``small``.

    Raises: ValueError if ``small`` has no manifest; what the models raise on the example inputs.
    """
    manifest = getattr(small, "dampr_manifest", None)
    if not isinstance(manifest, dict):
        raise ValueError(f"small={type(small).__name__}: expected the dampr_manifest that dampr.compact leaves")
    whole = of_kind(small, (nn.MultiheadAttention, PrunedMultiheadAttention, ScaledRNN, StackedRNN))
    inside = {part for layer in whole for part in layer.modules() if part is not layer}
    names = [
        name
        for name, layer in small.named_modules()
        if layer not in inside and (layer in whole or kind_of(layer).gemm or kind_of(layer).recurrent)
    ]
    pairs = {name: (_counterpart(model, name), small.get_submodule(name)) for name in names}
    pairs = {name: pair for name, pair in pairs.items() if pair[0] is not None}
    times = [
        _times(net, [pair[side] for pair in pairs.values()], example_inputs) for side, net in enumerate((model, small))
    ]
    kept = manifest.get("closed_but_kept", {})
    rows = []
    for (name, pair), before, after in zip(pairs.items(), *times, strict=True):
        params = tuple(sum(p.numel() for n, p in layer.named_parameters() if "gate" not in n) for layer in pair)
        rows.append(LayerTime(name, params, (before, after), _why_no_gain(params, before, after, kept.get(name, ""))))
    return rows


def _counterpart(model: nn.Module, name: str) -> Any:
    """The layer ``name`` of ``model``; None if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _times(net: nn.Module, layers: list[nn.Module], example_inputs: Any) -> list[float]:
    """The seconds of all calls of each layer in one evaluation pass of ``net``."""
    calls = calls_of(layers, net, example_inputs)
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    with inputs.evaluating(net), torch.no_grad():
        return [
            sum(seconds_of(functools.partial(layer, *args, **kwargs), device) for args, kwargs in calls[layer])
            for layer in _progress.track(layers, "timing layers")
        ]


def _why_no_gain(params: tuple[int, ...], before: float, after: float, kept: str) -> str:
    """Why a layer gained no time; empty if it did.

    Args:
        params: the number of its parameters, (gated, compacted).
        before, after: its seconds, gated and compacted.
        kept: the reason in the manifest why its closed units were kept; empty if there is none.
    """
    if after <= GAIN * before:
        return ""
    if params[0] == params[1]:
        return kept or "nothing that it reads or writes was cut"
    return "smaller, but its time is not in its arithmetic: at this size calls and memory traffic take it"
