"""Closed units leave a model while it trains, nothing else changes, and they come back when they are wanted."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dampr
from dampr.gates import SelectedGate
from dampr.prune.layout import resized, shapes_of
from tests.long import long_if
from tests.models import ALL


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU, **how):
        super().__init__()
        self.rnn = kind(6, 16, batch_first=True, **how)
        self.head = nn.Linear(16 * (1 + self.rnn.bidirectional), 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 48, dropout=0.0, batch_first=True)
        self.inp, self.encoder = nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(self.inp(x)).mean(1))


class Transposed(nn.Module):
    """A width between a transposed and a grouped convolution and a group norm: gates on parameters."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(3, 12, 2, 2), nn.GroupNorm(3, 12)
        self.grouped, self.out = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 5, 1)

    def forward(self, x):
        return self.out(F.relu(self.grouped(F.relu(self.norm(self.up(x)))))).mean((2, 3))


def sequence():
    return torch.randn(4, 5, 6)


MODELS = {name: ALL[name] for name in ALL} | {
    "gru": lambda: (Recurrent(), sequence()),
    "two-layer gru": lambda: (Recurrent(num_layers=2), sequence()),
    "bidirectional lstm": lambda: (Recurrent(nn.LSTM, num_layers=2, bidirectional=True), sequence()),
    "projected lstm": lambda: (ProjectedLSTM(), sequence()),
    "rnn": lambda: (Recurrent(nn.RNN), sequence()),
    "encoder": lambda: (Encoder(), sequence()),
    "transposed": lambda: (Transposed(), torch.randn(2, 3, 8, 8)),
}


class ProjectedLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 20, proj_size=12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


def made(name, seed=0):
    torch.manual_seed(seed)
    model, x = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, x


