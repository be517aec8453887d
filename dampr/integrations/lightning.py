"""A callback for Lightning's Trainer (``lightning.pytorch`` or ``pytorch_lightning``) that keeps a budget."""

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

_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}  # by name: the Trainer may be of either package
_REMEDY = f"return AdamW({_budget.UNDECAYED}) from configure_optimizers"


class _Recording(Callback):
    """Writes a history at the end of epochs and validations,
    and lets go of the optimizer when training ends or fails.
    """

    _history: History | None = None
    _optimizer: torch.optim.Optimizer | None = None
    _hook: Any = None  # on the steps of the optimizer

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._record(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer)

    def _record(self, trainer: Any) -> None:
        if self._history is not None and trainer.is_global_zero:
            self._history.record(step=trainer.global_step, **_budget.numbers(trainer.callback_metrics))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = self._hook = None


class DamprCallback(_Recording):
    """Adds the penalty of a :class:`dampr.Budget` to what a Lightning ``Trainer`` minimises, and steps the budget.

    The penalty does not depend on data, so its gradient is added once for each step of the optimizer that has the
    gates, right before it, and not to the loss: the same sum under gradient accumulation, automatic and manual
    optimization, and losses in the log stay those of the task. Lightning clips gradients after that, as in a loop that
    adds the penalty to the loss.

    In the log of each batch: what :meth:`dampr.Budget.readings` gives. Checkpoints hold the state of the budget, and a
    training that resumes goes on with it. Call ``budget.finalize()`` and :func:`dampr.compact` when training is done.

    Args:
        budget: of the module that is trained, or of a model in it.
        history: a file for what is logged by the end of each epoch and each validation (:class:`dampr.History`); the
            main process writes.

    Raises, when training begins: ValueError for weight decay on gates, for gates (of a budget that owns them: weights)
    in no optimizer or in several, for fp16 with a scaler, and for strategies other than a single device and DDP, which
    keep gradients elsewhere.
    """

    def __init__(self, budget: Budget, history: str | os.PathLike[str] | None = None) -> None:
        _budget.check(budget)
        self.budget = budget
        self._history = None if history is None else History(history, budget)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
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
        if self.budget.controller is not None:  # it owns the gates
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
    """Steps a :class:`dampr.Plan` under a Lightning ``Trainer``, after each step of the optimizer that has the model's
    weights.

    Gradient accumulation, clipping, mixed precision with or without a scaler and schedulers are Lightning's as always;
    steps that a scaler leaves out do not count. In the log of each batch: what :meth:`dampr.Plan.readings` gives.
    ``plan.finish()`` is yours to call when training is done.

    Checkpoints hold the state of the plan. The model of a checkpoint may be smaller than the one it was made of, so
    that has to be known before ``fit(..., ckpt_path=path)``: call ``callback.resume(path)`` first.

    Args:
        plan: of the module that is trained, or of a model in it.
        history: a file for what is logged by the end of each epoch and each validation (:class:`dampr.History`); the
            main process writes.

    Raises, when training begins: ValueError for weights in no optimizer or in several, for a plan that was not resumed,
    and for strategies other than a single device: a model that becomes smaller has to be wrapped again, in a loop of
    your own.
    """

    def __init__(self, plan: Plan, history: str | os.PathLike[str] | None = None) -> None:
        _budget.check_plan(plan)
        self.plan = plan
        self._history = None if history is None else History(history)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Bring plan and model to where they were in the checkpoint ``path``.

        Raises KeyError where no plan is in it.
        """
        callbacks = torch.load(path, map_location="cpu", weights_only=True)["callbacks"]
        if self.state_key not in callbacks:
            raise KeyError(
                f"path={os.fspath(path)!r}: no {self.state_key} in it, expected a checkpoint of a training with this "
                "callback"
            )
        self.plan.load_state_dict(callbacks[self.state_key])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if "SingleDeviceStrategy" not in {kind.__name__ for kind in type(trainer.strategy).__mro__}:
            raise ValueError(
                f"strategy={type(trainer.strategy).__name__}: not supported with a plan, expected a single device (a "
                "loop of your own can "
                "wrap the model again when plan.step returns True)"
            )
        if trainer.global_step:  # a new Trainer may go on with a plan
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
        penalty = self.plan.penalty()
        if penalty.requires_grad:  # of distillation
            penalty.backward(retain_graph=True)

    def state_dict(self) -> dict[str, Any]:
        return self.plan.state_dict()
