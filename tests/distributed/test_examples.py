"""The examples for several processes, as a user starts them: two ranks end as one process does, and a killed run goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.limits import HANG

ROOT = Path(__file__).parents[2]
SAME = ("accuracy", "open", "macs", "params")


def ran(script: str, ranks: int, *arguments: str) -> dict[str, Any]:
    """What a script prints in the end; nothing where it was stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", f"examples.{script}", "--root", "digits", "--no-write", "--epochs", "6", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{\n") :]) if "{\n" in done.stdout else {}


@pytest.mark.parametrize("script", ["train_ddp", *(pytest.param(script, marks=pytest.mark.long) for script in ("train_fsdp", "train_tp"))])
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
