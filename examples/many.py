"""What the examples for several processes share: ranks, parts of batches, checkpoints,
and a run with a budget on sharded layers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn import functional as F

import dampr
from dampr import datasets
from dampr.integrations.distributed import gathered
from dampr.prune.measure import count_macs, count_params
from examples import common

LR = 2e-3
DENSE, RAMP = 0.3, 0.2  # shares of the steps, as of dampr.Plan
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def arguments(description: str | None) -> argparse.Namespace:
    """Those of every example, and where checkpoints are kept and when to stop, as if killed."""
    return common.arguments(description, epochs=8, macs=0.1, count=60000, checkpoint="", stop=0)


def start() -> tuple[int, int]:
    """(rank, how many): of ``torchrun``, or of a single process."""
    if "RANK" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    return distributed.get_rank(), distributed.get_world_size()


def batches(
    data: datasets.Split, epoch: int, seed: int, part: int = 0, parts: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of an epoch in an order that all ranks know, of each this rank's ``part``; the last,
    smaller one is left out.
    """
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(1000 * seed + epoch))
    for rows in order[: steps_of(data, 1) * common.BATCH].split(common.BATCH):
        mine = rows.chunk(parts)[part]
        yield data.x[mine], data.y[mine]


def steps_of(data: datasets.Split, epochs: int) -> int:
    """Steps of the optimizer in so many epochs."""
    return epochs * (len(data.x) // common.BATCH)


def keep(path: str, rank: int, state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, on rank 0; every rank waits for it."""
    if path and rank == 0:
        torch.save(state, f"{path}.partial")
        os.replace(f"{path}.partial", path)
    if distributed.is_initialized():
        distributed.barrier()


def kept(path: str) -> dict[str, Any] | None:
    """The last checkpoint, if there is one."""
    return torch.load(path, weights_only=True) if path and Path(path).exists() else None


def with_budget(
    args: argparse.Namespace,
    data: datasets.Split,
    rank: int,
    world: int,
    shard: Callable[[nn.Module], nn.Module],
    parts: int,
) -> tuple[nn.Module, dict[str, Any]] | None:
    """Train dense, down to the budget, compact, and train on, on layers that ``shard`` spreads over the ranks.

    ``parts``: in how many a batch is divided, 1 where all ranks see all of it. Returns the small model and what became
    of it; None where ``args.stop`` ends the run before.
    """
    began, example = time.perf_counter(), data.x_test[: common.EXAMPLES]
    torch.manual_seed(args.seed)
    model: nn.Module = common.lenet300(data.x.shape[1])
    sizes = {"macs_dense": count_macs(model, data.x_test[:1]), "params_dense": count_params(model)}
    pruned, epochs = round((DENSE + RAMP) * args.epochs), args.epochs
    state, report = kept(args.checkpoint), None
    small = args.checkpoint + ".small.safetensors"
    budget = None
    if state is not None and state["epoch"] >= pruned:
        model = shard(dampr.load(small).train())
    else:
        dampr.convert(model, example_inputs=example)
        dense = steps_of(data, round(DENSE * epochs))
        budget = dampr.Budget(model, example, macs=args.macs, steps=steps_of(data, pruned) - dense, warmup=dense)
        model = shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    if state is not None:
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FULL
        )
        if budget is not None:
            budget.load_state_dict(state["budget"])
    for epoch in range(0 if state is None else state["epoch"], epochs):
        for x, y in batches(data, epoch, args.seed, rank if parts > 1 else 0, parts):
            loss = F.cross_entropy(whole(model(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if budget is not None:
                budget.step()
        if epoch + 1 == pruned and budget is not None:
            report = budget.finalize(round_to=8)  # widths that any number of ranks up to 8 can share
            plain = dampr.compact(model, example_inputs=example)
            if args.checkpoint and rank == 0:
                dampr.save(plain, small)
            model, budget = shard(plain), None
            optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        weights, moments = get_state_dict(model, optimizer, options=FULL)
        own = None if budget is None else budget.state_dict()
        keep(args.checkpoint, rank, {"epoch": epoch + 1, "model": weights, "optimizer": moments, "budget": own})
        say(rank, f"epoch {epoch + 1}/{epochs}  loss {float(loss.detach()):.4f}")
        if epoch + 1 == args.stop:
            return None
    if report is not None:
        say(rank, str(report))
    return gathered(model), {"seconds": time.perf_counter() - began, **sizes}


def whole(y: Any) -> Tensor:
    """Outputs as one tensor."""
    full: Tensor = y.full_tensor() if hasattr(y, "full_tensor") else y
    return full


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def finish(
    script: str,
    args: argparse.Namespace,
    rank: int,
    world: int,
    name: str,
    data: datasets.Split,
    small: Any,
    found: Any,
) -> None:
    """Print the run, and keep it beside those on other numbers of ranks."""
    small.eval()
    run = {
        "ranks": world,
        "accuracy": common.accuracy(small, data),
        "open": "-".join(str(layer.out_features) for layer in small if isinstance(layer, nn.Linear)),
        "macs": count_macs(small, data.x_test[:1]),
        "params": count_params(small),
        **found,
    }
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
    if rank:
        return
    path = common.RESULTS / f"{Path(script).stem}.json"
    before = json.loads(path.read_text()).get("runs", {}) if path.exists() and not args.no_write else {}
    runs = {**before, str(world): run}
    head = {"data": name, "seed": args.seed, "epochs": args.epochs, "images": len(data.x)}
    common.finish(
        script, {**head, **run, "runs": runs, "published": "none: one process is what it is held to"}, not args.no_write
    )
