"""When a plan takes closed units out of its model during training: at fixed steps, if the saved time pays for the
rebuild.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .budget import Budget
from .controller import Ramp
from .shrinker import Shrinker

WHEN = ("auto", True, False)
REBUILD = 3.0  # the assumed time of a removal, in steps; it runs the example inputs a few times, measured: two to five
# a removal must save this many times its own cost; by counted cost, because a step loses at most half that share of
# its time
WORTH = 6.0
LEAST_SAVING = 0.05  # a removal must save at least this share of the present cost
LATER = 0.5  # steps between possible removals, as a share of the steps in which one unit closes


class ShrinkSchedule:
    """Decides at which steps of a plan's ramp closed units are removed from the model, and removes them.

    Args:
        when: ``"auto"``: at those of ``steps`` where it pays. True: at all of ``steps``. False: never.
        ramp: the ramp of the plan's budget.
        start: the step of the plan at which the ramp starts to count.
        end: the step at which the plan compacts.

    ``"auto"`` compares the gain (the number of steps up to ``end``, times the share of the cost that would go) with the
    time of a removal, in steps. No clock decides, so that a run that is resumed does the same to the bit.
    """

    def __init__(self, when: bool | str, ramp: Ramp, start: int, end: int) -> None:
        self.when, self.end = when, end
        every = max(1, round(LATER * ramp.lag))
        first = start + ramp.measured + ramp.lag
        self.steps: Sequence[int] = [] if when is False else range(first, end - 1, every)
        self.shrinker: Shrinker | None = None
        self.decisions: list[str] = []

    def step(
        self, number: int, budget: Budget, model: nn.Module, example_inputs: Any, optimizer: Any, ema: Any
    ) -> bool:
        """Remove closed units from the model, if this step is one of ``steps`` and the removal pays.

        Returns whether the model has changed its size.
        """
        grown = self._bring_back(number, optimizer, ema)
        if number not in self.steps:
            return grown
        shrinker = self._shrinker_of(budget, model, example_inputs)
        shrinker.steps = number
        wanted = shrinker.candidates()
        saving = shrinker.saving(wanted) if bool((wanted & ~shrinker.removed).any()) else 0.0
        if saving < LEAST_SAVING or not self._pays(number, saving):
            return grown
        went = shrinker.take(wanted, optimizer, ema=ema)
        if went:
            self.decisions.append(str(shrinker.events[-1]))
        return went > 0 or grown

    def _bring_back(self, number: int, optimizer: Any, ema: Any) -> bool:
        """Put units back whose gates have opened again; returns whether there were any."""
        if self.shrinker is None:
            return False
        self.shrinker.steps = number
        if not self.shrinker.bring_back(optimizer, ema=ema):
            return False
        self.decisions.append(str(self.shrinker.events[-1]))
        return True

    def _shrinker_of(self, budget: Budget, model: nn.Module, example_inputs: Any) -> Shrinker:
        """The shrinker of this plan, made at the first removal."""
        if self.shrinker is None:
            self.shrinker = Shrinker(model, example_inputs, budget=budget, probability=0.0, least_saving=LEAST_SAVING)
        return self.shrinker

    def _pays(self, number: int, saving: float) -> bool:
        """Whether a removal that saves this share of the cost pays; if not, the reason goes into ``decisions``."""
        left = self.end - number
        if self.when is True or saving * left >= WORTH * REBUILD:
            return True
        self.decisions.append(
            f"step {number}: {saving:.1%} less for {left} steps would not pay for a rebuild of {REBUILD:.0f} steps"
        )
        return False

    def expand(self, optimizer: Any, ema: Any) -> None:
        """Put all units back, before the model is compacted."""
        if self.shrinker is not None:
            self.shrinker.expand(optimizer, ema=ema)

    def explain(self) -> str:
        """What was removed and when, what did not pay, and what has to stay and why."""
        if self.when is False:
            return "shrink=False: closed units stay in the model until it is compacted"
        notes = {} if self.shrinker is None else self.shrinker.notes
        lines = self.decisions or ["no unit has left the model before it is compacted"]
        return "\n".join([*lines, *(f"{name}: {note}" for name, note in notes.items())])

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, plain data and tensors."""
        shrinker = None if self.shrinker is None else self.shrinker.state_dict()
        return {"shrinker": shrinker, "decisions": list(self.decisions)}

    def load_state_dict(
        self, state: dict[str, Any], budget: Budget | None, model: nn.Module, example_inputs: Any, optimizer: Any
    ) -> None:
        """Restore a state: ``model``, which has all its units, loses those that had been removed.

        Without a ``budget`` only the decisions are restored, because the model is compacted already.
        """
        self.decisions = list(state["decisions"])
        if state["shrinker"] is not None and budget is not None:
            self._shrinker_of(budget, model, example_inputs).load_state_dict(state["shrinker"], optimizer)
