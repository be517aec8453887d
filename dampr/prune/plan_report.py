"""What a plan reports, and how it fails."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .budget_report import BudgetReport
from .reports import Report


class PlanError(RuntimeError):
    """A plan could not go on, or is over; the model is as it was before the call."""


@dataclass(frozen=True)
class PlanReport(Report):
    """What a plan did, and when: ``steps`` in all, of which all units were open up to ``dense``, and the model
    compacted at ``compacted``.

    ``budget``: what was decided at that moment; ``difference``: the largest between the outputs of the masked and the
    compacted model. ``recalibrated``: on how many batches statistics of norms were taken again. ``shrunk``: which
    removals of closed units there were before, and which did not pay.
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
