"""Chooses the gates that a budget keeps: those of the highest rank, as many as fit into the target cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr.gates import Fixed, Gate, SteppedGate

from .budget_report import BudgetError
from .controller import Increment, longest
from .cost import Cost


@torch.no_grad()
def choose(
    cost: Cost,
    gates: Sequence[Gate],
    order: Tensor,
    target: float,
    round_to: int,
    min_width: int,
    same: list[list[int]],
) -> Tensor:
    """The gates that a budget keeps open: as many as the target allows, those of the highest rank first.

    The number of gates is found by bisection. Then further gates of lower rank are opened if they still fit.

    Args:
        cost: the cost of the model as a function of its open gates.
        gates: the gate vectors of the model.
        order: a number for each gate, (all gates,), that decides between gates of equal rank; larger is kept.
        target: the cost to stay within.
        round_to: the number of open gates of each width becomes a multiple of it, as far as its size allows.
        min_width: at least this many gates stay open in each width (rounded up to a multiple of ``round_to``).
        same: groups of gate vectors, by their index in ``gates``, that keep equally many gates.

    Returns: bool, (all gates,).

    Raises: BudgetError if the target is below what ``min_width`` costs, or if a group of ``same`` cannot be equal.
    """
    chosen, increments = increments_of(cost, gates, order, round_to, min_width, same)
    check_reached(cost, chosen, target, round_to, min_width)
    return longest(cost, chosen, increments, target)


def check_reached(cost: Cost, least: Tensor, target: float, round_to: int, min_width: int) -> None:
    """Raise BudgetError if the gates ``least``, which stay open in any case, already cost more than the target."""
    if float(cost(least)) > target:
        raise BudgetError(
            f"target of {target:,} {cost.metric}: expected at least {int(cost(least)):,}, which remain with "
            f"{min_width} (a multiple of {round_to}) open in every layer"
        )


def increments_of(
    cost: Cost, gates: Sequence[Gate], tied: Tensor | None, round_to: int, min_width: int, same: list[list[int]]
) -> tuple[Tensor, list[Increment]]:
    """Divide the gates of a model into those that are open in any case and those that a budget chooses from.

    An increment is (number of a width, gates that open together). A width is a gate vector or, in a recurrent layer,
    the gates of one layer and direction. Arguments as for :func:`choose`; ``tied`` is its ``order``, or None.

    Returns: (bool (all gates,), the gates that are open in any case; the other gates as increments, in the order in
    which they are opened).
    """
    base = torch.zeros(cost.structure.size, dtype=torch.bool)
    found: list[Ranked] = []
    of_gates: list[list[int]] = []  # the widths of each gate vector
    for gate, rows in zip(gates, cost.structure.widths(), strict=True):
        start = rows[0].start
        ranks = _ranks(gate, None if tied is None else tied[start : start + gate.num_gates])
        opened = gate.is_open().cpu()
        of_gates.append([])
        for mine in rows:
            number = sum(map(len, of_gates))
            of_gates[-1].append(number)
            free = [i for i in mine if not cost.prunable[i]]
            base[free] = opened[[i - start for i in free]]
            order = sorted((i for i in mine if cost.prunable[i]), key=lambda i: ranks[i - start], reverse=True)
            fewest = max(min_width, cost.structure.least(mine.start))
            least = 0 if mine.start in cost.whole else min(len(order), -(-fewest // round_to) * round_to)
            base[order[:least]] = True
            for first in range(least, len(order), round_to):
                members = order[first : first + round_to]
                found.append((ranks[members[-1] - start], number, members))
    for group in same:
        counts = sorted({len(of_gates[gate]) for gate in group})
        if len(counts) != 1:
            raise BudgetError(f"same: recurrent layers with {counts} widths each cannot be the same")
        for widths in zip(*(of_gates[gate] for gate in group), strict=True):
            found = _joined(found, list(widths))
    found.sort(key=lambda increment: increment[0], reverse=True)
    return base, [(number, members) for _, number, members in found]


Ranked = tuple[tuple[float, ...], int, list[int]]  # (rank, number of the width, gates) of an increment


def _joined(found: list[Ranked], group: list[int]) -> list[Ranked]:
    """Join the increments of several widths that have to stay equal: the first increments of all open together, then
    the second ones, and so on, with their mean rank.
    """
    series = [[increment for increment in found if increment[1] == number] for number in group]
    if len({len(own) for own in series}) != 1:
        raise BudgetError(
            f"same: layers with {sorted({len(own) for own in series})} gates that can be cut cannot keep the same "
            "number"
        )
    joined: list[Ranked] = []
    for each in zip(*series, strict=True):
        columns = zip(*(rank for rank, _, _ in each), strict=True)
        joined.append(
            (
                tuple(sum(column) / len(each) for column in columns),
                group[0],
                [i for _, _, members in each for i in members],
            )
        )
    return [increment for increment in found if increment[1] not in group] + joined


def _ranks(gate: Gate, tied: Tensor | None) -> list[tuple[float, ...]]:
    """The keys by which gates are ordered: whether open in evaluation, the size of the value, the open probability, the
    family's parameter, and ``tied`` if given.
    """
    columns = [gate.is_open(), gate.deterministic().abs(), gate.open_probability(), _evaluated_parameter(gate)]
    columns += [] if tied is None else [tied]
    return list(zip(*(column.detach().double().cpu().tolist() for column in columns), strict=True))


def _evaluated_parameter(gate: Gate) -> Tensor:
    """The family's parameter without noise. For DAM this is the position on the ramp, which orders closed gates too."""
    training = gate.training
    gate.eval()
    try:
        return gate.parameter.expand(gate.num_gates)
    finally:
        gate.train(training)


@torch.no_grad()
def fixed_gates(gates: Sequence[Gate], chosen: Tensor) -> list[Fixed]:
    """Fixed gates with the values of ``gates`` where they are chosen, and 0 elsewhere. A chosen gate that was closed
    gets a small positive value.
    """
    fixed, start = [], 0
    for gate in gates:
        z = gate.value if isinstance(gate, SteppedGate) else gate.deterministic()
        keep = chosen[start : start + gate.num_gates].to(z.device)
        start += gate.num_gates
        opened = z.abs()[z != 0]
        weakest = torch.minimum(
            opened.min() if len(opened) else z.new_ones(()), gate.open_probability().clamp(min=1e-3)
        )
        fixed.append(Fixed(torch.where(keep, torch.where(z != 0, z, weakest), 0.0)))
        fixed[-1].former = (*gate.former, *gate.parameters())
    return fixed
