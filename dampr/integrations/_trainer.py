"""Callbacks for transformers' Trainer: one keeps a budget, one steps a plan."""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dampr._writing import whole_or_nothing
from dampr.prune import Budget, History, Plan

from . import _budget

_KEY = "dampr.Budget"  # must not be the name of a callback class, because a Trainer that resumes would instantiate it
_REMEDY = f"pass optimizers=(AdamW({_budget.UNDECAYED}), None) to the Trainer"


def _check_launched(what: str, instead: str) -> None:
    """Raise ValueError if accelerate was configured for DeepSpeed, FSDP or Megatron, which keep gradients elsewhere."""
    state = sys.modules.get("accelerate.state")
    chosen = "" if state is None else getattr(state.AcceleratorState._shared_state.get("distributed_type"), "name", "")
    if chosen in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise ValueError(f"accelerate: distributed_type={chosen}: not supported with {what}; {instead}")


def _packed(state: dict[str, Any]) -> dict[str, str]:
    """A state with tensors as a dict that JSON can hold."""
    written = io.BytesIO()
    torch.save(state, written)
    return {"packed": base64.b64encode(written.getvalue()).decode()}


def _unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """The state that :func:`_packed` was given; a state in the older, unpacked form is returned as it is."""
    if "packed" not in state:
        return state
    written = io.BytesIO(base64.b64decode(state["packed"]))
    read: dict[str, Any] = torch.load(written, map_location="cpu", weights_only=True)
    return read


class DamprCallback(TrainerCallback):
    """Adds the penalty of a :class:`dampr.Budget` to what a ``Trainer`` minimises, and steps the budget.

    The penalty does not depend on data. So its gradient is added once per step of the optimizer, right before the step,
    and the loss stays as it is. The sum is the same whatever the Trainer does to losses (gradient accumulation, label
    smoothing, a ``compute_loss_func``), and logged losses are those of the task. Gradients are clipped before it is
    added.

    The log gets what :meth:`dampr.Budget.readings` returns. Checkpoints hold the state of the budget, so a training
    that resumes continues it. When training is done, call ``budget.finalize()`` and
    :func:`dampr.integrations.huggingface.compact`.

    Args:
        budget: the budget of the model that is trained.
        history: a file for everything that is logged, evaluations included (:class:`dampr.History`); the main process
            writes it.

    Raises, when training begins: ValueError for weight decay on gates (pass ``optimizers=`` with
    :func:`dampr.param_groups`), for fp16, which scales gradients, and for DeepSpeed or FSDP, which keep gradients
    elsewhere.
    """

    def __init__(self, budget: Budget, history: str | os.PathLike[str] | None = None) -> None:
        _budget.check(budget)
        self.budget = budget
        self._history = None if history is None else History(history, budget)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Check the arguments of the training and, if it resumes, restore the budget."""
        for option in ("fp16", "deepspeed", "fsdp"):
            if getattr(args, option, None):
                raise ValueError(
                    f"TrainingArguments({option}={getattr(args, option)!r}): not supported with a budget; bf16 and "
                    "DDP are"
                )
        _check_launched("a budget", "bf16 and DDP are")
        if optimizer is not None:
            _budget.check_decay(self.budget, [optimizer], _REMEDY)
        if state.global_step and _KEY in state.stateful_callbacks:
            self.budget.load_state_dict(_unpacked(state.stateful_callbacks[_KEY]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _budget.add_gradient(self.budget)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.budget.step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            self._keep(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            self._keep(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the state, because the Trainer may save the best model right after an evaluation."""
        self._keep(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._keep(state)

    def _keep(self, state: Any) -> None:
        """Put the state of the budget where the Trainer writes it to trainer_state.json."""
        state.stateful_callbacks[_KEY] = _packed(self.budget.state_dict())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the budget's readings to the log, and write the history."""
        if logs is None:
            return
        if self._history is not None and state.is_world_process_zero:
            self._history.record(step=state.global_step, **_budget.numbers(logs))
        found = {name: float(value) for name, value in self.budget.readings().items()}
        logs |= found
        if state.log_history:
            state.log_history[-1] |= found


class PlanCallback(TrainerCallback):
    """Steps a :class:`dampr.Plan` under a ``Trainer``, after each step of the Trainer's own optimizer.

    The log gets what :meth:`dampr.Plan.readings` returns. Call ``plan.finish()`` yourself when training is done.

    Each checkpoint folder gets a file ``dampr_plan.pt``. The model of a checkpoint may be smaller than the one that the
    Trainer was given, so before ``trainer.train(resume_from_checkpoint=folder)`` call ``callback.resume(folder)``.

    Args:
        plan: the plan of the model that is trained, without ``distill``, because a Trainer's loss has no place for it.
        history: a file for everything that is logged, evaluations included (:class:`dampr.History`); the main process
            writes it.

    Raises, when training begins: ValueError for several processes or devices, DeepSpeed and FSDP, because a model that
    becomes smaller would have to be wrapped again; for a plan that was not resumed, or has begun elsewhere; and for a
    plan with another number of steps. In a step: ValueError if something else steps the plan too.
    """

    FILE = "dampr_plan.pt"

    def __init__(self, plan: Plan, history: str | os.PathLike[str] | None = None) -> None:
        _budget.check_plan(plan)
        if plan.distills:
            raise ValueError(
                "plan: it distills, expected distill=0 under a Trainer, whose loss has no place for a penalty"
            )
        self.plan = plan
        self._history = None if history is None else History(history)

    def resume(self, folder: str | os.PathLike[str]) -> None:
        """Restore plan and model from the checkpoint ``folder``. Raises FileNotFoundError if it holds no plan."""
        self.plan.load_state_dict(torch.load(Path(folder) / self.FILE, map_location="cpu", weights_only=True))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the arguments of the training."""
        for option in ("deepspeed", "fsdp"):
            if getattr(args, option, None):
                raise ValueError(
                    f"TrainingArguments({option}={getattr(args, option)!r}): not supported with a plan; one device is"
                )
        _check_launched("a plan", "one device is")
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(f"world_size={args.world_size}, n_gpu={args.n_gpu}: expected one of each with a plan")
        remedy = "call callback.resume(folder)" if state.global_step else "make a new plan"
        _budget.check_begun(self.plan, state.global_step, remedy)
        if state.max_steps != self.plan.steps:
            raise ValueError(
                f"the Trainer takes {state.max_steps} steps, the plan was made for {self.plan.steps}: expected the same"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        _budget.check_begun(self.plan, state.global_step, "leave all steps of the plan to one callback")
        self.plan.step(getattr(optimizer, "optimizer", optimizer))  # the optimizer inside accelerate's wrapper

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the plan's state into the checkpoint folder."""
        if state.is_world_process_zero:
            with whole_or_nothing(Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE) as partial:
                torch.save(self.plan.state_dict(), partial)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the plan's readings to the log, and write the history."""
        if logs is None:
            return
        if self._history is not None and state.is_world_process_zero:
            self._history.record(step=state.global_step, **_budget.numbers(logs))
        found = self.plan.readings()
        logs |= found
        if state.log_history:
            state.log_history[-1] |= found
