"""The public functions. Every draw has an explicit seed."""

from .conv import gated_conv1d, gated_conv2d, gated_conv3d
from .gates import expected_l0, gate_activations, open_probability, sample_gates
from .linear import gated_linear
from .norm import gated_affine, gated_batch_norm

__all__ = [
    "expected_l0",
    "gate_activations",
    "gated_affine",
    "gated_batch_norm",
    "gated_conv1d",
    "gated_conv2d",
    "gated_conv3d",
    "gated_linear",
    "open_probability",
    "sample_gates",
]
