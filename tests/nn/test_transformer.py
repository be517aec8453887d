"""Gated transformer layers: values and all gradients against loops in float64, no fused path past a gate,
what is left without them.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr import reference
from dampr.gates import HardConcrete
from dampr.nn import (
    GatedActivation,
    GatedLinear,
    GatedMultiheadAttention,
    GatedTransformerDecoderLayer,
    GatedTransformerEncoderLayer,
    PrunedMultiheadAttention,
    PrunedTransformerDecoderLayer,
    PrunedTransformerEncoderLayer,
)
from dampr.testing import compare

N, L, S, E, H, D = 3, 5, 4, 8, 4, 6
FAMILIES = ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"]
EVERYTHING = ("heads", "neurons", "sublayers")
KINDS: dict[str, Any] = {
    "encoder": (nn.TransformerEncoderLayer, GatedTransformerEncoderLayer, PrunedTransformerEncoderLayer),
    "decoder": (nn.TransformerDecoderLayer, GatedTransformerDecoderLayer, PrunedTransformerDecoderLayer),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
both_orders = pytest.mark.parametrize("norm_first", [False, True])
nested = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
not_fast = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning")


def randomised(layer: Any, low: float = -3, high: float = 3) -> Any:
    """Biases, gains and gates that are anything: some gates closed, some open, some in between."""
    for name, p in layer.named_parameters():
        if "log_alpha" in name:
            p.data.uniform_(low, high)
        elif p.dim() == 1:
            p.data.add_(torch.randn_like(p) * 0.3)
    return layer


def build(kind: str, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    arguments = {"dropout": 0.0, "batch_first": True, "parts": EVERYTHING} | how
    return randomised(KINDS[kind][1](E, H, D, **arguments).to(dtype))


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.randn(N, L, E, dtype=dtype)
    return [x] if kind == "encoder" else [x, torch.randn(N, S, E, dtype=dtype)]


def masks(kind: str) -> dict[str, Any]:
    causal = torch.ones(L, L).triu(1).bool()
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 2:] = True
    if kind == "encoder":
        return {"src_mask": causal, "src_key_padding_mask": padding}
    memory = torch.zeros(N, S, dtype=torch.bool)
    memory[1, :2] = True
    return {
        "tgt_mask": causal,
        "tgt_is_causal": True,
        "tgt_key_padding_mask": padding,
        "memory_key_padding_mask": memory,
    }


def additive(mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    found = [
        m.view(-1, 1, *m.shape[-2:]) if m is mask else m.view(N, 1, 1, -1) for m in (mask, padding) if m is not None
    ]
    return sum(torch.zeros_like(m, dtype=dtype).masked_fill(m, float("-inf")) for m in found) if found else None


def truth(
    layer: Any,
    draw: dict[str, Tensor],
    x: list[Tensor],
    p: dict[str, Tensor],
    how: dict[str, Any],
    activation: Any = F.relu,
) -> Tensor:
    """The layer written out: gates z of heads, neurons and sublayers in ``draw``, parameters p by name,
    all in the dtype of x.
    """
    (x0, *memory), dtype = x, x[0].dtype

    def attend(name: str, mask: str, a: Tensor, b: Tensor) -> Tensor:
        weights, biases = p[f"{name}.in_proj_weight"].chunk(3), p[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (F.linear(t, w, c) for t, w, c in zip((a, b, b), weights, biases, strict=True))
        added = additive(how.get(f"{mask}_mask"), how.get(f"{mask}_key_padding_mask"), dtype)
        return reference.gated_attention(
            q, k, v, draw[name], p[f"{name}.out_proj.weight"], p[f"{name}.out_proj.bias"], added
        )[0]

    def feed(a: Tensor) -> Tensor:
        hidden = activation(draw["linear1"].view(-1, L, D) * F.linear(a, p["linear1.weight"], p["linear1.bias"]))
        return F.linear(hidden, p["linear2.weight"], p["linear2.bias"])

    branches = [lambda a: attend("self_attn", "tgt" if memory else "src", a, a)]
    if memory:
        branches.append(lambda a: attend("multihead_attn", "memory", a, memory[0]))
    branches.append(feed)
    for i, branch in enumerate(branches):
        z = draw[f"sublayer{i}"].view(-1, 1, 1)

        def norm(a: Tensor, i: int = i) -> Tensor:
            return F.layer_norm(a, (E,), p[f"norm{i + 1}.weight"], p[f"norm{i + 1}.bias"])

        x0 = x0 + z * branch(norm(x0)) if layer.norm_first else norm(x0 + z * branch(x0))
    return x0


def drawn(layer: Any, seed: int) -> dict[str, Tensor]:
    """What the next call draws, in the order in which it does."""
    torch.manual_seed(seed)
    found: dict[str, Tensor] = {}
    parts = [*layer._attentions, "linear1"]
    for i, name in enumerate(parts):
        part, own = getattr(layer, name), layer.sublayer_gates[i].gate
        rows = N if layer.self_attn.per_sample else None
        found[f"sublayer{i}"] = own(rows)
        if not found[f"sublayer{i}"].any() and layer.training:
            found[name] = torch.zeros(D if name == "linear1" else H).expand(N * L if name == "linear1" else N, -1)
        else:
            found[name] = part.gate(rows if name != "linear1" else rows and N * L)
        if name == "linear1" and not rows:
            found[name] = found[name].expand(N * L, -1)
    return found


@every_kind
@both_orders
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_loops(
    kind: str, norm_first: bool, per_sample: bool, masked: bool, dtype: torch.dtype
) -> None:
    layer = build(kind, dtype, norm_first=norm_first, per_sample=per_sample)
    for own in layer.sublayer_gates:
        own.gate.log_alpha.data.uniform_(0, 2)
    x = [t.requires_grad_() for t in inputs(kind, dtype)]
    leaves = [*x, *layer.parameters()]
    how = masks(kind) if masked else {}
    torch.manual_seed(3)
    y = layer(*x, **how)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy, materialize_grads=True)

    def expected(wide: torch.dtype) -> list[Tensor]:
        z = {name: t.to(wide) for name, t in drawn(layer, 3).items()}
        own = {name: p.to(wide) for name, p in layer.named_parameters()}
        found = truth(layer, z, [t.to(wide) for t in x], own, how)
        return [found, *torch.autograd.grad(found, leaves, dy.to(wide), materialize_grads=True)]

    names = ["y", *(f"d{i}" for i in range(len(x))), *(f"d{name}" for name, _ in layer.named_parameters())]
    for name, got, right, plain in zip(names, [y, *grads], expected(torch.float64), expected(dtype), strict=True):
        slack = 1e-12 if dtype == torch.float64 else 1e-6
        if (got - right).abs().max() > slack:  # the gradient of a key's bias is 0, up to rounding
            result = compare(name, got, right.to(got.dtype) if dtype == torch.float64 else right.double(), plain)
            assert result.ok, str(result)


@every_kind
@both_orders
def test_gradcheck(kind: str, norm_first: bool) -> None:
    layer = build(kind, torch.float64, norm_first=norm_first, activation="gelu")
    for name, p in layer.named_parameters():
        if "log_alpha" in name:
            p.data.uniform_(0.5, 1)
    names = [name for name, _ in layer.named_parameters()]
    x = [t[:1, :2].detach() for t in inputs(kind, torch.float64)]

    def run(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(layer, dict(zip(names, tensors[len(x) :], strict=True)), tensors[: len(x)])

    leaves = [t.requires_grad_() for t in x]
    assert torch.autograd.gradcheck(
        run, (*leaves, *(p.detach().requires_grad_() for p in layer.parameters())), fast_mode=True
    )


@every_kind
@both_orders
@pytest.mark.parametrize("parts", [("heads",), ("neurons",), EVERYTHING], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_fresh_layer_changes_no_bit(kind: str, norm_first: bool, parts: tuple[str, ...], activation: str) -> None:
    dense, gated, _ = KINDS[kind]
    stock = randomised(dense(E, H, D, activation=activation, norm_first=norm_first, batch_first=True)).eval()
    layer = gated.from_dense(stock, parts=parts)
    assert not any(m.training for m in layer.modules())
    own = dict(layer.named_parameters())
    assert all(own[name] is p for name, p in stock.named_parameters())
    assert type(stock.linear1) is nn.Linear, "the dense layer is as it was"
    for how in ({}, masks(kind)):
        x = inputs(kind)
        assert torch.equal(layer(*x, **how), stock(*x, **how))
        with torch.no_grad():  # here torch may take its fused path, which rounds in another order
            torch.testing.assert_close(layer(*x, **how), stock(*x, **how), equal_nan=True)
    layer.load_state_dict(dense(E, H, D, activation=activation).state_dict())


@every_kind
def test_it_starts_as_the_dense_layer_with_the_same_seed(kind: str) -> None:
    dense, gated, _ = KINDS[kind]
    torch.manual_seed(5)
    stock = dense(E, H, D)
    torch.manual_seed(5)
    layer = gated(E, H, D, parts=EVERYTHING)
    own = dict(layer.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in stock.named_parameters())
    assert type(layer.self_attn) is GatedMultiheadAttention
    assert type(layer.linear1) is GatedLinear
    assert all(type(g) is GatedActivation for g in layer.sublayer_gates)


@pytest.mark.parametrize("parts", [("heads",), ("neurons",), ("sublayers",)], ids=str)
@both_orders
def test_the_fused_path_never_bypasses_a_gate(parts: tuple[str, ...], norm_first: bool) -> None:
    layer = build("encoder", parts=parts, norm_first=norm_first).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.requires_grad_(False)
        for x in (torch.randn(N, L, E), torch.randn(L, E)):
            closed = layer(x)
            torch.testing.assert_close(layer.to_dense()(x), closed)
            opened = copy.deepcopy(layer)
            for name, p in opened.named_parameters():
                if "log_alpha" in name:
                    p.fill_(9.0)
            assert (opened(x) - closed).abs().max() > 1e-2


@nested
@not_fast
@pytest.mark.parametrize(
    "built", ["from gated layers", "dense, then gated", "a dense layer first", "a dense layer last"]
)
@pytest.mark.parametrize("grad", [False, True])
def test_an_encoder_with_padding_never_bypasses_a_gate(built: str, grad: bool) -> None:
    """nn.TransformerEncoder looks at attributes of its first layer alone, and hands nested tensors to all of them."""
    first = build("encoder", parts=("heads", "neurons"))
    stock = nn.TransformerEncoder(first.to_dense(), 2).eval()
    if built == "from gated layers":
        encoder = nn.TransformerEncoder(first, 2)
    else:
        encoder = copy.deepcopy(stock)
        dense_at = {"a dense layer first": 0, "a dense layer last": 1}.get(built)
        for i in range(2):
            if i != dense_at:
                encoder.layers[i] = copy.deepcopy(first)
    for p in encoder.parameters() if grad else ():
        p.requires_grad_(False)
    encoder.eval()
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 3:] = padding[1, 1:] = True
    with torch.set_grad_enabled(grad):
        y = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        right = stock(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[~padding], right[~padding])
    assert built == "from gated layers" or not y[padding].any(), "as torch does it"


@nested
def test_gradients_of_gates_come_through_a_nested_tensor() -> None:
    layer = build("encoder", parts=("heads", "neurons")).eval()
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, D, batch_first=True), 1).eval()
    encoder.layers[0] = layer
    for name, p in encoder.named_parameters():
        p.requires_grad_("gate" in name)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 3:] = True
    encoder(torch.randn(N, L, E), src_key_padding_mask=padding).square().sum().backward()
    assert layer.self_attn.gate.log_alpha.grad.abs().sum() > 0


@nested
def test_a_nested_tensor_comes_without_masks() -> None:
    x = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)])
    layer = build("encoder").eval()
    assert [len(t) for t in layer(x).unbind()] == [2, 3]
    with pytest.raises(TypeError, match="src: got a nested tensor and a mask"):
        layer(x, src_mask=torch.zeros(3, 3))


@every_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(kind: str, family: str) -> None:
    layer = KINDS[kind][1](E, H, D, gate=family, parts=EVERYTHING, batch_first=True)
    gates = [m for m in layer.modules() if isinstance(m, dampr.gates.Gate)]
    before = [copy.deepcopy(g.state_dict()) for g in gates]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        (layer(*inputs(kind)).square().mean() + 0.01 * dampr.penalty(layer)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(gates) == (4 if kind == "encoder" else 6)
    assert all(
        any(not torch.equal(t, old[name]) for name, t in g.state_dict().items())
        for g, old in zip(gates, before, strict=True)
    )


@every_kind
@pytest.mark.parametrize("family", ["hard_concrete", "dam", "diffprune", "diffmask"])
@both_orders
def test_from_dense_computes_the_same_in_every_family(kind: str, family: str, norm_first: bool) -> None:
    dense, gated, _ = KINDS[kind]
    stock = randomised(dense(E, H, D, norm_first=norm_first, batch_first=True)).eval()
    x = inputs(kind)
    before = stock(*x).detach()
    layer = gated.from_dense(stock, gate=family, parts=EVERYTHING)
    torch.testing.assert_close(layer(*x), before)
    plain = layer.to_dense()
    assert type(plain) is dense
    torch.testing.assert_close(plain(*x), before)


def close(layer: Any, closed: dict[str, list[int]], value: float) -> Any:
    """Open every gate to ``value`` (a log_alpha) but those that are named."""
    for module in layer.modules():
        if isinstance(module, HardConcrete):
            module.log_alpha.data.fill_(value)
    for name, which in closed.items():
        layer.get_submodule(name).gate.log_alpha.data[which] = -9.0
    return layer.eval()


def some_closed() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [
        {
            name: (torch.rand(n, generator=generator) < 0.5).nonzero().flatten().tolist()
            for name, n in (("self_attn", H), ("linear1", D))
        }
        for _ in range(4)
    ]
    one_left = [
        {"self_attn": [h for h in range(H) if h != i], "linear1": [j for j in range(D) if j != i]} for i in range(2)
    ]
    return [*drawn, *one_left, {"linear1": list(range(D))}, {"self_attn": list(range(H))}, {"linear1": [2]}, {}]


@every_kind
@both_orders
@pytest.mark.parametrize("closed", some_closed(), ids=str)
@pytest.mark.parametrize("activation", [F.relu, "gelu", torch.sigmoid, nn.PReLU(), nn.Softmax(-1)], ids=str)
@pytest.mark.parametrize("value", [9.0, 0.5])
def test_masked_is_compacted(
    kind: str, norm_first: bool, closed: dict[str, list[int]], activation: Any, value: float
) -> None:
    dense, _, pruned = KINDS[kind]
    layer = close(build(kind, norm_first=norm_first, activation=activation), closed, value)
    small, kept = layer.compacted()
    heads = [h for h in range(H) if h not in closed.get("self_attn", [])] or [0]
    neurons = [i for i in range(D) if i not in closed.get("linear1", [])] or [0]
    assert type(small) is (dense if len(heads) == H else pruned)
    assert kept["self_attn"] == heads
    if not isinstance(activation, nn.Softmax):
        assert kept["linear1"] == neurons
    assert small.linear1.weight.shape == (len(kept["linear1"]), E)
    assert small.linear2.weight.shape == (E, len(kept["linear1"]))
    assert small.self_attn.in_proj_weight.shape == (3 * len(heads) * 2, E)
    assert not any(isinstance(m, dampr.nn.GatedLayer) for m in small.modules())
    for how in ({}, masks(kind)):
        x = inputs(kind)
        torch.testing.assert_close(small(*x, **how), layer(*x, **how), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.to_dense()(*x, **how), layer(*x, **how), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(small(*x, **how), layer(*x, **how), rtol=1e-5, atol=1e-5, equal_nan=True)


@every_kind
@both_orders
@pytest.mark.parametrize("bias", [False, True])
def test_closed_sublayers_go(kind: str, norm_first: bool, bias: bool) -> None:
    sublayers = 2 if kind == "encoder" else 3
    for closed in itertools.chain.from_iterable(
        itertools.combinations(range(sublayers), n) for n in range(1, sublayers + 1)
    ):
        shut = {f"sublayer_gates.{i}": [0] for i in closed}
        layer = close(build(kind, norm_first=norm_first, bias=bias), shut | {"self_attn": [1]}, 0.5)
        small, kept = layer.compacted()
        assert type(small) is KINDS[kind][2]
        names = layer._sublayers
        assert [names[i] for i in range(sublayers) if not kept[names[i]]] == [names[i] for i in closed]
        gone = [p for i in closed for m in layer._by_sublayer()[i] for p in m.parameters()]
        assert (
            sum(p.numel() for p in small.parameters())
            < sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in gone) + 10
        )
        for how in ({}, masks(kind)):
            x = inputs(kind)
            torch.testing.assert_close(small(*x, **how), layer(*x, **how), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.to_dense()(*x), layer(*x), rtol=1e-5, atol=1e-5)


def test_a_closed_sublayer_is_not_run() -> None:
    layer = close(build("encoder"), {"sublayer_gates.0": [0], "sublayer_gates.1": [0]}, 9.0)
    layer.self_attn = layer.linear1 = nn.Identity()  # neither would take these arguments
    layer.self_attn.batch_first = True
    x = torch.randn(N, L, E)
    torch.testing.assert_close(layer(x), layer.norm2(layer.norm1(x)))


@nested
@pytest.mark.parametrize(
    "closed", [{"self_attn": [1, 2]}, {"sublayer_gates.0": [0]}, {"sublayer_gates.1": [0]}], ids=str
)
@pytest.mark.parametrize("grad", [False, True])
def test_a_pruned_layer_works_in_an_encoder_with_padding(closed: dict[str, list[int]], grad: bool) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, D, batch_first=True), 2).eval()
    layer = close(build("encoder"), closed, 0.5)
    small = copy.deepcopy(encoder)
    encoder.layers[0], small.layers[0] = layer, layer.compacted()[0]
    for p in (*encoder.parameters(), *small.parameters()):
        p.requires_grad_(False)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 3:] = True
    x = torch.randn(N, L, E)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(small(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding))
        assert isinstance(small.layers[0], PrunedTransformerEncoderLayer)


@pytest.mark.parametrize("where", ["linear1", "linear2"])
def test_other_granularities_of_its_linear_layers(where: str) -> None:
    """Gates on weights of linear1, or on what linear2 reads: a neuron that nobody writes or reads goes."""
    layer = GatedTransformerEncoderLayer(E, H, D, parts=("heads",), batch_first=True, activation=torch.sigmoid)
    dense = getattr(layer, where)
    setattr(layer, where, GatedLinear.from_dense(dense, granularity=(1, E) if where == "linear1" else "input"))
    close(randomised(layer), {where: [0, 3]}, 0.5)
    small, kept = layer.compacted()
    assert kept["linear1"] == [1, 2, 4, 5]
    x = torch.randn(N, L, E)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-5, atol=1e-5)


def test_what_is_frozen_stays_frozen() -> None:
    layer = build("encoder", parts=("heads", "neurons"))
    for p in (layer.linear1.weight, layer.self_attn.in_proj_weight, layer.norm1.weight):
        p.requires_grad_(False)
    small = close(layer, {"self_attn": [0], "linear1": [0]}, 9.0).compacted()[0]
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {"linear1.weight", "self_attn.in_proj_weight", "norm1.weight"}


@every_kind
def test_the_penalty_counts_every_part(kind: str) -> None:
    layer = build(kind)
    parts = dampr.prune.gated_layers(layer)
    attentions = [m for m in parts.values() if isinstance(m, GatedMultiheadAttention)]
    expected = sum(m.group_size() * m.gate.open_probability().sum() for m in attentions)
    expected = expected + (E + 1) * layer.linear1.gate.open_probability().sum()
    whole = [4 * E * E + 4 * E] * len(attentions) + [2 * E * D + E + D]
    expected = expected + sum(
        n * g.gate.open_probability().sum() for n, g in zip(whole, layer.sublayer_gates, strict=True)
    )
    torch.testing.assert_close(dampr.penalty(layer), expected)


@every_kind
# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(kind: str, training: bool) -> None:
    layer = build(kind).train(training)
    x = inputs(kind)
    torch.manual_seed(4)
    expected = layer(*x)
    torch.manual_seed(4)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(*x)
    torch.testing.assert_close(found, expected)


@every_kind
def test_dropout_is_that_of_the_dense_layer(kind: str) -> None:
    dense, gated, _ = KINDS[kind]
    stock = dense(E, H, D, dropout=0.5)
    layer = gated.from_dense(stock, gate="diffmask", parts=EVERYTHING)  # draws nothing
    x = [t.transpose(0, 1) for t in inputs(kind)]
    torch.manual_seed(2)
    found = layer(*x)
    torch.manual_seed(2)
    torch.testing.assert_close(found, stock(*x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GatedTransformerEncoderLayer(E, H, parts=()), ValueError, r"parts=\(\): expected some of"),
        (lambda: GatedTransformerEncoderLayer(E, H, parts="heads"), ValueError, "parts='heads': expected some of"),
        (lambda: GatedTransformerEncoderLayer(E, H, parts=("layers",)), ValueError, "parts='layers': expected one of"),
        (lambda: GatedTransformerEncoderLayer(E, H, gate=HardConcrete(H)), TypeError, "gate=HardConcrete instance"),
        (lambda: GatedTransformerEncoderLayer(E, H, gate="none"), ValueError, "gate='none'"),
        (
            lambda: GatedTransformerEncoderLayer.from_dense(nn.Linear(2, 2)),
            TypeError,
            "expected exactly nn.TransformerEncoderLayer",
        ),
        (
            lambda: PrunedTransformerEncoderLayer(E, H, -1),
            ValueError,
            "dim_feedforward=-1: expected an integer of at least 0",
        ),
        (
            lambda: PrunedTransformerDecoderLayer(E, H, D, memory_heads=(4,)),
            ValueError,
            r"heads=\(4,\): expected increasing integers",
        ),
        (
            lambda: GatedTransformerDecoderLayer.from_dense(nn.Linear(2, 2)),
            TypeError,
            "expected exactly nn.TransformerDecoderLayer",
        ),
    ],
)
def test_a_bad_argument_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("heads", [None, (0, 2), ()])
def test_pruned_layers_have_a_width_that_is_no_multiple_of_their_heads(heads: Any) -> None:
    layer = PrunedTransformerEncoderLayer(5, H, 7, heads=heads, head_dim=None if heads == () else 2)
    again = PrunedTransformerEncoderLayer(**layer.arguments())
    assert str(again) == str(layer)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(L, N, 5)
    torch.testing.assert_close(again.eval()(x), layer.eval()(x))
    decoder = PrunedTransformerDecoderLayer(5, H, 7, heads=heads, memory_heads=(3,), head_dim=2)
    assert str(PrunedTransformerDecoderLayer(**decoder.arguments())) == str(decoder)
    assert decoder(x, x).shape == x.shape


def test_pruned_layers_are_built_from_their_arguments() -> None:
    layer = PrunedTransformerDecoderLayer(E, H, 0, activation="gelu", heads=(1, 3), memory_heads=(), norm_first=True)
    assert isinstance(layer.self_attn, PrunedMultiheadAttention)
    again = PrunedTransformerDecoderLayer(**layer.arguments())
    assert str(again) == str(layer)
    again.load_state_dict(layer.state_dict())
    x, memory = torch.randn(L, N, E), torch.randn(S, N, E)
    torch.testing.assert_close(again.eval()(x, memory), layer.eval()(x, memory))
    with pytest.raises(TypeError, match="expected F.relu, F.gelu or a module"):
        PrunedTransformerEncoderLayer(E, H, activation=torch.sigmoid, heads=()).arguments()