def half_closed(name, **how):
    """A model half of whose gates a budget has closed and given up, its budget and a Shrinker."""
    model, x = made(name)
    dampr.convert(model, example_inputs=x, **how)
    budget = dampr.Budget(model, x, macs=0.99, steps=40, min_share=0.0)
    generator = torch.Generator().manual_seed(1)
    for gate in budget.controller.gates:
        gate.level[torch.randperm(gate.num_gates, generator=generator)[: gate.num_gates // 2]] = 0
    budget.controller.keep = torch.cat([gate.is_open() for gate in budget.controller.gates])
    budget.controller.given_up = lambda: ~budget.controller.keep
    return model, x, budget, dampr.Shrinker(model, x, budget=budget)


def gradients(model, x, budget):
    """Loss, gradients by name, and the importance that each gate measured, in training mode."""
    model.train()
    for gate in budget.controller.gates:
        gate.probe.grad = None
    model.zero_grad()
    out = model(x)
    loss = out.square().mean() + out.sum().sin()
    loss.backward()
    probes = torch.cat(
        [torch.zeros_like(g.probe) if g.probe.grad is None else g.probe.grad for g in budget.controller.gates]
    )
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, probes


def of_layout(shrinker, name, t):
    places = [*shrinker._layout.tensors.get(name, []), *[None] * t.dim()][: t.dim()]
    return resized(t, [None] * t.dim(), places)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_importance_are_the_same_without_closed_units(name):
    model, x, budget, shrinker = half_closed(name)
    identities = [id(p) for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    loss, before, probes = gradients(model, x, budget)
    model.load_state_dict(state)  # statistics of norms
    present = shrinker.left
    assert shrinker.shrink() > 0
    assert shrinker.left < present
    if name != "encoder":  # whose heads stay
        assert shrinker.left == pytest.approx(budget.left(), abs=0.05)
    assert [id(p) for p in model.parameters()] == identities
    # while `loss` still holds the graph of the whole model
    after_loss, after, after_probes = gradients(model, x, budget)
    torch.testing.assert_close(after_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after_probes, probes, rtol=1e-4, atol=1e-5)
    assert before.keys() == after.keys()
    for key, gradient in after.items():
        torch.testing.assert_close(gradient, of_layout(shrinker, key, before[key]), rtol=1e-4, atol=1e-5)
    assert any(p.shape != state[key].shape for key, p in model.named_parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3", "vit", "bidirectional lstm", "encoder", "transposed"])
def test_what_has_left_comes_back_as_it_was_with_the_state_of_the_optimizer(name):
    model, x, budget, shrinker = half_closed(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    gradients(model, x, budget)
    optimizer.step()
    shapes, state = shapes_of(model), copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    attributes = {
        name: {k: v for k, v in vars(m).items() if type(v) in (int, tuple)} for name, m in model.named_modules()
    }
    shrinker.shrink(optimizer)
    shrinker.shrink(optimizer)
    for p in model.parameters():
        assert all(value.shape == p.shape for value in optimizer.state[p].values() if value.numel() > 1)
    shrinker.expand(optimizer)
    assert shapes_of(model) == shapes
    assert attributes == {
        name: {k: v for k, v in vars(m).items() if type(v) in (int, tuple)} for name, m in model.named_modules()
    }
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[key][own]) for own, value in entry.items())
    assert not any(isinstance(module, SelectedGate) for module in model.modules())


@pytest.mark.parametrize(
    "how", [{"granularity": "input"}, {"per_sample": True}, {"gate": "dam"}, {"gate": "diffmask"}, {"gate": "dep_l0"}]
)
def test_other_ways_to_put_gates(how):
    model, x, budget, shrinker = half_closed("vgg", **how)
    expected = gradients(model, x, budget)[0]
    assert shrinker.shrink() > 0
    torch.testing.assert_close(gradients(model, x, budget)[0], expected, rtol=1e-5, atol=1e-6)


def test_expand_gives_a_copy_at_the_old_widths_and_compact_takes_a_model_that_has_shrunk():
    model, x, budget, shrinker = half_closed("resnet18")
    shapes = shapes_of(model)
    whole = dampr.compact(model, example_inputs=x)
    shrinker.shrink()
    small = shapes_of(model)
    large = dampr.expand(model)
    assert shapes_of(large) == shapes
    assert shapes_of(model) == small != shapes
    torch.testing.assert_close(large.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    again = dampr.compact(model, example_inputs=x)
    assert again.dampr_manifest["layers"] == whole.dampr_manifest["layers"]
    torch.testing.assert_close(again.eval()(x), whole.eval()(x), rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"closed units have left it; expected shrinker.expand\(optimizer\) before"):
        dampr.compact(model, example_inputs=x, optimizer=optimizer)
    with pytest.raises(dampr.BudgetError, match=r"expected shrinker.expand\(optimizer\) before"):
        budget.finalize()
    assert shapes_of(pickle.loads(pickle.dumps(model))) == small
    with pytest.raises(ValueError, match="units have left it already"):
        dampr.Shrinker(model, x)


def test_units_that_leave_a_constant_stay_and_the_notes_say_so():
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    model = nn.Sequential(nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    dampr.convert(model, example_inputs=x)
    model[0].gate.log_alpha.data[:4] = -30
    model[2].gate.log_alpha.data[:4] = -30
    shrinker = dampr.Shrinker(model, x, patience=1)
    assert shrinker.step()
    assert model[0].weight.shape == (12, 6)
    assert model[2].weight.shape == (6, 12)
    assert shrinker.notes == {
        "0": "without its closed units the outputs are others, so these stay until the model is compacted"
    }
    assert "4 units left" in shrinker.explain()
    assert not shrinker.step()


def test_gates_that_an_optimizer_has_go_after_patience_and_not_while_they_may_be_drawn_open():
    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    model = dampr.convert(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), example_inputs=x)
    shrinker = dampr.Shrinker(model, x, patience=3, probability=1e-4)
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-2, gate_lr=1e-2))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    log_alpha = model[0].gate.log_alpha
    seen = []
    for step in range(8):
        if step == 2:
            log_alpha.data[:4] = -20
            log_alpha.data[4:6] = -4  # closed in evaluation, but drawn open now and then
        loss = F.cross_entropy(model(x), y) + 1e-3 * dampr.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        seen.append(shrinker.step(optimizer))
    assert seen == [False] * 4 + [True] + [False] * 3
    assert model[0].weight.shape == (8, 6)
    assert log_alpha.shape == (12,), "gates stay whole vectors"
    assert [event.units for event in shrinker.events] == [4]
    assert model[0].gate.is_open().tolist() == [False, False] + [True] * 6
    assert dampr.summary(model, example_inputs=x).layers[0].gates == 8


def run(model, x, shrink, steps=100, first=0, plan=None, optimizer=None, ema=(), **how):
    generator = torch.Generator().manual_seed(5)
    dtype = next(model.parameters()).dtype
    data = torch.randn(64, *x.shape[1:], generator=generator).to(dtype)
    labels = torch.randint(5, (64,), generator=generator)
    plan = plan or dampr.Plan(model, x, **({"macs": 0.5, "steps": 100, "shrink": shrink} | how))
    optimizer = optimizer or torch.optim.SGD(plan.model.parameters(), lr=0.01, momentum=0.5)
    for step in range(first, first + steps):
        torch.manual_seed(step)
        rows = torch.randperm(64)[:16]
        loss = F.cross_entropy(plan.model(data[rows]), labels[rows]) + plan.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for one in [ema] if isinstance(ema, nn.Module) else ema:
            one.update_parameters(plan.model)
        plan.step(optimizer, ema=ema)
    return plan


PLANS = [
    "mlp",
    "lenet5",
    "vgg",
    "resnet18",
    "mobilenet_v3",
    "shufflenet",
    "vit",
    "gru",
    "bidirectional lstm",
    "encoder",
]


@pytest.mark.parametrize(
    "name", [long_if(name, "resnet18", "shufflenet", "vit", "bidirectional lstm") for name in PLANS]
)
def test_a_plan_ends_with_what_it_ends_with_without_shrinking(name):
    """In double precision, and without momentum, which moves closed units that are still there."""
    macs, found = 0.7 if name in ("vit", "encoder") else 0.5, []
    for shrink in (False, True):
        model, x = made(name)
        plan = dampr.Plan(model.double(), x.double(), macs=macs, steps=100, shrink=shrink)
        found.append(run(model, x, shrink, plan=plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.01)))
    whole, shrunk = found
    assert "left" in shrunk.explain()
    assert whole.explain() == "shrink=False: closed units stay in the model until it is compacted"
    assert shrunk.report.budget.widths == whole.report.budget.widths
    assert shrunk.report.shrunk
    assert not whole.report.shrunk
    small, expected = shrunk.finish(), whole.finish()
    assert small.dampr_manifest["layers"] == expected.dampr_manifest["layers"]
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], value, rtol=1e-6, atol=1e-6)
    assert type(small) is type(made(name)[0])


