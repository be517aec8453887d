"""GatedMultiheadAttention: values and all gradients against loops in float64, every argument of the dense layer,
what is left of it.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dampr
from dampr import reference
from dampr.gates import HardConcrete
from dampr.nn import GatedMultiheadAttention, PrunedMultiheadAttention
from dampr.testing import compare

N, L, S, E, H = 3, 5, 4, 8, 4
FAMILIES = ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"]
LAYERS: dict[str, dict[str, Any]] = {
    "packed": {},
    "separate": {"kdim": 6, "vdim": 7},
    "extended": {"add_bias_kv": True, "add_zero_attn": True},
    "no_bias": {"bias": False},
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def build(kind: str = "packed", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A layer with gates that are closed, in between and open, drawn and in evaluation mode,
    and biases that are not 0.
    """
    layer = GatedMultiheadAttention(E, H, **LAYERS[kind], **more).to(dtype)
    for name, p in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(p)
    if isinstance(layer.gate, HardConcrete):
        layer.gate.log_alpha.data = torch.tensor([-9.0, 0.3, 9.0, -0.5]).to(layer.gate.log_alpha)
    return layer


def inputs(kind: str = "packed", dtype: torch.dtype = torch.float32, own: bool = False) -> list[Tensor]:
    """Query, key and value with the batch first; all one tensor for self-attention (``own``)."""
    q = torch.randn(N, L, E, dtype=dtype)
    if own:
        return [q] * 3
    arguments = LAYERS[kind]
    return [
        q,
        torch.randn(N, S, arguments.get("kdim", E), dtype=dtype),
        torch.randn(N, S, arguments.get("vdim", E), dtype=dtype),
    ]


def masks(own: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
    keys = L if own else S
    padding = torch.zeros(N, keys, dtype=torch.bool)
    padding[0, 2:] = True
    causal = torch.ones(L, keys).triu(1).bool()
    each = torch.randn(N * H, L, keys, dtype=dtype)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "heads": {"attn_mask": each, "key_padding_mask": torch.zeros(N, keys, dtype=dtype).masked_fill(padding, -2.0)},
    }


def truth(
    layer: Any, z: Tensor, inputs: list[Tensor], parameters: dict[str, Tensor], mask: Any = None
) -> tuple[Tensor, Tensor]:
    """The reference on (N, L, E) in the dtype of its inputs; ``mask`` is additive over (N, H, L, S)."""
    packed = parameters.get("in_proj_weight")
    weights = packed.chunk(3) if packed is not None else [parameters[f"{name}_proj_weight"] for name in "qkv"]
    biases = parameters["in_proj_bias"].chunk(3) if "in_proj_bias" in parameters else [None] * 3
    q, k, v = (nn.functional.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
    if layer.bias_k is not None:
        k = torch.cat([k, parameters["bias_k"].expand(N, 1, E)], 1)
        v = torch.cat([v, parameters["bias_v"].expand(N, 1, E)], 1)
    if layer.add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(N, 1, E)], 1) for t in (k, v))
    return reference.gated_attention(q, k, v, z, parameters["out_proj.weight"], parameters.get("out_proj.bias"), mask)


def additive(how: dict[str, Any], dtype: torch.dtype) -> Any:
    """The masks of a call as one tensor that is added to scores."""
    total = torch.zeros(N, H, 1, 1, dtype=dtype)
    for name, shape in (("attn_mask", (-1, H, L, S)), ("key_padding_mask", (N, 1, 1, S))):
        mask = how.get(name)
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
            total = total + (mask if mask.shape == (L, S) else mask.view(shape))
    return total


