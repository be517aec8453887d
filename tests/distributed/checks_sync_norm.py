"""GatedSyncBatchNorm on ranks with parts of a batch, against one BatchNorm that sees all of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dampr
from tests.distributed.checks_ddp import alike, flat, rank

PARTS = (5, 3, 4, 4)  # rows of each rank


def conv_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )  # fmt: skip


X = torch.linspace(-1, 1, 4 * 16).reshape(4, 1, 4, 4)


def check_statistics_and_gradients_are_those_of_the_whole_batch(folder: Path) -> None:
    world = distributed.get_world_size()
    parts = PARTS[:world]
    start = sum(parts[: rank()])
    for activation in (None, "relu"):
        for per_sample in (False, True):
            for affine in (True, False):
                torch.manual_seed(1)
                x = torch.randn(sum(parts), 6, 3, 3).double()
                dy = torch.randn_like(x)
                how = {"activation": activation, "affine": affine}
                one = dampr.nn.GatedBatchNorm2d(6, dtype=torch.float64, **how)
                synced = dampr.nn.GatedSyncBatchNorm(6, dtype=torch.float64, per_sample=per_sample, **how)
                nn.init.normal_(one.gate.log_alpha)
                for layer in (one, synced):
                    layer.gate = type(one.gate)(6)
                    torch.manual_seed(2)
                    nn.init.normal_(layer.gate.log_alpha)
                if per_sample:  # gates that do not depend on the rows: 1 or 0, and nothing in between
                    for layer in (one, synced):
                        layer.gate.log_alpha.data = torch.tensor([30.0, -30, 30, 30, -30, 30])
                dampr.gate_generator(one, seed=4), dampr.gate_generator(synced, seed=4)
                whole, mine = x.clone().requires_grad_(), x[start : start + parts[rank()]].clone().requires_grad_()
                for _ in range(2):
                    y = one(whole)
                    out = synced(mine)
                torch.testing.assert_close(out, y[start : start + len(mine)], rtol=1e-9, atol=1e-9)
                (y * dy).sum().backward()
                (out * dy[start : start + len(mine)]).sum().backward()
                torch.testing.assert_close(mine.grad, whole.grad[start : start + len(mine)], rtol=1e-8, atol=1e-9)
                for name, p in synced.named_parameters():
                    total = p.grad.clone()
                    distributed.all_reduce(total)
                    torch.testing.assert_close(total, one.get_parameter(name).grad, rtol=1e-5, atol=1e-6, msg=name)
                for name, buffer in synced.named_buffers():
                    torch.testing.assert_close(buffer, one.get_buffer(name), rtol=1e-9, atol=1e-9, msg=name)
                alike(synced.running_var)
                torch.testing.assert_close(synced.eval()(x), one.eval()(x))


def check_torchs_conversion_keeps_the_gates(folder: Path) -> None:
    model = dampr.convert(conv_net(), example_inputs=X)
    before = model.eval()(X)
    gates = {name: layer.gate for name, layer in dampr.prune.gated_layers(model).items()}
    described = {name: repr(layer) for name, layer in dampr.prune.gated_layers(model).items()}
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synced[1]) is type(synced[4]) is dampr.nn.GatedSyncBatchNorm
    assert {name: layer.gate for name, layer in dampr.prune.gated_layers(synced).items()} == gates
    for name, layer in dampr.prune.gated_layers(synced).items():
        assert repr(layer).replace("GatedSyncBatchNorm", "GatedBatchNorm2d") == described[name]
    torch.testing.assert_close(synced.eval()(X), before)
    wrapped = DDP(synced.train())
    torch.manual_seed(rank())
    optimizer = torch.optim.SGD(synced.parameters(), lr=0.05)
    for _ in range(3):
        (wrapped(torch.randn(4, 1, 4, 4)).square().mean() + 1e-3 * dampr.penalty(synced)).backward()
        optimizer.step()
        optimizer.zero_grad()
    alike(flat(synced))
    with torch.no_grad():
        synced[1].gate.log_alpha[:3] = -9.0
    assert dampr.verify_model(wrapped, X).ok
    small = dampr.compact(wrapped, example_inputs=X)
    assert type(small[1]) is nn.SyncBatchNorm
    assert small[1].num_features == 5
    path = folder / f"synced{rank()}.safetensors"
    dampr.save(small, path)
    torch.testing.assert_close(dampr.load(path)(X), small.eval()(X))


def check_a_model_with_sync_norms_is_converted(folder: Path) -> None:
    group = distributed.new_group(list(range(distributed.get_world_size())))
    for process_group in (None, group):
        dense = nn.SyncBatchNorm.convert_sync_batchnorm(conv_net(), process_group)
        model = dampr.convert(dense, example_inputs=X)
        assert type(model[1]) is dampr.nn.GatedSyncBatchNorm, model
        assert model[1].process_group is process_group
        assert model[1].activation == "relu"
        budget = dampr.Budget(model, X, macs=0.5, steps=8)
        wrapped = DDP(model)
        torch.manual_seed(rank())
        for _ in range(8):
            wrapped(torch.randn(4, 1, 4, 4)).square().mean().backward()
            budget.step()
        report = budget.finalize()
        assert report.reached <= report.target
        small = dampr.compact(model, example_inputs=X)
        assert type(small[1]) is nn.SyncBatchNorm
        assert small[1].process_group is process_group
        alike(flat(small))


def check_gates_without_a_gated_layer_are_an_error(folder: Path) -> None:
    import pytest

    model = dampr.convert(conv_net(), example_inputs=X)
    plain = nn.BatchNorm2d(8)
    plain.gate = model[1].gate
    model[1] = plain
    for call in (
        lambda: dampr.penalty(model),
        lambda: dampr.compact(model, example_inputs=X),
        lambda: dampr.Budget(model, X, macs=0.5),
        lambda: dampr.summary(model, example_inputs=X),
    ):
        with pytest.raises(ValueError, match=r"1\.gate: gates in BatchNorm2d, which is no gated layer"):
            call()
