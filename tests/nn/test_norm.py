"""Gated norms as layers: drop-ins for torch's, gates folded or in the pass, closed channels, statistics, penalties."""

import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import dampr
from dampr import functional
from dampr.gates import HardConcrete
from dampr.nn import GatedBatchNorm1d, GatedBatchNorm2d, GatedLayerNorm

C = 6
KINDS = {
    GatedBatchNorm1d: (nn.BatchNorm1d, C),
    GatedBatchNorm2d: (nn.BatchNorm2d, C),
    GatedLayerNorm: (nn.LayerNorm, (3, C)),
}
BATCH_NORMS = [GatedBatchNorm1d, GatedBatchNorm2d]


def _input(kind, batch=5):
    return (
        torch.randn(
            {GatedBatchNorm1d: (batch, C, 4), GatedBatchNorm2d: (batch, C, 4, 3), GatedLayerNorm: (batch, 3, C)}[kind]
        )
        * 2
        + 1
    )


def _dense(kind, **arguments):
    """A plain norm with statistics and parameters that are not those of a fresh one."""
    dense = KINDS[kind][0](KINDS[kind][1], **arguments)
    with torch.no_grad():
        for t in dense.parameters():
            t.normal_()
    for _ in range(3):
        dense(_input(kind))
    return dense


