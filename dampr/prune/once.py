"""prune_once: pruning without training gates, in one shot or in rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dampr import _checks, names
from dampr.gates import SteppedGate
from dampr.gates.ranks import over_ranks

from . import inputs, noise
from .budget import Budget
from .compact import compact
from .convert import convert as put_gates_in
from .importance import evenly, magnitudes
from .recalibrate import recalibrate, share_statistics
from .restore import as_it_was
from .summary import gated_layers
from .wrapped import sees_through

CRITERIA = get_args(names.Criterion)


@sees_through
def prune_once(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    macs: Any = None,
    params: Any = None,
    latency: Any = None,
    rounds: int = 1,
    criterion: names.Criterion = "taylor",
    example_inputs: Any = None,
    min_share: float | None = None,
    round_to: int = 1,
    min_width: int = 1,
    convert: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A smaller plain copy of a trained ``model`` that costs exactly a share of it; fine-tune it.

    Units are cut in the order of a criterion, whatever kind of structure :func:`dampr.convert` finds them in, by the
    exact cost of what is left, and :func:`dampr.compact` proves that the result computes what the masked model
    computes.

    Args:
        model: dense and trained, or with gates; it is not changed.
        batches: pairs of inputs (a tensor, a tuple of positional or a dict of keyword arguments) and targets. A few
            hundred examples do. Statistics of BatchNorms are taken again on them. Criteria other than ``"taylor"`` need
            none. In a process group of several ranks each has batches of its own; importance and statistics are means
            over the ranks, so every rank has to call this.
        loss: called with output and targets; a scalar.
        macs, params, latency: exactly one, as for :class:`dampr.Budget`.
        rounds: in how many steps of equal ratio the cost comes down; importance is measured anew in each.
        criterion: ``"taylor"``: the mean over batches of (z dL/dz)^2 at z = 1 (Molchanov et al. 2017) over the marginal
            cost of the unit. ``"magnitude"``: the L2 norm of the unit's weights, every layer thinned by the same share.
            ``"random"``: that share, drawn.
        example_inputs: to trace and to prove with; None: the inputs of the first batch.
        min_share, round_to, min_width: as for :class:`dampr.Budget` and :meth:`dampr.Budget.finalize`.
        convert: more keyword arguments for :func:`dampr.convert`.

    Returns: a new plain model in the training mode of ``model``; ``dampr_manifest`` is as of :func:`dampr.compact`,
    ``dampr_budget`` the :class:`dampr.BudgetReport`.

    Raises: ValueError or TypeError that names the argument; ConversionError, BudgetError, CompactionError as those
    functions do.

    >>> import dampr
    >>> x, y = torch.randn(64, 20), torch.randint(5, (64,))
    >>> model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    >>> dampr.prune.prune_once(model, [(x, y)], nn.functional.cross_entropy, macs=0.5)[0]
    Linear(in_features=20, out_features=20, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.80}: expected a torch.nn.Module")
    _checks.one_of("criterion", criterion, CRITERIA)
    rounds = _checks.positive_int("rounds", rounds)
    if convert is not None and not isinstance(convert, Mapping):
        raise TypeError(f"convert={convert!r:.80}: expected a dict of keyword arguments of dampr.convert, or None")
    data = _checks.items("batches", batches) if batches is not None else []
    _check_data(data, loss, criterion)
    example = data[0][0] if example_inputs is None and data else example_inputs
    inputs.check(example)
    gated = inputs.copied(model, example)
    with noise.kept(model):
        if not gated_layers(gated):
            gated = put_gates_in(gated, example_inputs=example, **(convert or {}))
        budget = Budget(gated, example, macs=macs, params=params, latency=latency, steps=8, min_share=min_share)
        for number in range(1, rounds + 1):
            _close(budget, (budget.target / budget.total) ** (number / rounds), criterion, data, loss)
        report = budget.finalize(round_to=round_to, min_width=min_width)
        small: Any = compact(gated, example_inputs=example)
    recalibrate(small, (given for given, _ in data))
    share_statistics(small)
    small.dampr_budget = report
    plain: nn.Module = small
    return plain


def _check_data(data: list[Any], loss: Any, criterion: names.Criterion) -> None:
    """Raise TypeError unless ``data`` holds pairs, and ValueError if "taylor" has no data or no loss."""
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in data):
        raise TypeError("batches: expected pairs of inputs and targets")
    if criterion == "taylor" and (not data or not callable(loss)):
        raise ValueError(
            f"batches of {len(data)}, loss={loss!r:.80}: expected at least one batch and a function, with "
            "criterion='taylor'"
        )


def _close(budget: Budget, share: float, criterion: names.Criterion, data: list[tuple[Any, Any]], loss: Any) -> None:
    """Close the gates of a budget that owns them, down to a share of the cost."""
    controller = budget.controller
    assert controller is not None
    gates = [gate for gate in controller.gates if isinstance(gate, SteppedGate)]
    if criterion == "taylor":
        controller.squares, controller.measured = taylor(budget.model, gates, data, loss), 0
        scores = controller.squares / controller.marginal_cost()
    else:
        structure = budget.cost.structure
        values = (
            magnitudes(structure, budget.model)
            if criterion == "magnitude"
            else torch.rand(structure.size, dtype=torch.float64)
        )
        values = over_ranks(values.to(gates[0].device)).cpu()
        scores = evenly(values, [gate.num_gates for gate in gates])
        controller.squares = scores * controller.marginal_cost()
    controller.measured = 10_000  # after so many steps a running mean equals the value itself
    controller.keep = controller.choose(torch.where(controller.keep, scores, -1.0), share)
    for gate, keep in zip(gates, controller.keep.split([gate.num_gates for gate in gates]), strict=True):
        gate.level.copy_(keep)


def _value(loss: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
    """The loss of one batch. Raises TypeError unless it is one number with a gradient."""
    try:
        value = loss(output, target)
    except TypeError as error:
        raise TypeError(f"loss={loss!r:.80}: expected a function of (output, target), and it raises {error}") from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise TypeError(f"loss={loss!r:.80}: expected one number with a gradient from it, and it gives {value!r:.80}")
    return value


def taylor(
    model: nn.Module, gates: list[SteppedGate], data: list[tuple[Any, Any]], loss: Callable[[Any, Any], Tensor]
) -> Tensor:
    """The mean over batches of (z dL/dz)^2 of every gate, (all gates,), float64 on the host, in evaluation mode."""
    total = torch.zeros(sum(gate.num_gates for gate in gates), dtype=torch.float64)
    probes = [gate.probe for gate in gates]
    with as_it_was(model), inputs.evaluating(model), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        for gate in gates:
            gate.training = True  # evaluation, but with the factor whose gradient is wanted
        for given, target in data:
            found = torch.autograd.grad(_value(loss, inputs.call(model, given), target), probes, allow_unused=True)
            row = torch.cat(
                [torch.zeros_like(probe) if g is None else g for probe, g in zip(probes, found, strict=True)]
            )
            if not bool(row.isfinite().all()):
                raise ValueError("loss: its gradient is not finite; expected a model and a loss that are")
            total += row.double().cpu().square() / len(data)
    total = over_ranks(total.to(probes[0].device)).cpu()
    if not bool(total.any()):
        raise ValueError("loss: its gradient is 0 at every gate, so nothing is known of units; expected another loss")
    return total
