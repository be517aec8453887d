"""GatedLSTM, GatedGRU, GatedRNN: values and all gradients against a loop in float64,
every argument of the dense layers, compaction.
"""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from dampr import reference
from dampr.gates import HardConcrete
from dampr.nn import GatedGRU, GatedLSTM, GatedRNN, ScaledRNN, rnn
from dampr.testing import compare

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, GatedLSTM, {}),
    "lstm_proj": (nn.LSTM, GatedLSTM, {"proj_size": 3}),
    "gru": (nn.GRU, GatedGRU, {}),
    "rnn_tanh": (nn.RNN, GatedRNN, {}),
    "rnn_relu": (nn.RNN, GatedRNN, {"nonlinearity": "relu"}),
}
SHAPES: dict[str, dict[str, Any]] = {
    "one": {},
    "stacked": {"num_layers": 3},
    "both_ways": {"num_layers": 2, "bidirectional": True},
    "no_bias": {"bias": False},
}
T, B, I, H = 6, 3, 4, 5


@pytest.fixture(params=["torch", "fused"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates by torch's own products, as in small layers on a CPU, and by the operators of dampr."""
    if request.param == "fused":
        monkeypatch.setattr(rnn, "_BY_TORCH", -1)


every_kind = pytest.mark.parametrize("kind", KINDS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def build(
    kind: str, shape: str = "one", gate: Any = "hard_concrete", dtype: torch.dtype = torch.float32, **more: Any
) -> Any:
    """A layer with gates that are closed, in between and open, drawn and in evaluation mode."""
    torch.manual_seed(len(kind) + len(shape))
    _, gated, arguments = KINDS[kind]
    layer = gated(I, H, **arguments, **SHAPES[shape], **more, gate=gate).to(dtype)
    if hasattr(layer.gate, "log_alpha") and isinstance(layer.gate, HardConcrete):
        layer.gate.log_alpha.data.uniform_(-4, 3)
    return layer


def state_of(layer: Any, batch: tuple[int, ...] = (B,)) -> Any:
    rows = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(rows, *batch, layer.proj_size or H, dtype=layer.weight_ih_l0.dtype)
    return (h, torch.randn(rows, *batch, H, dtype=h.dtype)) if isinstance(layer, nn.LSTM) else h


def tensors(result: Any) -> list[torch.Tensor]:
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


def truth(
    layer: Any, x: torch.Tensor, z: torch.Tensor, state: Any, parameters: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The reference on (T, B, I), in the dtype of its inputs."""
    slots = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
    ends = [f"_l{i}{'_reverse' if d else ''}" for i in range(layer.num_layers) for d in range(1 + layer.bidirectional)]
    weights = [[parameters.get(slot + end) for slot in slots] for end in ends]
    h, c = state if isinstance(state, tuple) else (state, None)
    gates = z.view(layer.num_layers, 1 + layer.bidirectional, -1)
    found = reference.gated_rnn(layer.mode, x, weights, gates, h, c)
    return list(found if isinstance(layer, nn.LSTM) else found[:2])


@every_kind
@every_shape
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("product")
def test_values_and_gradients_are_those_of_the_loop(kind: str, shape: str, given: bool, dtype: torch.dtype) -> None:
    layer = build(kind, shape, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    state = state_of(layer) if given else None
    if given:
        for t in state if isinstance(state, tuple) else (state,):
            t.requires_grad_()
    states = [] if not given else list(state if isinstance(state, tuple) else (state,))
    leaves = [x, *states, *layer.parameters()]
    torch.manual_seed(3)
    out = tensors(layer(x, state))
    dout = [torch.randn_like(t) for t in out]
    grads = torch.autograd.grad(out, leaves, dout)

    def expected(wide: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(3)
        z = layer.gate().to(wide)
        own = {name: p.to(wide) for name, p in layer.named_parameters() if not name.startswith("gate")}
        given_state = (
            tuple(t.to(wide) for t in states) if len(states) == 2 else (states[0].to(wide) if states else None)
        )
        found = truth(layer, x.to(wide), z, given_state, own)
        return [*found, *torch.autograd.grad(found, leaves, [t.to(wide) for t in dout])]

    names = ["output", "h_n", "c_n"][: len(out)] + [f"d{i}" for i in range(len(leaves))]
    # A gradient through dead ReLUs is a small sum of large terms. float64 has no wider truth to see that by, so its
    # error is measured against the largest gradient there is, from which those terms came.
    largest = max(float(g.abs().max()) for g in grads)
    for name, got, right, plain in zip(names, [*out, *grads], expected(torch.float64), expected(dtype), strict=True):
        result = compare(name, got, right.to(got.dtype) if dtype == torch.float64 else right.double(), plain)
        assert result.ok or (
            dtype == torch.float64 and result.rms <= result.rms_bound and result.error <= 1e-15 * largest
        ), str(result)


@every_kind
@pytest.mark.usefixtures("product")
def test_gradcheck(kind: str) -> None:
    _, gated, arguments = KINDS[kind]
    layer = gated(2, 4 if "proj" in kind else 3, num_layers=2, **arguments).double()
    layer.gate.log_alpha.data.uniform_(-1, 1)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        names = [name for name, _ in layer.named_parameters()]
        return tuple(tensors(torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))))

    assert torch.autograd.gradcheck(run, (x, *(p.detach().requires_grad_() for p in layer.parameters())))


@every_kind
@every_shape
def test_a_fresh_layer_changes_no_bit_and_keeps_the_parameters(kind: str, shape: str) -> None:
    dense_type, gated_type, arguments = KINDS[kind]
    torch.manual_seed(0)
    dense = dense_type(I, H, **arguments, **SHAPES[shape]).eval()
    gated = gated_type.from_dense(dense)
    x = torch.randn(T, B, I)
    for state in (None, state_of(gated)):
        for a, b in zip(tensors(dense(x, state)), tensors(gated(x, state)), strict=True):
            assert torch.equal(a, b)
    names = [name for name, _ in dense.named_parameters()]
    assert [name for name, _ in gated.named_parameters()] == [*names, "gate.log_alpha"]
    assert all(getattr(gated, name) is getattr(dense, name) for name in names)
    other = gated_type(I, H, **arguments, **SHAPES[shape]).eval()
    other.load_state_dict(dense.state_dict())
    assert torch.equal(other(x)[0], dense(x)[0])
    plain = gated.to_dense()
    assert type(plain) is dense_type
    assert torch.equal(plain(x)[0], dense(x)[0])


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_and_batch_first_inputs(kind: str, batch_first: bool) -> None:
    layer = build(kind, "both_ways", batch_first=batch_first).eval()
    x = torch.randn(T, I)
    state = state_of(layer, ())
    widen = (lambda t: t.unsqueeze(1)) if not isinstance(state, tuple) else (lambda s: tuple(t.unsqueeze(1) for t in s))
    dim = 0 if batch_first else 1
    one, many = tensors(layer(x, state)), tensors(layer(x.unsqueeze(dim), widen(state)))
    torch.testing.assert_close(one[0], many[0].squeeze(dim))
    for a, b in zip(one[1:], many[1:], strict=True):
        torch.testing.assert_close(a, b.squeeze(1))


@every_kind
def test_a_packed_sequence_is_its_sequences_one_by_one(kind: str) -> None:
    layer = build(kind, "both_ways").eval()
    lengths = [3, 6, 1]
    parts = [torch.randn(n, I) for n in lengths]
    output, state = layer(pack_sequence(parts, enforce_sorted=False))
    padded, found = pad_packed_sequence(output)
    assert found.tolist() == lengths
    for i, part in enumerate(parts):
        alone = tensors(layer(part))
        torch.testing.assert_close(padded[: lengths[i], i], alone[0])
        for a, b in zip(tensors((None, state))[1:], alone[1:], strict=True):
            torch.testing.assert_close(a[:, i], b)


@every_kind
@pytest.mark.usefixtures("product")
def test_a_packed_sequence_has_gradients_of_the_gates(kind: str) -> None:
    layer = build(kind, "both_ways")
    x = torch.randn(T, B, I, requires_grad=True)
    results = []
    for packed in (False, True):
        torch.manual_seed(2)
        output, _ = layer(pack_padded_sequence(x, [T] * B) if packed else x)
        output = pad_packed_sequence(output)[0] if packed else output
        results.append(torch.autograd.grad(output.square().sum(), [x, *layer.parameters()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_kind
def test_two_chunks_with_the_same_gates_are_one_run(kind: str) -> None:
    layer = build(kind, "stacked").eval()
    x = torch.randn(T, B, I)
    whole, first = layer(x), layer(x[:2])
    second = layer(x[2:], first[1])
    torch.testing.assert_close(torch.cat([first[0], second[0]]), whole[0])
    for a, b in zip(tensors(second)[1:], tensors(whole)[1:], strict=True):
        torch.testing.assert_close(a, b)


@every_kind
def test_a_batch_of_nothing(kind: str) -> None:
    layer = build(kind, "both_ways")
    output, _ = layer(torch.randn(T, 0, I))
    assert output.shape == (T, 0, 2 * (layer.proj_size or H))
    output.sum().backward()
    assert not layer.gate.log_alpha.grad.any()


@every_kind
def test_one_draw_per_call_and_none_in_evaluation(kind: str) -> None:
    layer = build(kind)
    x = torch.ones(T, B, I)
    y = layer(x)[0]
    closed = (y == 0).all(0)
    assert torch.equal(closed, closed[:1].expand_as(closed))  # the same gates in every step and sequence
    assert not torch.equal(y, layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("family", ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"])
@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "gru"])
def test_every_family(family: str, kind: str) -> None:
    layer = build(kind, "both_ways", gate=family, dtype=torch.float64).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    z = layer.gate()
    expected = truth(layer, x, z.double(), None, dict(layer.named_parameters()))
    for a, b in zip(tensors(layer(x)), expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(tensors(layer.to_dense()(x)), tensors(layer(x)))
    layer.train()(x)[0].square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in layer.gate.parameters())


def test_gates_that_start_below_one_are_kept_only_where_a_projection_makes_up_for_them() -> None:
    x = torch.randn(T, B, I)
    dense = nn.LSTM(I, H, proj_size=3)
    before = dense(x)[0].detach()
    torch.testing.assert_close(GatedLSTM.from_dense(dense, gate="dam").eval()(x)[0], before)
    with pytest.raises(ValueError, match="fresh gates are not 1, and nothing in LSTM"):
        GatedLSTM.from_dense(nn.LSTM(I, H), gate="dam")
    with pytest.raises(TypeError, match="layer=GRU: expected exactly nn.LSTM"):
        GatedLSTM.from_dense(nn.GRU(I, H))


def close(layer: Any, closed: torch.Tensor, fractional: bool) -> None:
    layer.gate.log_alpha.data.fill_(9.0)
    if fractional:
        layer.gate.log_alpha.data.uniform_(-1, 1)
    layer.gate.log_alpha.data[closed] = -9.0


@every_kind
@every_shape
@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, "all_but_one", "all"])
def test_the_compacted_layer_computes_the_same(kind: str, shape: str, fractional: bool, share: float | str) -> None:
    layer = build(kind, shape).eval()
    count = layer.gate.num_gates
    closed = torch.rand(count) < (share if isinstance(share, float) else 2.0)
    if share == "all_but_one":
        closed[torch.randint(count, ())] = False
    close(layer, closed, fractional)
    small, kept, scale = layer.compacted()
    assert type(small) is KINDS[kind][0]
    width = small.proj_size or small.hidden_size
    most = max((layer.gate.deterministic() != 0).view(-1, layer.proj_size or H).sum(1).tolist())
    assert width == max(1, most)
    assert len(kept) == len(scale) == width * (1 + layer.bidirectional)
    if layer.proj_size or not (fractional or share):
        assert bool((scale == 1).all())
    x = torch.randn(T, B, I)
    masked = layer(x)[0]
    torch.testing.assert_close(small(x)[0] * scale, masked[..., kept])
    rest = torch.ones(masked.shape[-1], dtype=torch.bool)
    rest[kept] = False
    assert not masked[..., rest].any()
    assert rest.nonzero().flatten().tolist() == sorted(
        layer.closed_channels()[0] & set(rest.nonzero().flatten().tolist())
    )
    assert not any(isinstance(m, (GatedLSTM, GatedGRU, GatedRNN)) for m in small.modules())


@every_kind
def test_the_dense_layer_of_a_gated_one_takes_states_too(kind: str) -> None:
    layer = build(kind, "both_ways").eval()
    plain = layer.to_dense()
    assert type(plain) is (nn.LSTM if layer.proj_size else ScaledRNN)
    x = torch.randn(T, B, I)
    state = layer(x)[1]
    for a, b in zip(tensors(plain(x, state)), tensors(layer(x, state)), strict=True):
        torch.testing.assert_close(a, b)


@every_kind
def test_a_gate_costs_what_compaction_saves(kind: str) -> None:
    layer = build(kind).eval()
    closed = torch.zeros(layer.gate.num_gates, dtype=torch.bool)
    closed[1] = True
    close(layer, closed, False)
    small, _, _ = layer.compacted()
    saved = sum(p.numel() for p in layer.parameters(recurse=False)) - sum(p.numel() for p in small.parameters())
    assert layer.group_size()[1].item() == saved


@every_kind
@every_shape
def test_the_penalty_adds_up_weights_and_squares(kind: str, shape: str) -> None:
    layer = build(kind, shape)
    torch.testing.assert_close(layer.group_size(), layer._of_units(torch.ones_like))
    pi = layer.gate.open_probability()
    torch.testing.assert_close(layer.penalty(3.0), (3 * pi * layer.group_size()).sum())
    total = layer.penalty(0.0, 2.0)
    torch.testing.assert_close(total, (pi * layer._of_units(torch.square)).sum())
    total.backward()
    assert bool(layer.weight_hh_l0.grad.any())


def test_closed_units_are_told_by_layer_and_direction() -> None:
    layer = build("gru", "both_ways")
    closed = torch.zeros(4 * H, dtype=torch.bool)
    closed[[0, H + 1, 2 * H + 2, 3 * H + 3, 3 * H + 4]] = True
    close(layer, closed, False)
    assert layer.closed_units() == [{0}, {1}, {2}, {3, 4}]
    assert layer.closed_channels() == ({2, H + 3, H + 4}, set())


def test_dropout_between_layers_is_that_of_the_dense_layer() -> None:
    torch.manual_seed(0)
    dense = nn.LSTM(I, H, 2, dropout=0.5)
    gated = GatedLSTM.from_dense(dense)
    gated.gate.eval()
    x = torch.randn(T, B, I)
    torch.manual_seed(1)
    expected = dense(x)[0]
    torch.manual_seed(1)
    assert torch.equal(gated(x)[0], expected)
    assert gated.dropout == gated.to_dense().dropout == gated.compacted()[0].dropout == 0.5


def test_it_is_copied_pickled_and_reset() -> None:
    layer = build("lstm", "both_ways").eval()
    x = torch.randn(T, B, I)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], layer(x)[0])
        other.weight_hh_l0.data.zero_()
        assert not torch.equal(other(x)[0], layer(x)[0])
    weight = layer.weight_hh_l0.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight_hh_l0, weight)
    assert bool((layer.gate.log_alpha == 3).all()), "gates are fresh too"


def test_a_call_leaves_the_layer_as_it_is_so_threads_can_share_it() -> None:
    layer = build("lstm").eval()
    inputs = [torch.randn(T, B, I) for _ in range(4)]
    expected = [layer(x)[0] for x in inputs]
    weights = list(layer._flat_weights)
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(layer(inputs[i])[0], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(a is b for a, b in zip(weights, layer._flat_weights, strict=True))


def test_parameters_that_were_swapped_are_read() -> None:
    layer = build("gru").eval()
    x = torch.randn(T, B, I)
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters() if not name.startswith("gate")}
    assert not torch.func.functional_call(layer, zeros, (x,))[0].any()
    for name, zero in zeros.items():
        setattr(layer, name, nn.Parameter(zero))
    assert not layer(x)[0].any()


@pytest.mark.parametrize("h", [(2, B, H), (1, B, H + 1), (1, B + 1, H)])
def test_a_state_of_another_shape_is_refused(h: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="hidden"):
        build("gru")(torch.randn(T, B, I), torch.randn(h))


def test_a_shared_gate_has_to_fit() -> None:
    with pytest.raises(ValueError, match="gate.num_gates=3: expected 10"):
        GatedLSTM(I, H, 2, gate=HardConcrete(3))


def test_autocast() -> None:
    layer = build("lstm").eval()
    x = torch.randn(T, B, I)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(I, 4)(x)
    except RuntimeError as error:
        pytest.skip(f"torch's own LSTM does not run in bfloat16 on this processor: {error}")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)[0]
    torch.testing.assert_close(y.float(), layer(x)[0], rtol=0.05, atol=0.02)


@every_kind
@pytest.mark.parametrize("shape", ["one", "both_ways"])
# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@torch._dynamo.config.patch(allow_rnn=True)
def test_it_compiles_in_one_graph_where_torch_compiles_recurrent_layers(kind: str, shape: str) -> None:
    torch._dynamo.reset()
    layer, x = build(kind, shape), torch.randn(T, B, I)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
        layer.zero_grad()
        torch.manual_seed(5)
        y = run(x)[0]
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)
