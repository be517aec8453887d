"""LeNet-300-100 pruned by a plan under DistributedDataParallel: ``torchrun --nproc-per-node 2 -m examples.train_ddp``.

Every rank has its part of each batch. ``--checkpoint FILE`` keeps the run after each epoch and goes on from there;
``--stop N`` ends it after N epochs, as if it were killed.
"""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import dampr
from dampr.prune.measure import count_macs, count_params
from examples import common, many


def main() -> None:
    args = many.arguments(__doc__)
    rank, world = many.start()
    name, data = common.images(args.root, args.count)
    began, example = time.perf_counter(), data.x_test[: common.EXAMPLES]
    torch.manual_seed(args.seed)
    model = common.lenet300(data.x.shape[1])
    sizes = {"macs_dense": count_macs(model, data.x_test[:1]), "params_dense": count_params(model)}
    plan = dampr.Plan(model, example, macs=args.macs, steps=many.steps_of(data, args.epochs))
    optimizer = torch.optim.Adam(plan.model.parameters(), lr=many.LR)
    state = many.kept(args.checkpoint)
    if state is not None:
        plan.load_state_dict(state["plan"], optimizer)
        plan.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def wrap() -> nn.Module:
        return DistributedDataParallel(plan.model) if world > 1 else plan.model

    wrapped = wrap()
    for epoch in range(0 if state is None else state["epoch"], args.epochs):
        for x, y in many.batches(data, epoch, args.seed, rank, world):
            loss = F.cross_entropy(wrapped(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if plan.step(optimizer):
                wrapped = wrap()
        own = {"plan": plan.state_dict(), "model": plan.model.state_dict(), "optimizer": optimizer.state_dict()}
        many.keep(args.checkpoint, rank, {"epoch": epoch + 1, **own})
        many.say(rank, f"epoch {epoch + 1}/{args.epochs}  {plan.phase}  loss {float(loss.detach()):.4f}")
        if epoch + 1 == args.stop:
            return
    small = plan.finish()
    many.say(rank, str(plan.report))
    many.finish(__file__, args, rank, world, name, data, small, {"seconds": time.perf_counter() - began, **sizes})


if __name__ == "__main__":
    main()
