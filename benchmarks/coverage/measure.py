"""Measures one network: how much of it can be pruned, whether the compacted model computes the same, and what
Torch-Pruning leaves at half of every width.
"""

from __future__ import annotations

import copy
import signal
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dampr
from dampr.nn import GatedParameter
from dampr.prune import gated_layers, inputs
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs

from . import networks

PATIENCE = 20  # seconds of CPU time for Torch-Pruning, which goes in circles around some networks
SHARE = 0.3  # the share of the multiply-accumulates that should be prunable


def row(library: str, name: str) -> dict[str, Any]:
    """The row of a network for the results file. An exception is put under "error", with everything measured
    before it.
    """
    found: dict[str, Any] = {"library": library, "name": name}
    model, x = networks.build(library, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found |= _of_dampr(model, x, found)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    model, x = networks.build(library, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["torch_pruning"] = torch_pruning_left(networks.shaken(model), x)
    return found


def with_residual(library: str, name: str) -> dict[str, Any]:
    """The entry "residual" of a network's row: the same measurements with ``convert(residual=True)``, or the error."""
    model, x = networks.build(library, name)
    found: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _of_dampr(model, x, found, residual=True)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return found


def _of_dampr(model: nn.Module, x: Any, found: dict[str, Any], residual: bool = False) -> dict[str, Any]:
    """Measure a network with dampr. Values go into ``found`` one by one, so that they are kept if something raises
    later.
    """
    before = inputs.evaluate(model, x)
    found["forward_s"] = _seconds(lambda: inputs.evaluate(model, x), 3)
    start = time.process_time()
    dampr.convert(model, example_inputs=x, residual=residual)
    found["convert_s"] = round(time.process_time() - start, 3)
    found["gates_on"] = (
        "parameters" if any(isinstance(m, GatedParameter) for m in gated_layers(model).values()) else "layers"
    )
    after = inputs.evaluate(model, x)
    found["same_after_convert"] = "bits" if _equal(before, after) else _relative(before, after)
    networks.shaken(model)
    cost = Cost(model, x, "macs")
    found["macs"] = int(cost.total)
    found["prunable"] = round(1 - float(cost(_kept(cost, 0.0))) / cost.total, 4)
    half = _kept(cost, 0.5)
    found["foretold"] = int(cost(half))
    for gate, own in zip(
        cost.structure.gates, half.split([gate.num_gates for gate in cost.structure.gates]), strict=True
    ):
        gate.set_levels_(torch.where(own, gate.levels(), -3.0))
    small = dampr.compact(model, example_inputs=x)
    found["left"] = count_macs(small, x)
    fresh = _fresh(x)
    found["float32"] = _relative(inputs.evaluate(model, fresh), inputs.evaluate(small, fresh))
    wide, fresh = copy.deepcopy(model).double(), _as_double(fresh)
    narrow = dampr.compact(wide, example_inputs=_as_double(x))  # constants are folded into biases in float64 too
    found["float64"] = _relative(inputs.evaluate(wide, fresh), inputs.evaluate(narrow, fresh))
    return found


def _kept(cost: Cost, share: float) -> Tensor:
    """A mask over all gates that keeps this share of each width, at least one gate. The first ones stay, which gates of
    every family can leave open.
    """
    keep = torch.zeros(cost.structure.size, dtype=torch.bool)
    for rows in cost.structure.widths():
        for own in rows:
            keep[own.start : own.start + max(1, round(share * len(own)))] = True
    return keep


def _seconds(call: Any, times: int) -> float:
    """The mean CPU seconds of a call."""
    start = time.process_time()
    for _ in range(times):
        call()
    return round((time.process_time() - start) / times, 4)


def _fresh(x: Any) -> Any:
    """Other inputs of the same kind: floats drawn anew, integers (words) moved by one position."""
    generator = torch.Generator().manual_seed(7)

    def draw(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t.roll(1, -1)

    return pytree.tree_map(draw, x)


def _as_double(x: Any) -> Any:
    """The inputs with floats in float64."""
    return pytree.tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, x)


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all tensors are equal, where NaN equals NaN."""
    return len(a) == len(b) and all(
        torch.equal(s, t) or bool(((s == t) | (s != s) & (t != t)).all()) for s, t in zip(a, b, strict=True)
    )


def _relative(a: list[Tensor], b: list[Tensor]) -> float | str:
    """The largest difference divided by the largest value; "other shapes" if the shapes differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return "other shapes"
    gap = inputs.gap(a, b) / max(inputs.size(a), 1e-30)
    return float(f"{gap:.2g}")


def torch_pruning_left(model: nn.Module, x: Any) -> float | str:
    """The share of the MACs that Torch-Pruning leaves when it removes half of every width by magnitude, or why it has
    no result.
    """
    import torch_pruning

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end within {PATIENCE} s of CPU time")

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
    total = count_macs(model, x)
    with torch.no_grad():
        shapes = [t.shape for t in inputs.evaluate(model, x)]
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1:]
    try:
        given: Any = (x,) if isinstance(x, Tensor) else x
        pruner = torch_pruning.pruner.BasePruner(
            model,
            given,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=last,
            output_transform=lambda out: sum(t.sum() for t in inputs.tensors(out) if t.is_floating_point()),
        )
        pruner.step()
        if [t.shape for t in inputs.evaluate(model, x)] != shapes:
            return "its result has outputs of other shapes"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return round(count_macs(model, x) / total, 4)
