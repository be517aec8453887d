"""The common parts of the callbacks that keep a budget. This module imports none of the libraries that call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dampr.gates import Gate
from dampr.prune import Budget, Plan

UNDECAYED = "dampr.param_groups(model, lr=..., weight_decay=...)"


def check(budget: Any) -> None:
    """Raise TypeError unless ``budget`` is a :class:`dampr.Budget`."""
    if not isinstance(budget, Budget):
        raise TypeError(f"budget={budget!r:.80}: expected a dampr.Budget")


def check_plan(plan: Any) -> None:
    """Raise TypeError unless ``plan`` is a :class:`dampr.Plan`."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan={plan!r:.80}: expected a dampr.Plan")


def check_begun(plan: Plan, step: int, remedy: str) -> None:
    """Raise ValueError, with the remedy, if the trainer continues at another step than the plan."""
    if plan.steps_taken != step:
        raise ValueError(f"training goes on at step {step}, the plan is at {plan.steps_taken}: {remedy} before that")


def add_gradient(budget: Budget) -> None:
    """Add the gradient of the penalty to the gradients of the gates."""
    with torch.enable_grad():  # a closure may run inside of optimizer.step()
        penalty = budget.penalty()
        if penalty.requires_grad:
            penalty.backward()


def check_decay(budget: Budget, optimizers: Iterable[torch.optim.Optimizer], remedy: str) -> None:
    """Raise ValueError, with the remedy, if an optimizer decays gates that must not be decayed."""
    gates = gate_parameters(budget, decayed=False)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if group.get("weight_decay", 0) and any(id(p) in gates for p in group["params"]):
            raise ValueError(f"weight_decay={group['weight_decay']:g} on gates: expected none; {remedy}")


def gate_parameters(budget: Budget, *, decayed: bool = True) -> set[int]:
    """The ids of the gate parameters of the budget's model; with ``decayed=False``, without those of gates that may be
    under weight decay.
    """
    gates = [
        m
        for m in budget.model.modules()
        if isinstance(m, Gate) and (decayed or not getattr(m, "weight_decay_on_beta", False))
    ]
    return {id(p) for gate in gates for p in gate.parameters()}


def numbers(logged: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a trainer's log that a history records, as floats: all scalars but "step"."""
    scalars = {
        name: value for name, value in logged.items() if isinstance(value, (int, float, Tensor)) and name != "step"
    }
    return {name: float(value) for name, value in scalars.items()}
