"""Gates while a budget owns them: their parameters are not parameters of the model, so no optimizer, weight decay or
gradient clipping changes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks

from .base import Gate


class SteppedGate(Gate):
    """z = value * s(level) with s(l) = l^2 (3 - 2 l): a gate that a budget closes in steps, chosen by importance.

    In training z is multiplied by (1 + probe) with probe = 0. So ``probe.grad`` is z dL/dz, summed over all calls since
    it was cleared: the first-order Taylor importance of each unit, for any layer (Molchanov et al. 2017, eq. 8, without
    the absolute value).

    Args:
        former: the gate that it replaces; ``value`` is its value in evaluation.

    Attributes:
        value: (num_gates,), buffer.
        level: (num_gates,), buffer in [0, 1]: 1 is open, 0 is closed.
        probe: (num_gates,), a leaf tensor that is not a parameter of the model and in no ``state_dict``.
    """

    value: Tensor
    level: Tensor
    probe: Tensor

    def __init__(self, former: Gate) -> None:
        super().__init__(former.num_gates)
        value = former.deterministic().detach().clone()
        self.register_buffer("value", value)
        self.register_buffer("level", torch.ones_like(value))
        self.probe = torch.zeros_like(value, requires_grad=True)
        self.train(former.training)

    def forward(self, rows: int | None = None) -> Tensor:
        rows, z = _checks.rows(rows), self.deterministic()
        if self.training and torch.is_grad_enabled():
            z = z * (1 + self.probe)
        return z if rows is None else z.expand(rows, -1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every level to 1 (open); ``value`` does not change."""
        self.level.fill_(1.0)

    def deterministic(self) -> Tensor:
        return self.value * self.level.square() * (3 - 2 * self.level)

    def open_probability(self) -> Tensor:
        """s(level) of each gate, in [0, 1], (num_gates,), without a graph."""
        return self.level.square() * (3 - 2 * self.level)

    def is_open(self) -> Tensor:
        return (self.level > 0) & (self.value != 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SteppedGate:
        super()._apply(fn, recurse)
        self.probe = torch.zeros_like(self.value, requires_grad=True)
        return self


class OwnedGate(Gate):
    """A gate of any family whose parameters are hidden from ``model.parameters()``; its values are those of the family.

    A ``state_dict`` holds the parameters under the names that they have in the family.

    Args:
        family: the gate that is owned.

    Attributes:
        family: the gate that is owned.
        held: whether values are those of evaluation, without noise and gradient, as during a warm-up.
        probe: as in :class:`SteppedGate`.
    """

    probe: Tensor

    def __init__(self, family: Gate) -> None:
        super().__init__(family.num_gates)
        self._hidden = (family,)  # in a tuple, where torch does not look for modules
        self.held = False
        self.probe = torch.zeros_like(family.deterministic().detach(), requires_grad=True)
        self.train(family.training)

    def reset_parameters(self) -> None:
        self.family.reset_parameters()

    @property
    def family(self) -> Gate:
        """The gate that is owned, in the same mode (training or evaluation)."""
        (family,) = self._hidden
        if family.training != self.training:
            family.train(self.training)
        return family

    def forward(self, rows: int | None = None) -> Tensor:
        family, rows = self.family, _checks.rows(rows)
        z = family.deterministic().detach() if self.held else family.forward()
        if self.training and torch.is_grad_enabled():
            z = z * (1 + self.probe)
        return z if rows is None else z.expand(rows, -1)

    def deterministic(self) -> Tensor:
        return self.family.deterministic()

    def open_probability(self) -> Tensor:
        return self.family.open_probability()

    def is_open(self) -> Tensor:
        return self.family.is_open()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OwnedGate:
        super()._apply(fn, recurse)
        self.family._apply(fn)
        self.probe = torch.zeros_like(self.family.deterministic().detach(), requires_grad=True)
        return self

    def __getattr__(self, name: str) -> Any:
        """Find the parameters of the family by name, which ``torch.distributed.checkpoint`` looks up in this module."""
        for module in self.__dict__.get("_hidden", ()):
            for kind in ("_parameters", "_buffers", "_modules"):
                if name in module.__dict__[kind]:
                    return module.__dict__[kind][name]
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.family.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        parts: list[tuple[str, nn.Module]] = list(self.family.named_modules(remove_duplicate=False))
        for name, module in parts:
            module._load_from_state_dict(state_dict, prefix + f"{name}." if name else prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return f"{type(self.family).__name__}({self.family.extra_repr()}), held={self.held}"
