"""Gated models under fully_shard: gates are whole and alike, and what prunes sees the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import dampr
from dampr.integrations.distributed import gathered, replicate_gates
from tests.distributed.checks_ddp import (
    X,
    alike,
    batch,
    draws,
    flat,
    gated,
    net,
    of_gates,
    random_start,
    rank,
    refused,
    unlike,
)

ROWS = torch.linspace(-2, 2, 12 * 6).reshape(12, 6)


def mesh() -> Any:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def shard(model: nn.Module, **how: Any) -> nn.Module:
    gates = replicate_gates(model) if dampr.prune.gated_layers(model) else set()
    for block in model.children():
        if next(block.parameters(), None) is not None:
            fully_shard(block, mesh=mesh(), ignored_params=gates, **how)
    return fully_shard(model, mesh=mesh(), ignored_params=gates, **how)


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, number: int, rows: torch.Tensor, cost: Any = lambda: 0.0
) -> None:
    model.train()
    for _ in range(number):
        (model(rows).square().mean() + cost()).backward()
        optimizer.step()
        optimizer.zero_grad()


def mine(rows: torch.Tensor = ROWS) -> torch.Tensor:
    each = len(rows) // distributed.get_world_size()
    return rows[rank() * each : (rank() + 1) * each]


def learn(model: nn.Module, number: int = 3) -> None:
    """Steps in which the gates of each rank have a gradient of their own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steps(model, optimizer, number, batch(), lambda: (1 + rank()) * 1e-3 * dampr.penalty(model))


def same_as_one_process(build: Any, prior: float = 0.0, **how: Any) -> None:
    """A sharded model that trains on parts of a batch ends where an unsharded one ends that has all of it."""
    one, sharded = build(), build()
    for gate in dampr.gates.draws.drawing_gates(one):
        gate._stream.group = (rank(),)  # rows are counted as if this were the only process
    shard(sharded, **how)
    costs = [lambda m=m: 1e-3 * dampr.penalty(m, prior_precision=prior) for m in (one, sharded)]
    steps(one, torch.optim.Adam(one.parameters(), lr=0.05), 4, ROWS, costs[0])
    steps(sharded, torch.optim.Adam(sharded.parameters(), lr=0.05), 4, mine(), costs[1])
    whole = gathered(sharded)
    alike(flat(whole))
    torch.testing.assert_close(flat(whole), flat(one), rtol=1e-4, atol=1e-4)


def check_training_equals_one_process(folder: Path) -> None:
    for how in ({}, {"per_sample": True}, {"granularity": "weight"}, {"gate": "dep_l0", "per_sample": False}):
        same_as_one_process(lambda how=how: dampr.gate_generator(gated(**how), seed=5))


