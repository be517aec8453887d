"""``python -m benchmarks.plan_run``: records runs of a :class:`dampr.Plan`, for the chart and the tables of
docs/choosing.md.

Without options, one run of LeNet-5 on 10,000 images of MNIST, or, if ``--root`` does not have MNIST's idx files, of
LeNet-300-100 on the bundled digits. With ``--families``, short runs of LeNet-300-100 on the digits, pruned by
importance and by learned gates of each family.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr import datasets, records
from dampr.cli import demo

RESULTS = Path(__file__).parent / "results" / "cpu"
MNIST = Path("/tmp/dampr-data/mnist/package/data")
MACS, EPOCHS, BATCH, LR, EVERY = 0.1, 6, 128, 2e-3, 10
SMALL = 0.03  # the share at which families are compared
TRAINED_ON, VALIDATED_ON = 10_000, 2_000  # numbers of training images for both, so that no test image is seen
FAMILIES: dict[str, Any] = {
    "hard_concrete": "hard_concrete",
    "dep_l0": "dep_l0",
    "dam": partial(dampr.gates.DiscriminativeMask, min_open=1),
    "diffprune": partial(dampr.gates.DiffPrune, stochastic=True, init_sigma=0.3),
    "diffmask": "diffmask",
}


def task(root: Path) -> tuple[str, nn.Module, datasets.Split]:
    """(name, network, images). What is called test data here is held out of the training images."""
    small = not root.is_dir()
    data = datasets.digits() if small else datasets.mnist_like(root)
    count = min(TRAINED_ON, len(data.x) * 3 // 4)
    held = slice(count, count + VALIDATED_ON)
    split = datasets.Split(data.x[:count], data.y[:count], data.x[held], data.y[held])
    pixels = data.x.shape[1]
    return ("LeNet-300-100, digits", demo.mlp(pixels), split) if small else ("LeNet-5, MNIST", demo.cnn(pixels), split)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of x that the model, in evaluation mode, classifies as y."""
    training = model.training
    found = (model.eval()(x).argmax(1) == y).float().mean()
    model.train(training)
    return float(found)


def run(root: Path = MNIST, *, epochs: int = EPOCHS, seed: int = 0) -> dict[str, Any]:
    """Train with a plan. The result has a row every ``EVERY`` steps and at the steps before and after compaction."""
    torch.manual_seed(seed)
    name, model, data = task(root)
    steps = epochs * -(-len(data.x) // BATCH)
    plan = dampr.Plan(model, data.x[:64], macs=MACS, steps=steps)
    optimizer, started, rows = torch.optim.Adam(model.parameters(), lr=LR), time.perf_counter(), []
    for _ in range(epochs):
        for index in torch.randperm(len(data.x)).split(BATCH):
            loss = F.cross_entropy(model(data.x[index]), data.y[index]) + plan.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            compacted = plan.step(optimizer)
            if compacted or plan.steps_taken % EVERY == 0 or plan.steps_taken == steps:
                numbers = {"loss": float(loss.detach()), "accuracy": accuracy(model, data.x_test, data.y_test)}
                rows.append({"step": plan.steps_taken, "phase": plan.phase, **plan.readings(), **numbers})
    plan.finish()
    assert plan.report is not None
    found = {
        "task": name,
        "seed": seed,
        "macs": MACS,
        "batch": BATCH,
        "lr": LR,
        "images": len(data.x),
        "validated_on": len(data.x_test),
    }
    return {**found, "seconds": time.perf_counter() - started, "report": plan.report.as_dict(), "rows": rows}


def compare(*, epochs: int = 20, seeds: int = 5) -> list[dict[str, Any]]:
    """Train on the digits down to :data:`SMALL` of the MACs, once for each seed: not pruned, pruned by importance, and
    by learned gates of each family. Each result has the test accuracy.
    """
    data, runs = datasets.digits(), []
    steps = epochs * -(-len(data.x) // 64)
    ways: dict[str, dict[str, Any] | None] = {"dense": None, "importance": {}}
    ways |= {family: {"gate": gate, "score": "learned"} for family, gate in FAMILIES.items()}
    for way, how in ways.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = demo.mlp(64)
            plan = None if how is None else dampr.Plan(model, data.x[:64], macs=SMALL, steps=steps, **how)
            optimizer = torch.optim.Adam(model.parameters(), lr=LR)
            for _ in range(epochs):
                for index in torch.randperm(len(data.x)).split(64):
                    loss = F.cross_entropy(model(data.x[index]), data.y[index])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    if plan is not None:
                        plan.step(optimizer)
            if plan is not None:
                plan.finish()
            report = None if plan is None else plan.report
            widths = [300, 100] if report is None else [left for _, left in report.budget.widths.values()]
            left = 1.0 if report is None else report.budget.reached / report.budget.total
            changed = None if report is None else report.budget.changed
            found = {
                "accuracy": accuracy(model, data.x_test, data.y_test),
                "left": left,
                "widths": widths,
                "changed": changed,
            }
            runs.append({"way": way, "seed": seed, **found})
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=MNIST)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--families", action="store_true")
    arguments = parser.parse_args()
    environment = {"environment": records.environment()}
    if arguments.families:
        records.write_json(
            arguments.out / "plan-families.json", {**environment, "macs": SMALL, "epochs": 20, "runs": compare()}
        )
    else:
        records.write_json(arguments.out / "plan-run.json", {**environment, **run(arguments.root)})


if __name__ == "__main__":
    main()
