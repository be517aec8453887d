"""How a budget moves the gates it owns: the goal sinks, and at every moment the gates that are kept cost exactly the
goal.

There is no multiplier that is integrated, and so nothing that winds up or oscillates. S_i is a running mean of (z_i
dL/dz_i)^2, the squared first-order Taylor importance of unit i (Molchanov et al. 2017), and k_i = dCost / dz_i at the
set that is kept now. That set is the longest prefix of the gates by their score whose *exact* cost is at most the goal
of ``lag`` steps ahead, and what still fits beside it. All others go down and have closed ``lag`` steps later, when the
goal is there.

``score="importance"``: the score is S_i / k_i; a gate is a number that the budget alone moves, between 0 and 1.

``score="learned"``: the gates are those of a family, noise included. A gate that is kept learns from the gradient of
the task, in normalised steps of its *level* (1 where a fresh gate is, 0 where evaluation closes it), and its score is
l_i^2 S_i / k_i, l_i its level.
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
# shares of the steps of a budget: gates are measured, the first ones go down, the goal sinks
MEASURE, LAG, RAMP = 0.1, 0.15, 0.75
ARRIVED = 0.9  # the share of the ramp after which the goal is the target
MEMORY = 0.95  # of the running means
HYSTERESIS = 4.0  # a gate on its way down comes back only if its score is that many times better
GOALS = 12  # to come that a gate has to be useless at before it is given up
FLOOR = 0.5  # the least share of a width that stays, relative to that of a network which is as small and evenly narrow
KEPT = 0.1  # the least level of a learned gate that is kept
EDGE = 0.01  # where one that comes back begins
SHUT = -0.1  # the level of one that has closed

Owned = SteppedGate | OwnedGate
Increment = tuple[int, list[int]]  # of which width, and which of all gates


class Ramp:
    """The goal as a share of the total cost, by the steps taken: 1, then falling in equal ratios to ``share``,
    where it stays.
    """

    def __init__(self, share: float, steps: int) -> None:
        self.share, self.steps = share, steps
        self.lag = max(2, round(LAG * steps))
        self.length = max(4, round(RAMP * steps))
        self.measured = max(1, steps - self.lag - self.length)  # decisions begin behind these
        self.settled = self.measured + self.lag + round(ARRIVED * self.length)  # the goal is the target from here on
        # the last decision is not behind it
        self.decided = self.settled - self.lag + round((1 - ARRIVED) / 2 * self.length)

    def goal(self, step: int) -> float:
        begun = self.measured + self.lag
        way = min(1.0, max(0.0, (step - begun) / (self.settled - begun)))
        return self.share**way


class Controller:
    """Owns the gates of a model, and steps them; see the module's docstring.

    Args:
        gates: all gates of the model in the order of ``cost``, made by :func:`owned`.
        cost: of the model.
        target: what is to be left, in units of the cost.
        steps: in how many.
        score: one of :data:`SCORES`.
        least: of each width (a gate vector, or a layer and direction of a recurrent one), how many gates stay.
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
        """Take in the gradients of one training step, the ``number``-th, from 1 on (0 and less: before the ramp),
        and move the gates.
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
        found = over_ranks(torch.cat([_taken(gate.probe) for gate in self.gates])).double().square().cpu()
        mean = float(found.mean())
        if not (math.isfinite(mean) and mean > 0):
            return  # a step that a gradient scaler left out, or one without a loss
        self.squares.mul_(MEMORY).add_(found / mean, alpha=1 - MEMORY)
        self.measured += 1

    def importance(self) -> Tensor:
        """The running mean of squared importance, (all gates,), in units of its mean over the gates;
        ones before anything was measured.
        """
        return self.squares / (1 - MEMORY**self.measured) if self.measured else torch.ones_like(self.squares)

    @torch.no_grad()
    def _decide(self, number: int) -> None:
        scores = self._scores(HYSTERESIS)
        due = number + self.ramp.lag - 1
        goal = self.ramp.goal(due)
        self.keep = self.choose(scores, goal)
        if goal > self.ramp.share:
            self._round_to_nearest(scores, goal * self.cost.total)
        self.due = torch.where(self.keep, math.inf, self.due.clamp(max=due))

    def _scores(self, hysteresis: float) -> Tensor:
        """What gates are kept by, those that are on their way down ``hysteresis`` times worse."""
        scores = self.importance() / self.marginal_cost()
        if self.score == "learned":
            scores = scores * self._levels().clamp(min=KEPT).square()
        scores = torch.where(self.keep, scores, scores / hysteresis)
        for gate, row in zip(self.gates, self.cost.structure.widths(), strict=True):
            # its gates can only close one after the other
            if isinstance(gate, OwnedGate) and gate.family.open_slice is not None:
                own = slice(row[0].start, row[-1].stop)
                scores[own] = scores[own].cummax(0).values
        return scores

    @torch.no_grad()
    def given_up(self) -> Tensor:
        """The gates that have had to close by now, and that are not worth keeping at any goal to come: bool, (all
        gates,).

        By what is measured now, without the hysteresis. What is measured of a closed gate only falls, so these come
        back seldom.
        """
        down = ~self.keep & (self.due <= self._number)
        if bool(down.any()):
            scores = self._scores(1.0)
            for goal in self._goals_to_come():
                down &= ~self.choose(scores, goal)
        return down

    def _goals_to_come(self) -> list[float]:
        """The goal of the last decision and some of those of the next ones, different ones only."""
        first = self._number + self.ramp.lag - 1
        ahead = torch.linspace(first, max(first, self.ramp.settled), GOALS).round().int().tolist()
        return list(dict.fromkeys(self.ramp.goal(step) for step in ahead))

    def _round_to_nearest(self, scores: Tensor, goal: float) -> None:
        """Keep one more gate, the best of the others, where that is nearer to the goal."""
        best = int(torch.where(self.keep, -math.inf, scores).argmax())
        more = self.keep.clone()
        more[best] = True
        if float(self.cost(more)) - goal < goal - float(self.cost(self.keep)):
            self.keep = more

    @torch.no_grad()
    def _step_levels(self, number: int) -> None:
        left = ((self.due - number) / self.ramp.lag).float()
        for (gate, keep), (_, own) in zip(self._each(self.keep), self._each(left), strict=True):
            assert isinstance(gate, SteppedGate)
            keep, own = keep.to(gate.level.device), own.to(gate.level.device)
            up = (gate.level + 1 / self.ramp.lag).clamp(max=1)
            down = torch.where(own > 0, torch.minimum(gate.level, own).clamp(min=EDGE), 0.0)
            gate.level.copy_(torch.where(keep, up, down))

    @torch.no_grad()
    def _catch_up(self, goal: float) -> None:
        """Where gates that came back left the cost above the goal, close some of those that are going down now,
        the soonest due first.
        """
        opened = self.cost.decision().cpu()
        going = (opened & ~self.keep).nonzero().flatten()
        if float(self.cost(opened)) <= goal or not len(going):
            return
        going = going[self.due[going].argsort(stable=True)]

        def without(count: int) -> Tensor:
            left = opened.clone()
            left[going[:count]] = False
            return left

        low, high = 0, len(going)
        while low < high:  # the fewest whose closing is enough
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
        """Kept gates follow the pull of the task, in the end all of them up;
        the level of the others is what is left of their time.
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
        """Of each gate the running mean of -dL/dlevel, (all gates,),
        in units of the root mean square over all gates.
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
            gate.family.zero_grad()  # of what moves the levels
        moves = self._normalised("other", [-over_ranks(g) for g in grads])
        for other, move in zip(others, moves, strict=True):
            span = 1 / math.sqrt(other.shape[-1]) if other.dim() > 1 else 1.0
            other.add_(move.to(other).clamp(-1, 1), alpha=span / self.ramp.lag)
        return pull

    def _others(self) -> list[Tensor]:
        """What the families learn beside the levels of their gates, each once."""
        found: dict[int, Tensor] = {}
        for family in (gate.family for gate in self.gates if isinstance(gate, OwnedGate)):
            named = family.named_parameters()
            found |= {id(p): p for name, p in named if not name.startswith(family.level_parameters)}
        return list(found.values())

    def _normalised(self, kind: str, found: list[Tensor]) -> list[Tensor]:
        """Running means of gradients over the running root mean square of all of them together;
        one that is not finite is left out.
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
        # of the means, which are too small by the bias, as their square is
        scale = math.sqrt(float(state[-1][0]) * max(bias, 1e-30))
        return [mean / max(scale, 1e-30) for mean in state[:-1]]

    def _levels(self) -> Tensor:
        return torch.cat([gate.family.levels() for gate in self.gates if isinstance(gate, OwnedGate)]).double().cpu()

    def _set_levels(self, levels: Tensor) -> None:
        pairs = [(gate.family, own) for gate, own in self._each(levels) if isinstance(gate, OwnedGate)]
        for family, own in sorted(pairs, key=lambda pair: getattr(pair[0], "place_in_order", 0)):
            family.set_levels_(own.to(family.levels()))

    # ---- what to keep

    def _each(self, values: Tensor) -> list[tuple[Owned, Tensor]]:
        return list(zip(self.gates, values.split([gate.num_gates for gate in self.gates]), strict=True))

    def marginal_cost(self) -> Tensor:
        """dCost / dz of each gate at the kept set, (all gates,), above 0."""
        with torch.enable_grad():
            z = self.keep.double().requires_grad_(True)
            (k,) = torch.autograd.grad(self.cost(z), z)
        return k.cpu().clamp(min=1e-9)

    def choose(self, scores: Tensor, share: float) -> Tensor:
        """The gates to keep, bool: the best by ``scores``, those that no width can do without first,
        that cost at most a share.
        """
        base, increments = increments_by(scores, self.cost.prunable, self._widths, self._least)
        return longest(self.cost, base, increments, share * self.cost.total)

    def state_dict(self) -> dict[str, Any]:
        """Of one structure before the first step and after it: ``torch.distributed.checkpoint`` loads into that."""
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
        self.keep, self.squares, self.due = (state[name].clone() for name in ("keep", "squares", "due"))
        self.measured = int(state["measured"])
        for gate, held in zip((gate for gate in self.gates if isinstance(gate, OwnedGate)), state["held"], strict=True):
            gate.held = held
        self._moments = {kind: [t.clone() for t in kept] for kind, kept in state["moments"].items()}


