"""Gated layers under tensor parallelism compute, and learn, what they do in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import parallel as tp
from torch.nn import functional as F

import dampr
from dampr.integrations.distributed import gathered, parallelize_module, replicate_gates
from tests.distributed.checks_ddp import alike, draws, flat, net, of_gates, random_start, rank, refused, unlike


class Block(nn.Module):
    """Pre-norm attention and MLP, in linear layers, which works on as many heads as its layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(self.up(self.norm2(x)).relu())
        return self.head(x.mean(1))


PLAN = {
    "q": tp.ColwiseParallel(),
    "k": tp.ColwiseParallel(),
    "v": tp.ColwiseParallel(),
    "o": tp.RowwiseParallel(),
    "up": tp.ColwiseParallel(),
    "down": tp.RowwiseParallel(),
}
X = torch.linspace(-1, 1, 4 * 3 * 16).reshape(4, 3, 16).sin()


def mesh() -> Any:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def settle(model: nn.Module, batch_ranks: Any = None) -> nn.Module:
    """Gates that are neither all open nor all closed, with a generator whose rows are those of one process."""
    torch.manual_seed(2)
    for gate in dampr.prune.distinct_gates(model).values():
        for p in gate.parameters():
            nn.init.normal_(p, mean=0.5, std=1.0)
    dampr.gate_generator(model, seed=5)
    for gate in dampr.gates.draws.drawing_gates(model):
        gate._stream.group = (rank(),) if batch_ranks is None else batch_ranks
    return model


def compare(build: Any, plan: Any, x: torch.Tensor, steps: int = 3, tolerance: float = 1e-4) -> nn.Module:
    """A sharded model beside a whole one: outputs, gradients of gates, parameters after some steps."""
    one, sharded = build(), build()
    parallelize_module(sharded, mesh(), plan)
    for name, layer in dampr.prune.gated_layers(sharded).items():
        assert not any(isinstance(p, DTensor) for p in layer.gate.parameters()), name
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (one, sharded)]
    for _ in range(steps):
        outs = []
        for m, optimizer in zip((one, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            y = m.train()(x)
            y = y.full_tensor() if isinstance(y, DTensor) else y
            # these know no weights
            prior = 0.0 if any(isinstance(part, dampr.nn.GatedParameter) for part in m.modules()) else 0.5
            (y.square().mean() + 1e-3 * dampr.penalty(m, prior_precision=prior)).backward()
            outs.append(y.detach())
        torch.testing.assert_close(*outs, rtol=tolerance, atol=tolerance)
        for a, b in zip(*(dampr.prune.distinct_gates(m).values() for m in (one, sharded)), strict=True):
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)
                alike(q.grad)
        for optimizer in optimizers:
            optimizer.step()
    whole = gathered(sharded)
    torch.testing.assert_close(flat(whole), flat(one), rtol=tolerance, atol=tolerance)
    alike(flat(whole))
    return sharded


def check_linear_layers(folder: Path) -> None:
    for granularity, per_sample in (
        ("output", False),
        ("output", True),
        ("input", False),
        ("input", True),
        ("weight", False),
        ((2, 2), False),
    ):
        for style in (tp.ColwiseParallel, tp.RowwiseParallel):

            def build(granularity: Any = granularity, per_sample: bool = per_sample) -> nn.Module:
                torch.manual_seed(3)
                layer = dampr.nn.GatedLinear(8, 12, granularity=granularity, per_sample=per_sample)
                return settle(nn.Sequential(nn.Linear(6, 8), layer, nn.Tanh()))

            plans = {
                tp.ColwiseParallel: {"1": tp.ColwiseParallel(output_layouts=Replicate())},
                tp.RowwiseParallel: {"0": tp.ColwiseParallel(), "1": tp.RowwiseParallel()},
            }
            compare(build, plans[style], torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))


def check_families(folder: Path) -> None:
    for gate in ("dep_l0", "dam", "diffprune", "diffmask"):

        def build(gate: str = gate) -> nn.Module:
            torch.manual_seed(3)
            model = nn.Sequential(nn.Linear(6, 8), dampr.nn.GatedLinear(8, 12, gate=gate), nn.Tanh(), nn.Linear(12, 4))
            return settle(model) if gate == "dep_l0" else model

        plan = {"1": tp.ColwiseParallel(), "3": tp.RowwiseParallel()}
        compare(build, plan, torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))


def check_gates_are_those_of_the_first_rank(folder: Path) -> None:
    for gate in ("dep_l0", random_start):
        model = dampr.gate_generator(unlike(gate), seed=rank())
        parallelize_module(model, mesh(), {"0": tp.ColwiseParallel(), "2": tp.RowwiseParallel()})
        alike(of_gates(model), str(gate))
        alike(draws(model), str(gate))


