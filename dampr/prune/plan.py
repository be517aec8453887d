"""Plan: a training run that ends with a smaller plain model, in two lines of your own training loop."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dampr import _checks, names
from dampr.gates import Fixed, ranks

from . import hooks, inputs, noise
from .averages import become, compact_copies, convert_copies, resemble
from .budget import Budget, BudgetReport
from .compact import compact
from .controller import RAMP, Ramp
from .convert import convert
from .expand import Optimizers, PassedChecks, check_state, check_trains, optimizers_of
from .plan_hooks import check_model, divergence, is_trained, uncompiled
from .plan_report import PlanError, PlanReport
from .recalibrate import recalibrate, share_statistics
from .restore import as_it_was
from .schedule import WHEN, ShrinkSchedule
from .shrinker import Copies, check_copies, copies_of
from .summary import distinct_gates, gated_layers
from .wrapped import is_any_sharded

# shares of the steps: dense from scratch, dense from a checkpoint, the ramp
WARMUP, TRAINED_WARMUP, SHRINKING = 0.3, 0.05, 0.2
LEAST_STEPS = 40
SILENT = 50  # a plan raises after this many steps in which no gate had a gradient


class Plan:
    """Prune a model while it trains for ``steps`` steps, to exactly a share of its cost, and end with plain
    ``torch.nn`` layers.

    The run has three phases. The model trains dense first (30 % of the steps; 5 % if it is trained already), so that
    importance can be measured. Then it gets gates (:func:`dampr.convert`), and a :class:`dampr.Budget` closes them over
    the next 20 % (the ramp), first the units with the least importance for their cost. At the end of the ramp the model
    is compacted in place; the optimizer keeps its state, and the statistics of norms are computed anew. In the rest of
    the steps the small model is fine-tuned. Gates are not parameters of the model and need no learning rate.

    ``model`` stays the same object, but its children are replaced at the end of the ramp. Use :attr:`model` in the
    loop, and make its wrappers (DDP, ``torch.compile``) again when :meth:`step` returns True.

    Args:
        model: a dense model, untrained or trained; or a model that you have converted with :func:`dampr.convert`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        macs, params, latency: exactly one, as for :class:`dampr.Budget`: a share in (0, 1), or a count.
        steps: the number of optimizer steps of the whole run: epochs times ``len(loader)``.
        gate: the gates for a dense model, as for :func:`dampr.convert`.
        score: what decides which gates close, as for :class:`dampr.Budget`.
        warmup, ramp: the shares of ``steps`` for the dense phase and the ramp. ``warmup=None`` means 0.3, or 0.05 for a
            trained model.
        trained: whether the model is trained already. None: it is if a norm with running statistics has seen 100
            batches.
        min_share, round_to, min_width: as for :class:`dampr.Budget` and :meth:`dampr.Budget.finalize`.
        restart: None leaves learning rates to you. A number: after the ramp, every group starts again at that number
            times its first learning rate, which then falls to 0 along a cosine; use no scheduler of your own then.
        distill: the weight, in :meth:`penalty`, of the distance between the outputs of the model and those of the dense
            model, as it was when the ramp began.
        distill_loss: computes that distance, a scalar, from the outputs of the trained and of the dense model. None:
            the Kullback-Leibler divergence of logits (rows, classes) at a temperature of 2, times 4 (Hinton et al.
            2015).
        recalibrate: the number of training batches on which the statistics of norms are computed anew; 0: none.
        shrink: whether units that are closed for good leave the model before the end of the ramp
            (:class:`dampr.Shrinker`), which changes nothing but the time of a step. ``"auto"``: if it pays; True:
            whenever it saves 5 %; False: never.
        on_compact: called with the plan right after the model was compacted.
        on_finish: called with the small model by :meth:`finish`.
        convert: more keyword arguments for :func:`dampr.convert`, such as ``{"exclude": "head"}``.

    Attributes:
        model: the model to train, the same object as the argument.
        report: a :class:`PlanReport`; None before the end of the ramp.
        steps: as the argument.
        steps_taken: the number of calls of :meth:`step`.
        metric, total, target: as of :class:`dampr.Budget`.

    Raises: ValueError or TypeError that names the argument; ConversionError and BudgetError as :func:`dampr.convert`
    and :class:`dampr.Budget` do. The model is unchanged then.

    >>> import dampr
    >>> x, y = torch.randn(64, 20), torch.randint(5, (64,))
    >>> model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    >>> plan = dampr.Plan(model, x, macs=0.5, steps=60)
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    >>> for _ in range(60):
    ...     loss = nn.functional.cross_entropy(plan.model(x), y) + plan.penalty()
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    ...     _ = plan.step(optimizer)
    >>> plan.finish()[0]
    Linear(in_features=20, out_features=20, bias=True)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        steps: int,
        macs: Any = None,
        params: Any = None,
        latency: Any = None,
        gate: Any = "hard_concrete",
        score: names.Score = "importance",
        warmup: float | None = None,
        ramp: float = SHRINKING,
        trained: bool | None = None,
        min_share: float | None = None,
        round_to: int = 1,
        min_width: int = 1,
        restart: float | None = None,
        distill: float = 0.0,
        distill_loss: Callable[[Any, Any], Tensor] | None = None,
        recalibrate: int = 8,
        shrink: bool | str = "auto",
        on_compact: Callable[[Plan], Any] | None = None,
        on_finish: Callable[[nn.Module], Any] | None = None,
        convert: Mapping[str, Any] | None = None,
    ) -> None:
        check_model(model)
        inputs.check(example_inputs)
        steps = _checks.positive_int("steps", steps, least=LEAST_STEPS)
        for name, share in (("warmup", warmup), ("ramp", ramp)):
            if (share is not None or name == "ramp") and not 0 <= _checks.number(name, share) < 1:
                raise ValueError(f"{name}={share!r}: expected a share of the steps in [0, 1)")
        for name, number in (("restart", restart), ("distill", distill)):
            if number is not None:
                _checks.number(name, number, 0)
        for name, function in (("distill_loss", distill_loss), ("on_compact", on_compact), ("on_finish", on_finish)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}={function!r:.80}: expected a function or None")
        if convert is not None and not isinstance(convert, Mapping):
            raise TypeError(f"convert={convert!r:.80}: expected a dict of keyword arguments of dampr.convert, or None")
        recalibrate = _checks.positive_int("recalibrate", recalibrate, least=0)
        round_to, min_width = _checks.positive_int("round_to", round_to), _checks.positive_int("min_width", min_width)
        if not any(shrink is when or (isinstance(shrink, str) and shrink == when) for when in WHEN):
            raise ValueError(f"shrink={shrink!r}: expected one of {list(WHEN)}")
        self.model, self.steps, self.steps_taken = model, steps, 0
        self.report: PlanReport | None = None
        self._convert = {"gate": gate, **(convert or {})}
        self._inputs, self._gate, self._score = example_inputs, self._convert["gate"], score
        self._trained = is_trained(model) if trained is None else _checks.flag("trained", trained)
        share = (TRAINED_WARMUP if self._trained else WARMUP) if warmup is None else warmup
        self._end = round((share + ramp) * steps)
        # the steps of the budget: those in which it measures, and the ramp
        self._length = min(round(ramp * steps / RAMP), self._end - 1)
        least = max(8, 9 - (self._end - round(ramp * steps)))  # gates are put in after the first step
        if self._end >= steps or round(ramp * steps) < least:
            raise ValueError(
                f"steps={steps}, warmup={share:g}, ramp={ramp:g}: expected a ramp of at least {least} steps (it has "
                f"{round(ramp * steps)}) "
                f"that ends before the last one (it ends at {self._end})"
            )
        self._begun = self._end - round(ramp * steps)  # the first step of the ramp
        self._targets = {
            name: value
            for name, value in (("macs", macs), ("params", params), ("latency", latency))
            if value is not None
        }
        self._min_share, self._round_to, self._min_width = min_share, round_to, min_width
        self._restart, self._distill, self._distill_loss = restart, distill, distill_loss
        self._recalibrate, self._on_compact, self._on_finish = recalibrate, on_compact, on_finish
        self._budget: Budget | None = None
        self._kept: list[Tensor] | None = None  # the final value of every gate, by gate vector
        self._silent = 0
        self._passed = PassedChecks()
        self._batches: deque[tuple[Any, Any]] = deque(maxlen=max(1, recalibrate))
        self._teacher: nn.Module | None = None
        self._output: Any = None
        self._looks: RemovableHandle | None = None
        self._finished = False
        self._schedule = ShrinkSchedule(shrink, Ramp(0.5, self._length), self._end - self._length, self._end)
        if gated_layers(model):
            found = self._budget = self._make_budget(model, warmup=self._end - self._length)
        else:
            trial = inputs.copied(model, example_inputs)
            with noise.kept(model):
                # raises if the model cannot be converted or the target not be met
                found = self._make_budget(self._with_gates(trial))
        found.check_widths(round_to, min_width)
        if distill and distill_loss is None:
            with as_it_was(model), inputs.evaluating(model), torch.no_grad():
                output = inputs.call(model, example_inputs)
            divergence(output, output)  # refuses outputs that are not logits
        self.metric, self.total, self.target = found.metric, found.total, found.target
        self._hooks: list[RemovableHandle] = []

    @property
    def phase(self) -> str:
        """The present phase: "dense", "ramp", "fine-tuning" or "finished"."""
        if self._finished:
            return "finished"
        if self.report is not None:
            return "fine-tuning"
        return "ramp" if self.steps_taken >= self._begun else "dense"

    @property
    def closing_steps(self) -> int:
        """The number of steps in which a gate falls from open to closed."""
        return Ramp(0.5, self._length).lag

    @property
    def fine_tuning_steps(self) -> int:
        """The number of steps after the ramp, in which the small model is trained."""
        return self.steps - self._end

    @property
    def budget(self) -> Budget | None:
        """The budget that owns the gates during the ramp; None before and after it."""
        return self._budget

    @property
    def distills(self) -> bool:
        """Whether the plan was made with ``distill`` above 0."""
        return self._distill > 0

    def penalty(self) -> Tensor:
        """The penalty to add to the loss, a scalar: with ``distill`` the distance to the dense model, else 0.

        Raises: PlanError after :meth:`finish`.
        """
        self._check_alive()
        device = next((p.device for p in self.model.parameters()), None)
        if not self._distill or self._teacher is None or self._output is None:
            return torch.zeros((), device=device)
        (args, kwargs, output), self._output = self._output, None
        with torch.no_grad():
            taught = self._teacher(*args, **kwargs)
        return self._distill * (self._distill_loss or divergence)(output, taught)

    def step(self, optimizer: Optimizers = None, *, ema: Copies = ()) -> bool:
        """Advance the plan by one step; call it after ``optimizer.step()``.

        Args:
            optimizer: the optimizer of the weights, or all of several; the state of what is left of them is kept. None:
                make a new optimizer when this returns True.
            ema: copies of :attr:`model` with averaged weights (``torch.optim.swa_utils.AveragedModel``), one or
                several: they get gates and lose units when the model does.

        Returns: True if parameters of the model have changed their shapes, which can happen during the ramp and at its
        end.

        Raises: PlanError after :meth:`finish`, if no gate has had a finite gradient for 50 steps or in the whole ramp,
        or if weights are not finite when the ramp begins or ends; ValueError if the optimizer holds parameters of
        gates, none of the model, or, before the end of the ramp, state that cannot be cut; BudgetError,
        CompactionError. A step that raises does not count.
        """
        self._check_alive()
        if is_any_sharded(self.model):
            raise PlanError(
                "plan.model was given to fully_shard or parallelize_module, and a plan makes it smaller in place: "
                "expected DistributedDataParallel, or a budget (dampr.Budget) made before it was sharded, which "
                "compacts behind the training"
            )
        optimizers = optimizers_of(optimizer)
        for one in optimizers:
            self._passed.run(one, self._check_optimizer)
        copies_of(ema)
        self.steps_taken += 1
        try:
            smaller = self.report is None and self._change(optimizer, ema)
        except BaseException:
            self.steps_taken -= 1
            raise
        if self._restart is not None:
            for one in optimizers:
                self._set_rates(one, self._restart)
        if smaller and self.report is not None and self._on_compact is not None:
            self._on_compact(self)
        return smaller

    def _change(self, optimizer: Optimizers, ema: Copies) -> bool:
        """Put gates in, step the budget, remove closed units or compact the model, whichever is due at this step.

        Returns whether the size of the model has changed.
        """
        if self._budget is None:
            if self.steps_taken == self._end - self._length:
                self._begin(ema)
            return False
        self._step_budget(self._budget)
        self._look_at_inputs()
        if self.steps_taken == self._end:
            self._compact(self._budget, optimizer, ema)
            return True
        return self._schedule.step(self.steps_taken, self._budget, self.model, self._inputs, optimizer, ema)

    def finish(self) -> nn.Module:
        """End the plan and return the small plain model, the same object as :attr:`model`.

        Raises: PlanError if training has not reached the end of the ramp, or if weights are not finite; the plan can
        continue then.
        """
        self._check_alive()
        if self.report is None:
            raise PlanError(
                f"finish() after {self.steps_taken} of {self.steps} steps: expected at least {self._end}, where the "
                "ramp ends; train on, "
                "or make a plan of fewer steps (epochs times len(loader))"
            )
        self._check_finite("finish()")
        if self._on_finish is not None:
            self._on_finish(self.model)
        self._remove_hooks()
        ranks.unwatch(self.model)
        self._finished = True
        return self.model

    def readings(self) -> dict[str, float]:
        """Values to log: ``<metric>_left``, the share of the cost that is left, and ``<metric>_goal``, the goal of the
        step.
        """
        if self.report is not None:
            left = goal = self.report.budget.reached / self.report.budget.total
        elif self._budget is None:
            left = goal = 1.0
        else:
            left, goal = self._budget.left(), self._budget.goal
        return {f"{self.metric}_left": left, f"{self.metric}_goal": goal}

    def explain(self) -> str:
        """A text: which units left the model before it was compacted, when, and how long it took; and which had to
        stay, and why.
        """
        return self._schedule.explain()

    def __repr__(self) -> str:
        target = ", ".join(f"{name}={value!r}" for name, value in self._targets.items())
        return (
            f"Plan({target}, score={self._score!r}: dense to step {self._begun}, ramp to {self._end}, "
            f"fine-tuning to {self.steps}; {self.phase}, step {self.steps_taken})"
        )

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state of the plan for a checkpoint, next to those of model and optimizer: tensors, numbers, lists.

        Shortly before the end of the ramp it holds the inputs of a few batches, on which the statistics of norms will
        be computed anew.
        """
        budget = self._budget
        return {
            "steps": self.steps,
            "steps_taken": self.steps_taken,
            "gated": bool(gated_layers(self.model)),
            "budget": None if budget is None else budget.state_dict(),
            "kept": self._kept,
            "report": None if self.report is None else self.report.as_dict(),
            "silent": self._silent,
            "shrink": self._schedule.state_dict(),
            "batches": list(self._batches),
            "teacher": None if self._teacher is None else self._teacher.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Optimizers = None, *, ema: Copies = ()) -> None:
        """Bring a new plan, made of the same model and arguments, to the saved state.

        Call it *before* you load the states of model and optimizer: the model gets its gates, or its smaller layers,
        here.

        Args:
            state: what :meth:`state_dict` returned.
            optimizer: a new optimizer of the model's parameters.
            ema: copies with averaged weights, which are brought to the same structure; load their states after this.

        Raises: PlanError if this plan has taken steps; ValueError if ``state`` is not a state of a plan, or of one with
        another number of steps.
        """
        if self.steps_taken:
            raise PlanError(f"load_state_dict after {self.steps_taken} steps: expected a new plan")
        own = self.state_dict()
        numbers = dict.fromkeys(("steps", "steps_taken", "silent"), 0)
        _checks.state("state", state, dict.fromkeys(own.keys() - {"shrink"}) | numbers)  # older ones have no "shrink"
        if state["steps"] != self.steps:
            raise ValueError(f"state: of a plan of {state['steps']} steps, expected {self.steps}")
        with noise.kept(self.model):
            if state["teacher"] is not None:
                self._teach(self._frozen_copy())
                assert self._teacher is not None
                self._teacher.load_state_dict(state["teacher"])
            if self._budget is None and (state["budget"] is not None or state["kept"] is not None):
                self._budget = self._make_budget(self._with_gates(self.model), owned=state["kept"] is None)
            if state["kept"] is not None:
                gates = list(distinct_gates(self.model).values())
                inputs.replace(self.model, dict(zip(gates, map(Fixed, state["kept"]), strict=True)))
                become(self.model, compact(self.model, example_inputs=self._inputs, optimizer=optimizer))
                self._budget, self._kept = None, [values.clone() for values in state["kept"]]
            elif self._budget is not None:
                self._budget.load_state_dict(state["budget"])
        if "shrink" in state:
            self._schedule.load_state_dict(state["shrink"], self._budget, self.model, self._inputs, optimizer)
        resemble(ema, self._frozen_copy())
        self._batches.extend(state["batches"])
        self.steps_taken, self._silent = int(state["steps_taken"]), int(state["silent"])
        self._look_at_inputs()
        if state["report"] is not None:
            report = dict(state["report"])
            self.report = PlanReport(**{**report, "budget": BudgetReport(**report["budget"])})

    # ---- what happens at which step

    def _with_gates(self, model: nn.Module) -> nn.Module:
        """``model`` converted with the gates of the plan."""
        return convert(model, example_inputs=self._inputs, **self._convert)

    def _make_budget(self, model: nn.Module, warmup: int = 0, owned: bool = True) -> Budget:
        """A budget for ``model``; ``owned``: whether it owns the gates."""
        steps = self._length if owned else None
        how: dict[str, Any] = {"steps": steps, "score": self._score, "min_share": self._min_share, "warmup": warmup}
        return Budget(model, self._inputs, **self._targets, **how)

    def _begin(self, ema: Copies) -> None:
        """Begin the ramp: convert the model, and give its gates to a budget."""
        self._check_finite(f"step {self.steps_taken}")
        self._passed.forget()  # optimizers are checked again: from here on, those that train gates are refused
        if any(not gated_layers(one) for one in copies_of(ema)):
            check_copies(ema, self.model)
        if self._distill:
            self._teach(self._frozen_copy())
        with noise.kept(self.model):
            self._budget = self._make_budget(self._with_gates(self.model))
        convert_copies(ema, self.model, self._with_gates)

    def _teach(self, teacher: nn.Module) -> None:
        """Use ``teacher`` for distillation from now on."""
        self._teacher = teacher
        self._hooks.append(self.model.register_forward_hook(uncompiled(self._see_outputs), with_kwargs=True))

    def _frozen_copy(self) -> nn.Module:
        """A copy of the model in evaluation mode that needs no gradient, without the plan's hooks, which would record
        its calls.
        """
        with hooks.without_own(self.model):
            return inputs.copied(self.model).eval().requires_grad_(False)

    def _step_budget(self, budget: Budget) -> None:
        """Advance the budget; raise PlanError if no gate has had a gradient for too long."""
        seen = budget.measured
        budget.step()
        self._silent = 0 if budget.measured > seen else self._silent + 1
        if self._silent >= SILENT or (self.steps_taken == self._end and not budget.measured):
            raise PlanError(
                f"step {self.steps_taken}: no gate has had a finite gradient for {self._silent} steps; expected "
                "plan.model in the loss, in training mode, and a loss that is finite"
            )

    def _compact(self, budget: Budget, optimizer: Optimizers, ema: Copies) -> None:
        """End the ramp: decide the gates, compact model, optimizer and copies, and write the report."""
        self._check_finite(f"step {self.steps_taken}")
        check_copies(ema, self.model)
        self._schedule.expand(optimizer, ema)
        decided = budget.finalize(round_to=self._round_to, min_width=self._min_width)
        gates = list(distinct_gates(self.model).values())
        small: Any = compact(self.model, example_inputs=self._inputs, optimizer=optimizer, round_to=1)
        compact_copies(ema, self.model, self._inputs)
        self._kept = [gate.deterministic().clone() for gate in gates]
        become(self.model, small)
        self._budget = None
        batches = [args if not kwargs else (args, kwargs) for args, kwargs in self._batches]
        seen = recalibrate(self.model, batches) if self._recalibrate and batches else 0
        share_statistics(self.model)
        self._batches.clear()
        if self._looks is not None:
            self._looks.remove()
        manifest = small.dampr_manifest
        name = self._gate if isinstance(self._gate, str) else getattr(self._gate, "__name__", repr(self._gate))
        self.report = PlanReport(
            self.steps,
            self._begun,
            self._end,
            self._trained,
            name,
            self._score,
            decided,
            manifest["max_abs_difference"],
            seen,
            dict(manifest["closed_but_kept"]),
            list(self._schedule.decisions),
        )

    def _set_rates(self, optimizer: torch.optim.Optimizer, times: float) -> None:
        """Set the learning rates after the ramp: ``times`` the first ones, falling to 0 along a cosine."""
        way = min(1.0, (self.steps_taken - self._end) / (self.steps - self._end))
        for group in optimizer.param_groups:
            rate = group.setdefault("initial_lr", float(group["lr"]))  # where torch's schedulers keep it too
            if self.report is not None:
                group["lr"] = rate * times * (1 + math.cos(math.pi * way)) / 2

    # ---- what the plan sees of the model's calls

    def _look_at_inputs(self) -> None:
        """Record the inputs of the last batches of the ramp, and only of these, because a hook makes torch.compile
        compile again.
        """
        if self._looks is None and self._recalibrate and 0 < self._end - self.steps_taken <= self._recalibrate:
            self._looks = self.model.register_forward_pre_hook(uncompiled(self._see_inputs), with_kwargs=True)

    def _see_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook: record the inputs of a training batch."""
        if module.training:
            self._batches.append((args, kwargs))

    def _see_outputs(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook: record inputs and outputs of a training batch for distillation."""
        if module.training and torch.is_grad_enabled():
            self._output = args, kwargs, output

    def _remove_hooks(self) -> None:
        """Remove the hooks from the model, and forget the dense model of distillation."""
        for hook in self._hooks:
            hook.remove()
        self._output = self._teacher = None

    def _check_finite(self, when: str) -> None:
        """Raise PlanError, with the name of a parameter, unless all parameters are finite."""
        bad = next((name for name, p in self.model.named_parameters() if not bool(p.isfinite().all())), None)
        if bad is not None:
            raise PlanError(f"{when}: {bad} has values that are not finite; expected a loss that is")

    def _check_alive(self) -> None:
        """Raise PlanError if the plan is finished."""
        if self._finished:
            raise PlanError("this plan is finished: expected a new one for more training")

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise TypeError or ValueError if the plan cannot work with this optimizer."""
        check_trains(optimizer, self.model, "plan.model")
        if self.report is not None:
            return
        check_state(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gates = {id(p) for p in (self._budget.replaced if self._budget is not None else [])}
        if held & gates:
            raise ValueError(
                "optimizer: it holds parameters of gates, which the plan steps; make it of model.parameters() after "
                "the plan"
            )
