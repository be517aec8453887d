"""L0 / hard concrete on LeNet-5-Caffe: gates on 20 and 50 filters and on the 800 and 500 inputs of the linear layers
(Louizos et al. 2018).

Published after 200 epochs of MNIST: 20-25-45-462 at 0.9 % error with lambda 0.1 / N, 9-18-65-25 at 1.0 % with a lambda
for each layer, which is what this script has. ``--root`` takes MNIST.
"""

from __future__ import annotations

import torch
from torch import nn

import dampr
from dampr.cli import demo
from examples import common

# per weight, over N: the defaults of the L0-ARM code, which compares with the published row
LAMBDAS = (10.0, 0.5, 0.1, 10.0)


def main() -> None:
    args = common.arguments(__doc__, epochs=8, scale=1.0, gate_lr=0.1, count=20000)
    torch.manual_seed(args.seed)
    name, data = common.images(args.root, args.count)
    model = demo.cnn(data.x.shape[1])
    dampr.convert(model, include=[nn.Conv2d], example_inputs=data.x_test[:64])
    dampr.convert(model, include=[nn.Linear], granularity="input", example_inputs=data.x_test[:64])
    costs = [args.scale * lam / len(data.x) for lam in LAMBDAS]

    def penalty(model: nn.Module) -> torch.Tensor:
        layers = dampr.prune.gated_layers(model).values()
        return torch.stack([layer.penalty(cost) for layer, cost in zip(layers, costs, strict=True)]).sum()

    seconds = common.train(model, data, epochs=args.epochs, penalty=penalty, gate_lr=args.gate_lr, settle=2)
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
        {**result, "published": "MNIST, 200 epochs: 9-18-65-25 of 20-50-800-500, error 1.0 %"},
        not args.no_write,
    )


if __name__ == "__main__":
    main()