@every_layer
@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_loops(
    kind: str, need: bool, per_sample: bool, dtype: torch.dtype
) -> None:
    layer = build(kind, dtype, per_sample=per_sample, batch_first=True)
    x = [t.requires_grad_() for t in inputs(kind, dtype)]
    leaves = [*x, *layer.parameters()]
    torch.manual_seed(3)
    y, weights = layer(*x, need_weights=need, average_attn_weights=False)
    out = [y, weights] if need else [y]
    dout = [torch.randn_like(t) for t in out]
    grads = torch.autograd.grad(out, leaves, dout)

    def expected(wide: torch.dtype) -> list[Tensor]:
        torch.manual_seed(3)
        z = layer.gate(N if per_sample else None).to(wide)
        own = {name: p.to(wide) for name, p in layer.named_parameters() if not name.startswith("gate")}
        found = truth(layer, z, [t.to(wide) for t in x], own)[: len(out)]
        return [*found, *torch.autograd.grad(found, leaves, [t.to(wide) for t in dout])]

    names = ["y", "weights"][: len(out)] + [f"d{i}" for i in range(len(leaves))]
    for name, got, right, plain in zip(names, [*out, *grads], expected(torch.float64), expected(dtype), strict=True):
        result = compare(name, got, right.to(got.dtype) if dtype == torch.float64 else right.double(), plain)
        assert result.ok, str(result)


@pytest.mark.parametrize("how", masks())
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("need", [False, True])
def test_masks_are_those_of_the_loops(how: str, per_sample: bool, need: bool) -> None:
    layer = build(dtype=torch.float64, per_sample=per_sample, batch_first=True)
    x, arguments = inputs(dtype=torch.float64), masks(dtype=torch.float64)[how]
    torch.manual_seed(1)
    y, weights = layer(*x, **arguments, need_weights=need)
    torch.manual_seed(1)
    own = dict(layer.named_parameters())
    expected, each = truth(layer, layer.gate(N if per_sample else None), x, own, additive(arguments, torch.float64))
    torch.testing.assert_close(y, expected)
    if need:
        torch.testing.assert_close(weights, each.mean(1))


