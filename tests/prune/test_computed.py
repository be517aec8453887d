"""convert and compact of models with weights that are computed from others: parametrizations, weight_norm,
spectral_norm, prune.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import dampr
from dampr import gates
from dampr.nn import GatedParameter
from dampr.nn.computed import computed

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")

WRAPPED: dict[str, Callable[[nn.Module, str], Any]] = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm by hooks": nn.utils.weight_norm,
    "spectral_norm by hooks": nn.utils.spectral_norm,
    "prune": lambda layer, name: prune.l1_unstructured(layer, name, 0.5),
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.rnn = nn.LSTM(6, 8, batch_first=True)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.rnn(self.table(x))[0])
        return y


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.layer(self.first(x)))
        return y


def convolutional() -> nn.Module:
    first = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*first, nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], list[str]]] = {
    "convolutional": (
        convolutional,
        lambda: torch.randn(4, 3, 4, 4),
        ["0.weight", "0.bias", "1.weight", "3.weight", "6.weight", "6.bias", "8.weight"],
    ),
    "recurrent": (Recurrent, lambda: torch.randint(0, 7, (3, 4)), ["table.weight", "rnn.weight_hh_l0", "last.weight"]),
    "transformer": (
        Transformer,
        lambda: torch.randn(3, 4, 6),
        [
            "layer.linear1.weight",
            "layer.linear2.weight",
            "layer.self_attn.in_proj_weight",
            "layer.self_attn.out_proj.weight",
            "last.weight",
        ],
    ),
}
CASES = [  # one of four wrappers for each weight, in turn, and the others with the slow tests
    pytest.param(kind, name, how, id=f"{kind}-{name}-{how}", marks=[pytest.mark.slow] * bool((i + j) % len(WRAPPED)))
    for kind, (*_, names) in MODELS.items()
    for i, name in enumerate(names)
    for j, how in enumerate(WRAPPED)
]
NEVER_GATED = ("last.weight", "8.weight", "layer.linear2.weight")


def wrap(model: nn.Module, name: str, how: str) -> None:
    owner, _, own = name.rpartition(".")
    WRAPPED[how](model.get_submodule(owner), own)


def assert_cut(model: nn.Module, x: Tensor) -> nn.Module:
    """Compaction of the model, in training mode, with a third of its gates closed is right, and makes it smaller."""
    for module in model.modules():
        if isinstance(module, gates.HardConcrete):
            module.log_alpha.data.fill_(100.0)
            module.log_alpha.data[::3] = -9.0
    state = copy.deepcopy(model.train().state_dict())
    small = dampr.compact(model, example_inputs=x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for module in small.modules():
        assert module.training
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return small


@pytest.mark.parametrize(("kind", "name", "how"), CASES)
def test_a_layer_with_a_computed_weight_is_left_out_with_the_reason_or_cut_by_its_readers(
    kind: str, name: str, how: str
) -> None:
    build, batch, _ = MODELS[kind]
    model, x = build(), batch()
    wrap(model, name, how)
    model(x)
    state = copy.deepcopy(model.state_dict())
    layer, _, own = name.rpartition(".")
    refused = ""
    try:
        dampr.convert(model, example_inputs=x)
    except dampr.ConversionError as error:
        refused = str(error)
    if refused:  # nothing is left that could have gates
        assert kind == "recurrent"
        assert layer not in ("table", "last")
        assert f"its {own} is computed from other tensors" in refused
        return
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert computed(model.get_submodule(layer)) == own
    skipped = model.dampr_skipped
    if any(isinstance(gates, GatedParameter) for gates in dampr.prune.gated_layers(model).values()):
        pass  # what the layer writes is switched off where it is read, whatever computes its weight
    elif name == "1.weight":  # a norm, which the gates of the layer before would belong after
        assert skipped["0"] == "the weight of a BatchNorm that reads it is computed from other tensors"
    else:
        reason = skipped[layer.removesuffix(".out_proj")]
        assert f"{own} is computed from other tensors (" in reason
    small = assert_cut(model, x)
    assert computed(small.get_submodule(layer)) == own or kind == "transformer"


@pytest.mark.parametrize(("kind", "name", "how"), CASES)
def test_a_gated_model_with_a_computed_weight_is_cut_or_keeps_its_width(kind: str, name: str, how: str) -> None:
    build, batch, _ = MODELS[kind]
    model, x = build(), batch()
    dampr.convert(model, example_inputs=x)
    wrap(model, name, how)
    model(x)
    dampr.summary(model, example_inputs=x)
    small = assert_cut(model, x)
    layer, _, own = name.rpartition(".")
    if name in (*NEVER_GATED, "0.weight", "0.bias") and kind != "transformer":
        assert computed(small.get_submodule(layer)) == own
        notes = small.dampr_manifest["closed_but_kept"]
        assert any(
            f"the {own} of {type(model.get_submodule(layer)).__name__} {layer!r} is computed from" in note
            for note in notes.values()
        )


def test_a_plan_prunes_around_a_spectral_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Linear(12, 8)),
        nn.ReLU(),
    )
    model.append(nn.Linear(8, 2))
    x = torch.randn(32, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    plan = dampr.Plan(model, x, macs=0.7, steps=40)
    for _ in range(40):
        optimizer.zero_grad()
        (model(x).square().mean() + plan.penalty()).backward()
        optimizer.step()
        plan.step(optimizer)
    small = plan.finish()
    assert parametrize.is_parametrized(small[4])
    assert small(x).shape == (32, 2)