def _no_moments(like: Sequence[Tensor]) -> list[Tensor]:
    """Of each tensor a running mean, and of all the running mean square and how many were taken in."""
    return [*(torch.zeros_like(t) for t in like), like[0].new_zeros(2)]


def _taken(leaf: Tensor) -> Tensor:
    """The gradient of a leaf, zeros where there is none; it is cleared."""
    found, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if found is None else found


@torch.no_grad()
def even_share(cost: Cost, target: float) -> float:
    """The largest share of every width that costs at most ``target`` if every width keeps as large a share,
    at least one unit.
    """
    widths = [row for rows in cost.structure.widths() for row in rows]

    def fits(share: float) -> bool:
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
    """What stands in for ``gate`` while a budget owns it."""
    made = SteppedGate(gate) if score == "importance" else OwnedGate(gate)
    made.former = (*gate.former, *gate.parameters())
    return made


def increments_by(
    scores: Tensor, prunable: Tensor, widths: Sequence[range], least: Sequence[int]
) -> tuple[Tensor, list[Increment]]:
    """What stays open in any case, bool (all gates,), and the other gates in the order of opening,
    by ``scores`` from the largest on.
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
    """``base`` and the longest run of increments from the first on that costs at most ``target``, then whatever else
    still fits.

    One increment that does not fit closes its width, because the next one of it costs the same.
    """
    members = torch.tensor([i for _, gates in increments for i in gates], dtype=torch.int64)
    ends = [0]
    for _, gates in increments:
        ends.append(ends[-1] + len(gates))

    def with_first(count: int) -> Tensor:
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
