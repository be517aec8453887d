"""What ``dampr report`` and ``dampr doctor`` look at: a gated model that a function makes, or a file of a compacted one."""

from __future__ import annotations

import base64
import html
import importlib
import io
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dampr.prune import files, summary
from dampr.prune.summary import gated_layers

COLUMNS = ("layer", "width", "left", "share")


@dataclass
class LayerWidths:
    """One width: channels (gates) before, and left; the evaluated gates where there are any."""

    name: str
    before: int
    left: int
    values: list[float] = field(default_factory=list)


@dataclass
class ModelWidths:
    """A model as a report sees it; pairs are (before, left), None where it is not known."""

    target: str
    layers: list[LayerWidths]
    params: tuple[int | None, int]
    macs: tuple[int, int] | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text."""
        rows: list[tuple[str, ...]] = [(r.name, str(r.before), str(r.left), f"{r.left / r.before:.0%}") for r in self.layers]
        for name, pair in (("params", self.params), ("MACs", self.macs)):
            if pair is not None:
                before, left = pair
                rows.append((name, "" if before is None else f"{before:,}", f"{left:,}", "" if not before else f"{left / before:.0%}"))
        return rows


def made_by(target: str) -> tuple[nn.Module, Any]:
    """(model, example inputs) from ``"module:function"``, looked for in the working directory first.

    Raises ValueError for a target that is no such name or makes something else, ImportError where the module is not there.
    """
    module, _, function = target.partition(":")
    if not module or not function:
        raise ValueError(f"target={target!r}: expected a file of dampr.save, or module:function that returns (model, example inputs)")
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
    """The widths of what ``target`` names. Raises what :func:`made_by` and :func:`dampr.load` raise."""
    return _of_file(target) if os.path.exists(target) else _of_model(target, *made_by(target))


def _of_model(target: str, model: nn.Module, example_inputs: Any) -> ModelWidths:
    found = summary(model, example_inputs=example_inputs)
    values = {name: layer.gate.deterministic().tolist() for name, layer in gated_layers(model).items()}
    layers = [LayerWidths(r.name, r.gates, r.open, values[r.name]) for r in found.layers]
    left = found.params if found.params_compacted is None else found.params_compacted
    macs = None if found.macs is None or found.macs_compacted is None else (found.macs, found.macs_compacted)
    return ModelWidths(target, layers, (found.params, left), macs, getattr(model, "dampr_skipped", {}))


def _of_file(path: str) -> ModelWidths:
    compaction, tensors = files.read_manifest(path)
    layers = []
    for name, entry in compaction.get("layers", {}).items():
        for side in ("out", "heads"):
            if side in entry:
                layers.append(
                    LayerWidths(f"{name}{' (heads)' if side == 'heads' else ''}", entry[side]["before"], len(entry[side]["kept"]))
                )
    return ModelWidths(path, layers, (None, tensors), None, compaction.get("closed_but_kept", {}))


def plot(found: ModelWidths, path: Path | io.BytesIO) -> None:
    """Widths before and after as bars, and where there are gates a histogram of their values. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = [v for r in found.layers for v in r.values]
    height = max(3.0, 0.3 * len(found.layers) + 1)
    figure, axes = plt.subplots(1, 2 if values else 1, figsize=(11 if values else 7, height), layout="constrained", squeeze=False)
    bars, names = axes[0, 0], [r.name for r in found.layers]
    bars.barh(names, [r.before for r in found.layers], color="0.85", label="before")
    bars.barh(names, [r.left for r in found.layers], height=0.5, label="left")
    bars.invert_yaxis()
    bars.set(xlabel="channels", title="widths")
    bars.legend()
    if values:
        axes[0, 1].hist(values, bins=40)
        axes[0, 1].set(xlabel="evaluation gate", ylabel="gates", yscale="log", title="gate values")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def as_html(found: ModelWidths) -> str:
    """One page that needs nothing else: the table, the chart if matplotlib is there, and the notes."""
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in found.rows())
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    notes = "".join(f"<li><b>{html.escape(name)}</b>: {html.escape(why)}</li>\n" for name, why in found.notes.items())
    try:
        buffer = io.BytesIO()
        plot(found, buffer)
        image = f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="widths">'
    except ImportError:
        image = ""
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:.2em 1em;text-align:left}"
    title = html.escape(f"dampr report: {found.target}")
    return (
        f"<!doctype html><html><head><meta charset='utf-8'><title>{title}</title><style>{style}</style></head><body><h1>{title}</h1>\n"
        f"<table><tr>{head}</tr>\n{cells}</table>\n{image}\n{f'<ul>{notes}</ul>' if notes else ''}</body></html>\n"
    )
