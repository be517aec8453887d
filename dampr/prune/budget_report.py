"""What a budget reports, and how it fails."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .reports import Report


class BudgetError(RuntimeError):
    """A budget could not be kept; the model is as it was."""


class BudgetWarning(UserWarning):
    """A budget closed many gates that training had left open, so the network was not trained for what is left of it."""


def amount(metric: str, value: float) -> str:
    """A cost in words: a count, or milliseconds."""
    return f"{value * 1e3:.3f} ms" if metric == "latency" else f"{value:,.0f}"


RISK = 0.1  # the share of the gates above which a budget warns of what it decided without training


@dataclass(frozen=True)
class BudgetReport(Report):
    """What :meth:`Budget.finalize` did: ``reached`` of ``total``, counted after compaction (seconds: by the table);
    gates, all and open.

    ``before``: the cost that the gates left in evaluation before. ``closed``, ``opened``: of each layer, how many gates
    were closed though evaluation had them open, and opened though it had them closed: what was decided without
    training.
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
        """The share of the gates of all layers that were decided against what training had left."""
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
        found = [
            f"{counts[name]} {what}"
            for what, counts in (("closed", self.closed), ("opened", self.opened))
            if counts.get(name)
        ]
        return f" ({', '.join(found)} here)" if found else ""
