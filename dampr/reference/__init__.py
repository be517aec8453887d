"""The reference: every operator in plain PyTorch, as simple as possible, with gradients from autograd.

Every backend is tested against it in float64.
"""

from .dependency_generator import dependency_generator
from .fold_weight import fold_blocks, fold_weight
from .gate_activations import gate_activations
from .gated_attention import gated_attention
from .gated_conv import gated_conv, weight_gated_conv
from .gated_linear import expand_blocks, gated_linear, weight_gated_linear
from .gated_rnn import gated_rnn
from .gates import (
    along,
    exp_portable,
    expected_l0,
    gate,
    gate_derivative,
    gate_values,
    mask,
    noise,
    open_probability,
    sign_swish,
)
from .norm_gate import norm_gate

__all__ = [
    "along",
    "dependency_generator",
    "exp_portable",
    "expand_blocks",
    "expected_l0",
    "fold_blocks",
    "fold_weight",
    "gate",
    "gate_activations",
    "gate_derivative",
    "gate_values",
    "gated_attention",
    "gated_conv",
    "gated_linear",
    "gated_rnn",
    "mask",
    "noise",
    "norm_gate",
    "open_probability",
    "sign_swish",
    "weight_gated_conv",
    "weight_gated_linear",
]
