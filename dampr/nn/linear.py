"""GatedLinear, a drop-in for ``nn.Linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks, functional
from dampr.gates import Gate, make_gate

from .base import GatedLayer

GRANULARITIES = ("output", "input")


class GatedLinear(GatedLayer, nn.Linear):
    """``nn.Linear`` with learned gates: y = z * (x W^T + b) on outputs, or y = (x * z) W^T + b on inputs.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        granularity: ``"output"`` (a gate per row of ``weight``, its bias included) or ``"input"`` (a gate per column).
        per_sample: in training, one draw per row of the input flattened to (rows, in_features) instead of one per call.

    Input (..., in_features), output (..., out_features). ``weight`` and ``bias`` come first in ``parameters()``; a dense ``state_dict``
    loads and leaves the gates as they are. A fresh layer equals the dense one to the bit in evaluation mode.

    Raises: ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: str | type[Gate] | Gate = "hard_concrete",
        granularity: str = "output",
        per_sample: bool = False,
    ) -> None:
        _checks.one_of("granularity", granularity, GRANULARITIES)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.granularity = granularity
        self.per_sample = bool(per_sample)
        self.gate = make_gate(gate, out_features if granularity == "output" else in_features, device)

    def forward(self, x: Tensor) -> Tensor:
        where = {f"{self.granularity}_gate": self.gate.parameter}
        seed, spec = self.gate.draw_seed(), self.gate.spec
        return functional.gated_linear(x, self.weight, self.bias, seed=seed, per_sample=self.per_sample, spec=spec, **where)

    @classmethod
    def from_dense(
        cls, layer: nn.Linear, *, gate: str | type[Gate] | Gate = "hard_concrete", granularity: str = "output", per_sample: bool = False
    ) -> GatedLinear:
        """A gated layer with the very parameters of ``layer``, not copies. Raises TypeError unless its type is exactly ``nn.Linear``."""
        if type(layer) is not nn.Linear:
            raise TypeError(f"layer={type(layer).__name__}: expected exactly nn.Linear")
        _checks.one_of("granularity", granularity, GRANULARITIES)
        count = layer.out_features if granularity == "output" else layer.in_features
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        gate = make_gate(gate, count, layer.weight.device)
        # Built on the meta device: no second weight is allocated, and no random number is drawn.
        gated = cls(*shape, "meta", layer.weight.dtype, gate=gate, granularity=granularity, per_sample=per_sample)
        gated.weight, gated.bias = layer.weight, layer.bias
        return gated.train(layer.training)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """A plain ``nn.Linear`` that computes what this layer computes in evaluation mode; parameters are copies."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", self.weight.dtype)
        z = self.gate.deterministic()
        weight = self.weight * (z[:, None] if self.granularity == "output" else z)
        dense.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            bias = self.bias * z if self.granularity == "output" else self.bias.clone()
            dense.bias = nn.Parameter(bias.to(self.bias.dtype), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def group_size(self) -> int:
        return self.in_features + (self.bias is not None) if self.granularity == "output" else self.out_features

    def group_sq_norm(self) -> Tensor:
        if self.granularity == "input":
            return _wide(self.weight).square().sum(0)
        squares = _wide(self.weight).square().sum(1)
        return squares if self.bias is None else squares + _wide(self.bias).square()

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        total = (self.gate.open_probability() * lam * self.group_size()).sum()
        if prior_precision:
            total = total + 0.5 * prior_precision * (self.gate.open_probability() * self.group_sq_norm()).sum()
            if self.granularity == "input" and self.bias is not None:
                total = total + 0.5 * prior_precision * _wide(self.bias).square().sum()
        return total

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, granularity={self.granularity!r}, per_sample={self.per_sample}"


def _wide(t: Tensor) -> Tensor:
    """At least float32, so that sums of squares of half-precision weights do not overflow."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
