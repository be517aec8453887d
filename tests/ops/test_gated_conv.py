"""Convolution and gates as one node of autograd: the same as the smaller ops, nothing kept beside inputs,
and torch's own errors.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dampr
from dampr import functional
from dampr.nn import GatedConv2d
from dampr.ops import forced_route, select

pytestmark = pytest.mark.skipif(dampr.backend_info()["cpp"].startswith("missing"), reason="no extension")

NAMES = ("x", "weight", "bias", "input_gate", "output_gate")
PLACES = {"input": ("input_gate",), "output": ("output_gate",), "both": ("input_gate", "output_gate")}
NODE = "_GatedConvBackward"


def problem(
    place: str, *, dims: int = 2, last: bool = False, bias: bool = True, groups: int = 1
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(dims + groups)
    size = (7, 6)[:dims]
    shapes = {
        "x": (3, 4, *size),
        "weight": (6, 4 // groups, *(3, 2)[:dims]),
        "bias": (6,),
        "input_gate": (4,),
        "output_gate": (6,),
    }
    names = ("x", "weight", *["bias"] * bias, *PLACES[place])
    made = {name: torch.randn(shapes[name], generator=generator) for name in names}
    if last:
        made |= {name: made[name].contiguous(memory_format=torch.channels_last) for name in ("x", "weight")}
    return {name: t.requires_grad_() for name, t in made.items()}


def run(data: dict[str, torch.Tensor], wanted: tuple[str, ...] = NAMES, **how: Any) -> tuple[str, list[torch.Tensor]]:
    function = functional.gated_conv2d if data["x"].dim() == 4 else functional.gated_conv1d
    y = function(**data, seed=5, **how)
    leaves = [t for name, t in data.items() if name in wanted]
    dy = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)
    return type(y.grad_fn).__name__, [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def apart(monkeypatch: pytest.MonkeyPatch, data: dict[str, torch.Tensor], **how: Any) -> list[torch.Tensor]:
    """The same by way of the smaller ops."""
    with monkeypatch.context() as patch:
        patch.delattr(select(torch.device("cpu"), data["x"].dtype), "gated_conv")
        name, found = run(data, **how)
    assert name != NODE
    return found


@pytest.mark.parametrize("route", ["fold", "activations"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("dims", "last", "groups"), [(1, False, 1), (2, False, 1), (2, True, 1), (2, False, 2), (2, True, 2)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_one_node_computes_what_several_do(
    monkeypatch: pytest.MonkeyPatch, route: str, place: str, dims: int, last: bool, groups: int, bias: bool
) -> None:
    data = problem(place, dims=dims, last=last, bias=bias, groups=groups)
    for per_sample in (False, True) if route == "activations" else (False,):
        how: dict[str, Any] = {"groups": groups, "per_sample": per_sample, "stride": 2, "padding": 1}
        with forced_route("passes" if per_sample else route):
            name, found = run(data, **how)
            one_fold = place == "output" or (place == "input" and last and groups == 1)
            assert (name == NODE) == (route == "activations" or one_fold)
            for a, b in zip(found, apart(monkeypatch, data, **how), strict=True):
                torch.testing.assert_close(a, b)
                assert a.stride() == b.stride()


@pytest.mark.parametrize("route", ["fold", "activations"])
@pytest.mark.parametrize("place", PLACES)
def test_each_gradient_is_the_same_whichever_others_are_asked_for(route: str, place: str) -> None:
    data = problem(place, last=True)
    with forced_route(route):
        everything = dict(zip(data, run(data)[1][1:], strict=True))
        for count in range(1, len(data)):
            for wanted in itertools.combinations(data, count):
                some = {name: t.detach().requires_grad_(name in wanted) for name, t in data.items()}
                for name, grad in zip(wanted, run(some, wanted)[1][1:], strict=True):
                    torch.testing.assert_close(
                        grad, everything[name], msg=lambda m, n=name, w=wanted: f"{n} of {w}: {m}"
                    )


@pytest.mark.parametrize("route", ["fold", "activations"])
def test_only_an_activation_that_gates_multiply_is_kept(route: str) -> None:
    data, kept = problem("output"), []
    with forced_route(route), torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        functional.gated_conv2d(**data, seed=5)
    own = {t.data_ptr() for t in data.values()}
    extra = [tuple(t.shape) for t in kept if t.data_ptr() not in own and t.dtype != torch.int64]
    assert extra == ([] if route == "fold" else [(3, 6, 5, 5)])


@pytest.mark.parametrize("route", ["fold", "activations"])
@pytest.mark.parametrize("place", PLACES)
def test_who_counts_only_the_backward_sees_its_operators(route: str, place: str) -> None:
    data = problem(place, last=True)
    with forced_route(route):
        y = functional.gated_conv2d(**data, seed=5)
        plain = torch.autograd.grad(y, list(data.values()), torch.ones_like(y), retain_graph=True)
        with FlopCounterMode(display=False) as counter:
            seen = torch.autograd.grad(y, list(data.values()), torch.ones_like(y))
    assert counter.get_total_flops() >= 2 * 2 * y.numel() * data["weight"][0].numel()
    for a, b in zip(plain, seen, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("route", ["fold", "activations"])
def test_under_autocast_gradients_have_the_dtype_of_the_parameters(monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    data = problem("output", last=True)
    with forced_route(route), torch.autocast("cpu", torch.bfloat16):
        name, found = run(data)
        expected = apart(monkeypatch, data)
    assert name == NODE
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.detach().float().abs().max()))


def test_gates_are_where_there_is_less_to_multiply() -> None:
    deep, wide = GatedConv2d(64, 64, 3, padding=1), GatedConv2d(4, 4, 3, padding=1)
    assert dampr.explain(deep, torch.randn(2, 64, 4, 4)).route == "activations"
    assert dampr.explain(deep, torch.randn(2, 64, 64, 64)).route == "fold"
    assert dampr.explain(wide, torch.randn(2, 4, 16, 16)).route == "fold"
    assert dampr.explain(GatedConv2d(64, 64, 3, granularity="weight"), torch.randn(2, 64, 4, 4)).route == "fold"
    strided = GatedConv2d(64, 64, 3, stride=4, padding=1)
    assert dampr.explain(strided, torch.randn(2, 64, 32, 32)).route == "activations"
    strided.granularity = "input"
    assert dampr.explain(strided, torch.randn(2, 64, 32, 32)).route == "fold"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "same", "stride": 2}, "^padding='same' with stride=2: expected a stride of 1"),
        ({"padding": "everywhere"}, "^padding='everywhere': expected 'same'"),
        ({"stride": (1, 2, 3)}, r"^stride=\(1, 2, 3\): expected"),
        ({"padding": 1.5}, "^padding=1.5: expected"),
    ],
)
def test_what_torch_refuses_it_refuses_by_the_name_of_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.gated_conv2d(**problem("output"), seed=5, **arguments)


def test_without_gradients_there_is_no_node() -> None:
    data = {name: t.detach() for name, t in problem("output").items()}
    assert functional.gated_conv2d(**data, seed=5).grad_fn is None
    with torch.no_grad():
        assert functional.gated_conv2d(**problem("output"), seed=5).grad_fn is None
