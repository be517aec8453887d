"""GatedSyncBatchNorm in one process: what torch converts keeps its gates. On several ranks: tests/distributed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dampr
from dampr.nn import GatedBatchNorm1d, GatedBatchNorm2d, GatedSyncBatchNorm


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


X = torch.linspace(-1, 1, 8 * 16).reshape(8, 1, 4, 4).sin()


def test_a_converted_model_keeps_its_gates_and_what_it_computes() -> None:
    model = dampr.convert(conv_net(), example_inputs=X)
    gate, before = model[1].gate, model.eval()(X)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synced[1]) is GatedSyncBatchNorm
    assert synced[1].gate is gate
    assert (synced[1].activation, synced[1].followed) == ("relu", True)
    assert torch.equal(synced(X), before)
    assert dampr.verify_model(synced, X).ok


def test_a_copy_and_a_second_conversion_keep_them_too() -> None:
    model = copy.deepcopy(dampr.convert(conv_net(), example_inputs=X))
    once = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    budget = dampr.Budget(once, X, macs=0.5, steps=10)
    twice = nn.SyncBatchNorm.convert_sync_batchnorm(once)
    assert type(twice[1]) is GatedSyncBatchNorm
    assert twice[1].gate is budget.controller.gates[0]
    for _ in range(10):
        twice.train()(X).square().mean().backward()
        budget.step()
    assert budget.finalize().reached <= budget.target
    small = dampr.compact(twice, example_inputs=X)
    assert type(small[1]) is nn.SyncBatchNorm
    assert small[1].num_features == 4


@pytest.mark.parametrize(
    "how",
    [{}, {"affine": False}, {"track_running_stats": False}, {"affine": False, "track_running_stats": False}],
    ids=str,
)
def test_a_single_norm_without_parameters_or_statistics(how) -> None:
    norm = GatedBatchNorm1d(4, per_sample=True, **how)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    assert type(synced) is GatedSyncBatchNorm
    assert synced.gate is norm.gate
    assert synced.per_sample
    x = torch.randn(5, 4)
    assert torch.equal(synced.eval()(x), norm.eval()(x))


def test_a_shared_gate_stays_shared() -> None:
    first = GatedBatchNorm2d(4)
    model = nn.ModuleList([first, GatedBatchNorm2d(4, gate=first.gate)])
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert synced[0].gate is synced[1].gate is first.gate
    assert synced[0].weight is not synced[1].weight


def test_plain_norms_become_plain_ones() -> None:
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4))) is nn.SyncBatchNorm


def test_it_is_made_of_a_dense_one_and_gives_one_back() -> None:
    dense = nn.SyncBatchNorm(4)
    gated, x = GatedSyncBatchNorm.from_dense(dense), torch.randn(5, 4)
    assert gated.weight is dense.weight
    assert torch.equal(gated.eval()(x), dense.eval()(x))
    assert type(gated.to_dense()) is nn.SyncBatchNorm


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"activation='gelu': expected"):
        GatedSyncBatchNorm(4, activation="gelu")
    with pytest.raises(ValueError, match=r"x\.shape=\(4,\): expected \(B, C\) or more dimensions"):
        GatedSyncBatchNorm(4)(torch.randn(4))
