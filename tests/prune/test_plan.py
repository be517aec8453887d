"""A plan ends with a plain model of exactly the size that was asked for, from any loop, and goes on from any step."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr.prune.measure import count_macs, count_params
from dampr.prune.recalibrate import recalibrate

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(192, 2, 6, 6, generator=GENERATOR)
Y = (X.flatten(1) @ torch.randn(72, 4, generator=GENERATOR)).argmax(1)
STEPS = 60


def cnn(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(12, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(*layers)


def batch(step):
    rows = torch.arange(24) + 24 * (step % 8)
    return X[rows], Y[rows]


def train(plan, optimizer, steps, first=0, loss=F.cross_entropy):
    for step in range(first, first + steps):
        x, y = batch(step)
        torch.manual_seed(step)
        value = loss(plan.model(x), y) + plan.penalty()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        plan.step(optimizer)
    return plan


def plan_for(model=None, **how):
    model = cnn() if model is None else model
    return dampr.Plan(model, X[:8], **({"macs": 0.4, "steps": STEPS} | how))


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adadelta": torch.optim.Adadelta,
    "fused": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("gate", "score"), [("hard_concrete", "importance"), ("hard_concrete", "learned"), ("dep_l0", "learned")]
)
def test_a_plan_ends_at_the_target_with_plain_layers_whatever_the_optimizer(gate, score, optimizer):
    plan = plan_for(gate=gate, score=score)
    dense = count_macs(plan.model, X[:8])
    optimizer = OPTIMIZERS[optimizer](plan.model.parameters())
    small = train(plan, optimizer, STEPS).finish()
    assert small is plan.model
    assert {type(m) for m in small.children()} == {
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.MaxPool2d,
        nn.Flatten,
        nn.Linear,
    }
    assert 0.4 * dense - unit(small) < count_macs(small, X[:8]) <= 0.4 * dense
    assert plan.report.budget.changed <= 0.05
    assert {id(p) for p in small.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert plan.report.difference < 1e-4


def unit(model):
    """The cost of one more filter of the widest reach."""
    return (
        max(
            count_macs(layer, torch.zeros(8, layer.in_channels, 6, 6)) / layer.out_channels
            for layer in model
            if isinstance(layer, nn.Conv2d)
        )
        * 4
    )


def test_widths_in_multiples_are_no_reason_for_a_warning(recwarn):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    dense = count_macs(net, X[:1])
    plan = plan_for(net, macs=0.5, round_to=32)
    train(plan, torch.optim.Adam(plan.model.parameters(), lr=1e-2), STEPS)
    small = plan.finish()
    assert plan.report.budget.changed > 0.1
    assert [small[at].out_features % 32 for at in (1, 3)] == [0, 0]
    assert count_macs(small, X[:1]) <= 0.5 * dense
    assert not [found for found in recwarn if found.category is dampr.BudgetWarning]


def test_params_and_a_recurrent_model_and_a_model_that_has_gates_already():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(6, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.rnn(x.flatten(1, 2))[0][:, -1])

    torch.manual_seed(0)
    model = Net()
    before = count_params(model)
    plan = plan_for(model, macs=None, params=0.5)
    small = train(plan, torch.optim.Adam(model.parameters()), STEPS).finish()
    assert count_params(small) <= 0.5 * before
    assert type(small.rnn) is nn.GRU
    assert small.rnn.hidden_size < 16

    model = dampr.convert(cnn(), example_inputs=X[:8], include="4")
    plan = plan_for(model, macs=0.9)
    assert not any("gate" in name for name, _ in model.named_parameters())
    small = train(plan, torch.optim.Adam(model.parameters()), STEPS).finish()
    assert small[0].out_channels == 12
    assert small[4].out_channels < 16


def test_until_the_ramp_the_model_is_dense_and_trains_as_it_would_alone():
    plan, alone = plan_for(), cnn()
    dense_steps = plan._end - plan._length
    optimizers = [torch.optim.Adam(m.parameters()) for m in (plan.model, alone)]
    for step in range(dense_steps - 1):
        x, y = batch(step)
        for model, optimizer, extra in ((plan.model, optimizers[0], plan.penalty()), (alone, optimizers[1], 0.0)):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + extra).backward()
            optimizer.step()
        assert plan.step(optimizers[0]) is False
    assert plan.phase == "dense"
    assert all(
        torch.equal(a, b) for a, b in zip(plan.model.state_dict().values(), alone.state_dict().values(), strict=True)
    )


@functools.cache
def left_alone(score):
    """How a run ends that nothing disturbs: the small model, and what is said of it."""
    plan, optimizer = fresh(score)
    train(plan, optimizer, STEPS)
    return plan.finish().state_dict(), str(plan.report)


def fresh(score):
    plan = plan_for(score=score, restart=1.0)
    return plan, torch.optim.Adam(plan.model.parameters(), lr=2e-3)


@pytest.mark.parametrize("score", ["importance", "learned"])
@pytest.mark.parametrize("stop", [5, 18, 22, 29, 30, 45])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(stop, score):
    first, optimizer = fresh(score)
    train(first, optimizer, stop)
    saved = copy.deepcopy((first.state_dict(), first.model.state_dict(), optimizer.state_dict()))
    again, optimizer = fresh(score)
    again.load_state_dict(saved[0], optimizer)
    again.model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    train(again, optimizer, STEPS - stop, stop)
    whole, report = left_alone(score)
    for (name, a), (_, b) in zip(whole.items(), again.finish().state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert str(again.report) == report


def test_state_goes_through_torch_save(tmp_path):
    plan = plan_for()
    train(plan, torch.optim.Adam(plan.model.parameters()), 40)
    torch.save(plan.state_dict(), tmp_path / "plan.pt")
    again = plan_for()
    again.load_state_dict(torch.load(tmp_path / "plan.pt", weights_only=True))
    assert again.phase == plan.phase == "fine-tuning"
    assert [m.weight.shape for m in again.model if hasattr(m, "weight")] == [
        m.weight.shape for m in plan.model if hasattr(m, "weight")
    ]


def test_gradient_accumulation_is_one_step():
    plan = plan_for()
    optimizer = torch.optim.SGD(plan.model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rows in range(3):
            x, y = batch(3 * step + rows)
            ((F.cross_entropy(plan.model(x), y) + plan.penalty()) / 3).backward()
        optimizer.step()
        plan.step(optimizer)
    assert plan.finish() is plan.model


def test_lbfgs_and_its_closures():
    plan = plan_for(macs=0.6)
    optimizer = torch.optim.LBFGS(plan.model.parameters(), lr=0.1, max_iter=2)

    def run(step):
        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(plan.model(batch(step)[0]), batch(step)[1])
            loss.backward()
            return loss

        optimizer.step(closure)
        if plan.step(None):
            return torch.optim.LBFGS(plan.model.parameters(), lr=0.1, max_iter=2)
        return optimizer

    for step in range(STEPS):
        optimizer = run(step)
    assert sum(p.numel() for p in plan.finish().parameters()) < count_params(cnn())


def test_the_learning_rate_starts_again_behind_the_ramp_and_falls_to_zero():
    plan = plan_for(restart=0.5)
    optimizer = torch.optim.SGD(plan.model.parameters(), lr=0.1)
    train(plan, optimizer, plan._end)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    train(plan, optimizer, STEPS - plan._end, plan._end)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_the_learning_rate_that_starts_again_is_that_of_whichever_optimizer_comes():
    plan = plan_for(restart=0.5)
    train(plan, torch.optim.Adam(plan.model.parameters(), lr=0.1), 20)
    groups = [{"params": plan.model[0].parameters(), "lr": 0.2}, {"params": plan.model[8].parameters(), "lr": 0.02}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    train(plan, optimizer, plan._end - 20, 20)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.01])


def test_several_optimizers_go_through_a_plan_together():
    plan = plan_for(restart=1.0, shrink=True)
    matrices = [p for p in plan.model.parameters() if p.dim() == 2]
    others = [p for p in plan.model.parameters() if p.dim() != 2]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.Adam(others, lr=1e-2)]
    for step in range(STEPS):
        x, y = batch(step)
        plan.model.zero_grad()
        F.cross_entropy(plan.model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        plan.step(optimizers)
    held = [{p for group in one.param_groups for p in group["params"]} for one in optimizers]
    assert held[0] == {p for p in plan.finish().parameters() if p.dim() == 2}
    assert held[1] == {p for p in plan.model.parameters() if p.dim() != 2}
    assert all(one.state[p] and one.param_groups[0]["lr"] < 1e-4 for one in optimizers for p in one.state)
    with pytest.raises(TypeError, match="optimizer='adam': expected a torch.optim.Optimizer, or a sequence of them"):
        plan_for().step(["adam"])


def test_what_else_an_optimizer_trains_stays_in_it():
    head = nn.Linear(4, 4)
    plan = plan_for()
    optimizer = torch.optim.Adam([*plan.model.parameters(), *head.parameters()], lr=1e-2)
    train(plan, optimizer, plan._end, loss=lambda out, y: F.cross_entropy(head(out), y))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in (*plan.model.parameters(), *head.parameters())}
    assert optimizer.state[head.weight]["step"] == plan._end


def test_distillation_pulls_towards_the_dense_model_as_it_was():
    plan = plan_for(distill=1.0)
    optimizer = torch.optim.SGD(plan.model.parameters(), lr=0.05)
    train(plan, optimizer, plan._end - plan._length)
    dense = {name: value.clone() for name, value in plan._teacher.state_dict().items()}
    x, _ = batch(0)
    plan.model(x)
    assert float(plan.penalty().detach()) >= 0
    assert float(plan.penalty()) == 0, "there is one penalty for each call of the model"
    train(plan, optimizer, STEPS - plan.steps_taken, plan.steps_taken)
    assert all(torch.equal(value, dense[name]) for name, value in plan._teacher.state_dict().items())
    teacher = plan._teacher
    plan.model.train()
    out = plan.model(x)
    expected = 4 * F.kl_div(
        F.log_softmax(out / 2, 1), F.log_softmax(teacher(x) / 2, 1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(plan.penalty(), expected)
    plan.finish()
    assert plan._teacher is None


def test_distillation_of_other_outputs_asks_for_a_loss():
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
    with pytest.raises(ValueError, match=r"distill: the model's output is \(8, 3, 6, 6\), expected logits"):
        plan_for(model, distill=1.0)
    plan_for(model, distill=1.0, distill_loss=F.mse_loss)


def test_a_trained_start_is_found_out_or_told():
    model = cnn()
    assert plan_for(model)._end == round(0.5 * STEPS)
    model[1].num_batches_tracked.fill_(500)
    assert plan_for(model)._end == round(0.25 * STEPS)
    assert plan_for(cnn(), trained=True)._end == round(0.25 * STEPS)
    assert plan_for(model, trained=False)._end == round(0.5 * STEPS)


def test_statistics_of_norms_are_those_of_the_batches():
    model = cnn().train()
    momentum = model[1].momentum
    assert recalibrate(model, [X[:64], X[64:128]]) == 2
    torch.testing.assert_close(model[1].running_mean, model[0](X[:128]).mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert model[1].momentum == momentum
    assert model.training
    assert model[1].training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert recalibrate(model, []) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Own(nn.Linear):
    """A linear layer of a class of its own."""


@pytest.mark.parametrize("linear", [nn.Linear, Own])
def test_hooks_of_layers_and_parameters_stay_with_their_handles(linear):
    model = nn.Sequential(linear(20, 32), nn.ReLU(), linear(32, 5))
    seen: list[str] = []
    handles = [
        model[0].register_forward_hook(lambda *_: seen.append("forward")),
        model[2].register_full_backward_hook(lambda *_: seen.append("backward")),
        model[0].weight.register_hook(lambda _: seen.append("gradient")),
        model[2].bias.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated")),
    ]
    x, y = torch.randn(8, 20), torch.randint(5, (8,))
    plan = dampr.Plan(model, x, macs=0.5, steps=40)
    optimizer = torch.optim.Adam(model.parameters())

    def step():
        seen.clear()
        optimizer.zero_grad()
        F.cross_entropy(plan.model(x), y).backward()
        optimizer.step()
        return sorted(seen)

    for _ in range(40):
        assert step() == ["accumulated", "backward", "forward", "gradient"]
        plan.step(optimizer)
    assert plan.finish()[0].weight.shape[0] < 32
    for handle in handles:
        handle.remove()
    assert step() == []


def test_what_compacts_is_told_and_hooks_are_gone_in_the_end():
    seen = []
    plan = plan_for(on_compact=lambda plan: seen.append((plan.steps_taken, plan.report.compacted)))
    optimizer = torch.optim.Adam(plan.model.parameters())
    smaller = []
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(plan.model(x), y).backward()
        optimizer.step()
        smaller.append(plan.step(optimizer))
    assert seen == [(plan._end, plan._end)]
    assert [i + 1 for i, yes in enumerate(smaller) if yes] == [plan._end]
    small = plan.finish()
    assert not small._forward_hooks
    assert not small._forward_pre_hooks
    assert plan.report.recalibrated == 8
    assert "fine-tuned for 30" in str(plan.report)
    assert "<pre>" in plan.report._repr_html_()
    assert "macs=0.4" in repr(plan)
    for call in (plan.penalty, plan.finish, lambda: plan.step(optimizer)):
        with pytest.raises(dampr.PlanError, match="this plan is finished"):
            call()


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"steps": 12}, ValueError, "steps=12: expected an integer of at least 40"),
        ({"steps": 60, "ramp": 0.05}, ValueError, "expected a ramp of at least 8 steps"),
        ({"warmup": 0.9}, ValueError, "expected a ramp of at least 8 steps .* that ends before the last one"),
        ({"warmup": -0.1}, ValueError, r"warmup=-0.1: expected a share of the steps in \[0, 1\)"),
        ({"distill": -1.0}, ValueError, "distill=-1.0: expected a finite number of at least 0"),
        ({"restart": math.nan}, ValueError, "restart=nan: expected"),
        ({"macs": None}, ValueError, "expected exactly one of them"),
        ({"macs": 50}, dampr.BudgetError, "50 % is macs=0.5"),
        ({"score": "l1"}, ValueError, "score='l1': expected one of"),
        ({"gate": "l3"}, ValueError, "gate='l3'"),
        ({"round_to": 32}, dampr.BudgetError, r"which remain with 1 \(a multiple of 32\) open in every layer"),
        ({"min_width": 12}, dampr.BudgetError, "which remain with 12 "),
        ({"macs": [0.5, 0.4]}, ValueError, r"macs=\[0.5, 0.4\], with 2 targets: expected one"),
        ({"macs": 10**9}, ValueError, "macs=1000000000: expected less than the .* of the model as it is"),
        ({"steps": 40, "warmup": 0.0}, ValueError, "warmup=0, ramp=0.2: expected a ramp of at least 9 steps"),
        ({"distill_loss": "kl"}, TypeError, "distill_loss='kl': expected a function or None"),
        ({"on_compact": 3}, TypeError, "on_compact=3: expected a function or None"),
        ({"convert": "head"}, TypeError, "convert='head': expected a dict"),
        ({"convert": {"include": "nothing*"}}, dampr.ConversionError, "no layer of Sequential is left to convert"),
    ],
)
def test_what_cannot_work_is_refused_at_once_and_the_model_is_as_it_was(how, error, match):
    model = cnn()
    types = [type(m) for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        plan_for(model, **how)
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_wrapped_models_are_refused_by_the_name_of_what_is_inside():
    with pytest.raises(TypeError, match=r"what torch.compile returned, expected the module itself \(model._orig_mod\)"):
        plan_for(torch.compile(cnn()))


def test_a_loader_that_ends_early_and_a_training_that_leaves_the_plan_out():
    plan = plan_for()
    optimizer = torch.optim.Adam(plan.model.parameters())
    train(plan, optimizer, 20)
    with pytest.raises(dampr.PlanError, match=r"finish\(\) after 20 of 60 steps: expected at least 30"):
        plan.finish()
    train(plan, optimizer, 10, 20)
    plan.finish()

    plan = plan_for(steps=600)
    optimizer = torch.optim.Adam(plan.model.parameters())
    for _ in range(plan._end - plan._length + 49):
        plan.step(optimizer)
    with pytest.raises(dampr.PlanError, match="no gate has had a finite gradient for 50 steps"):
        plan.step(optimizer)


def test_weights_that_are_not_finite_stop_the_plan_before_gates_come_in():
    plan = plan_for()
    optimizer = torch.optim.SGD(plan.model.parameters(), lr=0.1)
    train(plan, optimizer, plan._end - plan._length - 1)
    with torch.no_grad():
        plan.model[0].weight[0] = math.nan
    with pytest.raises(dampr.PlanError, match=r"0.weight has values that are not finite"):
        plan.step(optimizer)
    assert not dampr.prune.gated_layers(plan.model)


def test_weights_that_are_not_finite_stop_the_plan_at_the_end_of_the_ramp_and_in_the_end():
    plan = plan_for()
    optimizer = torch.optim.SGD(plan.model.parameters(), lr=0.01)
    train(plan, optimizer, plan._end - 1)
    before = plan.model[5].weight.detach().clone()
    with torch.no_grad():
        plan.model[5].weight[0] = math.nan
    with pytest.raises(dampr.PlanError, match=r"step 30: 5.weight has values that are not finite"):
        plan.step(optimizer)
    assert (plan.steps_taken, plan.phase, plan.budget.goal < 0.5) == (29, "ramp", True)
    with torch.no_grad():
        plan.model[5].weight.copy_(before)
    assert plan.step(optimizer)
    with torch.no_grad():
        plan.model[5].weight[0] = math.inf
    with pytest.raises(dampr.PlanError, match=r"finish\(\): 5.weight has values that are not finite"):
        plan.finish()


@pytest.mark.parametrize("evaluating", [True, False])
def test_a_ramp_too_short_to_give_up_in_does_not_end_in_a_choice_without_a_gradient(evaluating):
    plan = plan_for(steps=40)
    optimizer = torch.optim.SGD(plan.model.parameters(), lr=0.01)
    plan.model.train(not evaluating)
    for _ in range(19):
        if evaluating:
            plan.model(X[:8]).sum().backward()
        plan.step(optimizer)
    with pytest.raises(dampr.PlanError, match="step 20: no gate has had a finite gradient for 11 steps"):
        plan.step(optimizer)
    assert plan.model[0].weight.shape[0] == 12


def test_optimizers_of_something_else_are_refused():
    plan = plan_for()
    with pytest.raises(ValueError, match=r"it holds no parameter of plan.model"):
        plan.step(torch.optim.SGD(cnn().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="expected a torch.optim.Optimizer"):
        plan.step("adam")
    train(plan, torch.optim.SGD(plan.model.parameters(), lr=0.01), plan._end - 1)
    with pytest.raises(ValueError, match=r"it holds no parameter of plan.model"):
        plan.step(torch.optim.SGD(cnn().parameters(), lr=0.1))
    assert plan.steps_taken == plan._end - 1
    assert plan.budget.steps == plan.budget.controller.ramp.steps - 1
    model = dampr.convert(cnn(), example_inputs=X[:8])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = plan_for(model, score="learned")
    assert plan.steps_taken == 0
    with pytest.raises(ValueError, match="it holds parameters of gates"):
        plan.step(optimizer)


def test_a_state_of_another_plan_is_refused():
    state = plan_for(steps=80).state_dict()
    with pytest.raises(ValueError, match="of a plan of 80 steps, expected 60"):
        plan_for().load_state_dict(state)
    begun = plan_for()
    train(begun, torch.optim.SGD(begun.model.parameters(), lr=0.1), 3)
    with pytest.raises(dampr.PlanError, match="expected a new plan"):
        begun.load_state_dict(plan_for().state_dict())
    for bad, message in (({}, "^state={}: expected the keys"), (state | {"silent": None}, r"^state\['silent'\]=None")):
        with pytest.raises(ValueError, match=message):
            plan_for().load_state_dict(bad)


@pytest.mark.parametrize("stop", [3, 22, 40])
def test_a_plan_pickles_with_its_model_and_goes_on(stop):
    plan = plan_for()
    optimizer = torch.optim.SGD(plan.model.parameters(), lr=0.05)
    train(plan, optimizer, stop)
    again, other = pickle.loads(pickle.dumps((plan, optimizer)))
    for each, own in ((plan, optimizer), (again, other)):
        train(each, own, STEPS - stop, stop)
    for a, b in zip(plan.finish().parameters(), again.finish().parameters(), strict=True):
        assert torch.equal(a, b)
