"""Gates in TensorBoard: histograms, and how many are open. It imports no TensorBoard; the writer is the caller's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dampr import _checks
from dampr.prune import Budget, distinct_gates

from . import _budget


@torch.no_grad()
def log_gates(writer: Any, model: nn.Module, step: int, budget: Budget | None = None) -> None:
    """Write what the gates of ``model`` are at ``step``; gates that layers share once, under the name of the first.

    For each layer: histograms ``gates/LAYER`` (values in evaluation) and ``open_probability/LAYER``, one of each
    parameter that a gate has for itself (``log_alpha/LAYER``), and a scalar ``gates_open/LAYER``, the share of open
    gates. With a budget its readings too: ``budget/macs_left``, ...

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything else with its ``add_histogram`` and
            ``add_scalar``.
        model: with gated layers.
        step: at least 0.
        budget: of the model.

    Raises: TypeError or ValueError that names the argument.
    """
    for method in ("add_histogram", "add_scalar"):
        if not callable(getattr(writer, method, None)):
            raise TypeError(
                f"writer={writer!r:.80}: expected one with {method}, such as torch.utils.tensorboard.SummaryWriter"
            )
    step = _checks.positive_int("step", step, least=0)
    if budget is not None:
        _budget.check(budget)
    gates = distinct_gates(model)
    if not gates:
        raise ValueError(f"model={type(model).__name__}: expected gated layers in it (dampr.convert puts them there)")
    for name, gate in gates.items():
        layer = name or "model"
        own = {key: p for key, p in gate.named_parameters(recurse=False) if p.shape == (gate.num_gates,)}
        for key, values in {"gates": gate.deterministic(), "open_probability": gate.open_probability(), **own}.items():
            writer.add_histogram(f"{key}/{layer}", values.float().cpu(), step)
        writer.add_scalar(f"gates_open/{layer}", float(gate.is_open().float().mean()), step)
    for key, value in ({} if budget is None else budget.readings()).items():
        writer.add_scalar(f"budget/{key}", float(value), step)
