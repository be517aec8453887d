"""GatedConv1d and GatedConv2d are convolutions with gates: values and all gradients against float64, every argument,
every backend.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr import functional, philox, reference
from dampr.nn import GatedConv1d, GatedConv2d, GatedConv3d
from dampr.spec import hard_concrete, value
from dampr.testing import compare
from tests.backends import ON_CPU

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2, "padding": (1, 0)},
    {"groups": 4},
]
SHAPE = (3, 4, 7, 6)


def problem(arguments: dict[str, Any], dtype: torch.dtype, last: bool, kernel: int = 3) -> dict[str, torch.Tensor]:
    groups = arguments.get("groups", 1)
    made = {"x": torch.randn(SHAPE), "weight": torch.randn(8, 4 // groups, kernel, kernel) / 4, "bias": torch.randn(8)}
    made = {name: t.to(dtype) for name, t in made.items()}
    if last:
        made |= {name: made[name].contiguous(memory_format=torch.channels_last) for name in ("x", "weight")}
    return made


def gradients(y: torch.Tensor, leaves: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def truth(
    made: dict[str, torch.Tensor],
    gates: dict[str, Any],
    arguments: dict[str, Any],
    seed: torch.Tensor,
    dtype: torch.dtype,
) -> Any:
    leaves = {name: t.to(dtype).clone().requires_grad_() for name, t in {**made, **gates["tensors"]}.items()}
    own = leaves["x"], leaves["weight"], leaves["bias"]
    spec = hard_concrete()
    if "weight_gate" in leaves:
        y = reference.weight_gated_conv(*own, leaves["weight_gate"], seed, spec, gates["block"], **arguments)
    else:
        ends = leaves.get("input_gate"), leaves.get("output_gate")
        second = seed if ends[0] is None else seed ^ philox.SECOND_STREAM
        y = reference.gated_conv(*own, *ends, seed, second, spec, gates["per_sample"], **arguments)
    return gradients(y, leaves, 7)


@pytest.mark.parametrize("groups", [torch.tensor(2), torch.tensor([2]), torch.tensor([2]).numpy()[0]])
def test_groups_are_a_number_also_in_a_tensor(groups: Any) -> None:
    x, weight, gate = torch.randn(SHAPE), torch.randn(8, 2, 3, 3), torch.randn(8)
    given = {"output_gate": gate, "seed": 3}
    found = functional.gated_conv2d(x, weight, groups=groups, **given)
    assert torch.equal(found, functional.gated_conv2d(x, weight, groups=2, **given))


def placements(groups: int) -> list[dict[str, Any]]:
    ends = {"input": {"input_gate": torch.randn(4)}, "output": {"output_gate": torch.randn(8)}}
    ends["both"] = ends["input"] | ends["output"]
    found = [{"tensors": t, "per_sample": each, "block": None} for t in ends.values() for each in (False, True)]
    found.append({"tensors": {"weight_gate": torch.randn(8 * 4 // groups * 9)}, "per_sample": False, "block": None})
    for block in ((1, 1), (3, 2)):
        count = -(8 // -block[0]) * -((4 // groups) // -block[1])
        found.append({"tensors": {"weight_gate": torch.randn(count)}, "per_sample": False, "block": block})
    return found


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_values_and_every_gradient_match_float64(backend: str, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    seed, gate_dtype = torch.tensor([11]), torch.float64 if dtype == torch.float64 else torch.float32
    for last, gates in itertools.product((False, True), placements(arguments.get("groups", 1))):
        made = problem(arguments, dtype, last)
        tensors = {name: t.to(gate_dtype) for name, t in gates["tensors"].items()}
        leaves = {name: t.clone().requires_grad_() for name, t in {**made, **tensors}.items()}
        own = leaves["x"], leaves["weight"], leaves["bias"]
        how = {name: leaves[name] for name in tensors} | {"per_sample": gates["per_sample"], "block": gates["block"]}
        with dampr.backend(backend):
            y = functional.gated_conv2d(*own, **arguments, **how, seed=seed)
            found = gradients(y, leaves, 7)
        assert y.dtype == dtype
        if last:
            assert y.is_contiguous(memory_format=torch.channels_last)
        exact, plain = (
            truth(made, gates, arguments, seed, kind)
            for kind in (torch.float64, gate_dtype if dtype == gate_dtype else dtype)
        )
        for name, t in found.items():
            assert t.shape == exact[name].shape, name
            result = compare(name, t, exact[name], plain[name], dtype)
            assert result.ok, f"{gates}, channels last {last}: {result}"


@pytest.mark.parametrize("kind", [GatedConv1d, GatedConv2d, GatedConv3d])
@pytest.mark.parametrize("granularity", ["output", "input", "weight", (2, 2)])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_a_fresh_layer_equals_the_dense_one_to_the_bit(kind: Any, granularity: Any, padding_mode: str) -> None:
    plain, size = {
        GatedConv1d: (nn.Conv1d, (9,)),
        GatedConv2d: (nn.Conv2d, (9, 5)),
        GatedConv3d: (nn.Conv3d, (9, 5, 3)),
    }[kind]
    dense = plain(4, 8, 3, padding=1, groups=2, padding_mode=padding_mode).eval()
    gated = kind.from_dense(dense, granularity=granularity).eval()
    x = torch.randn(2, 4, *size)
    assert torch.equal(gated(x), dense(x))
    assert torch.equal(gated(x[0]), dense(x[0]))
    assert gated.weight is dense.weight
    fresh = kind(4, 8, 3, padding=1, groups=2, padding_mode=padding_mode, granularity=granularity).eval()
    fresh.load_state_dict(dense.state_dict(), strict=True)
    assert torch.equal(fresh(x), dense(x))
    assert [name for name, _ in fresh.named_parameters()][:2] == ["weight", "bias"]


@pytest.mark.parametrize("granularity", ["output", "input", "weight", (3, 2), (1, 1)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_closing_gates_and_to_dense_agree_with_what_is_reported(granularity: Any, groups: int) -> None:
    torch.manual_seed(1)
    layer = GatedConv2d(4, 8, 3, groups=groups, granularity=granularity).eval()
    with torch.no_grad():
        layer.gate.parameter.copy_(torch.randn(layer.gate.num_gates) * 3)
        if granularity not in ("output", "input"):
            owner = layer._spread(torch.arange(layer.gate.num_gates)).expand(layer.weight.shape)
            layer.gate.parameter[owner[:2].unique()] = -9.0  # two filters with all of their weights
    x = torch.randn(2, 4, 7, 6)
    dense = layer.to_dense()
    assert type(dense) is nn.Conv2d
    torch.testing.assert_close(dense(x), layer(x), atol=1e-5, rtol=1e-5)
    written, read = layer.closed_channels()
    empty = dense.weight.flatten(1).eq(0).all(1).nonzero().flatten().tolist()
    assert written == (set(empty) if granularity != "input" else set())
    unread = {
        c
        for c in range(4)
        if not (
            dense.weight.view(groups, 8 // groups, 4 // groups, -1)[c // (4 // groups), :, c % (4 // groups)] != 0
        ).any()
    }
    assert read == (unread if granularity != "output" else set())
    sizes = layer.group_size() * torch.ones(layer.gate.num_gates)
    assert sizes.sum() == layer.weight.numel() + (8 if granularity == "output" else 0)
    expected = (layer.gate.open_probability() * sizes).sum()
    torch.testing.assert_close(layer.penalty(), expected)


def test_penalty_with_a_prior_matches_the_equation_group_by_group() -> None:
    for granularity in ("output", "input", "weight", (2, 2)):
        layer = GatedConv2d(4, 6, 3, groups=2, granularity=granularity)
        owner = layer._spread(torch.arange(layer.gate.num_gates)).expand(layer.weight.shape)
        pi, total = layer.gate.open_probability(), torch.zeros(())
        for g in range(layer.gate.num_gates):
            squares = layer.weight[owner == g].square().sum()
            if granularity == "output":
                squares = squares + layer.bias[g].square()
            size = (owner == g).sum() + (granularity == "output")
            total = total + pi[g] * (0.3 * size + 0.05 * squares)
        if granularity != "output":
            total = total + 0.05 * layer.bias.square().sum()
        torch.testing.assert_close(layer.penalty(0.3, 0.1), total)


def test_per_sample_draws_one_set_of_gates_for_each_image() -> None:
    layer = GatedConv2d(3, 64, 1, per_sample=True)
    with torch.no_grad():
        layer.gate.parameter.zero_()
    y = layer(torch.ones(5, 3, 4, 4))
    closed = y.eq(0).flatten(2)
    assert torch.equal(closed.all(2), closed.any(2)), "a filter is closed at every position or at none"
    assert len({tuple(row.tolist()) for row in closed.all(2)}) == 5
    with torch.no_grad():
        layer.per_sample = False
        shared = layer(torch.ones(5, 3, 4, 4)).eq(0).flatten(2).all(2)
    assert (shared == shared[0]).all()


def test_output_gates_multiply_the_bias_in_training_too() -> None:
    layer = GatedConv2d(2, 3, 1)
    with torch.no_grad():
        layer.gate.parameter.fill_(-60.0)
        assert layer(torch.randn(2, 2, 3, 3)).eq(0).all()


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("granularity", ["output", "input"])
def test_compiles_without_a_graph_break(granularity: str, per_sample: bool) -> None:
    layer = GatedConv2d(3, 4, 3, granularity=granularity, per_sample=per_sample)
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(3)
    expected = layer(x)
    torch.manual_seed(3)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert layer.gate.parameter.grad is not None


def test_autocast_gives_what_the_dense_layer_gives() -> None:
    dense = nn.Conv2d(4, 8, 3).eval()
    gated = GatedConv2d.from_dense(dense).eval()
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated(x), dense(x))
        y = gated.train()(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert gated.weight.grad.dtype == torch.float32


def test_nothing_of_activation_size_is_kept_beside_the_input() -> None:
    layer, kept = GatedConv2d(16, 16, 3, padding=1), []
    x = torch.randn(4, 16, 20, 20)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum()
    big = [t for t in kept if t.numel() >= x.numel() and t.data_ptr() != x.data_ptr()]
    assert not big, [t.shape for t in big]


@pytest.mark.parametrize(
    ("message", "call"),
    {
        r"granularity='rows': expected": lambda: GatedConv2d(2, 2, 3, granularity="rows"),
        r"per_sample=True with granularity='weight'": lambda: GatedConv2d(
            2, 2, 3, granularity="weight", per_sample=True
        ),
        r"groups=0: expected": lambda: functional.gated_conv2d(
            torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1), groups=0
        ),
        r"groups=2: expected a divisor of the 3": lambda: functional.gated_conv2d(
            torch.randn(1, 2, 3, 3), torch.randn(3, 1, 1, 1), groups=2
        ),
        r"weight\.shape=\(2, 2\): expected 4": lambda: functional.gated_conv2d(
            torch.randn(1, 2, 3, 3), torch.randn(2, 2)
        ),
        r"x\.shape=\(1, 5, 3, 3\): expected": lambda: functional.gated_conv2d(
            torch.randn(1, 5, 3, 3), torch.randn(2, 2, 1, 1)
        ),
        r"bias\.shape=\(3,\): expected \(2,\)": lambda: functional.gated_conv2d(
            torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1), torch.randn(3)
        ),
        r"output_gate\.shape=\(3,\): expected \(2,\), one gate per filter": lambda: functional.gated_conv2d(
            torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1), output_gate=torch.randn(3), seed=1
        ),
        r"seed=None": lambda: functional.gated_conv2d(
            torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1), output_gate=torch.randn(2)
        ),
        r"layer=Linear: expected exactly nn.Conv2d": lambda: GatedConv2d.from_dense(nn.Linear(2, 2)),
    }.items(),
)
def test_wrong_arguments_are_named(message: str, call: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_the_gradient_of_a_gate_is_right_by_finite_differences() -> None:
    x, weight = torch.randn(2, 4, 5, 5).double(), torch.randn(4, 2, 3, 3).double()
    for where, n in (("input_gate", 4), ("output_gate", 4)):
        for each in (False, True):
            gate = (torch.randn(n).double() * 0.3).requires_grad_()
            torch.autograd.gradcheck(
                lambda g, w, a, where=where, each=each: functional.gated_conv2d(
                    a, w, groups=2, seed=5, per_sample=each, **{where: g}
                ),
                (gate, weight.requires_grad_(), x.requires_grad_()),
            )


def test_routes_of_a_convolution_and_what_they_compute() -> None:
    layer, x = GatedConv2d(8, 6, 1), torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    results = []
    for route in ("fold", "linear", *["live"] * ("cpp" in ON_CPU)):
        torch.manual_seed(3)
        layer.zero_grad()
        with dampr.ops.forced_route(route):
            if "cpp" in ON_CPU:
                assert dampr.explain(layer, x).route == route
            y = layer(x)
            y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for expected, *others in zip(*results, strict=True):
        for out in others:
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert dampr.explain(layer, x).route == "fold"
    assert dampr.explain(GatedConv2d(8, 6, 1, per_sample=True), x).route == "passes"
    assert dampr.explain(GatedConv2d(8, 6, 1, per_sample=True).eval(), x).route == "fold"


@pytest.mark.skipif("cpp" not in ON_CPU, reason="needs the extension")
def test_a_route_that_cannot_serve_is_refused() -> None:
    for layer, route in (
        (GatedConv2d(2, 2, 3), "linear"),
        (GatedConv2d(2, 2, 1, groups=2), "live"),
        (GatedConv2d(2, 2, 1, granularity="weight"), "linear"),
    ):
        with dampr.ops.forced_route(route), pytest.raises(ValueError, match=f"route '{route}' cannot serve"):
            layer(torch.randn(1, 2, 4, 4))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    cases: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "gates.json").read_text())
    return cases


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_convolution_case(golden: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    """Evaluation outputs and the penalty (lambda of the bias with its right sign) of the published convolution,
    from the layer itself.
    """
    case, bound = golden["l0_hc"]["conv_case"], 1e-12 if dtype == torch.float64 else 1e-6
    weight, bias, x = (torch.tensor(case[name], dtype=dtype) for name in ("W", "bias", "x_1x1x3x3"))
    layer = GatedConv2d(weight.shape[1], weight.shape[0], weight.shape[2:], dtype=dtype)
    layer.gate.log_alpha = nn.Parameter(torch.tensor(case["log_alpha"], dtype=dtype))
    layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    with dampr.backend(backend), torch.no_grad():
        out = layer.eval()(x.view(1, 1, 3, 3))[0]
    torch.testing.assert_close(out, torch.tensor(case["eval_out"], dtype=dtype), atol=bound, rtol=bound)
    penalty = layer.penalty(case["lam"], case["weight_decay"]) / case["N"]
    assert penalty.item() == pytest.approx(case["reg_corrected_bias_sign"], abs=bound)


@pytest.mark.parametrize("backend", ON_CPU)
def test_golden_convolution_in_training_gates_the_bias(golden: dict[str, Any], backend: str) -> None:
    """z (conv + b) with the golden gates as they are: parameters that the value family passes through."""
    case = golden["l0_hc"]["conv_case"]
    weight, bias, x, z = (torch.tensor(case[name], dtype=torch.float64) for name in ("W", "bias", "x_1x1x3x3", "z"))
    with dampr.backend(backend):
        y = functional.gated_conv2d(x.view(1, 1, 3, 3), weight, bias, output_gate=z, spec=value())
    torch.testing.assert_close(
        y[0], torch.tensor(case["corrected_train_shared"], dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's own
def test_same_padding_of_an_even_kernel_has_no_live_route_but_works(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = GatedConv2d(3, 4, 4, padding="same"), torch.randn(2, 3, 6, 6)
    backend = dampr.ops.select(x.device, x.dtype)
    monkeypatch.setattr(backend, "conv_route", lambda *_: ("live", "as a table could say"))
    torch.manual_seed(1)
    y = layer(x)
    monkeypatch.undo()
    torch.manual_seed(1)
    assert torch.equal(y, layer(x))


@pytest.mark.skipif(dampr.backend_info()["cpp"].startswith("missing"), reason="no extension")
@pytest.mark.parametrize("channels_last", [False, True])
def test_gates_per_image_write_the_gradient_over_what_only_they_have_kept(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    layer = GatedConv2d(3, 5, 3, per_sample=True)
    layer.gate.log_alpha.data.uniform_(-2, 2)
    x = torch.randn(2, 3, 7, 7).to(memory_format=layout)

    def backward(retain, hooks=None):
        torch.manual_seed(1)
        layer.zero_grad()
        if hooks is None:
            y = layer(x)
        else:
            with torch.autograd.graph.saved_tensors_hooks(*hooks):
                y = layer(x)
        assert type(y.grad_fn).__name__ == "_GatedConvBackward"
        kept = y.grad_fn.saved_tensors[-1]
        before = kept.clone()
        y.square().sum().backward(retain_graph=retain)
        over = not torch.equal(kept, before)
        if retain:
            layer.zero_grad()
            y.square().sum().backward()
        return over, [p.grad.clone() for p in layer.parameters()]

    over, expected = backward(retain=False)
    assert over
    for how in ({"retain": True}, {"retain": False, "hooks": (lambda t: t, lambda t: t)}):
        over, found = backward(**how)
        assert not over
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("granularity", ["output", "input", "weight", (2, 3), "index"], ids=str)
def test_gradients_have_the_memory_format_that_torchs_have(
    granularity: Any, training: bool, layout: Any, backend: str
) -> None:
    if dampr.backend_info()[backend].startswith("missing"):
        pytest.skip("no extension")
    where = torch.arange(8 * 4 * 9).view(8, 4, 3, 3) % 7 if granularity == "index" else granularity
    layer, dense = (m.to(memory_format=layout) for m in (GatedConv2d(4, 8, 3, granularity=where), nn.Conv2d(4, 8, 3)))
    x = torch.randn(2, 4, 6, 5).contiguous(memory_format=layout).requires_grad_()
    with dampr.backend(backend):
        y = layer.train(training)(x)
        found = [y, *torch.autograd.grad(y.sum(), (x, layer.weight))]
    right = [dense(x), *torch.autograd.grad(dense(x).sum(), (x, dense.weight))]
    assert [t.stride() for t in found] == [t.stride() for t in right]