@pytest.mark.parametrize(
    ("gate", "goes"), [("dam", True), ("diffprune", True), ("hard_concrete", False), ("dep_l0", False)]
)
def test_learned_gates_go_where_no_draw_can_open_them(gate, goes):
    kept, found = (run(*made("mlp"), shrink, gate=gate, score="learned") for shrink in (False, True))
    assert ("left" in "".join(found.report.shrunk)) == goes
    assert found.report.budget.widths == kept.report.budget.widths
    small = found.finish().state_dict()
    for key, value in kept.finish().state_dict().items():
        torch.testing.assert_close(small[key], value)


def test_during_the_ramp_the_model_and_the_state_of_its_optimizer_are_smaller():
    model, x = made("vgg")
    count = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    plan = dampr.Plan(model, x, macs=0.3, steps=100, shrink=True)
    run(model, x, True, steps=48, plan=plan, optimizer=optimizer)
    assert plan.phase == "ramp"
    now = sum(p.numel() for p in model.parameters())
    assert now < 0.8 * count
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == now
    assert plan.readings()["macs_left"] <= 0.6, "in units of the whole model"


def fresh(name, averaged):
    model, x = made(name)
    plan = dampr.Plan(model, x, macs=0.6 if averaged else 0.7, steps=100, shrink=True)
    ema = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)] if averaged else []
    return model, x, plan, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5), ema


def ends(plan, ema):
    """The small model, what is said of it, and the averages."""
    small = {
        **plan.finish().state_dict(),
        **{f"average {key}": value for each in ema for key, value in each.state_dict().items()},
    }
    return small, str(plan.report)


@functools.cache
def left_alone(name, averaged=False):
    """How a run ends that nothing disturbs."""
    model, x, plan, optimizer, ema = fresh(name, averaged)
    run(model, x, True, plan=plan, optimizer=optimizer, ema=ema)
    return ends(plan, ema)


