"""The main job on real data: train a dense 300-100 MLP and a gated one, compact the gated one, and report all three side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr import datasets
from dampr.bench import timing
from dampr.prune.measure import count_macs, count_params

Progress = Callable[[str, int, int, str], None]  # label, step, of how many, note


@dataclass(frozen=True)
class Recipe:
    """How one data set is trained. ``lam`` is the cost of one parameter in units of the loss times N, as the paper's lambda."""

    epochs: int
    batch: int
    lr: float
    gate_lr: float
    lam: float


RECIPES = {
    "digits": Recipe(epochs=150, batch=64, lr=2e-3, gate_lr=2e-2, lam=0.1),
    "fashion-mnist": Recipe(epochs=12, batch=128, lr=1e-3, gate_lr=1e-2, lam=0.3),
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report that :meth:`as_dict` was taken of; further keys are ignored."""
        known = {f.name: data[f.name] for f in fields(cls)}
        return cls(**{**known, "recipe": Recipe(**known["recipe"]), "models": [ModelReport(**m) for m in known["models"]]})


def mlp(pixels: int, classes: int = 10) -> nn.Sequential:
    """LeNet-300-100."""
    return nn.Sequential(nn.Linear(pixels, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, classes))


def run(
    data: str = "digits", root: str | None = None, *, epochs: int | None = None, seed: int = 0, progress: Progress = lambda *_: None
) -> Report:
    """Train, prune, compact, measure.

    Args:
        data: ``"digits"`` or ``"fashion-mnist"`` (any MNIST-like idx files).
        root: the folder of the idx files.
        epochs: None for the recipe's.
        seed: of initialisation, batches and gates.
        progress: called with (label, step, steps, note) once per epoch.

    Raises: ValueError for an unknown data set or a missing root, FileNotFoundError or ValueError for files that are not there or not whole.
    """
    if data not in RECIPES:
        raise ValueError(f"data={data!r}: expected one of {sorted(RECIPES)}")
    if data != "digits" and root is None:
        raise ValueError(f"root=None: expected the folder with the idx files of {data}")
    split = datasets.digits() if root is None else datasets.mnist_like(root)
    recipe = RECIPES[data]
    if epochs is not None:
        if epochs < 1:
            raise ValueError(f"epochs={epochs}: expected at least 1")
        recipe = Recipe(**{**asdict(recipe), "epochs": epochs})
    example = split.x_test[:256]

    torch.manual_seed(seed)
    dense = mlp(split.x.shape[1])
    gated = mlp(split.x.shape[1])
    gated.load_state_dict(dense.state_dict())
    dampr.convert(gated, gate="hard_concrete", granularity="output", example_inputs=example)

    for _ in _train(dense, split, recipe, progress, "dense"):
        pass
    history = list(_train(gated, split, recipe, progress, "gated"))
    compacted = dampr.compact(gated.eval(), example_inputs=example)

    models = {"dense": dense.eval(), "gated": gated.eval(), "compacted": compacted.eval()}
    with torch.no_grad():
        difference = float((gated(split.x_test) - compacted(split.x_test)).abs().max())
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
    return Report(data, seed, recipe, rows, difference, history, gates)


def _train(model: nn.Module, split: datasets.Split, recipe: Recipe, progress: Progress, label: str) -> Iterator[dict[str, Any]]:
    layers = dampr.prune.gated_layers(model)
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=recipe.lr, gate_lr=recipe.gate_lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    count = len(split.x)
    for epoch in range(recipe.epochs):
        model.train()
        total = 0.0
        for index in torch.randperm(count).split(recipe.batch):
            loss = F.cross_entropy(model(split.x[index]), split.y[index])
            total += float(loss.detach()) * len(index)
            if layers:
                loss = loss + recipe.lam / count * dampr.penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        open_gates = {name: int(layer.gate.is_open().sum()) for name, layer in layers.items()}
        note = f"loss {total / count:.4f}" + (f", open {'-'.join(map(str, open_gates.values()))}" if layers else "")
        progress(label, epoch + 1, recipe.epochs, note)
        yield {"epoch": epoch + 1, "loss": total / count, "open": open_gates}


def _accuracy(model: nn.Module, split: datasets.Split) -> float:
    predicted: Tensor = model(split.x_test).argmax(1)
    return float((predicted == split.y_test).float().mean())


def _widths(model: nn.Module) -> str:
    """Open gates of a gated model, widths of a plain one: "300-100-10"."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    open_gates = {layer: int(layer.gate.is_open().sum()) for layer in layers if isinstance(layer, dampr.nn.GatedLinear)}
    return "-".join(f"{open_gates[layer]}/{layer.out_features}" if layer in open_gates else str(layer.out_features) for layer in layers)


def _file_bytes(model: nn.Module) -> int:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        if dampr.prune.gated_layers(model):
            save_file(model.state_dict(), path)
        else:
            dampr.save(model, path)
        return path.stat().st_size
