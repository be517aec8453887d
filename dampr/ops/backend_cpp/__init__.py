"""The CPU backend: C++ multiplies the gates (:mod:`dampr._C`, which sees raw pointers), torch's GEMM the matrices.

Per batch, one pass before the GEMM folds the gates into the weight, and one pass after the GEMM of the backward takes
the gradients of weight and gates from that of the folded weight. Per sample, gates are drawn while the activations are
multiplied, and drawn again in the backward. Derivations: docs/kernels.md.
"""

from __future__ import annotations

import torch

from dampr import _C  # type: ignore[attr-defined]

from . import folded_norm, gated_conv, products, skip_closed, small_linear
from .dependency_generator import GENERATOR_PARAMETERS, dependency_generator_bwd, dependency_generator_fwd
from .fold_weight import fold_weight_bwd, fold_weight_fwd
from .gate_activations import gate_activations_bwd, gate_activations_fwd
from .gated_conv import gated_conv2d_fwd
from .gated_linear import gated_linear_bwd, gated_linear_fwd, plan_linear
from .gates import sample_gates_bwd, sample_gates_fwd
from .host import CODES
from .norm_gate import norm_gate_bwd, norm_gate_fwd
from .routes import conv_route, route
from .weight_gated_linear import (
    fold_blocks_bwd,
    fold_blocks_fwd,
    plan_weights,
    weight_gated_linear_bwd,
    weight_gated_linear_fwd,
)

fused_norms = (True, False)  # norm, gates and running statistics are one call for these values of ``per_sample``

__all__ = [
    "GENERATOR_PARAMETERS",
    "conv_route",
    "dependency_generator_bwd",
    "dependency_generator_fwd",
    "describe",
    "fold_blocks_bwd",
    "fold_blocks_fwd",
    "fold_weight_bwd",
    "fold_weight_fwd",
    "folded_norm",
    "fused_norms",
    "gate_activations_bwd",
    "gate_activations_fwd",
    "gated_conv",
    "gated_conv2d_fwd",
    "gated_linear_bwd",
    "gated_linear_fwd",
    "norm_gate_bwd",
    "norm_gate_fwd",
    "plan_linear",
    "plan_weights",
    "products",
    "route",
    "sample_gates_bwd",
    "sample_gates_fwd",
    "skip_closed",
    "small_linear",
    "unavailable",
    "weight_gated_linear_bwd",
    "weight_gated_linear_fwd",
]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why this backend cannot run tensors of this device and dtype; None if it can."""
    if device.type != "cpu":
        return f"it runs on cpu tensors, not on {device.type}"
    if dtype not in CODES:
        return f"it takes float32, float64, bfloat16 and float16, not {dtype}"
    return None


def describe() -> str:
    """The instruction set in use, in words."""
    return f"instruction set {_C.isa()}"
