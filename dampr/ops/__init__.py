"""Operators: schema, fakes, autograd; the only caller of dampr.kernels and of the C++ extension.

Each op is a forward and a backward, both registered with :mod:`torch.library`, behind one ``autograd.Function``. Nothing is mutated, and
nothing is saved but inputs and seeds (and, where a per-sample output gate learns, the activation before it). Inside, :mod:`.backends`
picks who computes.
"""

from .backends import BackendUnavailableError, backend, backend_info, choose
from .gated_linear import gated_linear
from .sample_gates import sample_gates

__all__ = ["BackendUnavailableError", "backend", "backend_info", "choose", "gated_linear", "sample_gates"]
