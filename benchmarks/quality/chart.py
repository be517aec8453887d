"""Draws docs/plots/quality.png: test accuracy against the share of the multiply-accumulates left, in a panel for each
task.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.tables import ROOT

from . import results
from .methods import METHODS, TITLES
from .results import Results
from .tables import best_records
from .tasks import TASKS, Task

CHART = ROOT / "docs" / "plots" / "quality.png"
# Okabe and Ito's colours; markers tell the methods apart in print. dampr's are filled lines, the others dashed.
STYLES = {
    "narrow": ("#000000", "s"),
    "l1": ("#999999", "v"),
    "tp_random": ("#CC79A7", "<"),
    "tp_taylor": ("#D55E00", "^"),
    "tp_slim": ("#E69F00", ">"),
    "tp_groupnorm": ("#CC79A7", "D"),
    "prune_once": ("#56B4E9", "P"),
    "plan": ("#0072B2", "o"),
    "plan_hard_concrete": ("#009E73", "X"),
    "plan_dep_l0": ("#009E73", "*"),
    "plan_dam": ("#009E73", "p"),
    "plan_diffprune": ("#009E73", "h"),
    "plan_diffmask": ("#009E73", "8"),
}


def draw(found: Results) -> Figure:
    """The chart of the runs at equal steps: lines through the means, a small mark for each seed, the dense network as a
    dotted line.
    """
    begun = [task for task in TASKS.values() if any(run.task == task.name for run in found)]
    columns = max(3, len(begun) // 2 + 1)  # one place more than tasks, for the legend
    figure, axes = plt.subplots(2, columns, figsize=(4 * columns, 7), layout="constrained", squeeze=False)
    for ax, task in zip(axes.flat, begun, strict=False):
        _draw_task(ax, found, task)
    for ax in axes.flat[len(begun) :]:
        ax.axis("off")
    entries = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes.flat[-1].legend(entries.values(), entries.keys(), loc="center", frameon=False)
    return figure


def _draw_task(ax: Axes, found: Results, task: Task) -> None:
    """Draw one task's panel."""
    dense = found.of(task.name, 1.0, "dense", "steps")
    if dense:
        ax.axhline(100 * results.over_seeds(dense), color="0.5", linestyle=":", label=TITLES["dense"])
    for method in METHODS:
        by_share = {s: records for s in task.shares if (records := best_records(found, task, s, method, "steps"))}
        if method in STYLES and by_share:
            color, marker = STYLES[method]
            means = [100 * results.over_seeds(records) for records in by_share.values()]
            ours = method.startswith(("plan", "prune_once"))
            ax.plot(
                [100 * s for s in by_share],
                means,
                color=color,
                marker=marker,
                linestyle="-" if ours else "--",
                label=TITLES[method],
            )
            for share, records in by_share.items():
                each = [100 * r["test_accuracy"] for r in records]
                ax.scatter([100 * share] * len(each), each, color=color, marker=marker, s=8, alpha=0.5)
    ax.set_xscale("log")
    ax.set_xticks([100 * s for s in task.shares], [f"{s:.0%}" for s in task.shares])
    ax.minorticks_off()
    ax.set_title(task.title, fontsize=10)
    ax.set(xlabel="multiply-accumulates left", ylabel="test accuracy (%)")


def write(path: Path = CHART, found: Results | None = None) -> None:
    """Draw the chart and write it as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(results.read() if found is None else found)
    figure.savefig(path, dpi=90)
    with Image.open(path) as image:  # 64 colours are enough and need a quarter of the bytes
        small = image.convert("RGB").quantize(64)
    small.save(path, optimize=True)
    plt.close(figure)
