"""A layer decides once per call: how many Python functions of dampr run in a forward and a backward, on each route."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import dampr
from dampr.nn import GatedLinear
from dampr.ops import forced_route

pytestmark = pytest.mark.skipif(dampr.backend_info()["cpp"].startswith("missing"), reason="no extension")

MOST = 25
MOST_CAST = 30  # an autocast asks whether dtypes go together, and folds a weight of another dtype once more
MOST_SKIPPING = 66  # what is open is picked out of x, weight and bias, and put back among zeros
PACKAGE = str(Path(dampr.__file__).parent)
LARGE, MANY_ROWS, TINY = (256, 512, 512), (1024, 256, 256), (4, 16, 16)

# What a layer is made with, the shape (rows, in_features, out_features), the forced route or None,
# and the route that it takes.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int], str | None, str]] = {
    "small": ({}, TINY, None, "small"),
    "small, inputs": ({"granularity": "input"}, TINY, None, "small"),
    "small, per sample": ({"per_sample": True}, TINY, None, "small"),
    "activations": ({}, LARGE, None, "activations"),
    "activations, inputs": ({"granularity": "input"}, LARGE, None, "activations"),
    "activations, forced": ({"granularity": "input"}, TINY, "activations", "activations"),
    "fold": ({}, MANY_ROWS, None, "fold"),
    "fold, inputs": ({"granularity": "input"}, MANY_ROWS, None, "fold"),
    "fold, forced": ({}, TINY, "fold", "fold"),
    "passes": ({"per_sample": True}, LARGE, None, "passes"),
    "passes, inputs": ({"per_sample": True, "granularity": "input"}, LARGE, None, "passes"),
    "weights": ({"granularity": "weight"}, LARGE, None, "fold"),
    "weights, tiny": ({"granularity": "weight"}, TINY, None, "fold"),
    "blocks": ({"granularity": (4, 4)}, LARGE, None, "fold"),
    "live": ({}, LARGE, "live", "live"),
    "live, inputs": ({"granularity": "input"}, LARGE, "live", "live"),
}


def functions_of(step: Callable[[], object]) -> list[str]:
    """The functions of the package that a step calls, in order."""
    seen: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            seen.append(f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_step_calls_few_functions(case: str, bias: bool) -> None:
    how, (rows, n_in, n_out), forced, route = CASES[case]
    layer, x = GatedLinear(n_in, n_out, bias, **how), torch.randn(rows, n_in, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    with forced_route(forced):
        assert dampr.explain(layer, x).route == route
        step()
        seen = functions_of(step)
    assert seen[0] == "/nn/linear.py:forward"
    assert len(seen) <= (MOST_SKIPPING if route == "live" else MOST), "\n".join(seen)


@pytest.mark.parametrize("case", ["small", "activations", "fold", "passes", "weights"])
def test_more_dimensions_and_half_precision_call_no_more(case: str) -> None:
    how, (rows, n_in, n_out), _, _ = CASES[case]
    layer, x = GatedLinear(n_in, n_out, **how), torch.randn(2, rows // 2, n_in, requires_grad=True)

    def step(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = layer(x)
        y.float().sum().backward()

    for dtype in (torch.float32, torch.bfloat16):
        step(dtype)
        seen = functions_of(lambda dtype=dtype: step(dtype))  # type: ignore[misc]
        assert len(seen) <= (MOST if dtype == torch.float32 else MOST_CAST), "\n".join(seen)


@pytest.mark.parametrize("case", ["small", "activations", "fold", "passes", "weights"])
def test_a_route_is_decided_in_the_forward_and_kept(case: str) -> None:
    """A backward outside of the block that forced a route goes the same way, and decides nothing."""
    how, (rows, n_in, n_out), _, route = CASES[case]
    layer, x = GatedLinear(n_in, n_out, **how), torch.randn(rows, n_in, requires_grad=True)
    with forced_route(route):
        y = layer(x)
    seen = functions_of(lambda: y.sum().backward())
    assert seen
    assert not [name for name in seen if "plan" in name or "routes" in name or "backends" in name], seen
