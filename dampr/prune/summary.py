"""The penalty, the optimizer groups and the summary table of a gated model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks
from dampr.gates import Gate, OwnedGate, SteppedGate
from dampr.nn import GatedLayer

from .compact import compact
from .measure import count_macs, count_params
from .modules import by_name, gates_of
from .reports import Report
from .wrapped import check_gates, check_values, sees_through, unwrapped


def gated_layers(model: nn.Module) -> dict[str, GatedLayer]:
    """Every gated layer of ``model`` by name, in order. For a wrapped model, the names are those of the module
    inside.
    """
    model = unwrapped(_checks.module("model", model))
    return by_name(model, GatedLayer)


def distinct_gates(model: nn.Module) -> dict[str, Gate]:
    """Every gate of ``model`` once, by the name of the first layer that has it; tied layers share one gate."""
    found: dict[Gate, str] = {}
    for name, layer in gated_layers(model).items():
        found.setdefault(layer.gate, name)
    return {name: gate for gate, name in found.items()}


Cost = float | Mapping[str, float]


def penalty(model: nn.Module, *, lam: Cost = 1.0, prior_precision: Cost = 0.0) -> Tensor:
    """The expected L0 penalty of all gated layers, a scalar tensor to add to the loss (Louizos et al. 2018, eq. 9 and
    appendix A).

    It is the sum over gates of pi (lam |g| + prior_precision / 2 ||w_g||^2), where pi is the probability that the gate
    is open, |g| the number of parameters that the gate switches off, and w_g those parameters. With the defaults it is
    the expected number of gated parameters that are left. Multiply it by lambda / N if the loss is a mean over N
    training examples. Both numbers may be mappings from name globs to numbers, of which the first that matches a layer
    counts: ``{"conv*": 10.0, "*": 0.1}``, called "lambda sep." in the paper.

    Raises ValueError if ``model`` has no gated layer.

    >>> import torch, dampr
    >>> layer = dampr.nn.GatedLinear(8, 4)
    >>> round(penalty(layer).item(), 3)  # 36 parameters, each kept with probability 0.990
    35.641
    """
    layers = gated_layers(model)
    if not layers:
        raise ValueError(f"model={type(model).__name__}: expected gated layers in it (dampr.convert puts them there)")
    check_gates(unwrapped(model))
    costs = [
        [_cost_of(name, argument, value) for argument, value in (("lam", lam), ("prior_precision", prior_precision))]
        for name in layers
    ]
    return torch.stack([layer.penalty(*cost) for layer, cost in zip(layers.values(), costs, strict=True)]).sum()


def _cost_of(name: str, argument: str, value: Cost) -> float:
    """The number that an argument gives for one layer. Raises ValueError if no glob matches the layer's name."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value  # type: ignore[return-value]  # lambda is learned, or scheduled on the device
    if not isinstance(value, Mapping):
        return _checks.number(argument, value)
    found = next(
        (number for pattern, number in value.items() if isinstance(pattern, str) and fnmatchcase(name, pattern)), None
    )
    if found is None:
        raise ValueError(
            f"{argument}={dict(value)!r}: expected a glob that matches the gated layer {name!r} (a last one of '*' "
            "matches all)"
        )
    return _checks.number(argument, found)


def param_groups(
    model: nn.Module, *, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Two optimizer groups: weights, and gate parameters with a learning rate of their own and no weight decay.

    There are three if DAM gates were made with ``weight_decay_on_beta=True``: their betas are decayed like weights.

    Args:
        model: a gated model. A parameter shared by several layers appears once.
        lr, weight_decay: for the weights.
        gate_lr: for the gates, by default ``lr``.
    """
    for name, value in (("lr", lr), ("gate_lr", lr if gate_lr is None else gate_lr), ("weight_decay", weight_decay)):
        _checks.number(name, value, 0)
    _checks.module("model", model)
    found = gates_of(model)
    if gate_lr is not None and any(isinstance(gate, (OwnedGate, SteppedGate)) for gate in found):
        raise ValueError(
            f"gate_lr={gate_lr!r}: a budget owns the gates of this model and steps them; expected None, or a budget "
            "without steps"
        )
    for gate in found:
        gate.in_optimizer = gate_lr is not None
    gates = {id(p): p for module in found for p in module.parameters()}
    decayed = {id(p) for module in found if getattr(module, "weight_decay_on_beta", False) for p in module.parameters()}
    weights = [p for p in model.parameters() if id(p) not in gates]
    rate = lr if gate_lr is None else gate_lr
    groups = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": [p for key, p in gates.items() if key not in decayed], "lr": rate, "weight_decay": 0.0},
    ]
    if decayed:
        groups.append(
            {"params": [p for key, p in gates.items() if key in decayed], "lr": rate, "weight_decay": weight_decay}
        )
    return groups


@dataclass(frozen=True)
class LayerSummary:
    """One gated layer: its gates, how many of them are open in evaluation mode, and how many the next draw is expected
    to open.
    """

    name: str
    layer: str
    granularity: str
    gates: int
    open: int
    expected_open: float


@dataclass(frozen=True)
class Summary(Report):
    """The result of :func:`summary`. ``str()`` gives a table, ``as_dict()`` plain data.

    Without example inputs only ``params`` is counted.
    """

    layers: list[LayerSummary]
    params: int
    params_compacted: int | None = None
    macs: int | None = None
    macs_compacted: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [("layer", "type", "gates on", "open", "expected open")]
        rows += [
            (r.name, r.layer, r.granularity, f"{r.open} / {r.gates}", f"{r.expected_open:.1f}") for r in self.layers
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        for label, before, after in (
            ("params", self.params, self.params_compacted),
            ("MACs", self.macs, self.macs_compacted),
        ):
            if before is not None:
                lines.append(
                    f"{label}: {before:,}"
                    + ("" if after is None else f" -> {after:,} compacted ({after / max(before, 1):.1%})")
                )
        return "\n".join(lines)


@sees_through
def summary(model: nn.Module, example_inputs: Any = None) -> Summary:
    """The open gates of each layer and, with example inputs, parameters and MACs before and after compaction. A copy is
    compacted, so the numbers are exact.

    Parameters and MACs do not include those of gates. Raises ValueError if ``model`` has no gated layer.
    """
    layers = gated_layers(model)
    if not layers:
        raise ValueError(f"model={type(model).__name__}: expected gated layers in it (dampr.convert puts them there)")
    check_values(model)
    rows = [
        LayerSummary(
            name,
            type(layer).__name__,
            str(layer.granularity),
            layer.gate.num_gates,
            int(layer.gate.is_open().sum()),
            float(layer.gate.open_probability().detach().sum()),
        )
        for name, layer in layers.items()
    ]
    if example_inputs is None or (len(layers) == 1 and "" in layers):
        return Summary(rows, count_params(model))
    small = compact(model, example_inputs=example_inputs)
    return Summary(
        rows,
        count_params(model),
        count_params(small),
        count_macs(model, example_inputs),
        count_macs(small, example_inputs),
    )
