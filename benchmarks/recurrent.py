"""Times gated recurrent layers beside the vendor's dense layer and beside gates written op by op: stage ``recurrent``
of benchmarks.run.

"eager unfused" draws gates as a chain of ops and multiplies them around the vendor's kernel. "eager cells" is a loop
over time steps, as in published code, with gates on the state, which no vendor's kernel can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import dampr
from dampr.bench import linear
from dampr.bench.competitors import unfused_gate
from dampr.reference.gated_rnn import gated_rnn


@dataclass(frozen=True)
class Recurrent:
    """A case: one recurrent layer on x (T, B, H) with H hidden units."""

    kind: type[nn.RNNBase]
    steps: int
    batch: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.kind.__name__}, a gate for each unit"

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, B, H, H)."""
        return self.steps, self.batch, self.hidden, self.hidden


GATED: dict[type[nn.RNNBase], Callable[..., nn.Module]] = {nn.LSTM: dampr.nn.GatedLSTM, nn.GRU: dampr.nn.GatedGRU}
CASES = {
    "cpu": [Recurrent(kind, 64, 32, hidden) for kind in GATED for hidden in (256, 512, 1024)],
    "cuda": [Recurrent(kind, 128, 256, hidden) for kind in GATED for hidden in (256, 1024)],
}


class Output(nn.Module):
    """The output of a recurrent layer without its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


class Unfused(nn.Module):
    """A plain layer whose recurrent weights and output are multiplied by gates, op by op."""

    def __init__(self, dense: nn.RNNBase) -> None:
        super().__init__()
        self.dense = dense
        self.log_alpha = nn.Parameter(torch.full((dense.hidden_size,), 3.0))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        z = unfused_gate(self.log_alpha)
        weights = {"weight_hh_l0": cast(Tensor, self.dense.weight_hh_l0) * z}
        y = torch.func.functional_call(self.dense, weights, (x,))[0]
        return (y * z.to(y.dtype),)


class Cells(Unfused):
    """The same gates, with the layer computed as a loop over time steps."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        z = unfused_gate(self.log_alpha).to(x.dtype)
        weights = [getattr(self.dense, name) for name in self.dense._flat_weights_names]
        return gated_rnn(self.dense.mode, x, [[*weights, None]], z.view(1, 1, -1))[:1]


def run(device: str, *, compiled: bool = True, rounds: int = 20) -> list[linear.Point]:
    """The points of every case."""
    return [point for case in CASES[device] for point in _measure(case, device, compiled, rounds)]


def _measure(case: Recurrent, device: str, compiled: bool, rounds: int) -> list[linear.Point]:
    """The points of one case."""
    torch.manual_seed(0)
    if compiled:
        torch._dynamo.reset()

    def dense() -> Any:
        return case.kind(case.hidden, case.hidden)

    layers: dict[str, Callable[[], nn.Module]] = {
        "dense": dense,
        "dampr": lambda: GATED[case.kind](case.hidden, case.hidden),
        "eager unfused": lambda: Unfused(dense()),
        "eager cells": lambda: Cells(dense()),
    }
    x = torch.randn(case.shape[:3], device=device)
    steps: dict[str, linear.Step] = {}
    for name, build in layers.items():
        steps[name] = linear.TrainingStep(Output(build()).to(device), x, torch.randn_like(x))
    if compiled:
        fast = cast(nn.Module, torch.compile(Output(Unfused(dense())).to(device), dynamic=False))
        steps["compiled unfused"] = linear.TrainingStep(fast, x, torch.randn_like(x))
    return linear.time_steps(str(case), case.shape, device, steps, rounds, {})
