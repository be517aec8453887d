"""Budget: train towards a number of MACs or parameters, or a latency, and end at exactly that."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks, names
from dampr.gates import Gate, OwnedGate, SteppedGate, ranks

from . import inputs
from .budget_choice import check_reached, choose, fixed_gates, increments_of
from .budget_progress import Schedule, progress_of
from .budget_report import RISK, BudgetError, BudgetReport, BudgetWarning, amount
from .compact import compact
from .controller import FLOOR, SCORES, Controller, even_share, owned
from .cost import Cost
from .importance import evenly, magnitudes
from .latency import Latency
from .measure import count_macs, count_params
from .summary import distinct_gates, gated_layers
from .wrapped import check_bare, check_gates, gathered, unwrapped

Target = float | int
_COUNT: dict[str, Callable[[nn.Module, Any], int]] = {
    "macs": count_macs,
    "params": lambda model, _: count_params(model),
}
_LIVE: weakref.WeakSet[Budget] = weakref.WeakSet()  # budgets that have not decided their gates


class Budget:
    """A cost that the compacted model has to meet, and what closes gates until it does: half the MACs, exactly.

    The budget is a constraint on the compacted model: a layer costs what is left of its inputs times what is left of
    its outputs (:class:`Cost`). There are two ways to meet it.

    With ``steps``, the budget owns the gates and closes them step by step (:mod:`dampr.prune.controller`).
    ``model.parameters()`` no longer lists them, so they need no learning rate and any optimizer will do. The goal falls
    by the same ratio in each step, the cost of the gates follows it, and :meth:`penalty` is 0.

    Without ``steps``, gates are parameters like others (:func:`dampr.param_groups` gives them a learning rate). The
    penalty is w c, where c is the expected share of the cost and w = max(0, multiplier + strength * gap): the gradient
    of an augmented Lagrangian. The gap is the share of the cost that is left in *evaluation* minus the goal of the
    step, so families whose surrogate is not a probability also end at the target. :meth:`step` adds ``rate`` times the
    gap to the multiplier. :meth:`penalty` and :meth:`step` do not wait for the device.

    Args:
        model: a model with gated layers. Gates of all families work, also tied gates and gates of norms, recurrent
            layers and residual branches. Gates on single weights or blocks cut no channels and do not change.
        example_inputs: as for :func:`dampr.compact`; MACs are those of one pass over them.
        macs, params, latency: exactly one of them. The target is a share of the model's cost, in (0, 1), or (not for
            latency) a count, an int above 1. Latency comes from a table of times that is measured on this device when
            the budget is made (:class:`Latency`). With a sequence of targets, each gets an entry in :attr:`snapshots`
            when the cost of the evaluated gates first reaches it; the lowest is the final target.
        schedule: how the goal falls from 1 to the target. An int: cubically in that many steps, fast at first (Zhu and
            Gupta 2017). A function from steps to the share of the way, in [0, 1]. None: the goal is the target from the
            start.
        warmup: the number of steps before the schedule starts; the penalty is 0 in them.
        strength, rate: the weight of the gap in the penalty, and the speed at which the multiplier follows the gap.
        steps: the number of steps in which the owned gates reach the target; not together with ``schedule``.
        score: with ``steps``, what decides which gates close. ``"importance"``: the first-order Taylor importance of
            each unit over its marginal cost; the family of the gates does not matter. ``"learned"``: the gates of the
            family, which learn from the gradient of the task.
        min_share: with ``steps``, the least share of each width that stays; None: half of the share that a network of
            the target's cost would have if all widths were cut evenly.

    Attributes:
        model: the model.
        metric: "macs", "params" or "latency".
        cost: the cost as a function of the gates, a :class:`Cost`.
        steps: the steps taken.
        multiplier: the Lagrange multiplier of the penalty, a float64 scalar.
        targets: pairs of a cost and the value that it was given as, the highest first.
        snapshots: target -> a copy of the model with fixed gates, for each target but the last.
        controller: what steps the gates; None if an optimizer trains them.

    Raises: ValueError or TypeError that names the argument, also where one of two budgets of the same gates is to own
    them; BudgetError where the target is out of reach; what the model raises on the example inputs.

    >>> import dampr
    >>> x = torch.randn(16, 20)
    >>> model = dampr.convert(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)), example_inputs=x)
    >>> budget = Budget(model, x, macs=0.5, steps=40)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for _ in range(40):
    ...     optimizer.zero_grad()
    ...     (model(x).square().mean() + budget.penalty()).backward()
    ...     optimizer.step()
    ...     budget.step()
    >>> print(budget.finalize())
    0: 15 of 30
    macs: 6,000 of 12,000 (50.00%), target 6,000
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        macs: Target | Sequence[Target] | None = None,
        params: Target | Sequence[Target] | None = None,
        latency: float | Sequence[float] | None = None,
        schedule: Schedule = None,
        warmup: int = 0,
        strength: float = 10.0,
        rate: float = 0.02,
        steps: int | None = None,
        score: names.Score = "importance",
        min_share: float | None = None,
    ) -> None:
        wishes = {"macs": macs, "params": params, "latency": latency}
        given = {name: value for name, value in wishes.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"macs={macs!r}, params={params!r}, latency={latency!r}: expected exactly one of them")
        model = _reachable(model, steps)
        if not gated_layers(model):
            raise ValueError(
                f"model={type(model).__name__}: expected gated layers in it (dampr.convert puts them there)"
            )
        check_gates(model)
        ((metric, wanted),) = given.items()
        self.metric = metric
        inputs.check(example_inputs)
        for name, number in (("strength", strength), ("rate", rate)):
            _checks.number(name, number, 0)
        warmup = _checks.positive_int("warmup", warmup, least=0)
        steps = _checked_steps(steps, schedule, score, min_share)
        self._progress = progress_of(schedule)
        listed: list[Target] = [wanted] if isinstance(wanted, (int, float)) else _checks.items(metric, wanted)
        if not listed:
            raise ValueError(f"{metric}=[]: expected at least one target")
        for value in listed:
            _check_target(metric, value)
        if steps is not None and len(listed) > 1:
            raise ValueError(f"{metric}={wanted!r:.80}, with {len(listed)} targets: expected one with steps=")
        _check_alone(model, steps)
        self.model, self._inputs = model, example_inputs
        self.cost = Latency(model, example_inputs) if metric == "latency" else Cost(model, example_inputs, metric)
        if steps is not None or metric == "latency":  # in both cases the ranks take means together
            ranks.check_alike(model, self.cost.device)
        if isinstance(self.cost, Latency):
            self.cost.share()
        if not self.cost.total > 0:
            raise ValueError(
                f"example_inputs: {metric} of the model on them are {self.cost.total:g}, expected more than 0"
            )
        if not bool(self.cost.prunable.any()):
            raise ValueError(
                f"model={type(model).__name__}: no gate of it cuts anything {self.cost.structure.notes or ''}"
            )
        self.targets = sorted({self._absolute(value): value for value in listed}.items(), reverse=True)
        self.warmup, self.strength, self.rate, self.schedule = warmup, strength, rate, schedule
        self.snapshots: dict[Target, nn.Module] = {}
        self.steps = 0
        self.multiplier = torch.zeros((), dtype=torch.float64, device=self.cost.device)
        self._penalty = torch.zeros((), device=self.cost.device)
        self._refuse_unreachable(metric, wanted)
        self.replaced: list[Tensor] = []  # the former parameters of the gates that the budget owns
        self.controller = None if steps is None else self._take_over(steps, score, min_share)
        self._measure()
        _LIVE.add(self)

    def check_widths(self, round_to: int, min_width: int) -> None:
        """Raise BudgetError where :meth:`finalize` with these could not reach the target."""
        least, _ = increments_of(self.cost, _gates(self.model), None, round_to, min_width, [])
        check_reached(self.cost, least, self.target, round_to, min_width)

    def _refuse_unreachable(self, metric: str, wanted: Any) -> None:
        """Raise ValueError if the target is not below the cost of the model as it is, and BudgetError if it is below
        the cost with one gate open in every layer.
        """
        if self.target >= self.total:
            raise ValueError(
                f"{metric}={wanted!r}: expected less than the {amount(metric, self.total)} of the model as it is"
            )
        least, _ = increments_of(self.cost, _gates(self.model), None, 1, 1, [])
        minimum = float(self.cost(least))
        if minimum <= self.target:
            return
        hint = f"; {wanted} % is {metric}={wanted / 100:g}" if isinstance(wanted, int) and wanted <= 100 else ""
        never = [name for name, note in self.cost.structure.notes.items()]
        raise BudgetError(
            f"{metric}={wanted!r}: expected at least {amount(metric, minimum)} of {amount(metric, self.total)} "
            f"({minimum / self.total:.1%}), which remain with "
            f"one gate open in every layer{hint}" + (f"; gates that cut nothing: {never}" if never else "")
        )

    def _take_over(self, steps: int, score: names.Score, min_share: float | None) -> Controller:
        """Replace the gates of the model by gates that the budget owns, and return the controller that steps them."""
        gates = _gates(self.model)
        rated = [type(gate).__name__ for gate in gates if getattr(gate, "in_optimizer", False)]
        if rated:
            raise ValueError(
                f"steps={steps!r}: param_groups(gate_lr=) has given the gates to an optimizer; expected one of the two"
            )
        if score == "learned":
            for gate in gates:
                gate.levels()  # refuses families that a budget cannot move
        share = FLOOR * even_share(self.cost, self.target) if min_share is None else min_share
        rows = [row for rows in self.cost.structure.widths() for row in rows]
        fewest = self.cost.structure.least
        least = [
            0 if row.start in self.cost.whole else max(fewest(row.start), math.ceil(share * len(row))) for row in rows
        ]
        controller = Controller([], self.cost, self.target, steps, score, least)
        minimum = float(self.cost(controller.choose(torch.ones(self.cost.structure.size, dtype=torch.float64), 0.0)))
        if minimum > self.target:
            raise BudgetError(
                f"min_share={share:.3g}: {minimum / self.total:.1%} of {self.metric} remain with that share of every "
                "width, expected at "
                f"most the target of {self.target / self.total:.1%}"
            )
        ranks.make_alike(gates)
        self.replaced = [p for gate in gates for p in gate.parameters()]
        inputs.replace(self.model, {gate: owned(gate, score) for gate in gates})
        controller.gates = [gate for gate in _gates(self.model) if isinstance(gate, (OwnedGate, SteppedGate))]
        for gate in controller.gates:
            if isinstance(gate, OwnedGate):
                gate.held = True
        ranks.watch(self.model)
        return controller

    @property
    def total(self) -> float:
        """The cost of the model with all gates open."""
        return self.cost.total

    @property
    def target(self) -> float:
        """The cost that the compacted model shall have, the lowest of the targets."""
        return self.targets[-1][0]

    @property
    def goal(self) -> float:
        """The share of the cost that is to be left at this step."""
        if self.controller is not None:
            return self.controller.ramp.goal(max(0, self.steps - self.warmup))
        way = self._progress(max(0, self.steps - self.warmup))
        return 1 - way * (1 - self.target / self.total)

    def __repr__(self) -> str:
        how = (
            f"strength={self.strength:g}, multiplier={float(self.multiplier):.3g}"
            if self.controller is None
            else self.controller.score
        )
        target = f"{self.metric}: target {self.target / self.total:.2%} of {amount(self.metric, self.total)}"
        return f"Budget({target}; {how}; step {self.steps}, goal {self.goal:.2%}, left {float(self._left):.2%})"

    @property
    def measured(self) -> int:
        """The number of steps in which the owned gates had a finite gradient; 0 if the budget owns no gates."""
        return 0 if self.controller is None else self.controller.measured

    def left(self) -> float:
        """The share of the cost that is left by the gates that are open in evaluation. Waits for the device."""
        return float(self.cost(self.cost.decision())) / self.total

    def expected(self) -> Tensor:
        """The expected share of the cost in training, a float64 scalar with a gradient."""
        return self.cost(self.cost.probabilities()) / self.total

    def penalty(self) -> Tensor:
        """The penalty, a float32 scalar, to add to a loss that is a mean over examples."""
        if self.steps < self.warmup or self.controller is not None:
            return torch.zeros((), device=self.cost.device)
        weight = (self.multiplier + self.strength * self._gap).clamp(min=0)
        penalty = (weight * self.expected()).float()
        self._penalty = penalty.detach()
        return penalty

    def step(self) -> None:
        """Advance the goal and the multiplier by one step, and take the snapshots of targets that were reached.

        Call it after ``optimizer.step()``.
        """
        self.steps += 1
        if self.controller is not None:
            self.controller.step(self.steps - self.warmup)
        self._measure()
        if self.controller is not None:
            return
        if self.steps >= self.warmup:
            self.multiplier = (self.multiplier + self.rate * self._gap).clamp(min=0)
        for target, value in self.targets[:-1]:
            if value not in self.snapshots and self.left() * self.total <= target:
                snapshot = inputs.copied(self.model, self._inputs)
                self._fit(snapshot, target, 1, 1, [])
                self.snapshots[value] = snapshot

    def readings(self) -> dict[str, Tensor]:
        """Values to log, float32 scalars on the device, as of the last :meth:`step`; reading them waits for nothing.

        Returns: ``gates_open``, the share of open gates; ``<metric>_left``, the share of the cost that is left in
        evaluation; ``budget_multiplier``; ``budget_penalty``, the last penalty.
        """
        found = self._open, self._left, self.multiplier, self._penalty
        names = "gates_open", f"{self.metric}_left", "budget_multiplier", "budget_penalty"
        return {name: value.float() for name, value in zip(names, found, strict=True)}

    def finalize(self, *, round_to: int = 1, min_width: int = 1, same: str | Sequence[str] = ()) -> BudgetReport:
        """Fix every gate open or closed, so that the compacted model costs at most the target, and less by under one
        unit.

        Gates that evaluation closes are closed first, then the smallest. If more gates are closed than the target
        needs, the largest of them open again, with the value of the weakest open gate of their layer, or with their
        open probability if that is less. All gates of the model become :class:`dampr.gates.Fixed`, which have the
        same values in training and in evaluation. After it, call :func:`dampr.compact` and train the small model on.

        Args:
            round_to: the number of open gates of a layer (of a recurrent layer, in each layer and direction) is a
                multiple of it, or all gates are open. Tensor cores like multiples of 8.
            min_width: the fewest gates that stay open in such a layer; residual branches may close altogether.
            same: name globs; the gated layers that match one of them keep the same number of gates, each its own best
                ones. For models that have one number for all layers.

        Returns: a :class:`BudgetReport`, with counts from a compacted copy.

        Raises: BudgetError if the target cannot be reached, or while a :class:`dampr.Shrinker` has taken units out
        of the model; the model is then unchanged.
        """
        if hasattr(self.model, "dampr_layout"):
            raise BudgetError("finalize: closed units have left the model; expected shrinker.expand(optimizer) before")
        round_to = _checks.positive_int("round_to", round_to)
        min_width = _checks.positive_int("min_width", min_width)
        globs = [same] if isinstance(same, str) else _checks.items("same", same)
        if not all(isinstance(glob, str) for glob in globs):
            raise TypeError(f"same={same!r:.80}: expected a name glob, or a sequence of them")
        report = self._fit(self.model, self.target, round_to, min_width, self._matched(globs))
        self.controller = None
        _LIVE.discard(self)
        ranks.watch(self.model)
        arrived = report.before is not None and report.before <= report.target
        asked = round_to > 1 or min_width > 1 or globs  # widths that training does not know of
        if report.changed > RISK and not (arrived and asked):
            left = amount(self.metric, report.before or 0)
            advice = (
                "train for more steps" if report.before and report.before > report.target else "close gates more slowly"
            )
            warnings.warn(
                f"finalize changed {report.changed:.0%} of the gates: {left} of {self.metric} were left, "
                f"the target is {amount(self.metric, report.target)}; {advice}, or train on after it (dampr.Plan does "
                "both)",
                BudgetWarning,
                stacklevel=2,
            )
        self._penalty = torch.zeros_like(self._penalty)
        self._measure()
        return report

    def _matched(self, globs: list[str]) -> list[list[int]]:
        """Groups of gates that must keep the same number of gates, by their positions in :func:`_gates`; one for each
        glob.
        """
        layers, places = gated_layers(self.model), {id(gate): place for place, gate in enumerate(_gates(self.model))}
        found = []
        for glob in globs:
            names = [name for name in layers if fnmatchcase(name, glob)]
            if len({layers[name].gate.num_gates for name in names}) != 1:
                counts = {name: layers[name].gate.num_gates for name in names}
                raise ValueError(f"same={glob!r}: it matches {counts}, expected gated layers with as many gates each")
            found.append(sorted({places[id(layers[name].gate)] for name in names}))
        if len({place for group in found for place in group}) != sum(map(len, found)):
            raise ValueError(f"same={globs!r}: expected that no gates are matched twice")
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state of the budget for a checkpoint, next to the state dicts of the model and the optimizer.

        Returns: a dict with "steps", the steps taken; "multiplier", the Lagrange multiplier of the penalty; and, if the
        budget owns the gates, "controller", the state of the gates' controller. :attr:`snapshots` are not saved.
        """
        owned = {} if self.controller is None else {"controller": self.controller.state_dict()}
        return {"steps": self.steps, "multiplier": float(self.multiplier), **owned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; load the state of the model first, because the gates are measured
        here.

        Raises: ValueError, before anything changes, if the state does not belong to such a budget of such a model.
        """
        _checks.state("state", state, {"steps": 0, "multiplier": 0.0})
        if ("controller" in state) != (self.controller is not None):
            raise ValueError(
                "state: of a budget that owns the gates and of one that does not; expected the same `steps=` as then"
            )
        _checks.state("state", state, self.state_dict())
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        self.steps = int(state["steps"])
        self.multiplier = torch.full_like(self.multiplier, float(state["multiplier"]))
        self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        """Measure the share of open gates and of the cost that is left, and the gap of the cost to the goal."""
        decision = self.cost.decision()
        self._open, self._left = decision.float().mean(), self.cost(decision) / self.total
        self._gap = self._left - self.goal

    def _absolute(self, value: Target) -> float:
        """The cost that a target asks for, which is given as a share or as a count."""
        if isinstance(value, int) or self.metric == "latency":
            return value if isinstance(value, int) else value * self.total
        return math.floor(value * self.total)

    def _fit(
        self, model: nn.Module, target: float, round_to: int, min_width: int, same: list[list[int]]
    ) -> BudgetReport:
        """Fix the gates of ``model``, which has the structure of the budget's model, so that it costs ``target``.

        The other arguments are those of :meth:`finalize`; ``same`` is the result of :meth:`_matched`.
        """
        gates = _gates(model)
        aim, reached = target, target + 1
        left, opened = float(self.cost(self.cost.decision())), torch.cat([gate.is_open() for gate in gates]).cpu()
        whole = gathered(model)
        order = self._order(gates, gathered(self.model))
        for _ in range(8):
            chosen = choose(self.cost, gates, order, aim, round_to, min_width, same)
            fixed = fixed_gates(gates, chosen)
            trial = inputs.copied(whole, self._inputs)
            inputs.replace(trial, dict(zip(_gates(trial), fixed, strict=True)))
            small = compact(trial, example_inputs=self._inputs)
            reached = _COUNT[self.metric](small, self._inputs) if self.metric in _COUNT else float(self.cost(chosen))
            if reached <= target:
                break
            aim -= reached - target
        else:
            raise BudgetError(
                f"{self.metric}: the compacted model has {reached:,}, above the target of {target:,} "
                f"{self.cost.structure.notes}"
            )
        before = gated_layers(model)
        inputs.replace(model, dict(zip(gates, fixed, strict=True)))
        widths = {name: (layer.gate.num_gates, int(layer.gate.is_open().sum())) for name, layer in before.items()}
        counts = [gate.num_gates for gate in gates]
        closed, reopened = (
            {
                name: int(part.sum())
                for name, part in zip(distinct_gates(model), found.split(counts), strict=True)
                if part.any()
            }
            for found in (opened & ~chosen, chosen & ~opened)
        )
        notes = dict(self.cost.structure.notes)
        return BudgetReport(self.metric, target, reached, self.total, widths, notes, left, closed, reopened)

    def _order(self, gates: Sequence[Gate], whole: nn.Module) -> Tensor:
        """A score of each gate, (all gates,), that decides between gates with the same value: the lowest closes first.

        It is importance over marginal cost if importance was measured, else the norm of the gate's weights.
        """
        if self.controller is not None and self.controller.measured:
            return self.controller.importance() / self.controller.marginal_cost()
        return evenly(magnitudes(self.cost.structure, whole), [gate.num_gates for gate in gates])


