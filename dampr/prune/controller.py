"""How a budget moves the gates that it owns: the goal falls, and at each decision the kept gates cost exactly the goal.

No multiplier is integrated, so nothing can wind up or oscillate. S_i is a running mean of (z_i dL/dz_i)^2, the squared
first-order Taylor importance of unit i (Molchanov et al. 2017); k_i = dCost / dz_i at the set of gates that is kept
now. Gates are sorted by a score, the best first. The set to keep is the longest prefix whose *exact* cost is at most
the goal ``lag`` steps later, plus further gates that still fit. All other gates are lowered and are closed ``lag``
steps later, when the goal is reached.

``score="importance"``: the score is S_i / k_i. A gate is a number between 0 and 1 that only the budget moves.

``score="learned"``: the gates belong to a family and have its noise. A kept gate learns from the gradient of the task,
in normalised steps of its *level* l_i (1 for a fresh gate, 0 where evaluation closes it). The score is l_i^2 S_i / k_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from dampr import names
from dampr.gates import Gate, OwnedGate, SteppedGate
from dampr.gates.ranks import over_ranks

from .cost import Cost

SCORES = get_args(names.Score)
# shares of the steps of a budget: to measure gates, to lower a gate from open to closed, to lower the goal
MEASURE, LAG, RAMP = 0.1, 0.15, 0.75
ARRIVED = 0.9  # the share of the ramp after which the goal is the target
MEMORY = 0.95  # the decay of running means
HYSTERESIS = 4.0  # a gate on its way down comes back only if its score is that many times better
GOALS = 12  # a gate is given up if it would be closed at this many goals of later steps
FLOOR = 0.5  # the least share of a width that stays, relative to even_share
KEPT = 0.1  # the least level of a learned gate that is kept
EDGE = 0.01  # the level from which a gate that returns rises
SHUT = -0.1  # the level of a gate that has closed

Owned = SteppedGate | OwnedGate
Increment = tuple[int, list[int]]  # (number of the width, gates in the vector of all gates)


class Ramp:
    """The goal as a share of the total cost, by the number of steps taken.

    It is 1 at first, then falls by the same ratio in each step to ``share``, and stays there.
    """

    def __init__(self, share: float, steps: int) -> None:
        self.share, self.steps = share, steps
        self.lag = max(2, round(LAG * steps))
        self.length = max(4, round(RAMP * steps))
        self.measured = max(1, steps - self.lag - self.length)  # decisions begin after these
        self.settled = self.measured + self.lag + round(ARRIVED * self.length)  # the goal is the target from here on
        # no decision is made after this step
        self.decided = self.settled - self.lag + round((1 - ARRIVED) / 2 * self.length)

    def goal(self, step: int) -> float:
        """The goal after ``step`` steps, a share of the total cost."""
        begun = self.measured + self.lag
        way = min(1.0, max(0.0, (step - begun) / (self.settled - begun)))
        return self.share**way


class Controller:
    """Owns the gates of a model and moves them in each step; the docstring of the module says how.

    Args:
        gates: all gates of the model, in the order of ``cost``, made by :func:`owned`.
        cost: the cost of the model as a function of its gates.
        target: the cost that is to be left.
        steps: the number of steps until the target is reached.
        score: one of :data:`SCORES`.
        least: for each width (a gate vector, or a layer and direction of a recurrent layer) the least number of gates
            that stay open.
    """

    def __init__(
        self, gates: Sequence[Owned], cost: Cost, target: float, steps: int, score: names.Score, least: Sequence[int]
    ) -> None:
        self.gates, self.cost, self.score = list(gates), cost, score
        self.ramp = Ramp(target / cost.total, steps)
        self.target = target
        self.every = max(1, self.ramp.lag // 40)  # steps from one decision to the next
        self._widths = [row for rows in cost.structure.widths() for row in rows]
        self._least = list(least)
        size = cost.structure.size
        self.keep = torch.ones(size, dtype=torch.bool)
        self.squares = torch.zeros(size, dtype=torch.float64)
        self.measured = 0  # steps that are in the running mean
        self.due = torch.full((size,), math.inf, dtype=torch.float64)  # the step at which a gate has to be closed
        self._number = 0  # the last step
        self._moments: dict[str, list[Tensor]] = {}

    def step(self, number: int) -> None:
        """Use the gradients of one training step, and move the gates.

        ``number``: the number of the step, from 1 on; 0 and less are steps before the ramp.
        """
        self._measure()
        self._number = number
        if number < self.ramp.measured:
            return
        if number % self.every == 0 and number <= self.ramp.decided:
            self._decide(number)
        if self.score == "importance":
            self._step_levels(number)
        else:
            self._learn(number)
        self._catch_up(self.ramp.goal(number) * self.cost.total)

    @torch.no_grad()
    def _measure(self) -> None:
        """Add the gradients of this step to the running mean of importance."""
        found = over_ranks(torch.cat([_taken(gate.probe) for gate in self.gates])).double().square().cpu()
        mean = float(found.mean())
        if not (math.isfinite(mean) and mean > 0):
            return  # a gradient scaler skipped the step, or it had no loss
        self.squares.mul_(MEMORY).add_(found / mean, alpha=1 - MEMORY)
        self.measured += 1

    def importance(self) -> Tensor:
        """The running mean of squared importance, (all gates,), divided by its mean over the gates.

        It is 1 for all gates before the first measurement.
        """
        return self.squares / (1 - MEMORY**self.measured) if self.measured else torch.ones_like(self.squares)

    @torch.no_grad()
    def _decide(self, number: int) -> None:
        """Decide which gates to keep, and until which step the others have to close."""
        scores = self._scores(HYSTERESIS)
        due = number + self.ramp.lag - 1
        goal = self.ramp.goal(due)
        self.keep = self.choose(scores, goal)
        if goal > self.ramp.share:
            self._round_to_nearest(scores, goal * self.cost.total)
        self.due = torch.where(self.keep, math.inf, self.due.clamp(max=due))

    def _scores(self, hysteresis: float) -> Tensor:
        """The score of each gate, (all gates,); the score of gates that are being closed is divided by
        ``hysteresis``.
        """
        scores = self.importance() / self.marginal_cost()
        if self.score == "learned":
            scores = scores * self._levels().clamp(min=KEPT).square()
        scores = torch.where(self.keep, scores, scores / hysteresis)
        for gate, row in zip(self.gates, self.cost.structure.widths(), strict=True):
            # a family with an open_slice can only close its gates one after the other
            if isinstance(gate, OwnedGate) and gate.family.open_slice is not None:
                own = slice(row[0].start, row[-1].stop)
                scores[own] = scores[own].cummax(0).values
        return scores

    @torch.no_grad()
    def given_up(self) -> Tensor:
        """The gates that are closed for good: bool, (all gates,).

        These are due by now, and would be closed at every goal of later steps, by the present scores without
        hysteresis. The importance of a closed gate can only fall, so few of them return.
        """
        down = ~self.keep & (self.due <= self._number)
        if bool(down.any()):
            scores = self._scores(1.0)
            for goal in self._goals_to_come():
                down &= ~self.choose(scores, goal)
        return down

    def _goals_to_come(self) -> list[float]:
        """The goal of the last decision and some goals of later decisions, each once."""
        first = self._number + self.ramp.lag - 1
        ahead = torch.linspace(first, max(first, self.ramp.settled), GOALS).round().int().tolist()
        return list(dict.fromkeys(self.ramp.goal(step) for step in ahead))

    def _round_to_nearest(self, scores: Tensor, goal: float) -> None:
        """Keep one more gate, the best of the others, if the cost is then nearer to the goal."""
        best = int(torch.where(self.keep, -math.inf, scores).argmax())
        more = self.keep.clone()
        more[best] = True
        if float(self.cost(more)) - goal < goal - float(self.cost(self.keep)):
            self.keep = more

    @torch.no_grad()
    def _step_levels(self, number: int) -> None:
        """Move the levels of stepped gates: up for kept gates, down for the others."""
        left = ((self.due - number) / self.ramp.lag).float()
        for (gate, keep), (_, own) in zip(self._each(self.keep), self._each(left), strict=True):
            assert isinstance(gate, SteppedGate)
            keep, own = keep.to(gate.level.device), own.to(gate.level.device)
            up = (gate.level + 1 / self.ramp.lag).clamp(max=1)
            down = torch.where(own > 0, torch.minimum(gate.level, own).clamp(min=EDGE), 0.0)
            gate.level.copy_(torch.where(keep, up, down))

    @torch.no_grad()
    def _catch_up(self, goal: float) -> None:
        """Close some gates early if the cost is above the goal because other gates have returned.

        Of the gates that are being closed, those that are due first are taken.
        """
        opened = self.cost.decision().cpu()
        going = (opened & ~self.keep).nonzero().flatten()
        if float(self.cost(opened)) <= goal or not len(going):
            return
        going = going[self.due[going].argsort(stable=True)]

        def without(count: int) -> Tensor:
            """The open gates without the first ``count`` of those that are being closed."""
            left = opened.clone()
            left[going[:count]] = False
            return left

        low, high = 0, len(going)
        while low < high:  # find the fewest gates whose closing is enough
            middle = (low + high) // 2
            low, high = (low, middle) if float(self.cost(without(middle))) <= goal else (middle + 1, high)
        shut = opened & ~min(
            (without(low), without(max(0, low - 1))), key=lambda kept: abs(float(self.cost(kept)) - goal)
        )
        if not shut.any():
            return
        if self.score == "learned":
            self._set_levels(torch.where(shut, SHUT, self._levels()))
            return
        for gate, own in self._each(shut):
            assert isinstance(gate, SteppedGate)
            gate.level.masked_fill_(own.to(gate.level.device), 0)

    # ---- learned gates

    @torch.no_grad()
    def _learn(self, number: int) -> None:
        """Move the levels of learned gates.

        Kept gates follow the gradient of the task; at the end of the ramp all of them rise. The level of another gate
        falls with the time that it has left.
        """
        for gate in self.gates:
            assert isinstance(gate, OwnedGate)
            gate.held = False
        pull, levels = self._pull().clamp(-1, 1), self._levels()
        speed = 1.05 / self.ramp.lag
        rising = (levels < KEPT) | torch.full_like(self.keep, number > self.ramp.decided)
        up = levels + speed * torch.where(rising, 1.0, pull)
        up = torch.minimum(torch.maximum(up, levels.clamp(max=KEPT)), levels.clamp(min=1))
        left = (self.due - number) / self.ramp.lag
        down = torch.where(left > 0, torch.minimum(levels, left).clamp(min=EDGE), levels.clamp(max=SHUT))
        moved = torch.where(self.keep, up.clamp(min=EDGE), down)
        self._set_levels(torch.where(self.cost.prunable, moved, levels))

    def _pull(self) -> Tensor:
        """How much the loss wants each gate's level to rise: the running mean of -dL/dlevel, (all gates,), divided by
        its root mean square over all gates.

        Besides, the method takes a step with the other parameters of the families, and clears all their gradients.
        """
        found = (
            over_ranks(torch.cat([gate.family.pull() for gate in self.gates if isinstance(gate, OwnedGate)]))
            .double()
            .cpu()
        )
        pull = self._normalised("level", [found])[0]
        others = self._others()
        grads = [_taken(p) for p in others]
        for gate in self.gates:
            assert isinstance(gate, OwnedGate)
            gate.family.zero_grad()  # clears what pull() left on the parameters that move the levels
        moves = self._normalised("other", [-over_ranks(g) for g in grads])
        for other, move in zip(others, moves, strict=True):
            span = 1 / math.sqrt(other.shape[-1]) if other.dim() > 1 else 1.0
            other.add_(move.to(other).clamp(-1, 1), alpha=span / self.ramp.lag)
        return pull

    def _others(self) -> list[Tensor]:
        """The parameters of the families besides the levels of their gates, each once."""
        found: dict[int, Tensor] = {}
        for family in (gate.family for gate in self.gates if isinstance(gate, OwnedGate)):
            named = family.named_parameters()
            found |= {id(p): p for name, p in named if not name.startswith(family.level_parameters)}
        return list(found.values())

    def _normalised(self, kind: str, found: list[Tensor]) -> list[Tensor]:
        """The running means of gradients, divided by the running root mean square of all of them together.

        A step with gradients that are not finite is left out. ``kind``: the name under which the running means are
        kept.
        """
        if not found:
            return []
        state = self._moments.setdefault(kind, _no_moments(found))
        square = torch.cat([g.flatten() for g in found]).square().mean()
        if bool(square.isfinite()):
            state[-1].add_(torch.stack([(1 - MEMORY) * (square - state[-1][0]), torch.ones_like(square)]))
            for mean, g in zip(state[:-1], found, strict=True):
                mean.lerp_(g, 1 - MEMORY)
        bias = 1 - MEMORY ** float(state[-1][1])
        # the running means, and their mean square, are too small by the same bias
        scale = math.sqrt(float(state[-1][0]) * max(bias, 1e-30))
        return [mean / max(scale, 1e-30) for mean in state[:-1]]

    def _levels(self) -> Tensor:
        """The level of every gate, float64 on the host, (all gates,)."""
        return torch.cat([gate.family.levels() for gate in self.gates if isinstance(gate, OwnedGate)]).double().cpu()

    def _set_levels(self, levels: Tensor) -> None:
        """Set the level of every gate, (all gates,)."""
        pairs = [(gate.family, own) for gate, own in self._each(levels) if isinstance(gate, OwnedGate)]
        for family, own in sorted(pairs, key=lambda pair: getattr(pair[0], "place_in_order", 0)):
            family.set_levels_(own.to(family.levels()))

    # ---- what to keep

    def _each(self, values: Tensor) -> list[tuple[Owned, Tensor]]:
        """Pair each gate object with its part of ``values``, (all gates,)."""
        return list(zip(self.gates, values.split([gate.num_gates for gate in self.gates]), strict=True))

    def marginal_cost(self) -> Tensor:
        """dCost / dz of each gate at the set that is kept now, (all gates,), float64, above 0."""
        with torch.enable_grad():
            z = self.keep.double().requires_grad_(True)
            (k,) = torch.autograd.grad(self.cost(z), z)
        return k.cpu().clamp(min=1e-9)

    def choose(self, scores: Tensor, share: float) -> Tensor:
        """The gates to keep, bool (all gates,), so that the cost is at most ``share`` of the total.

        They are the gates that no width can do without, and then the best by ``scores``.
        """
        base, increments = increments_by(scores, self.cost.prunable, self._widths, self._least)
        return longest(self.cost, base, increments, share * self.cost.total)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint. It has the same structure at any step, because ``torch.distributed.checkpoint``
        loads into it.
        """
        moments = self._moments
        if self.score == "learned":
            others = self._others()
            fresh = {"level": _no_moments([self.squares]), **({"other": _no_moments(others)} if others else {})}
            moments = fresh | moments
        return {
            "keep": self.keep.clone(),
            "squares": self.squares.clone(),
            "due": self.due.clone(),
            "measured": self.measured,
            "held": [gate.held for gate in self.gates if isinstance(gate, OwnedGate)],
            "moments": {kind: [t.clone() for t in state] for kind, state in moments.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.keep, self.squares, self.due = (state[name].clone() for name in ("keep", "squares", "due"))
        self.measured = int(state["measured"])
        for gate, held in zip((gate for gate in self.gates if isinstance(gate, OwnedGate)), state["held"], strict=True):
            gate.held = held
        self._moments = {kind: [t.clone() for t in kept] for kind, kept in state["moments"].items()}


def _no_moments(like: Sequence[Tensor]) -> list[Tensor]:
    """Fresh running statistics for :meth:`Controller._normalised`.

    A running mean for each tensor, and a tensor of two numbers: the running mean square of all, and the number of
    steps.
    """
    return [*(torch.zeros_like(t) for t in like), like[0].new_zeros(2)]


def _taken(leaf: Tensor) -> Tensor:
    """The gradient of ``leaf``, zeros if it has none; the gradient is cleared."""
    found, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if found is None else found


@torch.no_grad()
def even_share(cost: Cost, target: float) -> float:
    """The largest share for which the model costs at most ``target`` if every width keeps that share, at least one
    unit.
    """
    widths = [row for rows in cost.structure.widths() for row in rows]

    def fits(share: float) -> bool:
        """Whether the model costs at most ``target`` if every width keeps this share."""
        kept = torch.ones(cost.structure.size, dtype=torch.bool)
        for row in widths:
            kept[row.start + max(1, round(share * len(row))) : row.stop] = False
        return float(cost(kept | ~cost.prunable)) <= target

    low, high = 0.0, 1.0
    for _ in range(12):  # to less than a unit of a width of thousands
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def owned(gate: Gate, score: names.Score) -> Owned:
    """The gate that replaces ``gate`` while a budget owns it."""
    made = SteppedGate(gate) if score == "importance" else OwnedGate(gate)
    made.former = (*gate.former, *gate.parameters())
    return made


def increments_by(
    scores: Tensor, prunable: Tensor, widths: Sequence[range], least: Sequence[int]
) -> tuple[Tensor, list[Increment]]:
    """(gates that stay open in any case, bool (all gates,); the other gates in the order in which they are kept).

    The order is by ``scores``, the largest first. ``least``: the least number of gates that stay open in each width.
    """
    base = ~prunable
    width_of = torch.zeros(len(scores), dtype=torch.int64)
    for number, (row, count) in enumerate(zip(widths, least, strict=True)):
        width_of[row.start : row.stop] = number
        own = torch.where(prunable[row.start : row.stop], scores[row.start : row.stop], -math.inf)
        base[own.topk(min(count, len(row))).indices + row.start] = True
    order = scores.argsort(descending=True, stable=True)
    order = order[~base[order]]
    return base, [(number, [gate]) for number, gate in zip(width_of[order].tolist(), order.tolist(), strict=True)]


@torch.no_grad()
def longest(cost: Cost, base: Tensor, increments: Sequence[Increment], target: float) -> Tensor:
    """The gates to keep: ``base``, the longest prefix of ``increments`` that costs at most ``target``, and what else
    still fits.

    Once an increment does not fit, no later one of its width is tried, because it costs the same.
    """
    members = torch.tensor([i for _, gates in increments for i in gates], dtype=torch.int64)
    ends = [0]
    for _, gates in increments:
        ends.append(ends[-1] + len(gates))

    def with_first(count: int) -> Tensor:
        """``base`` and the gates of the first ``count`` increments."""
        these = base.clone()
        these[members[: ends[count]]] = True
        return these

    low, high = 0, len(increments)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if float(cost(with_first(middle))) <= target else (low, middle - 1)
    chosen, full, open_widths = with_first(low), set[int](), len({number for number, _ in increments[low:]})
    for number, gates in increments[low:]:
        if len(full) == open_widths:
            break
        if number not in full:
            chosen[gates] = True
            if float(cost(chosen)) > target:
                chosen[gates] = False
                full.add(number)
    return chosen
