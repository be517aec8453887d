"""Hooks of users: those that change values are part of the model, those that observe are called by nobody but them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dampr
from dampr.gates import Fixed
from dampr.prune import hooks, inputs
from tests.halves import cut_in_half
from tests.models import ALL


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.wide, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.wide(self.rnn(x)[0])))
        return y


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.layer(self.first(x))).mean(1))
        return y


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def changed(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Tensors in tuples, changed."""
    if isinstance(values, tuple):
        return tuple(changed(value, change) for value in values)
    return change(values) if isinstance(values, Tensor) else values


CHANGES: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "scales outputs": (True, lambda t: t * 1.5),
    "shifts outputs": (True, lambda t: t + 0.3),
    "scales inputs": (False, lambda t: t * 1.5),
    "shifts inputs": (False, lambda t: t + 0.3),
}
PLACES = [
    *(("plain", name) for name in ("", "0", "1", "2", "4")),
    *(("resnet18", name) for name in ("0.0", "0.1", "1.first.1", "1.norm")),
    *(("unet", name) for name in ("down.0", "up")),
    *(("recurrent", name) for name in ("rnn", "wide", "head")),
    *(("encoder", name) for name in ("first", "layer", "layer.self_attn", "layer.linear2", "layer.norm1", "norm")),
]
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "plain": lambda: (plain(), torch.randn(4, 8)),
    "recurrent": lambda: (Recurrent(), torch.randn(2, 5, 6)),
    "encoder": lambda: (Encoder(), torch.randn(2, 5, 6)),
    **ALL,
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize(("network", "name"), PLACES)
def test_what_hooks_change_is_cut_as_it_is_masked(network: str, name: str, how: str) -> None:
    torch.manual_seed(0)
    (model, x), (outputs, change), calls = NETWORKS[network](), CHANGES[how], list[str]()
    layer = model.get_submodule(name)

    def hook(module: nn.Module, args: Any, out: Any = None) -> Any:
        calls.append(type(module).__name__)
        return changed(out if outputs else args, change)

    _ = layer.register_forward_hook(hook) if outputs else layer.register_forward_pre_hook(hook)
    model = dampr.convert(model, example_inputs=x)
    small = cut_in_half(model, x)
    calls.clear()
    inputs.evaluate(small, x)
    assert calls


def test_a_hook_that_mixes_channels_is_seen_before_training() -> None:
    model = plain()
    model[0].register_forward_hook(lambda _, args, out: out - out.mean(-1, keepdim=True))
    dampr.convert(model, example_inputs=torch.randn(4, 8))
    assert "a statistic is computed over its channels" in model.dampr_skipped["0"]
    assert isinstance(model[2], dampr.nn.GatedLinear)


def test_hooks_that_observe_see_what_their_owner_runs_and_stay() -> None:
    model, x, seen = plain(), torch.randn(4, 8), list[tuple[str, torch.Size]]()
    before = model[2].register_forward_pre_hook(lambda m, args: seen.append((type(m).__name__, args[0].shape)))
    after = model[0].register_forward_hook(lambda m, args, out: seen.append((type(m).__name__, out.shape)))
    dampr.convert(model, example_inputs=x)
    assert len(seen) == 2  # one run, which tells whether they observe
    seen.clear()
    model.eval()(x)
    assert seen == [("GatedLinear", (4, 16)), ("GatedLinear", (4, 16))]
    inputs.replace(model, {model[0].gate: Fixed((torch.arange(16) < 10).float())})
    small = dampr.compact(model, example_inputs=x)
    seen.clear()
    small(x)
    assert seen == [("Linear", (4, 10)), ("Linear", (4, 10))]
    before.remove(), after.remove()
    seen.clear()
    model(x)
    assert seen == []
    small(x)  # a copy has hooks of its own
    assert len(seen) == 2


def test_a_hook_in_a_fused_encoder_layer_observes() -> None:
    model, x, seen = Encoder().eval(), torch.randn(2, 5, 6), list[int]()
    model.layer.linear1.register_forward_hook(lambda *_: seen.append(1))
    dampr.convert(model, example_inputs=x)
    assert len(seen) == 1


def test_hooks_of_a_compacted_model_are_its_own() -> None:
    model, x, seen = plain(), torch.randn(4, 8), list[int]()
    dampr.convert(model, example_inputs=x)
    small = dampr.compact(model, example_inputs=x)
    small[0].register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen == []


def test_a_quiet_block_leaves_hooks_in_their_order() -> None:
    model, x, seen = nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2), list[str]()
    for name in "abc":
        model[0].register_forward_hook(lambda *_, name=name: seen.append(name))
    with inputs.quiet(model, x):
        model(x)
        added = model[0].register_forward_hook(lambda *_: seen.append("added"))
    seen.clear()
    model(x)
    assert seen == ["a", "b", "c", "added"]
    with inputs.quiet(model, x), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    added.remove()
    seen.clear()
    model(x)
    assert seen == ["a", "b", "c"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("what", ["weight_norm", "spectral_norm"])
def test_hooks_that_compute_weights_are_not_taken_for_observers(what: str) -> None:
    layer = getattr(nn.utils, what)(nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2))
    held = dict(layer._forward_pre_hooks)
    with inputs.quiet(model, torch.randn(3, 4)):
        assert dict(layer._forward_pre_hooks) == held
    assert any(hooks.computes(hook) for hook in held.values())


def test_a_model_that_returns_what_a_hook_collected_keeps_it() -> None:
    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.found = plain(), list[Tensor]()
            self.net[1].register_forward_hook(lambda _, args, out: self.found.append(out))

        def forward(self, x: Tensor) -> list[Tensor]:
            self.found.clear()
            return [self.net(x), *self.found]

    model, x = Taps(), torch.randn(4, 8)
    dampr.convert(model, example_inputs=x)
    assert len(model(x)) == 2
    assert model.dampr_skipped["net.0"] == "its outputs are the model's own"