@functools.cache
def checkpoints(name, averaged=False):
    """The states of a run at its stops, and how it ends."""
    model, x, plan, optimizer, ema = fresh(name, averaged)
    found, stops = {}, AVERAGED_STOPS if averaged else STOPS
    for first, stop in itertools.pairwise([0, *stops, 100]):
        run(model, x, True, stop - first, first, plan=plan, optimizer=optimizer, ema=ema)
        if stop < 100:
            states = (
                plan.state_dict(),
                plan.model.state_dict(),
                optimizer.state_dict(),
                *(each.state_dict() for each in ema),
            )
            found[stop] = copy.deepcopy(states)
    return found, ends(plan, ema)


def assert_ends_alike(one, other):
    for (key, a), (_, b) in zip(one[0].items(), other[0].items(), strict=True):
        assert torch.equal(a, b), key
    assert one[1] == other[1]


def resumed(name, stop, averaged=False):
    """How a run ends that goes on from a state of another."""
    model, x, plan, optimizer, ema = fresh(name, averaged)
    saved = copy.deepcopy(checkpoints(name, averaged)[0][stop])
    plan.load_state_dict(saved[0], optimizer, ema=ema)
    for one, state in zip((plan.model, optimizer, *ema), saved[1:], strict=True):
        one.load_state_dict(state)
    run(model, x, True, 100 - stop, stop, plan=plan, optimizer=optimizer, ema=ema)
    return ends(plan, ema)


STOPS, AVERAGED_STOPS = (42, 47, 49, 50, 60), (20, 48, 60)
KILLED = ["resnet18", "gru", "vit"]


@pytest.mark.parametrize("stop", [long_if(stop, 47, 49, 60) for stop in STOPS])
@pytest.mark.parametrize("name", [long_if(name, "vit") for name in KILLED])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(name, stop):
    assert_ends_alike(resumed(name, stop), left_alone(name))


@pytest.mark.parametrize(("name", "averaged"), [*((name, False) for name in KILLED), ("resnet18", True)])
def test_a_checkpoint_leaves_the_run_as_it_is(name, averaged):
    assert_ends_alike(checkpoints(name, averaged)[1], left_alone(name, averaged))


