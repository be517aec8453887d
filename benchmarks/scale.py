"""``python -m benchmarks.scale``: counts what gates cost on 1, 2 and 4 ranks, and extrapolates to 1,024.

A step of a small MLP runs on several processes over gloo. Counted are messages and bytes of collectives, operators, and
the bytes that a rank keeps. The time that a budget takes on the host is measured for growing numbers of gates. For a
model of 70 billion parameters, which is only built on the meta device, a step's traffic is computed for a ring of ranks
of a given latency and bandwidth. ``--worker`` is how each rank is started.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dampr
from dampr import records
from dampr.cli import report
from dampr.integrations.distributed import parallelize_module, replicate_gates

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "results" / "cpu" / "scale.json"
WIDTHS, LAYERS, RANKS = (32, 128), 3, (1, 2, 4)
GATES = (4_096, 16_384, 65_536)  # the numbers of gates for which a budget's step is timed
LATENCY, BANDWIDTH = 5e-6, 25e9  # seconds of a message between two ranks; bytes that a rank sends per second
LLAMA = {"layers": 80, "width": 8192, "neurons": 28672, "heads": 64, "groups": 8, "words": 128256}
HOST, SECOND = 2e12, 1.0  # memory of a host, bytes; what a step may wait for a decision, seconds
MANY = (8, 64, 256, 1024)


class Count(TorchDispatchMode):
    """Counts operators, and collective messages with the bytes that a rank puts into them."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.messages = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name and "barrier" not in name:
            self.messages += 1
            sizes = [_bytes(t) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
            # A gather takes a result tensor and what is sent; the latter is the smaller one.
            self.bytes += min(sizes) if "gather" in name else sizes[-1]
        else:
            self.operators += 1
        return func(*args, **(kwargs or {}))


def mlp(width: int) -> nn.Sequential:
    """An MLP of :data:`LAYERS` blocks that widen to 4 ``width`` inside."""
    blocks = [
        layer
        for _ in range(LAYERS)
        for layer in (nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.Tanh())
    ]
    return nn.Sequential(*blocks, nn.Linear(width, 8))


def spread(model: nn.Module, how: str) -> nn.Module:
    """``model`` distributed over all ranks: "DDP", "FSDP2" (sharded) or "TP" (tensor parallel)."""
    if distributed.get_world_size() == 1:
        return model
    if how == "DDP":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    if how == "FSDP2":
        gates = replicate_gates(model) if dampr.prune.gated_layers(model) else set()
        for layer in model.children():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh, ignored_params=gates)
        return fully_shard(model, mesh=mesh, ignored_params=gates)
    styles = [ColwiseParallel(), RowwiseParallel()]
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][:-1]
    return parallelize_module(model, mesh, {name: styles[i % 2] for i, name in enumerate(linear)})


def counted(width: int, how: str, gates: str) -> dict[str, Any]:
    """The counts of the third training step. ``gates`` is "none", "penalty" (gates trained under a penalty) or "budget"
    (gates that a budget opens and closes).
    """
    torch.manual_seed(0)
    model: nn.Module = mlp(width)
    x = torch.randn(16, width)
    budget = None
    if gates != "none":
        dampr.convert(model, example_inputs=x)
        budget = dampr.Budget(model, x, macs=0.5, **({"steps": 100} if gates == "budget" else {}))
    count = sum(gate.num_gates for gate in dampr.prune.distinct_gates(model).values())
    wrapped = spread(model, how)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(3):
        with Count() as seen:
            loss = wrapped(x).square().mean()
            loss = loss if budget is None else loss + budget.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if budget is not None:
                budget.step()
        del step
    kept = [*model.parameters(), *model.buffers(), *(t for state in optimizer.state.values() for t in state.values())]
    owned = [] if budget is None or budget.controller is None else pytree.tree_leaves(budget.controller.state_dict())
    return {
        "how": how,
        "gates": gates,
        "ranks": distributed.get_world_size(),
        "width": width,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vectors": len(dampr.prune.distinct_gates(model)),
        "count": count,
        "messages": seen.messages,
        "bytes": seen.bytes,
        "operators": seen.operators,
        "kept": sum(_bytes(t) for t in kept) + sum(_bytes(t) for t in owned if isinstance(t, Tensor)),
    }


def _bytes(t: Tensor) -> int:
    """The bytes of a tensor that this rank keeps."""
    local = t.to_local() if isinstance(t, DTensor) else t
    return local.numel() * local.element_size()


def worker(path: Path) -> None:
    """What a rank runs: count every case; rank 0 writes the results to ``path``."""
    distributed.init_process_group("gloo")
    ways = ("DDP", "FSDP2", "TP") if distributed.get_world_size() > 1 else ("one process",)
    found = [counted(width, how, gates) for how in ways for width in WIDTHS for gates in ("none", "penalty", "budget")]
    if distributed.get_rank() == 0:
        path.write_text(json.dumps(found))
    distributed.destroy_process_group()