@every_layer
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(kind: str, per_sample: bool) -> None:
    layer = build(kind, torch.float64, per_sample=per_sample, batch_first=True)
    layer.gate.log_alpha.data.uniform_(-1, 1)
    names = [name for name, _ in layer.named_parameters()]

    def run(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        parameters = dict(zip(names, tensors[3:], strict=True))
        return torch.func.functional_call(layer, parameters, tensors[:3], {"need_weights": False})[0]

    leaves = [t[:2, :3].requires_grad_() for t in inputs(kind, torch.float64)]
    assert torch.autograd.gradcheck(run, (*leaves, *(p.detach().requires_grad_() for p in layer.parameters())))


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("how", ["none", "padding", "causal", "both", "heads"])
def test_a_fresh_layer_changes_no_bit(kind: str, batch_first: bool, own: bool, need: bool, how: str) -> None:
    if own and kind == "separate":
        return
    dense = nn.MultiheadAttention(E, H, **LAYERS[kind], batch_first=batch_first).eval()
    layer = GatedMultiheadAttention.from_dense(dense)
    assert not layer.training
    x = [t if batch_first else t.transpose(0, 1) for t in inputs(kind, own=own)]
    x = [x[0]] * 3 if own else x
    arguments = masks(own)[how] | {"need_weights": need}
    for found, right in zip(layer(*x, **arguments), dense(*x, **arguments), strict=True):
        assert (found is None) == (right is None)
        assert found is None or torch.equal(found, right)
    with torch.no_grad():
        torch.testing.assert_close(layer(*x, **arguments)[0], dense(*x, **arguments)[0], equal_nan=True)


def test_dropout_is_that_of_the_dense_layer() -> None:
    dense = nn.MultiheadAttention(E, H, dropout=0.5)
    layer = GatedMultiheadAttention.from_dense(dense, gate="diffmask")  # draws nothing
    x = torch.randn(L, N, E)
    torch.manual_seed(2)
    found = layer(x, x, x)[0]
    torch.manual_seed(2)
    torch.testing.assert_close(found, dense(x, x, x)[0])


@pytest.mark.parametrize("need", [False, True])
def test_without_a_batch(need: bool) -> None:
    layer = build(batch_first=True, per_sample=True)
    x = torch.randn(L, E)
    torch.manual_seed(0)
    y, weights = layer(x, x, x, need_weights=need)
    torch.manual_seed(0)
    batched, more = layer(x[None], x[None], x[None], need_weights=need)
    torch.testing.assert_close(y, batched[0])
    assert (weights is None and more is None) or torch.allclose(weights, more[0], atol=1e-6)
    torch.testing.assert_close(layer.eval()(x, x, x)[0], layer.to_dense()(x, x, x)[0])


@pytest.mark.parametrize("around", ["alone", "stock encoder layer"])
def test_no_fused_path_bypasses_a_closed_head(around: str) -> None:
    """torch's paths for inference read out_proj without calling anything: not this layer's,
    nor that of an encoder layer around it.
    """
    layer = build(batch_first=True).eval()
    x = torch.randn(N, L, E)
    stock = nn.TransformerEncoderLayer(E, H, 16, batch_first=True).eval()
    stock.self_attn = layer
    run = (lambda: layer(x, x, x, need_weights=False)[0]) if around == "alone" else (lambda: stock(x))
    right = run()  # with gradients, which no such path has
    with torch.no_grad():
        found = run()
        layer.gate.log_alpha.data.fill_(9.0)
        opened = run()
    torch.testing.assert_close(found, right)
    assert (opened - found).abs().max() > 1e-3


def test_nested_tensors_are_refused_and_say_what_to_do() -> None:
    layer = build(batch_first=True).eval()
    x = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)], layout=torch.jagged)
    with pytest.raises(TypeError, match="expected padded ones and a key_padding_mask"):
        layer(x, x, x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_every_family_trains(family: str, per_sample: bool) -> None:
    layer = GatedMultiheadAttention(E, H, gate=family, per_sample=per_sample)
    before = {name: p.detach().clone() for name, p in layer.gate.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(L, N, E)
        (layer(x, x, x)[0].square().mean() + 0.01 * dampr.penalty(layer)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(p, before[name]) for name, p in layer.gate.named_parameters())


@pytest.mark.parametrize("family", ["hard_concrete", "dam", "diffprune", "diffmask"])
@every_layer
def test_from_dense_and_back(family: str, kind: str) -> None:
    dense = nn.MultiheadAttention(E, H, **LAYERS[kind]).eval()
    x = [t.transpose(0, 1) for t in inputs(kind)]
    before, parameters = dense(*x)[0].detach(), dict(dense.named_parameters())
    layer = GatedMultiheadAttention.from_dense(dense, gate=family)
    torch.testing.assert_close(layer(*x)[0], before)
    own = dict(layer.named_parameters())
    assert all(own[name] is p for name, p in parameters.items())
    assert list(own)[: len(parameters)] == list(parameters)
    plain = layer.to_dense()
    assert type(plain) is nn.MultiheadAttention
    torch.testing.assert_close(plain(*x)[0], before)
    assert not any(a is b for a, b in zip(plain.parameters(), dense.parameters(), strict=True))
    layer.load_state_dict(nn.MultiheadAttention(E, H, **LAYERS[kind]).state_dict())
    assert copy.deepcopy(layer).state_dict().keys() == pickle.loads(pickle.dumps(layer)).state_dict().keys()


def test_fresh_gates_that_are_zero_are_refused() -> None:
    class Shut(dampr.gates.Gate):
        def __init__(self, num_gates: int, *, device: Any = None) -> None:
            super().__init__(num_gates)

        def forward(self, rows: int | None = None) -> Tensor:
            return torch.zeros(self.num_gates)

        def open_probability(self) -> Tensor:
            return self()

    with pytest.raises(ValueError, match="gate=Shut: a fresh gate of it is 0"):
        GatedMultiheadAttention.from_dense(nn.MultiheadAttention(E, H), gate=Shut)


def test_it_starts_as_the_dense_layer_with_the_same_seed() -> None:
    torch.manual_seed(5)
    dense = nn.MultiheadAttention(E, H)
    torch.manual_seed(5)
    layer = GatedMultiheadAttention(E, H)
    assert all(torch.equal(p, dict(layer.named_parameters())[name]) for name, p in dense.named_parameters())
    layer._reset_parameters()
    assert not torch.equal(layer.in_proj_weight, dense.in_proj_weight)


CLOSED = [c for n in range(1, H) for c in itertools.combinations(range(H), n)]


@every_layer
@pytest.mark.parametrize("closed", CLOSED, ids=str)
def test_masked_is_compacted(kind: str, closed: tuple[int, ...]) -> None:
    layer = build(kind, batch_first=True).eval()
    layer.gate.log_alpha.data.fill_(0.7)
    layer.gate.log_alpha.data[list(closed)] = -9.0
    small, heads = layer.compacted()
    assert type(small) is PrunedMultiheadAttention
    assert heads == [h for h in range(H) if h not in closed]
    assert layer.closed_heads() == set(closed)
    left = sum(p.numel() for p in layer.parameters()) - H - len(closed) * layer.group_size()
    assert sum(p.numel() for p in small.parameters()) == left
    x = inputs(kind)
    for how in masks().values():
        for need in (False, True):
            y, weights = layer(*x, **how, need_weights=need, average_attn_weights=False)
            z, fewer = small(*x, **how, need_weights=need, average_attn_weights=False)
            torch.testing.assert_close(z, y)
            assert (weights is None and fewer is None) or torch.allclose(fewer, weights[:, heads], atol=1e-6)
    one = [t[0] for t in x]
    torch.testing.assert_close(small(*one)[0], layer(*one)[0])
    assert small(*one)[1].shape == layer(*one)[1].shape


def test_all_heads_closed_leaves_one_that_says_nothing() -> None:
    layer = build().eval()
    layer.gate.log_alpha.data.fill_(-9.0)
    x = torch.randn(L, N, E)
    small, heads = layer.compacted()
    assert heads == [0]
    torch.testing.assert_close(small(x, x, x)[0], layer(x, x, x)[0])
    torch.testing.assert_close(small(x, x, x)[0], layer.out_proj.bias.expand(L, N, E))


def test_nothing_closed_leaves_the_layer_of_torch() -> None:
    layer = build()
    layer.gate.log_alpha.data.fill_(0.3)
    layer.in_proj_weight.requires_grad_(False)
    small, heads = layer.compacted()
    assert type(small) is nn.MultiheadAttention
    assert heads == list(range(H))
    assert not small.in_proj_weight.requires_grad
    assert small.out_proj.weight.requires_grad


@every_layer
def test_the_penalty_counts_what_a_head_has(kind: str) -> None:
    layer = build(kind)
    pi = layer.gate.open_probability()
    gated = sum(
        p.numel() for name, p in layer.named_parameters() if not name.startswith("gate") and name != "out_proj.bias"
    )
    assert layer.group_size() * H == gated
    torch.testing.assert_close(layer.penalty(2.0), 2 * gated / H * pi.sum())
    small = {h: copy.deepcopy(layer) for h in range(H)}
    squares = []
    for h, one in small.items():
        one.gate.log_alpha.data.fill_(-9.0)
        one.gate.log_alpha.data[h] = 9.0
        squares.append(
            sum(p.square().sum() for name, p in one.compacted()[0].named_parameters() if name != "out_proj.bias")
        )
    bias = 0.0 if layer.out_proj.bias is None else layer.out_proj.bias.square().sum()
    torch.testing.assert_close(
        layer.penalty(0.0, 3.0), 1.5 * ((pi * torch.stack(squares)).sum() + bias), rtol=1e-5, atol=1e-5
    )


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(per_sample: bool, training: bool) -> None:
    layer = build(per_sample=per_sample, batch_first=True).train(training)
    x = torch.randn(N, L, E)
    torch.manual_seed(4)
    expected = layer(x, x, x, need_weights=False)[0]
    torch.manual_seed(4)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert layer.gate.log_alpha.grad is not None


@pytest.mark.parametrize("per_sample", [False, True])
def test_autocast_and_half_precision(per_sample: bool) -> None:
    x = torch.randn(N, L, E)
    layer = build(per_sample=per_sample, batch_first=True)
    torch.manual_seed(6)
    right = layer(x, x, x, need_weights=False)[0]
    torch.manual_seed(6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, x, x, need_weights=False)[0]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), right, rtol=0.1, atol=0.1)
    half = layer.bfloat16()
    assert half.gate.log_alpha.dtype == torch.float32
    torch.manual_seed(6)
    y = half(*[x.bfloat16()] * 3, need_weights=False)[0]
    torch.testing.assert_close(y.float(), right, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GatedMultiheadAttention(E, H, gate="none"), ValueError, "gate='none'"),
        (lambda: GatedMultiheadAttention(E, H, gate=HardConcrete(E)), ValueError, "gate.num_gates=8: expected 4"),
        (
            lambda: GatedMultiheadAttention.from_dense(nn.Linear(2, 2)),
            TypeError,
            "layer=Linear: expected exactly nn.MultiheadAttention",
        ),
        (
            lambda: PrunedMultiheadAttention(E, H, heads=()),
            ValueError,
            r"heads=\(\): expected increasing integers in \[0, 4\)",
        ),
        (lambda: PrunedMultiheadAttention(E, H, heads=(0, 4)), ValueError, "expected increasing integers"),
        (lambda: PrunedMultiheadAttention(E, H, heads=(1, 0)), ValueError, "expected increasing integers"),
        (
            lambda: PrunedMultiheadAttention(E, 3, heads=(0,)),
            ValueError,
            "num_heads=3: expected a divisor of embed_dim=8, or a head_dim",
        ),
        (
            lambda: PrunedMultiheadAttention(E, H, heads=(0,), head_dim=0),
            ValueError,
            "head_dim=0: expected an integer of at least 1",
        ),
    ],
)
def test_a_bad_argument_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": torch.zeros(2, 2)}, r"attn_mask.shape=\(2, 2\): expected \(5, 5\) or \(12, 5, 5\)"),
        ({"key_padding_mask": torch.zeros(N, 2)}, r"key_padding_mask.shape=\(3, 2\): expected \(3, 5\)"),
        ({"is_causal": True}, "is_causal=True with attn_mask=None"),
    ],
)
def test_a_bad_mask_is_named(arguments: dict[str, Any], message: str) -> None:
    x = torch.randn(N, L, E)
    with pytest.raises(RuntimeError, match=message):
        PrunedMultiheadAttention(E, H, batch_first=True, heads=(1,))(x, x, x, **arguments)


