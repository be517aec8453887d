"""The report and the error of a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .budget_report import BudgetReport
from .reports import Report


class PlanError(RuntimeError):
    """A plan cannot go on, or is finished; the model is as it was before the call."""


@dataclass(frozen=True)
class PlanReport(Report):
    """The course of a plan, and its result.

    Attributes:
        steps: the number of all steps.
        dense: the step up to which all units were open.
        compacted: the step at which the model was compacted.
        trained, gate, score: as given to the plan.
        budget: the report of the budget at that step.
        difference: the largest difference between the outputs of the masked and the compacted model.
        recalibrated: the number of batches on which statistics of norms were taken anew.
        notes: name of a layer -> why closed units of it stay.
        shrunk: texts on the removals of closed units before that step, and on those that did not pay.
    """

    steps: int
    dense: int
    compacted: int
    trained: bool
    gate: str
    score: str
    budget: BudgetReport
    difference: float
    recalibrated: int
    notes: dict[str, str] = field(default_factory=dict)
    shrunk: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        start = "a trained model" if self.trained else "scratch"
        tuned = self.steps - self.compacted
        lines = [
            f"{self.steps} steps from {start}: dense for {self.dense}, ramp to {self.compacted}, fine-tuned for "
            f"{tuned}",
            str(self.budget),
            f"largest difference of outputs, masked and compacted: {self.difference:.2g}",
        ]
        return "\n".join(lines + [f"{name}: {note}" for name, note in self.notes.items()])
