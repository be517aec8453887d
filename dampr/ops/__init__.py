"""The operators of dampr: schemas, implementations, autograd. Only this package calls :mod:`dampr.kernels` and the C++
extension.

Each operator has a forward and a backward, both registered with :mod:`torch.library`, and an autograd function that
joins them. The same function in plain PyTorch serves all other derivatives (:mod:`.node`). Operators change none of
their arguments. The backward gets the inputs and the seeds of the forward, and draws the gates again; only where an
output gate multiplies activations and learns, the activation in front of it is saved too. :mod:`.backends` chooses
the backend that computes.
"""

from .backends import BackendUnavailableError, backend, backend_info, choose, select
from .dependency_generator import dependency_generator
from .fold_conv import fold_channels, fold_filters
from .fold_weight import fold_blocks, fold_weight
from .folded_norm import BatchNorm, LayerNorm, affine, folded_norm
from .gate_activations import gate_activations
from .gate_args import GateArgs, GatePair
from .gate_bank import gate_bank, joined
from .gated_conv import Window, composed_conv, gated_conv
from .gated_conv2d import gated_conv2d
from .gated_linear import gated_linear
from .node import is_transformed
from .norm_gate import fused_norm, has_fused_norm, norm_gate
from .routes import forced_route
from .sample_gates import sample_gates
from .skip_closed import on_open_gates
from .weight_gated_linear import weight_gated_linear

__all__ = [
    "BackendUnavailableError",
    "BatchNorm",
    "GateArgs",
    "GatePair",
    "LayerNorm",
    "Window",
    "affine",
    "backend",
    "backend_info",
    "choose",
    "composed_conv",
    "dependency_generator",
    "fold_blocks",
    "fold_channels",
    "fold_filters",
    "fold_weight",
    "folded_norm",
    "forced_route",
    "fused_norm",
    "gate_activations",
    "gate_bank",
    "gated_conv",
    "gated_conv2d",
    "gated_linear",
    "has_fused_norm",
    "is_transformed",
    "joined",
    "norm_gate",
    "on_open_gates",
    "sample_gates",
    "select",
    "weight_gated_linear",
]
