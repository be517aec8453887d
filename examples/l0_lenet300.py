"""L0 / hard concrete on LeNet-300-100, gates on the inputs of all three layers (Louizos et al. 2018, table 1:
219-214-100, error 1.4 %).

The published run is 200 epochs of MNIST with lambda 0.1 / N; this one is short, so gates learn at a rate of their own.
``--root`` takes MNIST.
"""

from __future__ import annotations

import torch

import dampr
from examples import common


def main() -> None:
    args = common.arguments(__doc__, epochs=12, lam=0.1, gate_lr=0.05)
    torch.manual_seed(args.seed)
    name, data = common.images(args.root)
    model = dampr.convert(common.lenet300(data.x.shape[1]), granularity="input", example_inputs=data.x_test[:64])
    cost = args.lam / len(data.x)
    seconds = common.train(
        model, data, epochs=args.epochs, penalty=lambda m: dampr.penalty(m, lam=cost), gate_lr=args.gate_lr, settle=3
    )
    result = {
        "method": "hard_concrete",
        "data": name,
        "seed": args.seed,
        "epochs": args.epochs,
        "seconds": seconds,
        **common.compacted(model, data),
    }
    common.finish(
        __file__,
        {**result, "published": "MNIST, 200 epochs: 219-214-100 of 784-300-100, error 1.4 % (recalled)"},
        not args.no_write,
    )


if __name__ == "__main__":
    main()
