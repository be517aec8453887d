""":func:`verify_model`: checks that every gate of a model has an effect and can learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks, _progress
from dampr.gates import Fixed, Gate
from dampr.nn import GatedLayer

from . import inputs, noise
from .modules import gates_of
from .reports import Report
from .summary import gated_layers
from .wrapped import check_values, sees_through


@dataclass
class GateCheck:
    """The result for the gates of one layer.

    Attributes:
        gates: the number of gates.
        tried: the number of gates that were closed one by one.
        unreachable: the indices of those tried gates whose closing did not change the output on these inputs (because
            a ReLU is 0 for that unit in every example, say).
        without_gradient: the indices of the gates for whose value the gradient of the output is 0.
        problems: why the layer does not pass; empty if it does.
    """

    name: str
    layer: str
    gates: int
    tried: int
    unreachable: list[int]
    without_gradient: list[int]
    problems: list[str] = field(default_factory=list)


@dataclass
class Verification(Report):
    """The results of :func:`verify_model`. ``str()`` gives a table, ``as_dict()`` plain data."""

    layers: list[GateCheck]

    @property
    def ok(self) -> bool:
        """Whether no layer has a problem."""
        return not any(layer.problems for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        lines = []
        for row in self.layers:
            changing, moving = row.tried - len(row.unreachable), row.gates - len(row.without_gradient)
            lines.append(
                f"{row.name} ({row.layer}, {row.gates} gates): {changing} of {row.tried} change the output, {moving} "
                "have a gradient"
            )
            lines += [f"    problem: {problem}" for problem in row.problems]
        return "\n".join([*lines, "ok" if self.ok else "not ok"])


@sees_through
def verify_model(
    model: nn.Module, example_inputs: Any, *, optimizer: torch.optim.Optimizer | None = None, gates_per_layer: int = 64
) -> Verification:
    """Check that the gates work: closing one changes what the model computes, the loss has a gradient on it, and the
    optimizer moves it.

    A layer has a problem if closing all its gates leaves the output as it is (something bypasses the layer), if a
    parameter of its gates gets no gradient in training, is frozen or is in half precision, or if the optimizer lacks
    the parameter or decays it (weight decay pulls log_alpha to 0, whatever the data says). Gates that are closed
    already are opened for the trial. The model is not changed.

    Args:
        model: a model with gated layers.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        optimizer: the optimizer that trains the model. None: nothing is checked about it.
        gates_per_layer: how many gates of each layer, spread evenly, to close one by one (one evaluation each).

    Raises: TypeError or ValueError that names the argument; what the model raises on the example inputs.

    >>> import dampr
    >>> x = torch.randn(8, 4)
    >>> model = dampr.convert(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), example_inputs=x)
    >>> print(verify_model(model, x))
    0 (GatedLinear, 6 gates): 6 of 6 change the output, 6 have a gradient
    ok
    """
    inputs.check(example_inputs)
    gates_per_layer = _checks.positive_int("gates_per_layer", gates_per_layer)
    if not gated_layers(model):
        raise ValueError(f"model={type(model).__name__}: expected gated layers in it (dampr.convert puts them there)")
    check_values(model)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer={optimizer!r:.80}: expected a torch.optim.Optimizer")
    problems = {name: _parameter_problems(layer.gate, optimizer) for name, layer in gated_layers(model).items()}
    if any(
        p.dtype not in _checks.GATE_DTYPES for layer in gated_layers(model).values() for p in layer.gate.parameters()
    ):
        return Verification(  # no layer computes with such gates
            [
                GateCheck(n, type(layer).__name__, layer.gate.num_gates, 0, [], [], problems[n])
                for n, layer in gated_layers(model).items()
            ]
        )
    with noise.same(model), inputs.unsynced(model):
        for name, found in _unconnected(inputs.copied(model, example_inputs), example_inputs).items():
            problems[name] += found
        return Verification(_try(model, example_inputs, problems, gates_per_layer))


def _try(model: nn.Module, example_inputs: Any, problems: dict[str, list[str]], limit: int) -> list[GateCheck]:
    """Close gates of a copy of the model in which all gates are open, and return the result for each layer.
    ``problems``, by layer, gets new entries.
    """
    trial = inputs.copied(model, example_inputs)
    open_gates: dict[nn.Module, nn.Module] = {
        gate: Fixed(torch.where(gate.deterministic() == 0, 1.0, gate.deterministic())) for gate in gates_of(trial)
    }
    inputs.replace(trial, open_gates)
    gradients = _gradients(trial, example_inputs)
    rows = []
    for name, layer in _progress.track(gated_layers(trial).items(), "closing gates"):
        tried, unreachable, bypassed = _close(trial, layer, example_inputs, limit)
        if bypassed:
            problems[name].append(
                "closing all its gates changes nothing: the model does not use this layer, or not its gates"
            )
        flat = (gradients[name] == 0).nonzero().flatten().tolist()
        rows.append(
            GateCheck(name, type(layer).__name__, layer.gate.num_gates, tried, unreachable, flat, problems[name])
        )
    return rows


def _parameter_problems(gate: Gate, optimizer: torch.optim.Optimizer | None) -> list[str]:
    """What is wrong with the parameters of a gate: dtype, frozen, missing in the optimizer, or decayed by it."""
    found = []
    groups = {id(p): group for group in (optimizer.param_groups if optimizer else []) for p in group["params"]}
    may_decay = getattr(gate, "weight_decay_on_beta", False)
    for name, p in gate.named_parameters():
        if p.dtype not in _checks.GATE_DTYPES:
            found.append(f"{name} is {p.dtype}, expected torch.float32: steps of half precision are too coarse for it")
        if not p.requires_grad:
            found.append(f"{name} is frozen")
        elif optimizer is not None and id(p) not in groups:
            found.append(f"{name} is not in the optimizer")
        elif groups.get(id(p), {}).get("weight_decay", 0) and not may_decay:
            found.append(
                f"{name} is under weight decay {groups[id(p)]['weight_decay']:g}, expected 0 (dampr.param_groups)"
            )
    return found


def _unconnected(model: nn.Module, example_inputs: Any) -> dict[str, list[str]]:
    """For each layer, a problem for every gate parameter that gets no gradient in a training step of ``model``."""
    model.train()
    for p in model.parameters():
        p.grad = None
    loss = _any_loss(inputs.tensors(inputs.call(model, example_inputs)))
    if loss.requires_grad:
        loss.backward()
    return {
        name: [
            f"{own} gets no gradient in training"
            for own, p in layer.gate.named_parameters()
            if p.requires_grad and p.grad is None
        ]
        for name, layer in gated_layers(model).items()
    }


def _gradients(trial: nn.Module, example_inputs: Any) -> dict[str, Tensor]:
    """The gradient of a random direction of the outputs with respect to the gates of each layer, in evaluation mode."""
    layers = gated_layers(trial)
    values = {
        name: layer.gate.values.requires_grad_() for name, layer in layers.items() if isinstance(layer.gate, Fixed)
    }
    with inputs.evaluating(trial), torch.backends.cudnn.flags(enabled=False):
        loss = _any_loss(inputs.tensors(inputs.call(trial, example_inputs)))
    distinct = list({id(t): t for t in values.values()}.values())
    found = torch.autograd.grad(loss, distinct, allow_unused=True) if loss.requires_grad else [None] * len(distinct)
    by_tensor = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(distinct, found, strict=True)}
    for t in distinct:
        t.requires_grad_(False)
    return {name: by_tensor[id(t)] for name, t in values.items()}


def _any_loss(outputs: list[Tensor]) -> Tensor:
    """A random linear function of all floating-point outputs, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for t in outputs:
        if t.is_floating_point():
            total = (
                total.to(t.device)
                + (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)).sum()
            )
    return total