def launch(ranks: int) -> list[dict[str, Any]]:
    """Run :func:`worker` on this many ranks, and read the results. Raises RuntimeError if a rank fails."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        path = Path(folder, "found.json")
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scale", "--worker", str(path)]
        runs = [
            subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}, cwd=ROOT) for rank in range(ranks)
        ]
        codes = [run.wait() for run in runs]
        if any(codes):
            raise RuntimeError(f"a rank of {ranks} failed")
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return found


def host_seconds(gates: int) -> dict[str, Any]:
    """The seconds of a budget's step on the host: of a step that decides which gates stay open ("deciding"), and of any
    other ("between").
    """
    layers = 8
    neurons = gates // layers
    blocks = [part for _ in range(layers) for part in (nn.Linear(16, neurons), nn.ReLU(), nn.Linear(neurons, 16))]
    x = torch.randn(2, 16)
    budget = dampr.Budget(
        dampr.convert(nn.Sequential(*blocks, nn.Linear(16, 2)), example_inputs=x), x, macs=0.5, steps=400
    )
    controller = budget.controller
    assert controller is not None
    deciding, between = [], []
    for _ in range(controller.ramp.measured + 3 * controller.every):
        for gate in controller.gates:
            gate.probe.grad = torch.rand_like(gate.probe)
        began = time.perf_counter()
        budget.step()
        decides = budget.steps >= controller.ramp.measured and budget.steps % controller.every == 0
        (deciding if decides else between).append(time.perf_counter() - began)
    return {
        "gates": controller.cost.structure.size,
        "deciding": min(deciding),
        "between": min(between),
        "every": controller.every,
    }


def llama() -> dict[str, int]:
    """The numbers of parameters and gates of a transformer of 70 billion parameters, built on the meta device."""
    c, meta = LLAMA, {"bias": False, "device": "meta"}
    narrow = c["width"] // c["heads"] * c["groups"]

    def layer() -> nn.ModuleList:
        up = dampr.nn.GatedLinear(c["width"], c["neurons"], **meta)
        heads = dampr.nn.GatedLinear(
            c["width"], c["width"], granularity=(c["width"], c["width"] // c["groups"]), **meta
        )
        square, key, value = (nn.Linear(c["width"], size, **meta) for size in (c["width"], narrow, narrow))
        return nn.ModuleList(
            [
                up,
                nn.Linear(c["width"], c["neurons"], **meta),
                nn.Linear(c["neurons"], c["width"], **meta),
                heads,
                square,
                key,
                value,
            ]
        )

    model = nn.ModuleList([layer() for _ in range(c["layers"])])
    gates = sum(p.numel() for gate in dampr.prune.distinct_gates(model).values() for p in gate.parameters())
    tables = 2 * c["words"] * c["width"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()) - gates + tables,
        "gates": gates,
        "vectors": len(dampr.prune.distinct_gates(model)),
        "layers": c["layers"],
    }


def simulated(model: dict[str, int], ranks: int) -> dict[str, Any]:
    """A step of ``fully_shard`` on a ring of ranks: the bytes that a rank sends for weights in bf16 and for the one
    all-reduce of the gates in float32, the seconds these take, and the bytes that it keeps.
    """
    around = (ranks - 1) / ranks
    shards = 3 * 2 * model["parameters"] * around  # gathered for the forward and the backward, gradients scattered
    gates = 2 * 4 * model["gates"] * around
    hops = 3 * (model["layers"] + 1) * (ranks - 1), 2 * (ranks - 1)
    seconds = [size / BANDWIDTH + count * LATENCY for size, count in zip((shards, gates), hops, strict=True)]
    return {
        "ranks": ranks,
        "shards": shards,
        "gates": gates,
        "seconds": seconds[0],
        "gate_seconds": seconds[1],
        "kept": 16 * model["parameters"] / ranks,  # weights, gradients and two moments in float32
        "gates_kept": 33 * model["gates"],  # value, level, probe, its gradient; on the host two float64 and a flag
    }


def measure() -> dict[str, Any]:
    """All results, as the results file has them."""
    counts = [row for ranks in RANKS for row in launch(ranks)]
    model = llama()
    return {
        "environment": records.environment(),
        "counts": counts,
        "host": [host_seconds(gates) for gates in GATES],
        "model": model,
        "simulated": [simulated(model, ranks) for ranks in MANY],
    }


def _found() -> dict[str, Any]:
    """The results file."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def counts() -> str:
    """The table of messages, bytes and operators of a step: without gates / with a penalty / with a budget."""
    rows = []
    found = _found()["counts"]
    for row in found:
        if row["gates"] == "none":
            same = [r for r in found if all(r[key] == row[key] for key in ("how", "ranks", "width"))]
            penalty, budget = (next(r for r in same if r["gates"] == kind) for kind in ("penalty", "budget"))
            each = row, penalty, budget
            rows.append(
                (
                    f"{row['how']}, {row['ranks']}",
                    f"{row['parameters']:,}",
                    f"{penalty['vectors']} of {penalty['count']}",
                    " / ".join(str(r["messages"]) for r in each),
                    " / ".join(f"{r['bytes'] / 1e3:.1f}" for r in each),
                    " / ".join(str(r["operators"]) for r in each),
                    " / ".join(f"{r['kept'] / 1e3:.0f}" for r in each),
                )
            )
    head = (
        "ranks",
        "parameters",
        "gate vectors, gates",
        "messages",
        "KB sent by a rank",
        "operators",
        "KB kept by a rank",
    )
    return report.markdown(head, rows) + "\n"