def _set_gates(layer, closed=2):
    """Some gates closed for good, the others open for good, so that a draw is no surprise."""
    with torch.no_grad():
        layer.gate.parameter.fill_(60.0)
        layer.gate.parameter[:closed] = -60.0


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_layer_equals_the_dense_one_to_the_bit_in_evaluation(kind, per_sample):
    dense, x = _dense(kind).eval(), _input(kind)
    gated = kind.from_dense(dense, per_sample=per_sample)
    assert not gated.training
    assert torch.equal(gated(x), dense(x))
    fresh = kind(KINDS[kind][1], per_sample=per_sample).eval()
    fresh.load_state_dict(dense.state_dict(), strict=True)
    assert torch.equal(fresh(x), dense(x))
    assert [name for name, _ in fresh.named_parameters()][:2] == ["weight", "bias"]
    plain = gated.to_dense()
    assert type(plain) is type(dense)
    assert torch.equal(plain(x), dense(x))


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_a_fresh_layer_with_an_activation_equals_norm_and_relu_to_the_bit_in_evaluation(kind):
    dense, x = _dense(kind).eval(), _input(kind)
    for per_sample in (False, True):
        gated = kind.from_dense(dense, per_sample=per_sample, activation="relu")
        assert torch.equal(gated(x), F.relu(dense(x)))
        plain = gated.to_dense()
        assert [type(part) for part in plain] == [type(dense), nn.ReLU]
        assert not any(part.training for part in plain)
        assert torch.equal(plain(x), gated(x))
        assert "activation='relu'" in repr(gated)
        assert "activation" not in repr(kind(C))


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_shares_parameters_and_buffers(kind):
    dense = _dense(kind)
    gated = kind.from_dense(dense)
    assert gated.training
    for name, t in (*dense.named_parameters(), *dense.named_buffers()):
        assert getattr(gated, name) is t, name
    gated.eval()
    copies = dict(gated.to_dense().named_parameters())
    assert all(copies[name].data_ptr() != t.data_ptr() for name, t in dense.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_exact_dense_type_is_taken(kind):
    class Special(KINDS[kind][0]):
        pass

    with pytest.raises(TypeError, match=f"layer=Special: expected exactly nn.{KINDS[kind][0].__name__}"):
        kind.from_dense(Special(KINDS[kind][1]))


@pytest.mark.parametrize(("per_sample", "activation"), list(itertools.product((False, True), (None, "relu"))))
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_with_open_gates_it_is_the_dense_norm_in_both_modes(kind, tracked, affine, momentum, per_sample, activation):
    arguments = {"momentum": momentum, "affine": affine, "track_running_stats": tracked, "eps": 1e-3}
    dense, gated = KINDS[kind][0](C, **arguments), kind(C, **arguments, per_sample=per_sample, activation=activation)
    _set_gates(gated, closed=0)
    act = F.relu if activation else nn.Identity()
    for training in (True, True, False, True, False):
        x = _input(kind)
        ys = [act(layer.train(training)(x)) for layer in (dense, gated)]
        torch.testing.assert_close(ys[1], ys[0], atol=1e-5, rtol=1e-5)
        for (name, a), (other, b) in zip(dense.named_buffers(), gated.named_buffers(), strict=True):
            assert name == other
            torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-6)
    assert (gated.weight is None) is not affine
    plain = gated.to_dense()
    torch.testing.assert_close(plain(x), ys[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_channels_are_exactly_zero_in_both_modes_and_pass_no_gradient(kind, per_sample):
    gated = kind.from_dense(_dense(kind), per_sample=per_sample)
    _set_gates(gated)
    shut = ~gated.gate.is_open()
    assert gated.closed_channels() == ({0, 1}, set())
    for training in (True, False):
        x = _input(kind).requires_grad_()
        y = gated.train(training)(x)
        channels_last = y.flatten(1) if kind is GatedLayerNorm else y.transpose(0, 1).flatten(1).t()
        assert channels_last[:, shut].eq(0).all()
        assert channels_last[:, ~shut].ne(0).all()
        y.square().sum().backward()
        assert gated.weight.grad.view(-1)[shut].eq(0).all()
        assert gated.bias.grad.view(-1)[shut].eq(0).all()
        if kind is not GatedLayerNorm:
            assert x.grad[:, :2].eq(0).all()
    torch.testing.assert_close(gated.to_dense()(x), y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_one_pass_equals_norm_gates_and_relu_one_after_the_other(kind, activation):
    dense = _dense(kind)
    gated, x = kind.from_dense(dense, per_sample=True, activation=activation), _input(kind)
    with torch.no_grad():
        gated.gate.parameter.normal_()
    twin = _dense(kind)
    twin.load_state_dict(dense.state_dict())
    results = []
    for run in (gated, lambda x: _unfused(twin, gated.gate, x, activation)):
        leaf = x.clone().requires_grad_()
        gated.zero_grad()
        twin.zero_grad()
        torch.manual_seed(7)
        y = run(leaf)
        y.square().sum().backward()
        own = gated if run is gated else twin
        grads = own.weight.grad, own.bias.grad, gated.gate.parameter.grad
        results.append(
            [y.detach(), leaf.grad, *(g.clone() for g in grads), own.running_mean.clone(), own.running_var.clone()]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def _unfused(norm, gate, x, activation):
    parameter, seed, spec = gate.call()
    y = functional.gate_activations(norm(x), parameter, seed=seed, per_sample=True, spec=spec)
    return y if activation is None else F.relu(y)


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_draws_a_set_of_gates_for_each_sample(kind):
    gated = kind(KINDS[kind][1] if kind is GatedLayerNorm else 64, per_sample=True)
    with torch.no_grad():
        gated.gate.parameter.zero_()
        gated.bias.fill_(3.0)  # so that an open gate shows
    x = _input(kind, 20)
    x = x if kind is GatedLayerNorm else x[:, :1].repeat_interleave(64, 1)
    for per_sample in (True, False):
        gated.per_sample = per_sample
        zero = gated(x).eq(0)
        zero = zero.flatten(1) if kind is GatedLayerNorm else zero.flatten(2)
        patterns = zero if kind is GatedLayerNorm else zero.all(2)
        if kind is not GatedLayerNorm:
            assert torch.equal(zero.all(2), zero.any(2)), "a channel is closed everywhere in an image or nowhere"
        assert patterns.any()
        assert (len({tuple(row.tolist()) for row in patterns}) > 10) is per_sample


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_the_written_out_sum(kind):
    gated = kind.from_dense(_dense(kind))
    with torch.no_grad():
        gated.gate.parameter.normal_()
    pi, squares = gated.gate.open_probability(), (gated.weight.square() + gated.bias.square()).view(-1)
    torch.testing.assert_close(gated.penalty(0.3), (pi * 0.3 * 2).sum())
    torch.testing.assert_close(gated.penalty(0.3, 0.1), (pi * (0.3 * 2 + 0.05 * squares)).sum())
    gated.weights_per_gate += 27  # as convert does for the filter in front
    torch.testing.assert_close(gated.penalty(1.0), (pi * 29).sum())
    torch.testing.assert_close(dampr.penalty(nn.Sequential(gated), lam=1.0), gated.penalty(1.0))
    bare = kind(KINDS[kind][1], **{"elementwise_affine" if kind is GatedLayerNorm else "affine": False})
    assert bare.penalty(1.0) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_gates_that_are_not_one_are_made_up_for(kind):
    count = _dense(kind).weight.numel()
    dense, x = _dense(kind).eval(), _input(kind)
    expected = dense(x)
    gate = HardConcrete(count)
    with torch.no_grad():
        gate.parameter.fill_(0.3)
    assert gate.deterministic().ne(1).all()
    torch.testing.assert_close(kind.from_dense(dense, gate=gate)(x), expected, atol=1e-5, rtol=1e-5)
    bare = KINDS[kind][0](KINDS[kind][1], **{"elementwise_affine" if kind is GatedLayerNorm else "affine": False})
    with pytest.raises(ValueError, match="gate=HardConcrete: fresh gates are not 1, and this norm has no gain"):
        kind.from_dense(bare, gate=gate)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_goes_round_and_a_dense_one_leaves_gates_alone(kind):
    dense = _dense(kind)
    gated = kind.from_dense(dense)
    with torch.no_grad():
        gated.gate.parameter.normal_()
    other = kind(KINDS[kind][1])
    other.load_state_dict(gated.state_dict())
    x = _input(kind)
    assert torch.equal(other.eval()(x), gated.eval()(x))
    gates = other.gate.parameter.clone()
    other.load_state_dict(_dense(kind).state_dict(), strict=True)
    assert torch.equal(other.gate.parameter, gates)


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_half_precision_layers_run_and_keep_their_gates_in_float32(kind):
    for activation, per_sample in itertools.product((None, "relu"), (False, True)):
        gated = kind(C, per_sample=per_sample, activation=activation).bfloat16()
        assert gated.gate.parameter.dtype == torch.float32
        y = gated(_input(kind).bfloat16())
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert gated.weight.grad.dtype == torch.bfloat16
        assert gated.running_mean.dtype == torch.bfloat16
        assert gated.running_mean.ne(0).all()


def test_channels_last_stays_and_one_value_per_channel_is_refused_as_by_torch():
    gated = GatedBatchNorm2d(C, per_sample=True, activation="relu")
    x = _input(GatedBatchNorm2d).contiguous(memory_format=torch.channels_last)
    assert gated(x).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="more than one value per channel"):
        GatedBatchNorm1d(C, per_sample=True)(torch.randn(1, C))
    with pytest.raises(ValueError, match="expected 4D input"):
        gated(torch.randn(2, C))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"activation='gelu': expected one of \[None, 'relu'\]"):
        GatedBatchNorm2d(C, activation="gelu")
    with pytest.raises(ValueError, match=r"activation=True: expected"):
        GatedBatchNorm1d.from_dense(nn.BatchNorm1d(C), activation=True)
    with pytest.raises(ValueError, match="gate.num_gates=5: expected 6"):
        GatedBatchNorm2d(C, gate=HardConcrete(5))


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("per_sample", [False, True])
def test_layer_norm_compiles_without_a_graph_break(per_sample):
    layer, x = GatedLayerNorm((3, C), per_sample=per_sample), torch.randn(4, 3, C)
    torch.manual_seed(3)
    expected = layer(x)
    torch.manual_seed(3)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert layer.gate.parameter.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_under_autocast_keeps_the_digits_of_its_gain(dtype):
    dense = nn.LayerNorm(16)
    nn.init.uniform_(dense.weight, 0.5, 1.5)
    gated, x = GatedLayerNorm.from_dense(dense).eval(), torch.randn(4, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated(x), dense(x))


def _pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def _parametrised(layer):
    parametrize.register_parametrization(layer, "weight", nn.Softplus())


def _replica(layer):
    """What nn.DataParallel makes of a layer: parameters that are attributes."""
    for name, p in [*layer._parameters.items()]:
        delattr(layer, name)
        setattr(layer, name, p.detach().clone())


def _without_a_count(layer):
    del layer.num_batches_tracked
    layer.num_batches_tracked = None


def _statistics_that_are_parameters(layer):
    del layer.running_mean
    layer.running_mean = nn.Parameter(torch.zeros(4), requires_grad=False)


@pytest.mark.parametrize(
    "change", [_pruned, _parametrised, _replica, _without_a_count, _statistics_that_are_parameters]
)
def test_parameters_and_statistics_may_be_kept_elsewhere(change):
    x, layer, plain = torch.randn(5, 4, 3, 3), GatedBatchNorm2d(4), nn.BatchNorm2d(4)
    with torch.no_grad():
        layer.gate.log_alpha.fill_(30)
    for norm in (layer, plain):
        change(norm)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)


@pytest.mark.parametrize("size", [2, 64])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_of_another_size_are_refused_and_nothing_is_written(name, size):
    layer, around = GatedBatchNorm2d(4), torch.ones(128)
    setattr(layer, name, around[:size])
    with pytest.raises(RuntimeError, match=f"{name} should contain 4 elements"):
        layer(torch.randn(5, 4, 3, 3))
    assert (around == 1).all()


def test_a_tensor_on_another_device_is_refused():
    for name in ("weight", "bias"):
        layer = GatedBatchNorm2d(4, track_running_stats=False)
        setattr(layer, name, nn.Parameter(torch.empty(4, device="meta")))
        with pytest.raises((RuntimeError, ValueError), match="meta"):
            layer(torch.randn(5, 4, 3, 3))
    layer = GatedBatchNorm2d(4, track_running_stats=False)
    layer.gate.to("meta")
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        layer(torch.randn(5, 4, 3, 3))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [-1.0, 0.0])
def test_eps_is_refused_where_torch_refuses_it(eps, training, activation, per_sample):
    x = torch.randn(5, 4, 3, 3)
    plain = nn.BatchNorm2d(4, eps=eps).train(training)
    layer = GatedBatchNorm2d(4, eps=eps, activation=activation, per_sample=per_sample).train(training)
    if training or eps < 0:
        for norm in (plain, layer):
            with pytest.raises(ValueError, match="eps"):
                norm(x)
    else:
        torch.testing.assert_close(layer(x), plain(x).relu() if activation else plain(x))


