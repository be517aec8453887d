"""Weights that are computed from others, before and after gates: parametrizations,
both kinds of weight_norm and spectral_norm, prune.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from dampr import gates
from dampr import nn as gated

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


class Affine(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight + 0.1


WRAPPED: dict[str, Callable[[nn.Module, str], Any]] = {
    "parametrization": lambda layer, name: parametrize.register_parametrization(layer, name, Affine()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm by hooks": nn.utils.weight_norm,
    "spectral_norm by hooks": nn.utils.spectral_norm,
    "prune": lambda layer, name: prune.l1_unstructured(layer, name, 0.5),
}
MATRICES_ONLY = "orthogonal"


def run(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x, x, x) if isinstance(layer, (nn.MultiheadAttention, gated.PrunedMultiheadAttention)) else layer(x)
    return y[0] if isinstance(y, tuple) else y


KINDS: dict[str, tuple[Callable[[], nn.Module], Any, tuple[int, ...], list[str]]] = {
    "Linear": (lambda: nn.Linear(6, 4), gated.GatedLinear, (3, 6), ["weight", "bias"]),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3), gated.GatedConv1d, (2, 6, 5), ["weight", "bias"]),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3), gated.GatedConv2d, (2, 6, 5, 5), ["weight", "bias"]),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), gated.GatedBatchNorm1d, (5, 6), ["weight", "bias"]),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), gated.GatedBatchNorm2d, (5, 6, 2, 2), ["weight", "bias"]),
    "LayerNorm": (lambda: nn.LayerNorm(6), gated.GatedLayerNorm, (5, 6), ["weight", "bias"]),
    "Embedding": (lambda: nn.Embedding(6, 4), gated.GatedEmbedding, (), ["weight"]),
    "RNN": (lambda: nn.RNN(6, 4), gated.GatedRNN, (3, 2, 6), ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"]),
    "GRU": (lambda: nn.GRU(6, 4), gated.GatedGRU, (3, 2, 6), ["weight_ih_l0", "weight_hh_l0"]),
    "LSTM": (lambda: nn.LSTM(6, 4, proj_size=3), gated.GatedLSTM, (3, 2, 6), ["weight_hh_l0", "weight_hr_l0"]),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(8, 2),
        gated.GatedMultiheadAttention,
        (3, 2, 8),
        ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"],
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0),
        gated.GatedTransformerEncoderLayer,
        (3, 2, 8),
        [
            "linear1.weight",
            "linear2.weight",
            "linear2.bias",
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
            "norm1.weight",
        ],
    ),
}
CASES = [
    pytest.param(kind, name, how, id=f"{kind}-{name}-{how}")
    for kind, (*_, names) in KINDS.items()
    for name in names
    for how in WRAPPED
    if how != MATRICES_ONLY or ("weight" in name and "Norm" not in kind and "norm" not in name)
]


def built(kind: str) -> nn.Module:
    """With no parameter at a special value."""
    torch.manual_seed(0)
    layer = KINDS[kind][0]()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return layer


def wrap(layer: nn.Module, name: str, how: str) -> nn.Module:
    owner, _, own = name.rpartition(".")
    torch.manual_seed(1)
    WRAPPED[how](layer.get_submodule(owner), own)
    return layer


def batch(kind: str) -> Tensor:
    shape = KINDS[kind][2]
    return torch.randn(shape) if shape else torch.tensor([[0, 5], [3, 3]])


def opened(layer: nn.Module, shut: bool = False) -> Any:
    for module in layer.modules():
        if isinstance(module, gates.HardConcrete):
            module.log_alpha.data.fill_(100.0)
            module.log_alpha.data[: int(shut)] = -9.0
    return layer


def own(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in layer.named_parameters() if ".gate." not in f".{name}"}


@pytest.mark.parametrize(("kind", "name", "how"), CASES)
def test_before_gates_it_is_refused_by_the_name_of_the_weight(kind: str, name: str, how: str) -> None:
    layer = wrap(built(kind), name, how)
    state = copy.deepcopy(layer.state_dict())
    if name in ("linear2.weight", "linear2.bias", "norm1.weight"):  # which have no gates
        other = opened(KINDS[kind][1].from_dense(layer)).eval()
        x = batch(kind)
        torch.testing.assert_close(run(other, x), run(layer.eval(), x))
    else:
        inner = name.removeprefix("self_attn.").removeprefix("linear1.")
        with pytest.raises(
            TypeError, match=rf"^layer=\w+: its {inner} is computed from other tensors \(parametrize, .* then wrap it$"
        ):
            KINDS[kind][1].from_dense(layer)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize(("kind", "name", "how"), CASES)
def test_after_gates_values_and_gradients_are_those_of_the_dense_layer(kind: str, name: str, how: str) -> None:
    if "out_proj" in name and how == "spectral_norm by hooks":
        pytest.skip("nn.MultiheadAttention never calls the hook, so its weight has a spectral norm of any size")
    dense = wrap(built(kind), name, how)
    other = wrap(opened(KINDS[kind][1].from_dense(built(kind))), name, how)
    x = batch(kind)
    found = []
    for layer in (dense, other):
        # torch reads such a weight of a recurrent layer more than once a call
        y = run(layer.train("spectral" not in how), x)
        parameters = own(layer)
        total = y.double().square().sum()
        found.append(
            (
                y,
                dict(
                    zip(
                        parameters,
                        torch.autograd.grad(total, list(parameters.values()), allow_unused=True),
                        strict=True,
                    )
                ),
            )
        )
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "name", "how"), CASES)
def test_what_becomes_plain_has_the_weights_of_now(kind: str, name: str, how: str) -> None:
    """Not those of the last call, which is what a hook has left; and reading them in training mode moves nothing."""
    layer = wrap(opened(KINDS[kind][1].from_dense(built(kind)), shut=True), name, how)
    x = batch(kind)
    run(layer, x).sum().backward()
    with torch.no_grad():
        for p in own(layer).values():
            p.mul_(1.1).add_(0.01)
    state = copy.deepcopy(layer.state_dict())
    dense = layer.to_dense()
    small = layer.compacted() if hasattr(layer, "compacted") and kind != "LayerNorm" else None
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    for part in layer.modules():
        assert not parametrize.is_parametrized(part) or all(m.training for m in part.parametrizations.modules())
    y = run(layer.eval(), x)
    torch.testing.assert_close(run(dense.eval(), x), y, rtol=1e-4, atol=1e-5)
    if small is not None and kind in ("TransformerEncoderLayer", "MultiheadAttention"):
        torch.testing.assert_close(run(small[0].eval(), x), y, rtol=1e-4, atol=1e-5)
    elif small is not None:
        torch.testing.assert_close(run(small[0].eval(), x) * small[2], y[..., small[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["weight_norm by hooks", "prune", "spectral_norm by hooks"])
def test_hooks_on_the_last_projection_run_though_nobody_calls_it(how: str) -> None:
    """In nn.MultiheadAttention they do not: it trains one step on the weights of before."""
    layer = wrap(opened(gated.GatedMultiheadAttention.from_dense(built("MultiheadAttention"))), "out_proj.weight", how)
    x = torch.randn(3, 2, 8)
    for _ in range(2):
        layer.zero_grad()
        run(layer, x).square().sum().backward()
        name = next(n for n, _ in layer.out_proj.named_parameters() if n.startswith("weight"))
        p = layer.out_proj.get_parameter(name)
        assert bool(p.grad.any())
        p.data.add_(p.grad, alpha=-0.1)
    torch.testing.assert_close(run(layer.eval(), x), run(layer.to_dense(), x))


def test_a_branch_that_ends_in_a_computed_weight_keeps_its_gate_as_a_constant() -> None:
    for how, name in (("prune", "bias"), ("weight_norm", "weight")):
        layer = gated.GatedResidual(wrap(nn.Linear(4, 4), name, how)).eval()
        layer.gate.log_alpha.data.fill_(0.3)
        x = torch.randn(2, 4)
        y = layer(x)
        torch.testing.assert_close(layer.to_dense()(x), y)


@pytest.mark.parametrize("how", ["weight_norm", "prune"])
def test_a_gate_of_a_sublayer_goes_into_a_computed_weight_only_where_it_can(how: str) -> None:
    layer = wrap(built("TransformerEncoderLayer"), "linear2.weight", how)
    with pytest.raises(
        ValueError, match="^gate=DiscriminativeMask: fresh gates are not 1, and a weight that is computed"
    ):
        gated.GatedTransformerEncoderLayer.from_dense(layer, gate="dam", parts=("sublayers",))
    other = gated.GatedTransformerEncoderLayer.from_dense(layer, parts=("sublayers",)).eval()
    for gate in other.sublayer_gates:
        gate.gate.log_alpha.data.fill_(0.3)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(other.to_dense()(x), other(x))
    torch.testing.assert_close(other.compacted()[0](x), other(x))


def test_a_penalty_on_squares_counts_the_weights_of_now() -> None:
    layer = prune.l1_unstructured(opened(gated.GatedLinear(6, 4)), "weight", 0.5)
    layer(torch.randn(2, 6)).sum().backward()
    layer.weight_orig.data.mul_(3.0)
    weight = layer.weight_orig * layer.weight_mask
    expected = 4 * 7 + 0.5 * (weight.square().sum() + layer.bias.square().sum())
    torch.testing.assert_close(layer.penalty(prior_precision=1.0), expected.float(), rtol=1e-4, atol=1e-4)
