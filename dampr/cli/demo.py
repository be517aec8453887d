"""``dampr demo``: train one network without pruning and once more with a plan that prunes it, and compare them.

The data are real. The networks are two of the papers: LeNet-300-100 (``mlp``) and LeNet-5-Caffe, 20-50-500 (``cnn``).
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr import _progress, datasets
from dampr.bench import timing
from dampr.prune.measure import count_macs, count_params
from dampr.prune.plan import LEAST_STEPS


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on a data set.

    Attributes:
        epochs: passes over the training data.
        batch: examples in a batch.
        lr: the learning rate of the optimizer.
        macs: the share of the multiply-accumulates that the :class:`dampr.Plan` leaves.

    The phases of a plan are shares of the steps, so a recipe with other epochs has the same phases, longer or shorter.
    """

    epochs: int
    batch: int
    lr: float
    macs: float


RECIPES = {
    ("mlp", "digits"): Recipe(epochs=100, batch=64, lr=2e-3, macs=0.12),
    ("mlp", "fashion-mnist"): Recipe(epochs=12, batch=128, lr=1e-3, macs=0.2),
    ("cnn", "mnist"): Recipe(epochs=6, batch=128, lr=2e-3, macs=0.15),
    ("cnn", "fashion-mnist"): Recipe(epochs=12, batch=128, lr=2e-3, macs=0.25),
}


@dataclass
class ModelReport:
    """One row of the demo's table: a network with its accuracy, widths, cost, time and the size of its file."""

    name: str
    accuracy: float
    widths: str
    params: int
    macs: int
    latency_ms: float
    file_bytes: int


