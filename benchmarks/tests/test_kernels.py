"""The steps that are profiled on a GPU run, and names agree with those of the counts that predict them."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import kernels, predictions


@pytest.mark.parametrize("job", [
    kernels._linear((16, 24, 20), "both", False, "fold", "weight"),
    kernels._linear((16, 24, 20), "input", True, "passes", "x"),
    kernels._linear((16, 24, 20), (4, 4), False, "fold", "weight"),
    kernels._norm((2, 8, 6, 6), torch.channels_last),
    kernels._conv((2, 8, 6, 6), 8, "fold"),
])  # fmt: skip
def test_a_step_runs_forward_and_backward(job, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "HALF", torch.float32)
    torch.manual_seed(0)
    step = job.make()
    assert step().isfinite().all()
    assert step().requires_grad


def test_every_job_has_a_count_and_every_count_a_job_but_those_that_are_counted_alone() -> None:
    counted = {name.split(":")[0] for name in predictions.counts() if "tile" not in name}
    alone = {"gates, one draw", "gates, per sample", "generator", "small_m, 64 rows"}
    alone |= {f"activations, {layout}" for layout in ("channels last", "contiguous")}
    assert counted == set(kernels.JOBS) | alone
    assert not set(kernels.JOBS) & alone


def test_a_count_of_a_gate_predicts_no_pass_over_a_tensor() -> None:
    assert predictions.seconds("fold", "fold_fwd") > 0
    assert predictions.seconds("fold", "fold_gate_bwd") is None
    assert predictions.seconds("one_pass, small", "gated_linear_fwd") is None


def test_kernels_are_named_as_the_counts_are() -> None:
    assert kernels.short("fold_fwd_kernel") == "fold_fwd"
    assert len(kernels.short("void cutlass::" + "x" * 200)) == 80
    assert "fold: fold_fwd" in json.loads(predictions.COUNTS.read_text())["3.7.1"]


def test_an_unknown_job_is_refused() -> None:
    with pytest.raises(SystemExit):
        kernels.main(["nothing"])
