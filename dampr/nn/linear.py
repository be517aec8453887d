"""GatedLinear, a drop-in for ``nn.Linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks, functional
from dampr.gates import Gate, make_gate
from dampr.reference import expand_blocks

from .base import GatedLayer

VECTOR_GRANULARITIES = ("output", "input")
Granularity = str | tuple[int, int]


class GatedLinear(GatedLayer, nn.Linear):
    """``nn.Linear`` with learned gates: y = z * (x W^T + b), y = (x * z) W^T + b, or y = x (Z * W)^T + b.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        granularity: ``"output"`` (a gate per row of ``weight``, its bias included), ``"input"`` (a gate per column), ``"weight"`` (a gate
            per weight) or ``(rows, cols)`` (a gate per block, in row-major order; partial blocks at the edges have gates too).
        per_sample: in training, one draw per row of the input flattened to (rows, in_features) instead of one per call; ``"output"`` and
            ``"input"`` only.

    Input (..., in_features), output (..., out_features). ``weight`` and ``bias`` come first in ``parameters()``; a dense ``state_dict``
    loads and leaves the gates as they are. A fresh layer equals the dense one in evaluation mode, to the bit (for an input of three or
    more dimensions that is not contiguous: to rounding, because ``nn.Linear`` then adds the bias in a step of its own).

    Raises: ValueError or TypeError that names the argument.
    """

    granularity: Granularity

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: str | type[Gate] | Gate = "hard_concrete",
        granularity: Granularity = "output",
        per_sample: bool = False,
    ) -> None:
        count = _gate_count(granularity, out_features, in_features)
        if per_sample and granularity not in VECTOR_GRANULARITIES:
            raise ValueError(f"per_sample=True with granularity={granularity!r}: expected one of {list(VECTOR_GRANULARITIES)} with it")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.granularity = granularity
        self.per_sample = bool(per_sample)
        self.gate = make_gate(gate, count, device)

    @property
    def block(self) -> tuple[int, int] | None:
        """The size of a block of weights that shares a gate, (1, 1) for ``"weight"``; None for vector gates."""
        return _block(self.granularity)

    def forward(self, x: Tensor) -> Tensor:
        seed, spec, parameter = self.gate.draw_seed(), self.gate.spec, self.gate.parameter
        block = self.block
        if block is not None:
            return functional.gated_linear(x, self.weight, self.bias, weight_gate=parameter, block=block, seed=seed, spec=spec)
        where: dict[str, Any] = {f"{self.granularity}_gate": parameter}
        return functional.gated_linear(x, self.weight, self.bias, seed=seed, per_sample=self.per_sample, spec=spec, **where)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Linear,
        *,
        gate: str | type[Gate] | Gate = "hard_concrete",
        granularity: Granularity = "output",
        per_sample: bool = False,
    ) -> GatedLinear:
        """A gated layer with the very parameters of ``layer``, not copies. Raises TypeError unless its type is exactly ``nn.Linear``."""
        if type(layer) is not nn.Linear:
            raise TypeError(f"layer={type(layer).__name__}: expected exactly nn.Linear")
        count = _gate_count(granularity, layer.out_features, layer.in_features)
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
        weight = self.weight * self._spread(z)
        dense.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            bias = self.bias * z if self.granularity == "output" else self.bias.clone()
            dense.bias = nn.Parameter(bias.to(self.bias.dtype), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def _spread(self, values: Tensor) -> Tensor:
        """One value per gate as something that broadcasts to the weight."""
        if self.granularity == "output":
            return values[:, None]
        block = self.block
        return values if block is None else expand_blocks(values, (self.out_features, self.in_features), block)

    def _collect(self, t: Tensor) -> Tensor:
        """Sums of ``t``, of the weight's shape, over the weights of each gate: (num_gates,)."""
        block = self.block
        if block is None:
            return t.sum(1 if self.granularity == "output" else 0)
        owner = self._spread(torch.arange(self.gate.num_gates, device=t.device))
        return t.new_zeros(self.gate.num_gates).index_add(0, owner.reshape(-1), t.reshape(-1))

    def closed_channels(self) -> tuple[set[int], set[int]]:
        shut = ~self.gate.is_open()
        if self.granularity == "output":
            return set(shut.nonzero().flatten().tolist()), set()
        if self.granularity == "input":
            return set(), set(shut.nonzero().flatten().tolist())
        grid = self._spread(shut)
        return set(grid.all(1).nonzero().flatten().tolist()), set(grid.all(0).nonzero().flatten().tolist())

    def group_size(self) -> float | Tensor:
        """|g|: how many parameters a gate switches off, its bias included where the gate reaches it; (num_gates,) for blocks."""
        block = self.block
        if block is None:
            return self.in_features + (self.bias is not None) if self.granularity == "output" else self.out_features
        sides = [
            torch.tensor([min(step, size - start) for start in range(0, size, step)], device=self.weight.device)
            for size, step in ((self.out_features, block[0]), (self.in_features, block[1]))
        ]
        return torch.outer(*sides).flatten() if block != (1, 1) else 1

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        cost: float | Tensor = lam * self.group_size()
        ungated: float | Tensor = 0.0
        if prior_precision:
            squares = self._collect(_wide(self.weight).square())
            bias = None if self.bias is None else _wide(self.bias).square()
            if bias is not None and self.granularity == "output":
                squares = squares + bias
            elif bias is not None:
                ungated = 0.5 * prior_precision * bias.sum()
            cost = cost + 0.5 * prior_precision * squares
        total: Tensor = (self.gate.open_probability() * cost).sum() + ungated
        return total

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, granularity={self.granularity!r}, per_sample={self.per_sample}"


def _wide(t: Tensor) -> Tensor:
    """At least float32, so that sums of squares of half-precision weights do not overflow."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _block(granularity: Any) -> tuple[int, int] | None:
    return (1, 1) if granularity == "weight" else granularity if isinstance(granularity, tuple) else None


def _gate_count(granularity: Any, out_features: int, in_features: int) -> int:
    block = _block(granularity)
    if block is not None:
        return _checks.block_count("granularity", block, out_features, in_features)
    if granularity not in VECTOR_GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: expected 'output', 'input', 'weight' or a tuple (rows, cols)")
    return out_features if granularity == "output" else in_features
