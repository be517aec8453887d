"""LeNet-300-100 pruned by a budget under ``fully_shard`` (FSDP2): ``torchrun --nproc-per-node 2 -m
examples.train_fsdp``.

Parameters are sharded, gates are not. Behind the ramp the whole model is gathered, compacted and sharded again.
``--checkpoint FILE`` keeps the run after each epoch and goes on from there, on any number of ranks; ``--stop N`` ends
it after N epochs, as if it were killed.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dampr
from dampr.integrations.distributed import replicate_gates
from examples import common, many


def main() -> None:
    args = many.arguments(__doc__)
    rank, world = many.start()
    name, data = common.images(args.root, args.count)

    def shard(model: nn.Module) -> nn.Module:
        if world == 1:
            return model
        gates = replicate_gates(model) if dampr.prune.gated_layers(model) else set()
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.children():
            fully_shard(layer, mesh=mesh, ignored_params=gates)
        sharded: nn.Module = fully_shard(model, mesh=mesh, ignored_params=gates)
        return sharded

    done = many.with_budget(args, data, rank, world, shard, parts=world)
    if done is not None:
        many.finish(__file__, args, rank, world, name, data, *done)


if __name__ == "__main__":
    main()
