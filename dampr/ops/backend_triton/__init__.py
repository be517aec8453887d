"""The Triton backend: the host code that launches the kernels of :mod:`dampr.kernels`, with layouts, tile sizes and
workspaces.

The equations are in the kernel modules of the same names. The functions have the names and arguments of the other
backends. :mod:`.routes` chooses the kernels of a call; :mod:`.host` holds what all launches share.
"""

from __future__ import annotations

import torch
import triton

from dampr.kernels import gates as gate_kernels
from dampr.ops.routes import forced_route

from . import host
from .dependency_generator import GENERATOR_PARAMETERS, dependency_generator_bwd, dependency_generator_fwd
from .gate_activations import gate_activations_bwd, gate_activations_fwd
from .gated_conv2d import gated_conv2d_fwd
from .gated_linear import (
    fold_weight_bwd,
    fold_weight_fwd,
    gated_linear_bwd,
    gated_linear_fwd,
    gated_linear_live_fwd,
    plan_linear,
)
from .gates import sample_gates_bwd, sample_gates_fwd
from .norm_gate import norm_gate_bwd, norm_gate_fwd
from .routes import conv_route, route
from .weight_gated_linear import (
    fold_blocks_bwd,
    fold_blocks_fwd,
    plan_weights,
    weight_gated_linear_bwd,
    weight_gated_linear_fwd,
)

fused_norms = (True,)  # norm, gates and running statistics are one call for these values of ``per_sample``

__all__ = [
    "GENERATOR_PARAMETERS",
    "conv_route",
    "dependency_generator_bwd",
    "dependency_generator_fwd",
    "fold_blocks_bwd",
    "fold_blocks_fwd",
    "fold_weight_bwd",
    "fold_weight_fwd",
    "forced_route",
    "fused_norms",
    "gate_activations_bwd",
    "gate_activations_fwd",
    "gated_conv2d_fwd",
    "gated_linear_bwd",
    "gated_linear_fwd",
    "gated_linear_live_fwd",
    "norm_gate_bwd",
    "norm_gate_fwd",
    "plan_linear",
    "plan_weights",
    "route",
    "sample_gates_bwd",
    "sample_gates_fwd",
    "unavailable",
    "weight_gated_linear_bwd",
    "weight_gated_linear_fwd",
]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the kernels cannot run tensors of this device and dtype; None if they can."""
    if dtype not in host.DTYPE_NAMES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    interpreted = not isinstance(gate_kernels.reduce_kernel, triton.JITFunction)
    if device.type == "cuda" or interpreted:
        return None
    return (
        f"its kernels need a CUDA device, not {device} (TRITON_INTERPRET=1, set before triton is imported, runs them "
        "on the CPU)"
    )
