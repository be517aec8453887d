"""A callback for transformers' Trainer that keeps a budget."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from dampr.gates import Gate
from dampr.prune import Budget, gated_layers

_KEY = "dampr.Budget"  # no class of that name, or a Trainer that restores callbacks would try to make one


class DamprCallback(TrainerCallback):
    """Adds the penalty of a :class:`dampr.Budget` to what a ``Trainer`` minimises, and steps the budget.

    The penalty does not depend on data, so its gradient is added once for each step of the optimizer, right before it, and not to the
    loss: the same sum, whatever the Trainer makes of losses (gradient accumulation, label smoothing, a ``compute_loss_func``), and the
    losses in its log stay those of the task. Gradients are clipped before that.

    In the log: ``gates_open``, the share of open gates; ``<metric>_left``, the share of MACs or parameters that the gates leave in
    evaluation; ``budget_multiplier``; ``budget_penalty``. Checkpoints hold the state of the budget, and a training that resumes goes on
    with it. Call ``budget.finalize()`` and :func:`dampr.integrations.huggingface.compact` when training is done.

    Args:
        budget: of the model that is trained.

    Raises, when training begins: ValueError for weight decay on gates (pass ``optimizers=`` with :func:`dampr.param_groups`), for fp16,
    whose scaled gradients have another size, and for DeepSpeed or FSDP, which keep gradients elsewhere.
    """

    def __init__(self, budget: Budget) -> None:
        if not isinstance(budget, Budget):
            raise TypeError(f"budget={budget!r:.80}: expected a dampr.Budget")
        self.budget = budget
        self._penalty: float | Tensor = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        for option in ("fp16", "deepspeed", "fsdp"):
            if getattr(args, option, None):
                raise ValueError(f"TrainingArguments({option}={getattr(args, option)!r}): not supported with a budget; bf16 and DDP are")
        if optimizer is not None:
            _check_decay(model, optimizer)
        if state.global_step and _KEY in state.stateful_callbacks:
            self.budget.load_state_dict(state.stateful_callbacks[_KEY])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        penalty = self.budget.penalty()
        if penalty.requires_grad:
            penalty.backward()
        self._penalty = penalty.detach()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.budget.step()
        state.stateful_callbacks[_KEY] = self.budget.state_dict()  # goes into trainer_state.json

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any) -> None:
        if logs is None or model is None:
            return
        gates = list({id(layer.gate): layer.gate for layer in gated_layers(model).values()}.values())
        found = {
            "gates_open": float(sum(int(gate.is_open().sum()) for gate in gates)) / max(1, sum(gate.num_gates for gate in gates)),
            f"{self.budget.metric}_left": self.budget.left(),
            "budget_multiplier": float(self.budget.multiplier),
            "budget_penalty": float(self._penalty),
        }
        logs |= found
        if state.log_history:
            state.log_history[-1] |= found


def _check_decay(model: Any, optimizer: Any) -> None:
    found = [m for m in model.modules() if isinstance(m, Gate) and not getattr(m, "weight_decay_on_beta", False)]
    gates = {id(p) for gate in found for p in gate.parameters()}
    for group in optimizer.param_groups:
        if group.get("weight_decay", 0) and any(id(p) in gates for p in group["params"]):
            raise ValueError(
                f"weight_decay={group['weight_decay']:g} on gates: expected none; "
                "pass optimizers=(AdamW(dampr.param_groups(model, lr=..., weight_decay=...)), None) to the Trainer"
            )