def check_plans_refuse_shards(folder: Path) -> None:
    for convert in (False, True):
        model, x = net(), torch.linspace(-1, 1, 8 * 6).reshape(8, 6)
        if convert:
            dampr.convert(model, example_inputs=x)
        plan = dampr.Plan(model, x, macs=0.5, steps=40)
        shard = parallelize_module if convert else tp.parallelize_module
        shard(model, mesh(), {"0": tp.ColwiseParallel(), "2": tp.RowwiseParallel()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        refused(lambda plan=plan, optimizer=optimizer: plan.step(optimizer), "parallelize_module", "budget")
        assert plan.steps_taken == 0


def check_a_transformer_block(folder: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        model = dampr.convert(Block(), example_inputs=X, exclude="head")
        assert dampr.prune.gated_layers(model)
        return settle(model)

    sharded = compare(build, PLAN, X)
    weight = sharded.up.weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape[0] == 32 // distributed.get_world_size()
    small = dampr.compact(sharded, example_inputs=X)
    assert not any(isinstance(p, DTensor) for p in small.parameters())
    torch.testing.assert_close(small.eval()(X), gathered(sharded).eval()(X), rtol=1e-4, atol=1e-5)
    alike(flat(small))
    assert dampr.summary(sharded, example_inputs=X).params_compacted == sum(p.numel() for p in small.parameters())


def check_layers_by_hand_in_a_block(folder: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        model = Block()
        model.o = dampr.nn.GatedHeads.from_dense(model.o, heads=4)
        model.up = dampr.nn.GatedLinear.from_dense(model.up)
        model.down = dampr.nn.GatedLinear.from_dense(model.down, granularity="input", gate=model.up.gate)
        return settle(model)

    compare(build, PLAN, X)


def check_a_budget_under_tensor_parallelism(folder: Path) -> None:
    torch.manual_seed(3)
    model = dampr.convert(Block(), example_inputs=X, exclude=["head", "q", "k", "v"])
    budget = dampr.Budget(model, X, macs=0.7, steps=12)
    parallelize_module(model, mesh(), PLAN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(12):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.step()
    report = budget.finalize()
    assert report.reached <= report.target
    small = dampr.compact(model, example_inputs=X)
    alike(flat(small))


def check_embeddings_and_sequences(folder: Path) -> None:
    class Net(nn.Module):
        def __init__(self, **how: Any) -> None:
            super().__init__()
            self.words = dampr.nn.GatedEmbedding(12, 8, **how)
            self.norm = dampr.nn.GatedLayerNorm(8)
            self.out = nn.Linear(8, 8)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(self.words(words)))

    words = torch.arange(4 * 8).reshape(4, 8) % 12
    for how in ({}, {"granularity": "input"}, {"per_sample": True}):
        for style in (tp.ColwiseParallel, tp.RowwiseParallel):

            def build(how: Any = how) -> nn.Module:
                torch.manual_seed(3)
                return settle(Net(**how))

            plan = {
                "words": style(input_layouts=Replicate(), output_layouts=Shard(1)),
                "norm": tp.SequenceParallel(),
                "out": tp.ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
            }
            compare(build, plan, words)


def check_torchs_own_function_is_refused_by_name(folder: Path) -> None:
    for style in (tp.ColwiseParallel(), tp.RowwiseParallel()):
        model = nn.Sequential(dampr.nn.GatedLinear(8, 12), nn.Tanh())
        refused(
            lambda model=model, style=style: tp.parallelize_module(model, mesh(), {"0": style}),
            r"dampr\.integrations\.distributed",
        )
    refused(lambda: parallelize_module(nn.parallel.DistributedDataParallel(net()), mesh(), {}), r"model\.module")
    conv = nn.Sequential(dampr.nn.GatedConv2d(3, 4, 3), nn.Flatten())
    refused(
        lambda: parallelize_module(conv, mesh(), {"0": tp.ColwiseParallel()}),
        "0: GatedConv2d does not compute on shards",
    )
    assert not isinstance(conv[0].weight, DTensor)


def check_parts_of_what_cannot_be_sharded_are_refused(folder: Path) -> None:
    for pattern in ("0", "*", "0.*", "0.out_proj"):
        model = nn.Sequential(dampr.nn.GatedMultiheadAttention(8, 4))
        plan = {pattern: tp.ColwiseParallel()}
        refused(lambda model=model, plan=plan: parallelize_module(model, mesh(), plan), "0: GatedMultihead")
        assert not any(isinstance(p, DTensor) for p in model.parameters())


def check_data_and_tensor_parallelism(folder: Path) -> None:
    """On four ranks, two by two; on two, one by two and two by one."""
    world = distributed.get_world_size()
    for shape in ((2, 2),) if world == 4 else ((1, 2), (2, 1)):
        both = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))

        def build() -> nn.Module:
            torch.manual_seed(3)
            layer = dampr.nn.GatedLinear(8, 12, per_sample=True)
            return settle(nn.Sequential(nn.Linear(6, 8), layer, nn.Tanh(), nn.Linear(12, 4)))

        one, sharded = build(), build()
        dampr.gate_generator(sharded, seed=5, group=both["dp"].get_group())
        replicate_gates(sharded, group=both["dp"].get_group())
        parallelize_module(sharded, both["tp"], {"1": tp.ColwiseParallel(), "3": tp.RowwiseParallel()})
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        each = 8 // shape[0]
        place = both["dp"].get_local_rank()
        one.train()(x).square().mean().backward()
        sharded.train()(x[each * place : each * (place + 1)]).square().mean().backward()
        torch.testing.assert_close(sharded[1].gate.log_alpha.grad, one[1].gate.log_alpha.grad, rtol=1e-4, atol=1e-6)
        alike(sharded[1].gate.log_alpha.grad)


def check_shards_of_shards(folder: Path) -> None:
    """fully_shard over tensor parallelism."""
    world = distributed.get_world_size()
    x = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(1))
    for shape in ((2, 2),) if world == 4 else ((1, 2), (2, 1)):
        both = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))

        def build() -> nn.Module:
            torch.manual_seed(3)
            return settle(dampr.convert(Block(), example_inputs=x, exclude="head"))

        one, model = build(), build()
        dampr.gate_generator(model, seed=5, group=both["dp"].get_group())
        gates = replicate_gates(model, group=both["dp"].get_group())
        parallelize_module(model, both["tp"], PLAN)
        fully_shard(model, mesh=both["dp"], ignored_params=gates)
        each, place = 8 // shape[0], both["dp"].get_local_rank()
        for m, part in ((one, x), (model, x[each * place : each * (place + 1)])):
            optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
            for _ in range(3):
                (m.train()(part).square().mean() + 1e-3 * dampr.penalty(m)).backward()
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(flat(gathered(model)), flat(one), rtol=1e-4, atol=1e-5)


