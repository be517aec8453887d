"""The report and the errors of a budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .reports import Report


class BudgetError(RuntimeError):
    """A budget cannot be met; the model is as it was."""


class BudgetWarning(UserWarning):
    """A budget closed many gates that training had left open. The network was not trained without them."""


def amount(metric: str, value: float) -> str:
    """A cost as text: a count, or milliseconds for a latency."""
    return f"{value * 1e3:.3f} ms" if metric == "latency" else f"{value:,.0f}"


RISK = 0.1  # a budget warns if finalize changes a larger share of the gates


@dataclass(frozen=True)
class BudgetReport(Report):
    """The result of :meth:`Budget.finalize`.

    ``reached`` and ``total`` are the costs after and before compaction (for latency in seconds, from the table).
    ``widths``: for each layer (all gates, open gates). ``before``: the cost of the gates that were open in evaluation
    before. ``closed`` and ``opened``: for each layer, how many gates finalize closed although they were open in
    evaluation, and opened although they were closed. Training had no part in these.
    """

    metric: str
    target: float
    reached: float
    total: float
    widths: dict[str, tuple[int, int]]
    notes: dict[str, str] = field(default_factory=dict)
    before: float | None = None
    closed: dict[str, int] = field(default_factory=dict)
    opened: dict[str, int] = field(default_factory=dict)

    @property
    def changed(self) -> float:
        """The share of all gates that finalize changed against what training had left."""
        gates = sum(count for count, _ in self.widths.values())
        return (sum(self.closed.values()) + sum(self.opened.values())) / max(1, gates)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{name}: {left} of {count}{self._decided(name)}" for name, (count, left) in self.widths.items()]
        reached, total, target = (amount(self.metric, n) for n in (self.reached, self.total, self.target))
        lines.append(f"{self.metric}: {reached} of {total} ({self.reached / self.total:.2%}), target {target}")
        if self.before is not None and self.changed:
            lines.append(
                f"before: {self.before / self.total:.2%} of {self.metric}; {self.changed:.1%} of the gates changed here"
            )
        return "\n".join(lines + [f"{name}: {note}" for name, note in self.notes.items()])

    def _decided(self, name: str) -> str:
        """How many gates of a layer finalize changed, as text."""
        found = [
            f"{counts[name]} {what}"
            for what, counts in (("closed", self.closed), ("opened", self.opened))
            if counts.get(name)
        ]
        return f" ({', '.join(found)} here)" if found else ""
