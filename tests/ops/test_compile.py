"""Compiled layers: as the first thing a process does, without gradients, without a graph break,
and with what eager ones compute.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dampr import nn as gated
from tests.limits import HANG

IMAGES, ROWS = torch.randn(4, 8, 5, 5), torch.randn(4, 8)
LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "linear": (lambda: gated.GatedLinear(8, 8), ROWS),
    "linear, per sample": (lambda: gated.GatedLinear(8, 8, per_sample=True), ROWS),
    "linear, weight": (lambda: gated.GatedLinear(8, 8, granularity="weight"), ROWS),
    "linear, dep_l0": (lambda: gated.GatedLinear(8, 8, gate="dep_l0"), ROWS),
    "linear, dam": (lambda: gated.GatedLinear(8, 8, gate="dam"), ROWS),
    "conv": (lambda: gated.GatedConv2d(8, 8, 3), IMAGES),
    "conv, per sample": (lambda: gated.GatedConv2d(8, 8, 3, per_sample=True), IMAGES),
    "batch norm": (lambda: gated.GatedBatchNorm2d(8), IMAGES),
    "batch norm, per sample": (lambda: gated.GatedBatchNorm2d(8, per_sample=True), IMAGES),
    "layer norm": (lambda: gated.GatedLayerNorm(8), ROWS),
    "gate": (lambda: gated.GatedActivation(8), ROWS),
}
MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "frozen": contextlib.nullcontext,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_no_gradient_is_needed(name: str, training: bool, mode: str) -> None:
    build, x = LAYERS[name]
    layer = build().train(training)
    if mode == "frozen":
        layer.requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, layer):
        torch.manual_seed(2)
        with MODES[mode]():
            found.append(run(x).clone())
    torch.testing.assert_close(*found)


FIRST = """
import torch, dampr
from dampr.nn import GatedConv2d, GatedLinear
for layer, x in ((GatedLinear(8, 8), torch.randn(4, 8)), (GatedConv2d(8, 8, 3), torch.randn(4, 8, 5, 5))):
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert layer.weight.grad is not None
    torch._dynamo.reset()
with dampr.backend("reference"):
    torch.compile(GatedLinear(8, 8), fullgraph=True, backend="aot_eager")(torch.randn(4, 8))
print("compiled", *sorted(name for name in vars(dampr.ops) if name.startswith("backend_")))
"""


def test_the_first_call_of_a_process_may_be_a_compiled_one() -> None:
    """Backends are imported when they are first asked for, which dynamo cannot trace."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("compiled ")
    assert "backend_reference" in done.stdout
