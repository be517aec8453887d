"""Diagnosis of gated models. :func:`doctor` finds why nothing is pruned or why a layer is about to die;
:func:`calibrate` finds a lambda that is large enough against the task's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dampr.nn import GatedActivation, GatedLinear
from dampr.nn.conv import GatedConv

from . import graph
from .budget import Budget
from .cost import structure_of
from .plan import Plan
from .structure import Structure
from .summary import gated_layers, penalty
from .verify import verify_model
from .wrapped import sees_through

WEAK = 1e-3  # a penalty closes no gate if its gradient on the gates is below this share of the task's gradient
LATE = 0.1  # the cost is late if it is above the goal by this share of it
FEW_STEPS = 10  # a unit that closes in fewer steps is cut off rather than faded out
LEAST_TUNING = 0.2  # the share of a plan's steps that should remain after the ramp
TRAVEL = {"log_alpha": 5.4, "phi": 0.5, "alpha": 0.9}  # the distance from a fresh gate's value to a closed gate's
OWN = "let the budget own the gates (dampr.Budget(..., steps=N), or dampr.Plan)"
NEARLY_CLOSED = 0.05  # a layer is dying if a smaller share of its gates is expected open


@dataclass(frozen=True)
class Finding:
    """A reason why gates do not work as they should: where (the name of a layer, or "" for the whole model), the
    problem, and the remedy.
    """

    where: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where or 'model'}: {self.problem} -> {self.remedy}"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@sees_through
def doctor(
    model: nn.Module,
    example_inputs: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[], Tensor] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    budget: Budget | None = None,
    plan: Plan | None = None,
) -> list[Finding]:
    """Look for the usual reasons why a gated model does not prune, or prunes too much. Nothing is changed.

    It finds: gates that have no effect, get no gradient, are frozen, are in half precision or are under weight decay
    (:func:`dampr.verify_model`); layers that are about to die or are closed altogether; gates in front of a BatchNorm,
    which turns closed channels into constants instead of zeros; gates whose closing cuts nothing. With a loss: a
    penalty too weak to close any gate. With a budget: a multiplier that has wound up, and gates that their optimizer
    cannot close in time. With a plan: too few steps.

    Args:
        model, example_inputs, optimizer: as for :func:`dampr.verify_model`.
        loss: a function without arguments that returns the loss of the task on a typical batch, a scalar with a graph,
            without the penalty.
        penalty: a function without arguments that returns what is added to the loss, lambda included.
        budget, plan: what closes the gates. If the model of a plan has no gates yet, only the plan is examined.

    Raises: TypeError or ValueError that names the argument; what the model raises on the example inputs.

    >>> import dampr
    >>> model = dampr.convert(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(8, 4))
    >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    >>> print(doctor(model, torch.randn(8, 4), optimizer=optimizer)[0])
    0: log_alpha is under weight decay 0.01, expected 0 (dampr.param_groups) -> see dampr.verify_model
    """
    if plan is not None:
        budget = budget or plan.budget
        if not gated_layers(model):
            return _short(plan)
    checked = verify_model(model, example_inputs, optimizer=optimizer, gates_per_layer=8)
    findings = [
        Finding(row.name, problem, "see dampr.verify_model") for row in checked.layers for problem in row.problems
    ]
    if all(row.tried for row in checked.layers):
        findings += _dying(model) + _misplaced(model, example_inputs)
    if loss is not None and penalty is not None:
        findings += _weak(model, loss, penalty)
    if budget is not None:
        findings += _wound_up(budget) + _too_slow(model, budget, optimizer)
    return findings + ([] if plan is None else _short(plan))


def calibrate(model: nn.Module, loss: Tensor, cost: Tensor | None = None, *, ratio: float = 1.0) -> float:
    """The lambda at which the penalty's gradient on the gates is ``ratio`` times as large as the task's: |lambda d
    cost| = ratio |d loss|.

    Both norms are over all gate parameters. The lambda is meant for the start of training: later the task pulls harder
    on the gates that matter, and hardly on the others.

    Args:
        model: a model with gated layers, in training mode.
        loss: the loss of the task on a typical batch, a scalar with a graph, which is kept.
        cost: the penalty for lambda = 1, a scalar with a graph; None: :func:`dampr.penalty`.
        ratio: a number above 0.

    Raises: ValueError if loss or cost has no gradient on the gates.
    """
    if not ratio > 0:
        raise ValueError(f"ratio={ratio!r}: expected a number above 0")
    sizes = {
        name: _pull(model, scalar)
        for name, scalar in (("loss", loss), ("cost", penalty(model) if cost is None else cost))
    }
    for name, size in sizes.items():
        if not size > 0:
            raise ValueError(f"{name}: it has no gradient on any gate of {type(model).__name__} (its norm is {size:g})")
    return ratio * sizes["loss"] / sizes["cost"]


def _pull(model: nn.Module, scalar: Tensor) -> float:
    """The norm of the gradient of ``scalar`` on all gate parameters."""
    parameters = list(
        {
            id(p): p for layer in gated_layers(model).values() for p in layer.gate.parameters() if p.requires_grad
        }.values()
    )
    if not parameters or not scalar.requires_grad:
        return 0.0
    found = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    return float(torch.stack([g.double().norm() for g in found if g is not None] or [torch.zeros(())]).norm())


def _dying(model: nn.Module) -> list[Finding]:
    """Findings for layers whose gates are all closed or soon will be. A layer with a single gate, such as that of a
    residual branch, may close.
    """
    findings = []
    for name, layer in gated_layers(model).items():
        count, expected = layer.gate.num_gates, float(layer.gate.open_probability().detach().sum())
        if count == 1:
            continue  # a residual branch may close
        if not bool(layer.gate.is_open().any()):
            findings.append(
                Finding(name, f"all {count} gates are closed", "lower its lambda, or finalize a Budget with min_width")
            )
        elif expected < max(1.5, NEARLY_CLOSED * count):
            findings.append(
                Finding(
                    name, f"{expected:.1f} of {count} gates expected open", "lower its lambda before the layer is gone"
                )
            )
    return findings


def _misplaced(model: nn.Module, example_inputs: Any) -> list[Finding]:
    """Findings for gates whose closing cuts nothing, and for gates in front of a BatchNorm."""
    structure = structure_of(model, example_inputs)
    findings = [
        Finding(name, f"closing its gates cuts nothing: {why}", "exclude it from convert")
        for name, why in structure.notes.items()
    ]
    if not isinstance(structure, Structure):
        return findings
    widths = graph.Widths(structure.plain, example_inputs)
    for name, layer in structure.gated.items():
        if isinstance(layer, (GatedLinear, GatedConv, GatedActivation)) and layer.granularity == "output":
            plain = structure.plain.get_submodule(name)
            if plain in widths and name not in structure.notes and widths.norms_reading(plain)[0]:
                why = (
                    "a BatchNorm makes constants of its closed channels, which a padded convolution cannot take into "
                    "a bias"
                )
                findings.append(
                    Finding(name, why, "put the gates into the norm (dampr.convert with example_inputs does)")
                )
    return findings


def _wound_up(budget: Budget) -> list[Finding]:
    """A finding if the multiplier has grown large while the cost is still far above the goal."""
    left, goal, multiplier = budget.left(), budget.goal, float(budget.multiplier)
    if budget.controller is not None or multiplier <= budget.strength or left <= (1 + LATE) * goal:
        return []
    why = (
        f"the multiplier has wound up to {multiplier:.3g} while {left:.1%} of {budget.metric} is left for a goal of "
        f"{goal:.1%}"
    )
    return [Finding("", why, f"{OWN}, or give the gates a larger gate_lr")]


def _too_slow(model: nn.Module, budget: Budget, optimizer: torch.optim.Optimizer | None) -> list[Finding]:
    """Findings for gates that their optimizer moves too slowly to get from open to closed within the schedule's
    steps.
    """
    steps = budget.schedule
    if budget.controller is not None or optimizer is None or not isinstance(steps, int):
        return []
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    adaptive = "ada" in type(optimizer).__name__.lower()
    findings = []
    for name, layer in gated_layers(model).items():
        for own, p in layer.gate.named_parameters():
            if id(p) not in rates or not own.startswith(layer.gate.level_parameters or ("-",)):
                continue
            grad = 0.0 if p.grad is None else float(p.grad.abs().max())
            if not adaptive and p.grad is None:
                continue
            pace = rates[id(p)] * (1.0 if adaptive else grad)  # the largest change in one step
            if pace * steps < TRAVEL.get(own, 1.0):
                why = f"{own} moves by at most {pace:.2g} a step, and {steps} steps of that do not close a gate"
                findings.append(
                    Finding(name, why, f"{OWN}, or give the gates an adaptive optimizer and a larger gate_lr")
                )
    return findings


def _short(plan: Plan) -> list[Finding]:
    """Findings for a plan with too few steps to close a unit or to fine-tune."""
    findings = []
    if plan.closing_steps < FEW_STEPS:
        why = f"a unit has {plan.closing_steps} steps to close, so the network is cut rather than trained smaller"
        findings.append(Finding("", why, "train for more steps, or take a larger ramp"))
    if plan.fine_tuning_steps < LEAST_TUNING * plan.steps:
        why = f"{plan.fine_tuning_steps} of {plan.steps} steps are left for the small model"
        findings.append(Finding("", why, "a smaller warmup or ramp; fine-tuning is worth points of accuracy"))
    return findings


def _weak(model: nn.Module, loss: Callable[[], Tensor], cost: Callable[[], Tensor]) -> list[Finding]:
    """A finding if the penalty's gradient on the gates is zero or far smaller than the task's."""
    task, pull = _pull(model, loss()), _pull(model, cost())
    if pull == 0:
        return [
            Finding(
                "", "the penalty has no gradient on any gate", "is the goal of the budget met already, or lambda 0?"
            )
        ]
    if pull < WEAK * task:
        remedy = f"multiply lambda by about {task / pull:.2g} (dampr.prune.calibrate)"
        return [
            Finding(
                "",
                f"the penalty pulls on the gates {pull / task:.1e} times as hard as the task: nothing will close",
                remedy,
            )
        ]
    return []
