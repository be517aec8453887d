"""GatedActivation: gates on any dimension of an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks, functional, reference
from dampr.functional.gates import gated_dimension, times_rows
from dampr.gates import GateLike, place_gate
from dampr.spec import value

from .base import GatedLayer
from .pruned.scale import Scale

VALUE = value()


class GatedActivation(GatedLayer, nn.Module):
    """Learned gates on one dimension of any activation: y = x * z along ``dim``.

    Args:
        num_gates: how many gates; without ``index`` the size of that dimension.
        dim: the dimension of the input that has the gates; negative counts from the end.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        per_sample: in training, one draw for each index of the first dimension of the input instead of one per call.
        index: the gate of each element of the dimension, int64, (x.shape[dim],), values in [0, num_gates), for any
            grouping. None: each element has a gate of its own.
        device: the device of the gates.

    The attribute ``weights_per_gate`` is the number of weights that closing one element of the dimension saves, for the
    penalty; 1 unless set. A gate of several elements counts once for each of them.

    The gates themselves, a :class:`dampr.gates.Gate`, are this layer's ``gate``. ``dampr.nn.Gate`` is the former name
    of this class.

    Raises: ValueError or TypeError that names the argument.

    >>> layer = GatedActivation(2, dim=-1, index=torch.tensor([0, 0, 1])).eval()
    >>> layer.gate.log_alpha.data[0] = -9.0
    >>> layer(torch.ones(1, 3))
    tensor([[0., 0., 1.]], grad_fn=<_GateActivationsBackward>)
    """

    index: Tensor | None

    def __init__(
        self,
        num_gates: int,
        dim: int = 1,
        *,
        gate: GateLike = "hard_concrete",
        per_sample: bool = False,
        index: Tensor | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        num_gates = _checks.positive_int("num_gates", num_gates)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim={dim!r}: expected an integer")
        if _checks.flag("per_sample", per_sample) and dim == 0:
            raise ValueError("per_sample=True with dim=0: expected the gates on another dimension than the samples")
        if index is not None:
            _check_index(index, num_gates)
            index = index.detach().to(device) if device is not None else index.detach()
        self.granularity = "output"
        self.dim = dim
        self.per_sample = _checks.flag("per_sample", per_sample)
        self.weights_per_gate = 1.0
        self.register_buffer("index", index, persistent=False)
        where = device if index is None else index.device
        self.gate = place_gate(gate, num_gates, where, self.per_sample and index is None)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` times the gates along the gated dimension, in the shape and dtype of ``x``. An ``index`` says which
        gate each element of the dimension has.
        """
        if self.per_sample:  # raises for an input without a dimension of samples
            gated_dimension(x, self.dim, per_sample=True)
        if self.sharded:
            from . import sharded  # loads torch.distributed.tensor

            each = self.gate(x.shape[0]) if self.per_sample and self.gate.draws else self.gate()
            each = each if self.index is None else each[..., self.index]
            return sharded.times(x, reference.along(each, x, self.dim % x.dim()))
        if self.index is None:
            parameter, seed, spec = self.gate.call()
            offset = self.gate.index_offset(x.shape[0]) if self.per_sample and seed is not None else 0
            how: dict[str, Any] = {"seed": seed, "per_sample": self.per_sample, "spec": spec, "index_offset": offset}
            return functional.gate_activations(x, parameter, dim=self.dim, **how)
        if not (self.per_sample and self.gate.draws):
            return functional.gate_activations(x, self.gate()[self.index], dim=self.dim, spec=VALUE)
        return times_rows(x, self.gate(x.shape[0])[:, self.index], self.dim % x.dim())

    @property
    def num_features(self) -> int:
        """The size of the dimension that has the gates."""
        return self.gate.num_gates if self.index is None else self.index.numel()

    def _each(self, values: Tensor) -> Tensor:
        """Values of gates, (num_gates,), as values of the elements of the dimension."""
        return values if self.index is None else values[self.index]

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        """lam * weights_per_gate * the sum of open probabilities over the elements of the dimension, a scalar.

        ``prior_precision`` is ignored, because the layer has no weights.
        """
        total: Tensor = lam * self.weights_per_gate * self._each(self.gate.open_probability()).sum()
        return total

    def channel_gates(self) -> Tensor:
        """The gate of each element of the dimension, int64."""
        return torch.arange(self.gate.num_gates) if self.index is None else self.index.cpu()

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """(the elements of the dimension whose gates are closed, an empty set)."""
        return set(self._each(~self.gate.is_open()).nonzero().flatten().tolist()), set()

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """``nn.Identity`` if every gate is 1 in evaluation mode, else a :class:`Scale` with the values."""
        z = self._each(self.gate.deterministic())
        plain = nn.Identity() if bool((z == 1).all()) else Scale(z.clone(), self.dim)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        grouped = "" if self.index is None else f", index of {self.index.numel()}"
        return f"dim={self.dim}, per_sample={self.per_sample}{grouped}"


def _check_index(index: Any, num_gates: int) -> None:
    """Raise ValueError unless ``index`` is int64, of one dimension, with values in [0, num_gates)."""
    if _checks.tensor("index", index).dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"index: got {index.dtype} of shape {tuple(index.shape)}, expected int64 of shape (x.shape[dim],)"
        )
    if index.numel() and not index.is_meta and not 0 <= int(index.min()) <= int(index.max()) < num_gates:
        raise ValueError(
            f"index: its values are in [{int(index.min())}, {int(index.max())}], expected [0, {num_gates}), the gates"
        )