def test_averaged_copies_get_gates_lose_units_and_end_small(tmp_path):
    model, x = made("resnet18")
    plan = dampr.Plan(model, x, macs=0.5, steps=100, shrink=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    run(model, x, True, steps=48, plan=plan, ema=ema)
    assert plan.explain().count("left") >= 1
    assert [p.shape for p in ema.module.parameters()] == [p.shape for p in model.parameters()]
    run(model, x, True, steps=52, first=48, plan=plan, ema=ema)
    small = plan.finish()
    assert [p.shape for p in ema.module.parameters()] == [p.shape for p in small.parameters()]
    assert {type(m) for m in ema.module.modules()} == {type(m) for m in small.modules()}
    twin = copy.deepcopy(small)
    twin.load_state_dict(ema.module.state_dict())
    torch.testing.assert_close(twin.eval()(x), ema.module.eval()(x))
    assert not torch.equal(ema.module.eval()(x), small.eval()(x))


@pytest.mark.parametrize("name", ["resnet18", "transposed"])
def test_an_average_of_the_buffers_too_leaves_the_run_as_it_is(name):
    found = []
    for averaged in (False, True):
        model, x = made(name)
        plan = dampr.Plan(model, x, macs=0.6, steps=100, shrink=True)
        ema = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)] if averaged else []
        run(model, x, True, plan=plan, ema=ema)
        assert "left" in plan.explain()
        found.append(plan.finish().state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.parametrize("stop", [long_if(stop, 20) for stop in AVERAGED_STOPS])
def test_a_run_with_an_average_goes_on_to_the_same_bits(stop):
    assert_ends_alike(resumed("resnet18", stop, averaged=True), left_alone("resnet18", averaged=True))


def test_an_average_is_that_of_the_same_run_without_shrinking():
    found = []
    for shrink in (False, True):
        model, x = made("mlp")
        plan = dampr.Plan(model, x, macs=0.5, steps=100, shrink=shrink)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        run(model, x, shrink, plan=plan, ema=ema)
        found.append(ema.module.eval()(x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_gradient_scaler_and_a_scheduler_go_on():
    model, x = made("mlp")
    plan = dampr.Plan(model, x, macs=0.4, steps=100, shrink=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    labels = torch.randint(5, (4,))
    for _ in range(100):
        loss = F.cross_entropy(plan.model(x), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        plan.step(optimizer)
    assert "left" in plan.explain()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-6)
    plan.finish()


def test_auto_leaves_what_does_not_pay_and_says_so():
    plan = run(*made("mlp"), "auto")
    assert "would not pay" in plan.explain() or "left" in plan.explain()
    with torch.random.fork_rng():
        first, second = (run(*made("mlp"), "auto") for _ in range(2))
    assert re.sub(r"in \d+ ms", "", first.explain()) == re.sub(r"in \d+ ms", "", second.explain()), "no clock decides"
    ended, again = first.finish().state_dict(), second.finish().state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ended.items())


def test_what_the_budget_wants_back_is_back_before_the_next_step():
    model, _, budget, shrinker = half_closed("mlp")
    weight = model[0].weight.detach().clone()
    shrinker.shrink()
    gone = int(shrinker.removed.nonzero()[0])
    budget.controller.keep[gone] = True
    assert shrinker.bring_back() == 1
    assert not shrinker.removed[gone]
    assert torch.equal(
        model[0].weight[int(shrinker._layout.tensors["0.weight"][0][1].tolist().index(gone))], weight[gone]
    )
    assert shrinker.events[-1].units == -1
    assert "1 unit came back" in shrinker.explain()


def test_optimizers_whose_state_cannot_be_cut_are_refused_at_the_first_step():
    model, x = made("mlp")
    plan = dampr.Plan(model, x, macs=0.5, steps=60)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(ValueError, match="optimizer: LBFGS keeps .* which cannot be cut with it"):
        plan.step(optimizer)
    assert plan.steps_taken == 0
    shrinker = dampr.Shrinker(dampr.convert(model, example_inputs=x), x)
    with pytest.raises(ValueError, match="optimizer: LBFGS keeps .* which cannot be cut with it"):
        shrinker.step(optimizer)
    assert shrinker.steps == 0


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"patience": 0}, ValueError, "patience=0: expected an integer of at least 1"),
        ({"probability": 1.0}, ValueError, r"probability=1.0: expected a number in \[0, 1\)"),
        ({"least_saving": -0.1}, ValueError, r"least_saving=-0.1: expected a number in \[0, 1\)"),
        ({"budget": 3}, TypeError, "budget=3: expected a dampr.Budget or None"),
    ],
)
def test_bad_arguments_are_named(how, error, match):
    model, x = made("mlp")
    dampr.convert(model, example_inputs=x)
    with pytest.raises(error, match=match):
        dampr.Shrinker(model, x, **how)


def test_models_budgets_and_copies_that_do_not_fit_are_refused():
    model, x = made("mlp")
    with pytest.raises(ValueError, match="expected gated layers in it"):
        dampr.Shrinker(model, x)
    with pytest.raises(ValueError, match="shrink='later': expected one of"):
        dampr.Plan(model, x, macs=0.5, steps=60, shrink="later")
    dampr.convert(model, example_inputs=x)
    with pytest.raises(ValueError, match="its gates are parameters in an optimizer"):
        dampr.Shrinker(model, x, budget=dampr.Budget(model, x, macs=0.5))
    _, _, budget, _ = half_closed("mlp")
    with pytest.raises(ValueError, match="it is of another model"):
        dampr.Shrinker(model, x, budget=budget)
    model, x, budget, shrinker = half_closed("mlp")
    shapes = shapes_of(model)
    with pytest.raises(
        ValueError, match=r"ema: '0.gate.value' is None, expected \(20,\) as in the model, gates included"
    ):
        shrinker.shrink(ema=made("mlp")[0])
    with pytest.raises(TypeError, match="ema=3: expected an AveragedModel"):
        shrinker.shrink(ema=[3])
    with pytest.raises(TypeError, match="optimizer='adam': expected a torch.optim.Optimizer"):
        shrinker.shrink("adam")
    assert shapes_of(model) == shapes
    assert not shrinker.removed.any()
    state = shrinker.state_dict()
    with pytest.raises(ValueError, match=r"'removed'\]: got .* of shape \(76,\), expected .* of shape \(36,\)"):
        shrinker.load_state_dict(half_closed("vgg")[3].state_dict())
    with pytest.raises(ValueError, match=r"^state={'removed': .*expected the keys"):
        shrinker.load_state_dict({"removed": state["removed"]})
    shrinker.load_state_dict(state)
