"""Whether a model runs at all when a width of it is smaller, which is tried on a copy before anything is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import graph, inputs
from .structure import plain_copy


def stuck(model: nn.Module, layers: list[str], example_inputs: Any) -> dict[str, str]:
    """Of these layers of a model, those whose outputs are as many as something beside layers expects, and why.

    What views channels as heads, or adds a tensor of its own to them, does not run without one of them. All are tried at once, and only if
    that fails halves of them, each in a copy of its own.
    """
    reason = _fails(model, layers, example_inputs) if layers else None
    if reason is None:
        return {}
    if len(layers) == 1:
        return {layers[0]: reason}
    half = len(layers) // 2
    return stuck(model, layers[:half], example_inputs) | stuck(model, layers[half:], example_inputs)


def _fails(model: nn.Module, layers: list[str], example_inputs: Any) -> str | None:
    """Why the model does not run with one channel less in each of these widths; None where it does."""
    try:
        trial = plain_copy(model, example_inputs)
    except Exception:  # a model that cannot be copied, which convert alone does not have to
        return None
    widths = graph.Widths(trial, example_inputs)
    cut: set[nn.Module] = set()
    try:
        for name in layers:
            layer = trial.get_submodule(name)
            if layer in cut or graph.channel_count(layer, True) == 1:
                continue
            group = widths.group(layer, True, [graph.channel_count(layer, True) - 1])
            cut |= {module for (module, writes), *_ in widths.sides(group) if writes}
            group.prune(record_history=False)
        with inputs.same_noise(trial), inputs.unfused():
            inputs.evaluate(trial, example_inputs)
    except Exception as error:  # whatever the model makes of a width that it does not expect
        return f"without one of its channels the model does not run, so something beside its layers has that width ({error})"
    return None
