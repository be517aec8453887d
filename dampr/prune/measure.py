"""Counting: parameters and multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dampr.gates import Gate

from . import inputs


def _recurrent_flops(x: torch.Size, *weights: Any, **_: Any) -> int:
    """Two FLOPs for each element of a matrix in each step: recurrent kernels of vendors, which torch does not count."""
    matrices = weights[0] if isinstance(weights[0], list) else weights[:2]
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in matrices if shape is not None and len(shape) == 2)


_RECURRENT = {torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops, torch.ops.aten._cudnn_rnn: _recurrent_flops}


def count_params(model: nn.Module) -> int:
    """Parameters without those of gates; a shared parameter counts once."""
    gates = {id(p) for module in model.modules() if isinstance(module, Gate) for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in gates)


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one evaluation pass over the example inputs, as ``torch.utils.flop_counter`` counts them (two FLOPs each).

    A gated layer counts as its dense counterpart does. Attention is counted in its parts: the counter knows none of its fused kernels on a
    CPU, nor those of a whole encoder layer.
    """
    with inputs.evaluating(model), inputs.frozen(model), torch.no_grad():
        return count_call(inputs.call, model, example_inputs)


def count_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of one call, counted like :func:`count_macs`."""
    return _counted(function, *args, **kwargs).get_total_flops() // 2


def macs_beside_layers(model: nn.Module, example_inputs: Any, names: Iterable[str]) -> dict[str, int]:
    """The same for each of the modules ``names``, without what the layers inside of it count: of attention its scores and their use."""
    with inputs.evaluating(model), inputs.frozen(model), torch.no_grad():
        counts = _counted(inputs.call, model, example_inputs).get_flop_counts()
    root = type(model).__name__
    flops = {name: sum(by_operator.values()) for name, by_operator in counts.items()}
    found = {}
    for name in names:
        layers = [f"{root}.{name}.{inner}" for inner, m in model.get_submodule(name).named_modules() if inner and hasattr(m, "weight")]
        found[name] = (flops.get(f"{root}.{name}", 0) - sum(flops.get(layer, 0) for layer in layers)) // 2
    return found


def _counted(function: Callable[..., Any], *args: Any, **kwargs: Any) -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=_RECURRENT)
    with inputs.unfused(), sdpa_kernel(SDPBackend.MATH), counter:
        function(*args, **kwargs)
    return counter
