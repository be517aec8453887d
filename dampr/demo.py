"""The main job on real data: train a dense network and a gated one, compact the gated one, and report all three side by side.

Two networks of the papers: LeNet-300-100 (``mlp``) and LeNet-5-Caffe, 20-50-500 (``cnn``).
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr import _progress, datasets
from dampr.bench import timing
from dampr.prune.measure import count_macs, count_params


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on a data set: ``macs``, the share of the multiply-accumulates that may be left, is a :class:`dampr.Budget`.

    In the last ``settle`` epochs the gates are decided: weights settle on the units that are left (the fine-tuning of Dep-L0).
    """

    epochs: int
    batch: int
    lr: float
    gate_lr: float
    macs: float
    settle: int


RECIPES = {
    ("mlp", "digits"): Recipe(epochs=100, batch=64, lr=2e-3, gate_lr=5e-2, macs=0.12, settle=40),
    ("mlp", "fashion-mnist"): Recipe(epochs=12, batch=128, lr=1e-3, gate_lr=5e-2, macs=0.2, settle=4),
    ("cnn", "mnist"): Recipe(epochs=6, batch=128, lr=2e-3, gate_lr=5e-2, macs=0.15, settle=3),
    ("cnn", "fashion-mnist"): Recipe(epochs=12, batch=128, lr=2e-3, gate_lr=5e-2, macs=0.25, settle=6),
}


@dataclass
class ModelReport:
    """One row of the demo's table."""

    name: str
    accuracy: float
    widths: str
    params: int
    macs: int
    latency_ms: float
    file_bytes: int


@dataclass
class Report:
    """What the demo measured; ``history`` holds, per epoch, training loss and open gates of the gated run."""

    data: str
    seed: int
    recipe: Recipe
    models: list[ModelReport]
    max_abs_difference: float
    history: list[dict[str, Any]] = field(default_factory=list)
    gates: dict[str, list[float]] = field(default_factory=dict)
    model: str = "mlp"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report that :meth:`as_dict` was taken of; further keys are ignored."""
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        return cls(**{**known, "recipe": Recipe(**known["recipe"]), "models": [ModelReport(**m) for m in known["models"]]})


def mlp(pixels: int, classes: int = 10) -> nn.Sequential:
    """LeNet-300-100."""
    return nn.Sequential(nn.Linear(pixels, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, classes))


def cnn(pixels: int, classes: int = 10) -> nn.Sequential:
    """LeNet-5-Caffe: 20 and 50 filters of 5 x 5, 500 neurons; takes flattened square images of one channel."""
    side = round(pixels**0.5)
    left = ((side - 4) // 2 - 4) // 2
    features = [nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(50 * left * left, 500), nn.ReLU(), nn.Linear(500, classes))


HISTORY, COMPACTED = "history.jsonl", "compacted.safetensors"
MODELS = {"mlp": mlp, "cnn": cnn}
TITLES = {"mlp": "a 300-100 MLP", "cnn": "LeNet-5-Caffe"}


def run(
    data: str = "digits",
    root: str | None = None,
    *,
    model: str = "mlp",
    epochs: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> Report:
    """Train, prune, compact, measure.

    Args:
        data: ``"digits"``, ``"fashion-mnist"`` (any MNIST-like idx files) or, for the ``"cnn"``, ``"mnist"``.
        root: the folder of the idx files.
        model: ``"mlp"`` (LeNet-300-100, output gates) or ``"cnn"`` (LeNet-5-Caffe, filter and neuron gates; not for the 8 x 8 digits).
        epochs: None for the recipe's.
        seed: of initialisation, batches and gates.
        folder: where the gated run writes :data:`HISTORY` and what it is compacted to goes to :data:`COMPACTED`; None: nowhere.

    Raises: ValueError for an unknown data set or a missing root, FileNotFoundError or ValueError for files that are not there or not whole.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r}: expected one of {sorted(MODELS)}")
    if (model, data) not in RECIPES:
        raise ValueError(f"data={data!r}: expected one of {sorted(name for kind, name in RECIPES if kind == model)} with model={model!r}")
    if data != "digits" and root is None:
        raise ValueError(f"root=None: expected the folder with the idx files of {data}")
    split = datasets.digits() if root is None else datasets.mnist_like(root)
    recipe = RECIPES[model, data]
    if epochs is not None:
        if epochs < 1:
            raise ValueError(f"epochs={epochs}: expected at least 1")
        recipe = Recipe(**{**asdict(recipe), "epochs": epochs})
    example = split.x_test[:256]

    torch.manual_seed(seed)
    dense, gated = (MODELS[model](split.x.shape[1]) for _ in range(2))
    gated.load_state_dict(dense.state_dict())
    dampr.convert(gated, gate="hard_concrete", granularity="output", example_inputs=example)

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HISTORY).unlink(missing_ok=True)
    _train(dense, split, recipe, "dense")
    history = _train(gated, split, recipe, "gated", None if folder is None else folder / HISTORY)
    compacted = dampr.compact(gated.eval(), example_inputs=example)
    if folder is not None:
        dampr.save(compacted, folder / COMPACTED)

    models = {"dense": dense.eval(), "gated": gated.eval(), "compacted": compacted.eval()}
    with torch.no_grad():
        difference = max(float((gated(x) - compacted(x)).abs().max()) for x in split.x_test.split(1000))
        calls = {name: (lambda model=model: model(example)) for name, model in models.items()}
        times = timing.interleaved(calls, rounds=30, min_seconds=0.005)
        rows = [
            ModelReport(
                name,
                _accuracy(model, split),
                _widths(model),
                count_params(model),
                count_macs(model, example[:1]),
                times[name].median * 1e3,
                _file_bytes(model),
            )
            for name, model in models.items()
        ]
    gates = {name: layer.gate.deterministic().tolist() for name, layer in dampr.prune.gated_layers(gated).items()}
    return Report(data, seed, recipe, rows, difference, history, gates, model)


