"""A plan under DistributedDataParallel: two processes over gloo decide the same and end with the same model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import sys, torch, dampr
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

score = sys.argv[1]
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
x, w = torch.randn(512, 12), torch.randn(12, 4)
y = (x @ w).argmax(1)
plan = dampr.Plan(model, x[:8], macs=0.3, steps=60, score=score, shrink=True)
wrapped = DistributedDataParallel(plan.model)
optimizer = torch.optim.Adam(plan.model.parameters(), lr=1e-2)
torch.manual_seed(7)  # the same draws of gates on both ranks
for step in range(60):
    rows = torch.arange(16) + 16 * ((2 * step + rank) % 32)
    loss = F.cross_entropy(wrapped(x[rows]), y[rows]) + plan.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if plan.step(optimizer):
        wrapped = DistributedDataParallel(plan.model)
small = plan.finish()
flat = torch.cat([p.detach().flatten() for p in small.parameters()])
sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
distributed.all_gather(sizes, torch.tensor([len(flat)]))
assert sizes[0] == sizes[1], sizes
found = [torch.zeros_like(flat) for _ in range(2)]
distributed.all_gather(found, flat)
assert torch.equal(*found), (found[0] - found[1]).abs().max()
assert plan.report.budget.reached <= plan.report.budget.target
distributed.destroy_process_group()
print("rank", rank, "ok")
"""


@pytest.mark.parametrize("score", ["importance", "learned"])
def test_two_ranks_end_with_the_same_model(score: str, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    runs = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), score],
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert all(f"rank {rank} ok" in output for rank, output in enumerate(outputs)), "\n".join(outputs)
