"""What the examples share: image data, the small networks of the papers, one training loop,
and results as JSON beside the scripts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr import datasets, records
from dampr.bench import timing
from dampr.prune import inputs
from dampr.prune.measure import count_macs, count_params

RESULTS = Path(__file__).parent / "results"
FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/dataset/fashion-mnist"))
BATCH, EXAMPLES = 128, 64
Penalty = Callable[[nn.Module], Tensor]


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """``--root``, ``--seed``, ``--no-write`` and one option for each default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--root",
        type=Path,
        help="folder of MNIST-like idx files, or digits; default: Debian's Fashion-MNIST, else digits",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="leave examples/results alone")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args()


def images(root: Path | None, count: int | None = None) -> tuple[str, datasets.Split]:
    """(name, images) from ``root``, from Debian's package, or the bundled digits enlarged to 24 x 24;
    the first ``count`` to train on.
    """
    folder = None if str(root) == "digits" else root or next((f for f in FOLDERS if f.is_dir()), None)
    if folder is None:
        name, data = "digits", datasets.digits()
        grow = lambda x: F.interpolate(x.view(-1, 1, 8, 8), scale_factor=3).flatten(1)  # noqa: E731
        data = data._replace(x=grow(data.x), x_test=grow(data.x_test))
    else:
        name, data = folder.resolve().name, datasets.mnist_like(folder)
    return name, data if count is None else data._replace(x=data.x[:count], y=data.y[:count])


def lenet300(pixels: int) -> nn.Sequential:
    """LeNet-300-100."""
    return nn.Sequential(nn.Linear(pixels, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def train(
    model: nn.Module,
    data: datasets.Split,
    *,
    epochs: int,
    penalty: Penalty | None = None,
    batch: int = BATCH,
    lr: float = 1e-3,
    gate_lr: float = 1e-2,
    settle: int = 0,
    plan: dampr.Plan | None = None,
) -> float:
    """Adam on cross-entropy + penalty with a cosine schedule; gates are deterministic and free in the last ``settle``
    epochs.

    Or, with a plan for the model, it prunes and needs neither.

    Returns seconds.
    """
    start, layers = time.perf_counter(), dampr.prune.gated_layers(model)
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=lr, gate_lr=gate_lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        model.train()
        settled, total = epoch >= epochs - settle, 0.0
        for layer in layers.values() if settled else ():
            layer.gate.eval()
        for index in torch.randperm(len(data.x)).split(batch):
            loss = F.cross_entropy(model(data.x[index]), data.y[index])
            total += float(loss.detach()) * len(index)
            if penalty is not None and not settled:
                loss = loss + penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if plan is not None:
                plan.step(optimizer)
        schedule.step()
        print(f"epoch {epoch + 1:2}/{epochs}  loss {total / len(data.x):.4f}  open {widths(model)}", flush=True)
    return time.perf_counter() - start


def to_budget(
    model: nn.Module, data: datasets.Split, *, macs: float, epochs: int, lr: float = 2e-3, **how: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Train with a :class:`dampr.Plan` down to a share of the MACs (or their number, of :data:`EXAMPLES` images);
    ``how``: as for it.

    Returns the compacted model, and seconds, sizes and accuracy.
    """
    dense = {"macs_dense": count_macs(model, data.x_test[:1]), "params_dense": count_params(model)}
    plan = dampr.Plan(model, data.x_test[:EXAMPLES], macs=macs, steps=epochs * -(-len(data.x) // BATCH), **how)
    seconds = train(model, data, epochs=epochs, lr=lr, plan=plan)
    small, report = plan.finish(), plan.report
    assert report is not None
    print(report, flush=True)
    found: dict[str, Any] = {
        "seconds": seconds,
        "accuracy": accuracy(small, data),
        "open": "-".join(f"{left}/{count}" for count, left in report.budget.widths.values()),
        "macs": count_macs(small, data.x_test[:1]),
        "params": count_params(small),
    }
    return small, {**found, **dense}


def widths(model: nn.Module) -> str:
    """Open gates of each gated layer: "12/20-30/50"."""
    layers = dampr.prune.gated_layers(model).values()
    return "-".join(f"{int(layer.gate.is_open().sum())}/{layer.gate.num_gates}" for layer in layers)


@torch.no_grad()
def accuracy(model: nn.Module, data: datasets.Split) -> float:
    """Share of test images that are classified rightly, in evaluation mode."""
    model.eval()
    right = [
        (model(x).argmax(1) == y).sum() for x, y in zip(data.x_test.split(1000), data.y_test.split(1000), strict=True)
    ]
    return float(sum(right)) / len(data.y_test)


def compacted(model: nn.Module, data: datasets.Split) -> dict[str, Any]:
    """Accuracy, open gates, parameters and MACs of the compacted model, and what was there before."""
    small, example = dampr.compact(model.eval(), example_inputs=data.x_test[:EXAMPLES]), data.x_test[:1]
    return {
        "accuracy": accuracy(small, data),
        "open": widths(model),
        "macs": count_macs(small, example),
        "macs_dense": count_macs(model, example),
        "params": count_params(small),
        "params_dense": count_params(model),
    }


def side_by_side(models: dict[str, nn.Module], example: Any, quality: dict[str, float]) -> list[dict[str, Any]]:
    """Of each model its size, its quality, and the milliseconds of an evaluation pass over the example inputs,
    timed in turns.
    """

    def call(model: nn.Module) -> Callable[[], object]:
        return torch.inference_mode()(lambda: inputs.call(model, example))

    times = timing.interleaved(
        {name: call(model.eval()) for name, model in models.items()}, rounds=20, min_seconds=0.02
    )
    return [
        {
            "model": name,
            "quality": quality[name],
            "params": count_params(model),
            "macs": count_macs(model, example),
            "ms": times[name].median * 1e3,
        }
        for name, model in models.items()
    ]


def finish(script: str, result: dict[str, Any], write: bool) -> None:
    """Print the result and, if asked to, write it to examples/results."""
    print(json.dumps(result, indent=1))
    if write:
        records.write_json(RESULTS / f"{Path(script).stem}.json", {"environment": records.environment(), **result})