def _train(model: nn.Module, split: datasets.Split, recipe: Recipe, label: str, written: Path | None = None) -> list[dict[str, Any]]:
    layers = dampr.prune.gated_layers(model)
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=recipe.lr, gate_lr=recipe.gate_lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    pruning = max(1, recipe.epochs - recipe.settle)
    steps = pruning * -(-len(split.x) // recipe.batch)
    budget = dampr.Budget(model, split.x[:1], macs=recipe.macs, schedule=max(1, steps * 3 // 4)) if layers else None
    history = None if written is None else dampr.History(written, budget)
    epochs = []
    with _progress.bar(label, recipe.epochs, delay=0) as advance:
        for epoch in range(recipe.epochs):
            model.train()
            total = 0.0
            for index in torch.randperm(len(split.x)).split(recipe.batch):
                loss = F.cross_entropy(model(split.x[index]), split.y[index])
                total += float(loss.detach()) * len(index)
                if budget is not None and epoch < pruning:
                    loss = loss + budget.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if budget is not None and epoch < pruning:
                    budget.step()
            schedule.step()
            if budget is not None and epoch + 1 == pruning:
                budget.finalize()
            if history is not None:
                with torch.no_grad():
                    accuracy = _accuracy(model.eval(), split)
                history.record(step=(epoch + 1) * steps // pruning, loss=total / len(split.x), accuracy=accuracy)
            open_gates = {name: int(layer.gate.is_open().sum()) for name, layer in layers.items()}
            advance(f"loss {total / len(split.x):.4f}" + (f", open {'-'.join(map(str, open_gates.values()))}" if layers else ""))
            epochs.append({"epoch": epoch + 1, "loss": total / len(split.x), "open": open_gates})
    return epochs


def _accuracy(model: nn.Module, split: datasets.Split) -> float:
    right = [(model(x).argmax(1) == y).sum() for x, y in zip(split.x_test.split(1000), split.y_test.split(1000), strict=True)]
    return float(sum(right)) / len(split.y_test)


def _widths(model: nn.Module) -> str:
    """Open gates of a gated model, widths of a plain one: "300-100-10"."""
    found = []
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            width = str(layer.weight.shape[0])
            found.append(f"{int(layer.gate.is_open().sum())}/{width}" if isinstance(layer, dampr.nn.GatedLayer) else width)
    return "-".join(found)


def _file_bytes(model: nn.Module) -> int:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        if dampr.prune.gated_layers(model):
            save_file(model.state_dict(), path)
        else:
            dampr.save(model, path)
        return path.stat().st_size
