"""Callbacks for Lightning's Trainer (``lightning.pytorch`` or ``pytorch_lightning``): one keeps a budget, one steps a
plan.
"""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError("dampr.integrations.lightning needs Lightning: pip install dampr-torch[lightning]") from error

from dampr.prune import Budget, History, Plan

from . import _budget

__all__ = ["DamprCallback", "PlanCallback"]

_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}  # names, because the classes may come from either package
_REMEDY = f"return AdamW({_budget.UNDECAYED}) from configure_optimizers"


class _Recording(Callback):
    """Writes a history at the end of epochs and validations, and removes its hook when training ends or fails."""

    _history: History | None = None
    _optimizer: torch.optim.Optimizer | None = None
    _hook: Any = None  # the handle of a hook that runs after each step of the optimizer

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._record(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer)

    def _record(self, trainer: Any) -> None:
        """Write the present metrics into the history, in the main process."""
        if self._history is not None and trainer.is_global_zero:
            self._history.record(step=trainer.global_step, **_budget.numbers(trainer.callback_metrics))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """Remove the hook from the optimizer."""
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = self._hook = None


class DamprCallback(_Recording):
    """Adds the penalty of a :class:`dampr.Budget` to what a Lightning ``Trainer`` minimises, and steps the budget.

    The penalty does not depend on data. So its gradient is added once per step of the optimizer that has the gates,
    right before the step, and the loss stays as it is. The sum is the same with gradient accumulation and with
    automatic or manual optimization, and logged losses are those of the task. Lightning clips gradients after that, as
    a loop would that adds the penalty to the loss.

    The log of each batch gets what :meth:`dampr.Budget.readings` returns. Checkpoints hold the state of the budget, so
    a training that resumes continues it. When training is done, call ``budget.finalize()`` and :func:`dampr.compact`.

    Args:
        budget: the budget of the module that is trained, or of a model in it.
        history: a file for what is logged by the end of each epoch and each validation (:class:`dampr.History`); the
            main process writes it.

    Raises, when training begins: ValueError for weight decay on gates; if no optimizer, or several, have the gates (for
    a budget that owns the gates: the weights); for fp16 with a scaler; and for strategies other than a single device
    and DDP, which keep gradients elsewhere.
    """

    def __init__(self, budget: Budget, history: str | os.PathLike[str] | None = None) -> None:
        _budget.check(budget)
        self.budget = budget
        self._history = None if history is None else History(history, budget)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the Trainer, and hook the step of the optimizer that has the gates."""
        if not _STRATEGIES & {kind.__name__ for kind in type(trainer.strategy).__mro__}:
            raise ValueError(
                f"strategy={type(trainer.strategy).__name__}: not supported with a budget; a single device and DDP are"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"precision={trainer.precision!r}: not supported with a budget, for gradients are scaled; "
                "'bf16-mixed' is"
            )
        _budget.check_decay(self.budget, trainer.optimizers, _REMEDY)
        what, wanted = "gates", _budget.gate_parameters(self.budget)
        if self.budget.controller is not None:  # a budget that owns its gates, so no optimizer has them
            what, wanted = "weights", {id(p) for p in self.budget.model.parameters()}
        held = [(o, {id(p) for group in o.param_groups for p in group["params"]}) for o in trainer.optimizers]
        holders = [o for o, ids in held if ids & wanted]
        if len(holders) != 1:
            count = len(holders)
            raise ValueError(
                f"configure_optimizers: {count} optimizers have {what} of the budget's model; expected one"
            )
        (self._optimizer,) = holders
        self._hook = self._optimizer.register_step_post_hook(lambda *_: self.budget.step())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if optimizer is self._optimizer:
            _budget.add_gradient(self.budget)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log_dict(self.budget.readings())

    def state_dict(self) -> dict[str, Any]:
        return self.budget.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.budget.load_state_dict(state_dict)


class PlanCallback(_Recording):
    """Steps a :class:`dampr.Plan` under a Lightning ``Trainer``, after each step of the optimizer that has the weights.

    Gradient accumulation, clipping, mixed precision with or without a scaler, and schedulers work as always. Steps that
    a scaler skips do not count. The log of each batch gets what :meth:`dampr.Plan.readings` returns. Call
    ``plan.finish()`` yourself when training is done.

    Checkpoints hold the state of the plan. The model of a checkpoint may be smaller than the one that the Trainer was
    given, so before ``fit(..., ckpt_path=path)`` call ``callback.resume(path)``.

    Args:
        plan: the plan of the module that is trained, or of a model in it.
        history: a file for what is logged by the end of each epoch and each validation (:class:`dampr.History`); the
            main process writes it.

    Raises, when training begins: ValueError if no optimizer, or several, have the weights; for a plan that was not
    resumed; and for strategies other than a single device, because a model that becomes smaller would have to be
    wrapped again (a loop of your own can do that).
    """

    def __init__(self, plan: Plan, history: str | os.PathLike[str] | None = None) -> None:
        _budget.check_plan(plan)
        self.plan = plan
        self._history = None if history is None else History(history)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Restore plan and model from the checkpoint ``path``. Raises KeyError if it holds no plan."""
        callbacks = torch.load(path, map_location="cpu", weights_only=True)["callbacks"]
        if self.state_key not in callbacks:
            raise KeyError(
                f"path={os.fspath(path)!r}: no {self.state_key} in it, expected a checkpoint of a training with this "
                "callback"
            )
        self.plan.load_state_dict(callbacks[self.state_key])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the Trainer, and hook the step of the optimizer that has the weights."""
        if "SingleDeviceStrategy" not in {kind.__name__ for kind in type(trainer.strategy).__mro__}:
            raise ValueError(
                f"strategy={type(trainer.strategy).__name__}: not supported with a plan, expected a single device (a "
                "loop of your own can "
                "wrap the model again when plan.step returns True)"
            )
        if trainer.global_step:  # only for a resumed training; a new Trainer may also continue a plan from its step 0
            _budget.check_begun(self.plan, trainer.global_step, "call callback.resume(ckpt_path)")
        weights = {id(p) for p in self.plan.model.parameters()}
        holders = [
            o for o in trainer.optimizers if any(id(p) in weights for group in o.param_groups for p in group["params"])
        ]
        if len(holders) != 1:
            raise ValueError(
                f"configure_optimizers: {len(holders)} optimizers have weights of the plan's model; expected one"
            )
        (optimizer,) = holders
        self._hook = optimizer.register_step_post_hook(lambda *_: self._step(optimizer))

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        self.plan.step(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log_dict(self.plan.readings())

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Add the gradient of the plan's distillation penalty, if there is one."""
        penalty = self.plan.penalty()
        if penalty.requires_grad:
            penalty.backward(retain_graph=True)

    def state_dict(self) -> dict[str, Any]:
        return self.plan.state_dict()