@pytest.mark.skipif(
    "bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="torch's norms have no bias= yet"
)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", [GatedBatchNorm1d, GatedBatchNorm2d])
def test_a_norm_without_a_bias_stays_one(kind, per_sample):
    x = torch.randn(6, 4) if kind is GatedBatchNorm1d else torch.randn(6, 4, 3, 3)
    layer = kind(4, bias=False, per_sample=per_sample)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "gate.log_alpha"]
    assert layer.weights_per_gate == 1
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1, 2, 3]))
        layer.gate.log_alpha.copy_(torch.tensor([-9.0, 0.3, 3, 3]))
    dense = kind._dense(4, bias=False)
    dense.load_state_dict(layer.state_dict(), strict=False)
    again = kind.from_dense(dense, per_sample=per_sample)
    again.gate = layer.gate
    z = layer.gate.deterministic().detach().view(-1, *[1] * (x.dim() - 2))
    for norm in (layer, again):
        norm.eval()
        torch.testing.assert_close(norm(x), dense.eval()(x) * z)
        plain = norm.to_dense()
        assert plain.bias is None
        torch.testing.assert_close(plain(x), norm(x))
    assert layer.train()(x).shape == x.shape


@pytest.mark.skipif(
    "bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="torch's norms have no bias= yet"
)
def test_a_network_of_norms_without_a_bias_is_converted_and_cut():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 3, 6, 6)
    model = dampr.convert(model, example_inputs=x)
    with torch.no_grad():
        model[1].gate.log_alpha[:3] = -9
    small = dampr.compact(model, example_inputs=x)
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (5, 5, 5)
    assert small[1].bias is None
    torch.testing.assert_close(small.eval()(x), model.eval()(x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_explain_says_what_runs(momentum, capsys):
    layer, x = GatedBatchNorm2d(4, momentum=momentum), torch.randn(5, 4, 3, 3)
    passes = type(layer(x).grad_fn).__name__ == "_FusedNormBackward"
    assert (dampr.explain(layer, x).route == "passes") == passes
    assert passes == (momentum is not None and dampr.backend_info()["cpp"].startswith("available"))
