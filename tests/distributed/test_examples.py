"""The examples for several processes, as a user starts them: two ranks end as one process does,
and a killed run goes on.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.launch import ROOT, run_script

SAME = ("accuracy", "open", "macs", "params")


def ran(script: str, ranks: int, *arguments: str) -> dict[str, Any]:
    """What a script prints in the end; nothing where it was stopped."""
    how = ("--root", "digits", "--no-write", "--epochs", "6", *arguments)
    printed = run_script("-m", f"examples.{script}", *how, ranks=ranks, cwd=ROOT)
    return json.loads(printed[printed.index("{\n") :]) if "{\n" in printed else {}


@pytest.mark.parametrize(
    "script", [pytest.param(script, marks=pytest.mark.long) for script in ("train_ddp", "train_fsdp", "train_tp")]
)
def test_two_ranks_end_as_one_process_does(script) -> None:
    two, one = ran(script, 2), ran(script, 1)
    assert (two["ranks"], one["ranks"]) == (2, 1)
    assert abs(two["macs"] - one["macs"]) <= 0.1 * one["macs"]
    assert two["macs"] <= 0.1 * two["macs_dense"]
    assert abs(two["accuracy"] - one["accuracy"]) < 0.06
    assert two["accuracy"] > 0.7


CASES = [(script, stop) for script in ("train_ddp", "train_fsdp", "train_tp") for stop in (2, 4)]


@pytest.mark.long
@pytest.mark.parametrize(("script", "stop"), CASES)
def test_a_killed_run_goes_on(script, stop, tmp_path) -> None:
    """From before the ramp has ended, and from behind it."""
    how = ("--checkpoint", str(tmp_path / "run.pt"))
    assert ran(script, 2, *how, "--stop", str(stop)) == {}
    resumed, whole = ran(script, 2, *how), ran(script, 2)
    assert {name: resumed[name] for name in SAME} == {name: whole[name] for name in SAME}