def host() -> str:
    """The table of a budget's milliseconds on the host, extrapolated to the model of 70 billion parameters."""
    data = _found()
    rows = [(f"{r['gates']:,}", f"{r['deciding'] * 1e3:.1f}", f"{r['between'] * 1e3:.1f}") for r in data["host"]]
    last, gates = data["host"][-1], data["model"]["gates"]
    grown = gates / last["gates"]
    guess = last["deciding"] * grown * math.log2(gates) / math.log2(last["gates"]), last["between"] * grown
    rows.append((f"{gates:,} (extrapolated)", *(f"{value * 1e3:,.0f}" for value in guess)))
    return report.markdown(("gates", "ms of a step that decides", "ms of the others"), rows) + "\n"


def many() -> str:
    """The table of the model of 70 billion parameters on a ring of ranks."""
    data = _found()
    rows = [
        (
            f"{r['ranks']:,}",
            f"{r['shards'] / 1e9:.1f}",
            f"{r['gates'] / 1e6:.1f}",
            f"{r['seconds']:.2f}",
            f"{r['gate_seconds'] * 1e3:.2f}",
            f"{r['gate_seconds'] / r['seconds']:.3%}",
            f"{r['kept'] / 1e9:.1f}",
            f"{r['gates_kept'] / 1e6:.0f}",
        )
        for r in data["simulated"]
    ]
    head = (
        "ranks",
        "GB sent, weights",
        "MB sent, gates",
        "s, weights",
        "ms, gates",
        "share of gates",
        "GB kept, weights",
        "MB kept, gates",
    )
    return report.markdown(head, rows) + "\n"


def tokens() -> str:
    """The table for tensor parallelism: what the gates of a layer add to its four all-reduces of activations, by the
    number of tokens.
    """
    model, rows = _found()["model"], []
    for count in (512, 4096, 32768):
        activations, gates = 4 * 2 * count * LLAMA["width"] * model["layers"], 8 * model["gates"]
        rows.append((f"{count:,}", f"{activations / 1e9:.2f}", f"{gates / 1e6:.1f}", f"{gates / activations:.3%}"))
    return report.markdown(("tokens in a step", "GB of activations", "MB of gates", "share"), rows) + "\n"


def limits() -> str:
    """The table of where each cost becomes too large for the model of 70 billion parameters or one of its kind."""
    data = _found()
    model, last = data["model"], data["host"][-1]
    rate = last["deciding"] / (last["gates"] * math.log2(last["gates"]))  # seconds of a decision, which sorts
    slow = next(gates for gates in range(1_000, 10**9, 1_000) if rate * gates * math.log2(gates) >= SECOND)
    crowded = math.ceil(0.1 * 16 * model["parameters"] / (33 * model["gates"]))
    most = 2 / (3 * (model["layers"] + 1))  # the gates' share of the hops, the only cost that grows with the ranks
    tokens = math.floor(8 * model["gates"] / (0.01 * 4 * 2 * LLAMA["width"] * model["layers"]))
    rows = [
        (
            "a whole copy in float32 on each of 8 ranks of a host",
            f"{HOST / 1e12:.0f} TB",
            f"{HOST / (8 * 4) / 1e9:.1f} billion parameters",
        ),
        ("a decision of a budget on the host", f"{SECOND:.0f} s", f"{slow:,} gates"),
        ("memory of the gates of a rank", "a tenth of its weights", f"{crowded:,} ranks"),
        (
            "messages of gates, tensor parallelism",
            "1 % of those of activations",
            f"fewer than {tokens:,} tokens in a step",
        ),
        ("messages of gates, `fully_shard`", "1 % of those of weights", f"no number of ranks (at most {most:.2%})"),
    ]
    return report.markdown(("what", "limit", "reached at"), rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
    else:
        records.write_json(FILE, measure())
        print(counts(), host(), many(), tokens(), limits(), sep="\n")


if __name__ == "__main__":
    main()