def check_torchs_pipeline_of_a_converted_model(folder: Path) -> None:
    """Traced and split by torch, it has the gradients that it has in one process."""
    from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline

    world = distributed.get_world_size()

    def build() -> nn.Module:
        torch.manual_seed(3)
        parts = [(dampr.nn.GatedLinear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(world)]
        model = nn.Sequential(*(layer for part in parts for layer in part))
        return settle(dampr.convert(model, example_inputs=torch.ones(2, 6))).train()

    one, model = build(), build()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    starts = {f"{4 * stage}": SplitPoint.BEGINNING for stage in range(1, world)}
    split = pipeline(model, mb_args=(x[:2],), split_spec=starts)
    stage = split.build_stage(rank(), torch.device("cpu"), distributed.group.WORLD)
    schedule = ScheduleGPipe(stage, 4, loss_fn=lambda y, target: (y - target).square().mean())
    for _ in range(2):  # with other draws in the second step
        one.zero_grad()
        stage.submod.zero_grad()  # or torch would divide by the number of parts again
        for rows in x.split(2):
            (one(rows).square().mean() / 4).backward()
        if rank() == 0:
            schedule.step(x)
        else:
            schedule.step(**({"target": torch.zeros(8, 6)} if rank() == world - 1 else {}))
    for name, p in stage.submod.named_parameters():
        torch.testing.assert_close(p.grad, one.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)
    assert any("log_alpha" in name for name, _ in stage.submod.named_parameters())


def check_stages_of_a_pipeline(folder: Path) -> None:
    """Each stage is a gated model of its own: it trains with the penalty; a budget, which compares ranks, refuses."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    world = distributed.get_world_size()

    def build() -> nn.Sequential:
        torch.manual_seed(3)
        stages = [nn.Sequential(dampr.nn.GatedLinear(6, 6 + i), nn.Tanh(), nn.Linear(6 + i, 6)) for i in range(world)]
        return settle(nn.Sequential(*stages)).train()

    one, parts = build(), build()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for rows in x.split(2):
        (one(rows).square().mean() / 4).backward()
    (1e-3 * dampr.penalty(one)).backward()
    mine = parts[rank()]
    between = x[:2].clone().requires_grad_()
    given = x[:2] if rank() == 0 else between
    stage = PipelineStage(mine, rank(), world, torch.device("cpu"), input_args=(given,), output_args=(between,))
    schedule = ScheduleGPipe(stage, 4, loss_fn=lambda y, target: (y - target).square().mean())
    if rank() == 0:
        schedule.step(x)
    elif rank() == world - 1:
        schedule.step(target=torch.zeros(8, 6))
    else:
        schedule.step()
    (1e-3 * dampr.penalty(mine)).backward()
    for (name, p), q in zip(one[rank()].named_parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
    refused(lambda: dampr.Budget(mine, x, macs=0.9, steps=10), "stages of a pipeline")
    small = dampr.compact(mine, example_inputs=x)
    assert type(small) is nn.Sequential