@pytest.mark.parametrize(
    "shapes",
    [
        ((E,),) * 3,
        ((L, N, E), (L, E), (L, E)),
        ((L, N, E), (L, 1, E), (L, 1, E)),
        ((L, N, E), (L, N, E), (L + 1, N, E)),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_shapes_that_do_not_go_together_are_named(shapes: Any, plain: bool) -> None:
    """One key for a batch of queries would be broadcast, where torch raises."""
    layer = PrunedMultiheadAttention(E, H, heads=(1,)) if plain else GatedMultiheadAttention(E, H, per_sample=True)
    with pytest.raises(ValueError, match=rf"have the shapes {re.escape(str(shapes[0]))}, .*: expected"):
        layer(*map(torch.zeros, shapes))


@pytest.mark.parametrize("need", [True, False])
def test_heads_keep_their_width_where_channels_around_them_are_gone(need: bool) -> None:
    """The whole layer, with zeros in the channels that a narrow one has not, and which nobody reads."""
    torch.manual_seed(0)
    whole, x = nn.MultiheadAttention(E, H, add_bias_kv=True).eval(), torch.randn(L, N, E)
    left = torch.tensor([0, 2, 3, 7])
    narrow = PrunedMultiheadAttention(4, H, add_bias_kv=True, heads=range(H), head_dim=E // H).eval()
    assert "head_dim=2" in repr(narrow)
    own = dict(whole.named_parameters())
    cut = {
        "in_proj_weight": own["in_proj_weight"][:, left],
        "out_proj.weight": own["out_proj.weight"][left],
        "out_proj.bias": torch.ones(4),
    }
    whole.out_proj.bias.data.fill_(1)
    narrow.load_state_dict({**own, **cut})
    given = torch.zeros_like(x).index_copy(2, left, x[..., left])
    expected, weights = whole(given, given, given, need_weights=need)
    found, own_weights = narrow(*[x[..., left]] * 3, need_weights=need)
    torch.testing.assert_close(found, expected[..., left])
    torch.testing.assert_close(own_weights, weights)


def test_explain_says_where_the_gates_are() -> None:
    assert dampr.explain(build(), torch.randn(L, N, E)).route == "fold"
    assert dampr.explain(build(per_sample=True), torch.randn(L, N, E)).route == "passes"


def test_an_empty_batch() -> None:
    for per_sample in (False, True):
        layer = build(per_sample=per_sample, batch_first=True)
        x = torch.randn(0, L, E)
        assert layer(x, x, x, need_weights=False)[0].shape == (0, L, E)