def check_a_penalty_on_sharded_weights(folder: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return dampr.gate_generator(
            nn.Sequential(dampr.nn.GatedLinear(6, 8), dampr.nn.GatedLayerNorm(8), nn.Linear(8, 3)), seed=5
        )

    same_as_one_process(build, prior=10.0)


def check_gates_shared_by_sharded_blocks(folder: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        first = dampr.nn.GatedLinear(6, 8)
        second = dampr.nn.GatedLinear(8, 8, gate=first.gate)
        return dampr.gate_generator(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(8, 3)), seed=5)

    same_as_one_process(build)


def check_gates_are_whole_and_in_full_precision(folder: Path) -> None:
    model = shard(gated(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    seen: set[torch.dtype] = set()
    model[0].register_forward_hook(
        lambda module, args, out: seen.update((module.gate.log_alpha.dtype, module.weight.dtype, out.dtype))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    before = model[0].gate.log_alpha.detach().clone()
    steps(model, optimizer, 2, mine(), lambda: 1e-2 * dampr.penalty(model))
    assert seen == {torch.float32, torch.bfloat16}
    gates = [layer.gate.log_alpha for layer in dampr.prune.gated_layers(model).values()]
    assert not any(isinstance(p, DTensor) for p in gates)
    assert all(p.dtype == torch.float32 for p in gates)
    assert isinstance(model[0].weight, DTensor)
    assert not torch.equal(before, gates[0])
    alike(torch.cat([p.detach() for p in gates]))


def check_gradients_are_reduced_in_one_message(folder: Path) -> None:
    model = shard(gated())
    sent: list[int] = []
    kept = distributed.all_reduce
    distributed.all_reduce = lambda t, *args, **kwargs: (sent.append(t.numel()), kept(t, *args, **kwargs))[1]
    try:
        (model(mine()).square().mean() + 1e-3 * dampr.penalty(model)).backward()
    finally:
        distributed.all_reduce = kept
    assert sent == [sum(gate.num_gates for gate in dampr.prune.distinct_gates(model).values())]
    alike(torch.cat([gate.log_alpha.grad for gate in dampr.prune.distinct_gates(model).values()]))


def check_gates_are_those_of_the_first_rank(folder: Path) -> None:
    for gate in ("dep_l0", random_start):
        model = dampr.gate_generator(unlike(gate), seed=rank())
        replicate_gates(model)
        alike(of_gates(model), str(gate))
        learn(shard(model))
        alike(of_gates(model), str(gate))
        alike(draws(model), str(gate))


def check_a_backward_that_raises_is_not_the_last_that_reduces(folder: Path) -> None:
    def fail(p: torch.Tensor) -> None:
        raise ArithmeticError

    model = shard(gated())
    failing = model[0].gate.log_alpha.register_post_accumulate_grad_hook(fail)
    with pytest.raises(ArithmeticError):
        dampr.penalty(model).backward()
    failing.remove()
    model.zero_grad()
    learn(model)
    alike(of_gates(model))


def check_gates_from_the_meta_device(folder: Path) -> None:
    for gate in ("hard_concrete", random_start):
        with torch.device("meta"):
            layers = (dampr.nn.GatedLinear(*size, gate=gate) for size in ((6, 20), (20, 3)))
            model = nn.Sequential(*layers)
        shard(model)
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        learn(model)
        alike(of_gates(model), str(gate))


def check_parameters_that_a_state_dict_replaces(folder: Path) -> None:
    model = shard(gated())
    before = model[0].gate.log_alpha
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    assert model[0].gate.log_alpha is not before
    learn(model)
    alike(of_gates(model))


def check_gates_that_are_frozen_for_a_while(folder: Path) -> None:
    model = gated()
    model[0].gate.requires_grad_(False)
    before = model[0].gate.log_alpha.clone()
    replicate_gates(model)
    learn(shard(model))  # which replicates them again
    assert torch.equal(model[0].gate.log_alpha, before)
    assert model[0].gate.log_alpha.grad is None
    model[0].gate.requires_grad_(True)
    learn(model)
    assert not torch.equal(model[0].gate.log_alpha, before)
    alike(of_gates(model))


def check_gates_on_parameters(folder: Path) -> None:
    from tests.distributed.checks_tensor_parallel import Block, settle

    rows = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(1))

    def build() -> nn.Module:
        torch.manual_seed(3)
        return settle(dampr.convert(Block(), example_inputs=rows))

    one, model = build(), build()
    assert any(isinstance(layer, dampr.nn.GatedParameter) for layer in dampr.prune.gated_layers(model).values())
    shard(model)
    for m, part in ((one, rows), (model, mine(rows))):
        steps(m, torch.optim.SGD(m.parameters(), lr=0.05), 3, part, lambda m=m: 1e-3 * dampr.penalty(m))
    torch.testing.assert_close(flat(gathered(model)), flat(one), rtol=1e-4, atol=1e-5)
    alike(flat(dampr.compact(model, example_inputs=rows)))


def check_recurrent_layers(folder: Path) -> None:
    for kind in (nn.LSTM, nn.GRU, nn.RNN):

        class Net(nn.Module):
            def __init__(self, kind: Any = kind) -> None:
                super().__init__()
                self.states, self.out = kind(6, 8, num_layers=2, batch_first=True), nn.Linear(8, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.out(self.states(x)[0][:, -1])

        torch.manual_seed(3)
        x = torch.randn(8, 5, 6)
        one, model = (dampr.gate_generator(dampr.convert(m, example_inputs=x), seed=5) for m in copies(Net))
        shard(model)
        for m, part in ((one, x), (model, mine(x))):
            steps(m, torch.optim.SGD(m.parameters(), lr=0.05), 3, part, lambda m=m: 1e-3 * dampr.penalty(m))
        torch.testing.assert_close(flat(gathered(model)), flat(one), rtol=1e-4, atol=1e-5, msg=kind.__name__)
        alike(flat(dampr.compact(model, example_inputs=x)), kind.__name__)


def copies(kind: Any) -> list[nn.Module]:
    """Two of the same weights."""
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(kind())
    return found


def check_wrappers_of_activation_checkpointing(folder: Path) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    for how in wrappers.CheckpointImpl:
        one, model = (dampr.gate_generator(nn.Sequential(nn.Linear(6, 6), *gated()), seed=5) for _ in copies(net))
        model.load_state_dict(one.state_dict())
        wrappers.apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda layer, how=how: wrappers.checkpoint_wrapper(layer, checkpoint_impl=how),
            check_fn=lambda layer: isinstance(layer, dampr.nn.GatedLinear),
        )
        shard(model)
        for m, part in ((one, ROWS), (model, mine())):
            steps(m, torch.optim.SGD(m.parameters(), lr=0.05), 3, part, lambda m=m: 1e-3 * dampr.penalty(m))
        torch.testing.assert_close(flat(gathered(model)), flat(one), rtol=1e-4, atol=1e-5, msg=str(how))
        alike(flat(dampr.compact(model, example_inputs=X)), str(how))


def check_replicas_of_shards(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, distributed.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    one, model = (dampr.gate_generator(gated(), seed=5) for _ in range(2))
    fully_shard(model, mesh=mesh, ignored_params=replicate_gates(model))
    for m, part in ((one, ROWS), (model, mine())):
        steps(m, torch.optim.SGD(m.parameters(), lr=0.05), 3, part, lambda m=m: 1e-3 * dampr.penalty(m))
    torch.testing.assert_close(flat(gathered(model)), flat(one), rtol=1e-4, atol=1e-5)


def check_gradients_that_wait(folder: Path) -> None:
    """Accumulated without a message of the weights' gradients, those of gates are what one process has all the same."""
    one, model = (dampr.gate_generator(gated(), seed=5) for _ in range(2))
    shard(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (one, model)]
    for _ in range(3):
        for last, part in enumerate((ROWS[:6], ROWS[6:])):
            (one.train()(part).square().mean() / 2).backward()
            model.set_requires_gradient_sync(bool(last))
            (model.train()(mine(part)).square().mean() / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(flat(gathered(model)), flat(one), rtol=1e-4, atol=1e-5)


def check_clipping_and_foreach_go_by_groups(folder: Path) -> None:
    """As the page on many processes says: torch's functions take sharded tensors, or whole ones."""
    model = gated()
    gates = replicate_gates(model)
    fully_shard(model, mesh=mesh(), ignored_params=gates)
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=0.05), foreach=True)
    for _ in range(2):
        (model.train()(batch()).square().mean() + 1e-3 * dampr.penalty(model)).backward()
        weights = [p for p in model.parameters() if p not in gates]
        torch.nn.utils.clip_grad_norm_(weights, 1e-3)
        total = torch.nn.utils.get_total_norm([p.grad for p in weights]).full_tensor()
        assert 0 < total < 1.001e-3
        optimizer.step()
        optimizer.zero_grad()
    alike(flat(gathered(model)))


def check_functions_gather(folder: Path) -> None:
    plain, model = gated(), gated()
    for m in (plain, model):
        with torch.no_grad():
            m[0].gate.log_alpha[:7] = -9.0
    shard(model)
    model.train()(mine()).sum().backward()  # the root keeps its parameters whole until the next step
    model.zero_grad()
    for m in (plain, model):
        m.eval()
    assert torch.equal(dampr.penalty(model), dampr.penalty(plain))
    assert dampr.summary(model).as_dict() == dampr.summary(plain).as_dict()
    assert dampr.summary(model, example_inputs=X).as_dict() == dampr.summary(plain, example_inputs=X).as_dict()
    assert dampr.verify_model(model, X).as_dict() == dampr.verify_model(plain, X).as_dict()
    small = dampr.compact(model, example_inputs=X)
    assert type(small) is nn.Sequential
    assert small[0].out_features == 13
    torch.testing.assert_close(small(X), plain(X), rtol=1e-5, atol=1e-6)
    assert not any(isinstance(p, DTensor) for p in small.parameters())
    again = shard(small)
    path = folder / f"small{rank()}.safetensors"
    dampr.save(again, path)
    torch.testing.assert_close(dampr.load(path)(X), plain(X), rtol=1e-5, atol=1e-6)
    assert isinstance(model[0].weight, DTensor)
    model.train()(mine()).sum().backward()  # it goes on
    only = gathered(model, rank=0)
    assert (only is None) == (rank() != 0)
    refused(
        lambda: dampr.compact(model, example_inputs=X, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)), "sharded"
    )


def check_owned_gates(folder: Path) -> None:
    for score in ("importance", "learned"):
        model = gated()
        budget = dampr.Budget(model, X, macs=0.4, steps=16, score=score)
        shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(16):
            model(batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            budget.step()
        report = budget.finalize()
        assert report.reached <= report.target
        small = dampr.compact(model, example_inputs=X)
        alike(flat(small), score)
        steps(shard(small), torch.optim.SGD(small.parameters(), lr=0.1), 2, mine())


def check_a_budget_with_a_penalty(folder: Path) -> None:
    model = gated()
    budget = dampr.Budget(model, X, macs=0.4)
    shard(model)
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-2, gate_lr=0.3))
    for _ in range(20):
        (model(batch()).square().mean() + budget.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.step()
    report = budget.finalize()
    assert report.reached <= report.target
    alike(flat(dampr.compact(model, example_inputs=X)))


def check_what_cannot_be_is_refused(folder: Path) -> None:
    dense = fully_shard(net(), mesh=mesh())
    refused(lambda: dampr.convert(dense, example_inputs=X), "sharded", "shard it after that")
    refused(lambda: dampr.Plan(dense, X, macs=0.5, steps=40), "sharded")
    careless = fully_shard(gated(), mesh=mesh())
    for call in (
        lambda: dampr.penalty(careless),
        lambda: dampr.summary(careless, example_inputs=X),
        lambda: dampr.compact(careless, example_inputs=X),
        lambda: dampr.verify_model(careless, X),
    ):
        refused(call, "0.gate", "replicate_gates")
    refused(lambda: dampr.Budget(careless, X, macs=0.5), "sharded")
    refused(lambda: dampr.History(folder / f"run{distributed.get_rank()}.jsonl", careless, example_inputs=X), "sharded")
    refused(lambda: replicate_gates(careless), "sharded")
    refused(lambda: dampr.Shrinker(careless, X), "sharded", "smaller in place")
    model = gated()
    with torch.no_grad():
        model[0].gate.log_alpha[:7] = -30.0
    shrinker = dampr.Shrinker(model, X, patience=1)
    fully_shard(model, mesh=mesh(), ignored_params=replicate_gates(model))
    refused(shrinker.step, "sharded", "smaller in place")
    refused(lambda: replicate_gates(net()), "expected gated layers")
    model = net()
    plan = dampr.Plan(model, X, macs=0.5, steps=40)
    fully_shard(model, mesh=mesh())
    with pytest.raises(dampr.PlanError, match="fully_shard"):
        plan.step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert plan.steps_taken == 0


def check_a_checkpoint_is_written(folder: Path) -> None:
    """Read again by the next check, and by a run on another number of ranks."""
    model = shard(dampr.gate_generator(gated(), seed=5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    steps(model, optimizer, 3, mine())
    weights, moments = get_state_dict(model, optimizer)
    assert "0.gate.next_seed" in weights
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        alone = gated_alone()
        alone.load_state_dict(full)
        small = dampr.compact(alone, example_inputs=X)
        assert type(small) is nn.Sequential
    steps(model, optimizer, 2, mine())
    torch.save(flat(gathered(model)), folder / f"went_on{rank()}.pt")


def check_a_budget_that_learns_is_resumed(folder: Path) -> None:
    def new() -> tuple[nn.Module, dampr.Budget, torch.optim.Optimizer]:
        model = dampr.gate_generator(gated(), seed=5)
        budget = dampr.Budget(model, X, macs=0.4, steps=16, score="learned")
        shard(model)
        return model, budget, torch.optim.Adam(model.parameters(), lr=0.05)

    def train(model: nn.Module, budget: dampr.Budget, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(8):
            steps(model, optimizer, 1, mine())
            budget.step()

    first = model, budget, optimizer = new()
    train(*first)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "budget": budget.state_dict()}, checkpoint_id=folder / "budget")
    train(*first)
    second = model, budget, optimizer = new()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "budget": budget.state_dict()}
    dcp.load(state, checkpoint_id=folder / "budget")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    budget.load_state_dict(state["budget"])
    train(*second)
    torch.testing.assert_close(of_gates(model), of_gates(first[0]))
    torch.testing.assert_close(flat(gathered(model)), flat(gathered(first[0])))


def gated_alone() -> nn.Module:
    """As :func:`gated`, with counters of gates, by one rank alone."""
    return dampr.gate_generator(gated(), seed=5)


def check_a_checkpoint_is_resumed(folder: Path) -> None:
    model = shard(dampr.gate_generator(gated(), seed=5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    steps(model, optimizer, 2, mine())
    expected = torch.load(folder / "went_on0.pt")
    torch.testing.assert_close(flat(gathered(model)), expected, rtol=1e-5, atol=1e-6)
