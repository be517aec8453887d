"""Counting: parameters and multiply-accumulates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dampr.gates import Gate

from . import inputs


def count_params(model: nn.Module) -> int:
    """Parameters without those of gates; a shared parameter counts once."""
    gates = {id(p) for module in model.modules() if isinstance(module, Gate) for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in gates)


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one evaluation pass over the example inputs, as ``torch.utils.flop_counter`` counts them (two FLOPs each).

    A gated layer counts as its dense counterpart does. Attention is counted in its parts: the counter knows none of its fused kernels on a
    CPU, nor those of a whole encoder layer.
    """
    parts = inputs.unfused(), sdpa_kernel(SDPBackend.MATH)
    with parts[0], parts[1], inputs.evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        inputs.call(model, example_inputs)
    return counter.get_total_flops() // 2
