"""GatedHeads: a linear layer that reads the heads of an attention, with a gate for each head."""

from __future__ import annotations

from torch import nn

from dampr import _checks
from dampr.gates import GateLike

from .computed import check_dense
from .linear import GatedLinear


class GatedHeads(GatedLinear):
    """``nn.Linear`` whose inputs are heads side by side, with a learned gate for each: y = sum over heads of z_h x_h
    W_h^T + b.

    It is made by :meth:`from_dense` from the output projection of an attention that is built of linear layers. With a
    closed gate nothing that its head computes has an effect. One gate may cover several heads, for example query heads
    that share a key and a value and can only be cut together.

    ``weights_per_gate`` is the number of parameters that a closed gate saves, for the penalty: its columns here, and
    its rows of query, key and value.
    """

    weights_per_gate: float

    @classmethod
    def from_dense(  # type: ignore[override]
        cls,
        layer: nn.Linear,
        *,
        heads: int,
        weights_per_gate: float | None = None,
        gate: GateLike = "hard_concrete",
    ) -> GatedHeads:
        """A gated layer with the very parameters of ``layer``, not copies; where fresh gates are not 1, they are
        divided by them.

        Args:
            heads: how many gates; each has ``in_features / heads`` columns.
            weights_per_gate: None: the weights in these columns.

        Raises: TypeError unless the type of ``layer`` is exactly ``nn.Linear``; ValueError where ``heads`` does not
        divide its inputs.
        """
        heads = _checks.positive_int("heads", heads)
        if weights_per_gate is not None:
            _checks.number("weights_per_gate", weights_per_gate, 0)
        check_dense(layer, nn.Linear)
        if layer.in_features % heads:
            raise ValueError(f"heads={heads}: expected a divisor of in_features={layer.in_features}")
        width = layer.in_features // heads
        gated: GatedHeads = cls._from_dense(layer, gate, (layer.out_features, width), False)
        gated.weights_per_gate = float(layer.out_features * width if weights_per_gate is None else weights_per_gate)
        return gated

    def group_size(self) -> float:
        """|g|, the number of parameters that a gate switches off."""
        return self.weights_per_gate

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """Two empty sets: heads are cut together with the attention around them, not as channels of this layer."""
        return set(), set()

    def open_heads(self) -> list[int]:
        """The indices of the gates that are open in evaluation, in increasing order."""
        found: list[int] = self.gate.is_open().nonzero().flatten().tolist()
        return found

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, heads={self.gate.num_gates}"
