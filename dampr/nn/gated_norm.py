"""GatedNorm: the code that gated batch norms and gated layer norms share."""

from __future__ import annotations

import math
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from dampr import _checks, ops
from dampr.functional.inputs import gate_of
from dampr.gates import Gate, GateLike, make_gate, place_gate
from dampr.spec import SAMPLE, GateSpec

from .base import GatedLayer, fresh_values, wide_dtype
from .computed import check_dense, refresh, settled

_made: weakref.WeakSet[Any] = weakref.WeakSet()  # all gated norms of this process


def remember(norm: Any) -> None:
    """Enter a gated norm in the set that :func:`norms_with` searches."""
    _made.add(norm)


def norms_with(gate: Gate) -> list[Any]:
    """All gated norms of this process whose gate is this very object."""
    return [norm for norm in _made if getattr(norm, "gate", None) is gate]


class GatedNorm(GatedLayer):
    """A norm with a gate for each channel, mixed in before the ``torch.nn`` layer in ``_dense``: y = z * norm(x).

    ``weights_per_gate`` is what closing a gate saves, for the penalty: its own gain and bias and, where
    :func:`dampr.convert` moved the gate of a layer in front into the norm, the parameters of that layer's channel.
    """

    weight: Any
    bias: Any
    training: bool
    weights_per_gate: float
    _dense: type[nn.Module]
    _arguments: tuple[str, ...]

    def _place(self, gate: GateLike, count: int, per_sample: bool, device: Any) -> None:
        """Set up the gates: ``count`` of them, from the argument ``gate``."""
        self.granularity = "output"
        self.per_sample = _checks.flag("per_sample", per_sample)
        self.gate = place_gate(gate, count, device, self.per_sample)
        remember(self)
        self._count_weights()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        remember(self)

    def _count_weights(self) -> None:
        """Set ``weights_per_gate`` to the parameters of one channel: gain and bias, as far as there are any."""
        self.weights_per_gate = float((self.weight is not None) + (self.bias is not None))

    def _normed(
        self, x: Tensor, norm: ops.BatchNorm | ops.LayerNorm, parameter: Tensor, seed: Tensor | None, spec: GateSpec
    ) -> Tensor:
        """z * norm(x) for gates that are the same for all samples: they are multiplied into gain and bias."""
        weight = self.weight
        if weight is None:
            weight = torch.ones(self._gain_shape(), dtype=norm.gain_dtype(x), device=x.device)
        gate = gate_of("gate", parameter, weight.numel(), "channel", weight, seed, spec)
        return ops.folded_norm(x, weight, self.bias, gate, norm)

    def _gain_shape(self) -> tuple[int, ...]:
        """The shape of the gain."""
        raise NotImplementedError

    def _draws_per_sample(self) -> bool:
        """Whether this call draws gates for each sample."""
        return self.per_sample and self.gate.spec.rule == SAMPLE

    @classmethod
    def gates_for(cls, layer: Any, granularity: str = "output") -> int:
        """How many gates a dense ``layer`` would have, one for each channel."""
        count: int = layer.num_features if hasattr(layer, "num_features") else math.prod(layer.normalized_shape)
        return count

    @classmethod
    def from_dense(cls, layer: Any, *, gate: GateLike = "hard_concrete", per_sample: bool = False) -> Any:
        """A gated norm that takes over the parameters and statistics of ``layer`` themselves, not copies.

        If fresh gates are not 1, gain and bias are divided by them, so that the layer computes the same.

        Raises: TypeError unless the type of ``layer`` is exactly the dense one; ValueError if fresh gates are not 1 and
        the norm has no gain to divide.
        """
        check_dense(layer, cls._dense)
        build: Any = cls
        device = next((t.device for t in [*layer.parameters(), *layer.buffers()]), None)
        if not isinstance(gate, Gate):
            count = math.prod(getattr(layer, "normalized_shape", None) or (layer.num_features,))
            gate = make_gate(gate, count, device)
        gated = build(
            **{name: getattr(layer, name) for name in cls._arguments}, device="meta", gate=gate, per_sample=per_sample
        )
        gated._parameters.update(layer._parameters)
        gated._buffers.update(layer._buffers)
        gated._count_weights()  # a LayerNorm may have a gain and no bias
        gated.train(layer.training)
        gated._undo_fresh_gates()
        return gated

    @torch.no_grad()
    def _undo_fresh_gates(self) -> None:
        """Divide gain and bias by fresh gates that are not 1. Raises ValueError without a gain, or if a gate is 0."""
        if self.gate.starts_at_one():
            return
        z = fresh_values(self.gate)
        if self.weight is None or not bool((z != 0).all()):
            raise ValueError(
                f"gate={type(self.gate).__name__}: fresh gates are not 1, and this norm has no gain to make up for it"
            )
        self.weight.data = (self.weight / z.view(self.weight.shape)).to(self.weight.dtype)
        if self.bias is not None:
            self.bias.data = (self.bias / z.view(self.bias.shape)).to(self.bias.dtype)

    @torch.no_grad()
    @settled
    def to_dense(self) -> nn.Module:
        """The plain norm that computes what this layer computes in evaluation mode, with copies of parameters and
        statistics.

        A norm without a gain gets one, which holds the gates.
        """
        arguments = {name: getattr(self, name) for name in self._arguments}
        arguments |= {name: True for name in ("affine", "elementwise_affine") if name in arguments}
        like = next(
            (t for t in (self.weight, *self._own_buffers().values()) if t is not None and t.is_floating_point()), None
        )
        dense: Any = self._dense(**arguments, device="meta", dtype=None if like is None else like.dtype)
        z = self.gate.deterministic().view(self._gain_shape())
        wants_grad = self.weight is None or self.weight.requires_grad
        gain = z.clone() if self.weight is None else self.weight * z
        gain = gain if like is None else gain.to(like.dtype)
        dense.weight = nn.Parameter(gain, requires_grad=wants_grad)
        if dense.bias is not None:
            shift = torch.zeros_like(gain) if self.bias is None else (self.bias * z).to(self.bias.dtype)
            dense.bias = nn.Parameter(shift, requires_grad=wants_grad)
        if self.bias is None and self.weight is not None:
            dense.bias = None
        dense._buffers.update({name: None if t is None else t.clone() for name, t in self._own_buffers().items()})
        plain: nn.Module = dense.train(self.training)
        return plain

    def _own_buffers(self) -> dict[str, Tensor | None]:
        """The buffers of the norm, by name."""
        buffers: dict[str, Tensor | None] = self._buffers  # type: ignore[attr-defined]
        return buffers

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """(the channels whose gates are closed, an empty set)."""
        return set((~self.gate.is_open()).nonzero().flatten().tolist()), set()

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        cost: float | Tensor = lam * self.weights_per_gate
        if prior_precision:
            refresh(cast(nn.Module, self))
        for t in (self.weight, self.bias) if prior_precision else ():
            if t is not None:
                cost = cost + 0.5 * prior_precision * wide_dtype(t).square().view(-1)
        total: Tensor = (self.gate.open_probability() * cost).sum()
        return total

    def _describe_gates(self) -> str:
        return f"per_sample={self.per_sample}"
