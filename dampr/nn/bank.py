"""GateBank: draw all gates of a model in one launch, and compute their penalty and gradients in one launch each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks, ops
from dampr.gates import Gate, HardConcrete, ranks
from dampr.gates.draws import share_generator
from dampr.spec import GateSpec

from .base import GatedLayer


class GateBank:
    """Draws the hard concrete gates of a whole model together, with one kernel launch for the forward and one for the
    backward. The penalty comes with them.

    Without a bank each gated layer draws its own gates, which in a deep network means hundreds of launches of
    kernels with almost no work. Within :meth:`draw` all hard concrete gates with the same constants are one vector
    with one seed: gate i has the noise (seed, i), as :func:`dampr.functional.sample_gates` draws it for that vector,
    bit for bit. Each layer gets its part as a view. The parameters of the gates become views of one block of memory;
    optimizers and state dicts see no difference. The seed is the one that the first of the gates would have used
    alone, so :func:`dampr.gate_generator` and :func:`dampr.hold_draws` still apply, and all ranks draw the same.

    Gates of other families, and gates of layers that draw for each sample, are drawn by their layers as without a
    bank; :meth:`penalty` includes them. Make a new bank after units have been removed from the model
    (:class:`dampr.Shrinker`), because closing a gate then saves another number of parameters. Checkpointed regions
    need ``use_reentrant=False``.

    Args:
        model: a model with gated layers, on the device where it trains.

    Attributes:
        model: the model.
        gates: the gates that are drawn together, in their order in the vectors.

    :meth:`draw` raises RuntimeError if the model's gated layers, or their gates, are not those of when the bank was
    made.

    Raises: TypeError unless ``model`` is a module; ValueError if it has no gates that can be drawn together.

    >>> import dampr
    >>> model = dampr.convert(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(2, 8))
    >>> bank = GateBank(model)
    >>> with bank.draw():
    ...     loss = model(torch.randn(4, 8)).square().mean() + 1e-3 * bank.penalty()
    >>> loss.backward()
    """

    def __init__(self, model: nn.Module) -> None:
        _checks.module("model", model)
        ranks.check_seen(model, ranks.FORMER)
        self.model = model
        self._seen = _gates_in(model)
        layers = [layer for layer, _ in self._seen]
        alone = {layer.gate for layer in layers if layer.per_sample}
        together = dict.fromkeys(
            layer.gate for layer in layers if type(layer.gate) is HardConcrete and layer.gate not in alone
        )
        if not together:
            raise ValueError(
                f"model={type(model).__name__}: it has no hard concrete gates that are drawn once per call; expected "
                "some"
            )
        share_generator(ranks.unwrapped(model))
        self.gates: list[Gate] = list(together)
        self._others = [layer for layer in layers if layer.gate not in together]
        costs = _costs([layer for layer in layers if layer.gate in together], self.gates)
        groups: dict[Any, list[HardConcrete]] = defaultdict(list)
        for gate in together:
            assert isinstance(gate, HardConcrete)
            groups[gate._drawn, gate.log_alpha.device, gate.log_alpha.dtype].append(gate)
        self._groups = [_Group(spec, found, [costs[gate] for gate in found]) for (spec, _, _), found in groups.items()]

    @contextmanager
    def draw(self) -> Iterator[None]:
        """A block in which all calls of the model use one draw of the gates; the penalty of that draw is
        :meth:`penalty`.

        For training mode. Raises RuntimeError if the model's gates have changed, or within another such block.
        """
        if _gates_in(self.model) != self._seen:
            raise RuntimeError("draw(): the model's gates are others than when this bank was made; expected a new bank")
        if any(gate._banked is not None and gate._banked.value is not None for gate in self.gates):
            raise RuntimeError("draw() inside of draw(): expected one block for each step")
        try:
            for group in self._groups:
                group.draw()
            yield
        finally:
            for group in self._groups:
                group.let_go()

    def penalty(self, lam: float | Tensor = 1.0) -> Tensor:
        """:func:`dampr.penalty` of the model: the expected number of parameters that are left, times ``lam``, a scalar.

        Raises: RuntimeError outside of a block of :meth:`draw`.
        """
        found = [group.penalty for group in self._groups]
        if any(part is None for part in found):
            raise RuntimeError("penalty() outside of draw(): expected it in the block, beside the call of the model")
        parts: list[Any] = [*found, *(layer.penalty(1.0) for layer in self._others)]
        total: Tensor = lam * (parts[0] if len(parts) == 1 else torch.stack(parts).sum())
        return total


class _Group:
    """Gates with the same constants, whose parameters are views of one block of memory."""

    def __init__(self, spec: GateSpec, gates: list[HardConcrete], costs: list[Tensor]) -> None:
        self._spec, self._gates = spec, gates
        self._sizes = [gate.num_gates for gate in gates]
        self._cost = torch.cat(costs).to(gates[0].log_alpha)
        self._flat = self._joined()
        self.penalty: Tensor | None = None

    @torch.no_grad()
    def _joined(self) -> Tensor:
        """Copy the parameters of all gates into one vector and make them views of it; returns the vector."""
        flat = torch.cat([gate.log_alpha.detach() for gate in self._gates])
        for gate, part in zip(self._gates, flat.split(self._sizes), strict=True):
            gate.log_alpha.data = part
        return flat

    def _is_joined(self) -> bool:
        """Whether the parameters still are views of the vector. A move to another device, or loading with
        ``assign=True``, changes that.
        """
        at, step = self._flat.data_ptr(), self._flat.element_size()
        for gate, size in zip(self._gates, self._sizes, strict=True):
            if gate.log_alpha.data_ptr() != at:
                return False
            at += size * step
        return True

    def draw(self) -> None:
        """Draw all gates of the group, compute the penalty, and hand each gate its part."""
        if not self._is_joined():
            self._flat = self._joined()
            self._cost = self._cost.to(self._flat)
        log_alpha = ops.joined(self._flat, [gate.log_alpha for gate in self._gates])
        z, self.penalty = ops.gate_bank(log_alpha, self._gates[0].draw_seed(self._flat.device), self._cost, self._spec)
        for gate, own in zip(self._gates, z.split(self._sizes), strict=True):
            gate._begin("_banked", own)

    def let_go(self) -> None:
        """Take the drawn values back from the gates."""
        if self.penalty is not None:
            for gate in self._gates:
                gate._end("_banked")
        self.penalty = None


def _gates_in(model: nn.Module) -> list[tuple[GatedLayer, Gate]]:
    """(gated layer, its gate) for every gated layer, in the order of the model."""
    return [(module, module.gate) for module in model.modules() if isinstance(module, GatedLayer)]


def _costs(layers: list[GatedLayer], gates: list[Gate]) -> dict[Gate, Tensor]:
    """gate -> how many parameters each of its entries switches off, (num_gates,).

    The penalty of a layer is linear in the open probabilities, so this is its gradient by them.
    """
    leaves = {gate: torch.ones(gate.num_gates, device=gate.device, requires_grad=True) for gate in gates}
    for gate, leaf in leaves.items():
        vars(gate)["open_probability"] = lambda leaf=leaf: leaf
    try:
        total = torch.stack([layer.penalty(1.0) for layer in layers]).sum()
    finally:
        for gate in gates:
            del vars(gate)["open_probability"]
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        gate: torch.zeros_like(leaf) if c is None else c for (gate, leaf), c in zip(leaves.items(), found, strict=True)
    }