def _reachable(model: Any, steps: int | None) -> nn.Module:
    """The module on which a budget works, without the wrappers around it.

    Raises: TypeError if a wrapper inside keeps the budget from replacing gates or from following operators.
    """
    if isinstance(model, nn.Module) and "_orig_mod" in model._modules:
        model = model._orig_mod
    bare: nn.Module = model if steps is not None else unwrapped(model)
    check_bare(
        bare,
        "a budget with steps takes the gates out of its parameters"
        if steps is not None
        else "a budget follows its operators",
    )
    return bare


def _gates(model: nn.Module) -> list[Gate]:
    """Every gate object of ``model``, each once, in the order of :class:`Structure`."""
    return list(distinct_gates(model).values())


def _check_alone(model: nn.Module, steps: int | None) -> None:
    """Raise ValueError where another budget owns gates of ``model``, or, with ``steps``, follows them."""
    gates = set(_gates(model))
    for other in _LIVE:
        if (steps is not None or other.controller is not None) and not gates.isdisjoint(_gates(other.model)):
            raise ValueError(
                f"model={type(model).__name__}: its gates have a budget, {other!r}; expected one for each model, so "
                "finalize that one, or delete it, before"
            )


def _checked_steps(steps: Any, schedule: Schedule, score: Any, min_share: Any) -> int | None:
    """``steps`` after a check of the arguments that depend on it."""
    _checks.one_of("score", score, SCORES)
    if min_share is not None:
        _checks.number("min_share", min_share, 0, 1)
    if steps is None:
        return None
    steps = _checks.positive_int("steps", steps, least=8)
    if schedule is not None:
        raise ValueError(
            f"steps={steps!r} with schedule={schedule!r}: expected one, with steps the budget has a schedule of its own"
        )
    return steps


def _check_target(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a share in (0, 1), or a count above 1 for other metrics than latency."""
    count = isinstance(value, int) and not isinstance(value, bool) and value > 1 and name != "latency"
    share = isinstance(value, float) and 0 < value < 1
    if not (count or share):
        raise ValueError(
            f"{name}={value!r:.80}: expected a share in (0, "
            f"1){'' if name == 'latency' else ', or a count, an int above 1'}"
        )
