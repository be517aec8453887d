"""GatedLinear as a drop-in for nn.Linear."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from torch import nn

import dampr
from dampr import gates
from dampr.nn import GatedLinear

BOTH = pytest.mark.parametrize("granularity", ["output", "input"])
ALL = pytest.mark.parametrize("granularity", ["output", "input", "weight", (4, 4), (3, 5)])


def test_signature_starts_with_that_of_linear():
    dense, gated = (list(inspect.signature(t.__init__).parameters.values()) for t in (nn.Linear, GatedLinear))
    assert [(p.name, p.default) for p in gated[: len(dense)]] == [(p.name, p.default) for p in dense]
    extra = {p.name: (p.kind, p.default) for p in gated[len(dense) :]}
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert extra == {
        "gate": (keyword, "hard_concrete"),
        "granularity": (keyword, "output"),
        "per_sample": (keyword, False),
    }


@pytest.mark.parametrize("shape", [(12, 7), (64, 300), (1, 1), (129, 65)])
@ALL
def test_fresh_layer_equals_dense_to_the_bit_in_evaluation(cpu_backend, shape, granularity):
    dense = nn.Linear(*shape).eval()
    for x in (
        torch.randn(33, shape[0]),
        torch.randn(2, 3, shape[0]),
        torch.randn(shape[0]),
        torch.randn(shape[0], 9).t(),
    ):
        assert torch.equal(GatedLinear.from_dense(dense, granularity=granularity)(x), dense(x))
    loaded = GatedLinear(*shape, granularity=granularity).eval()
    loaded.load_state_dict(dense.state_dict(), strict=False)
    assert torch.equal(loaded(x), dense(x))


@ALL
def test_dense_checkpoint_loads_strictly_and_leaves_gates_alone(granularity):
    layer = GatedLinear(6, 4, granularity=granularity)
    with torch.no_grad():
        layer.gate.log_alpha.fill_(0.5)
    layer.load_state_dict(nn.Linear(6, 4).state_dict())
    assert (layer.gate.log_alpha == 0.5).all()
    model = nn.Sequential(layer, nn.ReLU())
    model.load_state_dict(nn.Sequential(nn.Linear(6, 4), nn.ReLU()).state_dict())
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({"bias": torch.zeros(4)})


@ALL
def test_own_checkpoint_round_trip_keeps_gates(granularity):
    layer, other = GatedLinear(6, 4, granularity=granularity), GatedLinear(6, 4, granularity=granularity)
    with torch.no_grad():
        layer.gate.log_alpha.uniform_(-3, 3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 6)
    assert torch.equal(layer.eval()(x), other.eval()(x))
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(x), layer(x))


def test_parameters_start_with_weight_and_bias():
    assert [n for n, _ in GatedLinear(3, 2).named_parameters()] == ["weight", "bias", "gate.log_alpha"]
    assert [n for n, _ in GatedLinear(3, 2, bias=False).named_parameters()] == ["weight", "gate.log_alpha"]


def test_from_dense_shares_parameters_draws_no_random_number_and_keeps_the_mode():
    dense = nn.Linear(5, 3).double().eval()
    state = torch.get_rng_state()
    gated = GatedLinear.from_dense(dense, granularity="input")
    assert torch.equal(torch.get_rng_state(), state)
    assert gated.weight is dense.weight
    assert gated.bias is dense.bias
    assert not gated.training
    assert gated.gate.num_gates == 5
    assert torch.equal(gated(torch.ones(2, 5, dtype=torch.float64)), dense(torch.ones(2, 5, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("granularity", "bias"), list(itertools.product(("output", "input", "weight", (4, 4), (7, 9)), (True, False)))
)
def test_to_dense_computes_the_evaluation_outputs(granularity, bias):
    layer = GatedLinear(40, 30, bias=bias, granularity=granularity)
    with torch.no_grad():
        layer.gate.log_alpha.uniform_(-4, 4)
    before = copy.deepcopy(layer.state_dict())
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    assert layer.training
    x = torch.randn(9, 40)
    torch.testing.assert_close(dense(x), layer.eval()(x))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@BOTH
@pytest.mark.parametrize("per_sample", [False, True])
def test_training_draws_anew_each_step_and_obeys_manual_seed(cpu_backend, granularity, per_sample):
    layer, x = GatedLinear(64, 64, granularity=granularity, per_sample=per_sample), torch.randn(3, 64)
    with torch.no_grad():
        layer.gate.log_alpha.zero_()
    torch.manual_seed(1)
    a, b = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), a)
    assert not torch.equal(a, b)
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws nothing"


@BOTH
def test_per_sample_rows_have_gates_of_their_own(cpu_backend, granularity):
    layer = GatedLinear(64, 64, granularity=granularity, per_sample=True)
    with torch.no_grad():
        layer.gate.log_alpha.zero_()
    y = layer(torch.ones(8, 64))
    assert len({tuple(row.tolist()) for row in y}) == 8
    layer.per_sample = False
    y = layer(torch.ones(8, 64))
    torch.testing.assert_close(y, y[:1].expand(8, 64))


def test_a_shared_gate_instance_is_one_parameter():
    gate = gates.HardConcrete(16)
    model = nn.Sequential(GatedLinear(8, 16, gate=gate), GatedLinear(16, 8, gate=gate, granularity="input"))
    assert sum(p is gate.log_alpha for p in model.parameters()) == 1
    (model(torch.randn(4, 8)).square().mean() + dampr.penalty(model)).backward()
    assert gate.log_alpha.grad is not None


@ALL
def test_penalty_counts_the_parameters_a_gate_switches_off(granularity):
    layer = GatedLinear(10, 6, granularity=granularity)
    with torch.no_grad():
        layer.gate.log_alpha.fill_(100.0)
    assert layer.penalty().item() == pytest.approx(66 if granularity == "output" else 60, rel=1e-6)
    expected = 0.5 * 0.1 * sum(p.square().sum() for p in (layer.weight, layer.bias)).item()
    assert layer.penalty(lam=0.0, prior_precision=0.1).item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        layer.gate.log_alpha.fill_(-100.0)
    assert layer.penalty().item() == pytest.approx(0, abs=1e-20)


def test_half_precision_model_keeps_gates_in_float32_and_runs():
    layer = GatedLinear(16, 8).bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.gate.log_alpha.dtype == torch.float32
    y = layer(torch.randn(4, 16, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.bfloat16


def test_meta_device_construction_and_materialisation():
    layer = GatedLinear(4, 3, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer.to_empty(device="cpu").gate.log_alpha.shape == (3,)


def test_repr_names_the_gate():
    assert "granularity='input'" in repr(GatedLinear(3, 2, granularity="input"))
    assert "preset='paper'" in repr(GatedLinear(3, 2))


def test_training_closes_gates_that_carry_nothing():
    """Inputs 8..15 are noise; a penalty closes their gates and keeps the others."""
    layer = GatedLinear(16, 4, granularity="input")
    target = nn.Linear(8, 4)
    optimizer = torch.optim.Adam(dampr.param_groups(layer, lr=1e-2, gate_lr=5e-2))
    for _ in range(600):
        x = torch.randn(64, 16)
        loss = (layer(x) - target(x[:, :8]).detach()).square().mean() + 1e-3 * dampr.penalty(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.gate.is_open().tolist() == [True] * 8 + [False] * 8


def test_a_checkpoint_that_lost_the_gates_of_one_layer_is_not_taken_for_a_dense_one():
    model = nn.Sequential(GatedLinear(4, 3), GatedLinear(3, 2))
    state = model.state_dict()
    del state["1.gate.log_alpha"]
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.gate\.log_alpha"):
        model.load_state_dict(state)
    dense = {key: t for key, t in model.state_dict().items() if ".gate." not in key}
    model.load_state_dict(dense)
