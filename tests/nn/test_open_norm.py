"""GatedLayerNorm(statistics="open"): what a smaller plain norm computes of the open elements,
against explicit loops.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dampr.gates import Fixed, HardConcrete
from dampr.nn import GatedLayerNorm

C = 6


def layer(z, shape=(C,), dtype=torch.float64, **how):
    """A norm with gates of these values and parameters that are not those of a fresh one."""
    norm = GatedLayerNorm(shape, gate=Fixed(torch.as_tensor(z)), statistics="open", dtype=dtype, **how)
    generator = torch.Generator().manual_seed(1)
    for p in norm.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    return norm


def sample(*shape, dtype=torch.float64, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 3).to(dtype)


def by_loops(x, z, weight, bias, eps):
    """Mean and variance over the open channels, one after the other, of each row."""
    open_channels = [i for i, value in enumerate(z) if value != 0]
    rows = []
    for row in x.reshape(-1, len(z)).tolist():
        y = [0.0] * len(z)
        if open_channels:
            mean = sum(row[i] for i in open_channels) / len(open_channels)
            var = sum((row[i] - mean) ** 2 for i in open_channels) / len(open_channels)
            for i in open_channels:
                gain, shift = 1.0 if weight is None else weight[i].item(), 0.0 if bias is None else bias[i].item()
                y[i] = float(z[i]) * (gain * (row[i] - mean) / math.sqrt(var + eps) + shift)
        rows.append(y)
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


CLOSED = {"none": [], "one": [2], "some": [0, 3, 5], "all but one": [0, 1, 2, 4, 5], "all": range(C)}


@pytest.mark.parametrize("eps", [1e-5, 2.0])
@pytest.mark.parametrize(
    "how", [{}, {"bias": False}, {"elementwise_affine": False}], ids=["gain and bias", "gain", "bare"]
)
@pytest.mark.parametrize("closed", CLOSED)
def test_it_is_the_norm_of_the_open_channels_written_out(closed, how, eps):
    z = torch.tensor([1.0, 0.3, 1.0, 0.7, 1.0, 0.9]).index_fill(
        0, torch.tensor(list(CLOSED[closed]), dtype=torch.int64), 0.0
    )
    norm, x = layer(z, eps=eps, **how), sample(4, 3, C)
    y = norm(x)
    # gates are float32
    torch.testing.assert_close(y, by_loops(x, z.tolist(), norm.weight, norm.bias, eps), rtol=1e-6, atol=1e-9)
    assert y[..., z == 0].eq(0).all()


@pytest.mark.parametrize("closed", CLOSED)
def test_compacted_is_the_plain_norm_of_what_is_open(closed):
    z = torch.ones(C).index_fill(0, torch.tensor(list(CLOSED[closed]), dtype=torch.int64), 0.0)
    norm, x = layer(z), sample(5, C)
    plain, kept = norm.compacted()
    assert type(plain) is nn.LayerNorm
    assert plain.normalized_shape == (len(kept),) == (max(1, int(z.sum())),)
    assert kept.tolist() == (z.nonzero().flatten().tolist() or [0])
    torch.testing.assert_close(torch.zeros_like(x).index_copy(1, kept, plain(x[:, kept])), norm(x))
    if closed != "none":
        with pytest.raises(ValueError, match=r"statistics='open' with \d of 6 gates closed: expected all open"):
            norm.to_dense()
    else:
        assert torch.equal(norm.to_dense()(x), norm(x))


def test_several_dimensions():
    z = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    norm, x = layer(z, (2, C)), sample(3, 2, C)
    expected = by_loops(x.flatten(1), z.tolist(), norm.weight.flatten(), norm.bias.flatten(), norm.eps).view(x.shape)
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-9)
    plain, kept = norm.compacted()
    torch.testing.assert_close(plain(x.flatten(1)[:, kept]), norm(x).flatten(1)[:, kept])


def test_nothing_depends_on_what_comes_in_where_a_gate_is_closed():
    z = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    norm, x = layer(z, dtype=torch.float32), sample(4, C, dtype=torch.float32)
    expected = norm(x)
    for garbage in (-7.0, 1e30):
        other = x.clone()
        other[:, z == 0] = garbage
        other.requires_grad_()
        y = norm(other)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        assert other.grad[:, z == 0].eq(0).all()
        assert other.grad[:, z != 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "how", [{}, {"bias": False}, {"elementwise_affine": False}], ids=["gain and bias", "gain", "bare"]
)
def test_with_open_gates_it_is_the_plain_norm_to_the_bit_gradients_too(how, dtype):
    norm = layer(torch.ones(C), dtype=dtype, **how)
    plain = nn.LayerNorm(C, dtype=dtype, **how)
    plain.load_state_dict({name: t for name, t in norm.state_dict().items() if not name.startswith("gate")})
    leaves = [sample(4, C, dtype=dtype).requires_grad_() for _ in range(2)]
    ys = [run(x) for run, x in zip((norm, plain), leaves, strict=True)]
    for y in ys:
        y.float().square().sum().backward()
    assert torch.equal(*ys)
    assert torch.equal(*(x.grad for x in leaves))
    for (name, a), (_, b) in zip(norm.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_fresh_gates_leave_the_plain_norm_in_evaluation_to_the_bit():
    plain, x = nn.LayerNorm(C).eval(), sample(4, C, dtype=torch.float32)
    gated = GatedLayerNorm.from_dense(plain, statistics="open")
    assert gated.weight is plain.weight
    assert torch.equal(gated(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        half = x.bfloat16()
        assert torch.equal(gated(half), plain(half))


def test_gradcheck():
    z = torch.tensor([0.9, 0.0, 0.4, 1.0, 0.0, 0.7], dtype=torch.float64)
    norm, x = layer(z), sample(3, C).requires_grad_()
    weight, bias = norm.weight.detach().clone().requires_grad_(), norm.bias.detach().clone().requires_grad_()
    is_open = z != 0

    def run(x, weight, bias, opened):
        norm.gate.values = torch.zeros_like(z).index_put((is_open,), opened)
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight, bias, z[is_open].requires_grad_()))


def test_a_drawn_gate_gets_the_gradient_of_gain_and_bias():
    """Of a closed one there is none, as for every folded gate; those in between multiply gain and bias."""
    norm = GatedLayerNorm(64, statistics="open")
    nn.init.zeros_(norm.gate.log_alpha)
    x = sample(8, 64, dtype=torch.float32)
    torch.manual_seed(5)
    y = norm(x)
    shut = y.eq(0).all(0)
    assert 0 < int(shut.sum()) < 64
    y.square().sum().backward()
    assert norm.gate.log_alpha.grad[shut].eq(0).all()
    assert norm.gate.log_alpha.grad.ne(0).any()
    torch.manual_seed(5)
    z = norm.gate()
    smaller = F.layer_norm(x[:, ~shut], (int((~shut).sum()),), norm.weight[~shut], norm.bias[~shut], norm.eps)
    torch.testing.assert_close(y[:, ~shut], smaller * z[~shut], rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((smaller * z[~shut]).square().sum(), norm.gate.log_alpha)[0]
    torch.testing.assert_close(norm.gate.log_alpha.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_as_near_as_the_smaller_norm_in_that_precision(autocast):
    """Errors against float64 over many rows; up to twice torch's own, plus one rounding of the input,
    which the factor costs.
    """
    z = torch.arange(64).remainder(3).ne(0).float()
    exact = layer(z, (64,))
    x = sample(200, 64)
    truth = exact(x)[:, z != 0]
    low = layer(z, (64,), dtype=torch.float32 if autocast else torch.bfloat16)
    small, kept = low.compacted()
    given = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        errors = [
            (run.double() - truth).square().mean().sqrt() for run in (low(given)[:, z != 0], small(given[:, kept]))
        ]
    assert errors[0] <= 2 * errors[1]


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_without_a_graph_break():
    norm, x = GatedLayerNorm(C, statistics="open"), sample(4, C, dtype=torch.float32)
    nn.init.zeros_(norm.gate.log_alpha)
    for mode in (True, False):
        norm.train(mode)
        torch.manual_seed(3)
        expected = norm(x)
        torch.manual_seed(3)
        found = torch.compile(norm, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
    assert norm.gate.log_alpha.grad is not None


def test_what_is_kept_for_the_backward_is_one_tensor_of_the_size_of_the_input():
    kept = []
    norm, x = layer([1.0, 0, 1, 1, 0, 1], dtype=torch.float32), sample(500, C, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    assert sum(t.numel() == x.numel() for t in kept) == 1


def test_arguments_are_checked_and_shown():
    with pytest.raises(ValueError, match=r"statistics='some': expected one of \['all', 'open'\]"):
        GatedLayerNorm(C, statistics="some")
    for build in (
        lambda **how: GatedLayerNorm(C, **how),
        lambda **how: GatedLayerNorm.from_dense(nn.LayerNorm(C), **how),
    ):
        with pytest.raises(ValueError, match="per_sample=True with statistics='open': expected False"):
            build(per_sample=True, statistics="open")
        assert "statistics='open'" in repr(build(statistics="open"))
        assert "statistics" not in repr(build())
    with pytest.raises(ValueError, match="statistics='all': expected 'open'"):
        GatedLayerNorm(C).compacted()
    assert GatedLayerNorm(C, gate=HardConcrete(C), statistics="open").statistics == "open"
