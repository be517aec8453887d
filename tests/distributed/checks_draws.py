"""Gates of a batch are the same on every rank; gates of samples are those of their rows in the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import dampr
from dampr.gates.draws import drawing_gates

ROWS = 12  # of the whole batch


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def on_all(t: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.zeros_like(t) for _ in range(world())]
    distributed.all_gather(found, t.contiguous())
    return found


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3))


def drawn(model: nn.Module, calls: int = 3) -> torch.Tensor:
    model.train()
    return torch.cat([gate() for _ in range(calls) for gate in drawing_gates(model)]).detach()


def families() -> dict[str, torch.Tensor]:
    """Draws per batch of every family that has noise, with a generator of their own."""
    found = {}
    for name, gate in {
        "hard_concrete": "hard_concrete",
        "dep_l0": "dep_l0",
        "diffprune": lambda n, device=None: dampr.gates.DiffPrune(n, stochastic=True, device=device),
    }.items():
        model = dampr.convert(net(), gate=gate, per_sample=False, example_inputs=torch.ones(4, 6))
        found[name] = drawn(dampr.gate_generator(model, seed=7))
    return found


def layers() -> dict[str, tuple[nn.Module, torch.Tensor, int]]:
    """Gated layers that draw per sample, their whole input, and the dimension of the samples."""
    torch.manual_seed(4)
    per: dict = {"per_sample": True}
    made = {
        "linear, output": (dampr.nn.GatedLinear(6, 9, **per), torch.randn(ROWS, 6)),
        "linear, input, sequences": (dampr.nn.GatedLinear(6, 9, granularity="input", **per), torch.randn(ROWS, 5, 6)),
        "conv, output": (dampr.nn.GatedConv2d(3, 5, 3, **per), torch.randn(ROWS, 3, 6, 6)),
        "conv, input": (dampr.nn.GatedConv1d(3, 5, 3, granularity="input", **per), torch.randn(ROWS, 3, 8)),
        "batch norm": (
            dampr.nn.GatedBatchNorm2d(5, activation="relu", track_running_stats=False, **per),
            torch.randn(ROWS, 5, 4, 4),
        ),
        "layer norm": (dampr.nn.GatedLayerNorm(7, **per), torch.randn(ROWS, 7)),
        "activations": (dampr.nn.GatedActivation(7, dim=-1, **per), torch.randn(ROWS, 3, 7)),
        "activations by an index": (
            dampr.nn.GatedActivation(2, dim=-1, index=torch.tensor([0, 1, 0]), **per),
            torch.randn(ROWS, 3),
        ),
        "embedding": (dampr.nn.GatedEmbedding(11, 6, **per), torch.randint(11, (ROWS, 4))),
        "embedding, rows": (dampr.nn.GatedEmbedding(11, 6, granularity="input", **per), torch.randint(11, (ROWS, 4))),
        "attention": (dampr.nn.GatedMultiheadAttention(8, 4, batch_first=True, **per), torch.randn(ROWS, 3, 8)),
        "residual": (dampr.nn.GatedResidual(nn.Linear(6, 6), **per), torch.randn(ROWS, 6)),
    }
    for number, (layer, _) in enumerate(made.values()):
        for p in layer.gate.parameters():
            nn.init.normal_(p, std=1.5)
        dampr.gate_generator(layer, seed=number)
    return {name: (layer.train(), x, 0) for name, (layer, x) in made.items()}


def rows() -> dict[str, torch.Tensor]:
    """Of each layer its gates of the rows of this process, and what it makes of them."""
    found = {}
    part = slice(rank() * ROWS // world(), (rank() + 1) * ROWS // world())
    for name, (layer, x, _) in layers().items():
        mine = x[part]
        found[f"{name}, gates"] = layer.gate(len(mine)).detach()
        if name == "batch norm":  # whose statistics are those of a part
            continue
        out = layer(mine, mine, mine)[0] if name == "attention" else layer(mine)
        found[name] = out.detach()
    return found


def check_write_for_the_test(folder: Path) -> None:
    torch.save({"families": families(), "rows": rows()}, folder / f"drawn{rank()}.pt")


def check_converted_models_draw_alike_whatever_the_ranks_random_states(folder: Path) -> None:
    model = net()
    torch.manual_seed(50 + rank())
    model = dampr.convert(model, example_inputs=torch.ones(4, 6))
    torch.rand(rank() + 1)
    first, *others = on_all(drawn(model))
    assert 0 < int((first == first.round()).sum()) <= first.numel()
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(drawn(model, 1), drawn(model, 1))
    assert not any("seed" in name for name in model.state_dict())  # it loads in one process
    assert any("seed" in name for name in dampr.gate_generator(model, seed=1).state_dict())


def check_layers_by_hand_draw_alike_under_ddp(folder: Path) -> None:
    torch.manual_seed(50 + rank())
    model = nn.Sequential(dampr.nn.GatedLinear(6, 8), nn.Tanh(), dampr.nn.GatedLinear(8, 3, granularity="weight"))
    seen = []
    wrapped = DistributedDataParallel(model)
    x = torch.ones(5, 6)  # the same rows: outputs are alike where gates are
    for _ in range(3):
        seen.append(wrapped(x).detach())
    first, *others = on_all(torch.stack(seen))
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first[0], first[1])


def check_two_models_do_not_draw_alike(folder: Path) -> None:
    a = dampr.convert(net(), example_inputs=torch.ones(4, 6))
    b = dampr.convert(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)), example_inputs=torch.ones(4, 6))
    assert not torch.equal(drawn(a, 1)[:20], drawn(b, 1)[:20])


def check_the_seed_follows_rank_0(folder: Path) -> None:
    from dampr.gates import ranks

    ranks._agreed = None
    store = distributed.distributed_c10d._get_default_store()
    distributed.barrier()
    if rank() == 0:
        store.delete_key("dampr/seed")
    distributed.barrier()
    torch.manual_seed(1234 if rank() == 0 else rank())
    assert ranks.agreed_seed() == 1234
    torch.manual_seed(5)
    assert ranks.agreed_seed() == 1234  # agreed once


def check_a_store_of_before_has_one_seed(folder: Path) -> None:
    """As after ``destroy_process_group`` and ``init_process_group`` under torchrun, whose store goes on."""
    from dampr.gates import ranks

    before = ranks.agreed_seed()
    torch.manual_seed(4321)
    ranks._agreed = None
    if rank() != 0:
        assert ranks.agreed_seed() == before  # read before rank 0 comes
    distributed.barrier()
    assert ranks.agreed_seed() == before


def check_a_group_of_its_own_counts_its_own_parts(folder: Path) -> None:
    alone = [distributed.new_group([r]) for r in range(world())][rank()]
    layer = dampr.gate_generator(dampr.nn.GatedLinear(6, 8, per_sample=True), seed=3, group=alone)
    first, *others = on_all(layer.gate(4).detach())
    assert all(torch.equal(first, other) for other in others)


def check_held_draws_are_alike(folder: Path) -> None:
    model = dampr.convert(net(), example_inputs=torch.ones(4, 6)).train()
    with dampr.hold_draws(model):
        a, b = drawn(model, 1), drawn(model, 1)
    assert torch.equal(a, b)
    first, *others = on_all(a)
    assert all(torch.equal(first, other) for other in others)


def check_no_message_in_a_step(folder: Path) -> None:
    """Behind the first step DistributedDataParallel broadcasts no buffers of gates,
    and the ranks draw alike all the same.
    """
    model = dampr.convert(net(), example_inputs=torch.ones(4, 6))
    wrapped = DistributedDataParallel(model)
    assert wrapped.will_sync_module_buffers()
    wrapped(torch.randn(4, 6)).sum().backward()
    assert not wrapped.will_sync_module_buffers()
    for _ in range(3):
        wrapped(torch.randn(4, 6)).sum().backward()
    first, *others = on_all(drawn(model))
    assert all(torch.equal(first, other) for other in others)
