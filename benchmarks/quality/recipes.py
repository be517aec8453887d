"""Tries settings of the plan on validation images alone: ``python -m benchmarks.quality.recipes vgg 0.1 --steps 1000``.

Each run is one JSON line in ``benchmarks/results/quality/recipes.jsonl``. The defaults of :class:`dampr.Plan` were
chosen by these runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from dampr import records

from . import data
from .methods import METHODS, Planned, Setup
from .results import RESULTS
from .tasks import TASKS
from .training import accuracy, train

PATH = RESULTS / "recipes.jsonl"
HALF = "half of an even network's share"
VARIANTS: dict[str, dict[str, Any] | None] = {
    "narrow from scratch": None,
    "the defaults": {},
    "warmup 0.2, ramp 0.3": {"warmup": 0.2, "ramp": 0.3},
    "warmup 0.1, ramp 0.3": {"warmup": 0.1, "ramp": 0.3},
    "warmup 0.1, ramp 0.4": {"warmup": 0.1, "ramp": 0.4},
    "warmup 0.15, ramp 0.1": {"warmup": 0.15, "ramp": 0.1},
    "warmup 0.05, ramp 0.1": {"warmup": 0.05, "ramp": 0.1},
    "no floor": {"min_share": 0.0},
    "distilled, weight 1": {"distill": 1.0},
    "hard concrete, learned, noise in the ramp": {"gate": "hard_concrete", "score": "learned"},
    "differentiable mask, learned, no noise": {"gate": "diffmask", "score": "learned"},
    "Dep-L0, learned": {"gate": "dep_l0", "score": "learned"},
    "learning rate starts again at half": {"restart": 0.5},
    "the residual stream too": {"convert": {"residual": True}},
    "the residual stream too, warmup 0.1, ramp 0.3": {"convert": {"residual": True}, "warmup": 0.1, "ramp": 0.3},
}


def execute(task_name: str, share: float, steps: int, seed: int, variant: str, root: Path) -> dict[str, Any]:
    """The record of a run of a variant, with its validation accuracy; test images are not used."""
    task = TASKS[task_name]
    images = data.load(task.data, root)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    batches = data.batches(images, task.batch, seed, task.augment)
    setup, options = Setup(task, share, steps, batches, "default"), VARIANTS[variant]
    model, seconds = train(
        METHODS["narrow"](setup) if options is None else Planned(setup, **options), task, batches, steps
    )
    where = records.environment()
    return {
        "task": task_name,
        "share": share,
        "steps": steps,
        "seed": seed,
        "variant": variant,
        "validation_accuracy": accuracy(model, images.x_validation, images.y_validation),
        "cpu_seconds": round(seconds, 1),
        **{name: where[name] for name in ("torch", "cpu", "commit", "date")},
    }


def read() -> list[dict[str, Any]]:
    """All records."""
    return [json.loads(line) for line in PATH.read_text().splitlines()] if PATH.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.recipes", description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("share", type=float)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--variant", choices=VARIANTS, action="append")
    parser.add_argument("--root", type=Path, default=data.DEFAULT_ROOT, help="folder of the data")
    args = parser.parse_args()
    for seed in args.seeds:
        for variant in args.variant or VARIANTS:
            done = {tuple(record[name] for name in ("task", "share", "steps", "seed", "variant")) for record in read()}
            if (args.task, args.share, args.steps, seed, variant) in done:
                continue
            record = execute(args.task, args.share, args.steps, seed, variant, args.root)
            PATH.parent.mkdir(parents=True, exist_ok=True)
            with PATH.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(
                f"{variant}, seed {seed}: {record['validation_accuracy']:.2%} in {record['cpu_seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