def _close(trial: nn.Module, layer: GatedLayer, example_inputs: Any, limit: int) -> tuple[int, list[int], bool]:
    """Close gates of a layer one by one, then all at once, and compare the outputs of the model bit by bit.

    Args:
        trial: a copy of the model whose gates have constant values.
        layer: a gated layer of ``trial``.
        example_inputs: the inputs.
        limit: at most this many gates are closed one by one; of more, an evenly spaced choice.

    Returns: (how many gates were closed one by one, the indices of those whose closing changed no output, whether
    closing all gates changed none either).
    """
    gate = layer.gate
    assert isinstance(gate, Fixed)
    before = inputs.evaluate(trial, example_inputs)
    numbers = (
        sorted({i * gate.num_gates // limit for i in range(limit)}) if gate.num_gates > limit else range(gate.num_gates)
    )
    unreachable = []
    for number in numbers:
        with _closed(gate, [number]):
            if not inputs.differ(before, inputs.evaluate(trial, example_inputs), rtol=0, atol=0):
                unreachable.append(number)
    with _closed(gate, list(range(gate.num_gates))):
        bypassed = len(unreachable) == len(numbers) and not inputs.differ(
            before, inputs.evaluate(trial, example_inputs), rtol=0, atol=0
        )
    return len(numbers), unreachable, bypassed


@contextmanager
def _closed(gate: Fixed, numbers: list[int]) -> Iterator[None]:
    """Set the gates of these numbers to 0 within the block."""
    values = gate.values.clone()
    gate.values[numbers] = 0
    try:
        yield
    finally:
        gate.values.copy_(values)
