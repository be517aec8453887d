"""Prints tables and draws plots of the commands' results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from dampr.cli.demo import Report
from dampr.testing.verify import Row

DEMO_COLUMNS = ("model", "accuracy", "open units", "params", "MACs", "of dense", "ms", "KB")


def demo_rows(report: Report) -> list[tuple[str, ...]]:
    """The cells of the demo's table."""
    dense = report.models[0]
    return [
        (
            m.name,
            f"{m.accuracy:.2%}",
            m.widths,
            f"{m.params / 1e3:.1f}k",
            f"{m.macs / 1e3:.1f}k",
            f"{m.macs / dense.macs:.0%}",
            f"{m.latency_ms:.3f}",
            f"{m.file_bytes / 1024:.0f}",
        )
        for m in report.models
    ]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows))


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as it has to be: neither cut nor folded, however narrow the terminal."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    needed = Measurement.get(console, console.options.update(width=1000), table).maximum
    Console(file=console.file, width=max(needed, console.width)).print(table)


def verify_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells of the table of ``dampr verify``."""
    result: list[tuple[str, ...]] = []
    for row in rows:
        worst = row.worst
        numbers = ("", "", "") if worst is None else (f"{worst.error:.2e}", f"{worst.bound:.2e}", row.worst_case)
        result.append(
            (
                row.op,
                row.backend,
                row.device,
                row.dtype,
                str(row.cases),
                *numbers,
                "ok" if row.ok else f"FAILED ({len(row.failures)})",
            )
        )
    return result


def plot_demo(report: Report, path: Path) -> None:
    """Open units of each layer over the epochs, and MACs left beside test accuracy, as a PNG.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    epochs = [h["epoch"] for h in report.history]
    *hidden, _ = report.history[0]["open"]
    for name in hidden:
        left.plot(epochs, [h["open"][name] for h in report.history], marker=".", label=f"layer {name}")
    for name, label in (("macs_left", "MACs left"), ("accuracy", "test accuracy")):
        right.plot(epochs, [100 * h[name] for h in report.history], marker=".", label=label)
    left.set(xlabel="epoch", ylabel="open units", title=f"{report.data}: units that stay open", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="%", title="what is left, and what it can do", ylim=(0, 105))
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