@dataclass
class Report:
    """The results of the demo."""

    data: str
    seed: int
    recipe: Recipe
    models: list[ModelReport]
    max_abs_difference: float
    history: list[dict[str, Any]] = field(default_factory=list)
    model: str = "mlp"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report from the dict that :meth:`as_dict` returned; unknown keys are ignored."""
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        recipe = Recipe(**{f.name: known["recipe"][f.name] for f in fields(Recipe)})
        return cls(**{**known, "recipe": recipe, "models": [ModelReport(**m) for m in known["models"]]})


def mlp(pixels: int, classes: int = 10) -> nn.Sequential:
    """LeNet-300-100, on flattened images."""
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
    """Train a dense network and the same network with a plan that prunes it, and measure both.

    Args:
        data: ``"digits"``, ``"fashion-mnist"`` (any idx files in the format of MNIST) or, for the ``"cnn"``,
            ``"mnist"``.
        root: the folder with the idx files; None for ``"digits"``.
        model: ``"mlp"`` (LeNet-300-100) or ``"cnn"`` (LeNet-5-Caffe; not for the 8 x 8 digits).
        epochs: the number of epochs; None takes the number in :data:`RECIPES`.
        seed: the seed of initialisation and batches.
        folder: the folder for the history of the pruned run (:data:`HISTORY`) and for the compacted model
            (:data:`COMPACTED`); None writes no files.

    Returns: the report, with one row for the dense and one for the compacted network.

    Raises: ValueError for an unknown data set, a missing root or too few epochs; FileNotFoundError if an idx file is
    missing; ValueError if an idx file is incomplete.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r}: expected one of {sorted(MODELS)}")
    if (model, data) not in RECIPES:
        other = next((f"; model={kind!r} has it" for kind, name in RECIPES if name == data), "")
        known = sorted(name for kind, name in RECIPES if kind == model)
        raise ValueError(f"data={data!r}: expected one of {known} with model={model!r}{other}")
    if data != "digits" and root is None:
        raise ValueError(f"root=None: expected the folder with the idx files of {data}")
    split = datasets.digits() if root is None else datasets.mnist_like(root)
    recipe = RECIPES[model, data]
    if epochs is not None:
        recipe = Recipe(**{**asdict(recipe), "epochs": epochs})
    example = split.x_test[:256]

    torch.manual_seed(seed)
    dense, pruned = (MODELS[model](split.x.shape[1]) for _ in range(2))
    pruned.load_state_dict(dense.state_dict())
    plan = _plan(pruned, example, recipe, -(-len(split.x) // recipe.batch))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HISTORY).unlink(missing_ok=True)
    _train(dense, split, recipe, "dense")
    history = _train(
        pruned, split, recipe, "pruned", plan, None if folder is None else dampr.History(folder / HISTORY, plan)
    )
    compacted = plan.finish()
    if folder is not None:
        dampr.save(compacted, folder / COMPACTED)

    models = {"dense": dense.eval(), "compacted": compacted.eval()}
    with torch.no_grad():
        calls = {name: (lambda model=model: model(example)) for name, model in models.items()}
        times = timing.interleaved(calls, rounds=30, min_seconds=0.005)
        rows = [
            ModelReport(
                name,
                _accuracy(model, split),
                "-".join(map(str, _widths(model).values())),
                count_params(model),
                count_macs(model, example[:1]),
                times[name].median * 1e3,
                _file_bytes(model),
            )
            for name, model in models.items()
        ]
    assert plan.report is not None
    return Report(data, seed, recipe, rows, plan.report.difference, history, model)


def _plan(model: nn.Module, example: Tensor, recipe: Recipe, batches: int) -> dampr.Plan:
    """The plan that prunes the network. Raises ValueError if the recipe has too few steps for one."""
    least = -(-LEAST_STEPS // batches)
    if recipe.epochs < least:
        raise ValueError(
            f"epochs={recipe.epochs}: expected at least {least}, because a plan takes {LEAST_STEPS} steps and an "
            f"epoch has {batches}"
        )
    return dampr.Plan(model, example, macs=recipe.macs, steps=recipe.epochs * batches)


def _train(
    model: nn.Module,
    split: datasets.Split,
    recipe: Recipe,
    label: str,
    plan: dampr.Plan | None = None,
    written: dampr.History | None = None,
) -> list[dict[str, Any]]:
    """Adam with a cosine schedule; a plan prunes the model on the way."""
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    epochs = []
    with _progress.bar(label, recipe.epochs, delay=0) as advance:
        for epoch in range(1, recipe.epochs + 1):
            model.train()
            total = 0.0
            for index in torch.randperm(len(split.x)).split(recipe.batch):
                loss = F.cross_entropy(model(split.x[index]), split.y[index])
                total += float(loss.detach()) * len(index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if plan is not None:
                    plan.step(optimizer)
            schedule.step()
            loss_of_epoch = total / len(split.x)
            note = f"loss {loss_of_epoch:.4f}"
            if plan is not None:
                with torch.no_grad():
                    accuracy = _accuracy(model.eval(), split)
                widths = _widths(model)
                epochs.append(
                    {"epoch": epoch, "loss": loss_of_epoch, "accuracy": accuracy, **plan.readings(), "open": widths}
                )
                if written is not None:
                    written.record(step=plan.steps_taken, loss=loss_of_epoch, accuracy=accuracy)
                note += f", {plan.phase}, open {'-'.join(map(str, widths.values()))}"
            advance(note)
    return epochs


def _accuracy(model: nn.Module, split: datasets.Split) -> float:
    """The accuracy on the test data, in [0, 1]."""
    right = [
        (model(x).argmax(1) == y).sum() for x, y in zip(split.x_test.split(1000), split.y_test.split(1000), strict=True)
    ]
    return float(sum(right)) / len(split.y_test)


def _widths(model: nn.Module) -> dict[str, int]:
    """For each linear and convolution layer, the number of open gates if it is gated, else its width."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    gated = dampr.prune.gated_layers(model)
    return {
        name: int(gated[name].gate.is_open().sum()) if name in gated else layer.weight.shape[0]
        for name, layer in layers.items()
    }


def _file_bytes(model: nn.Module) -> int:
    """The size of the file of a model, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        dampr.save(model, path)
        return path.stat().st_size
