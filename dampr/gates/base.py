"""What a layer knows of a gate family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks, philox
from dampr.spec import SAMPLE, GateSpec


class Gate(nn.Module):
    """A vector of learned gates; the interface of every family.

    In training mode gates are drawn, in evaluation mode they are deterministic. Gate parameters stay in float32 (or float64) when a model
    is cast to half precision.
    """

    num_gates: int

    def __init__(self, num_gates: int) -> None:
        super().__init__()
        _checks.positive_int("num_gates", num_gates)
        self.num_gates = num_gates

    @property
    @abstractmethod
    def spec(self) -> GateSpec:
        """Family and constants for the current mode (training or evaluation), for the fused ops."""

    @property
    @abstractmethod
    def parameter(self) -> Tensor:
        """The gate parameters that the fused ops take, (num_gates,)."""

    @abstractmethod
    def forward(self, rows: int | None = None) -> Tensor:
        """Gate values: (num_gates,), or (rows, num_gates) with one draw per row; drawn in training, deterministic in evaluation."""

    @abstractmethod
    def deterministic(self) -> Tensor:
        """The evaluation values in either mode, (num_gates,)."""

    @abstractmethod
    def open_probability(self) -> Tensor:
        """The differentiable surrogate count of each gate, (num_gates,): the probability of being open where the family draws."""

    @abstractmethod
    def is_open(self) -> Tensor:
        """The evaluation decision: bool, (num_gates,)."""

    def draw_seed(self) -> Tensor | None:
        """A fresh seed on the device of the gates (int64, (1,)), or None in a mode without noise."""
        return self.call()[1]

    def call(self) -> tuple[Tensor, Tensor | None, GateSpec]:
        """What a fused op takes for one call in the present mode: the parameters, a fresh seed or None, and the spec."""
        parameter, spec = self.parameter, self.spec
        return parameter, philox.draw_seed(parameter.device) if spec.rule == SAMPLE else None, spec

    def extra_repr(self) -> str:
        return f"num_gates={self.num_gates}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device, torch.float32) if out.is_floating_point() and out.dtype not in _checks.GATE_DTYPES else out

        super()._apply(keep_precision, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A dense checkpoint of the layer around it has no gates: they stay as they are.
        if not prefix or any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def make_gate(gate: str | type[Gate] | Gate, num_gates: int, device: torch.device | str | None = None) -> Gate:
    """A gate of ``num_gates`` from a family's name, a class, or an instance to share.

    Raises ValueError for an unknown name or an instance with another count, NotImplementedError for a family that is planned, TypeError for
    anything else.
    """
    from .hard_concrete import HardConcrete

    families: dict[str, Callable[..., Gate]] = {"hard_concrete": HardConcrete}
    if isinstance(gate, Gate):
        if gate.num_gates != num_gates:
            raise ValueError(f"gate.num_gates={gate.num_gates}: expected {num_gates}, one per prunable unit of the layer")
        return gate
    if gate in ("dep_l0", "dam", "diffprune", "diffmask"):
        raise NotImplementedError(f"gate={gate!r}: this version has {sorted(families)} only")
    if isinstance(gate, str):
        _checks.one_of("gate", gate, sorted(families))
        return families[gate](num_gates, device=device)
    if isinstance(gate, type) and issubclass(gate, Gate):
        return gate(num_gates, device=device)  # type: ignore[call-arg]
    raise TypeError(f"gate={gate!r}: expected a family's name {sorted(families)}, a subclass of dampr.gates.Gate, or an instance to share")
