"""Reproduces published points on full MNIST: ``python -m benchmarks.quality.anchors``. Each run is one JSON line; runs
that are done are skipped.

Every run is one plan with the defaults, Adam at 2e-3 with half a cosine, batches of 64, and images shifted by up to two
pixels. Only the published result is taken over as a target: the share of the parameters that is left and the error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr import records
from dampr.prune.measure import count_macs, count_params

from . import data, networks
from .results import RESULTS
from .training import accuracy

PATH = RESULTS / "anchors.jsonl"
LR, BATCH = 2e-3, 64


class Anchor(NamedTuple):
    """A published point, "at most ``error`` with at most ``params`` of the parameters", its source, and how it is run
    here.
    """

    name: str
    error: float
    params: float
    source: str
    epochs: int
    how: dict[str, Any]


LENET5 = "LeNet-5, 2.35 % of the parameters, structured (Gallego-Posada et al. 2022)"
MLP = "300-100 MLP, 26.6 % of the parameters (Gallego-Posada et al. 2022)"
ANCHORS = (
    Anchor("lenet5", 0.009, 0.023, LENET5, 12, {}),
    Anchor("lenet5-hard_concrete", 0.009, 0.023, LENET5, 12, {"gate": "hard_concrete", "score": "learned"}),
    Anchor("mlp", 0.018, 0.26, MLP, 12, {}),
    Anchor("mlp-hard_concrete", 0.018, 0.26, MLP, 12, {"gate": "hard_concrete", "score": "learned"}),
    Anchor(
        "lenet5-diffprune",
        0.006,
        0.25,
        "LeNet-5, size not published (Shulman 2020)",
        12,
        {"gate": "diffprune", "score": "learned"},
    ),
)


def mlp() -> nn.Module:
    """LeNet-300-100."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def shifted(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image shifted by up to two pixels over a border of zeros. Images are not mirrored, as digits have no mirror
    images.
    """
    n, _, height, width = x.shape
    rows = torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(width)
    padded = F.pad(x[:, 0], (2, 2, 2, 2), value=float(x.min()))
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def execute(anchor: Anchor, seed: int, images: data.Data) -> dict[str, Any]:
    """Train, prune and test. All choices are defaults, so that test images decide nothing."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = networks.lenet5((20, 50, 500)) if anchor.name.startswith("lenet5") else mlp()
    dense, steps = count_params(model), anchor.epochs * (len(images.x) // BATCH)
    plan = dampr.Plan(model, images.x[:8], params=anchor.params, steps=steps, **anchor.how)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    batches = data.batches(images, BATCH, seed, shifted)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + math.cos(math.pi * step / steps)) / 2
        x, y = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(plan.model(x), y).backward()
        optimizer.step()
        plan.step(optimizer)
    small = plan.finish()
    where = records.environment()
    return {
        "anchor": anchor.name,
        "seed": seed,
        "epochs": anchor.epochs,
        "error": 1 - accuracy(small, images.x_test, images.y_test),
        "validation_error": 1 - accuracy(small, images.x_validation, images.y_validation),
        "params": count_params(small),
        "params_share": count_params(small) / dense,
        "macs": count_macs(small, images.x[:1]),
        "widths": [left for _, left in plan.report.budget.widths.values()] if plan.report else [],
        "wanted_error": anchor.error,
        "wanted_params": anchor.params,
        "source": anchor.source,
        **{name: where[name] for name in ("torch", "cpu", "commit", "date", "dampr")},
    }


def done() -> dict[tuple[str, int], dict[str, Any]]:
    """The records by anchor and seed."""
    lines = PATH.read_text().splitlines() if PATH.exists() else []
    return {(record["anchor"], record["seed"]): record for record in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.anchors", description=__doc__)
    parser.add_argument("--root", type=Path, default=data.DEFAULT_ROOT, help="folder of the data")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--anchor", choices=[anchor.name for anchor in ANCHORS], action="append")
    args = parser.parse_args()
    images = data.load("mnist", args.root)
    for seed in args.seeds:
        for anchor in ANCHORS:
            if (anchor.name, seed) in done() or (args.anchor and anchor.name not in args.anchor):
                continue
            record = execute(anchor, seed, images)
            PATH.parent.mkdir(parents=True, exist_ok=True)
            with PATH.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            print(
                f"{anchor.name}, seed {seed}: error {record['error']:.2%} with {record['params_share']:.2%} of the "
                "parameters",
                flush=True,
            )


if __name__ == "__main__":
    main()
