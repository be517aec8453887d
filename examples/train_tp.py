"""LeNet-300-100 pruned by a budget under tensor parallelism: ``torchrun --nproc-per-node 2 -m examples.train_tp``.

Each rank has a part of the neurons of the first layer and of the inputs of the second, and sees all examples; gates are
whole on each. ``--checkpoint FILE`` keeps the run after each epoch and goes on from there, on any number of ranks;
``--stop N`` ends it after N epochs.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from dampr.integrations.distributed import parallelize_module
from examples import common, many


def main() -> None:
    args = many.arguments(__doc__)
    rank, world = many.start()
    name, data = common.images(args.root, args.count)

    def shard(model: nn.Module) -> nn.Module:
        if world == 1:
            return model
        return parallelize_module(
            model, init_device_mesh("cpu", (world,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
        )

    done = many.with_budget(args, data, rank, world, shard, parts=1)
    if done is not None:
        many.finish(__file__, args, rank, world, name, data, *done)


if __name__ == "__main__":
    main()
