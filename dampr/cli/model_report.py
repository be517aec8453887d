"""Loads and describes the targets of ``dampr report`` and ``dampr doctor``: a gated model that a function returns, or
the file of a compacted model; and the history of its training.
"""

from __future__ import annotations

import base64
import html
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dampr.prune import files, history, summary
from dampr.prune.summary import gated_layers

COLUMNS = ("layer", "width", "left", "share")
TRAINING_ROWS = 12


@dataclass
class LayerWidths:
    """The width of one layer: its channels (gates) before and after pruning, and the values of its gates, if there are
    any.
    """

    name: str
    before: int
    left: int
    values: list[float] = field(default_factory=list)


@dataclass
class Training:
    """The history of a training, and the names of its numbers.

    Attributes:
        run: the history.
        score: the name of the number that should be high; None if there is none.
        penalty: the name of the penalty.
        left: the name of the share of the cost that is left.
    """

    run: history.Run
    score: str | None
    penalty: str | None
    left: str | None

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """(columns, rows) as text: at most twelve steps, with the first and the last."""
        wanted = dict.fromkeys((self.score, "loss", self.penalty, "gates_open", self.left))
        names = [name for name in wanted if name in self.run.names()]
        last = len(self.run.rows) - 1
        shown = sorted({round(last * i / (TRAINING_ROWS - 1)) for i in range(TRAINING_ROWS)}) if last >= 0 else []
        rows = [self.run.rows[i] for i in shown]
        shares = {"gates_open", self.left}
        return ("step", *names), [
            (f"{row['step']:,}", *(_cell(row.get(name), name in shares) for name in names)) for row in rows
        ]

    def points(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """The values of the numbers ``x`` and ``y``, two lists, of the rows that have both."""
        pairs = [(row.get(x), row.get(y)) for row in self.run.rows]
        found = [(a, b) for a, b in pairs if a is not None and b is not None]
        return [a for a, _ in found], [b for _, b in found]


@dataclass
class ModelWidths:
    """A model as a report shows it. ``params`` and ``macs`` are (before, left); None where it is not known."""

    target: str
    layers: list[LayerWidths]
    params: tuple[int | None, int]
    macs: tuple[int, int] | None = None
    notes: dict[str, str] = field(default_factory=dict)
    training: Training | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """The rows of the table as text."""
        rows: list[tuple[str, ...]] = [
            (r.name, str(r.before), str(r.left), f"{r.left / r.before:.0%}") for r in self.layers
        ]
        for name, pair in (("params", self.params), ("MACs", self.macs)):
            if pair is not None:
                before, left = pair
                rows.append(
                    (
                        name,
                        "" if before is None else f"{before:,}",
                        f"{left:,}",
                        "" if not before else f"{left / before:.0%}",
                    )
                )
        return rows


def made_by(target: str) -> tuple[nn.Module, Any]:
    """(model, example inputs) from ``"module:function"``; the module is first searched in the working directory.

    Raises: ValueError for a target of another form, or whose function returns something else; ImportError if the module
    does not exist.
    """
    module, _, function = target.partition(":")
    if not module or not function:
        raise ValueError(
            f"target={target!r}: expected a file of dampr.save, or module:function that returns (model, example inputs)"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    make = getattr(importlib.import_module(module), function, None)
    if not callable(make):
        raise ValueError(f"target={target!r}: {module} has no function {function!r}")
    made = make()
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise ValueError(f"target={target!r}: made {type(made).__name__}, expected (model, example inputs)")
    return made


def look_at(target: str) -> ModelWidths:
    """The widths of the model that ``target`` names, a file or "module:function".

    Raises: what :func:`made_by` and :func:`dampr.load` raise.
    """
    return _of_file(target) if os.path.exists(target) else _of_model(target, *made_by(target))


def trained(path: str | os.PathLike[str], score: str | None = None) -> Training:
    """The training in a file of :class:`dampr.History`.

    ``score``: the name of the number that should be high; None takes an accuracy, if there is one.

    Raises: what reading the file raises; ValueError for an unknown name.
    """
    run = history.read(path)
    names = run.names()
    if score is None:
        accuracies = [name for name in names if name.lower().endswith(("accuracy", "acc"))]
        score = min(accuracies, key=lambda name: (name != "accuracy", "train" in name.lower()), default=None)
    elif score not in names:
        raise ValueError(f"score={score!r}: expected one of {names}")
    penalty = next((name for name in ("budget_penalty", "penalty") if name in names), None)
    left = next((name for name in (f"{run.metric}_left", "macs_left") if name in names), None)
    return Training(run, score, penalty, left)


def _cell(value: float | None, share: bool) -> str:
    """A number as text, as a percentage if it is a ``share``; "" for None."""
    return "" if value is None else f"{value:.1%}" if share else f"{value:.4g}"


def _of_model(target: str, model: nn.Module, example_inputs: Any) -> ModelWidths:
    """The widths of a model with gates."""
    found = summary(model, example_inputs=example_inputs)
    values = {name: layer.gate.deterministic().tolist() for name, layer in gated_layers(model).items()}
    layers = [LayerWidths(r.name, r.gates, r.open, values[r.name]) for r in found.layers]
    left = found.params if found.params_compacted is None else found.params_compacted
    macs = None if found.macs is None or found.macs_compacted is None else (found.macs, found.macs_compacted)
    return ModelWidths(target, layers, (found.params, left), macs, getattr(model, "dampr_skipped", {}))


def _of_file(path: str) -> ModelWidths:
    """The widths of the compacted model in a file."""
    compaction, tensors = files.read_manifest(path)
    layers = []
    for name, entry in compaction.get("layers", {}).items():
        for side in ("out", "heads"):
            if side in entry:
                layers.append(
                    LayerWidths(
                        f"{name}{' (heads)' if side == 'heads' else ''}",
                        entry[side]["before"],
                        len(entry[side]["kept"]),
                    )
                )
    return ModelWidths(path, layers, (None, tensors), None, compaction.get("closed_but_kept", {}))


def plot(found: ModelWidths, path: Path | io.BytesIO) -> None:
    """Write a chart as PNG: widths before and after; gate values, if there are gates; and for a training its penalty
    and score over the steps, and the score over what is left.

    Raises: ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    training = found.training
    panels: list[Callable[[Any], None]] = [lambda axes: _draw_widths(found, axes)]
    if any(r.values for r in found.layers):
        panels.append(lambda axes: _draw_gates(found, axes))
    if training is not None and (training.score or training.penalty):
        panels.append(lambda axes: _draw_steps(training, axes))
    if training is not None and training.score and training.left:
        panels.append(lambda axes: _draw_trade(training, axes))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    heights = [max(3.0, 0.3 * len(found.layers) + 1), 4.0][:rows]
    figure = plt.figure(figsize=(11 if columns == 2 else 7, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    for number, draw in enumerate(panels):
        alone = number == len(panels) - 1 and number % columns == 0
        draw(figure.add_subplot(grid[number // columns, :] if alone else grid[number // columns, number % columns]))
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def _draw_widths(found: ModelWidths, axes: Any) -> None:
    """Draw the widths before and after as bars."""
    names = [r.name for r in found.layers]
    axes.barh(names, [r.before for r in found.layers], color="0.85", label="before")
    axes.barh(names, [r.left for r in found.layers], height=0.5, label="left")
    axes.invert_yaxis()
    axes.set(xlabel="channels", title="widths")
    axes.legend()


def _draw_gates(found: ModelWidths, axes: Any) -> None:
    """Draw a histogram of the gate values."""
    axes.hist([v for r in found.layers for v in r.values], bins=40)
    axes.set(xlabel="evaluation gate", ylabel="gates", yscale="log", title="gate values")


def _draw_steps(training: Training, axes: Any) -> None:
    """Draw penalty and score over the steps of the training."""
    lines, top = [], axes
    axes.set(xlabel="step", title="training")
    if training.penalty:
        lines += axes.plot(*training.points("step", training.penalty), color="C1", label=training.penalty)
        axes.set(ylabel=training.penalty, ylim=(0, None))
    if training.score:
        top = axes.twinx() if training.penalty else axes
        lines += top.plot(*training.points("step", training.score), color="C0", label=training.score)
        top.set(ylabel=training.score)
    top.legend(handles=lines, loc="center right")


def _draw_trade(training: Training, axes: Any) -> None:
    """Draw the score over the share of the cost that is left, from the first step to the last, which is marked."""
    left, score = training.points(training.left or "", training.score or "")
    axes.plot(left, score, marker=".", linewidth=0.8)
    axes.plot(left[-1:], score[-1:], marker="o", color="C3", linestyle="", label="last")
    total, target = training.run.total, training.run.target
    if target and total:
        axes.axvline(target / total, color="0.6", linestyle=":", label="target")
    name = {"macs": "MACs", None: "MACs"}.get(training.run.metric, training.run.metric)
    of = "" if not total else f", of {total * 1e3:.3f} ms" if name == "latency" else f", of {total:,.0f}"
    axes.set(xlabel=f"share of {name} left{of}", ylabel=training.score, title=f"{training.score} against {name} left")
    axes.legend(loc="lower center")


def as_html(found: ModelWidths) -> str:
    """The report as one HTML page: the tables, the chart if matplotlib is installed, and the notes."""
    notes = "".join(f"<li><b>{html.escape(name)}</b>: {html.escape(why)}</li>\n" for name, why in found.notes.items())
    training = "" if found.training is None else f"<h2>training</h2>\n{_html_table(*found.training.table())}"
    try:
        buffer = io.BytesIO()
        plot(found, buffer)
        image = f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="charts">'
    except ImportError:
        image = ""
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:.2em 1em;text-align:left}"
    title = html.escape(f"dampr report: {found.target}")
    return (
        "<!doctype html><html><head><meta "
        f"charset='utf-8'><title>{title}</title><style>{style}</style></head><body><h1>{title}</h1>\n"
        f"{_html_table(COLUMNS, found.rows())}{training}{image}\n{f'<ul>{notes}</ul>' if notes else ''}</body></html>\n"
    )


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>\n"
