"""DistributedDataParallel around gated models: what sees through it, what refuses,
and what trains the same on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import dampr
from dampr.gates.draws import drawing_gates

X = torch.linspace(-1, 1, 8 * 6).reshape(8, 6)


def rank() -> int:
    return distributed.get_rank()


def net(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3))


def gated(**how: Any) -> nn.Module:
    return dampr.convert(net(), example_inputs=X, **how)


def batch() -> torch.Tensor:
    """Other rows on each rank."""
    return torch.randn(8, 6)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([t.detach().flatten().double() for t in (*model.parameters(), *model.buffers())])


def alike(t: torch.Tensor, what: str = "") -> None:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, torch.tensor([t.numel()]))
    assert len({int(size) for size in sizes}) == 1, f"{what}: sizes {sizes}"
    found = [torch.zeros_like(t) for _ in sizes]
    distributed.all_gather(found, t.contiguous())
    assert all(torch.equal(found[0], other) for other in found[1:]), f"{what}: {(found[0] - found[-1]).abs().max()}"


def train(
    wrapped: nn.Module, model: nn.Module, steps: int = 4, cost: Callable[[], Any] = lambda: 0.0
) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    model.train()
    for _ in range(steps):
        (wrapped(batch()).square().mean() + cost()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        call()
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} is not in {error.value}"


def unlike(gate: Any = "dep_l0") -> nn.Module:
    """Gates that start at other random values on each rank."""
    model = net()
    torch.manual_seed(500 + rank())
    return dampr.convert(model, gate=gate, example_inputs=X)


def random_start(num_gates: int, device: Any = None) -> dampr.gates.Gate:
    return dampr.gates.HardConcrete(num_gates, droprate=0.5, device=device)


def of_gates(model: nn.Module) -> torch.Tensor:
    """Everything that the gates keep, owned ones too."""
    gates = [module for module in model.modules() if isinstance(module, dampr.gates.Gate)]
    return torch.cat([t.detach().flatten().double() for gate in gates for t in gate.state_dict().values()])


def draws(model: nn.Module) -> torch.Tensor:
    return torch.cat([gate().detach() for gate in drawing_gates(model.train())])


def check_training_stays_alike(folder: Path) -> None:
    for how in (
        {},
        {"per_sample": True},
        {"granularity": "weight"},
        {"gate": "dep_l0"},
        {"gate": "dam"},
        {"gate": "diffprune"},
    ):
        model = gated(**how)
        wrapped = DDP(model)
        train(wrapped, model, cost=lambda model=model: 1e-3 * dampr.penalty(model))
        alike(flat(model), str(how))


def check_plans_end_with_the_same_model(folder: Path) -> None:
    for score in ("importance", "learned"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
        x, w = torch.randn(512, 12), torch.randn(12, 4)
        y = (x @ w).argmax(1)
        plan = dampr.Plan(model, x[:8], macs=0.3, steps=60, score=score, shrink=True)
        wrapped = DDP(plan.model)
        optimizer = torch.optim.Adam(plan.model.parameters(), lr=1e-2)
        torch.manual_seed(7)  # the same draws of gates on both ranks
        for step in range(60):
            rows = torch.arange(16) + 16 * ((2 * step + rank()) % 32)
            loss = nn.functional.cross_entropy(wrapped(x[rows]), y[rows]) + plan.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if plan.step(optimizer):
                wrapped = DDP(plan.model)
        small = plan.finish()
        alike(torch.cat([p.detach().flatten() for p in small.parameters()]), score)
        assert plan.report.budget.reached <= plan.report.budget.target


def check_gradients_are_those_of_the_whole_batch(folder: Path) -> None:
    """Two ranks with halves of a batch end with what one model has of the whole batch and the same draws."""
    world = distributed.get_world_size()
    torch.manual_seed(9)
    whole = torch.randn(4 * world, 6)
    for how in ({}, {"per_sample": True}):
        one, model = (dampr.gate_generator(gated(**how), seed=5) for _ in range(2))
        for gate in drawing_gates(one):
            gate._stream.group = (rank(),)  # rows are counted as if this were the only process
        for m in (one, model):
            torch.manual_seed(2)
            for p in (p for gate in drawing_gates(m) for p in gate.parameters()):
                nn.init.normal_(p, std=1.0)
        one.train()(whole).square().mean().backward()
        wrapped = DDP(model.train())
        wrapped(whole[4 * rank() : 4 * rank() + 4]).square().mean().backward()
        for (name, a), (_, b) in zip(one.named_parameters(), model.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=f"{how} {name}")


def check_functions_see_through(folder: Path) -> None:
    model = gated()
    wrapped = DDP(model)
    with torch.no_grad():
        next(iter(drawing_gates(model))).log_alpha[:7] = -9.0
    assert torch.equal(dampr.penalty(wrapped), dampr.penalty(model))
    assert torch.equal(dampr.penalty(wrapped, lam={"0": 2.0, "*": 1.0}), dampr.penalty(model, lam={"0": 2.0, "*": 1.0}))
    assert dampr.summary(wrapped, example_inputs=X).as_dict() == dampr.summary(model, example_inputs=X).as_dict()
    assert dampr.verify_model(wrapped, X).as_dict() == dampr.verify_model(model, X).as_dict()
    assert [f.as_dict() for f in dampr.prune.doctor(wrapped, X)] == [f.as_dict() for f in dampr.prune.doctor(model, X)]
    groups = [dampr.param_groups(m, lr=0.1) for m in (wrapped, model)]
    assert [[id(p) for p in g["params"]] for g in groups[0]] == [[id(p) for p in g["params"]] for g in groups[1]]
    small = dampr.compact(wrapped, example_inputs=X)
    assert type(small) is nn.Sequential, type(small)
    assert small[0].out_features == 13
    torch.testing.assert_close(small.eval()(X), model.eval()(X), rtol=1e-5, atol=1e-6)
    path = folder / f"small{rank()}.safetensors"
    dampr.save(DDP(small), path)
    torch.testing.assert_close(dampr.load(path)(X), small(X))
    large = dampr.expand(DDP(small))
    torch.testing.assert_close(large(X), small(X))
    assert dampr.prune.Cost(wrapped, X, "macs").total == dampr.prune.Cost(model, X, "macs").total
    compiled = torch.compile(wrapped)
    assert torch.equal(dampr.penalty(compiled), dampr.penalty(model))
    assert type(dampr.compact(compiled, example_inputs=X)) is nn.Sequential


def check_what_changes_parameters_refuses(folder: Path) -> None:
    dense, model = net(), gated()
    before = flat(model).clone()
    for wrap in (DDP, nn.DataParallel):
        refused(lambda wrap=wrap: dampr.convert(wrap(dense), example_inputs=X), r"model\.module", wrap.__name__)
        refused(lambda wrap=wrap: dampr.convert(wrap(dense)), r"model\.module")
        refused(lambda wrap=wrap: dampr.Budget(wrap(model), X, macs=0.5, steps=20), r"model\.module", wrap.__name__)
        refused(lambda wrap=wrap: dampr.Plan(wrap(dense), X, macs=0.5, steps=60), r"model\.module", wrap.__name__)
    inner = nn.Sequential(DDP(net()), nn.Linear(3, 3))
    refused(lambda: dampr.convert(inner, example_inputs=X), r"model\.0 is wrapped")
    assert not any(isinstance(m, dampr.nn.GatedLinear) for m in (*dense.modules(), *inner.modules()))
    assert torch.equal(flat(model), before)


def check_other_wrappers_are_refused_by_name(folder: Path) -> None:
    def wrapped(wrap: Callable[[nn.Module], Any], words: str, *calls: Callable[[Any], Any]) -> None:
        dense, model = nn.Sequential(wrap(net()), nn.Linear(3, 3)), wrap(gated())
        refused(lambda: dampr.convert(dense, example_inputs=X), r"model\.0 is wrapped", words)
        refused(lambda: dampr.Plan(dense, X, macs=0.5, steps=60), words)
        for call in (
            lambda m: dampr.Budget(m, X, macs=0.5),
            lambda m: dampr.Shrinker(m, X),
            lambda m: dampr.compact(m, example_inputs=X),
            lambda m: dampr.summary(m, X),
            *calls,
        ):
            refused(lambda call=call: call(model), "model is wrapped", words)

    former: Any = lambda m: FSDP(m, device_id=torch.device("cpu"), use_orig_params=True)  # noqa: E731
    wrapped(former, "FullyShardedDataParallel: expected .*fully_shard", dampr.penalty, dampr.GateBank)
    wrapped(replicate, "replicate.*: expected .*DistributedDataParallel")
    model = replicate(gated())
    train(model, model, cost=lambda: dampr.penalty(model))
    alike(flat(model))


def check_a_budget_of_a_wrapped_model(folder: Path) -> None:
    model = gated()
    wrapped = DDP(model)
    budget = dampr.Budget(wrapped, X, macs=0.4)
    assert budget.model is model
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-2, gate_lr=0.3))
    for _ in range(30):
        (wrapped(batch()).square().mean() + budget.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.step()
    report = budget.finalize()
    assert report.reached <= report.target
    refused(
        lambda: wrapped(batch()), "DistributedDataParallel was made before the model changed", "wrap the module again"
    )
    small = dampr.compact(wrapped, example_inputs=X)
    alike(flat(small))
    train(DDP(small), small)
    alike(flat(small))


def check_owned_gates(folder: Path) -> None:
    for score in ("importance", "learned"):
        model = gated()
        stale = DDP(model)
        stale(batch()).sum().backward()
        budget = dampr.Budget(model, X, macs=0.4, steps=16, score=score)
        refused(lambda stale=stale: stale(batch()), "waits for 2 that are gone")
        wrapped = DDP(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(16):
            with wrapped.no_sync():  # accumulation
                wrapped(batch()).square().mean().backward()
            wrapped(batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            budget.step()
            assert step or budget.measured == 1
        alike(torch.cat([gate.deterministic().detach() for gate in budget.controller.gates]), score)
        report = budget.finalize()
        assert report.reached <= report.target
        alike(flat(dampr.compact(model, example_inputs=X)), score)


def check_owned_gates_begin_alike(folder: Path) -> None:
    """No wrapper sends them."""
    for gate in ("dep_l0", random_start):
        model = unlike(gate)
        budget = dampr.Budget(dampr.gate_generator(model, seed=rank()), X, macs=0.5, steps=40, score="learned")
        alike(of_gates(model), str(gate))
        wrapped, optimizer = DDP(model), torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(10):
            wrapped(batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            budget.step()
        alike(of_gates(model), str(gate))
        alike(draws(model), str(gate))


def check_functions_on_one_rank_leave_the_count(folder: Path) -> None:
    model = gated()
    wrapped = DDP(model)
    train(wrapped, model)
    if rank() == 0:
        for function in (dampr.summary, dampr.verify_model, dampr.compact, dampr.prune.doctor):
            function(wrapped, X)
        model.eval()(X)
    train(wrapped, model)
    alike(draws(model))
    alike(flat(model))


def check_held_draws_of_layers_by_hand(folder: Path) -> None:
    model = nn.Sequential(dampr.nn.GatedLinear(6, 8, gate=random_start), nn.Tanh(), nn.Linear(8, 3))
    wrapped = DDP(model)
    with dampr.hold_draws(wrapped):
        alike(wrapped(X).detach())


def check_budgets_refuse_stages_whose_gates_have_the_same_sizes(folder: Path) -> None:
    stage = gated() if rank() else nn.Sequential(*gated(), nn.Linear(3, 2))
    before = of_gates(stage)
    refused(lambda: dampr.Budget(stage, X, macs=0.5, steps=10), "stages of a pipeline", f"rank {rank()}")
    assert torch.equal(of_gates(stage), before)


def check_a_bank(folder: Path) -> None:
    model = nn.Sequential(dampr.nn.GatedLinear(6, 8), nn.Tanh(), dampr.nn.GatedLinear(8, 3))
    wrapped, bank = DDP(model), dampr.nn.GateBank(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        with bank.draw():
            alike(torch.cat([model[0].gate().detach(), model[2].gate().detach()]))
            (wrapped(batch()).square().mean() + 1e-3 * bank.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    alike(flat(model))


def check_a_shrinker(folder: Path) -> None:
    model = gated()
    refused(lambda: dampr.Shrinker(DDP(model), X), r"model\.module", "smaller in place")
    stale = DDP(model)
    train(stale, model)
    with torch.no_grad():
        model[0].gate.log_alpha[:7] = -30.0
    assert dampr.Shrinker(model, X, patience=1).step()
    refused(lambda: stale(batch()), "wrap the module again")
    train(DDP(model), model)
    alike(flat(model))


def check_converting_under_a_live_wrapper_is_an_error_in_its_next_step(folder: Path) -> None:
    model = net()
    wrapped = DDP(model)
    wrapped(batch()).sum().backward()
    dampr.convert(model, example_inputs=X)
    refused(lambda: wrapped(batch()), r"does not reduce 2 of its parameters \(0\.gate\.log_alpha")
    train(DDP(model), model)
    alike(flat(model))


def check_a_plan_refuses_a_wrapper_of_before(folder: Path) -> None:
    model = net()
    plan = dampr.Plan(model, X, macs=0.4, steps=60)
    wrapped, optimizer = DDP(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        wrapped(batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if plan.step(optimizer):
            refused(lambda stale=wrapped: stale(batch()), "wrap the module again")
            wrapped = DDP(model)
    small = plan.finish()
    alike(flat(small))
    assert not any("wrapper" in str(hook) for module in small.modules() for hook in module._forward_pre_hooks.values())


def check_statistics_of_norms_are_shared_when_a_plan_compacts(folder: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3))
    x = torch.randn(8, 1, 4, 4)
    plan = dampr.Plan(model, x, macs=0.5, steps=40)
    wrapped, optimizer = DDP(model, broadcast_buffers=False), torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank())
    for _ in range(40):
        wrapped(torch.randn(8, 1, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if plan.step(optimizer):
            alike(flat(model))
            break


def check_prune_once_measures_on_all_ranks(folder: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3))
    torch.manual_seed(rank())
    batches = [(torch.randn(8, 1, 4, 4), torch.randint(3, (8,))) for _ in range(3)]
    for criterion in ("taylor", "magnitude", "random"):
        small = dampr.prune_once(DDP(model), batches, nn.functional.cross_entropy, macs=0.5, criterion=criterion)
        assert type(small) is nn.Sequential
        alike(flat(small), criterion)


def check_a_budget_of_latency_agrees(folder: Path) -> None:
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 64)), torch.randn(64, 64)
    budget = dampr.Budget(dampr.convert(model, example_inputs=x), x, latency=0.8, steps=10)
    alike(torch.tensor([budget.total, budget.target], dtype=torch.float64), "total and target")
    alike(budget.cost._seconds, "table")


def check_a_closed_branch(folder: Path) -> None:
    for how in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        for per_sample in (False, True):
            torch.manual_seed(3)
            branch = nn.Sequential(dampr.nn.GatedLinear(6, 6), nn.Tanh(), nn.Linear(6, 6))
            model = nn.Sequential(
                nn.Linear(6, 6), dampr.nn.GatedResidual(branch, per_sample=per_sample), nn.Linear(6, 3)
            )
            with torch.no_grad():
                model[1].gate.log_alpha.fill_(-0.5)  # often closed, not always
            wrapped = DDP(model, **how)
            train(wrapped, model, steps=12, cost=lambda model=model: 1e-3 * dampr.penalty(model))
            alike(flat(model), f"{how}, per_sample={per_sample}")


def check_a_closed_branch_that_is_checkpointed(folder: Path) -> None:
    class Net(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            branch = nn.Sequential(dampr.nn.GatedLinear(6, 6), nn.Tanh(), nn.Linear(6, 6))
            self.first, self.second, self.reentrant = nn.Linear(6, 6), dampr.nn.GatedResidual(branch), reentrant
            nn.init.constant_(self.second.gate.log_alpha, -0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)

    for reentrant in (False, True):
        for how in ({}, {"static_graph": True}):
            torch.manual_seed(3)
            model = Net(reentrant)
            train(DDP(model, **how), model, steps=12)
            alike(flat(model), f"use_reentrant={reentrant}, {how}")


def check_a_closed_branch_has_gradients_of_zero(folder: Path) -> None:
    model = dampr.nn.GatedResidual(nn.Linear(6, 6))
    with torch.no_grad():
        model.gate.log_alpha.fill_(-30.0)
    wrapped = DDP(model)
    wrapped(batch()).sum().backward()
    assert all(not p.grad.any() for p in model.branch.parameters())
    x = torch.full((2, 6), 7.0)
    assert torch.equal(model(x), x)


def check_accumulation_with_held_draws(folder: Path) -> None:
    model = gated(per_sample=False)
    wrapped = DDP(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        with dampr.hold_draws(wrapped):
            with wrapped.no_sync():
                wrapped(batch()).square().mean().backward()
            wrapped(batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    alike(flat(model))


def check_zero_1(folder: Path) -> None:
    model = gated()
    wrapped = DDP(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.05)
    for _ in range(3):
        (wrapped(batch()).square().mean() + 1e-3 * dampr.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    alike(flat(model))
    refused(lambda: dampr.compact(model, example_inputs=X, optimizer=optimizer), "ZeroRedundancyOptimizer")
    dense = net()
    plan = dampr.Plan(dense, X, macs=0.5, steps=40)
    refused(
        lambda: plan.step(ZeroRedundancyOptimizer(dense.parameters(), torch.optim.Adam, lr=0.05)),
        "ZeroRedundancyOptimizer",
    )
    assert plan.steps_taken == 0


def check_join(folder: Path) -> None:
    """Ranks with another number of batches; afterwards they draw alike again."""
    model = gated()
    wrapped = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Join([wrapped]):
        for _ in range(2 + 2 * rank()):
            wrapped(batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    alike(flat(model))
    train(wrapped, model, steps=2)
    alike(flat(model))
    budget = dampr.Budget(model, X, macs=0.5, steps=10)
    again = DDP(model)
    try:
        with Join([again]):
            refused(lambda: again(batch()), "Join does not wait")
            raise InterruptedError  # no rank has entered the forward of the wrapper
    except InterruptedError:
        pass
    assert budget.steps == 0


def check_activation_checkpointing(folder: Path) -> None:
    class Net(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.first, self.second, self.reentrant = dampr.nn.GatedLinear(6, 8), dampr.nn.GatedLinear(8, 3), reentrant

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(checkpoint(self.first, x.requires_grad_(), use_reentrant=self.reentrant).relu())

    for reentrant in (False, True):
        torch.manual_seed(3)
        model = Net(reentrant)
        train(DDP(model), model)
        alike(flat(model), f"use_reentrant={reentrant}")


def check_compiled(folder: Path) -> None:
    model = gated()
    wrapped = torch.compile(DDP(model), backend="aot_eager")
    train(wrapped, model, steps=3)
    alike(flat(model))
    torch.manual_seed(rank())
    by_hand = nn.Sequential(dampr.nn.GatedLinear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    wrapped = torch.compile(DDP(by_hand), backend="aot_eager")
    train(wrapped, by_hand, steps=3)
    alike(flat(by_hand), "by hand")
    alike(torch.cat([wrapped(X).detach() for _ in range(3)]), "draws of layers by hand")


def check_a_compiled_wrapper_of_before(folder: Path) -> None:
    def compiled_inside(model: nn.Module) -> nn.Module:
        model.compile(backend="aot_eager")
        return DDP(model)

    for wrap in (
        lambda model: torch.compile(DDP(model), backend="aot_eager"),
        lambda model: DDP(torch.compile(model, backend="aot_eager")),
        compiled_inside,
    ):
        model = net()
        stale = wrap(model)
        stale(batch()).sum().backward()
        dampr.convert(model, example_inputs=X)
        refused(lambda stale=stale: stale(batch()), "wrap the module again")
        budget = dampr.Budget(model, X, macs=0.5)
        stale = wrap(model)
        stale(batch()).sum().backward()
        budget.finalize()
        refused(lambda stale=stale: stale(batch()), "wrap the module again")
