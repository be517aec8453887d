"""Targets: what takes a whole model, and files."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dampr
from dampr.prune import inputs

from .cases import Case, judge
from .functional import corrupted
from .layers import names_of
from .values import Draw, nonsense

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
BATCH = [(X, torch.zeros(4, 3))]


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


def converted(**how: Any) -> nn.Module:
    return dampr.convert(dense(), example_inputs=X, **how)


def closed() -> nn.Module:
    model: Any = converted()
    model[0].gate.log_alpha.data[:3] = -9.0
    return model


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-3)


Make = Callable[[], dict[str, Any]]
FUNCTIONS: dict[str, tuple[Callable[..., Any], Make]] = {
    "convert": (
        dampr.convert,
        lambda: {
            "model": dense(),
            "gate": "hard_concrete",
            "granularity": "output",
            "per_sample": False,
            "include": "*",
            "exclude": "2",
            "example_inputs": X,
            "tie": True,
            "residual": False,
        },
    ),
    "compact": (
        dampr.compact,
        lambda: {"model": closed(), "example_inputs": X, "round_to": 2, "atol": 1e-4, "rtol": 1e-4, "optimizer": None},
    ),
    "Budget": (
        dampr.Budget,
        lambda: {"model": converted(), "example_inputs": X, "macs": 0.7, "warmup": 2, "strength": 5.0, "rate": 0.1},
    ),
    "Budget_steps": (
        dampr.Budget,
        lambda: {"model": converted(), "example_inputs": X, "params": 0.7, "steps": 50, "score": "learned"},
    ),
    "Plan": (
        dampr.Plan,
        lambda: {
            "model": dense(),
            "example_inputs": X,
            "macs": 0.7,
            "steps": 50,
            "ramp": 0.3,
            "round_to": 1,
            "min_width": 1,
        },
    ),
    "prune_once": (
        dampr.prune_once,
        lambda: {
            "model": dense(),
            "batches": BATCH,
            "loss": nn.functional.mse_loss,
            "macs": 0.7,
            "rounds": 1,
            "criterion": "taylor",
        },
    ),
    "penalty": (dampr.penalty, lambda: {"model": converted(), "lam": {"*": 0.1}, "prior_precision": 0.01}),
    "param_groups": (
        dampr.param_groups,
        lambda: {"model": converted(), "lr": 0.1, "gate_lr": 0.2, "weight_decay": 1e-4},
    ),
    "summary": (dampr.summary, lambda: {"model": converted(), "example_inputs": X}),
    "verify_model": (
        dampr.verify_model,
        lambda: {"model": converted(), "example_inputs": X, "optimizer": None, "gates_per_layer": 2},
    ),
    "explain": (dampr.explain, lambda: {"layer": dampr.nn.GatedLinear(6, 3), "x": X}),
    "gate_generator": (dampr.gate_generator, lambda: {"model": converted(), "seed": 1}),
    "expand": (dampr.expand, lambda: {"model": dampr.compact(closed(), example_inputs=X)}),
}


def of(name: str) -> Callable[[Draw], str | None]:
    function, make = FUNCTIONS[name]
    asked = "explain"  # which runs nothing

    def target(draw: Draw) -> str | None:
        kwargs = make()
        if draw.chance(0.1):
            return judge(Case(function, (), kwargs, names=names_of(function), valid=True))
        corrupted(draw, kwargs)
        return judge(
            Case(function, (), kwargs, names=names_of(function), like=None if name == asked else lambda: runs(kwargs))
        )

    return target


def runs(kwargs: dict[str, Any]) -> None:
    """What the model itself raises on example inputs is raised by whoever is given both."""
    model: Any = copy.deepcopy(kwargs.get("model", kwargs.get("layer", kwargs.get("source"))))
    given = next((kwargs[name] for name in ("example_inputs", "x") if name in kwargs), None)
    if isinstance(model, nn.Module) and given is not None:
        inputs.evaluate(model, given)


def contexts(draw: Draw) -> str | None:
    """Context managers, which do nothing before they are entered."""
    value = nonsense(draw)

    def backend(name: Any) -> None:
        with dampr.backend(name):
            pass

    def hold_draws(model: Any) -> None:
        with dampr.hold_draws(model):
            pass

    function, argument = draw.choice(((backend, "name"), (hold_draws, "model")))
    return judge(Case(function, (), {argument: value}, names=(argument,)))


def history(draw: Draw) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        kwargs: dict[str, Any] = {
            "path": str(Path(folder, "history.jsonl")),
            "source": converted(),
            "example_inputs": X,
        }
        if draw.chance(0.8):
            changed = draw.choice(sorted(kwargs))
            value = nonsense(draw)
            if changed == "path" and not (value is None or isinstance(value, (float, dict, list, tuple, torch.Tensor))):
                return None  # a file descriptor, or a file wherever this runs
            kwargs[changed] = value
        return judge(Case(dampr.History, (), kwargs, names=names_of(dampr.History), like=lambda: runs(kwargs)))


def damaged(draw: Draw) -> str | None:
    """A file with bytes changed, left out or put in loads as what was saved, or is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        dampr.save(dampr.compact(closed(), example_inputs=X), path)
        data = bytearray(path.read_bytes())
        for _ in range(draw.choice((1, 1, 3, 20))):
            how, place = draw.choice(("change", "change", "cut", "insert", "end")), draw.randrange(len(data) or 1)
            if how == "change" and data:
                data[min(place, draw.choice((8, 200, len(data) - 1)))] = draw.randrange(256)
            elif how == "cut":
                del data[place : place + draw.randint(1, 64)]
            elif how == "insert":
                data[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 16)))
            else:
                del data[place:]
        path.write_bytes(bytes(data))
        return judge(Case(dampr.load, (path, dense()), names=("path", "model", "model.safetensors", str(path))))


def file_arguments(draw: Draw) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        small = dampr.compact(closed(), example_inputs=X)
        dampr.save(small, path)
        if draw.chance(0.5):
            value = nonsense(draw)
            return judge(
                Case(
                    dampr.save, (), {"model": value, "path": Path(folder, "other.safetensors")}, names=("model", "path")
                )
            )
        model = draw.choice((None, dense(), closed(), small, nn.Linear(2, 2), nonsense(draw)))
        return judge(
            Case(
                dampr.load,
                (),
                {"path": path, "model": copy.deepcopy(model)},
                names=("model", "path", "model.safetensors"),
            )
        )


TARGETS = {
    **{name: of(name) for name in FUNCTIONS},
    "contexts": contexts,
    "History": history,
    "damaged_files": damaged,
    "file_arguments": file_arguments,
}
