"""``python -m benchmarks.plots``: draws the charts of docs from results files. Needs matplotlib (``pip install
.[plot]``).

From the files of benchmarks/results/DEVICE it draws docs/plots/DEVICE-CHART.png for every chart of :data:`CHARTS` whose
files are there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dampr import functional, gates, records, spec
from dampr.bench import linear
from dampr.bench.linear import Point, size_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PLOTS = ROOT / "benchmarks" / "results", ROOT / "docs" / "plots"

# Okabe and Ito's colours, which colour-blind readers can tell apart too; markers tell them apart in print.
STYLES = {
    "dense": ("#000000", "|"),
    "copy": ("#000000", "|"),
    "dampr": ("#0072B2", "o"),
    "eager unfused": ("#D55E00", "s"),
    "compiled unfused": ("#E69F00", "^"),
    "captum": ("#CC79A7", "D"),
    linear.COMPILED: ("#56B4E9", "X"),
    linear.TORCH_PRODUCTS: ("#56B4E9", "X"),
    "small": ("#56B4E9", "X"),
    "fold": ("#0072B2", "o"),
    "activations": ("#E69F00", "^"),
    "live": ("#009E73", "v"),
    "small_m": ("#D55E00", "s"),
    "passes": ("#CC79A7", "D"),
    "one_pass": ("#000000", "P"),
    "linear": ("#999999", "*"),
}
CLOSED = re.compile(r"(.*), (\d+)%( of blocks)? closed")
Environment = dict[str, Any]


def load(*paths: Path) -> tuple[Environment, list[Point]]:
    """(environment of the first file, points of all files without those that failed).

    Raises ValueError for a file whose ops failed verification.
    """
    environments, points = [], []
    for path in paths:
        head, *found = map(json.loads, path.read_text().splitlines())
        if not head["verified"]:
            raise ValueError(f"{path}: verified=false: expected results of ops that passed verification")
        environments.append(head["environment"])
        points += [Point(**{**p, "shape": tuple(p["shape"])}) for p in found if not p["error"]]
    return environments[0], points


def draw_crossover(crossover: Path) -> Figure:
    """The time of every route relative to dense, in a panel for each kind of gates, against rows of x or against the
    share of closed blocks.
    """
    environment, points = load(crossover)
    dense = {(p.case, p.shape): p.median for p in points if p.provider == "dense"}
    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for p in points:
        if p.route:
            closed = CLOSED.fullmatch(p.case)
            title, x = (f"{closed[1]}, {p.shape[0]} rows", int(closed[2])) if closed else (p.case, p.shape[0])
            panel = panels.setdefault((title, "blocks of features closed (%)" if closed else "rows of x"), {})
            panel.setdefault(p.route, []).append((x, p.median / dense[p.case, p.shape]))
    columns = 3 if len(panels) <= 6 else 4
    lines = -(len(panels) // -columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.5 * columns, 2.9 * lines), sharey=True, layout="constrained", squeeze=False
    )
    for ax, ((title, xlabel), routes) in zip(axes.flat, panels.items(), strict=False):
        _draw_routes(ax, routes, rows=xlabel == "rows of x")
        ax.set(title=title, xlabel=xlabel)
    axes[0, 0].set_ylim(0, None)  # the panels share the axis, whose upper end is known once all are drawn
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("time / time of dense")
    _, k, n = points[0].shape
    figure.suptitle(
        f"Routes, forward + backward, weight {n} x {k}. {records.device_of(environment)}, {points[0].dtype}"
    )
    return figure


def _draw_routes(ax: Axes, routes: dict[str, list[tuple[int, float]]], rows: bool) -> None:
    """Draw a line for each route, and one for dense."""
    ax.axhline(1, color="0.5", linewidth=1, linestyle="--", label="dense")
    for name, values in routes.items():
        color, marker = STYLES[name]
        ax.plot(*zip(*values, strict=True), color=color, marker=marker, markersize=4, label=name)
    if rows:
        ticks = sorted({x for values in routes.values() for x, _ in values})[::2]
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(x) for x in ticks])
        ax.minorticks_off()
    ax.legend(frameon=False)


def draw_closing(closing: Path) -> Figure:
    """The time of every provider relative to dense against the share of closed gates, in a panel for each layer and
    kind of gates.
    """
    environment, points = load(closing)
    dense = {(p.case, p.shape): p.median for p in points if p.provider == "dense"}
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for p in points:
        found = CLOSED.fullmatch(p.case)
        if found and p.provider != "dense":
            lines = panels.setdefault(f"{found[1]}\n{p.shape}", {})
            lines.setdefault(p.provider, []).append((int(found[2]), p.median / dense[p.case, p.shape]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.5 * len(panels), 3.2), sharey=True, layout="constrained", squeeze=False
    )
    for ax, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        _draw_routes(ax, lines, rows=False)
        ax.set(title=title, xlabel="gates closed (%)")
        ax.title.set_fontsize(8)
    axes[0, 0].set_ylim(0, None)
    axes[0, 0].set_ylabel("time / time of dense")
    figure.suptitle(
        f"A training step as gates close, forward + backward. {records.device_of(environment)}, {points[0].dtype}"
    )
    return figure


def draw_roofline(roofline: Path, *stages: Path) -> Figure:
    """A row for each case: the share that each provider attains of the ceilings measured on the same machine."""
    ceilings = json.loads(roofline.read_text())["ceilings"]
    environment, points = load(*stages)
    rows = list(dict.fromkeys((p.shape, p.case) for p in points))
    figure, ax = plt.subplots(figsize=(9, 1.6 + 0.3 * len(rows)), layout="constrained")
    floors = ("dense", "copy")
    others = [name for name in dict.fromkeys(p.provider for p in points) if name not in floors]
    for names, label in ((floors, "dense, or a copy"), *(((name,), name) for name in others)):
        mine = [p for p in points if p.provider in names]
        color, marker = STYLES[names[0]]
        aside = 0 if names == floors else 0.12 * others.index(label) - 0.18  # markers of equal shares stay visible
        xs, ys = [100 * attained(p, ceilings) for p in mine], [rows.index((p.shape, p.case)) + aside for p in mine]
        ax.scatter(xs, ys, color=color, marker=marker, s=140 if names == floors else 20, label=label, zorder=3)
    ax.set_yticks(range(len(rows)), [f"{case}  {shape}" for shape, case in rows])
    ax.set(xlim=(0, None), xlabel="share of the measured GEMM rate (draw and multiply: of the copy bandwidth) (%)")
    ax.set_title(
        f"Share of the roofline, by case and (M, K, N). {records.device_of(environment)}, {points[0].dtype}", loc="left"
    )
    _finish_rows(ax)
    figure.legend(loc="outside lower center", ncols=1 + len(others), frameon=False)
    return figure


def attained(point: Point, ceilings: dict[str, float]) -> float:
    """The share of its ceiling that a point attains, counting only the work that is necessary, not what a provider does
    besides.

    A linear layer computes y, dx and dW, with 2 M K N operations each; gates are not counted. Drawing and multiplying
    reads a float32 weight and its log_alpha for each element, a copy only the weight; both write the dtype of the
    product.
    """
    m, k, n = point.shape
    dtype = point.dtype.split()[0]
    if m:
        return 6 * m * k * n / point.median / ceilings[f"gemm_flops_per_second_{dtype}"]
    width = (4 if point.provider == "copy" else 8) + (2 if dtype == "bfloat16" else 4)
    return width * k * n / point.median / ceilings["copy_bytes_per_second"]


def draw_memory(*stages: Path) -> Figure:
    """The bytes that each provider keeps from the forward to the backward, for the largest shape."""
    environment, points = load(*stages)
    # dampr on torch's products keeps the same as dampr: one of them is enough.
    points = [p for p in points if p.kept_bytes is not None and p.provider != linear.TORCH_PRODUCTS]
    largest = max((p.shape for p in points), key=lambda shape: (shape[0] * shape[1] * shape[2], shape))
    points = [p for p in points if p.shape == largest]
    figure, ax = plt.subplots(figsize=(9, 1.6 + 0.19 * len(points)), layout="constrained")
    y, ticks = 0.0, {}
    for case in dict.fromkeys(p.case for p in points):
        mine = [p for p in points if p.case == case]
        ticks[case] = y + (len(mine) - 1) / 2
        for p in mine:
            megabytes = (p.kept_bytes or 0) / 1e6
            ax.barh(y, megabytes, color=STYLES[p.provider][0], height=0.85)
            note = f"{p.provider}: {size_text(p.kept_bytes)}"
            ax.annotate(note, (megabytes, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
            y += 1
        y += 0.8
    ax.set_yticks(list(ticks.values()), list(ticks))
    ax.margins(x=0.25)  # room for the names
    ax.set(xlim=(0, None), xlabel="kept for the backward beyond parameters and input (MB)")
    ax.set_title(
        f"Memory kept by one layer, (M, K, N) = {largest}. {records.device_of(environment)}, {points[0].dtype}",
        loc="left",
    )
    _finish_rows(ax)
    return figure


def _finish_rows(ax: Axes) -> None:
    """Put the first row on top, with faint vertical lines behind the data."""
    ax.invert_yaxis()
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)


class Chart(NamedTuple):
    """A function that draws a chart, and the names of the results files that the function takes."""

    draw: Callable[..., Figure]
    files: tuple[str, ...]


CHARTS = {
    "closing": Chart(draw_closing, ("closing.jsonl",)),
    "crossover": Chart(draw_crossover, ("linear-crossover.jsonl",)),
    "roofline": Chart(
        draw_roofline, ("roofline.json", "linear-pass.jsonl", "linear-vectors.jsonl", "linear-weights.jsonl")
    ),
    "memory": Chart(draw_memory, ("linear-vectors.jsonl", "linear-weights.jsonl")),
}


FAMILIES = {
    "hard_concrete": ("#0072B2", "o"),
    "dep_l0": ("#56B4E9", "X"),
    "dam": ("#009E73", "v"),
    "diffprune": ("#D55E00", "s"),
    "diffmask": ("#CC79A7", "D"),
    "dense": ("#000000", "|"),
}


def draw_gates() -> Figure:
    """The evaluation gate against the parameter for each family, with the quartiles of 4,000 draws for families that
    draw.
    """
    figure, axes = plt.subplots(1, 5, figsize=(14, 2.9), layout="constrained")
    concrete = gates.HardConcrete(241)
    panels = [
        ("hard_concrete", concrete, "log_alpha", torch.linspace(-6, 6, 241)),
        (
            "dep_l0",
            gates.HardConcrete(241),
            "log_alpha, from the generator",
            4.605 * torch.tanh(torch.linspace(-6, 6, 241)),
        ),
        ("dam", None, "beta + 5 j / n", torch.linspace(-2, 4, 241)),
        ("diffprune", gates.DiffPrune(241, stochastic=True), "phi", torch.linspace(-0.4, 1, 241)),
        ("diffmask", gates.DifferentiableMask(241), "alpha", torch.linspace(-0.6, 0.6, 241)),
    ]
    for ax, (name, gate, xlabel, x) in zip(axes, panels, strict=True):
        with torch.no_grad():
            if gate is None:
                z, drawn = functional.sample_gates(x, spec=spec.ramp("tanh")), None
            else:
                next(gate.parameters()).copy_(x)
                z = gate.eval()()
                drawn = gate.train()(4000) if name in ("hard_concrete", "dep_l0", "diffprune") else None
        if drawn is not None:
            low, high = torch.quantile(drawn, torch.tensor([0.25, 0.75]), dim=0)
            ax.fill_between(x, low, high, color=FAMILIES[name][0], alpha=0.2, label="half of the draws")
        ax.plot(x, z, color=FAMILIES[name][0], label="evaluation")
        ax.set(title=name, xlabel=xlabel)
        ax.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("gate")
    return figure


def draw_families(results: Path) -> Figure:
    """Test accuracy against the MACs left, for every run of every family; the dense network beside them on an axis of
    its own.
    """
    found = json.loads(results.read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 4), sharey=True, width_ratios=(5, 1), layout="constrained")
    for name, (colour, marker) in FAMILIES.items():
        runs = [r for r in found["runs"] if r["family"] == name]
        style = {"c": colour} if name == "dense" else {"edgecolors": colour, "facecolors": "none", "linewidths": 1.3}
        ax = right if name == "dense" else left
        ax.scatter(
            [r["macs"] / 1e3 for r in runs],
            [100 * r["accuracy"] for r in runs],
            s=45,
            marker=marker,
            label=name,
            **style,
        )
    left.set(xlabel="multiply-accumulates of the compacted model (thousands)", ylabel="test accuracy (%)")
    (dense,) = {r["macs"] / 1e3 for r in found["runs"] if r["family"] == "dense"}
    right.set(xticks=[dense], xlim=(dense - 1, dense + 1))
    figure.suptitle(
        f"LeNet-5-Caffe, {found['data']}, {found['epochs']} epochs, target {found['target']:.0%} of the MACs",
        fontsize=10,
    )
    figure.legend(
        *(a + b for a, b in zip(left.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True)),
        loc="outside right center",
        frameon=False,
    )
    return figure


PHASES = {"dense": "0.97", "ramp": "#FDE9C9", "fine-tuning": "#DCEEF8"}


def draw_plan(results: Path) -> Figure:
    """One run of a plan over its steps: the share of the MACs left and its goal, and below these the validation
    accuracy.
    """
    found = json.loads(results.read_text())
    report, rows = found["report"], found["rows"]
    steps = [row["step"] for row in rows]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.5, 4.6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    ends = (0, report["dense"], report["compacted"], report["steps"])
    for name, start, end in zip(PHASES, ends, ends[1:], strict=False):
        for ax in (above, below):
            ax.axvspan(start, end, color=PHASES[name], linewidth=0)
        above.text((start + end) / 2, 108, name, ha="center")
    above.plot(steps, [100 * row["macs_goal"] for row in rows], color="0.3", linestyle="--", label="goal", zorder=3)
    above.plot(steps, [100 * row["macs_left"] for row in rows], color="#56B4E9", linewidth=3, label="left")
    below.plot(steps, [100 * row["accuracy"] for row in rows], color="#D55E00", marker=".", markersize=4)
    lowest = min(row["accuracy"] for row in rows if row["step"] > report["dense"])
    below.set(
        xlabel="step", ylabel="validation accuracy (%)", ylim=(100 * lowest - 1, 100.2), xlim=(0, report["steps"])
    )
    above.set(ylabel="multiply-accumulates (%)", ylim=(0, 118))
    above.legend(frameon=False, loc="center right")
    figure.suptitle(
        f"A plan to {found['macs']:.0%} of the MACs: {found['task']}, {found['images']:,} images, seed {found['seed']}",
        fontsize=10,
    )
    return figure


def sources(chart: Path, results: Path = RESULTS) -> list[Path]:
    """The results files that the chart DEVICE-CHART.png shows."""
    device, _, name = chart.stem.rpartition("-")
    return [results / device / file for file in CHARTS[name].files]


def write_all(results: Path, target: Path) -> list[Path]:
    """Draw every chart whose results files are there, and return the paths written."""
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for path in (target / f"{folder.name}-{name}.png" for folder in sorted(results.iterdir()) for name in CHARTS):
        files = sources(path, results)
        if all(file.exists() for file in files):
            with plt.rc_context(
                {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
            ):
                figure = CHARTS[path.stem.rpartition("-")[2]].draw(*files)
                figure.savefig(path, dpi=110, metadata={"Software": None})
            plt.close(figure)
            written.append(path)
    return written


def write_methods(target: Path) -> list[Path]:
    """Draw the charts of docs/methods.md and docs/choosing.md: gate values always, the others if their results are
    there.
    """
    drawn = {"families.png": (draw_families, ROOT / "examples" / "results" / "compare_families.json")}
    drawn |= {"plan-run.png": (draw_plan, RESULTS / "cpu" / "plan-run.json")}
    charts: dict[str, Callable[[], Figure]] = {"gates.png": draw_gates}
    charts |= {name: partial(draw, path) for name, (draw, path) in drawn.items() if path.exists()}
    torch.manual_seed(0)
    for name, draw in charts.items():
        with plt.rc_context(
            {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
        ):
            figure = draw()
            figure.savefig(target / name, dpi=110, metadata={"Software": None})
        plt.close(figure)
    return [target / name for name in charts]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PLOTS)
    arguments = parser.parse_args(argv)
    for path in (*write_all(arguments.results, arguments.out), *write_methods(arguments.out)):
        print(path)


if __name__ == "__main__":
    main()
