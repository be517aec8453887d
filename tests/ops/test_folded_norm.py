"""A norm with gates in gain and bias as one node of autograd: the same as the smaller ops,
and torch's own errors and side effects.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dampr
from dampr.nn import GatedBatchNorm1d, GatedBatchNorm2d, GatedLayerNorm
from dampr.ops import select

pytestmark = pytest.mark.skipif(dampr.backend_info()["cpp"].startswith("missing"), reason="no extension")

NODE, PASS = "_FoldedNormBackward", "_FusedNormBackward"  # around torch's norm, and norm and gates in one pass
LAYERS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "vectors": (lambda **k: GatedBatchNorm1d(5, **k), (7, 5)),
    "images": (lambda **k: GatedBatchNorm2d(5, **k), (3, 5, 4, 6)),
    "layer": (lambda **k: GatedLayerNorm(6, **k), (3, 5, 6)),
    "layer of two": (lambda **k: GatedLayerNorm((5, 6), **k), (3, 5, 6)),
    "without bias": (lambda **k: GatedLayerNorm(6, bias=False, **k), (3, 6)),
    "without statistics": (lambda **k: GatedBatchNorm2d(5, track_running_stats=False, **k), (3, 5, 4, 6)),
}


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    build, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(len(name))
    layer = build()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    x = torch.randn(shape, generator=generator)
    return layer.to(dtype), (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x).to(dtype)


def run(layer: nn.Module, x: Tensor, wanted: list[Tensor] | None = None) -> tuple[str, list[Tensor]]:
    """The name of the node, then y and the gradients that are wanted, or all."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_(wanted is None)
    y = layer(x)
    leaves = [x, *layer.parameters()] if wanted is None else wanted
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return type(y.grad_fn).__name__, [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def apart(monkeypatch: pytest.MonkeyPatch, layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The same by way of the smaller ops."""
    with monkeypatch.context() as patch:
        for name in ("folded_norm", "fused_norms"):
            patch.delattr(select(torch.device("cpu"), x.dtype), name)
        name, found = run(layer, x)
    assert name not in (NODE, PASS)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LAYERS)
def test_one_node_computes_what_several_do(
    monkeypatch: pytest.MonkeyPatch, name: str, training: bool, dtype: torch.dtype
) -> None:
    layer, x = built(name, dtype)
    layer.train(training)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    node, found = run(layer, x)
    after = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(before)
    passes = (
        training and not name.startswith("layer") and name != "without bias" and dtype in (torch.float32, torch.float64)
    )
    assert node == (PASS if passes else NODE)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if passes and dtype == torch.float32 else {}
    for a, b in zip(found, apart(monkeypatch, layer, x), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        assert a.stride() == b.stride()
    exact = {} if passes else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(after, dict(layer.state_dict()), **exact)


@pytest.mark.parametrize("name", LAYERS)
def test_each_gradient_is_the_same_whichever_others_are_asked_for(name: str) -> None:
    layer, x = built(name)
    everything = dict(zip(dict(layer.named_parameters()), run(layer, x)[1][2:], strict=True))
    for count in range(1, len(everything) + 1):
        for wanted in itertools.combinations(everything, count):
            for key, p in layer.named_parameters():
                p.requires_grad_(key in wanted)
            found = run(layer, x, [dict(layer.named_parameters())[key] for key in wanted])[1][1:]
            for key, grad in zip(wanted, found, strict=True):
                torch.testing.assert_close(grad, everything[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_who_looks_on_in_the_backward_sees_the_same_gradients_and_statistics_move_once(name: str) -> None:
    layer, x = built(name)
    expected = run(layer, x)[1][1:]
    torch.manual_seed(5)
    x = x.detach().requires_grad_()
    y = layer(x)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    dy = torch.linspace(-1, 2, y.numel()).view(y.shape)
    with FlopCounterMode(display=False):
        found = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(dict(layer.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_without_gradients_nothing_is_recorded_and_nothing_differs(name: str) -> None:
    layer, x = built(name)
    torch.manual_seed(5)
    with torch.no_grad():
        y = layer(x)
    assert y.grad_fn is None
    torch.testing.assert_close(y, run(layer, x)[1][0], rtol=0, atol=0)


def test_what_torch_refuses_is_refused_and_nothing_at_all_is_normalised_as_torch_does() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        GatedBatchNorm2d(5)(torch.randn(1, 5, 1, 1))
    assert GatedBatchNorm2d(5)(torch.randn(0, 5, 2, 2)).shape == (0, 5, 2, 2)
    for channels in (3, 8):
        for how in ({}, {"affine": False}, {"track_running_stats": False}):
            for training in (True, False):
                with pytest.raises(RuntimeError):
                    GatedBatchNorm2d(5, **how).train(training)(torch.randn(2, channels, 4, 4))
    assert GatedLayerNorm(5)(torch.randn(0, 5)).shape == (0, 5)


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "how", [{}, {"per_sample": True}, {"per_sample": True, "activation": "relu"}, {"activation": "relu"}], ids=str
)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_the_compiler_sees_computes_the_same(training: bool, affine: bool, how: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer, x = GatedBatchNorm2d(5, affine=affine, **how).train(training), built("images")[1]
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    expected = run(layer, x)[1]
    after = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(before)
    found = run(torch.compile(layer, backend="aot_eager", fullgraph=True), x)[1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(layer.state_dict()), after)


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("narrow", ["weight", "statistics", "all", "all but a gain"])
def test_narrow_vectors_compile_as_they_run(narrow: str) -> None:
    torch._dynamo.reset()
    layer, x = GatedBatchNorm2d(5, affine=narrow != "all but a gain", per_sample=True), built("images")[1]
    if narrow.startswith("all"):
        layer, x = layer.bfloat16(), x.bfloat16()
    if narrow == "weight":
        layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    if narrow == "statistics":
        layer.running_mean, layer.running_var = layer.running_mean.bfloat16(), layer.running_var.bfloat16()
    expected = run(layer, x)[1]
    found = run(torch.compile(layer, backend="aot_eager", fullgraph=True), x)[1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * max(1.0, float(b.abs().max())))


def test_forward_mode_goes_through_a_norm_in_evaluation() -> None:
    layer, x = built("images")
    layer.eval()
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    scale = layer.weight * layer.gate() / (layer.running_var + layer.eps).sqrt()
    torch.testing.assert_close(
        tangent, scale.view(1, -1, 1, 1).expand_as(x).contiguous(memory_format=torch.channels_last)
    )


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_compiler_keeps_no_gate_of_the_size_of_activations() -> None:
    torch._dynamo.reset()
    kept: list[Tensor] = []
    layer, x = GatedBatchNorm1d(6, per_sample=True), torch.randn(8, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert [t.shape for t in kept if t.numel() == x.numel()] == [x.shape]
