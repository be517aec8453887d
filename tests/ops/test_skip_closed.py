"""A layer on its open gates gives what the whole layer gives: every output, every gradient,
and nothing kept but inputs and a list.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dampr
from dampr import functional
from dampr.nn import GatedConv2d, GatedLinear
from dampr.ops import forced_route
from dampr.ops.skip_closed import WORK
from dampr.spec import hard_concrete, mask, value

pytestmark = pytest.mark.skipif(dampr.backend_info()["cpp"].startswith("missing"), reason="no extension")

NODE = "_SkipClosedBackward"
CLOSED = {"none": 0.0, "some": 0.4, "all but one": None, "all": 1.0}
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "linear": ((6, 11), (9, 11)),
    "linear, three dimensions": ((2, 3, 11), (9, 11)),
    "linear, no rows": ((0, 11), (9, 11)),
    "linear, of images": ((2, 3, 4, 11), (9, 11)),
    "conv1d": ((3, 11, 7), (9, 11, 2)),
    "conv2d": ((3, 11, 7, 6), (9, 11, 3, 2)),
    "conv2d, channels last": ((3, 11, 7, 6), (9, 11, 3, 2)),
    "conv2d, weight channels last": ((3, 11, 7, 6), (9, 11, 1, 1)),
}


def places_of(kind: str) -> tuple[tuple[str, ...], ...]:
    alone: tuple[tuple[str, ...], ...] = (("output_gate",), ("input_gate",))
    return (
        alone if "last" in kind else alone[:1] if kind.startswith("conv") else (*alone, ("input_gate", "output_gate"))
    )


KINDS = [(kind, places) for kind in SHAPES for places in places_of(kind)]


def problem(
    kind: str, places: tuple[str, ...], closed: str = "some", dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(kind))
    x, weight = SHAPES[kind]
    sizes = {"x": x, "weight": weight, "bias": (9,), "input_gate": (11,), "output_gate": (9,)}
    made = {name: torch.randn(sizes[name], generator=generator) for name in ("x", "weight", "bias", *places)}
    for name in places:
        n = made[name].numel()
        share = CLOSED[closed]
        shut = torch.randperm(n, generator=generator)[: n - 1 if share is None else round(share * n)]
        made[name][shut] = -20.0
        made[name][[j for j in range(n) if j not in shut]] += 4.0
    if "last" in kind or "images" in kind:
        names = ("weight",) if "weight" in kind else ("x",) if "images" in kind else ("x", "weight")
        made |= {name: made[name].to(memory_format=torch.channels_last) for name in names}
    return {name: t.to(dtype).requires_grad_() for name, t in made.items()}


def call(data: dict[str, torch.Tensor], route: str | None, **how: Any) -> torch.Tensor:
    dims = data["weight"].dim()
    function: Any = {2: functional.gated_linear, 3: functional.gated_conv1d, 4: functional.gated_conv2d}[dims]
    how = {"seed": 5, **({"stride": 2, "padding": 1} if dims > 2 else {}), **how}
    with forced_route(route):
        y: torch.Tensor = function(**data, **how)
    return y


def gradients(y: torch.Tensor, leaves: list[torch.Tensor], **how: Any) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, leaves, torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype), **how)


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize(("kind", "places"), KINDS)
def test_it_equals_the_whole_layer(kind: str, places: tuple[str, ...], closed: str) -> None:
    data = problem(kind, places, closed)
    y, leaves = call(data, "live"), list(data.values())
    with forced_route("fold"):
        whole = call(data, "fold")
        expected = gradients(whole, leaves)
    assert type(y.grad_fn).__name__ == NODE
    assert y.stride() == whole.stride()
    torch.testing.assert_close(y, whole, atol=1e-12, rtol=0)
    for name, a, b in zip(data, gradients(y, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert a.stride() == b.stride(), name
    if closed == "all" and "output_gate" in places:
        assert not y.any()


@pytest.mark.parametrize(("kind", "places"), [(k, p) for k, p in KINDS if k in ("linear", "conv2d, channels last")])
def test_each_gradient_is_the_same_whichever_others_are_asked_for(kind: str, places: tuple[str, ...]) -> None:
    data = problem(kind, places)
    everything = dict(zip(data, gradients(call(data, "live"), list(data.values())), strict=True))
    for count in range(1, len(data)):
        for wanted in itertools.combinations(data, count):
            some = {name: t.detach().requires_grad_(name in wanted) for name, t in data.items()}
            for name, grad in zip(wanted, gradients(call(some, "live"), [some[n] for n in wanted]), strict=True):
                torch.testing.assert_close(grad, everything[name], msg=lambda m, n=name, w=wanted: f"{n} of {w}: {m}")


@pytest.mark.parametrize(("kind", "places"), KINDS)
def test_nothing_is_kept_but_inputs_and_a_list(kind: str, places: tuple[str, ...]) -> None:
    data, kept = problem(kind, places), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        call(data, "live")
    own = {t.data_ptr() for t in data.values()}
    extra = [t for t in kept if t.data_ptr() not in own]
    assert all(t.dtype in (torch.int32, torch.int64) and t.dim() == 1 for t in extra)


@pytest.mark.parametrize(("kind", "places"), [(k, p) for k, p in KINDS if k in ("linear", "conv2d")])
def test_who_counts_the_backward_sees_its_operators(kind: str, places: tuple[str, ...]) -> None:
    data = problem(kind, places)
    y, leaves = call(data, "live"), list(data.values())
    plain = gradients(y, leaves, retain_graph=True)
    with FlopCounterMode(display=False) as counter:
        counted = gradients(y, leaves)
    assert counter.get_total_flops() >= 2 * 2 * y.numel() * data["weight"][0].numel()
    for a, b in zip(plain, counted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kind", "places"), [(k, p) for k, p in KINDS if k in ("linear", "conv2d, channels last")])
def test_under_autocast_gradients_have_the_dtype_of_the_parameters(kind: str, places: tuple[str, ...]) -> None:
    data = problem(kind, places, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, whole = call(data, "live"), call(data, "activations")
    assert (type(y.grad_fn).__name__, y.dtype) in ((NODE, torch.bfloat16), ("ToCopyBackward0", torch.bfloat16))
    leaves = list(data.values())
    with forced_route("activations"):
        expected = whole, *gradients(whole, leaves)
    for a, b in zip((y, *gradients(y, leaves)), expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03 * float(b.detach().float().abs().max()))


def closing(granularity: str, share: float) -> GatedLinear:
    layer = GatedLinear(512, 512, granularity=granularity)
    layer.gate.log_alpha.data.fill_(20.0)
    layer.gate.log_alpha.data[: round(share * 512)] = -20.0
    return layer


@pytest.mark.parametrize("granularity", ["output", "input"])
def test_it_is_chosen_where_enough_is_closed(granularity: str) -> None:
    x = torch.randn(WORK // 512**2 * 4, 512)
    nodes = {share: type(closing(granularity, share)(x).grad_fn).__name__ for share in (0.0, 0.05, 0.5, 1.0)}
    assert {share: name == NODE for share, name in nodes.items()} == {0.0: False, 0.05: False, 0.5: True, 1.0: True}
    few_rows = closing(granularity, 0.5)(x[:8])
    assert type(few_rows.grad_fn).__name__ != NODE
    with FlopCounterMode(display=False) as counter:
        closing(granularity, 0.5)(x)
    assert counter.get_total_flops() == 2 * x.shape[0] * 512 * 512


def test_a_convolution_takes_it_too() -> None:
    layer = GatedConv2d(64, 64, 3, padding=1)
    layer.gate.log_alpha.data.fill_(20.0)[:32] = -20.0
    y = layer(torch.randn(8, 64, 28, 28))
    assert type(y.grad_fn).__name__ == NODE
    assert not y[:, :32].any()
    assert y[:, 32:].any(dim=(0, 2, 3)).all()
    assert type(GatedConv2d(64, 64, 3, padding=1, per_sample=True)(torch.randn(8, 64, 28, 28)).grad_fn).__name__ != NODE


@pytest.mark.filterwarnings("ignore:.*Profiler:UserWarning")
def test_a_checkpointed_layer_may_be_profiled_in_its_backward_alone() -> None:
    layer, x = closing("output", 0.5), torch.randn(WORK // 512**2 * 2, 512, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    with torch.autograd.profiler.profile():
        y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("spec", [value(), mask()])
def test_gates_that_learn_while_closed_take_another_way(spec: Any) -> None:
    data = problem("linear", ("output_gate",))
    data["output_gate"].data[:5] = 0.0
    with pytest.raises(ValueError, match="route 'live' cannot serve gates of a family"):
        call(data, "live", spec=spec)
    data["output_gate"].requires_grad_(False)
    y = call(data, "live", spec=spec)
    assert type(y.grad_fn).__name__ == NODE
    torch.testing.assert_close(y, call(data, "fold", spec=spec))
    assert not y[:, :5].any()


def test_a_convolution_that_it_cannot_serve_says_so() -> None:
    data = problem("conv2d", ("output_gate",)) | {"input_gate": torch.zeros(11, dtype=torch.float64)}
    with pytest.raises(ValueError, match="route 'live' cannot serve"):
        call(data, "live")
    del data["output_gate"]
    with pytest.raises(ValueError, match="whose weight is not channels last"):
        call(data, "live")


@pytest.mark.parametrize("rule", ["paper", "median", "binary"])
def test_evaluation_skips_as_well(rule: str) -> None:
    data = {name: t.detach() for name, t in problem("linear", ("input_gate",)).items()}
    y, whole = (call(data, route, spec=hard_concrete(rule)) for route in ("live", "fold"))
    torch.testing.assert_close(y, whole)
